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
L1_SHARE, L2_SHARE = 0.6, 0.7  # of a cache that operands may fill
MIN_ROW = 6  # non-zeros that a row keeps in every chunk


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


def sets(count: int) -> int:
    """Accumulator sets of a kernel with ``count`` blocks, so that at least eight sums are on their way."""
    return 4 if count <= 2 else 2 if count <= 6 else 1


def largest(machine: Machine) -> int:
    """Most blocks that the registers hold beside operands."""
    return 16 if machine.unit == 16 else 9


def choose(op: Conv, source: Geometry, target: Geometry, machine: Machine) -> Choice:
    """The cheapest choice by the cost model."""
    dense = op.groups == 1 and np.count_nonzero(op.weight) > DENSE_FROM * op.weight.size
    found = candidates(op, source, target, machine, dense=dense)
    return min(found, key=lambda choice: cost(op, source, target, machine, choice))


def candidates(op: Conv, source: Geometry, target: Geometry, machine: Machine, *, dense: bool) -> Iterator[Choice]:
    """Everything that is worth trying."""
    direct = is_direct(op, source, target)
    kinds: tuple[Kind, ...] = ("direct",) if direct else ("taps", "shifted") if dense else ("taps", "shifted", "phased")
    for kind in kinds:
        band = _band(op, source, target, machine, kind)
        if dense:
            yield Choice(True, kind, 3, 1, band)
            continue
        plan = lower(op, source, target, kind=kind, unit=machine.unit, band=band)
        for most in sorted({min(most, plan.vectors) for most in (4, 6, 8, largest(machine))}):
            for chunks in _chunks(op, source, plan, most, machine):
                yield Choice(False, kind, most, chunks, band)


def _band(op: Conv, source: Geometry, target: Geometry, machine: Machine, kind: Kind) -> int | None:
    """Rows of a band whose copies fill at most half of the second-level cache."""
    if kind == "direct":
        return None
    room = L2_SHARE * machine.l2_bytes / 4
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
    nonzeros = np.count_nonzero(op.weight)
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
    copied = fillings * source.c * len(plan.copies) * plan.rows
    cycles = copied * (4 + 2.0 * -(-plan.width // machine.unit))
    rows = len(op.weight)
    if choice.dense:
        return cycles + op.weight.size * plan.vectors * fillings / 1.7
    nonzeros = int(np.count_nonzero(op.weight))
    in_l1 = source.c * window(op, source, plan, choice.most, machine.unit) / choice.chunks <= machine.l1_bytes
    # A load that crosses a cache line takes two; with short vectors every other one does.
    load = (0.5 if plan.aligned else 0.5 + 0.5 * machine.unit / 16) * (1.0 if in_l1 else 1.5 if plan.aligned else 2.0)
    sizes = [size for _, size in cuts(plan, plan.vectors, choice.most)]
    for size in set(sizes):
        # A sum waits four cycles for the last one; two are started in each.
        step = max(size * load, 4.0 / sets(size)) + 0.65
        per_row = 6 + size * (1.5 if choice.chunks > 1 else 1.0)
        cycles += sizes.count(size) * fillings * (nonzeros * step + rows * choice.chunks * per_row)
    return cycles
