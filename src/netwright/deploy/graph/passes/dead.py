"""Channels that hold one number everywhere become part of biases; channels that nobody reads are not computed.

Pruning leaves convolutions whose weights to an output are all zero: the output is act(bias) at every pixel. What reads
it only adds a constant, unless it also reads zero padding beside it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from netwright.deploy.graph.ir import (
    Activate,
    Activation,
    AdaptivePool,
    Add,
    Affine,
    Array,
    Channels,
    Concat,
    Constant,
    Conv,
    ConvTranspose,
    Graph,
    Linear,
    Mul,
    Node,
    Op,
    Pad,
    Pool,
    Reshape,
)
from netwright.deploy.graph.passes.rewriting import Weighted, bias_of, columns, is_weighted
from netwright.deploy.graph.reference import activation


def fold_constant_channels(graph: Graph) -> None:
    """Moves what constant channels contribute into the biases of their readers and sets those weights to zero."""
    known = {value: np.full(shape[1], np.nan) for value, shape in graph.shapes.items()}
    for node in graph.nodes:
        if is_weighted(node.op):
            _absorb(node.op, known[node.inputs[0]])
        found = _constants(graph, node, [known[value] for value in node.inputs])
        if found is not None:
            known[node.output] = np.where(np.isfinite(found), found, np.nan)


def _absorb(op: Weighted, known: Array) -> None:
    """``known`` holds the number of each constant input channel, and NaN for the others."""
    padded = isinstance(op, ConvTranspose) or (isinstance(op, Conv) and max(op.padding) > 0)
    usable = known == 0 if padded else np.isfinite(known)
    if not usable.any():
        return
    numbers = np.where(usable, known, 0.0)
    weight = op.weight.astype(np.float64)
    if isinstance(op, ConvTranspose):
        weight[usable] = 0
    else:
        where, values = (columns(op, a) if isinstance(op, Conv) else a[None] for a in (usable, numbers))
        if numbers.any():
            total = weight.sum((2, 3)) if weight.ndim == 4 else weight
            op.bias = bias_of(op, len(weight)) + (total * values).sum(1)
        weight[np.broadcast_to(where, weight.shape[:2])] = 0
    op.weight = weight


def _constants(graph: Graph, node: Node, known: list[Array]) -> Array | None:
    """The number of each constant channel of what a node writes, NaN for the others; None if there is none."""
    op = node.op
    found = None
    if is_weighted(op) and len(node.inputs) == 1:
        rows = _rows(op)
        found = np.where(rows.any(1), np.nan, bias_of(op, len(rows)))
    match op:
        case Affine():
            found = op.scale * known[0] + op.shift
        case Add():
            found = known[0] + known[1]
        case Mul():
            found = known[0] * known[1]
        case Activate() | AdaptivePool():
            found = known[0]
        case Pool() | Pad() if not (isinstance(op, Pool) and _misses(op)):
            found = np.where(known[0] == 0, 0.0, np.nan) if _changes(op) else known[0]
        case Concat():
            found = np.concatenate(known)
        case Channels():
            found = known[0][op.index]
        case Reshape():
            found = _flattened(graph, node, known[0])
    act = getattr(op, "act", None)
    return found if found is None or act is None else _apply(act, found)


def _changes(op: Pool | Pad) -> bool:
    """Whether the operation makes something else of an image that is one number everywhere, unless it is zero."""
    if isinstance(op, Pad):
        return max(op.padding) > 0
    return op.kind == "avg" and (op.divisor is not None or (op.include_pad and any(op.padding)))


def _misses(op: Pool) -> bool:
    """Whether a window may lie in the padding altogether."""
    return any(op.padding) and (
        op.dilation != (1, 1) or any(p >= k for p, k in zip(op.padding, op.kernel * 2, strict=True))
    )


def _flattened(graph: Graph, node: Node, channels: Array) -> Array | None:
    before, after = graph.shapes[node.inputs[0]], graph.shapes[node.output]
    return np.repeat(channels, before[2] * before[3]) if len(before) == 4 and len(after) == 2 else None


def _rows(op: Weighted) -> Array:
    """(out channels, weights): whether each weight of an output is there."""
    kept = op.weight != 0
    if isinstance(op, ConvTranspose):
        groups = kept.reshape(op.groups, -1, *kept.shape[1:])
        kept = groups.swapaxes(1, 2).reshape(-1, groups.shape[1], *kept.shape[2:])
    return kept.reshape(len(kept), -1)


def _apply(act: Activation, numbers: Array) -> Array:
    """The activation, which for some functions makes a number of NaN, where there is one."""
    tensor = torch.from_numpy(np.asarray(numbers, np.float64))
    return torch.where(tensor.isnan(), tensor, activation(act)(tensor)).numpy()


def remove_dead_channels(graph: Graph) -> None:
    """Takes channels out of every value where nothing that is read depends on them; at least one is left."""
    read = {value: np.zeros(shape[1], bool) for value, shape in graph.shapes.items()}
    for value in (*graph.outputs, *graph.inputs):
        read[value][:] = True
    links = {id(node): _links(node.op) for node in graph}
    _spread(graph, read, links)
    for live in read.values():
        live[0] |= not live.any()
    _spread(graph, read, links)
    for node in graph:
        node.op = _without(node, read)
    for value, live in read.items():
        shape = graph.shapes[value]
        graph.shapes[value] = (shape[0], int(live.sum()), *shape[2:])


def _links(op: Op) -> Array | None:
    """(out channels, in channels): which of all inputs each output reads, of an operation that may read any."""
    if isinstance(op, Conv) and op.groups == 1:
        return (op.weight != 0).any((2, 3))
    return op.weight != 0 if isinstance(op, Linear) else None


def _spread(graph: Graph, read: dict[int, Array], links: dict[int, Array | None]) -> None:
    """Grows the sets of channels until every operation finds on each side those that it needs."""
    before = -1
    while before != (before := sum(int(live.sum()) for live in read.values())):
        for node in reversed(graph.nodes):
            _spread_over(graph, node, read, links[id(node)])


def _spread_over(graph: Graph, node: Node, read: dict[int, Array], links: Array | None) -> None:
    op, live, inputs = node.op, read[node.output], [read[value] for value in node.inputs]
    tied: list[tuple[Array, Array]] = []
    if links is not None:
        inputs[0] |= (links if live.all() else links[live]).any(0)
        tied = [(live, other) for other in inputs[1:]]
    elif isinstance(op, (Affine, Activate, Pool, AdaptivePool, Pad, Add, Mul)) or _is_depthwise(op):
        tied = [(live, other) for other in inputs]
    elif isinstance(op, Concat):
        tied = list(zip(np.split(live, np.cumsum([len(part) for part in inputs])[:-1]), inputs, strict=True))
    elif isinstance(op, Channels):
        inputs[0][op.index[live]] = True
    elif isinstance(op, Reshape) and _flattened(graph, node, inputs[0]) is not None:
        channels = live.reshape(len(inputs[0]), -1)
        inputs[0] |= channels.any(1)
        channels[:] = inputs[0][:, None]
    elif not isinstance(op, Constant):
        for whole in (live, *inputs):
            whole[:] = True
    for one, other in tied:
        np.logical_or(one, other, out=one)
        other[:] = one


def _is_depthwise(op: Op) -> bool:
    return isinstance(op, Conv) and op.depthwise and op.groups == len(op.weight)


def _without(node: Node, read: dict[int, Array]) -> Op:
    """The operation on the channels that are read."""
    op, live = node.op, read[node.output]
    if isinstance(op, Affine):
        return dataclasses.replace(op, scale=op.scale[live], shift=op.shift[live])
    if isinstance(op, Channels):
        place = np.cumsum(read[node.inputs[0]]) - 1
        return Channels(place[op.index[live]])
    if isinstance(op, Constant):
        return Constant(op.value[:, live])
    if not isinstance(op, (Conv, Linear)) or (live.all() and read[node.inputs[0]].all()):
        return op
    bias = None if op.bias is None else op.bias[live]
    if isinstance(op, Conv) and _is_depthwise(op):
        return dataclasses.replace(op, weight=op.weight[live], bias=bias, groups=int(live.sum()))
    return dataclasses.replace(op, weight=op.weight[live][:, read[node.inputs[0]]], bias=bias)
