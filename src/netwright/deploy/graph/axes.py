"""Which axes of a stored value an axis of a tensor runs over.

Permutations, reshapes and expansions move no number: they only say in which order a value (batch, channels, rows,
columns) is read. Here a tensor is a stored value and, for each of its axes, the atoms that it is made of. An atom is a
part of one stored axis: of channel = 4 g + i, the atom g has size C / 4 and stride 4, the atom i size 4 and stride 1.

    x                               (n)(c)(h)(w)
    x.permute(0, 2, 3, 1)           (n)(h)(w)(c)
    x.view(N, 2, C // 2, H, W)      (n)(c of stride C/2)(c of stride 1)(h)(w)
    x.flatten(1)                    (n)(c h w)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from netwright.deploy.graph.ir import Shape

BATCH, CHANNEL, ROW, COLUMN = range(4)
REPEATED = -1


@dataclass(frozen=True)
class Atom:
    """A part of a stored axis.

    Attributes:
        axis: ``BATCH``, ``CHANNEL``, ``ROW``, ``COLUMN``; or ``REPEATED``: every position reads the same number.
        size: How many positions.
        stride: Positions of the stored axis from one to the next.
    """

    axis: int
    size: int
    stride: int = 1


Axis = tuple[Atom, ...]


@dataclass(frozen=True)
class View:
    """A tensor: a stored value and what each axis runs over, the slowest atom of an axis first.

    Example:
        >>> x = View.of(0, (2, 6, 4, 5))
        >>> x.permute([0, 2, 3, 1]).shape, x.reshape((2, 3, 2, 20)).shape
        ((2, 4, 5, 6), (2, 3, 2, 20))
    """

    value: int
    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, value: int, shape: Shape) -> View:
        """The value as it is stored."""
        return cls(value, tuple((Atom(axis, size),) if size > 1 else () for axis, size in enumerate(shape)))

    @property
    def shape(self) -> Shape:
        """Of the tensor."""
        return tuple(math.prod(atom.size for atom in axis) for axis in self.axes)

    @property
    def atoms(self) -> list[Atom]:
        """All atoms in the order of the tensor's memory."""
        return [atom for axis in self.axes for atom in axis]

    def on(self, axis: int) -> list[Atom]:
        """The atoms of a stored axis."""
        return [atom for atom in self.atoms if atom.axis == axis]

    def permute(self, order: Sequence[int]) -> View:
        """The axes in another order."""
        return View(self.value, tuple(self.axes[i] for i in order))

    def insert(self, position: int) -> View:
        """A new axis of size 1."""
        return View(self.value, (*self.axes[:position], (), *self.axes[position:]))

    def expand(self, shape: Sequence[int]) -> View:
        """Axes of size 1, and new ones before the first, repeated."""
        missing = len(shape) - len(self.axes)
        axes = [*[()] * missing, *self.axes]
        return View(
            self.value,
            tuple(
                axis if axis or size == 1 else (Atom(REPEATED, size),) for axis, size in zip(axes, shape, strict=True)
            ),
        )

    def reshape(self, shape: Sequence[int]) -> View | None:
        """The same numbers in the same order under another shape; None where an axis would cut through an atom."""
        groups = regroup(self.atoms, shape)
        return None if groups is None else View(self.value, groups)


def merge(atoms: Iterable[Atom]) -> Axis:
    """Joins neighbours that are one run of a stored axis.

    Example:
        >>> merge([Atom(1, 2, 3), Atom(1, 3, 1), Atom(2, 4)])
        (Atom(axis=1, size=6, stride=1), Atom(axis=2, size=4, stride=1))
    """
    joined: list[Atom] = []
    for atom in atoms:
        if atom.size == 1:
            continue
        last = joined[-1] if joined else None
        if last and last.axis == atom.axis and (atom.axis == REPEATED or last.stride == atom.stride * atom.size):
            joined[-1] = Atom(atom.axis, last.size * atom.size, atom.stride)
        else:
            joined.append(atom)
    return tuple(joined)


def regroup(atoms: Sequence[Atom], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """The same atoms, split where needed, under axes of the given sizes; None where a size cuts through an atom.

    Example:
        >>> regroup([Atom(1, 6), Atom(2, 4)], (3, 8))
        ((Atom(axis=1, size=3, stride=2),), (Atom(axis=1, size=2, stride=1), Atom(axis=2, size=4, stride=1)))
        >>> regroup([Atom(1, 6), Atom(2, 4)], (4, 6)) is None
        True
    """
    rest = list(reversed(merge(atoms)))
    axes: list[Axis] = []
    for size in shape:
        taken: list[Atom] = []
        missing = size
        while missing > 1:
            atom = rest.pop()
            if missing % atom.size and atom.size % missing:
                return None
            inner = max(1, atom.size // missing)
            if inner > 1:
                rest.append(Atom(atom.axis, inner, atom.stride))
            taken.append(Atom(atom.axis, atom.size // inner, atom.stride * inner))
            missing //= taken[-1].size
        axes.append(merge(taken))
    return tuple(axes)


def common(a: Axis, b: Axis) -> list[tuple[Atom, Atom]] | None:
    """Two axes of one size as pairs of atoms of one size; None where their parts do not line up."""
    left, right = list(reversed(a)), list(reversed(b))
    pairs = []
    while left and right:
        x, y = left.pop(), right.pop()
        size = min(x.size, y.size)
        if x.size % size or y.size % size:
            return None
        for atom, rest in ((x, left), (y, right)):
            if atom.size > size:
                rest.append(Atom(atom.axis, atom.size // size, atom.stride))
        pairs.append(tuple(Atom(t.axis, size, t.stride * (t.size // size)) for t in (x, y)))
    return pairs  # type: ignore[return-value]


def positions(atoms: Sequence[Atom]) -> np.ndarray:
    """Position on the stored axis of each entry of an axis made of these atoms of it.

    Example:
        >>> positions([Atom(1, 2, 1), Atom(1, 3, 2)])
        array([0, 2, 4, 1, 3, 5])
    """
    index = np.zeros(1, np.int64)
    for atom in atoms:
        index = (index[:, None] + atom.stride * np.arange(atom.size)).ravel()
    return index


def in_order(atoms: Sequence[Atom]) -> bool:
    """Whether reading the atoms in this order is reading the stored value in the order of its memory.

    Example:
        >>> in_order([Atom(0, 2), Atom(1, 6), Atom(3, 5)]), in_order([Atom(0, 2), Atom(3, 5), Atom(1, 6)])
        (True, False)
    """
    keys = [(atom.axis, -atom.stride) for atom in atoms]
    return keys == sorted(keys) and all(atom.axis != REPEATED for atom in atoms)
