"""Numbers and choices as arguments: one message for what is of another type, out of its range or not known."""

from __future__ import annotations

import math
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any


def number(name: str, value: Any, bound: str) -> None:
    """Refuses what is no finite number within a bound; ``True`` and ``False`` are none.

    Args:
        name: Of the argument.
        value: What was given.
        bound: ``">= 0"``, ``"> 1"``, or an interval such as ``"[0, 1)"``.

    Raises:
        ValueError: If the value is none.

    Example:
        >>> number("lr", 0.1, "> 0")
        >>> number("lr", "fast", "> 0")
        Traceback (most recent call last):
        ...
        ValueError: lr must be a number > 0, got 'fast'
        >>> number("momentum", 1.0, "[0, 1)")
        Traceback (most recent call last):
        ...
        ValueError: momentum must lie in [0, 1), got 1.0
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} must be a number {_within(bound)}, got {value!r}")
    if not (math.isfinite(value) and _holds(float(value), bound)):
        wanted = f"lie in {bound}" if bound[0] in "[(" else f"be {bound} and finite"
        raise ValueError(f"{name} must {wanted}, got {value}")


def whole(name: str, value: Any, bound: str) -> None:
    """Refuses what is no whole number within a bound; ``True`` and ``False`` are none.

    Args:
        name: Of the argument.
        value: What was given.
        bound: As for :func:`number`.

    Raises:
        ValueError: If the value is none.

    Example:
        >>> whole("k", 3, ">= 1")
        >>> whole("k", 1.5, ">= 1")
        Traceback (most recent call last):
        ...
        ValueError: k must be a whole number >= 1, got 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number {_within(bound)}, got {value!r}")
    if not _holds(int(value), bound):
        raise ValueError(f"{name} must {'lie in' if bound[0] in '[(' else 'be'} {bound}, got {value}")


def one_of(name: str, value: Any, choices: Collection[Any]) -> None:
    """Refuses what is none of the choices.

    Args:
        name: Of the argument.
        value: What was given.
        choices: What there is to choose from.

    Raises:
        ValueError: If the value is none of them.

    Example:
        >>> one_of("order", "first", ("first", "second"))
        >>> one_of("order", "third", ("first", "second"))
        Traceback (most recent call last):
        ...
        ValueError: order must be one of first, second, got 'third'
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def _within(bound: str) -> str:
    return f"in {bound}" if bound[0] in "[(" else bound


def _holds(value: float, bound: str) -> bool:
    if bound[0] in "[(":
        low, high = (float(end) for end in bound[1:-1].split(","))
        above = value >= low if bound[0] == "[" else value > low
        return above and (value <= high if bound[-1] == "]" else value < high)
    least = float(bound.lstrip(">= "))
    return value >= least if bound.startswith(">=") else value > least
