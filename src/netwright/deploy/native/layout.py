"""Where values lie in memory, and how a convolution's input is copied so that its kernel reads whole, aligned vectors.

A value (N, C, H, W) is C planes without borders, each N H W floats. A 1x1 convolution reads them as they are. Any other
one first copies a band of its input into scratch memory that stays in the second-level cache (*lowering*):

    copy k of channel c:    scratch[c, k, q, j] = input[c, q s_y + y_k, j s_x + x_k]    or 0 outside the image

and every tap (c, ky, kx) is then a constant offset into scratch. Three ways differ in what is copied:

- ``taps``: one copy a tap, rows packed as in the output. Loads are aligned for any width; right for small maps.
- ``shifted``: one copy a column of the kernel, rows padded to whole vectors; a tap's row is an offset.
- ``phased``: one copy a phase of the stride; a tap's column is an offset too, so loads are not aligned. The cheapest to
  copy, right where few weights read each input.

On a processor with 64-byte vectors an unaligned load touches two cache lines: aligned copies are what doubles the speed
of a 3x3 convolution from the second-level cache, and no border needs to be masked or kept clean in between.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from netwright.deploy.graph.ir import Conv, Shape

LINE = 16  # floats in 64 bytes
HEAD = 64  # floats before the first buffer: a row may be read from up to a block before its start
Kind = Literal["direct", "taps", "shifted", "phased"]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below ``number``.

    Example:
        >>> round_up(49, 16)
        64
    """
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Geometry:
    """Where the floats of a value lie in its buffer.

    Attributes:
        n: Images.
        c: Channels.
        h: Rows.
        w: Columns.
        plane: Floats from one channel to the next; 1 for a flat value.
    """

    n: int
    c: int
    h: int
    w: int
    plane: int

    @property
    def pixels(self) -> int:
        """Of one channel, all images together."""
        return self.n * self.h * self.w

    @property
    def flat(self) -> bool:
        """Whether channels lie side by side."""
        return self.plane == 1

    @property
    def size(self) -> int:
        """Floats of the buffer, with the room behind that whole vectors may touch."""
        return round_up(self.c, LINE) + LINE if self.flat else self.c * self.plane + LINE


def geometry(shape: Shape) -> Geometry:
    """The geometry of a value of rank 4 or 2.

    Planes keep 15 spare floats, so that a kernel may write a whole vector over the end. Large planes are an odd number
    of cache lines apart: powers of two would put the same pixel of every channel into the same few sets of the cache.

    Example:
        >>> geometry((1, 64, 32, 32)).plane, geometry((1, 512, 4, 4)).plane, geometry((1, 10)).plane
        (1040, 32, 1)
    """
    n, c, h, w = shape if len(shape) == 4 else (*shape, 1, 1)
    pixels = n * h * w
    if pixels == 1:
        return Geometry(n, c, h, w, 1)
    return Geometry(n, c, h, w, apart(pixels))


@dataclass(frozen=True)
class Lowering:
    """What of a convolution's input is copied, and where its taps then are.

    Attributes:
        kind: ``"direct"`` copies nothing.
        copies: Of each copy, the row and column of the input that its first row and column hold, relative to those of
            the band.
        stride: Vertical, horizontal.
        rows: Rows of a copy.
        pitch: Floats from row to row of a copy.
        width: Floats that are filled in a row.
        plane: Floats from copy to copy.
        taps: For each (ky, kx): copy, and floats from its beginning.
        band: Output rows that are computed from one filling of the scratch memory. Of ``taps``, counted through all
            images; of the others, within one image.
        bands: Fillings of an image, or of all images for ``taps``.
        vectors: Blocks of ``unit`` floats in a full band of one channel's output.
        per_row: Blocks in a row of the output; 0 where pixels of a band are computed without regard to rows.
        unit: Floats in a block.
    """

    kind: Kind
    copies: tuple[tuple[int, int], ...]
    stride: tuple[int, int]
    rows: int
    pitch: int
    width: int
    plane: int
    taps: dict[tuple[int, int], tuple[int, int]]
    band: int
    bands: int
    vectors: int
    per_row: int
    unit: int

    def offset(self, channel: int, ky: int, kx: int, planes: int) -> int:
        """Floats from the beginning of scratch (or of the input) to the first operand of a tap.

        ``planes`` is the distance of channels of the input, for a direct convolution.
        """
        if self.kind == "direct":
            return channel * planes
        copy, shift = self.taps[ky, kx]
        return (channel * len(self.copies) + copy) * self.plane + shift

    @property
    def aligned(self) -> bool:
        """Whether every tap's offset is a whole number of blocks."""
        return self.kind != "phased"

    def scratch(self, channels: int) -> int:
        """Floats of scratch memory."""
        return 0 if self.kind == "direct" else channels * len(self.copies) * self.plane + LINE


def is_direct(op: Conv, source: Geometry, target: Geometry) -> bool:
    """Whether output pixel p reads pixel p of the input and no other."""
    same = (source.h, source.w) == (target.h, target.w)
    return op.weight.shape[2:] == (1, 1) and op.stride == (1, 1) and not any(op.padding) and same


