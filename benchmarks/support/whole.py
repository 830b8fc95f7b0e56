"""Benchmarks of several subjects that leave one record of all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from support.record import Figure, record
from support.subjects import run


def recorded(
    name: str,
    told: str,
    subjects: Mapping[str, Callable[[int, bool], list[Figure]]],
    rounds: int,
    threads: int = 1,
) -> int:
    """Runs subjects as :func:`support.subjects.run` and records the figures of all; those of a part are only shown.

    Args:
        name: Of the record.
        told: What the script says of itself.
        subjects: Take the number of rounds and whether sizes shall be small, print what they find and give figures.
        rounds: How many by default.
        threads: Of torch, as the subjects set them.

    Returns:
        The exit code: 1 if an aim was missed.
    """
    figures: dict[str, list[Figure]] = {}
    asked: dict[str, object] = {}

    def kept(subject: str, function: Callable[[int, bool], list[Figure]]) -> Callable[[int, bool], None]:
        def call(number: int, quick: bool) -> None:
            figures[subject] = function(number, quick)
            asked.update(rounds=number, quick=quick)

        return call

    run(told, {subject: kept(subject, function) for subject, function in subjects.items()}, rounds)
    trial = bool(asked["quick"]) or len(figures) < len(subjects)
    found = [figure for each in figures.values() for figure in each]
    return record(name, found, {"threads": threads, "rounds": asked["rounds"]}, quick=trial)
