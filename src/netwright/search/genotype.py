"""Genotypes: what an architecture search finds, as plain data.

The encoding of Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", 2019, arXiv:1806.09055: a cell is a
graph with two inputs (states 0 and 1: the outputs of the two cells before it) and N nodes (states 2 .. N+1),

    x_i = o_a(x_j) + o_b(x_k),    j, k < i,

so two (operation, predecessor) pairs a node say everything. An architecture of a chain names one block a layer.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from netwright.console import UserError
from netwright.storage import read_json, write_json

if TYPE_CHECKING:
    from torch import nn

Edge = tuple[str, int]
_WITHOUT_CONVOLUTION = ("max_pool", "avg_pool", "skip", "none", "noise")


class Chosen(NamedTuple):
    """What a module of a derived network is there for; the network's ``chosen`` attribute of that module.

    Attributes:
        name: The operation or candidate.
        stride: Its spatial stride.
        kind: Operations of one kind, name and shape cost the same.
    """

    name: str
    stride: int
    kind: str


@dataclass(frozen=True)
class CellGenotype:
    """One cell: two (operation, predecessor) pairs for each node, in node order.

    The two edges of a node may be given in either order, they are kept sorted by predecessor: equal cells are equal.

    Attributes:
        ops: The edges; numbers 2i and 2i+1 enter node i, whose state is i + 2.
        concat: States that make up the cell's output, all nodes by default.

    Raises:
        ValueError: If an edge points forward, a node has two edges from one predecessor, or ``concat`` names no node.

    Example:
        >>> CellGenotype((("skip_connect", 1), ("sep_conv_3x3", 0))).ops
        (('sep_conv_3x3', 0), ('skip_connect', 1))
    """

    ops: tuple[Edge, ...]
    concat: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        ops = _edges(self.ops)
        if not ops or len(ops) % 2:
            raise ValueError(f"ops must hold two edges for each of at least 1 node, got {len(ops)} edges")
        nodes = len(ops) // 2
        pairs = []
        for node in range(nodes):
            pair = sorted(ops[2 * node : 2 * node + 2], key=lambda edge: edge[1])
            for name, predecessor in pair:
                if not 0 <= predecessor < node + 2:
                    raise ValueError(
                        f"an edge must come from an earlier state: node {node} (state {node + 2}) takes predecessors "
                        f"0 to {node + 1}, got ({name}, {predecessor})"
                    )
            if pair[0][1] == pair[1][1]:
                raise ValueError(f"the two edges of node {node} must have different predecessors, got {pair}")
            pairs += pair
        concat = tuple(self.concat) or tuple(range(2, nodes + 2))
        if len(set(concat)) != len(concat) or not all(state in range(2, nodes + 2) for state in concat):
            raise ValueError(f"concat must hold different states from 2 to {nodes + 1}, got {concat}")
        object.__setattr__(self, "ops", tuple(pairs))
        object.__setattr__(self, "concat", concat)

    @property
    def nodes(self) -> int:
        """Number of intermediate nodes."""
        return len(self.ops) // 2

    def edges(self) -> list[tuple[str, int, int]]:
        """Every edge as (operation, predecessor state, state)."""
        return [(name, predecessor, i // 2 + 2) for i, (name, predecessor) in enumerate(self.ops)]


class Genotype(ABC):
    """An architecture: hashable, without tensors, and JSON both ways.

    Two kinds: :class:`CellsGenotype` of a cell space, :class:`ChoiceGenotype` of a space of choices.

    Attributes:
        space: Name of the search space.
        version: Version of that space's definition.

    Example:
        >>> Genotype.from_json(DARTS_V2.to_json()) == DARTS_V2
        True
    """

    space: str
    version: int

    def validate(self) -> Self:
        """This genotype, if its space admits it.

        Raises:
            ValueError: If the space or its version is unknown, or the architecture is none of the space's.
        """
        from netwright.search import spaces

        spaces.get(self.space).validate(self)
        return self

    @property
    @abstractmethod
    def operations(self) -> tuple[str, ...]:
        """Every operation it consists of."""

    @property
    def skip_share(self) -> float:
        """Share of skip connections among all operations, in [0, 1].

        Example:
            >>> DARTS_V2.skip_share
            0.3125
        """
        return sum(name in ("skip_connect", "skip") for name in self.operations) / len(self.operations)

    @property
    def convolutions(self) -> int:
        """Number of operations that are neither poolings nor skip connections nor noise.

        Example:
            >>> DARTS_V2.convolutions
            6
        """
        return sum(not name.startswith(_WITHOUT_CONVOLUTION) for name in self.operations)

    def build(self, in_channels: int = 3, num_classes: int = 10, **options: Any) -> nn.Module:
        """The evaluation network; see :meth:`netwright.search.spaces.Space.build`."""
        from netwright.search import spaces

        return spaces.get(self.space).build(self, in_channels, num_classes, **options)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_dict` takes them."""

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the genotype to a JSON file."""
        write_json(path, self.to_dict())

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> Genotype:
        """The genotype of :meth:`to_dict`'s values, validated.

        Raises:
            ValueError: If a field is missing or of another kind, or :meth:`validate` refuses.
        """
        try:
            kind = ChoiceGenotype if "decisions" in value else CellsGenotype
            genotype = kind._from_dict(value)
        except KeyError as error:
            raise ValueError(f"a genotype must have the field {error}") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a genotype: {error}") from None
        return genotype.validate()

    @staticmethod
    def from_json(text: str) -> Genotype:
        """The genotype of :meth:`to_json`'s text; raises as :meth:`from_dict` does."""
        return Genotype.from_dict(json.loads(text))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Genotype:
        """The genotype in a JSON file.

        Raises:
            UserError: If the file is missing, is no JSON, or holds no valid genotype.
        """
        try:
            return Genotype.from_dict(read_json(path))
        except UserError:
            raise
        except ValueError as error:
            raise UserError(str(error), where=path) from error


