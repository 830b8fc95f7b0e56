"""Subjects of a benchmark by name on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

Subject = Callable[[int, bool], object]
"""Takes the number of rounds, and whether sizes shall be small, so that the code is tried; prints what it found and may
return an exit code."""


def run(told: str, subjects: Mapping[str, Subject], rounds: int) -> int:
    """Runs the subjects that the command line names, all of them by default; returns the largest exit code.

    Args:
        told: What the script says of itself; its first line is shown.
        subjects: By name.
        rounds: How many by default.
    """
    parser = argparse.ArgumentParser(description=told.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(subjects)}")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"alternating rounds  [{rounds}]")
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the code; figures mean nothing")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(subjects)):
        parser.error(f"NAME must be one of {', '.join(subjects)}, got {', '.join(unknown)}")
    code = 0
    for name in options.names or subjects:
        print(f"== {name}")
        found = subjects[name](options.rounds, options.quick)
        code = max(code, found if isinstance(found, int) else 0)
    return code
