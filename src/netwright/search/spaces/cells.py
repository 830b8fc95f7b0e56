"""The supernet of a cell space.

Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", 2019, arXiv:1806.09055. Every edge of a cell holds
all operations,

    x_i = sum_{j < i} sum_o softmax(alpha^(j,i))_o o(x_j),

and all cells of one type share their alphas.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.search.spaces import edge_key
from netwright.search.spaces.network import Inputs, Place, Stem, make_stem, places
from netwright.search.spaces.operations import operation
from netwright.search.supernet import Choice, Gate, SoftmaxGate, Supernet
from netwright.seeding import seeded

if TYPE_CHECKING:
    from netwright.search.spaces import Space


Ways = Tensor | list[Tensor]
"""What all variants of a network have in common, or one tensor for each."""


def apart(function: Callable[..., Tensor], *values: Ways) -> Ways:
    """``function`` of values that variants of a network have: once if they have all in common, else once for each.

    Example:
        >>> apart(torch.add, torch.ones(1), [torch.zeros(1), torch.ones(1)])
        [tensor([1.]), tensor([2.])]
    """
    number = next((len(value) for value in values if isinstance(value, list)), None)
    if number is None:
        return function(*values)
    return [function(*(v[way] if isinstance(v, list) else v for v in values)) for way in range(number)]


class MixedCell(nn.Module):
    """A cell with every edge and every operation: (B, C0, H0, W0), (B, C1, H, W) -> (B, nodes C, H/s, W/s)."""

    def __init__(self, space: Space, place: Place, gate: Gate) -> None:
        super().__init__()
        self.nodes = space.nodes
        self.inputs = Inputs(place, affine=False)
        cell = "reduce" if place.reduction and not space.shared else "normal"
        self.edges = nn.ModuleList()
        for state in range(2, space.nodes + 2):
            for predecessor in range(state):
                stride = 2 if place.reduction and predecessor < 2 else 1
                key = edge_key(cell, predecessor, state)
                candidates = {name: operation(name, place.channels, stride, search=True) for name in space.on(key)}
                self.edges.append(Choice(candidates, key=key, gate=gate, stride=stride))

    def choices(self) -> Iterator[Choice]:
        """Its edges, node by node."""
        return cast(Iterator[Choice], iter(self.edges))

    def forward(self, s0: Tensor, s1: Tensor, arch: nn.ParameterDict) -> Tensor:
        """The concatenated nodes; ``arch`` holds alpha by key."""
        return self._nodes(self.inputs(s0, s1), lambda choice, x: choice(x, arch[choice.key]))

    def variants(self, s0: Ways, s1: Ways, mixed: Callable[[Choice, Ways], Ways]) -> Ways:
        """The same of several variants, whose edges ``mixed`` evaluates."""
        return self._nodes([apart(self.inputs.before, s0), apart(self.inputs.previous, s1)], mixed)

    def _nodes(self, states: list[Any], mixed: Callable[[Choice, Any], Any]) -> Any:
        edges = self.choices()
        for _ in range(self.nodes):
            incoming = [mixed(choice, x) for x, choice in zip(tuple(states), edges, strict=False)]
            states.append(apart(_sum, *incoming))
        return apart(_concatenated, *states[2:])


def _sum(*parts: Tensor) -> Tensor:
    return functools.reduce(torch.add, parts)


def _concatenated(*parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=1)


class CellSupernet(Supernet):
    """Stem, mixed cells, global average pool, linear classifier; see :meth:`netwright.search.spaces.Space.supernet`."""

    def __init__(
        self,
        space: Space,
        in_channels: int,
        num_classes: int,
        *,
        channels: int,
        cells: int,
        stem: Stem = "cifar",
        seed: int = 0,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(space, num_classes)
        gate = gate or SoftmaxGate()
        widths = (space.nodes, space.nodes)
        with seeded(seed, "init"):
            stack = list(places(channels, cells, space.reduction_cells(cells), stem, widths))
            self.stem = make_stem(stem, in_channels, channels)
            self.cells = nn.ModuleList(MixedCell(space, place, gate) for place in stack)
            self.classifier = nn.Linear(stack[-1].channels * space.nodes, num_classes)
        self.initialise_arch(seed, (in_channels, 4, 4))

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        self.input_shape = tuple(x.shape[1:])
        s0, s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, self.arch)
        return self._classified(s1)

    def variants(
        self,
        x: Float[Tensor, "batch in_channels height width"],
        weights: Mapping[str, Float[Tensor, "variants candidates"]],
        seed: int,
    ) -> list[Float[Tensor, "batch classes"]]:
        """The logits of variants that differ in the mixing weights of some keys; other choices go by their gates.

        What the variants have in common is computed once: all cells before the first with one of these keys, in that
        cell the edges that do not depend on it, and in the next one those from the output of an earlier cell. Where all
        variants feed a choice alike, its operations run once, and the variants are weighted sums of them.

        Args:
            x: The images.
            weights: The mixing weights of each variant, by key; what has no weight does not run. Without keys there is
                one variant.
            seed: Of operations that draw: every choice draws the same numbers in all variants, and is given the seed
                plus its number. The global generator is left changed.

        Example:
            >>> from netwright.search import spaces
            >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
            >>> alike = torch.full((2, 5), 0.2)
            >>> first, second = supernet.variants(torch.rand(4, 1, 8, 8), {"normal_0_2": alike}, seed=0)
            >>> torch.equal(first, second)
            True
        """
        self.input_shape = tuple(x.shape[1:])
        numbers = itertools.count(seed)

        def mixed(choice: Choice, x: Ways) -> Ways:
            draw = functools.partial(_draw_from, next(numbers), self.classifier.weight.device)
            rows = weights.get(choice.key)
            if rows is None:
                return apart(lambda x: _after(draw, choice, x, self.arch[choice.key]), x)
            if isinstance(x, Tensor):
                return _sums(choice, x, rows, draw)
            return [_after(draw, _mix, choice, each, row) for each, row in zip(x, rows, strict=True)]

        s0, s1 = self.stem(x)
        for cell in cast(list[MixedCell], list(self.cells)):
            s0, s1 = s1, cell.variants(s0, s1, mixed)
        logits = apart(self._classified, s1)
        return logits if isinstance(logits, list) else [logits] * max([1, *map(len, weights.values())])

    def _classified(self, x: Tensor) -> Tensor:
        return self.classifier(x.mean((2, 3)))


def _draw_from(seed: int, device: torch.device) -> None:
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _after(draw: Callable[[], None], function: Callable[..., Tensor], *values: Any) -> Tensor:
    draw()
    return function(*values)


def _mix(choice: Choice, x: Tensor, row: Tensor) -> Tensor:
    return choice.mix(x, row, (row != 0).tolist())


def _sums(choice: Choice, x: Tensor, rows: Tensor, draw: Callable[[], None]) -> list[Tensor]:
    """The outputs of a choice on one input with several sets of weights, no operation run twice."""
    distinct, places = rows.unique(dim=0, return_inverse=True)
    runs = distinct != 0
    used = runs.any(0)
    if int(runs.sum()) <= int(used.sum()):
        made = [_after(draw, _mix, choice, x, row) for row in distinct]
    else:
        draw()
        alone = torch.eye(len(choice), dtype=x.dtype, device=x.device)[used]
        outputs = [_mix(choice, x, row).permute(0, 2, 3, 1) for row in alone]
        sums = distinct[:, used] @ torch.stack([y.flatten() for y in outputs])
        made = [row.view(outputs[0].shape).permute(0, 3, 1, 2) for row in sums]
    return [made[place] for place in places.tolist()]
