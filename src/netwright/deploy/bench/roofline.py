"""What the machine allows at best: peaks measured in the same run, and the bound that they put on a network.

    t >= sum over layers of  2 MACs / (rate of the layer's kind)

A dense layer can run at the peak of multiply-adds in registers. A sparse or depthwise one takes an operand from memory
for each multiply-add, so its peak is that of multiply-adds with rows of the first-level cache; channels that do not
depend on the input cost nothing. Activations that do not
fit the second-level cache are, layer by layer, written and read once more; runtimes that fuse layers avoid some of it,
therefore that time is stated apart.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from netwright.deploy.bench.facts import Facts
from netwright.deploy.native.build import build
from netwright.deploy.native.machine import Machine, this_machine
from netwright.deploy.native.program import source
from netwright.results import Result
from netwright.seeding import numpy_stream

FAR_BYTES = 64 * 1024**2  # a share of the last level or memory itself, in any case beyond the second level


@dataclass(frozen=True)
class Peaks(Result):
    """Rates of one core.

    Attributes:
        fma: Multiply-adds on registers, GFLOP/s (two operations each).
        rows_l1: Multiply-adds whose operands are rows in random order in the first-level cache, GFLOP/s. A row is what
            the sparse kernel takes at once: 256 bytes, or 1 KiB with 32 registers of 64 bytes.
        rows_l2: The same in the second-level cache.
        rows_far: The same beyond it.
        copy_l2: Bytes read and written by a copy within the second-level cache, GB/s.
        copy_far: The same beyond it.
        l2_bytes: Size of the second-level cache.
    """

    fma: float
    rows_l1: float
    rows_l2: float
    rows_far: float
    copy_l2: float
    copy_far: float
    l2_bytes: int


@dataclass(frozen=True)
class Roofline(Result):
    """The bound on one network.

    Attributes:
        peaks: Of one core; with several threads all rates are taken times their number.
        parts: Milliseconds at the peak rates: ``sparse``, ``dense`` and ``depthwise`` layers, and ``traffic``, the
            activations beyond the second-level cache, written and read once.
        bound_ms: The first three together: no arrangement of these kernels is faster.
        ratio: Best time of the fastest dense runtime over ``bound_ms``; None without one.
        layered_ms: ``bound_ms`` and traffic: the same for a runtime that fuses no layers.
        layered_ratio: Best time of the fastest dense runtime over that.
        binds: The largest part.
    """

    peaks: Peaks
    parts: Mapping[str, float]
    bound_ms: float
    ratio: float | None
    layered_ms: float
    layered_ratio: float | None
    binds: str

    def __str__(self) -> str:
        p, layered = self.peaks, ""
        if self.parts["traffic"]:
            layered = f"without fusing layers {_told(self.layered_ms, self.layered_ratio)}; "
        return "\n".join(
            [
                f"peaks of one core: {p.fma:.0f} GFLOP/s; from rows in L1 {p.rows_l1:.0f}, in L2 {p.rows_l2:.0f}, "
                f"beyond {p.rows_far:.0f}; copy in L2 {p.copy_l2:.0f} GB/s, beyond {p.copy_far:.0f}",
                "at these: " + ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.parts.items()),
                f"bound: {_told(self.bound_ms, self.ratio)}; {layered}what binds: {self.binds}",
            ]
        )


def _told(ms: float, ratio: float | None) -> str:
    return f"{ms:.3f} ms" if ratio is None else f"{ms:.3f} ms, {ratio:.1f} times the fastest dense runtime"


def roofline(facts: Facts, peaks: Peaks, dense_ms: float | None, threads: int = 1) -> Roofline:
    """The bound that ``peaks`` put on a network.

    Args:
        facts: Of the network.
        peaks: Of one core.
        dense_ms: Best time of the fastest dense runtime.
        threads: How many cores work.

    Example:
        >>> from netwright.deploy.bench.facts import Layer
        >>> layer = Layer("conv", "sparse", 1000, 50, 10**9, 5 * 10**7, 5 * 10**7, 4096, 4096)
        >>> net = Facts(1000, 0.95, 1000, 0.95, 10**9, 5 * 10**7, 5 * 10**7, False, 4000, (layer,))
        >>> found = roofline(net, Peaks(100.0, 50.0, 40.0, 10.0, 80.0, 20.0, 2**20), dense_ms=20.0)
        >>> found.bound_ms, found.ratio, found.binds
        (2.0, 10.0, 'sparse')
    """
    fma, rows = 1e6 * threads * peaks.fma, 1e6 * threads * peaks.rows_l1
    parts = {"sparse": 0.0, "dense": 0.0, "depthwise": 0.0, "traffic": 0.0}
    for layer in facts.layers:
        dense, sparse = 2 * layer.macs / fma, 2 * layer.live_macs / rows
        parts[layer.kind] += (
            min(dense, sparse) if layer.kind == "sparse" else sparse if layer.kind == "depthwise" else dense
        )
        if layer.in_bytes + layer.out_bytes > peaks.l2_bytes:
            parts["traffic"] += 2 * layer.out_bytes / (1e6 * threads * peaks.copy_far)
    others = facts.macs - sum(layer.macs for layer in facts.layers)  # products of activations, as in attention
    parts["dense"] += 2 * others / fma
    whole = sum(parts.values())
    bound = whole - parts["traffic"]
    ratios = [None if dense_ms is None or not ms else dense_ms / ms for ms in (bound, whole)]
    return Roofline(peaks, parts, bound, ratios[0], whole, ratios[1], max(parts, key=lambda name: parts[name]))


def measure_peaks(seconds: float = 0.5) -> Peaks:
    """Measures this core with a small C program, built by the system's compiler.

    Args:
        seconds: For everything, about, above 0; the best of what fits is taken.

    Raises:
        ValueError: If ``seconds`` is not above 0.
        BuildError: If there is no compiler, or it does not build the program.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds}")
    machine = this_machine()
    library = _library(machine)
    each = seconds / 6
    l1, l2, far = machine.l1_bytes // 2, machine.l2_bytes // 2, max(FAR_BYTES, 8 * machine.l2_bytes)
    return Peaks(
        fma=_rate(library.nw_peak_fma, each, 2e-9 * library.nw_peak_fmas()),
        rows_l1=_rows(library, l1, each),
        rows_l2=_rows(library, l2, each),
        rows_far=_rows(library, far, each),
        copy_l2=_copy(library, l2, each),
        copy_far=_copy(library, far, each),
        l2_bytes=machine.l2_bytes,
    )


