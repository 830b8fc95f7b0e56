"""One step of each search method against its peers on the same supernet, in alternating rounds on one thread.

    python benchmarks/search_steps.py [NAME ...] [--rounds 30]

A pair of methods is one function of PAIRS, which gives the comparison; all of them without a name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from netwright.cost.timing import Comparison
from netwright.papers.rarts import step_times

BATCH = 64


def rarts(rounds: int) -> Comparison:
    """RARTS, fused and exact, and first-order DARTS over second-order DARTS."""
    return step_times(rounds, BATCH)


PAIRS: dict[str, Callable[[int], Comparison]] = {"rarts": rarts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    if unknown := set(options.names) - set(PAIRS):
        parser.error(f"NAME must be one of {', '.join(PAIRS)}, got {', '.join(sorted(unknown))}")
    for name in options.names or PAIRS:
        print(f"{PAIRS[name].__doc__}\n{PAIRS[name](options.rounds)}\n")


if __name__ == "__main__":
    main()
