"""How many inputs of a data set a network is verified on, and how far the nearest counterexamples are."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.console import table, task
from netwright.results import Result, new_axes
from netwright.verify.network import Network, network_of
from netwright.verify.region import Region
from netwright.verify.result import VerificationResult
from netwright.verify.safety import Engine, verify_point

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class RobustnessReport(Result):
    """Verdicts over inputs.

    Attributes:
        engine: Which one.
        inputs: How many were given.
        wrong: Those that the network gets wrong as they are; they are not verified.
        safe, unsafe, unknown: The others.
        seconds: Wall time of all.
        results: The verdict of each that was verified, by its place among the inputs.
    """

    engine: str
    inputs: int
    wrong: int
    safe: int
    unsafe: int
    unknown: int
    seconds: float
    results: dict[int, VerificationResult]

    @property
    def distances(self) -> list[float]:
        """Of the counterexamples, sorted."""
        return sorted(r.distance for r in self.results.values() if r.distance is not None and r.status == "unsafe")

    def __str__(self) -> str:
        names = ("inputs", "wrong", "safe", "unsafe", "unknown")
        return table([[name, getattr(self, name)] for name in names], ["verdict", "inputs"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of verified inputs that have a counterexample within a distance."""
        ax = new_axes(ax)
        distances, total = self.distances, max(1, len(self.results))
        ax.step([0.0, *distances], [i / total for i in range(len(distances) + 1)], where="post")
        ax.set_xlabel("distance")
        ax.set_ylabel("share with a counterexample")
        ax.set_ylim(0, 1)
        return ax


def robustness_report(
    model: nn.Module | Network,
    data: tuple[Float[Tensor, "inputs *shape"], Int[Tensor, " inputs"]],
    region_fn: Callable[[Tensor, int], Region],
    *,
    engine: Engine = "grid",
    max_points: int = 10**7,
    timeout: float = 60.0,
) -> RobustnessReport:
    """Verifies each input that the network gets right.

    Args:
        model: Gives (batch, classes).
        data: Inputs and their classes.
        region_fn: The region of an input, from it and its class.
        engine: As for :func:`netwright.verify.verify_point`.
        max_points: Likewise.
        timeout: Seconds for one input.

    Raises:
        ValueError: If there is no input, or inputs and classes differ in number.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> net, x = nn.Linear(4, 2), torch.rand(3, 4)
        >>> found = robustness_report(net, (x, net(x).argmax(1)), lambda x, _: Region(dims=(0, 1), span=1e-3))
        >>> found.inputs, found.wrong, found.safe + found.unsafe
        (3, 0, 3)
    """
    images, labels = data
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"data must be inputs and as many classes, at least 1, got {len(images)} and {len(labels)}")
    begin = time.monotonic()
    network = network_of(model, images.shape[1:])
    right = (network.logits(images).argmax(1) == labels).nonzero().flatten().tolist()
    results: dict[int, VerificationResult] = {}
    with task("inputs", total=len(right)) as bar:
        for i in right:
            region = region_fn(images[i], int(labels[i]))
            results[i] = verify_point(network, images[i], region, engine, max_points, timeout, label=int(labels[i]))
            bar.advance()
    counts = collections.Counter(result.status for result in results.values())
    verdicts = {name: counts[name] for name in ("safe", "unsafe", "unknown")}
    return RobustnessReport(
        engine, len(images), len(images) - len(right), **verdicts, seconds=time.monotonic() - begin, results=results
    )