def _rows(library: Any, size: int, seconds: float) -> float:
    """GFLOP/s of multiply-adds with the rows of ``size`` bytes, in random order."""
    row = library.nw_peak_row_bytes()
    count = size // row
    data = _aligned(size)
    table = np.zeros(count, [("offset", np.int32), ("weight", np.float32)])
    table["offset"] = row * numpy_stream(0, "peaks").permutation(count)
    table["weight"] = 1e-3
    pointers = table.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(count), data.ctypes.data_as(ctypes.c_void_p)
    return _rate(lambda n: library.nw_peak_rows(*pointers, n), seconds, 2e-9 * count * row / 4)


def _copy(library: Any, size: int, seconds: float) -> float:
    """GB/s, read and written, of copying one half of ``size`` bytes to the other."""
    half = size // 128 * 16  # in floats, whole vectors
    data = _aligned(8 * half)
    start = data.ctypes.data
    pointers = ctypes.c_void_p(start), ctypes.c_void_p(start + 4 * half), ctypes.c_int64(half)
    return _rate(lambda n: library.nw_peak_copy(*pointers, n), seconds, 1e-9 * 8 * half)


def _rate(run: Callable[[ctypes.c_int64], Any], seconds: float, work: float) -> float:
    """The best rate of ``run(n)``, which does ``n`` times ``work``, within about ``seconds``."""
    number, best, end = 1, 0.0, time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run(ctypes.c_int64(number))
        now = time.perf_counter()
        best = max(best, number * work / max(now - start, 1e-9))
        if now - start < seconds / 20:
            number *= 2
        if now >= end:
            return best


def _library(machine: Machine) -> Any:
    magic = "const char *nw_magic(void) { return NW_MAGIC; }"
    text = "\n".join([f"#define NW_VL {machine.unit}", source("simd.h.in"), source("peaks.c.in"), magic, ""])
    library = build(text, facts=(machine.flags, machine.cpu))
    library.nw_peak_fmas.restype = library.nw_peak_row_bytes.restype = ctypes.c_int64
    library.nw_peak_fma.restype = library.nw_peak_rows.restype = ctypes.c_float
    library.nw_peak_copy.restype = None
    return library


def _aligned(size: int) -> np.ndarray:
    """Ones, in memory that begins where a page does, which is where loads are cheapest."""
    room = np.ones(size // 4 + 1024, np.float32)
    return room[(-room.ctypes.data // 4) % 1024 :][: size // 4]
