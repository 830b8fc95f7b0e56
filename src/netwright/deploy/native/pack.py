"""Weights as the tables that the kernels walk through; pure numpy.

A sparse table holds, for each chunk of input channels, the output rows sorted by their number of non-zeros, and for
each non-zero in that order the place of its operand and its weight. ``kernels/table.h.in`` gives the layout in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from netwright.deploy.native.layout import round_up

ALIGN = 64
LARGEST_OFFSET = 2**31 - 1


@dataclass(frozen=True)
class Entries:
    """The non-zeros of a layer.

    Attributes:
        row: Output channel of each, ascending.
        channel: Input channel of each.
        offset: Floats from the input (or scratch) to its operand.
        weight: Its weight.
        rows: Output channels, those without a non-zero too.
    """

    row: np.ndarray
    channel: np.ndarray
    offset: np.ndarray
    weight: np.ndarray
    rows: int

    @property
    def count(self) -> int:
        """How many non-zeros."""
        return len(self.weight)

    def of_rows(self, first: int, last: int) -> Entries:
        """Those of rows ``first`` to ``last - 1``; rows keep their numbers."""
        kept = (self.row >= first) & (self.row < last)
        return Entries(self.row[kept], self.channel[kept], self.offset[kept], self.weight[kept], self.rows)


def entries(weight: np.ndarray, groups: int, offset_of: Callable[[int, int], np.ndarray]) -> Entries:
    """The non-zeros of a convolution's weight.

    Args:
        weight: (out channels, in channels / groups, kernel height, kernel width).
        groups: Of the channels.
        offset_of: Floats to the first operand of each input channel (an array over all of them) for a tap (ky, kx).

    Raises:
        ValueError: If an offset is above 2 GiB.
    """
    out_channels, per_group, height, width = weight.shape
    row, inner, ky, kx = np.nonzero(weight)
    channel = inner + row // (out_channels // groups) * per_group
    places = np.stack([offset_of(y, x) for y in range(height) for x in range(width)])
    offset = places[ky * width + kx, channel].astype(np.int64)
    if len(offset) and 4 * int(offset.max()) > LARGEST_OFFSET:
        raise ValueError(f"activations must lie within 2 GiB, got an offset of {4 * int(offset.max())} bytes")
    order = np.lexsort((offset, row))
    return Entries(row[order], channel[order], offset[order], weight[row, inner, ky, kx][order], out_channels)


def chunk_bounds(channels: int, chunks: int) -> np.ndarray:
    """First channel of each chunk, and the number of channels at the end."""
    return np.linspace(0, channels, chunks + 1).round().astype(np.int64)


def sparse_table(
    found: Entries, channels: int, chunks: int, unit: int, *, wide: bool, first: int = 0, last: int | None = None
) -> bytes:
    """The table of rows ``first`` to ``last - 1`` of a layer.

    Args:
        found: Its non-zeros.
        channels: Input channels.
        chunks: Parts into which they are cut.
        unit: Floats in a block.
        wide: Whether offsets are kept as int32 in floats, or as uint16 in blocks.
        first: First output row.
        last: Row after the last; None for all.

    Raises:
        ValueError: If offsets do not fit into 16 bits.
    """
    last = found.rows if last is None else last
    part = found.of_rows(first, last)
    bounds = chunk_bounds(channels, chunks)
    chunk = np.searchsorted(bounds, part.channel, side="right") - 1
    counts = np.zeros((chunks, found.rows), np.int64)
    np.add.at(counts, (chunk, part.row), 1)
    place = np.lexsort((part.offset, part.row, counts[chunk, part.row], chunk))
    offset, weight, chunk = part.offset[place], part.weight[place], chunk[place]
    heads: list[tuple[int, ...]] = []
    groups: list[np.ndarray] = []
    orders: list[np.ndarray] = []
    moved = np.zeros_like(offset)
    entry = 0
    for number in range(chunks):
        length = int((chunk == number).sum())
        here = slice(entry, entry + length)
        base = int(offset[here].min()) if length else 0
        base -= base % unit
        moved[here] = offset[here] - base
        used = np.arange(first, last)
        if 0 < number < chunks - 1:  # a middle chunk leaves rows without weights as they are
            used = used[counts[number, first:last] > 0]
        by_count = used[np.argsort(counts[number, used], kind="stable")]
        sizes, starts = np.unique(counts[number, by_count], return_index=True)
        lengths = np.diff(np.append(starts, len(by_count)))
        first_group, first_row = sum(len(g) for g in groups) // 2, sum(len(o) for o in orders)
        heads.append((base if wide else base // unit, len(sizes), first_group, first_row, entry))
        groups.append(np.stack([sizes, lengths], axis=1).astype(np.int32).ravel())
        orders.append(by_count.astype(np.int32))
        entry += length
    if wide:
        offsets = moved.astype(np.int32)
    else:
        moved, rest = np.divmod(moved, unit)
        if rest.any():
            raise ValueError("offsets must be whole blocks, got some that are not")
        if len(moved) and moved.max() > 0xFFFF:
            raise ValueError(f"offsets must fit into 16 bits, got {int(moved.max())} blocks")
        # the kernel reads four at a time, over the end too
        offsets = np.append(moved, np.zeros(4, np.int64)).astype(np.uint16)
    return sections(
        np.array([chunks], np.int32),
        [
            np.array(heads, np.int32),
            np.concatenate(groups),
            np.concatenate(orders),
            offsets,
            weight.astype(np.float32),
        ],
    )


def fits_16_bits(found: Entries, channels: int, chunks: int, unit: int) -> bool:
    """Whether the offsets of every chunk can be kept in 16 bits."""
    if np.any(found.offset % unit):
        return False
    chunk = np.searchsorted(chunk_bounds(channels, chunks), found.channel, side="right") - 1
    for number in range(chunks):
        here = found.offset[chunk == number]
        if len(here) and (here.max() - here.min()) // unit > 0xFFFF:
            return False
    return True


def sections(head: np.ndarray, arrays: list[np.ndarray]) -> bytes:
    """Arrays behind a header: its own numbers, then the byte offset of each array from the beginning.

    Every array begins at a multiple of 64 bytes.
    """
    at = round_up(head.nbytes + 4 * len(arrays), ALIGN)
    places, body = [], bytearray()
    for array in arrays:
        places.append(at + len(body))
        raw = array.tobytes()
        body += raw + bytes(round_up(len(raw), ALIGN) - len(raw))
    front = head.tobytes() + np.array(places, np.int32).tobytes()
    return front + bytes(at - len(front)) + bytes(body)


def equal_shares(counts: np.ndarray, shares: int, weight_of_row: float) -> list[int]:
    """Cuts rows into consecutive shares of nearly equal work: the bounds.

    Args:
        counts: Non-zeros of each row.
        shares: How many.
        weight_of_row: Work of a row itself, in non-zeros.

    Example:
        >>> equal_shares(np.array([8, 0, 4, 4]), 2, 0.0)
        [0, 1, 4]
    """
    work = np.concatenate([[0.0], np.cumsum(counts + weight_of_row)])
    cuts = np.searchsorted(work, work[-1] * np.arange(1, shares) / shares - 1e-9)
    return [0, *np.maximum.accumulate(np.clip(cuts, 0, len(counts))).tolist(), len(counts)]


def dense_rows(weight: np.ndarray, height: int) -> np.ndarray:
    """Weights of a dense kernel, by blocks of ``height`` output rows, each (inputs, rows of the block), run together.

    The last block may have fewer rows; nothing is filled in.

    Args:
        weight: (out channels, inputs).
        height: Rows of a block.
    """
    parts = [weight[at : at + height].T for at in range(0, len(weight), height)]
    return np.concatenate([np.ascontiguousarray(part).ravel() for part in parts]).astype(np.float32)
