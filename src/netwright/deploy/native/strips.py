"""Strips: layers in a row computed band by band, so that what lies between them stays in the second-level cache.

Of the last layer one band of rows is computed after the other; every layer before it computes those of its rows that
the band needs and that are not there yet. A value in between holds only the rows that are still to be read:

    rows [low, end) of a value:   low = the first row that any reader's next row reads
                                  end = the row behind the last that the band reads, or that was computed before

When the room for them is full, rows from ``low`` on move to its beginning. No row is computed twice, but for those of
an expansion, which a depthwise convolution never keeps, and those that two threads need: each has bands of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from netwright.deploy.native.layout import LINE, Geometry, apart, even_shares

MOST_ALIGNED = 4  # rows that are computed together, for those after them to begin at a cache line


@dataclass(frozen=True)
class Reach:
    """Which rows of a value are read for a row of an output: ``span`` ones from row ``stride`` y - ``top`` on.

    Attributes:
        value: What is read.
        stride: Vertical.
        top: Rows of padding.
        span: From the first row of the window to the last.
    """

    value: int
    stride: int = 1
    top: int = 0
    span: int = 1

    def rows(self, first: int, last: int, height: int) -> tuple[int, int]:
        """Rows of a value of ``height`` rows that are read for rows ``first`` to ``last - 1``: at least one.

        Example:
            >>> Reach(0, stride=2, top=1, span=3).rows(4, 8, 100)
            (7, 16)
        """
        begin = min(max(0, first * self.stride - self.top), height - 1)
        end = min(height, (last - 1) * self.stride - self.top + self.span)
        return begin, max(begin + 1, end)


@dataclass(frozen=True)
class Layer:
    """What strips need to know of one.

    Attributes:
        output: The value that it writes.
        reads: What it reads row by row; values that it reads as a whole are no part of it.
    """

    output: int
    reads: tuple[Reach, ...]


@dataclass(frozen=True)
class Slide:
    """Rows that move to the beginning of a value's room.

    Attributes:
        value: Whose rows.
        skip: Rows before the first that moves, counted from the beginning of the room.
        rows: Rows that move.
    """

    value: int
    skip: int
    rows: int


@dataclass(frozen=True)
class Part:
    """Rows of one layer that are computed in one go.

    Attributes:
        layer: Which, by its place in the chain.
        first: First row of its output.
        last: Row behind the last.
        held: Of each value in between that it reads or writes, the row that lies first, and the one behind the last.
        slides: What moves before.
    """

    layer: int
    first: int
    last: int
    held: dict[int, tuple[int, int]]
    slides: tuple[Slide, ...]


@dataclass(frozen=True)
class Strips:
    """A chain of layers, and how its rows are cut.

    Attributes:
        chain: The layers in their order.
        shapes: Geometries of all values.
        rows: Rows of the last layer in a band.
        threads: Each has an equal share of the rows of all images.
    """

    chain: tuple[Layer, ...]
    shapes: Mapping[int, Geometry]
    rows: int
    threads: int = 1

    @property
    def output(self) -> int:
        """The value that the last layer writes, which is kept as a whole."""
        return self.chain[-1].output

    @property
    def between(self) -> list[int]:
        """The values of which only some rows are kept."""
        return [layer.output for layer in self.chain[:-1]]

    def shares(self) -> list[list[tuple[int, int, int]]]:
        """Of each thread (image, first row, row behind the last) of the output."""
        geo, found = self.shapes[self.output], []
        for first, last in even_shares(geo.n * geo.h, self.threads):
            cuts = [first, *(row for row in range(first + 1, last) if row % geo.h == 0), last]
            pairs = [(a, b) for a, b in itertools.pairwise(cuts) if a < b]
            found.append([(a // geo.h, a % geo.h, (b - 1) % geo.h + 1) for a, b in pairs])
        return found

    def rooms(self) -> dict[int, int]:
        """Rows for which there is room, of each value in between: the same for all threads."""
        most = dict.fromkeys(self.between, 1)
        for begin, end in {(a, b) for share in self.shares() for _, a, b in share}:
            for _, low, todo in self._bands(begin, end):
                for value in most:
                    most[value] = max(most[value], todo[value][1] - low[value])
        return most

    def room(self, value: int, rows: int) -> Geometry:
        """How ``rows`` rows of a value lie; its height still counts all of them."""
        geo = self.shapes[value]
        return Geometry(1, geo.c, geo.h, geo.w, apart(rows * geo.w))

    def floats(self) -> dict[int, int]:
        """Floats that a thread keeps of each value in between."""
        return {
            value: self.shapes[value].c * self.room(value, rows).plane + LINE for value, rows in self.rooms().items()
        }

    def most(self) -> list[int]:
        """Most rows that each layer computes in one go."""
        found = [1] * len(self.chain)
        for begin, end in {(a, b) for share in self.shares() for _, a, b in share}:
            for _, _, todo in self._bands(begin, end):
                for place, layer in enumerate(self.chain):
                    first, last = todo[layer.output]
                    found[place] = max(found[place], last - first)
        return found

    def parts(self, begin: int, end: int) -> list[Part]:
        """What is done for rows ``begin`` to ``end - 1`` of an image of the output, in this order."""
        rooms, base, found = self.rooms(), dict[int, int](), []
        for _, low, todo in self._bands(begin, end):
            for place, layer in enumerate(self.chain):
                first, last = todo[layer.output]
                if first == last:
                    continue
                slides = []
                value = layer.output
                if value in rooms:
                    here = base.setdefault(value, low[value])
                    if last - here > rooms[value]:
                        if low[value] < first:
                            slides.append(Slide(value, low[value] - here, first - low[value]))
                        base[value] = low[value]
                held = {
                    v: (base[v], todo[v][1]) for v in (value, *(reach.value for reach in layer.reads)) if v in rooms
                }
                found.append(Part(place, first, last, held, tuple(slides)))
        return found

    def _bands(self, begin: int, end: int) -> list[tuple[int, dict[int, int], dict[int, tuple[int, int]]]]:
        """Of each band its first row, and of all values the first row to be kept, and the rows to be computed."""
        done: dict[int, int] = {}
        found = []
        inside = {layer.output for layer in self.chain}
        for band in range(begin, end, self.rows):
            wanted: dict[int, tuple[int, int]] = {self.output: (band, min(end, band + self.rows))}
            low: dict[int, int] = {}
            todo: dict[int, tuple[int, int]] = {}
            for layer in reversed(self.chain):
                need, last = wanted[layer.output]
                first = done.get(layer.output, need)
                last = max(first, last)
                todo[layer.output] = first, last
                low[layer.output] = min(first, need)
                for reach in layer.reads:
                    if reach.value not in inside:
                        continue
                    geo = self.shapes[reach.value]
                    step = together(geo.w)
                    # also without a row to do: what the next one reads is kept
                    a, b = reach.rows(first, max(last, first + 1), geo.h)
                    a, b = a // step * step, min(geo.h, -(-b // step) * step)
                    b = b if last > first else 0
                    before = wanted.get(reach.value, (a, b))
                    wanted[reach.value] = min(a, before[0]), max(b, before[1])
            done |= {value: last for value, (_, last) in todo.items()}
            found.append((band, low, todo))
        return found


def together(width: int) -> int:
    """Rows that are computed together, so that the row behind them begins at a cache line; 1 if that were too many.

    Example:
        >>> [together(width) for width in (112, 56, 28, 7)]
        [1, 2, 4, 1]
    """
    step = LINE // math.gcd(LINE, width)
    return step if step <= MOST_ALIGNED else 1
