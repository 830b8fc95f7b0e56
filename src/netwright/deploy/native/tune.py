"""Kernel choice by measurement: the cost model's best candidates of every layer, timed side by side on this machine.

Whether layers run in strips is measured for the network as a whole, in which one layer's values displace another's.
What is found is kept in the cache by shape, density in steps of 2 %, and processor, so a second network of the same
shapes costs nothing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from netwright import __version__, storage
from netwright.deploy.graph.ir import Conv, Graph
from netwright.deploy.native import convolution
from netwright.deploy.native.build import build
from netwright.deploy.native.choose import DENSE_FROM, Choice, candidates, choose, cost
from netwright.deploy.native.convolution import Convolved
from netwright.deploy.native.emit import Chooser
from netwright.deploy.native.layout import HEAD, Geometry
from netwright.deploy.native.machine import Machine
from netwright.deploy.native.memory import aligned
from netwright.deploy.native.program import Place, Program, source
from netwright.deploy.native.runtime import Network

MOST_CANDIDATES = 8
WORSE = 2.0  # a candidate whose estimate is this many times the best is not tried
REPEATS = 20
DENSITY_STEP = 0.02

Layer = tuple[Conv, Geometry, Geometry]


def tuned(layers: list[Layer], machine: Machine) -> Chooser:
    """A chooser that has measured ``layers``, and asks the cost model about any other.

    Args:
        layers: Convolutions with the geometries of input and output.
        machine: The processor at hand.
    """
    folder = storage.cache_folder("tuning")
    wanted = {_key(op, x, y, machine): (op, x, y) for op, x, y in layers}
    known: dict[str, Choice] = {}
    for key in wanted:
        found = _read(folder / f"{key}.json")
        if found is not None:
            known[key] = found
    missing = {key: layer for key, layer in wanted.items() if key not in known}
    if missing:
        for key, choice in _measure(missing, machine).items():
            known[key] = choice
            storage.write_json(folder / f"{key}.json", dataclasses.asdict(choice))

    def chooser(op: Conv, x: Geometry, y: Geometry, on: Machine) -> Choice:
        choice = known.get(_key(op, x, y, on))
        return choose(op, x, y, on) if choice is None else choice

    return chooser


def strips_pay(graph: Graph, threads: int, machine: Machine, chooser: Chooser) -> bool:
    """Whether a network is faster with the strips that the cost model proposes, if it proposes any.

    Args:
        graph: The network.
        threads: Threads of a call.
        machine: The processor at hand.
        chooser: Decides how its convolutions are run.
    """
    strips = Network(graph, threads, machine=machine, chooser=chooser)
    if not any("in strips" in what for _, what, _ in strips.steps):
        return True
    path = storage.cache_folder("tuning") / f"{storage.digest('strips', strips.key, threads)}.json"
    try:
        return bool(json.loads(path.read_text())["strips"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rivals = [strips, Network(graph, threads, machine=machine, chooser=chooser, strips=False)]
    source = np.random.default_rng(0)
    inputs = [source.standard_normal(shape, np.float32) for shape in strips.inputs]
    outputs = [np.empty(shape, np.float32) for shape in strips.outputs]
    addresses = [x.ctypes.data for x in inputs], [y.ctypes.data for y in outputs]
    times = [float("inf")] * len(rivals)
    for _ in range(REPEATS):
        for place, network in enumerate(rivals):
            network(*addresses)  # what the other one left in the caches is no part of it
            start = time.perf_counter()
            network(*addresses)
            times[place] = min(times[place], time.perf_counter() - start)
    found = times[0] <= times[1]
    storage.write_json(path, {"strips": found})
    return found


def _key(op: Conv, x: Geometry, y: Geometry, machine: Machine) -> str:
    density = round(np.count_nonzero(op.weight) / op.weight.size / DENSITY_STEP)
    shape = [op.weight.shape, op.stride, op.padding, op.dilation, op.groups]
    places = [dataclasses.astuple(geo) for geo in (x, y)]
    return storage.digest(shape, places, density, machine.cpu, machine.unit, __version__)


def _read(path: Path) -> Choice | None:
    try:
        content = json.loads(path.read_text())
        return Choice(**content)
    except (OSError, ValueError, TypeError):
        return None


def _measure(layers: dict[str, Layer], machine: Machine) -> dict[str, Choice]:
    """The fastest candidate of each layer: all are compiled as the steps of one program and timed in turns."""
    program = Program(machine.unit, machine.unit, 1)
    tried: list[tuple[str, Choice]] = []
    x_floats = max(x.size for _, x, _ in layers.values())
    y_floats = max(y.size for _, _, y in layers.values())
    work = HEAD + x_floats + HEAD + y_floats + HEAD
    arena = work
    for key, (op, x, y) in layers.items():
        for choice in _promising(op, x, y, machine):
            layer = Convolved(
                op, key, Place(f"(m + {HEAD})", x), Place(f"(m + {2 * HEAD + x_floats})", y), None, choice
            )
            convolution.emit(layer, program, f"m + {work}")
            arena = max(arena, work + convolution.scratch_floats(layer, program) + HEAD)
            tried.append((key, choice))
    library = build(program.text([], []) + source("run.c.in"), facts=[machine.flags])
    raw = program.tables()
    tables, memory = aligned(len(raw) // 4), aligned(arena)
    tables.view(np.uint8)[:] = np.frombuffer(raw, np.uint8)
    memory[:] = np.random.default_rng(0).standard_normal(arena, np.float32)
    pointers = ctypes.c_void_p(tables.ctypes.data), ctypes.c_void_p(memory.ctypes.data)
    times = np.full(len(tried), np.inf)
    for _ in range(REPEATS):
        for place in range(len(tried)):
            start = time.perf_counter()
            library.nw_range(*pointers, place, place + 1)
            times[place] = min(times[place], time.perf_counter() - start)
    best: dict[str, tuple[float, Choice]] = {}
    for (key, choice), seconds in zip(tried, times, strict=True):
        if key not in best or seconds < best[key][0]:
            best[key] = (seconds, choice)
    return {key: choice for key, (_, choice) in best.items()}


def _promising(op: Conv, x: Geometry, y: Geometry, machine: Machine) -> list[Choice]:
    density = np.count_nonzero(op.weight) / op.weight.size
    kinds = [False] if density < DENSE_FROM / 2 or op.groups > 1 else [False, True]
    found = [choice for dense in kinds for choice in candidates(op, x, y, machine, dense=dense)]
    estimates = [cost(op, x, y, machine, choice) for choice in found]
    order = np.argsort(estimates, kind="stable")
    return [found[i] for i in order if estimates[i] <= WORSE * estimates[order[0]]][:MOST_CANDIDATES]
