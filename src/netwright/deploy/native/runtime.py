"""A graph as compiled code: the object, its tables, the arena it works in, and calls through ctypes."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from netwright.deploy.graph.ir import Graph, Node
from netwright.deploy.native.build import build
from netwright.deploy.native.choose import choose
from netwright.deploy.native.emit import Chooser, compile_graph
from netwright.deploy.native.machine import Machine, this_machine
from netwright.deploy.native.memory import aligned
from netwright.deploy.native.program import source

LARGEST_ARENA = 2**31
_networks: weakref.WeakSet[Network] = weakref.WeakSet()


class Network:
    """A network that runs natively, on addresses of float32 arrays.

    Calls from several threads take turns; ctypes lets go of Python's lock meanwhile. After a fork the child's calls
    start threads of its own.

    Args:
        graph: An optimised and checked graph.
        threads: Threads of every call, at least 1.
        machine: The processor whose kernels are written; the one at hand by default.
        chooser: Decides how each convolution is run.
        strips: Whether layers run in strips where the cost model says that it pays.

    Attributes:
        inputs: Shapes of its inputs, as the graph holds them.
        outputs: Shapes of its outputs, likewise.
        steps: (module path, kernel, multiply-adds) of every step.
        threads: As given.
        machine: As given.

    Raises:
        BuildError: If there is no compiler or it fails.
        ValueError: If activations exceed 2 GiB.
    """

    def __init__(
        self,
        graph: Graph,
        threads: int = 1,
        *,
        machine: Machine | None = None,
        chooser: Chooser = choose,
        strips: bool = True,
    ) -> None:
        self.machine = this_machine() if machine is None else machine
        self.threads = threads
        compiled = compile_graph(_printable(graph), self.machine, threads, chooser, strips=strips)
        if 4 * compiled.arena_floats > LARGEST_ARENA:
            raise ValueError(f"activations must lie within 2 GiB, got {4 * compiled.arena_floats} bytes")
        self.inputs, self.outputs, self.steps = compiled.inputs, compiled.outputs, compiled.steps
        facts = (self.machine.cpu, self.machine.flags)
        self._code = _Code(build(compiled.text + source("run.c.in"), facts=facts))
        self._tables = aligned(-(-len(compiled.tables) // 4))
        self._tables.view(np.uint8)[: len(compiled.tables)] = np.frombuffer(compiled.tables, np.uint8)
        self._tables.flags.writeable = False
        self._floats = compiled.arena_floats
        self._furnish()

    def _furnish(self) -> None:
        """Memory and a lock of its own."""
        self._arena = aligned(self._floats)
        # Kernels compute past the ends of rows too: what they find there must not be denormal, which is slow.
        self._arena[:] = 0.0
        self._at = ctypes.c_void_p(self._tables.ctypes.data), ctypes.c_void_p(self._arena.ctypes.data)
        self._pointers = ctypes.c_void_p * len(self.inputs), ctypes.c_void_p * len(self.outputs)
        self._lock = threading.Lock()
        _networks.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of its tables."""
        return self._tables.nbytes

    @property
    def key(self) -> str:
        """What its compiled object is known by: of what the code is, the compiler and the processor."""
        return Path(self._code.path).stem

    @property
    def arena_bytes(self) -> int:
        """Bytes of the memory that it works in."""
        return self._arena.nbytes

    def __call__(self, inputs: Sequence[int], outputs: Sequence[int]) -> None:
        """Runs it.

        Args:
            inputs: Addresses of contiguous float32 arrays of the inputs' sizes.
            outputs: Likewise for the outputs, which are written.
        """
        given, wanted = self._pointers
        with self._lock:
            self._code.run(*self._at, given(*inputs), wanted(*outputs))

    def time_steps(self, inputs: Sequence[int], outputs: Sequence[int], repeats: int) -> np.ndarray:
        """Seconds of every step: the shortest of ``repeats`` rounds over all steps, each behind a whole call.

        Buffers share memory, so what the first steps of a round read is not the input any more. The call keeps it from
        drifting, over the rounds, into numbers that are slow to compute with.

        Args:
            inputs: As for a call.
            outputs: Likewise.
            repeats: At least 1.
        """
        best = np.full(len(self.steps), np.inf)
        for _ in range(repeats):
            self(inputs, outputs)
            with self._lock:
                for place in range(len(self.steps)):
                    start = time.perf_counter()
                    self._code.range(*self._at, place, place + 1)
                    best[place] = min(best[place], time.perf_counter() - start)
        return best

    def clone(self) -> Network:
        """The same code and tables with an arena of their own, so that both can run at once.

        Those with several threads share these too, and take turns.
        """
        twin = object.__new__(Network)
        vars(twin).update(vars(self))
        twin._furnish()
        return twin


class _Code:
    """An object, whose threads end when no network uses it any more.

    Attributes:
        path: Its file.
        run: ``nw_run``.
        range: ``nw_range``.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.path = library._name
        self.run, self.range = library.nw_run, library.nw_range
        self.run.argtypes = [ctypes.c_void_p] * 4
        self.range.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]
        self.run.restype = self.range.restype = None
        library.nw_start()
        # at exit the threads sleep and are ended with the process
        weakref.finalize(self, library.nw_stop).atexit = False


def _printable(graph: Graph) -> Graph:
    """The graph with module paths that can stand in a comment of C."""
    nodes = [Node(n.op, n.inputs, n.output, re.sub(r"[^\w.+\- ]", "_", n.path, flags=re.ASCII)) for n in graph]
    return Graph(graph.shapes, nodes, graph.inputs, graph.outputs, graph.views)


def _renew_locks() -> None:
    """Another thread may have held a lock when this process was forked."""
    for network in _networks:
        network._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)
