"""Memory that stays with the process while something is timed.

A network in inference frees what each layer gave as soon as the next one has read it. glibc hands free memory at the
top of its heap back to the system, and takes it anew for the next layer, page by page: a call then takes up to three
times as long, or does not, as whatever else lies on the heap will have it. Both are the same program, so two
measurements of it are only comparable when the memory is kept.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
# glibc raises its threshold for maps of their own up to the first by itself, and twice that for what it hands back.
OWN_MAP, HANDED_BACK, KEPT = 32 << 20, 64 << 20, 1 << 30


@contextmanager
def memory_kept() -> Iterator[bool]:
    """Lets free memory, up to a gigabyte, stay with the process inside the block.

    Afterwards what is free beyond 64 MiB goes back to the system, as it does in a process that has freed large arrays
    before.

    Returns:
        Whether that could be had: the C library is glibc.

    Example:
        >>> with memory_kept() as kept:
        ...     data = bytearray(1000)
        >>> kept in (True, False)
        True
    """
    kept = _set(_MMAP_THRESHOLD, OWN_MAP) and _set(_TRIM_THRESHOLD, KEPT)
    try:
        yield kept
    finally:
        if kept:
            _set(_TRIM_THRESHOLD, HANDED_BACK)


def _set(parameter: int, value: int) -> bool:
    mallopt = _mallopt()
    return mallopt is not None and bool(mallopt(parameter, value))


@cache
def _mallopt() -> Callable[[int, int], int] | None:
    """That of glibc; None under another C library."""
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        mallopt: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return None
    return mallopt
