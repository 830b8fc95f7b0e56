"""Padding, cropping and subsampling become settings of the convolution or pooling that reads them."""

from __future__ import annotations

from netwright.deploy.graph.ir import Borders, Conv, Graph, Node, Pad, Pool, Shape
from netwright.deploy.graph.passes.cleaning import remove_unused


def fold_padding(graph: Graph) -> None:
    """Lets convolutions and poolings pad, crop and skip pixels themselves."""
    producers = graph.producers()
    for node in graph:
        while node.inputs and (source := producers.get(node.inputs[0])) is not None and _take_in(graph, source, node):
            node.inputs[0] = source.inputs[0]
    remove_unused(graph)


def _take_in(graph: Graph, source: Node, node: Node) -> bool:
    """Lets a node read what the source reads; False where that is not the same."""
    match source.op, node.op:
        case Conv() as first, Conv() as op:
            lengths = graph.shapes[source.inputs[0]][2:], graph.shapes[node.output][2:]
            return _take_stride(first, op, *lengths)
        case Pool(kind="max", kernel=(1, 1), stride=(1, 1)) as around, Pool(kind="max") as op:
            op.padding = _sum(around.padding, op.padding)
        case Pad() as first, Pool(kind="avg") as op if min(first.padding) >= 0:
            # these zeros count like pixels, those of the pooling itself perhaps not
            if any(op.padding) and not op.include_pad:
                return False
            op.include_pad, op.padding = True, _sum(first.padding, op.padding)
        case Pad() as first, (Conv() | Pad()) as op:
            if any(p < 0 < q for p, q in zip(first.padding, op.padding, strict=True)):
                return False
            op.padding = _sum(first.padding, op.padding)
        case _:
            return False
    return True


def _sum(a: Borders, b: Borders) -> Borders:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3])


def _take_stride(first: Conv, op: Conv, before: Shape, after: Shape) -> bool:
    """A depthwise 1x1 convolution of ones only skips pixels; a 1x1 convolution can skip them itself."""
    skips = first.depthwise and first.weight.shape[2:] == (1, 1) and (first.weight == 1).all() and first.bias is None
    if not skips or first.act or first.groups != len(first.weight):
        return False
    if op.weight.shape[2:] != (1, 1) or max(*op.padding, *first.padding) > 0:
        return False
    stride = (first.stride[0] * op.stride[0], first.stride[1] * op.stride[1])
    start = [first.padding[i] + first.stride[i] * op.padding[i] for i in (0, 1)]
    # cropped right behind the last pixel that is read
    end = [(after[i] - 1) * stride[i] + 1 - start[i] - before[i] for i in (0, 1)]
    op.stride, op.padding = stride, (start[0], start[1], end[0], end[1])
    return True
