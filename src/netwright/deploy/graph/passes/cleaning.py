"""Operations that do nothing, that do the same twice, or that nobody reads."""

from __future__ import annotations

import dataclasses

import numpy as np

from netwright.deploy.graph.ir import (
    Activate,
    AdaptivePool,
    Affine,
    Channels,
    Concat,
    Graph,
    Node,
    Op,
    Pad,
    Pool,
    Reshape,
    Shape,
)
from netwright.deploy.graph.passes.rewriting import bypass, drop


def remove_no_ops(graph: Graph) -> None:
    """Takes out what hands its input on, and lets reshapes and selections skip over others of their kind."""
    producers = graph.producers()
    for node in list(graph):
        source = producers.get(node.inputs[0]) if node.inputs else None
        if isinstance(node.op, Reshape) and source and isinstance(source.op, Reshape):
            node.inputs = list(source.inputs)
        if isinstance(node.op, Channels) and source and isinstance(source.op, Channels):
            node.op, node.inputs = Channels(source.op.index[node.op.index]), list(source.inputs)
        if _does_nothing(graph, node):
            bypass(graph, node, node.inputs[0])
    remove_unused(graph)


def _does_nothing(graph: Graph, node: Node) -> bool:  # noqa: PLR0911 - one answer a kind
    match node.op:
        case Channels(index=index):
            return np.array_equal(index, np.arange(graph.shapes[node.inputs[0]][1]))
        case Affine(scale=scale, shift=shift, act=act):
            return not act and bool((scale == 1).all() and (shift == 0).all())
        case Pool(kernel=(1, 1), stride=(1, 1), padding=(0, 0, 0, 0), divisor=None | 1):
            return True
        case Activate(act=act):
            return not act
        case Concat():
            return len(node.inputs) == 1
        case Pad() | Reshape() | AdaptivePool():
            return graph.shapes[node.inputs[0]] == graph.shapes[node.output] and not _moves(node.op)
    return False


def _moves(op: Op) -> bool:
    """Whether pixels are cut on one side and added on the other."""
    return isinstance(op, Pad) and any(op.padding)


def remove_unused(graph: Graph) -> None:
    """Takes out operations whose value nobody reads."""
    read = set(graph.outputs)
    for node in list(reversed(graph.nodes)):
        if node.output in read:
            read.update(node.inputs)
        else:
            drop(graph, node)


def merge_equal(graph: Graph) -> None:
    """Computes once what several nodes compute alike; operations with weights of their own are left alone."""
    seen: dict[object, Node] = {}
    for node in list(graph):
        key = _key(node.op, node.inputs, graph.shapes[node.output])
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            bypass(graph, node, first.output)


def _key(op: Op, inputs: list[int], shape: Shape) -> object:
    if not inputs:
        return None
    settings: list[object] = []
    for part in dataclasses.fields(op):
        value = getattr(op, part.name)
        if isinstance(value, np.ndarray):
            if not isinstance(op, (Channels, Affine)):
                return None
            value = (value.dtype.str, value.tobytes())
        settings.append(value)
    return op.name, tuple(inputs), shape, tuple(settings)
