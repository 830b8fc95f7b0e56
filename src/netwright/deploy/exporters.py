"""What calls of torch's exporters need around them: silence, and one line of what they say when they fail."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def silence() -> Iterator[None]:
    """Keeps logs below errors, warnings and what is printed on either stream away; torch prints whole graphs."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        chatter = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(chatter), redirect_stderr(chatter):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, or its kind.

    Example:
        >>> first_line(ValueError("\\n  a fault\\nand more")), first_line(KeyError())
        ('a fault', 'KeyError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def root_cause(error: BaseException) -> BaseException:
    """The first of a chain of errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error
