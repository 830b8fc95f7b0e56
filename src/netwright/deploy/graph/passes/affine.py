"""One scale and shift a channel (a batch norm, a layer scale) becomes part of the operation before or after it.

    s (W x + b) + t = (s W) x + (s b + t)         W (s x + t) + b = (W s) x + (W t + b)

The second only holds with a shift if no output reads padding.
"""

from __future__ import annotations

import numpy as np

from netwright.deploy.graph.ir import (
    AdaptivePool,
    Affine,
    Concat,
    Conv,
    ConvTranspose,
    Graph,
    GroupNorm,
    LayerNorm,
    Linear,
    Node,
    Op,
    Reshape,
)
from netwright.deploy.graph.passes.rewriting import (
    FUSED,
    bias_of,
    bypass,
    columns,
    is_weighted,
    only_reader,
    scaled_inputs,
    scaled_outputs,
)


def fold_affine(graph: Graph) -> None:
    """Scales and shifts what convolutions, linear layers, norms and other affine operations write, joined or not."""
    producers = graph.producers()
    for node in list(graph):
        source = producers.get(node.inputs[0]) if isinstance(node.op, Affine) else None
        if source is None or only_reader(graph, source.output) is not node:
            continue
        assert isinstance(node.op, Affine)
        parts = [(source, node.op)]
        if isinstance(source.op, Concat):
            parts = _parts(graph, producers, source, node.op)
        if parts and all(_takes_in(part, affine) for part, affine in parts):
            for part, affine in parts:
                _take_in(part.op, affine)
            bypass(graph, node, source.output)


def _parts(graph: Graph, producers: dict[int, Node], concat: Node, affine: Affine) -> list[tuple[Node, Affine]]:
    """What writes each part of a concatenation, with its share of the map; nothing where somebody else reads a part."""
    if not all(value in producers and only_reader(graph, value) is concat for value in concat.inputs):
        return []
    ends = np.cumsum([graph.shapes[value][1] for value in concat.inputs])[:-1]
    shares = zip(np.split(affine.scale, ends), np.split(affine.shift, ends), strict=True)
    maps = [Affine(scale, shift, affine.act) for scale, shift in shares]
    return [(producers[value], share) for value, share in zip(concat.inputs, maps, strict=True)]


def _takes_in(source: Node, affine: Affine) -> bool:
    """Whether a node can apply an affine map to what it writes."""
    op = source.op
    if isinstance(op, LayerNorm):
        return not affine.act
    return isinstance(op, (Conv, ConvTranspose, Linear, Affine, GroupNorm)) and not op.act and len(source.inputs) == 1


def _take_in(op: Op, affine: Affine) -> None:
    scale, shift = affine.scale.astype(np.float64), affine.shift.astype(np.float64)
    if is_weighted(op):
        op.weight, op.bias = scaled_outputs(op, scale), scale * bias_of(op, len(scale)) + shift
    elif isinstance(op, Affine):
        op.scale, op.shift = op.scale * scale, scale * op.shift + shift
    elif isinstance(op, (LayerNorm, GroupNorm)):
        op.weight = scale if op.weight is None else op.weight * scale
        op.bias = shift if op.bias is None else op.bias * scale + shift
    if isinstance(op, FUSED):
        op.act = affine.act


def fold_affine_forward(graph: Graph) -> None:
    """Scales the columns of the convolutions and linear layers that read an affine map, all of them or none.

    Before that, maps sink below average poolings and flattenings, which commute with them.
    """
    _sink(graph)
    for node in list(graph):
        if not isinstance(node.op, Affine) or node.op.act or node.output in graph.outputs:
            continue
        affine, readers = node.op, graph.consumers()[node.output]
        if not readers or not all(_foldable(reader, node.output, affine) for reader in readers):
            continue
        for reader in readers:
            op = reader.op
            assert is_weighted(op)
            if affine.shift.any():
                shifts = columns(op, affine.shift) if isinstance(op, Conv) else affine.shift
                total = op.weight.astype(np.float64)
                total = total.sum((2, 3)) if total.ndim == 4 else total
                op.bias = bias_of(op, len(total)) + (total * shifts).sum(1)
            op.weight = scaled_inputs(op, affine.scale.astype(np.float64))
        bypass(graph, node, node.inputs[0])


def _foldable(reader: Node, value: int, affine: Affine) -> bool:
    op = reader.op
    if not is_weighted(op) or reader.inputs[0] != value or value in reader.inputs[1:]:
        return False
    if not affine.shift.any():
        return True
    return not isinstance(op, ConvTranspose) and not (isinstance(op, Conv) and max(op.padding) > 0)


def _sink(graph: Graph) -> None:
    for place, node in enumerate(graph.nodes):
        affine, reader = node.op, only_reader(graph, node.output)
        if not isinstance(affine, Affine) or affine.act or reader is None:
            continue
        before, after = graph.shapes[node.output], graph.shapes[reader.output]
        flattens = isinstance(reader.op, Reshape) and len(before) == 4 and len(after) == 2
        if not flattens and not (isinstance(reader.op, AdaptivePool) and reader.op.kind == "avg"):
            continue
        if flattens:
            pixels = before[2] * before[3]
            affine = Affine(np.repeat(affine.scale, pixels), np.repeat(affine.shift, pixels))
        # the two nodes exchange their operations; the value between them takes the other's shape
        later = next(i for i in range(place + 1, len(graph.nodes)) if graph.nodes[i] is reader)
        graph.nodes[place] = Node(reader.op, node.inputs, node.output, reader.path)
        graph.nodes[later] = Node(affine, [node.output], reader.output, node.path)
        graph.shapes[node.output] = after
