"""What the passes share: who reads a value, and putting one value in the place of another."""

from __future__ import annotations

from typing import TypeGuard

import numpy as np

from netwright.deploy.graph.ir import Add, Affine, Array, Conv, ConvTranspose, Graph, GroupNorm, Linear, Mul, Node, Op

Weighted = Conv | ConvTranspose | Linear
FUSED = (Conv, ConvTranspose, Linear, Affine, GroupNorm, Add, Mul)
"""Operations that apply an activation to what they compute."""


def is_weighted(op: Op) -> TypeGuard[Weighted]:
    """Whether it is a sum of products with weights, followed by a bias, a residual and an activation."""
    return isinstance(op, (Conv, ConvTranspose, Linear))


def only_reader(graph: Graph, value: int) -> Node | None:
    """The node that alone reads a value, in one place, and the caller does not."""
    readers = graph.consumers()[value]
    return readers[0] if len(readers) == 1 and value not in graph.outputs else None


def bypass(graph: Graph, node: Node, new: int) -> bool:
    """Takes a node out and lets everyone who reads its value read ``new``; False where the caller must see both."""
    old = node.output
    if old in graph.outputs:
        if new in (*graph.inputs, *graph.outputs) and graph.views.get(new) != graph.views.get(old):
            return False
        graph.outputs = [new if value == old else value for value in graph.outputs]
        if old in graph.views:
            graph.views[new] = graph.views.pop(old)
    drop(graph, node)
    for reader in graph:
        reader.inputs = [new if value == old else value for value in reader.inputs]
    return True


def drop(graph: Graph, node: Node) -> None:
    """Takes a node out, and the value that it writes."""
    graph.nodes = [other for other in graph.nodes if other is not node]
    del graph.shapes[node.output]


def bias_of(op: Weighted, channels: int) -> Array:
    """The bias in float64, zeros where there is none."""
    return np.zeros(channels) if op.bias is None else op.bias.astype(np.float64)


def scaled_outputs(op: Weighted, scale: Array) -> Array:
    """The weight in float64 with each output channel multiplied; zeros stay +0."""
    weight = op.weight.astype(np.float64)
    if isinstance(op, ConvTranspose):
        per_group = weight.reshape(op.groups, -1, *weight.shape[1:])
        scaled = per_group * scale.reshape(op.groups, 1, -1, 1, 1)
        return scaled.reshape(weight.shape) + 0.0
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)) + 0.0


def scaled_inputs(op: Weighted, scale: Array) -> Array:
    """The weight in float64 with each input channel multiplied; zeros stay +0."""
    weight = op.weight.astype(np.float64)
    if isinstance(op, ConvTranspose):
        return weight * scale[:, None, None, None] + 0.0
    if isinstance(op, Linear):
        return weight * scale + 0.0
    return weight * columns(op, scale)[:, :, None, None] + 0.0


def columns(op: Conv, numbers: Array) -> Array:
    """(out channels, in channels / groups): the number of the input channel that each column of weights reads."""
    rows = len(op.weight) // op.groups
    return np.repeat(numbers.reshape(op.groups, -1), rows, axis=0)
