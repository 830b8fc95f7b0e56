"""Padding, cropping and subsampling become settings of the convolution or pooling that reads them."""

from __future__ import annotations

from netwright.deploy.graph.ir import Borders, Conv, Graph, Node, Pad, Pool
from netwright.deploy.graph.passes.cleaning import remove_unused


def fold_padding(graph: Graph) -> None:
    """Lets convolutions and poolings pad, crop and skip pixels themselves."""
    producers = graph.producers()
    for node in graph:
        while node.inputs and (source := producers.get(node.inputs[0])) is not None and _take_in(source, node):
            node.inputs[0] = source.inputs[0]
    remove_unused(graph)


def _take_in(source: Node, node: Node) -> bool:
    """Lets a node read what the source reads; False where that is not the same."""
    match source.op, node.op:
        case Conv() as first, Conv() as op:
            return _take_stride(first, op)
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


def _take_stride(first: Conv, op: Conv) -> bool:
    """A depthwise 1x1 convolution of ones only skips pixels; a 1x1 convolution can skip them itself."""
    skips = first.depthwise and first.weight.shape[2:] == (1, 1) and (first.weight == 1).all() and first.bias is None
    if not skips or first.act or first.groups != len(first.weight) or any(op.padding) or op.weight.shape[2:] != (1, 1):
        return False
    op.stride = (first.stride[0] * op.stride[0], first.stride[1] * op.stride[1])
    op.padding = first.padding
    return True
