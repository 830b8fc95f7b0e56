"""The choice of a hyper-parameter by a figure of validation data, with a seed of its own."""

from __future__ import annotations

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
    largest: bool = True,
) -> tuple[Value, Arms]:
    """The value with the highest validation accuracy for a seed that is not among the run's, and the arms of all.

    Args:
        run: The reproduction. In a fast one nothing is tried and the value in the middle is taken.
        name: Of what is tuned.
        each: Value to the arguments of its trial.
        function: Of a trial, as for ``Run.arms``; it returns the figure.
        figure: What the choice goes by.
        largest: Whether more of it is better.
    """
    if run.fast:
        return list(each)[len(each) // 2], {}
    labels = {f"{value:g}" if isinstance(value, float) else str(value): value for value in each}
    tried = run.arms(
        {f"tuning: {name} {label}": each[value] for label, value in labels.items()}, function, seeds=[TUNING_SEED]
    )
    sign = 1 if largest else -1
    goodness = {label: sign * tried[f"tuning: {name} {label}"][figure][0] for label in labels}
    # Of equal ones the last, the largest by custom.
    return labels[max(reversed(list(labels)), key=goodness.__getitem__)], tried
