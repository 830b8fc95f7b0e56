"""The kernels, compiled at first use, and torch's own threads for them."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from importlib import resources

import torch

from netwright.deploy.native.build import BuildError, build
from netwright.deploy.native.machine import this_machine

FILES = ("kernels.c.in", "mixture.c.in")
LANES = 8


class Kernels:
    """The compiled functions for channels that are a multiple of ``lanes``.

    Args:
        lanes: Floats handled at once, 8 or 16.

    Raises:
        BuildError: If there is no compiler or it fails.
    """

    def __init__(self, lanes: int) -> None:
        folder = resources.files("netwright.search.fused")
        text = "\n".join([f"#define V {lanes}", *(folder.joinpath(name).read_text() for name in FILES)])
        machine = this_machine()
        self._library = build(text, facts=(machine.cpu, machine.flags))
        self.lanes = lanes
        self.forward = self._function("forward")
        self.backward = self._function("backward")

    def _function(self, name: str) -> Callable[[bytes], int]:
        function = getattr(self._library, name)
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_int
        return function


def kernels(channels: int) -> Kernels | None:
    """The kernels for so many channels; None where there are none, or no C compiler.

    Example:
        >>> kernels(3) is None    # not a multiple of 8
        True
    """
    if channels % LANES:
        return None
    return _compiled(2 * LANES if channels % (2 * LANES) == 0 and this_machine().unit == 2 * LANES else LANES)


@functools.cache
def _compiled(lanes: int) -> Kernels | None:
    try:
        return Kernels(lanes)
    except BuildError:
        return None


@functools.cache
def parallel() -> int:
    """Address of the ``GOMP_parallel`` that torch itself uses, 0 if there is none.

    Threads of another pool would compete with torch's, which wait for work without sleeping.
    """
    name = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        return ctypes.cast(ctypes.CDLL(name).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0
