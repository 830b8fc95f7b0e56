"""Several methods one after the other, and what each of them did to accuracy, size and speed.

The order is that in which nothing is lost again: a smaller student (``distill``), two factors for a layer
(``low-rank``), zeros (``prune``), few bits (``quantize``). With training data every step is trained, and the network
that was given is the teacher throughout (Hinton et al., 2015, arXiv:1503.02531); without, weights are only cut and
rounded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from netwright import metrics
from netwright.compress import low_rank, prune
from netwright.compress.distill import distill
from netwright.compress.exact import Scope
from netwright.compress.quantize import baked, pack, post_training_quantize, quantized_distillation, unpack
from netwright.compress.quantize.scaling import BucketScaler, check_bits
from netwright.compress.quantize.storage import packed_metadata
from netwright.console import UserError, table
from netwright.cost import compare_times, count
from netwright.deploy.graph import capture, optimise
from netwright.deploy.model import SparseModel
from netwright.nn.sparse import clone, layers, to_dense
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.train import Loader

ROUNDS = 30
RECOVERY = 0.3  # share of the steps of pruning that is left to recover in


@dataclass(frozen=True)
class Training:
    """How steps are trained.

    Attributes:
        data: Batches (x, labels); None trains nothing.
        epochs: Of every step, >= 1.
        lr: Learning rate of SGD at the start of every step, > 0.
        seed: Of everything random.

    Raises:
        ValueError: If a number is out of its range.
    """

    data: Loader | None = None
    epochs: int = 3
    lr: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"epochs must be >= 1, got {self.epochs}")
        if not self.lr > 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")


@dataclass(frozen=True)
class Distill:
    """A smaller network that learns what the given one answers.

    Attributes:
        student: It; not changed.
    """

    student: nn.Module
    place: ClassVar[int] = 0
    name: ClassVar[str] = "distill"

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> nn.Module:
        """The trained student.

        Raises:
            ValueError: If there are no data.
        """
        if how.data is None:
            raise ValueError("distill needs training data, got none")
        return distill(clone(self.student), teacher, how.data, epochs=how.epochs, lr=how.lr, seed=how.seed)


@dataclass(frozen=True)
class LowRank:
    """Layers as two factors (Maestro): trained by ordered dropout, cut to a budget, trained again.

    Attributes:
        share: Share of the network's parameters that is left at most, in (0, 1).
        lam: Weight of the penalty while ranks are learned.

    Raises:
        ValueError: If ``share`` is out of its range.
    """

    share: float = 0.5
    lam: float = 1e-4
    place: ClassVar[int] = 1
    name: ClassVar[str] = "low-rank"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must lie in (0, 1), got {self.share}")

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> nn.Module:
        """A plain network of fewer parameters; its ranks are kept as ``ranks`` of :class:`Compression`."""
        budget = int(self.share * sum(p.numel() for p in network.parameters()))
        low = low_rank.decompose(network)
        if how.data is not None:
            low_rank.fit_maestro(low, how.data, lam=self.lam, epochs=how.epochs, lr=how.lr, seed=how.seed)
        # By what a parameter brings: compared term by term, the first layers would end with one term each, although
        # theirs are the cheapest.
        cut = low_rank.prune_to_budget(low, params=budget, hierarchical=False, per_parameter=True)
        return cut if how.data is None else low_rank.recalibrate_batchnorm(cut, how.data)


@dataclass(frozen=True)
class Prune:
    """Zeros for the smallest weights: more and more of them, then the rest recovers.

    Attributes:
        sparsity: Share of zeros among the weights of convolutions and linear layers, in [0, 1).
        scope: As for :func:`netwright.compress.prune.magnitude`.

    Raises:
        ValueError: If ``sparsity`` is out of its range.
    """

    sparsity: float = 0.9
    scope: Scope = "lamp"
    place: ClassVar[int] = 2
    name: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        prune.cubic_sparsity(0, 0, 1, 0.0, self.sparsity)

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> nn.Module:
        """A plain network with zeros."""
        if how.data is None:
            return prune.remove(prune.magnitude(network, self.sparsity, self.scope))
        from netwright.compress.callbacks import GradualPruning

        steps = how.epochs * len(how.data)
        end = max(1, round((1 - RECOVERY) * steps))
        ramp = GradualPruning(self.sparsity, 0, end, max(1, end // 10), scope=self.scope)
        distill(network, teacher, how.data, epochs=how.epochs, lr=how.lr, callbacks=[ramp], seed=how.seed)
        return prune.remove(network)


@dataclass(frozen=True)
class Quantize:
    """Weights of a few bits: quantised distillation, or rounding.

    Attributes:
        bits: 1..16.
        bucket_size: Weights that share a scale, >= 1; None for one scale a tensor.

    Raises:
        ValueError: If a number is out of its range.
    """

    bits: int = 4
    bucket_size: int | None = 256
    place: ClassVar[int] = 3
    name: ClassVar[str] = "quantize"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        BucketScaler(self.bucket_size)

    def apply(self, network: nn.Module, teacher: nn.Module, how: Training) -> nn.Module:
        """The network with quantisers; zeros stay zeros."""
        if how.data is None:
            return post_training_quantize(network, self.bits, self.bucket_size)
        return quantized_distillation(
            network,
            teacher,
            how.data,
            bits=self.bits,
            bucket_size=self.bucket_size,
            epochs=how.epochs,
            lr=how.lr,
            seed=how.seed,
        )


Step = Distill | LowRank | Prune | Quantize


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


def compress(
    model: nn.Module,
    steps: Sequence[Step],
    *,
    example: Tensor,
    training: Training | None = None,
    test: Iterable[tuple[Tensor, ...]] | None = None,
    rounds: int = ROUNDS,
    runtime: bool = True,
    progress: Callable[[str], object] | None = None,
) -> tuple[nn.Module, Compression]:
    """Compresses any network by a chain of methods and measures it after each.

    Args:
        model: The network; it is not changed.
        steps: Of distill, low-rank, prune and quantize, in this order, each once at most.
        example: A batch of inputs, of the network's own kind (standardised, where it wants that).
        training: Data to train on, and how; none by default.
        test: Batches (x, labels) to measure the accuracy on; read once for each network.
        rounds: Timed calls of each network.
        runtime: Whether networks are also built for the sparse runtime and timed there.
        progress: Called with the name of each step as it begins.

    Returns:
        The network, in evaluation mode, ordinary in every way (one that is quantised carries its quantisers:
        :func:`~netwright.compress.quantize.baked` and every export take them away), and the report.

    Raises:
        ValueError: If there is no step, the order is another, or an argument of a step is out of its range.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small, report = compress(net, [LowRank(0.5), Prune(0.5), Quantize(4)], example=torch.rand(1, 1, 8, 8))
        >>> [s.step for s in report.steps], report.ratio > 5
        (['as given', 'low-rank', 'prune', 'quantize'], True)
    """
    places = [step.place for step in steps]
    if not steps or any(b <= a for a, b in itertools.pairwise(places)):
        order = ", ".join(kind.name for kind in (Distill, LowRank, Prune, Quantize))
        got = ", ".join(step.name for step in steps) or "none"
        raise ValueError(f"steps must be some of {order}, in this order, got {got}")
    how = training or Training()
    teacher = to_dense(model).eval()
    network: nn.Module = clone(teacher)
    ranks: dict[str, int] = {}
    found = [("as given", network)]
    for step in steps:
        if progress is not None:
            progress(step.name)
        network = step.apply(clone(network), teacher, how)
        if isinstance(step, LowRank):
            ranks = low_rank.factored_ranks(network)
            network = low_rank.finalize(network)
            if how.data is not None:
                distill(network, teacher, how.data, epochs=how.epochs, lr=how.lr, seed=how.seed)
        network.eval()
        found.append((step.name, network))
    return network, Compression(tuple(_measured(found, example, test, rounds, runtime)), ranks)


def _measured(
    found: list[tuple[str, nn.Module]],
    example: Tensor,
    test: Iterable[tuple[Tensor, ...]] | None,
    rounds: int,
    runtime: bool,
) -> Iterable[Measured]:
    one = example[:1].contiguous()
    calls: dict[str, Callable[[], Any]] = {}
    plain = {name: baked(network).eval() for name, network in found}
    for name, network in plain.items():
        calls[f"torch {name}"] = partial(network, one)
        if not runtime:
            continue
        try:
            calls[f"runtime {name}"] = partial(SparseModel(optimise(capture(network, (one,)))), one)
        except UserError:  # an operator is missing there, or torch cannot trace the network
            continue
    with torch.inference_mode():
        times = compare_times(calls, rounds=rounds, threads=1)
    for name, network in found:
        cost = count(plain[name], tuple(one.shape[1:]))
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


def packed(network: nn.Module, report: Compression) -> bytes:
    """A compressed network as bytes, with what :func:`unpacked` needs to know of its form.

    Args:
        network: From :func:`compress`.
        report: Likewise.
    """
    return pack(network, {"ranks": json.dumps(report.ranks)})


def unpacked(blob: bytes, model: nn.Module) -> nn.Module:
    """The plain network that was packed, bit for bit.

    Args:
        blob: From :func:`packed`.
        model: The network before it was compressed, or another of its architecture; after ``distill`` the student. It
            is not changed.

    Raises:
        UserError: If the bytes are damaged, or do not fit the network.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> small, report = compress(net, [LowRank(0.5), Quantize(4)], example=x)
        >>> again = unpacked(packed(small, report), net)
        >>> torch.allclose(again(x), small(x), atol=1e-5)
        True
    """
    try:
        ranks = json.loads(packed_metadata(blob).get("ranks", "{}"))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"damaged packed weights: {error}", cure="pack it again") from error
    known = dict(layers(model))
    if strange := sorted(set(ranks) - set(known)):
        raise UserError(f"the weights do not fit the network: it has no layer {strange[0]!r}")
    return unpack(blob, low_rank.with_ranks(model, ranks) if ranks else model).eval()
