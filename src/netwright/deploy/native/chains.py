"""Which layers run in strips: the cheapest way to cut the steps of a network into chains, by a cost model in cycles.

A step whose values go beyond half of the second-level cache reads and writes memory that is further away. A chain saves
that for all values between its layers. Instead it moves rows that later bands read again, makes more and smaller calls,
and computes rows of expansions, and those at the seams of threads, twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from netwright.deploy.graph.ir import Activate, Add, Affine, Conv, Graph, Mul, Node, Pool
from netwright.deploy.native.choose import DEPTHWISE_RATE, Choice, cost
from netwright.deploy.native.fuse import Steps, kind
from netwright.deploy.native.layout import LINE, Geometry, geometry, lower
from netwright.deploy.native.machine import Machine
from netwright.deploy.native.strips import Layer, Reach, Strips, together

SHARE = 0.5  # of the second-level cache that the values of a step, or the rows of a chain, may fill
LONGEST = 16  # layers of a chain
BEYOND = 3.0  # cycles of a cache line that is read or written beyond the second-level cache, more than within
CALL = 150.0  # cycles of each part of a layer, beside its work
MOVED = 2.5  # cycles of a cache line that is moved within the cache


@dataclass
class Chains:
    """The steps of a network as strips see them.

    Attributes:
        graph: The network.
        steps: Its steps.
        machine: The processor.
        threads: Threads that run it.
        choices: How its convolutions are run, by output.
        whole: Values that are kept as a whole whoever reads them.
    """

    graph: Graph
    steps: Steps
    machine: Machine
    threads: int
    choices: Mapping[int, Choice]
    whole: set[int]

    def find(self) -> Iterator[tuple[list[Node], Strips | None]]:
        """The steps in their order, those together that run in strips."""
        order = self.steps.order
        best, before = [0.0], [0]  # cycles saved in the first steps, and where their last chain begins
        for end in range(1, len(order) + 1):
            found = {end - 1: best[end - 1]}
            for begin in range(end - 2, max(-1, end - 1 - LONGEST), -1):
                if self.layers[begin] is None or self.layers[end - 1] is None:
                    break
                if self._closed(begin, end):
                    strips = self._cut(begin, end)
                    found[begin] = best[begin] + (self._saved(begin, end, strips) if strips else 0.0)
            begin = max(found, key=lambda place: (found[place], place))
            best.append(found[begin])
            before.append(begin)
        cuts, end = [], len(order)
        while end:
            cuts.append((before[end], end))
            end = before[end]
        for begin, end in reversed(cuts):
            yield order[begin:end], self._cut(begin, end) if end - begin > 1 else None

    @cached_property
    def shapes(self) -> dict[int, Geometry]:
        """Of all values."""
        return {value: geometry(shape) for value, shape in self.graph.shapes.items()}

    @cached_property
    def layers(self) -> list[Layer | None]:
        """The steps; None for those that cannot compute some rows of their output."""
        return [self._layer(node) for node in self.steps.order]

    def _layer(self, node: Node) -> Layer | None:
        op, y = node.op, self.shapes[node.output]
        read = self.steps.reads(node)
        flat = any(self.shapes[value].flat for value in (read[0], node.output)) if read else True
        # A row is written in whole vectors: of shorter rows two would reach into what another thread computes.
        if flat or 2 * y.w < self.machine.unit:
            return None
        if isinstance(op, Conv) and kind(node, self.graph) in ("convolution", "depthwise"):
            gated = node.output in self.steps.gates
            window = Reach(read[0], op.stride[0], op.padding[0], (op.weight.shape[2] - 1) * op.dilation[0] + 1)
            return Layer(node.output, (window, *(Reach(value) for value in read[2 if gated else 1 :])))
        if isinstance(op, Pool):
            window = Reach(read[0], op.stride[0], op.padding[0], (op.kernel[0] - 1) * op.dilation[0] + 1)
            return Layer(node.output, (window,))
        if isinstance(op, (Activate, Add, Mul, Affine)):
            rows = [value for value in read if self.shapes[value].h == y.h and self.shapes[value].w == y.w]
            return Layer(node.output, tuple(Reach(value) for value in rows))
        return None

    @cached_property
    def last_reader(self) -> dict[int, int]:
        """Of each value the last step that reads it."""
        return {value: place for place, node in enumerate(self.steps.order) for value in self.steps.reads(node)}

    def _closed(self, begin: int, end: int) -> bool:
        """Whether what lies between the steps is read there and nowhere else, and the last one can end a chain."""
        if self.threads > 1 and isinstance(self.steps.order[end - 1].op, (Activate, Add, Mul, Affine)):
            return False  # it writes whole vectors over the end of its last row, into what another thread computes
        for node in self.steps.order[begin : end - 1]:
            value = node.output
            if value in self.whole or value in self.graph.outputs or self.last_reader.get(value, end) >= end:
                return False
        return True

    def _cut(self, begin: int, end: int) -> Strips | None:
        """The largest bands whose rows stay in the second-level cache; None if there are none, or only one."""
        chain = tuple(layer for layer in self.layers[begin:end] if layer is not None)
        y = self.shapes[chain[-1].output]
        step = together(y.w)
        rows = step * 2 ** int(np.log2(max(1, y.h // step)))
        while rows >= step:
            strips = Strips(chain, self.shapes, rows, self.threads)
            if self._floats(begin, end, strips) <= SHARE * self.machine.l2_bytes / 4:
                return strips if rows < y.n * y.h else None
            rows //= 2
        return None

    def _floats(self, begin: int, end: int, strips: Strips) -> int:
        """Floats that a band works on: the rows in between, those of the first and the last value, and copies."""
        most, copies, ends = strips.most(), 0, 0
        inside = set(strips.between)
        for node, layer, rows in zip(self.steps.order[begin:end], strips.chain, most, strict=True):
            ends += sum(
                self.shapes[reach.value].c * self.shapes[reach.value].w * (rows * reach.stride + reach.span)
                for reach in layer.reads
                if reach.value not in inside
            )
            if node.output in self.choices:
                copies = max(copies, self._copies(node, rows))
        y = self.shapes[strips.output]
        return sum(strips.floats().values()) + copies + ends + y.c * y.w * strips.rows

    def _copies(self, node: Node, rows: int) -> int:
        op, choice, gated = node.op, self.choices[node.output], node.output in self.steps.gates
        x, y = self.shapes[self.steps.reads(node)[0]], self.shapes[node.output]
        if choice.kind == "direct" and not gated:
            return 0
        assert isinstance(op, Conv)
        target = replace(y, n=1, h=rows)
        plan = lower(op, x, target, kind="taps" if gated else choice.kind, unit=self.machine.unit, band=choice.band)
        return plan.scratch(x.c)

    def _saved(self, begin: int, end: int, strips: Strips) -> float:
        """Cycles that a chain takes less than its steps one by one."""
        order, inside = self.steps.order[begin:end], set(strips.between)
        room, lines = SHARE * self.machine.l2_bytes / 4, 0.0
        for node, layer in zip(order, strips.chain, strict=True):
            touched = {node.output, *(reach.value for reach in layer.reads)}
            floats = {value: self.shapes[value].c * self.shapes[value].pixels for value in touched}
            if sum(floats.values()) > room:
                lines += sum(floats[value] for value in touched & inside) / LINE
        share = max(strips.shares(), key=lambda pieces: sum(last - first for _, first, last in pieces))
        _, first, last = max(share, key=lambda piece: piece[2] - piece[1])
        rows, moved, parts = [0] * len(order), 0, strips.parts(first, last)
        for part in parts:
            rows[part.layer] += part.last - part.first
            for slide in part.slides:
                geo = self.shapes[slide.value]
                moved += geo.c * (1 + slide.rows * geo.w // LINE)
        more = MOVED * moved + CALL * len(parts)
        output = self.shapes[strips.output]
        for node, count, most in zip(order, rows, strips.most(), strict=True):
            y = self.shapes[node.output]
            alone = self._cycles(node, None) / y.n * (last - first) / output.h
            more += max(0.0, self._cycles(node, most) * count / y.h - alone)
        return BEYOND * lines / self.threads - more * sum(b - a for _, a, b in share) / (last - first)

    def _cycles(self, node: Node, rows: int | None) -> float:
        """Of a step that stays in the second-level cache; with ``rows``, of one image by so many rows at a time."""
        op, read, y = node.op, self.steps.reads(node), self.shapes[node.output]
        x = self.shapes[read[0]]
        if rows is not None:
            x, y = replace(x, n=1), replace(y, n=1)
        if node.output in self.choices:
            choice, times = self.choices[node.output], 1.0
            assert isinstance(op, Conv)
            if rows is not None:
                times, y = y.h / rows, replace(y, h=rows)
                x = y if choice.kind == "direct" else x
                x = replace(x, c=self.shapes[read[0]].c)
            return times * cost(op, x, y, self.machine, choice)
        if isinstance(op, Conv):
            kept = float(np.count_nonzero(op.weight) * y.pixels)
            before = self.steps.expansions.get(node.output)
            if before is not None:
                assert isinstance(before.op, Conv)
                reach = 1.0
                if rows is not None:
                    reach = ((rows - 1) * op.stride[0] + op.weight.shape[2]) / (rows * op.stride[0])
                kept += reach * np.count_nonzero(before.op.weight) * x.pixels
            return kept / DEPTHWISE_RATE
        window = op.kernel[0] * op.kernel[1] if isinstance(op, Pool) else 2
        return window * y.c * y.pixels / self.machine.unit
