"""The supernet of a cell space.

Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", 2019, arXiv:1806.09055. Every edge of a cell holds
all operations,

    x_i = sum_{j < i} sum_o softmax(alpha^(j,i))_o o(x_j),

and all cells of one type share their alphas.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, cast

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


State = tuple[int, Tensor, Tensor]


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
                candidates = {name: operation(name, place.channels, stride, search=True) for name in space.primitives}
                key = edge_key(cell, predecessor, state)
                self.edges.append(Choice(candidates, key=key, gate=gate, stride=stride))

    def choices(self) -> Iterator[Choice]:
        """Its edges, node by node."""
        return cast(Iterator[Choice], iter(self.edges))

    def forward(self, s0: Tensor, s1: Tensor, arch: nn.ParameterDict) -> Tensor:
        """The concatenated nodes; ``arch`` holds alpha by key."""
        states = self.inputs(s0, s1)
        edges = self.choices()
        for _ in range(self.nodes):
            incoming = [choice(x, arch[choice.key]) for x, choice in zip(tuple(states), edges, strict=False)]
            states.append(functools.reduce(torch.add, incoming))
        return torch.cat(states[2:], dim=1)


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
        return self.resume(self.prefix(x, ()))

    def prefix(self, x: Float[Tensor, "batch in_channels height width"], keys: Collection[str]) -> State:
        """The number of the first cell with one of these keys, and its two inputs; number 0 when there are no keys."""
        self.input_shape = tuple(x.shape[1:])
        s0, s1 = self.stem(x)
        cells = cast(list[MixedCell], list(self.cells))
        first = next((n for n, cell in enumerate(cells) if any(c.key in keys for c in cell.choices())), 0)
        for cell in cells[:first]:
            s0, s1 = s1, cell(s0, s1, self.arch)
        return first, s0, s1

    def resume(self, state: State) -> Float[Tensor, "batch classes"]:
        """The logits from there on."""
        first, s0, s1 = state
        for cell in self.cells[first:]:
            s0, s1 = s1, cell(s0, s1, self.arch)
        return self.classifier(s1.mean((2, 3)))
