"""Activations join the operation that computes their argument."""

from __future__ import annotations

import numpy as np

from netwright.deploy.graph.ir import (
    Activate,
    Activation,
    Affine,
    Graph,
    Mul,
    Node,
)
from netwright.deploy.graph.passes.cleaning import remove_unused
from netwright.deploy.graph.passes.rewriting import FUSED, bypass, only_reader

PRODUCTS = {"sigmoid": "silu", "hardsigmoid": "hardswish"}


def fuse_activations(graph: Graph) -> None:
    """Lets the operation before an activation apply it, if nobody else reads its result."""
    producers = graph.producers()
    for node in list(graph):
        source = producers.get(node.inputs[0]) if isinstance(node.op, Activate) else None
        if source is None or not isinstance(source.op, FUSED) or source.op.act:
            continue
        if only_reader(graph, source.output) is node:
            assert isinstance(node.op, Activate)
            source.op.act = node.op.act
            bypass(graph, node, source.output)


def name_products(graph: Graph) -> None:
    """Calls x sigmoid(x) silu, clamp(x + 3, 0, 6) / 6 hardsigmoid, and x hardsigmoid(x) hardswish."""
    producers = graph.producers()
    for node in graph.nodes:
        if isinstance(node.op, Affine):
            _name_hardsigmoid(graph, producers, node)
        if not isinstance(node.op, Mul) or node.op.act or len(set(node.inputs)) != 2:
            continue
        for gate, x in (node.inputs, node.inputs[::-1]):
            source = producers.get(gate)
            if source and isinstance(source.op, Activate) and source.inputs == [x] and source.op.act.kind in PRODUCTS:
                node.op, node.inputs = Activate(Activation(PRODUCTS[source.op.act.kind])), [x]
                break
    remove_unused(graph)


def _name_hardsigmoid(graph: Graph, producers: dict[int, Node], node: Node) -> None:
    """x -> x + 3 -> clamp(0, 6) -> / 6"""
    chain = [node]
    while len(chain) < 3:
        source = producers.get(chain[-1].inputs[0])
        if source is None:
            return
        chain.append(source)
    last, middle, first = (part.op for part in chain)
    assert isinstance(last, Affine)
    if isinstance(middle, Activate) and isinstance(first, Affine) and not first.act and not last.act:
        shifts = np.all(first.scale == 1) and np.all(first.shift == 3)
        sixth = np.allclose(last.scale, 1 / 6, rtol=1e-7) and not last.shift.any()
        if shifts and sixth and middle.act == Activation("clamp", 0.0, 6.0):
            node.op, node.inputs = Activate(Activation("hardsigmoid")), list(chain[2].inputs)
