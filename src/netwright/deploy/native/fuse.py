"""Which nodes of a graph run as one step: a 1x1 convolution with the depthwise one behind it, or the gate before.

In planes a depthwise convolution reads one channel of the 1x1 convolution before it: what lies between need not be
written to memory. The gate of squeeze-and-excitation multiplies each channel by a number; a 1x1 convolution that alone
reads the product copies its input times these numbers, band by band, and the product is never written as a whole.
Weights stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from netwright.deploy.graph.ir import Conv, Graph, Linear, Mul, Node
from netwright.deploy.native.layout import geometry, is_direct
from netwright.deploy.native.machine import Machine

# What lies between an expansion and its depthwise convolution is worth keeping from memory if it fills a good part of
# the second-level cache.
FUSE_SHARE = 4
FUSE_BELOW = 40  # non-zeros a row of an expansion up to which its rows are computed one by one
Kind = Literal["convolution", "matrix", "depthwise", "vector", "small"]


@dataclass(frozen=True)
class Steps:
    """The steps of a graph in their order.

    Attributes:
        order: The node that writes the output of each step.
        expansions: Of a depthwise convolution's output, the 1x1 convolution that runs with it.
        gates: Of a convolution's output, the multiplication that runs with it.
    """

    order: list[Node]
    expansions: dict[int, Node]
    gates: dict[int, Node]

    def reads(self, node: Node) -> list[int]:
        """The values that a step reads."""
        before = self.expansions.get(node.output) or self.gates.get(node.output)
        return node.inputs if before is None else before.inputs + node.inputs[1:]


def steps(graph: Graph, machine: Machine) -> Steps:
    """The steps of a graph without transposed convolutions."""
    expansions = _expansions(graph, machine)
    gates = _gates(graph, {node.output for node in expansions.values()})
    taken = {node.output for node in (*expansions.values(), *gates.values())}
    return Steps([node for node in graph.nodes if node.output not in taken], expansions, gates)


def kind(node: Node, graph: Graph) -> Kind:
    """Which part of the compiler emits a node."""
    op = node.op
    if isinstance(op, Linear):
        return "vector" if graph.shapes[node.output][0] == 1 else "matrix"
    if not isinstance(op, Conv):
        return "small"
    if geometry(graph.shapes[node.output]).flat:
        return "vector"
    return "depthwise" if op.depthwise and op.groups == graph.shapes[node.inputs[0]][1] else "convolution"


def _expansions(graph: Graph, machine: Machine) -> dict[int, Node]:
    producers, consumers, found = graph.producers(), graph.consumers(), {}
    for node in graph.nodes:
        source = node.inputs[0] if node.inputs else -1
        before = producers.get(source)
        if not (isinstance(node.op, Conv) and node.op.depthwise and before and isinstance(before.op, Conv)):
            continue
        if len(consumers[source]) > 1 or source in graph.outputs or len(before.inputs) > 1:
            continue
        x, y = geometry(graph.shapes[before.inputs[0]]), geometry(graph.shapes[source])
        sparse = np.count_nonzero(before.op.weight) < FUSE_BELOW * len(before.op.weight)
        large = y.size * 4 > machine.l2_bytes / FUSE_SHARE
        if sparse and large and not y.flat and is_direct(before.op, x, y) and not before.op.depthwise:
            found[node.output] = before
    return found


def _gates(graph: Graph, expanded: set[int]) -> dict[int, Node]:
    """The gates of convolutions that are no part of ``expanded``, the 1x1 before a depthwise convolution."""
    producers, consumers, found = graph.producers(), graph.consumers(), {}
    for node in graph.nodes:
        source = node.inputs[0] if node.inputs else -1
        before = producers.get(source)
        if before is None or not isinstance(before.op, Mul) or before.op.act or kind(node, graph) != "convolution":
            continue
        if len(consumers[source]) > 1 or source in graph.outputs or node.output in expanded:
            continue
        x, gate, y = (geometry(graph.shapes[value]) for value in (*before.inputs, node.output))
        assert isinstance(node.op, Conv)
        if (gate.h, gate.w) == (1, 1) and not x.flat and (x.h, x.w) != (1, 1) and is_direct(node.op, x, y):
            found[node.output] = before
    return found
