"""What is aimed at beside what was measured."""

from __future__ import annotations


def judged(value: float, *, least: float | None = None, most: float | None = None, judge: bool = True) -> str:
    """An aim and whether it is met, for a column of a table.

    Args:
        value: Measured.
        least: Aimed at, from below; of ``least`` and ``most`` exactly one.
        most: Aimed at, from above.
        judge: Whether the sizes measure anything; an empty text otherwise.
    """
    if (least is None) == (most is None):
        raise ValueError("give one of least and most")
    if not judge:
        return ""
    if least is not None:
        return f">= {least:g}: {'met' if value >= least else 'missed'}"
    return f"<= {most:g}: {'met' if most is not None and value <= most else 'missed'}"
