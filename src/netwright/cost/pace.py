"""How fast the processor is at the moment, by a fixed piece of work.

On a processor that shares its core, its caches or its power with others, as in a cloud, everything takes half as long
again for some seconds, then as long as before. Nothing a process can do keeps it from that, and a short measurement
falls into one such time or another. What a fixed piece of work takes meanwhile tells which.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

# A product small enough for the first cache and for one thread of any BLAS.
SIZE, CALLS = 48, 30


class Pace:
    """The processor's pace, against the best this object has seen.

    Args:
        work: What is timed; a small matrix product by default.

    Example:
        >>> Pace().now() >= 1.0
        True
    """

    def __init__(self, work: Callable[[], object] | None = None):
        self.work, self.best = work or _product(), float("inf")

    def now(self) -> float:
        """How many times as long as at its best the work takes, at least 1: the median of thirty calls."""
        taken = []
        for _ in range(CALLS):
            start = time.perf_counter()
            self.work()
            taken.append(time.perf_counter() - start)
        middle = statistics.median(taken)
        self.best = min(self.best, middle)
        return middle / self.best

    def at_best(self, turn: Callable[[], Sequence[float]]) -> list[float]:
        """The times that ``turn`` gives, as they would be at the best pace.

        They are divided by the pace before or after it, whichever is better: a change within the turn leaves its times
        too long, never too short.

        Args:
            turn: What takes a turn, for :func:`netwright.cost.alternate`.

        Example:
            >>> 0 < Pace().at_best(lambda: [1.0])[0] <= 1.0
            True
        """
        before = self.now()
        times = turn()
        pace = min(before, self.now())
        return [each / pace for each in times]


def _product() -> Callable[[], object]:
    left = np.linspace(-1, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    right, out = np.ascontiguousarray(left.T), np.empty_like(left)
    return lambda: np.dot(left, right, out=out)


# The best pace of this process: measurements of one process can be compared.
PACE = Pace()
