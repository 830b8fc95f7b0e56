"""What each step of a chain did to accuracy, size and speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netwright import metrics
from netwright.compress.quantize import baked, pack
from netwright.console import UserError, table
from netwright.cost import compare_times, count
from netwright.deploy.graph import capture, optimise
from netwright.deploy.model import SparseModel
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROUNDS = 30


@dataclass(frozen=True)
class Measured(Result):
    """A network after a step.

    Attributes:
        step: The step, or ``"as given"``.
        accuracy: Share of right answers, in [0, 1]; None without test data.
        parameters: All of them.
        nonzeros: Those that are not zero.
        macs: Multiply-adds for one input.
        sparse_macs: Those of weights that are not zero.
        bytes: Size of the packed file, measured.
        torch_ms: Median time of one input in PyTorch, one thread.
        runtime_ms: The same in the sparse runtime; None where an operator is missing there.
    """

    step: str
    accuracy: float | None
    parameters: int
    nonzeros: int
    macs: int
    sparse_macs: int
    bytes: int
    torch_ms: float
    runtime_ms: float | None


@dataclass(frozen=True)
class Compression(Result):
    """What a chain of methods did.

    Attributes:
        steps: The network as given, and after each step.
        ranks: Of each layer that is two now, the rank.
    """

    steps: tuple[Measured, ...]
    ranks: dict[str, int]

    @property
    def ratio(self) -> float:
        """Bytes before over bytes after."""
        return self.steps[0].bytes / self.steps[-1].bytes

    @property
    def faster(self) -> bool:
        """Whether the last network is faster than the first, each in the runtime that suits it better."""
        first, last = (min(s.torch_ms, s.runtime_ms or s.torch_ms) for s in (self.steps[0], self.steps[-1]))
        return last < first

    def __str__(self) -> str:
        rows = [
            [
                s.step,
                "" if s.accuracy is None else f"{s.accuracy:.4f}",
                s.nonzeros,
                s.sparse_macs,
                s.bytes,
                f"{self.steps[0].bytes / s.bytes:.1f}",
                f"{s.torch_ms:.3f}",
                "" if s.runtime_ms is None else f"{s.runtime_ms:.3f}",
            ]
            for s in self.steps
        ]
        header = ["after", "accuracy", "weights", "MACs", "bytes", "times smaller", "torch ms", "runtime ms"]
        return table(rows, header) + ("" if self.faster else "\nnot faster")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Size and, where it was measured, accuracy after each step."""
        ax = new_axes(ax)
        names = [s.step for s in self.steps]
        ax.bar(names, [s.bytes for s in self.steps], color="0.8")
        ax.set_ylabel("bytes")
        ax.set_yscale("log")
        accuracies = [s.accuracy for s in self.steps if s.accuracy is not None]
        if len(accuracies) == len(names):
            other = ax.twinx()
            other.plot(names, accuracies, "o-", color="C0")
            other.set_ylabel("accuracy")
        return ax


def measure(
    found: Sequence[tuple[str, nn.Module]],
    example: Tensor | Sequence[Tensor],
    test: Iterable[tuple[Tensor, ...]] | None,
    rounds: int,
    runtime: bool,
) -> Iterable[Measured]:
    """Figures of each network; times are taken in alternating rounds, one input and one thread.

    Args:
        found: Step and network, the first of them as it was given.
        example: As for :func:`~netwright.compress.chain.compress`.
        test: Likewise.
        rounds: Likewise.
        runtime: Likewise.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    one = [x[:1].contiguous() for x in inputs]
    calls: dict[str, Callable[[], Any]] = {}
    plain = {name: baked(network).eval() for name, network in found}
    for name, network in plain.items():
        calls[f"torch {name}"] = partial(network, *one)
        if not runtime:
            continue
        try:
            calls[f"runtime {name}"] = partial(SparseModel(optimise(capture(network, one))), *one)
        except (UserError, ValueError):  # inputs of another type, a missing operator, or torch cannot trace the network
            continue
    with torch.inference_mode():
        times = compare_times(calls, rounds=rounds, threads=1)
    for name, network in found:
        cost = count(plain[name], inputs=one)
        yield Measured(
            step=name,
            accuracy=None if test is None else _accuracy(plain[name], test),
            parameters=cost.parameters,
            nonzeros=cost.nonzeros,
            macs=cost.macs,
            sparse_macs=cost.sparse_macs,
            bytes=len(pack(network)),
            torch_ms=times[f"torch {name}"].median_ms,
            runtime_ms=times[f"runtime {name}"].median_ms if f"runtime {name}" in calls else None,
        )


def _accuracy(network: nn.Module, test: Iterable[tuple[Tensor, ...]]) -> float:
    from netwright.train import evaluate

    return metrics.accuracy(*evaluate(network, test))
