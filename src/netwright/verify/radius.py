"""How far around an input the class is certain, and how near a counterexample is.

The largest radius for which bounds prove the whole box, and the smallest for which an attack along the gradient finds
another class, both over the same list of radii: the true radius lies between them. The exact engine may be asked about
what they leave open. Nothing is drawn: results differ only where the time is over.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import time

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.console import table, task
from netwright.results import Result
from netwright.train.attacks import pgd
from netwright.verify.exact import smt_verify
from netwright.verify.grid import grid_search, other_class
from netwright.verify.layerwise import ranking
from netwright.verify.network import Network, network_of
from netwright.verify.region import Region
from netwright.verify.relaxation import ALL, Relaxation

STEPS = 10  # of the attack
OCTAVES, PER_OCTAVE = 12, 4  # radii from the largest down to 1/4096 of it, 19 % apart


@dataclasses.dataclass(frozen=True)
class Radii(Result):
    """Robustness radii of inputs, in the largest change of a number.

    Attributes:
        proved: No change up to this one changes the class; 0 where none is proved.
        broken: A change of this size does; None where none was found.
        largest: Where the search began.
        seconds: Wall time.
        exact: Whether the exact engine decided something that bounds and attack had left open.
    """

    proved: tuple[float, ...]
    broken: tuple[float | None, ...]
    largest: float
    seconds: float
    exact: tuple[bool, ...] = ()

    def __str__(self) -> str:
        rows = [[i, f"{a:.4g}", "-" if b is None else f"{b:.4g}"] for i, (a, b) in enumerate(self._pairs())]
        return table(rows, ["input", "proved up to", "counterexample at"])

    def _pairs(self) -> list[tuple[float, float | None]]:
        return list(zip(self.proved, self.broken, strict=True))


def robustness_radii(
    model: nn.Module | Network,
    inputs: Float[Tensor, "inputs *shape"],
    labels: Int[Tensor, " inputs"],
    largest: float = 0.5,
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    tight: bool = True,
    timeout: float = 60.0,
    solver_timeout: float = 0.0,
) -> Radii:
    """How far around each of some inputs the class is certain, and how near a counterexample is.

    Args:
        model: Gives (batch, classes).
        inputs: Of which the network gets each right.
        labels: Their classes.
        largest: Largest radius, > 0.
        bounds: Range of inputs; None for any.
        tight: Whether what intervals leave open is looked at again with ranges that lines give, which takes a pass back
            for every activation of open sign.
        timeout: Seconds for all of them, > 0; a radius that was not proved by then is not.
        solver_timeout: Seconds more in which the exact engine is asked about what is still open, >= 0; with 0 it is
            not asked.

    Raises:
        ImportError: If the exact engine is asked and Z3 is not installed.
        ValueError: If an input is wrong as it is, or a number is out of its range.

    Example:
        >>> net = nn.Linear(1, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net.bias.data.copy_(torch.tensor([0.0, 1.0]))
        >>> found = robustness_radii(net, torch.tensor([[0.6]]), torch.tensor([0]), 0.4)  # x against 1 - x
        >>> found.proved[0] < 0.1 <= found.broken[0]
        True
    """
    begin = time.monotonic()
    for name, value in (("largest", largest), ("timeout", timeout)):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    if not (solver_timeout >= 0 and math.isfinite(solver_timeout)):
        raise ValueError(f"solver_timeout must be >= 0 and finite, got {solver_timeout}")
    if not len(inputs) or len(inputs) != len(labels):
        raise ValueError(f"inputs and labels must be as many, at least 1, got {len(inputs)} and {len(labels)}")
    network = network_of(model, inputs.shape[1:])
    x = inputs.detach().double()
    wrong = (network.logits(x).argmax(1) != labels).nonzero().flatten()
    if len(wrong):
        raise ValueError(f"inputs must be those that the network gets right, got one that it does not: {int(wrong[0])}")
    radii = [largest * 2 ** (-i / PER_OCTAVE) for i in reversed(range(OCTAVES * PER_OCTAVE + 1))]
    low, high = (-math.inf, math.inf) if bounds is None else bounds
    broken = _attacked(network, x, labels, radii, low, high)
    searches = [_Search(bisect.bisect_left(radii, math.inf if size is None else size)) for size in broken]

    def proves(i: int, place: int, most: int) -> bool:
        box = (x[i] - radii[place]).clamp(low, high), (x[i] + radii[place]).clamp(low, high)
        relaxation = Relaxation(network, *box, most=most, deadline=begin + timeout)
        return bool((relaxation.margins(int(labels[i]))[0] > 0).all())

    try:
        for most in (0, ALL) if tight else (0,):
            for search in searches:
                search.start()
            # In turns, so that no input waits for another when the time is over.
            while active := [i for i, search in enumerate(searches) if search.place is not None]:
                for i in active:
                    searches[i].told(proves(i, searches[i].place or 0, most))
    except (TimeoutError, TypeError):  # or an operation without bounds
        pass
    good = [search.good for search in searches]
    exact = [False] * len(x)
    if solver_timeout:
        asked = _Asked(network, x, labels.tolist(), radii, (low, high), good, broken, exact)
        asked.run(time.monotonic() + solver_timeout)
    proved = tuple(radii[place] if place >= 0 else 0.0 for place in good)
    return Radii(proved, tuple(broken), largest, time.monotonic() - begin, tuple(exact))


def few_number_radii(
    model: nn.Module | Network,
    inputs: Float[Tensor, "inputs *shape"],
    labels: Int[Tensor, " inputs"],
    numbers: int = 4,
    largest: float = 0.5,
    *,
    steps: int = 8,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    timeout: float = math.inf,
) -> tuple[float | None, ...]:
    """The smallest change of a few numbers that changes the class, among the points of a grid.

    Args:
        model: Gives (batch, classes).
        inputs: Of which the network gets each right.
        labels: Their classes.
        numbers: How many numbers vary, those with the largest derivative of the margin; >= 1.
        largest: Largest change, > 0.
        steps: Of the grid, to each side.
        bounds: Range of inputs; None for any.
        timeout: Seconds for all of them, > 0, of which each has its share.

    Returns:
        For each input the largest change of a number in it; None where no point of the grid has another class, NaN
        where the time was over before one was found.

    Raises:
        ValueError: If the grid has more than 10^7 points, or a number is out of its range.

    Example:
        >>> net = nn.Linear(1, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net.bias.data.copy_(torch.tensor([0.0, 1.0]))
        >>> few_number_radii(net, torch.tensor([[0.6]]), torch.tensor([0]), 1, 0.4)  # x against 1 - x
        (0.15,)
    """
    if numbers < 1:
        raise ValueError(f"numbers must be >= 1, got {numbers}")
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0, got {timeout}")
    deadline = time.monotonic() + timeout
    network = network_of(model, inputs.shape[1:])
    found: list[float | None] = []
    for x, label in zip(inputs.detach().double().flatten(1), labels.tolist(), strict=True):
        share = max(0.0, deadline - time.monotonic()) / (len(inputs) - len(found))
        dims = tuple(ranking(network, x, 0, "gradient", label)[:numbers])
        region = Region(dims, largest / steps, steps, norm="inf", radius=largest, bounds=bounds)
        seen = grid_search(network, x, region, label=label, timeout=share)
        nearest = None if seen.finished else math.nan
        found.append(nearest if seen.distance is None else round(seen.distance, 12))
    return tuple(found)


@dataclasses.dataclass
class _Asked:
    """The exact engine between what is proved and what is broken, each input in turn, until the time is over."""

    network: Network
    x: Tensor
    labels: list[int]
    radii: list[float]
    bounds: tuple[float, float]
    good: list[int]  # this and the next two are changed
    broken: list[float | None]
    exact: list[bool]

    def run(self, deadline: float) -> None:
        """Halves what is open."""
        bad = [bisect.bisect_left(self.radii, math.inf if size is None else size) for size in self.broken]
        active = [i for i in range(len(self.x)) if self.good[i] + 1 < bad[i]]
        with task("exact radii", total=len(active)) as bar:
            while active:
                share = (deadline - time.monotonic()) / len(active)
                for i in tuple(active):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        return
                    try:
                        found = self._about(i, (self.good[i] + bad[i]) // 2, min(share, left))
                    except TypeError:  # an operation that the engine does not know
                        return
                    if found is not None:
                        self.exact[i] = True
                        bad[i] = max(self.good[i] + 1, min(bad[i], found))
                    if found is None or self.good[i] + 1 >= bad[i]:
                        active.remove(i)
                        bar.advance()

    def _about(self, i: int, place: int, timeout: float) -> int | None:
        """The first place at which the class is known to be another, after the engine was asked; None if it failed."""
        radius, x = self.radii[place], self.x[i]
        lower, upper = (x - radius).clamp(*self.bounds), (x + radius).clamp(*self.bounds)
        found = smt_verify(self.network, lower, upper, self.labels[i], max(1e-3, timeout))
        if found.status == "unknown":
            return None
        if found.witness is None:
            self.good[i] = place
            return len(self.radii)
        size = float((found.witness - x.flatten()).abs().max())
        self.broken[i] = size
        return bisect.bisect_left(self.radii, size)


class _Search:
    """For the last place of a list at which something holds, which it does up to some place: upwards, then by halves.

    Attributes:
        good: The last place at which it is known to hold; -1 for none.
        place: The next one to look at; None before the start and at the end.
    """

    def __init__(self, bad: int):
        self.good, self.most = -1, bad
        self.place: int | None = None

    def start(self) -> None:
        """Looks above what holds."""
        self.bad, self.stride = self.most, PER_OCTAVE
        self._next()

    def told(self, holds: bool) -> None:
        """The answer at ``place``."""
        assert self.place is not None
        if holds:
            self.good = self.place
        else:
            self.bad, self.stride = self.place, 0
        self._next()

    def _next(self) -> None:
        if self.good + 1 >= self.bad:
            self.place = None
        elif self.stride and self.good + self.stride < self.bad:
            self.place = self.good + self.stride
        else:
            self.place = (self.good + self.bad) // 2


def _attacked(
    network: Network, x: Tensor, labels: Tensor, radii: list[float], low: float, high: float
) -> list[float | None]:
    """Sizes of the smallest changes found, all inputs at once."""
    first, last = torch.zeros(len(x), dtype=torch.long), torch.full((len(x),), len(radii))
    size = torch.full((len(x),), math.inf, dtype=torch.float64)
    table_, tail = torch.tensor(radii, dtype=torch.float64), [1] * (x.ndim - 1)
    while bool((first < last).any()):
        middle = ((first + last) // 2).clamp(max=len(radii) - 1)
        radius = table_[middle].view(-1, *tail)
        moved = pgd(
            network.single, x, labels, (x - radius).clamp(low, high), (x + radius).clamp(low, high), steps=STEPS
        )
        logits = network.logits(moved)
        hit = torch.tensor([bool(other_class(row[None], int(y))[0]) for row, y in zip(logits, labels, strict=True)])
        size = torch.where(hit, torch.minimum(size, (moved - x).abs().flatten(1).amax(1)), size)
        active = first < last
        last = torch.where(active & hit, middle, last)
        first = torch.where(active & ~hit, middle + 1, first)
    return [None if math.isinf(each) else each for each in size.tolist()]
