"""How a network is run, behind one face: native kernels, PyTorch where they cannot be had, or parts of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from netwright.console import warn
from netwright.deploy.backend_torch import TorchBackend
from netwright.deploy.graph import Graph, Segments
from netwright.deploy.graph.reference import arranged
from netwright.deploy.graph.segments import Run
from netwright.deploy.native.build import BuildError
from netwright.deploy.native.emit import layers
from netwright.deploy.native.machine import this_machine
from netwright.deploy.native.runtime import Network
from netwright.deploy.native.tune import strips_pay, tuned
from netwright.deploy.work import layer_macs, weight_bytes

Backend = Literal["native", "torch"]
Numbers = Tensor | np.ndarray
Steps = list[tuple[str, str, int, float]]


def make_engine(network: Graph | Segments, backend: Backend, threads: int, tune: bool) -> tuple[Backend, Engine]:
    """The engine of a network, and what it really runs on: PyTorch, with a warning, if the compiler fails.

    Args:
        network: Of optimised and checked graphs.
        backend: What is wanted.
        threads: Threads of a call.
        tune: Whether native kernels are chosen by measurement, which is cached, and not by the cost model.

    Raises:
        ValueError: If activations exceed 2 GiB.
    """
    graphs = network.graphs if isinstance(network, Segments) else [network]
    engines: list[Engine] = []
    if backend == "native":
        try:
            engines = [NativeEngine(graph, threads, tune) for graph in graphs]
        except BuildError as error:
            warn(f"{error.what}\n  PyTorch runs the network instead, more slowly")
            backend = "torch"
    if backend == "torch":
        engines = [TorchEngine(graph, threads) for graph in graphs]
    return backend, MixedEngine(network, engines) if isinstance(network, Segments) else engines[0]


class Engine(Protocol):
    """A network that can be run.

    Attributes:
        nbytes: Bytes of what it keeps of the weights.
        arena_bytes: Bytes of the memory that it keeps to work in.
    """

    nbytes: int
    arena_bytes: int

    def fill(self, inputs: Sequence[Numbers], outputs: Sequence[Numbers]) -> None:
        """Runs it from contiguous float32 arrays into others."""

    def clone(self) -> Engine:
        """One that can run at the same time; weights are shared."""

    def steps(self, graphs: Sequence[Graph], inputs: Sequence[Tensor], repeats: int) -> Steps:
        """(path, kernel, multiply-adds, seconds) of each step, the shortest of ``repeats``."""


class NativeEngine:
    """Compiled kernels.

    Raises:
        BuildError: If there is no compiler or it fails.
        ValueError: If activations exceed 2 GiB.
    """

    def __init__(self, graph: Graph, threads: int, tune: bool) -> None:
        machine = this_machine()
        if tune:
            chooser = tuned(layers(graph), machine)
            strips = strips_pay(graph, threads, machine, chooser)
            self._keep(Network(graph, threads, machine=machine, chooser=chooser, strips=strips))
        else:
            self._keep(Network(graph, threads, machine=machine))

    def _keep(self, network: Network) -> None:
        self._network, self.nbytes, self.arena_bytes = network, network.nbytes, network.arena_bytes

    def fill(self, inputs: Sequence[Numbers], outputs: Sequence[Numbers]) -> None:
        """See :class:`Engine`."""
        self._network([_address(x) for x in inputs], [_address(y) for y in outputs])

    def clone(self) -> NativeEngine:
        """See :class:`Engine`."""
        twin = object.__new__(NativeEngine)
        twin._keep(self._network.clone())
        return twin

    def steps(self, graphs: Sequence[Graph], inputs: Sequence[Tensor], repeats: int) -> Steps:
        """See :class:`Engine`."""
        outputs = [torch.empty(shape) for shape in self._network.outputs]
        addresses = [_address(x) for x in inputs], [_address(y) for y in outputs]
        seconds = self._network.time_steps(*addresses, repeats).tolist()
        return [(*step, each) for step, each in zip(self._network.steps, seconds, strict=True)]


class TorchEngine:
    """PyTorch's operators, with sparse matrix products where they pay."""

    def __init__(self, graph: Graph, threads: int) -> None:
        self._backend, self._threads = TorchBackend(graph, threads), threads
        self.nbytes, self.arena_bytes = weight_bytes(graph), 0

    def fill(self, inputs: Sequence[Numbers], outputs: Sequence[Numbers]) -> None:
        """See :class:`Engine`."""
        for y, found in zip(outputs, self._backend([tensor(x) for x in inputs]), strict=True):
            tensor(y).copy_(found)

    def clone(self) -> TorchEngine:
        """Itself: it keeps nothing between calls."""
        return self

    def steps(self, graphs: Sequence[Graph], inputs: Sequence[Tensor], repeats: int) -> Steps:
        """See :class:`Engine`; each operation as a graph of its own."""
        (graph,) = graphs
        values = dict(zip(graph.inputs, arranged(graph, inputs), strict=True))
        found: Steps = []
        for node in graph:
            read = list(dict.fromkeys(node.inputs))
            shapes = {value: graph.shapes[value] for value in (*read, node.output)}
            run = TorchBackend(Graph(shapes, [node], read, [node.output]), self._threads)
            given = [values[value] for value in read]
            (values[node.output],) = run(given)
            seconds = shortest(partial(run, given), repeats)
            found.append((node.path, node.op.name, layer_macs(node, graph).dense, seconds))
        return found