@dataclass(frozen=True)
class CellsGenotype(Genotype):
    """An architecture of a cell space.

    Attributes:
        normal: The cell that keeps the resolution.
        reduce: The cell that halves it (in a space with one cell type the same as ``normal``).
        space: Name of the search space.
        version: Version of that space's definition.

    Example:
        >>> cell = CellGenotype((("sep_conv_3x3", 0), ("skip_connect", 1)))
        >>> CellsGenotype(cell, cell, space="darts").validate()
        Traceback (most recent call last):
        ...
        ValueError: normal must have 4 nodes in space 'darts', got 1
    """

    normal: CellGenotype
    reduce: CellGenotype
    space: str = "darts"
    version: int = 1

    def cells(self) -> dict[Literal["normal", "reduce"], CellGenotype]:
        """Both cells by name."""
        return {"normal": self.normal, "reduce": self.reduce}

    @property
    def operations(self) -> tuple[str, ...]:
        """Those of the edges of both cells."""
        return tuple(name for cell in self.cells().values() for name, _ in cell.ops)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`Genotype.from_dict` takes them."""
        value: dict[str, Any] = {"space": self.space, "version": self.version}
        for name, cell in self.cells().items():
            value[name] = {"ops": [list(edge) for edge in cell.ops], "concat": list(cell.concat)}
        return value

    @classmethod
    def _from_dict(cls, value: Mapping[str, Any]) -> CellsGenotype:
        cells = {
            name: CellGenotype(_edges(value[name]["ops"]), tuple(int(i) for i in value[name]["concat"]))
            for name in ("normal", "reduce")
        }
        return cls(**cells, space=str(value["space"]), version=int(value["version"]))


@dataclass(frozen=True)
class ChoiceGenotype(Genotype):
    """An architecture of a space of choices: one candidate for every choice.

    Attributes:
        decisions: (key, candidate), in the order of the space.
        space: Name of the search space.
        version: Version of that space's definition.

    Raises:
        ValueError: If a choice is decided twice, or none is.

    Example:
        >>> genotype = ChoiceGenotype((("layer_0", "k3_e2"), ("layer_1", "skip")), space="my-chain")
        >>> genotype.skip_share
        0.5
    """

    decisions: tuple[tuple[str, str], ...]
    space: str
    version: int = 1

    def __post_init__(self) -> None:
        keys = [key for key, _ in self.decisions]
        if not keys or len(set(keys)) != len(keys):
            raise ValueError(f"decisions must hold at least one choice and each once, got {keys}")

    @property
    def operations(self) -> tuple[str, ...]:
        """The candidates chosen."""
        return tuple(name for _, name in self.decisions)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`Genotype.from_dict` takes them."""
        return {"space": self.space, "version": self.version, "decisions": dict(self.decisions)}

    @classmethod
    def _from_dict(cls, value: Mapping[str, Any]) -> ChoiceGenotype:
        decisions = tuple((str(key), str(name)) for key, name in value["decisions"].items())
        return cls(decisions, space=str(value["space"]), version=int(value["version"]))


def _edges(ops: Iterable[Any]) -> tuple[Edge, ...]:
    edges = []
    for edge in ops:
        if len(edge) != 2 or not isinstance(edge[0], str) or isinstance(edge[1], bool) or not isinstance(edge[1], int):
            raise ValueError(f"an edge must be (operation name, predecessor number), got {edge!r}")
        edges.append((edge[0], edge[1]))
    return tuple(edges)


_NAMES = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def _published(normal: str, reduce: str) -> CellsGenotype:
    def cell(text: str) -> CellGenotype:
        pairs = (edge.split(",") for edge in text.split())
        return CellGenotype(tuple((_NAMES[name], int(predecessor)) for name, predecessor in pairs))

    return CellsGenotype(cell(normal), cell(reduce), space="darts")


DARTS_V1 = _published(
    normal="sep3,1 sep3,0 skip,0 sep3,1 skip,0 sep3,1 sep3,0 skip,2",
    reduce="max,0 max,1 skip,2 max,0 max,0 skip,2 skip,2 avg,0",
)
"""DARTS, first order (arXiv:1806.09055)."""

DARTS_V2 = _published(
    normal="sep3,0 sep3,1 sep3,0 sep3,1 sep3,1 skip,0 skip,0 dil3,2",
    reduce="max,0 max,1 skip,2 max,1 max,0 skip,2 skip,2 max,1",
)
"""DARTS, second order (arXiv:1806.09055)."""

DASS_99 = _published(
    normal="avg,0 skip,1 dil5,1 skip,2 avg,2 skip,1 skip,4 skip,3",
    reduce="max,1 sep3,0 max,1 dil3,2 skip,0 dil3,2 max,1 skip,4",
)
"""DASS at 99 % sparsity (arXiv:2207.06968)."""

DASS_95 = _published(
    normal="sep5,0 skip,1 dil5,1 sep3,2 dil3,2 sep3,0 sep3,2 sep3,0",
    reduce="sep3,0 avg,1 sep3,0 sep5,2 sep5,1 sep5,2 dil3,1 dil3,2",
)
"""DASS at 95 % sparsity (arXiv:2207.06968)."""

DASS_90 = _published(
    normal="dil3,1 dil5,0 sep5,0 dil5,1 sep5,0 sep3,3 sep3,2 dil5,0",
    reduce="skip,1 skip,0 dil5,1 dil5,2 dil5,2 dil5,3 dil5,3 skip,0",
)
"""DASS at 90 % sparsity (arXiv:2207.06968)."""
