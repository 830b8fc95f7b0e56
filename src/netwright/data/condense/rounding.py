"""Rounding a table so that its cells and the sums of its rows and columns are all next to what they were.

Cox, "A Constructive Procedure for Unbiased Controlled Rounding", Journal of the American Statistical Association 82,
1987, doi:10.1080/01621459.1987.10478456. While there is a cycle of cells that are no whole numbers, alternately in one
row and in one column, they go up and down in turn by as much as one of them needs to become whole,

    +a with probability b / (a + b), else -b

so every cell keeps its mean and every row and column its sum. A further row and column hold what is missing to whole
sums.
"""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Int


def controlled_rounding(
    counts: Int[np.ndarray, "rows columns"], total: int, random: np.random.Generator
) -> Int[np.ndarray, "rows columns"]:
    """Divides ``total`` in proportion to a table's counts, as whole numbers, at random and without bias.

    Cell (i, j) has the mean total counts_ij / sum(counts), and is this number rounded up or down. So is the sum of
    every row and of every column. Where these are whole, they are exact.

    Args:
        counts: Whole numbers >= 0, at least one of them positive.
        total: What to divide, 0..sum(counts).
        random: Where chance comes from.

    Returns:
        Whole numbers, of sum ``total``, none above its count.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> found = controlled_rounding(np.full((4, 4), 5), 8, np.random.default_rng(0))
        >>> found.sum(0).tolist(), found.sum(1).tolist(), int(found.max())
        ([2, 2, 2, 2], [2, 2, 2, 2], 1)
    """
    whole = int(counts.sum())
    if counts.ndim != 2 or not counts.size or counts.min() < 0 or whole < 1:
        raise ValueError(f"counts must be a table of whole numbers >= 0, not all 0, got shape {counts.shape}")
    if not 0 <= total <= whole:
        raise ValueError(f"total must lie in 0..{whole}, got {total}")
    # In units of 1 / whole all is exact.
    exact = counts.astype(object) * total
    parts = np.zeros((len(counts) + 1, counts.shape[1] + 1), dtype=object)
    parts[:-1, :-1] = exact % whole
    parts[:-1, -1] = -parts[:-1].sum(1) % whole
    parts[-1, :-1] = -parts[:-1, :-1].sum(0) % whole
    places = [(int(i), int(j)) for i, j in np.argwhere(parts != 0)]
    # Nodes of the graph: rows as they are, columns behind them.
    shift = len(parts)
    near: dict[int, dict[int, None]] = {}
    for i, j in places:
        near.setdefault(i, {})[shift + j] = None
        near.setdefault(shift + j, {})[i] = None
    up = np.zeros(parts.shape, dtype=np.int64)
    for start in list(near):
        while near[start]:
            _turn(_cycle(near, start), near, parts, up, shift, whole, random)
    return (exact // whole).astype(np.int64) + up[:-1, :-1]


def _cycle(near: dict[int, dict[int, None]], start: int) -> list[tuple[int, int]]:
    """Edges of a cycle; every node that has an edge has two at least, since its sum is whole."""
    path, place = [start], {start: 0}
    before = -1
    while True:
        here = path[-1]
        to = next(node for node in near[here] if node != before)
        if to in place:
            ring = [*path[place[to] :], to]
            return list(itertools.pairwise(ring))
        place[to] = len(path)
        path.append(to)
        before = here


def _turn(
    cycle: list[tuple[int, int]],
    near: dict[int, dict[int, None]],
    parts: np.ndarray,
    up: np.ndarray,
    shift: int,
    whole: int,
    random: np.random.Generator,
) -> None:
    """Moves the cells of a cycle until one of them is whole, and takes those away."""
    cells = [(min(edge), max(edge) - shift) for edge in cycle]
    rise = min(whole - parts[cell] if k % 2 == 0 else parts[cell] for k, cell in enumerate(cells))
    fall = min(parts[cell] if k % 2 == 0 else whole - parts[cell] for k, cell in enumerate(cells))
    step = rise if random.random() * (rise + fall) < fall else -fall
    for k, cell in enumerate(cells):
        parts[cell] += step if k % 2 == 0 else -step
        if parts[cell] in (0, whole):
            up[cell] = int(parts[cell] == whole)
            parts[cell] = 0
            del near[cell[0]][cell[1] + shift], near[cell[1] + shift][cell[0]]
