"""Search spaces by name: what may be chosen, the supernet over it, and the network of one choice.

========================  ========================================================================================
``darts``                 Liu et al., arXiv:1806.09055: 8 primitives, 4 nodes, normal and reduction cell
``micro-darts``           5 primitives, 3 nodes, 3 cells of 8 channels: a search in minutes on a processor
``micro-darts-2``         the same with 2 nodes
``micro-darts-shared``    3 nodes and one cell type: the reduction cell is the normal cell with stride 2
``micro-darts-2-shared``  2 nodes and one cell type: small enough to tabulate
``micro-chain``           six layers that choose an inverted residual block of kernel 3 or 5 and expansion 2 or 4
``fbnet``                 Wu et al., arXiv:1812.03443: 22 layers, nine blocks
``fbnet-1504``            the same with the narrower head of FBNet-A
``proxylessnas``          Cai et al., arXiv:1812.00332: 21 layers of kernel 3, 5 or 7 and expansion 3 or 6; with
                          ``-cpu``, ``-gpu``, ``-mobile`` and ``-mobile14`` the widths of the published networks
``single-path``           Stamoulis et al., arXiv:1904.02877: 20 layers of kernel 3 or 5 and expansion 3 or 6
========================  ========================================================================================

A network of one's own becomes a space by :class:`~netwright.search.spaces.choices.ChoiceSpace`.

Reading names and genotypes loads no PyTorch.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from netwright.console import nearest
from netwright.search.genotype import CellGenotype, CellsGenotype, Genotype
from netwright.search.spaces.chain import MICRO_CHAIN
from netwright.search.spaces.choices import ChoiceSpace
from netwright.search.spaces.fbnet import FBNET, FBNET_SMALL_HEAD
from netwright.search.spaces.proxyless import SPACES as PROXYLESS_SPACES
from netwright.search.spaces.single_path import SINGLE_PATH

if TYPE_CHECKING:
    import torch

    from netwright.search.selection import Rule
    from netwright.search.spaces.cells import CellSupernet
    from netwright.search.spaces.network import Network, Stem
    from netwright.search.supernet import Gate

DARTS_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
_WITHOUT_TORCH = frozenset({*DARTS_PRIMITIVES, "noise"})  # known to exist before `operations` is imported
MICRO_PRIMITIVES = ("none", "skip_connect", "max_pool_3x3", "sep_conv_3x3", "dil_conv_3x3")


def _check_primitives(what: str, names: tuple[str, ...]) -> None:
    """Refuses what cannot be the candidates of an edge."""
    if len(set(names)) != len(names) or not set(names) - {"none"}:
        raise ValueError(f"{what} must be different names, one besides 'none', got {names}")
    if unknown := [name for name in names if name not in _WITHOUT_TORCH]:
        from netwright.search.spaces.operations import OPERATIONS

        if odd := [name for name in unknown if name not in OPERATIONS]:
            raise ValueError(
                f"{what} must be of {', '.join(OPERATIONS)}, got {odd[0]!r}; {nearest(odd[0], OPERATIONS)}"
            )


def edge_key(cell: str, predecessor: int, state: int) -> str:
    """The key of the architecture parameters of one edge; states 0 and 1 are the cell's inputs.

    Example:
        >>> edge_key("normal", 0, 2)
        'normal_0_2'
    """
    return f"{cell}_{predecessor}_{state}"


@dataclass(frozen=True)
class Space:
    """A cell space: which operations, how many nodes, and how cells are stacked.

    Attributes:
        name: Its name, which genotypes carry.
        primitives: Candidate operations of every edge, in the order of ``alpha``; names of
            :data:`netwright.search.spaces.operations.OPERATIONS`. Where edges differ, a mapping of every
            :func:`edge_key` of the space to its own.
        nodes: Intermediate nodes of a cell, at least 1.
        channels: Default width of the supernet's first cell.
        cells: Default number of cells of the supernet.
        reductions: Which cells halve the resolution and double the width: number L//3 and 2L//3 of L (``thirds``, as
            in DARTS), or L//2 alone (``middle``).
        shared: Whether both cells have one genotype and share ``alpha``.
        version: Raised when a definition changes so that old genotypes would build another network.

    Raises:
        ValueError: If a field is out of range, a primitive is unknown or given twice, there is none besides ``none``,
            or a mapping leaves out an edge or names one that the space does not have.

    Example:
        >>> get("darts").size, get("micro-darts-2-shared").size
        (1076746950455072400, 768)
        >>> few = {"normal_0_2": ("skip_connect", "sep_conv_3x3"), "normal_1_2": ("none", "max_pool_3x3")}
        >>> Space("one-node", few, nodes=1, channels=4, cells=2, shared=True).size
        2
    """

    name: str
    primitives: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    nodes: int
    channels: int
    cells: int
    reductions: Literal["thirds", "middle"] = "thirds"
    shared: bool = False
    version: int = 1

    def __post_init__(self) -> None:
        for name in ("nodes", "channels", "cells"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.reductions not in ("thirds", "middle"):
            raise ValueError(f"reductions must be 'thirds' or 'middle', got {self.reductions!r}")
        if not isinstance(self.primitives, Mapping):
            _check_primitives("primitives", self.primitives)
            return
        known = [key for keys in self.incoming().values() for key in keys]
        if odd := [key for key in self.primitives if key not in known]:
            raise ValueError(f"primitives must name edges of the space, got {odd[0]!r}; {nearest(odd[0], known)}")
        if missing := [key for key in known if key not in self.primitives]:
            raise ValueError(f"primitives must hold every edge of the space, missing {', '.join(missing)}")
        own = {key: tuple(self.primitives[key]) for key in known}
        for key, names in own.items():
            _check_primitives(f"primitives of edge {key!r}", names)
        object.__setattr__(self, "primitives", own)

    def __hash__(self) -> int:
        return hash((self.name, self.version))

    def on(self, key: str) -> tuple[str, ...]:
        """The candidate operations of an edge, in the order of ``alpha``.

        Raises:
            KeyError: If edges differ and the space has none of this key.

        Example:
            >>> get("darts-s2").on("normal_0_2")
            ('skip_connect', 'sep_conv_3x3')
        """
        return self.primitives[key] if isinstance(self.primitives, Mapping) else self.primitives

    def choosable_on(self, key: str) -> tuple[str, ...]:
        """The operations that a derived genotype may hold on an edge: all but ``none``."""
        return tuple(name for name in self.on(key) if name != "none")

    @property
    def choosable(self) -> tuple[str, ...]:
        """The operations that a derived genotype may hold on any edge: all but ``none``."""
        keys = (key for keys in self.incoming().values() for key in keys)
        return tuple(dict.fromkeys(name for key in keys for name in self.choosable_on(key)))

    @property
    def cell_types(self) -> tuple[str, ...]:
        """Cells with architecture parameters of their own."""
        return ("normal",) if self.shared else ("normal", "reduce")

    @property
    def size(self) -> int:
        """Number of derived genotypes: two different predecessors a node and an operation on each."""
        return math.prod(sum(self._pairs(keys).values()) for keys in self.incoming().values())

    def _pairs(self, keys: tuple[str, ...]) -> dict[tuple[str, str], int]:
        """In how many ways each pair of edges into a node can be kept."""
        numbers = {key: len(self.choosable_on(key)) for key in keys}
        return {(a, b): numbers[a] * numbers[b] for a, b in itertools.combinations(keys, 2)}

    def incoming(self) -> dict[tuple[str, int], tuple[str, ...]]:
        """Keys of the edges into every intermediate node, by cell type and node, of which a derivation keeps two.

        Example:
            >>> get("micro-darts-2-shared").incoming()["normal", 0]
            ('normal_0_2', 'normal_1_2')
        """
        return {
            (cell, state - 2): tuple(edge_key(cell, predecessor, state) for predecessor in range(state))
            for cell in self.cell_types
            for state in range(2, self.nodes + 2)
        }

    def reduction_cells(self, cells: int) -> frozenset[int]:
        """Indices of the reduction cells among ``cells``.

        Example:
            >>> sorted(get("darts").reduction_cells(8)), sorted(get("micro-darts").reduction_cells(3))
            ([2, 5], [1])
        """
        if cells < 1:
            raise ValueError(f"cells must be >= 1, got {cells}")
        return frozenset({cells // 2} if self.reductions == "middle" else {cells // 3, 2 * cells // 3})

    def validate(self, genotype: Genotype) -> None:
        """Refuses a genotype that is not of this space.

        Raises:
            ValueError: If the space's name or version, an operation, or the number of nodes does not fit.
        """
        if (genotype.space, genotype.version) != (self.name, self.version):
            raise ValueError(
                f"the genotype must be of space {self.name!r} version {self.version}, got {genotype.space!r} version "
                f"{genotype.version}"
            )
        if not isinstance(genotype, CellsGenotype):
            raise ValueError(f"a genotype of space {self.name!r} must have cells, got a {type(genotype).__name__}")
        for name, cell in genotype.cells().items():
            if cell.nodes != self.nodes:
                raise ValueError(f"{name} must have {self.nodes} nodes in space {self.name!r}, got {cell.nodes}")
            for operation, predecessor, state in cell.edges():
                allowed = self.choosable_on(edge_key("normal" if self.shared else name, predecessor, state))
                if operation not in allowed:
                    raise ValueError(
                        f"operation of edge ({operation}, {predecessor}) into state {state} in {name} must be one of "
                        f"{', '.join(allowed)}; {nearest(operation, allowed)}"
                    )
        if self.shared and genotype.normal != genotype.reduce:
            raise ValueError(f"normal and reduce must be equal in space {self.name!r}, got {genotype.cells()}")

    def genotype(self, decisions: Mapping[str, str]) -> CellsGenotype:
        """The genotype that keeps exactly the edges named in ``decisions``.

        Args:
            decisions: Operation by :func:`edge_key`, two edges a node.

        Raises:
            ValueError: If a key is no edge of the space, or a node does not have two.
        """
        incoming = self.incoming()
        ops: dict[str, list[tuple[str, int]]] = {cell: [] for cell in self.cell_types}
        for (cell, node), keys in incoming.items():
            kept = [(decisions[key], predecessor) for predecessor, key in enumerate(keys) if key in decisions]
            if len(kept) != 2:
                raise ValueError(f"{cell} node {node} must keep 2 edges, got {len(kept)}")
            ops[cell] += kept
        cells = {cell: CellGenotype(tuple(kept)) for cell, kept in ops.items()}
        known = {key for keys in incoming.values() for key in keys}
        if unknown := set(decisions) - known:
            raise ValueError(f"decisions must name edges of space {self.name!r}, got {sorted(unknown)}")
        genotype = CellsGenotype(cells["normal"], cells[self.cell_types[-1]], space=self.name, version=self.version)
        self.validate(genotype)
        return genotype

    def decisions(self, genotype: Genotype) -> dict[str, str]:
        """Operation by :func:`edge_key` of the edges that a genotype keeps: what :meth:`genotype` takes.

        Raises:
            ValueError: If the genotype is not of this space.
        """
        self.validate(genotype)
        assert isinstance(genotype, CellsGenotype)
        cells = genotype.cells()
        return {
            edge_key(cell, predecessor, state): name
            for cell in self.cell_types
            for name, predecessor, state in cells["normal" if cell == "normal" else "reduce"].edges()
        }

    def random(self, generator: torch.Generator) -> CellsGenotype:
        """A genotype drawn uniformly among the :attr:`size` derived ones.

        Example:
            >>> from netwright.seeding import stream
            >>> space = get("micro-darts-2-shared")
            >>> space.random(stream(0, "random")) == space.random(stream(0, "random"))
            True
        """
        import torch

        def below(number: int) -> int:
            return int(torch.randint(number, (), generator=generator))

        decisions = {}
        for keys in self.incoming().values():
            ways = self._pairs(keys)
            if len(set(ways.values())) == 1:
                kept = [keys[place] for place in torch.randperm(len(keys), generator=generator)[:2].tolist()]
            else:  # a pair of edges is as likely as it has operations
                place = bisect.bisect(list(itertools.accumulate(ways.values())), below(sum(ways.values())))
                kept = list(list(ways)[place])
            for key in kept:
                names = self.choosable_on(key)
                decisions[key] = names[below(len(names))]
        return self.genotype(decisions)

    def selector(self) -> Rule:
        """The rule that derives a genotype when no other is given."""
        from netwright.search.selection import MagnitudeSelector

        return MagnitudeSelector()

    def supernet(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        channels: int | None = None,
        cells: int | None = None,
        stem: Stem = "cifar",
        seed: int = 0,
        gate: Gate | None = None,
    ) -> CellSupernet:
        """The supernet over this space, with every weight drawn from streams of ``seed``.

        Args:
            in_channels: Channels of the images.
            num_classes: Number of classes.
            channels: Width of the first cell; the space's default if ``None``.
            cells: Number of cells; the space's default if ``None``.
            stem: ``cifar`` keeps the resolution, ``strided`` halves it, ``imagenet`` divides it by 8.
            seed: Of weights and architecture parameters.
            gate: Mixing rule of every edge, softmax if ``None``.

        Raises:
            ValueError: If a number is out of range or the stem unknown.

        Example:
            >>> import torch
            >>> supernet = get("micro-darts").supernet(in_channels=1, num_classes=4)
            >>> supernet(torch.zeros(2, 1, 1, 40)).shape, supernet.derive().space
            (torch.Size([2, 4]), 'micro-darts')
        """
        from netwright.search.spaces.cells import CellSupernet

        channels = self.channels if channels is None else channels
        cells = self.cells if cells is None else cells
        return CellSupernet(
            self, in_channels, num_classes, channels=channels, cells=cells, stem=stem, seed=seed, gate=gate
        )

    def build(
        self,
        genotype: Genotype,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        channels: int | None = None,
        cells: int | None = None,
        drop_path: float = 0.0,
        auxiliary: bool = False,
        stem: Stem = "cifar",
        seed: int | None = None,
    ) -> Network:
        """The evaluation network of a genotype, made from the genotype alone.

        Args:
            genotype: An architecture of this space.
            in_channels: Channels of the images.
            num_classes: Number of classes.
            channels: Width of the first cell; the space's default if ``None``.
            cells: Number of cells; the space's default if ``None``.
            drop_path: Probability in [0, 1) with which a sample skips an operation in training; the attribute of the
                same name may be changed from epoch to epoch.
            auxiliary: Whether there is an auxiliary classifier after cell 2L//3.
            stem: ``cifar`` keeps the resolution, ``strided`` halves it, ``imagenet`` divides it by 8.
            seed: Of the initial weights; ``None`` draws from torch's global generator.

        Raises:
            ValueError: If the genotype is not of this space or a number is out of range.

        Example:
            >>> from netwright.search.genotype import DARTS_V1
            >>> network = get("darts").build(DARTS_V1, channels=36, cells=20)
            >>> sum(p.numel() for p in network.parameters())
            3169414
        """
        from netwright.search.spaces.network import Network

        self.validate(genotype)
        assert isinstance(genotype, CellsGenotype)
        channels = self.channels if channels is None else channels
        cells = self.cells if cells is None else cells
        return Network(
            genotype, in_channels, num_classes, channels=channels, cells=cells,
            reductions=self.reduction_cells(cells), drop_path=drop_path, auxiliary=auxiliary, stem=stem, seed=seed,
        )  # fmt: skip


AnySpace = Space | ChoiceSpace
SPACES: dict[str, AnySpace] = {}
SomeSpace = TypeVar("SomeSpace", bound=AnySpace)


def register(space: SomeSpace) -> SomeSpace:
    """Makes a space known by its name, so that its genotypes can be read and built.

    Raises:
        ValueError: If another space has that name.

    Example:
        >>> import dataclasses
        >>> s2 = dataclasses.replace(get("darts"), name="s2", primitives=("skip_connect", "sep_conv_3x3"))
        >>> register(s2).size == get("s2").size
        True
    """
    if SPACES.setdefault(space.name, space) != space:
        raise ValueError(f"name must not be that of another space, got {space.name!r}")
    return space


def get(name: str) -> Any:
    """The space of that name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> get("darts").nodes
        4
    """
    if name not in SPACES:
        raise ValueError(f"space must be a known name, got {name!r}; {nearest(name, SPACES)}")
    return SPACES[name]


register(Space("darts", DARTS_PRIMITIVES, nodes=4, channels=16, cells=8))
for _nodes, _two in ((3, ""), (2, "-2")):
    for _shared, _one in ((False, ""), (True, "-shared")):
        register(
            Space(
                f"micro-darts{_two}{_one}",
                MICRO_PRIMITIVES,
                nodes=_nodes,
                channels=8,
                cells=3,
                reductions="middle",
                shared=_shared,
            )
        )

# Spaces on which DARTS fails: S2 to S4 of Zela et al., ICLR 2020, arXiv:1909.09656, and the one without `none` in which
# DARTS-PT (arXiv:2108.04392) selects.
FAILURES = {
    "s2": ("skip_connect", "sep_conv_3x3"),
    "s3": ("none", "skip_connect", "sep_conv_3x3"),
    "s4": ("noise", "sep_conv_3x3"),
}
register(Space("darts-pt", tuple(name for name in DARTS_PRIMITIVES if name != "none"), nodes=4, channels=16, cells=8))
for _name, _primitives in FAILURES.items():
    register(Space(f"darts-{_name}", _primitives, nodes=4, channels=16, cells=8))
    register(Space(f"micro-darts-{_name}", _primitives, nodes=3, channels=8, cells=3, reductions="middle"))
for _space in (MICRO_CHAIN, FBNET, FBNET_SMALL_HEAD, SINGLE_PATH):
    register(_space)
for _space in PROXYLESS_SPACES:
    register(_space)
