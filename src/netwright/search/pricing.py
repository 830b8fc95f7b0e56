"""Prices of architectures: what a supernet's mixing weights cost on average, and what an architecture costs.

    E[cost] = c + sum_l sum_i m_li t_li,        cost(g) = c + sum_l t_l,g(l)

with t the cost of candidate i of choice l and c that of all that no choice changes. A supernet is narrower than the
network that is built from what it finds; :class:`NetworkCost` prices its decisions as the wide network will pay them.
:class:`WithinLimits` reads off the most probable architecture that costs no more than a limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from netwright.checks import number
from netwright.search.protocol import need
from netwright.search.selection import mixing
from netwright.search.supernet import check_costs

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.selection import Weights
    from netwright.search.spaces import AnySpace
    from netwright.search.supernet import Supernet

Costs = Mapping[str, Sequence[float]]
FULL = 1000.0
_HALVINGS, _STRONGEST, _LEAST = 40, 1e9, -100.0


class ExpectedCost:
    """Base of what a penalty may take as its cost: a function of a supernet, differentiable in alpha.

    Attributes:
        constant: Cost of all that no choice changes.
        unit: Costs in one unit of the result; 1e-3 turns milliseconds into microseconds.
    """

    constant = 0.0
    unit = 1.0

    def candidates(self, supernet: Supernet) -> Costs:
        """The cost of every candidate by key, summed over the choices that share it."""
        raise NotImplementedError(f"{type(self).__name__} must define candidates(supernet)")

    def __call__(self, supernet: Any) -> Tensor:
        """The expectation under what the gates drew for the last pass, in training, else under their expectation."""
        self.check(supernet)
        return (supernet.priced(self.candidates(supernet)) + self.constant) / self.unit

    def check(self, supernet: Any) -> None:
        """Refuses a supernet that prices no candidates.

        Raises:
            ValueError: If it does not.
        """
        need(type(self).__name__, supernet, "priced")

    def of(self, supernet: Supernet, genotype: Genotype) -> float:
        """The cost of a genotype of the supernet's space, in the unit of the table.

        Raises:
            ValueError: If the genotype is not of the space, or :meth:`candidates` has not one number for each.
        """
        costs, choices = self.candidates(supernet), supernet.keyed_choices()
        check_costs(costs, {key: choice.names for key, choice in choices.items()})
        decisions = supernet.space.decisions(genotype)
        return self.constant + sum(costs[key][choices[key].names.index(name)] for key, name in decisions.items())

    @torch.no_grad()
    def figures(self, supernet: Supernet, genotype: Genotype) -> dict[str, float]:
        """What an epoch of a search records, in the unit of the table: under softmax(alpha), and of a genotype."""
        expected = supernet.priced(self.candidates(supernet), drawn=False)
        return {
            "expected_latency": self.constant + float(expected),
            "argmax_latency": self.of(supernet, genotype),
        }


class NetworkCost(ExpectedCost):
    """The cost of the network that will be built, as a function of the mixing weights of a smaller supernet.

    In a space of cells a node keeps two of its incoming edges; the expectation takes each edge for its share of two.

    Args:
        space: The space.
        table: Cost of every operation of the network by its key, and of the rest by ``"constant"``: what
            :func:`netwright.search.latency.measure` or :func:`multiply_adds` gave for the same shape and options.
        shape: (C, H, W) of one input.
        num_classes: Number of classes.
        unit: Costs in one unit of the result.
        **options: Size of the network, as ``space.build`` takes it.

    Raises:
        KeyError: If the table misses an operation.
        ValueError: If ``unit`` is not positive.

    Example:
        >>> from netwright.search import spaces
        >>> space = spaces.get("micro-chain")
        >>> cost = NetworkCost(space, multiply_adds(space, (1, 16, 16), channels=32), (1, 16, 16), channels=32)
        >>> small = space.supernet(1, 10)
        >>> slow = space.genotype(dict.fromkeys(space.choices(), "k5_e4"))
        >>> float(cost(small)) < cost.of(small, slow)
        True
    """

    def __init__(
        self,
        space: AnySpace,
        table: Mapping[Any, float],
        shape: tuple[int, int, int],
        num_classes: int = 10,
        *,
        unit: float = 1.0,
        **options: Any,
    ):
        number("unit", unit, "> 0")
        # on no memory: only the shapes of its operations are asked for
        network = space.supernet(shape[0], num_classes, **options)
        self.constant, self.unit = float(table.get("constant", 0.0)), unit
        self._costs = network.candidate_costs(table, shape)
        self._shares = {
            key: 2 / len(keys)
            for keys in (space.incoming().values() if hasattr(space, "incoming") else ())
            for key in keys
        }

    def candidates(self, supernet: Supernet) -> Costs:
        """The cost of every candidate by key."""
        return self._costs

    def __call__(self, supernet: Any) -> Tensor:
        """The expectation; see the class."""
        shared = {key: [self._shares.get(key, 1.0) * cost for cost in row] for key, row in self._costs.items()}
        return (supernet.priced(shared) + self.constant) / self.unit


def operation_macs(supernet: Supernet, shape: tuple[int, int, int]) -> dict[Any, float]:
    """Multiply-adds of every costly candidate of a supernet by its key, for one input of ``shape`` (C, H, W)."""
    from netwright.cost import count

    return {key: float(count(op, size).macs) for key, (op, size) in supernet.operations(shape).items()}


def multiply_adds(
    space: AnySpace, shape: tuple[int, int, int], num_classes: int = 10, **options: Any
) -> dict[Any, float]:
    """Multiply-adds of every operation of a space by its key, and by ``"constant"`` those that no choice changes.

    Args:
        space: The space.
        shape: (C, H, W) of one input.
        num_classes: Number of classes.
        **options: Size of the network, as ``space.build`` takes it.

    Example:
        >>> from netwright.search import spaces
        >>> table = multiply_adds(spaces.get("micro-chain"), (1, 16, 16))
        >>> table["k3_e2", 8, 12, 16, 16, 1, "mbconv ReLU"]      # 8 * 16 + 16 * 9 + 16 * 12 for each of 256 pixels
        118784.0
    """
    from netwright.cost import count
    from netwright.search.latency import operations_of
    from netwright.seeding import stream

    supernet = space.supernet(shape[0], num_classes, **options)
    table = operation_macs(supernet, shape)
    network: nn.Module = space.build(space.random(stream(0, "multiply-adds")), shape[0], num_classes, seed=0, **options)
    chosen = operations_of(network, shape).values()
    table["constant"] = count(network, shape).macs - sum(table[key] for key in chosen if key is not None)
    return table


class MultiplyAdds(ExpectedCost):
    """The multiply-adds of a supernet's choices for inputs of its last shape, as a price.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-chain").supernet(1, 10)
        >>> _ = supernet(torch.zeros(1, 1, 16, 16))
        >>> MultiplyAdds().candidates(supernet)["layer_1"][-1]    # to skip costs nothing
        0.0
    """

    def __init__(self) -> None:
        self._counted: dict[tuple[int, ...], Costs] = {}

    def candidates(self, supernet: Supernet) -> Costs:
        """The multiply-adds of every candidate by key."""
        if supernet.input_shape is None:
            raise ValueError("the supernet must have had a forward pass, got none")
        channels, height, width = shape = supernet.input_shape
        if shape not in self._counted:
            table = operation_macs(supernet, (channels, height, width))
            self._counted[shape] = supernet.candidate_costs(table, (channels, height, width))
        return self._counted[shape]


@dataclass(frozen=True)
class Limit:
    """A cost and the most that it may be.

    Attributes:
        cost: The prices.
        most: Largest cost, in the unit of the table, > 0.
        name: What it is, for messages.

    Raises:
        ValueError: If ``most`` is not positive.
    """

    cost: ExpectedCost
    most: float
    name: str = "cost"

    def __post_init__(self) -> None:
        number(self.name, self.most, "> 0")


class Limits(ExpectedCost):
    """Several limits as one cost: the mean of the costs, each in thousandths of its limit.

    As the ``cost`` of a penalty its ``ref`` is :data:`FULL`, whatever the units.

    Args:
        limits: One or more.

    Raises:
        ValueError: If there is none.
    """

    def __init__(self, *limits: Limit):
        if not limits:
            raise ValueError("limits must be at least 1, got 0")
        self.limits = limits
        self.constant = sum(self._weight(limit) * limit.cost.constant for limit in limits)

    def candidates(self, supernet: Supernet) -> Costs:
        """The cost of every candidate by key, in thousandths of the limits."""
        total: dict[str, list[float]] = {}
        for limit in self.limits:
            for key, row in limit.cost.candidates(supernet).items():
                before = total.get(key, [0.0] * len(row))
                total[key] = [a + self._weight(limit) * b for a, b in zip(before, row, strict=True)]
        return total

    def __call__(self, supernet: Any) -> Tensor:
        """The expectation, in thousandths of the limits."""
        costs = [self._weight(limit) * limit.cost.unit * limit.cost(supernet) for limit in self.limits]
        return torch.stack(costs).sum()

    def over(self, supernet: Supernet, genotype: Genotype) -> list[str]:
        """Which limits an architecture breaks, and by how much."""
        costs = [(limit, limit.cost.of(supernet, genotype)) for limit in self.limits]
        return [f"{cost:,.4g} {limit.name} of {limit.most:,.4g} allowed" for limit, cost in costs if cost > limit.most]

    def _weight(self, limit: Limit) -> float:
        return FULL / limit.most / len(self.limits)


class WithinLimits:
    """The most probable architecture within limits, by the space's own rule.

    Mixing weights m are tilted to m exp(-lambda t) with the least lambda >= 0 at which what the rule reads off is
    within the limits: the Lagrangian of max sum log m subject to cost <= limit.

    Args:
        limits: The limits.

    Raises:
        ValueError: In :meth:`select`, if no lambda leads to an architecture within the limits.

    Example:
        >>> from netwright.search import spaces
        >>> space = spaces.get("micro-chain")
        >>> supernet = space.supernet(1, 10)
        >>> cost = NetworkCost(space, multiply_adds(space, (1, 16, 16)), (1, 16, 16))
        >>> found = WithinLimits(Limits(Limit(cost, 900_000))).select(supernet)
        >>> cost.of(supernet, found) <= 900_000
        True
    """

    def __init__(self, limits: Limits):
        self.limits = limits

    def select(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Genotype:
        """The genotype; the data and the seed are not needed."""
        weights, costs = mixing(supernet), self.limits.candidates(supernet)

        def read(strength: float) -> Genotype:
            return supernet.space.selector().read(supernet.space, _tilted(weights, costs, strength))

        found = read(0.0)
        if not self.limits.over(supernet, found):
            return found
        low, high = 0.0, 1e-3  # of a thousandth of the limit
        while over := self.limits.over(supernet, found := read(high)):
            if high > _STRONGEST:
                raise ValueError(
                    f"no architecture of space {supernet.space.name!r} is within the limits: {'; '.join(over)}"
                )
            low, high = high, 4 * high
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.limits.over(supernet, tried := read(middle)):
                low = middle
            else:
                high, found = middle, tried
        return found


def cheapest(limits: Limits, supernet: Supernet) -> Genotype:
    """The architecture of a supernet's space that costs least, in thousandths of the limits.

    Example:
        >>> from netwright.search import spaces
        >>> space = spaces.get("micro-chain")
        >>> cost = NetworkCost(space, multiply_adds(space, (1, 16, 16)), (1, 16, 16))
        >>> cheapest(Limits(Limit(cost, 1e6)), space.supernet(1, 10)).operations
        ('k3_e2', 'skip', 'k3_e2', 'skip', 'k3_e2', 'skip')
    """
    costs = limits.candidates(supernet)
    tilted = _tilted(mixing(supernet), costs, _STRONGEST)
    genotype: Genotype = supernet.space.selector().read(supernet.space, tilted)
    return genotype


def _tilted(weights: Weights, costs: Costs, strength: float) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """log m - lambda t: rules compare, so the logarithms serve them as well."""
    return {
        key: (names, m.double().log().clamp_min(_LEAST) - strength * torch.tensor(costs[key], dtype=torch.float64))
        for key, (names, m) in weights.items()
    }
