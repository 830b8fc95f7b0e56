"""The ladder tree, walked as it is defined: the oracle of the grid engine.

A ladder is a chain of activations alpha_{j+1} = delta_j(alpha_j), all but its last inside the region; the tree has
every ladder that valid moves give. Nodes that were met before are not entered again, which changes no verdict: what
lies behind a node does not depend on how it was reached.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Node = tuple[int, ...]


def ladder_search(
    f: Callable[[Node], Any],
    start: Node,
    moves: Iterable[Node],
    in_region: Callable[[Node], bool],
) -> Iterator[tuple[Node, Any]]:
    """Visits every node of the complete ladder tree that lies in the region, and evaluates it.

    Args:
        f: Of a node.
        start: The first node, in the region.
        moves: What can be added to a node.
        in_region: Whether a ladder goes on from a node.

    Yields:
        Each node with what ``f`` gives, breadth first.

    Example:
        >>> reached = ladder_search(sum, (0, 0), [(1, 0), (0, 1)], lambda node: max(node) <= 1)
        >>> [node for node, _ in reached]
        [(0, 0), (1, 0), (0, 1), (1, 1)]
    """
    moves = list(moves)
    seen, queue = {start}, deque([start])
    while queue:
        node = queue.popleft()
        yield node, f(node)
        for move in moves:
            following = tuple(a + b for a, b in zip(node, move, strict=True))
            if following not in seen and in_region(following):
                seen.add(following)
                queue.append(following)