def lower(op: Conv, source: Geometry, target: Geometry, *, kind: Kind, unit: int, band: int | None = None) -> Lowering:
    """The copies and taps of a convolution.

    Args:
        op: The convolution.
        source: Geometry of its input.
        target: Geometry of its output.
        kind: Which copies.
        unit: Floats in a vector of the kernel: 16, 8 or 4.
        band: Most output rows in a band; None for all.

    Raises:
        ValueError: If a direct convolution is asked for and it is none.
    """
    if kind == "direct":
        if not is_direct(op, source, target):
            raise ValueError("kind must not be 'direct' for a convolution that is no 1x1 of stride 1")
        vectors = -(-target.pixels // unit)
        return Lowering(kind, (), (1, 1), 0, 0, 0, 0, {(0, 0): (0, 0)}, target.h, 1, vectors, 0, unit)
    (sy, sx), (dy, dx) = op.stride, op.dilation
    top, left = op.padding[0], op.padding[1]
    kernel = [(ky, kx) for ky in range(op.weight.shape[2]) for kx in range(op.weight.shape[3])]
    reach = {(ky, kx): (ky * dy - top, kx * dx - left) for ky, kx in kernel}
    total = target.n * target.h if kind == "taps" else target.h
    bands = math.ceil(total / min(total, band or total))
    rows = -(-total // bands)
    bands = -(-total // rows)
    if kind == "taps":
        copies = tuple(reach[tap] for tap in kernel)
        taps = {tap: (number, 0) for number, tap in enumerate(kernel)}
        pixels = rows * target.w
        plane = apart(pixels)
        vectors = -(-pixels // unit)
        return Lowering(kind, copies, (sy, sx), rows, target.w, target.w, plane, taps, rows, bands, vectors, 0, unit)
    per_row = -(-target.w // unit)
    place: dict[tuple[int, int], tuple[tuple[int, int], int, int]] = {}
    low_row = {phase: min(y // sy for y, _ in reach.values() if y % sy == phase) for phase in _phases(reach, 0, sy)}
    low_column = {phase: min(x // sx for _, x in reach.values() if x % sx == phase) for phase in _phases(reach, 1, sx)}
    for tap, (y, x) in reach.items():
        # The copy begins at the first row (and column) that any tap of its phase reaches.
        first = low_row[y % sy]
        begin = first * sy + y % sy
        if kind == "shifted":
            place[tap] = ((begin, x), y // sy - first, 0)
        else:
            start = low_column[x % sx]
            place[tap] = ((begin, start * sx + x % sx), y // sy - first, x // sx - start)
    copies = tuple(sorted({copy for copy, _, _ in place.values()}))
    more_rows = max(row for _, row, _ in place.values())
    more_columns = max(column for _, _, column in place.values())
    # Whole blocks, although loads are not aligned: those of the first column of a kernel then are.
    pitch = round_up(per_row * unit + more_columns, unit)
    width = min(pitch, target.w + more_columns)
    height = rows + more_rows
    plane = apart(height * pitch)
    taps = {tap: (copies.index(copy), row * pitch + column) for tap, (copy, row, column) in place.items()}
    return Lowering(
        kind, copies, (sy, sx), height, pitch, width, plane, taps, rows, bands, rows * per_row, per_row, unit
    )


def _phases(reach: dict[tuple[int, int], tuple[int, int]], axis: int, stride: int) -> Iterable[int]:
    return {place[axis] % stride for place in reach.values()}


def apart(floats: int) -> int:
    """The distance of planes of ``floats``: spare room and odd numbers of lines, as in :func:`geometry`.

    Example:
        >>> apart(1024), apart(16)
        (1040, 32)
    """
    lines = round_up(floats + LINE - 1, LINE) // LINE
    return LINE * (lines if lines <= 24 else lines | 1)


def even_shares(number: int, shares: int) -> list[tuple[int, int]]:
    """Cuts ``number`` things into consecutive shares as equal as can be: first, and one behind the last, of each.

    Example:
        >>> even_shares(7, 2)
        [(0, 4), (4, 7)]
    """
    bounds = [round(number * share / shares + 1e-9) for share in range(shares + 1)]
    return list(itertools.pairwise(bounds))


def blocks(vectors: int, most: int) -> list[int]:
    """Cuts ``vectors`` into nearly equal blocks of at most ``most``: the sizes, larger ones first.

    Example:
        >>> blocks(25, 8)
        [7, 6, 6, 6]
    """
    number = -(-vectors // most)
    small, larger = divmod(vectors, number)
    return [small + 1] * larger + [small] * (number - larger)


def cuts(plan: Lowering, vectors: int, most: int) -> list[tuple[int, int]]:
    """The blocks of a band as pairs (first vector, size).

    Rows of a phased copy do not touch: its blocks hold whole rows, or parts of one.
    """
    if plan.kind == "phased" and plan.per_row <= most:
        sizes = [plan.per_row * rows for rows in blocks(vectors // plan.per_row, most // plan.per_row)]
    elif plan.kind == "phased":
        sizes = blocks(plan.per_row, most) * (vectors // plan.per_row)
    else:
        sizes = blocks(vectors, most)
    starts = itertools.accumulate(sizes, initial=0)
    return list(zip(starts, sizes, strict=False))
