"""One arena for all values of a network: buffers share memory when their lives do not meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from netwright.deploy.native.layout import HEAD, LINE, round_up


@dataclass(frozen=True)
class Life:
    """When a buffer is needed.

    Attributes:
        size: Floats.
        first: Step that writes it.
        last: Last step that reads it.
    """

    size: int
    first: int
    last: int


def plan(lives: Mapping[str, Life]) -> tuple[dict[str, int], int]:
    """Best-fit offsets in floats, and the size of the arena.

    Larger buffers are placed first; each goes into the smallest gap between those whose lives meet its own. Offsets are
    whole cache lines, with room before the first and behind the last.

    Example:
        >>> plan({"a": Life(32, 0, 1), "b": Life(16, 1, 2), "c": Life(32, 2, 3)})
        ({'a': 64, 'c': 64, 'b': 96}, 176)
    """
    placed: dict[str, int] = {}
    for name, life in sorted(lives.items(), key=lambda item: (-item[1].size, item[1].first, item[0])):
        taken = sorted(
            (placed[other], placed[other] + round_up(lives[other].size, LINE))
            for other in placed
            if lives[other].first <= life.last and life.first <= lives[other].last
        )
        best, width, at = None, None, HEAD
        for begin, end in taken:
            gap = begin - at
            if gap >= life.size and (width is None or gap < width):
                best, width = at, gap
            at = max(at, end)
        placed[name] = at if best is None else best
    end = max((placed[n] + round_up(life.size, LINE) for n, life in lives.items()), default=HEAD)
    return placed, end + HEAD


def aligned(floats: int) -> np.ndarray:
    """Uninitialised float32 memory that begins at a cache line.

    Example:
        >>> aligned(10).ctypes.data % 64
        0
    """
    raw = np.empty(4 * floats + 4 * LINE, np.uint8)
    return raw[-raw.ctypes.data % (4 * LINE) :][: 4 * floats].view(np.float32)