class MixedEngine:
    """Graphs, each with its engine, and PyTorch between them."""

    def __init__(self, network: Segments, engines: Sequence[Engine]) -> None:
        self._network, self._engines = network, engines
        self.nbytes = sum(engine.nbytes for engine in engines)
        self.arena_bytes = sum(engine.arena_bytes for engine in engines)
        self._run = self._bound(lambda engine, _: None)

    def _bound(self, watch: Callable[[Engine, Sequence[Tensor]], None]) -> Run:
        """The whole network; ``watch`` sees what goes into each engine."""
        left = iter(self._engines)

        def bind(graph: Graph) -> Run:
            engine, shapes = next(left), views(graph, graph.outputs)

            def run(inputs: Sequence[Tensor]) -> list[Tensor]:
                given, outputs = [x.contiguous() for x in inputs], [torch.empty(shape) for shape in shapes]
                watch(engine, given)
                engine.fill(given, outputs)
                return outputs

            return run

        return self._network.compile(bind)

    def run(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The outputs, of whatever type PyTorch gives them."""
        return self._run(inputs)

    def fill(self, inputs: Sequence[Numbers], outputs: Sequence[Numbers]) -> None:
        """See :class:`Engine`."""
        for y, found in zip(outputs, self._run([tensor(x) for x in inputs]), strict=True):
            tensor(y).copy_(found)

    def clone(self) -> MixedEngine:
        """See :class:`Engine`."""
        return MixedEngine(self._network, [engine.clone() for engine in self._engines])

    def steps(self, graphs: Sequence[Graph], inputs: Sequence[Tensor], repeats: int) -> Steps:
        """See :class:`Engine`; what PyTorch does between the graphs is one step, the rest of the whole time."""
        given: dict[int, list[Tensor]] = {}
        self._bound(lambda engine, x: given.__setitem__(id(engine), list(x)))(inputs)
        found: Steps = []
        inside = 0.0
        for engine, graph in zip(self._engines, graphs, strict=True):
            found += engine.steps([graph], given[id(engine)], repeats)
            outputs = [torch.empty(shape) for shape in views(graph, graph.outputs)]
            inside += shortest(partial(engine.fill, given[id(engine)], outputs), repeats)
        whole = shortest(lambda: self._run(inputs), repeats)
        return [*found, ("", "PyTorch", 0, max(0.0, whole - inside))]


def shortest(call: Callable[[], object], repeats: int) -> float:
    """Seconds of the shortest call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def views(graph: Graph, values: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The shapes under which a caller knows inputs or outputs."""
    return tuple(graph.views.get(value, graph.shapes[value]) for value in values)


def tensor(x: Numbers) -> Tensor:
    """A tensor on the memory of an array; of a copy if that must not be written."""
    if isinstance(x, Tensor):
        return x
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def _address(x: Numbers) -> int:
    return x.data_ptr() if isinstance(x, Tensor) else x.ctypes.data
