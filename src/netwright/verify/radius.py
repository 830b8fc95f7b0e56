"""How far around an input the class is certain, and how near a counterexample is.

The largest radius for which bounds prove the whole box, and the smallest for which an attack along the gradient finds
another class, both by halving over the same list of radii: the true radius lies between them. No solver is asked, so
the time is short and the result depends on nothing but the seed.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import time
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.console import table
from netwright.results import Result
from netwright.train.attacks import pgd
from netwright.verify.exact import smt_verify
from netwright.verify.grid import other_class
from netwright.verify.network import Network, network_of

STEPS = 10  # of the attack
OCTAVES, PER_OCTAVE = 12, 4  # radii from the largest down to 1/4096 of it, 19 % apart


@dataclasses.dataclass(frozen=True)
class Radii(Result):
    """Robustness radii of inputs, in the largest change of a number.

    Attributes:
        proved: No change up to this one changes the class; 0 where bounds prove none.
        broken: A change of this size does; None where the attack found none.
        largest: Where the search began.
        seconds: Wall time.
    """

    proved: tuple[float, ...]
    broken: tuple[float | None, ...]
    largest: float
    seconds: float

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
    timeout: float = 60.0,
) -> Radii:
    """How far around each of some inputs the class is certain, and how near a counterexample is.

    Args:
        model: Gives (batch, classes).
        inputs: Of which the network gets each right.
        labels: Their classes.
        largest: Largest radius, > 0.
        bounds: Range of inputs; None for any.
        timeout: Seconds for all of them, > 0; a radius that was not proved by then is not.

    Raises:
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
    proved = []
    for one, label in zip(x, labels.tolist(), strict=True):

        def open_(radius: float, one: Tensor = one, label: int = label) -> bool:
            left = begin + timeout - time.monotonic()
            box = (one - radius).clamp(low, high), (one + radius).clamp(low, high)
            return left <= 0 or not _proved(network, *box, label, left)

        # The first radius that is not proved; the one before was.
        first = _first(radii, open_)
        proved.append(radii[first - 1] if first else 0.0)
    return Radii(tuple(proved), tuple(broken), largest, time.monotonic() - begin)


def _proved(network: Network, low: Tensor, high: Tensor, label: int, timeout: float) -> bool:
    try:
        return smt_verify(network, low, high, label, timeout, attack=False, solver=False).status == "safe"
    except TypeError:  # an operation without bounds
        return False


def _first(radii: list[float], holds: Callable[[float], bool]) -> int:
    return bisect.bisect_left(radii, True, key=holds)


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
            network.double, x, labels, (x - radius).clamp(low, high), (x + radius).clamp(low, high), steps=STEPS
        )
        logits = network.logits(moved)
        hit = torch.tensor([bool(other_class(row[None], int(y))[0]) for row, y in zip(logits, labels, strict=True)])
        size = torch.where(hit, torch.minimum(size, (moved - x).abs().flatten(1).amax(1)), size)
        active = first < last
        last = torch.where(active & hit, middle, last)
        first = torch.where(active & ~hit, middle + 1, first)
    return [None if math.isinf(each) else each for each in size.tolist()]
