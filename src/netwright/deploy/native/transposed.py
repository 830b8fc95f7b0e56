"""Transposed convolutions as ordinary ones: a phase of the output is a stride-1 convolution with a part of the taps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from netwright.deploy.graph.ir import IDENTITY, Add, Conv, ConvTranspose, Graph, Node, Op


@dataclass
class Interleave(Op):
    """Output pixel (s_y q + p_y, s_x r + p_x) is pixel (q, r) of the input for phase (p_y, p_x).

    Attributes:
        stride: Vertical, horizontal.
        phases: The phase of each input.
    """

    name: ClassVar[str] = "interleave"
    stride: tuple[int, int]
    phases: tuple[tuple[int, int], ...]


def without_transposed(graph: Graph) -> Graph:
    """The graph with every transposed convolution taken apart; the graph itself when there is none."""
    if not any(isinstance(node.op, ConvTranspose) for node in graph.nodes):
        return graph
    new = Graph(dict(graph.shapes), [], list(graph.inputs), list(graph.outputs))
    for node in graph.nodes:
        if isinstance(node.op, ConvTranspose):
            _take_apart(node, node.op, new)
        else:
            new.nodes.append(node)
    return new


def _take_apart(node: Node, op: ConvTranspose, graph: Graph) -> None:
    n, channels, height, width = graph.shapes[node.output]
    residual = node.inputs[1:]
    (sy, sx), (dy, dx) = op.stride, op.dilation
    parts = []
    for py in range(sy):
        for px in range(sx):
            rows, step_y, top = _phase(op.weight.shape[2], py, sy, dy, op.padding[0])
            columns, step_x, left = _phase(op.weight.shape[3], px, sx, dx, op.padding[1])
            shape = (n, channels, max(0, math.ceil((height - py) / sy)), max(0, math.ceil((width - px) / sx)))
            if 0 in shape:  # an output narrower than the stride has no such pixels
                continue
            act = IDENTITY if residual else op.act
            conv = Conv(
                _weight(op, rows, columns), op.bias, (1, 1), (top, left, 0, 0), (step_y, step_x), op.groups, act
            )
            part = graph.new_value(shape)
            graph.nodes.append(Node(conv, node.inputs[:1], part, node.path))
            parts.append((py, px, part))
    phases = tuple((py, px) for py, px, _ in parts)
    joined = graph.new_value(graph.shapes[node.output]) if residual else node.output
    graph.nodes.append(Node(Interleave(op.stride, phases), [part for _, _, part in parts], joined, node.path))
    if residual:
        graph.nodes.append(Node(Add(op.act), [joined, *residual], node.output, node.path))


def _phase(kernel: int, phase: int, stride: int, dilation: int, padding: int) -> tuple[list[int], int, int]:
    """Taps of a phase by ascending place of what they read, the distance of those places, and the padding before."""
    taps = [k for k in reversed(range(kernel)) if (phase + padding - k * dilation) % stride == 0]
    if not taps:
        return [], 1, 0
    first = (phase + padding - taps[0] * dilation) // stride
    return taps, max(1, dilation // math.gcd(dilation, stride)), -first


def _weight(op: ConvTranspose, rows: list[int], columns: list[int]) -> np.ndarray:
    """(out channels, in channels / groups, rows, columns); zeros where a phase has no tap."""
    inputs, outputs = op.weight.shape[:2]
    if not rows or not columns:
        return np.zeros((outputs * op.groups, inputs // op.groups, 1, 1), np.float32)
    part = op.weight[:, :, rows][:, :, :, columns]
    grouped = part.reshape(op.groups, inputs // op.groups, outputs, len(rows), len(columns))
    return np.ascontiguousarray(grouped.swapaxes(1, 2).reshape(-1, inputs // op.groups, len(rows), len(columns)))
