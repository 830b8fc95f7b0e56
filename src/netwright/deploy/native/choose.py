"""Which kernel runs a convolution: a cost model in cycles, without timing anything.

Per block of pixels and non-zero the sparse kernel loads one block, and shares the loads of offset and weight over the
blocks that it holds; copies cost about two cycles a block; partial sums of a chunk are read and written once more. The
constants are fitted to measurements on processors with vectors of 32 and 64 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from netwright.deploy.graph.ir import Conv
from netwright.deploy.native.layout import Geometry, Kind, Lowering, cuts, is_direct, lower
from netwright.deploy.native.machine import Machine

DENSE_FROM = 0.5  # share of non-zeros from which the dense kernel is the default
L1_SHARE = 0.75  # of the first-level cache that operands of a chunk may fill
# Of the second-level cache that copies may fill: much of it for small maps, whose shifted copies are made at once.
L2_SHARE, L2_SHARE_OF_TAPS = 0.25, 0.75
MIN_ROW = 5  # non-zeros that a row keeps in every chunk
# Cycles of a multiply-add with an operand from the first- and the second-level cache, aligned and not.
ALIGNED, UNALIGNED = (0.62, 1.3), (1.05, 1.8)
COPY_BLOCK, COPY_ROW = 3.5, 3.0  # cycles of a block and of a row that is copied
SHARED_CYCLES, SHARED_PIXELS, SHARED_WORK = 5e4, 2048, 25  # from where threads share a step
DEPTHWISE_RATE = 12.0  # multiply-adds a cycle
ENTRY, ROW, STORE, PARTIAL = 0.7, 5.0, 2.5, 1.2  # of a non-zero, a row, a block stored, a block of a partial sum


@dataclass(frozen=True)
class Choice:
    """How a convolution is run.

    Attributes:
        dense: Whether zeros are multiplied too.
        kind: Which copies are made, as in :class:`netwright.deploy.native.layout.Lowering`.
        most: Most blocks held in registers.
        chunks: Parts of the input channels.
        band: Output rows of one filling of the scratch memory; None for all.
    """

    dense: bool
    kind: Kind
    most: int
    chunks: int
    band: int | None


def shared(cycles: float, kept: int, source: Geometry, target: Geometry, *, copied: bool) -> bool:
    """Whether several threads do better than one.

    To read a cache line that another core has written takes ten times as long as one of its own, and with small planes
    the prefetchers of each core fetch what the other works on. Only large planes, much work for each float that is
    read or written, or copies of one's own make up for that.

    Args:
        cycles: Estimate for one thread.
        kept: Multiply-adds that are done.
        source: Geometry of the input.
        target: Geometry of the output.
        copied: Whether each thread works on copies that it makes itself.
    """
    if cycles < SHARED_CYCLES:
        return False
    moved = source.c * source.pixels + target.c * target.pixels
    return copied or max(source.pixels, target.pixels) >= SHARED_PIXELS or kept >= SHARED_WORK * moved


def sets(count: int) -> int:
    """Accumulator sets of a kernel with ``count`` blocks, so that at least eight sums are on their way."""
    return 4 if count <= 2 else 2 if count <= 6 else 1


def largest(machine: Machine) -> int:
    """Most blocks that the registers hold beside operands."""
    return 16 if machine.unit == 16 else 9


def choose(op: Conv, source: Geometry, target: Geometry, machine: Machine) -> Choice:
    """The cheapest choice by the cost model."""
    dense = op.groups == 1 and int(np.count_nonzero(op.weight)) > DENSE_FROM * op.weight.size
    found = candidates(op, source, target, machine, dense=dense)
    return min(found, key=lambda choice: cost(op, source, target, machine, choice))


def candidates(op: Conv, source: Geometry, target: Geometry, machine: Machine, *, dense: bool) -> Iterator[Choice]:
    """Everything that is worth trying."""
    direct = is_direct(op, source, target)
    kinds: tuple[Kind, ...] = ("direct",) if direct else ("taps", "shifted") if dense else ("taps", "shifted", "phased")
    for kind in kinds:
        band = band_of(op, source, target, machine, kind)
        if dense:
            yield Choice(True, kind, 3, 1, band)
            continue
        plan = lower(op, source, target, kind=kind, unit=machine.unit, band=band)
        for most in sorted({min(most, plan.vectors, largest(machine)) for most in (4, 6, 8, 12, 16)}):
            for chunks in _chunks(op, source, plan, most, machine):
                yield Choice(False, kind, most, chunks, band)


def band_of(op: Conv, source: Geometry, target: Geometry, machine: Machine, kind: Kind) -> int | None:
    """Rows of a band whose copies fill at most half of the second-level cache."""
    if kind == "direct":
        return None
    room = (L2_SHARE_OF_TAPS if kind == "taps" else L2_SHARE) * machine.l2_bytes / 4
    total = target.n * target.h if kind == "taps" else target.h
    band = total
    while band > 1 and lower(op, source, target, kind=kind, unit=machine.unit, band=band).scratch(source.c) > room:
        band = -(-band // 2)
    return band


def window(op: Conv, source: Geometry, plan: Lowering, most: int, unit: int) -> int:
    """Bytes of one input channel that a block of ``most`` vectors touches."""
    reach = max(shift for _, shift in plan.taps.values())
    return 4 * max(1, len(plan.copies)) * (most * unit + reach)


def _chunks(op: Conv, source: Geometry, plan: Lowering, most: int, machine: Machine) -> list[int]:
    nonzeros = int(np.count_nonzero(op.weight))
    total = source.c * window(op, source, plan, most, machine.unit)
    wanted = -(-total // int(L1_SHARE * machine.l1_bytes))
    limit = max(1, min(source.c, nonzeros // (MIN_ROW * len(op.weight))))
    if op.groups > 1:
        return [1]
    return sorted({1, min(wanted, limit), min(max(1, wanted // 2), limit)})


def cost(op: Conv, source: Geometry, target: Geometry, machine: Machine, choice: Choice) -> float:
    """Estimated cycles."""
    plan = lower(op, source, target, kind=choice.kind, unit=machine.unit, band=choice.band)
    fillings = plan.bands * (1 if choice.kind in ("taps", "direct") else target.n)
    rows_copied = fillings * source.c * len(plan.copies) * plan.rows
    cycles = rows_copied * (COPY_ROW + COPY_BLOCK * -(-plan.width // machine.unit))
    if choice.kind == "taps" and op.stride in ((1, 1), (2, 2)) and (fillings == 1 or op.stride == (1, 1)):
        cycles = fillings * source.c * len(plan.copies) * plan.vectors * COPY_BLOCK
    rows = len(op.weight)
    if choice.dense:
        return cycles + op.weight.size * plan.vectors * fillings / 1.7
    nonzeros = int(np.count_nonzero(op.weight))
    beyond_l1 = source.c * window(op, source, plan, choice.most, machine.unit) / choice.chunks > machine.l1_bytes
    load = (ALIGNED if plan.aligned else UNALIGNED)[int(beyond_l1)]
    if not plan.aligned and machine.unit < 16:  # every other load of a shorter vector crosses no line
        load = (load + ALIGNED[int(beyond_l1)]) / 2
    sizes = [size for _, size in cuts(plan, plan.vectors, choice.most)]
    for size in set(sizes):
        # A sum waits four cycles for the last one.
        step = max(size * load, 4.0 / sets(max(sizes))) + ENTRY
        per_row = ROW * choice.chunks + size * (STORE + PARTIAL * 2 * (choice.chunks - 1))
        cycles += sizes.count(size) * fillings * (nonzeros * step + rows * per_row)
    return cycles
