"""What can be wrong with a data set, as a list that is printed (``check``) or refused (``load``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from netwright.console import UserError

NAMES_SHOWN = 10


@dataclass(frozen=True)
class Problem:
    """One fault.

    Attributes:
        kind: ``broken``, ``unknown class``, ``duplicates`` and so on.
        message: What, in one line.
        where: The file, folder or array.
        spoils: Whether a run on this data would be worth nothing: ``check`` then exits with 1.
        cure: What to do about it.
        refused: Whether :func:`netwright.data.load` refuses the data for it.
    """

    kind: str
    message: str
    where: str
    spoils: bool
    cure: str = ""
    refused: bool = False


def refusal(kind: str, message: str, where: object, cure: str) -> Problem:
    """A fault that spoils a run and that ``load`` refuses."""
    return Problem(kind, message, str(where), True, cure, True)


def refuse(problems: Iterable[Problem]) -> None:
    """Raises the first fault that is not accepted.

    Raises:
        UserError: With what, where and cure.

    Example:
        >>> refuse([refusal("classes", "there is only one class", "cats/", "add a second class folder")])
        Traceback (most recent call last):
        netwright.console.UserError: there is only one class
          in cats/
          do add a second class folder
    """
    for problem in problems:
        if problem.refused:
            raise UserError(problem.message, where=problem.where, cure=problem.cure or None)


def listing(names: list[str]) -> str:
    """The first ten names, and how many more there are.

    Example:
        >>> listing([f"{i}.png" for i in range(12)])
        '0.png, 1.png, 2.png, 3.png, 4.png, 5.png, 6.png, 7.png, 8.png, 9.png and 2 more'
    """
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def counted(count: int, noun: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "image"), counted(1200, "image")
        ('1 image', '1200 images')
    """
    return f"{count} {noun}" + ("" if count == 1 else "s")
