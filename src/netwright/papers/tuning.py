"""The choice of a hyper-parameter by validation accuracy or another figure, with a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from netwright.papers.run import Arms, Run

TUNING_SEED = 1000

Value = TypeVar("Value", float, str)


def best(
    run: Run,
    name: str,
    each: Mapping[Value, Sequence[Any]],
    function: Callable[..., Any],
    *,
    figure: str = "validation accuracy",
    lowest: bool = False,
) -> tuple[Value, Arms]:
    """The value with the highest validation accuracy for a seed that is not among the run's, and the arms of all.

    Args:
        run: The reproduction. In a fast one nothing is tried and the value in the middle is taken.
        name: Of what is tuned.
        each: Value to the arguments of its trial.
        function: Of a trial, as for ``Run.arms``; it returns ``figure``.
        figure: By which the value is chosen.
        lowest: Whether the lowest figure is the best; one that is missing is the worst.
    """
    if run.fast:
        return list(each)[len(each) // 2], {}
    labels = {f"{value:g}" if isinstance(value, float) else str(value): value for value in each}
    tried = run.arms(
        {f"tuning: {name} {label}": each[value] for label, value in labels.items()}, function, seeds=[TUNING_SEED]
    )
    found = {label: tried[f"tuning: {name} {label}"][figure][0] for label in labels}
    worth = {label: -math.inf if value is None else -value if lowest else value for label, value in found.items()}
    # Of equal ones the last, the largest by custom.
    return labels[max(reversed(list(labels)), key=worth.__getitem__)], tried


def best_inside(
    run: Run,
    name: str,
    rates: Sequence[float],
    trial: Callable[[float], Sequence[Any]],
    function: Callable[..., Any],
    *,
    figure: str = "validation accuracy",
    lowest: bool = False,
    more: int = 4,
) -> tuple[float, bool, Arms]:
    """:func:`best` of rates that grow by about the same factor, with more of them while the best is at an end.

    Args:
        run: As for :func:`best`.
        name: Likewise.
        rates: What is tried first, at least 3, in ascending order.
        trial: A rate to the arguments of its trial.
        function: As for :func:`best`.
        figure: Likewise.
        lowest: Likewise.
        more: Rates at most that are added.

    Returns:
        The best rate, whether it lies inside what was tried, and the arms of all.
    """
    grid = list(rates)
    for added in range(more + 1):
        found, arms = best(run, name, {rate: trial(rate) for rate in grid}, function, figure=figure, lowest=lowest)
        inside = grid[0] < found < grid[-1]
        if run.fast or inside or added == more:
            break
        # Two digits are enough, and keep the arms' names short.
        low, high = (float(f"{end:.2g}") for end in (grid[0] ** 2 / grid[1], grid[-1] ** 2 / grid[-2]))
        grid = [low, *grid] if found == grid[0] else [*grid, high]
    return found, inside, arms
