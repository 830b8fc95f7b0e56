"""The convolution or linear layer that feeds a sum adds the other addend itself, before its activation."""

from __future__ import annotations

from netwright.deploy.graph.ir import Add, Graph, Node
from netwright.deploy.graph.passes.rewriting import drop, is_weighted, only_reader


def fuse_residuals(graph: Graph) -> None:
    """Takes sums of two values of one shape into the later of their producers, or into the earlier, moved down.

    A producer must have no other reader and no activation.
    """
    place = 0
    while place < len(graph.nodes):
        node = graph.nodes[place]
        source = _producer(graph, node) if isinstance(node.op, Add) else None
        if source is None:
            place += 1
            continue
        assert isinstance(node.op, Add)
        other = next(value for value in node.inputs if value != source.output)
        assert is_weighted(source.op)
        source.op.act = node.op.act
        graph.nodes[place] = Node(source.op, [*source.inputs, other], node.output, source.path)
        drop(graph, source)


def _producer(graph: Graph, node: Node) -> Node | None:
    """The last node that computes one of the addends and can take in the other."""
    a, b = node.inputs
    if a == b or graph.shapes[a] != graph.shapes[b]:
        return None
    for source in reversed(graph.nodes):
        op = source.op
        free = source.output in {a, b} and is_weighted(op) and not op.act and len(source.inputs) == 1
        if free and only_reader(graph, source.output) is node:
            return source
    return None
