"""When the time of a verification is over."""

from __future__ import annotations

import time


def check_deadline(deadline: float) -> None:
    """Stops what has no time left.

    Args:
        deadline: Of ``time.monotonic()``; inf for none.

    Raises:
        TimeoutError: If it is over.

    Example:
        >>> check_deadline(float("inf"))
    """
    if time.monotonic() > deadline:
        raise TimeoutError
