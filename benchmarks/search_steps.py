"""One step of each search method against its peers on the same supernet, in alternating rounds on one thread.

    python benchmarks/search_steps.py [NAME ...] [--rounds 30] [--quick]

`rarts`: RARTS, fused and exact, and first-order DARTS over second-order DARTS, batch 64.
"""

from __future__ import annotations

from netwright.papers.rarts import step_times
from support.subjects import run


def rarts(rounds: int, quick: bool) -> None:
    print(step_times(rounds, 4 if quick else 64))


SUBJECTS = {"rarts": rarts}

if __name__ == "__main__":
    run(__doc__, SUBJECTS, rounds=30)
