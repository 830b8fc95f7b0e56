"""What a graph asks for: multiply-adds, with and without those of zeros, and its weights."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from netwright.deploy.graph.ir import Conv, ConvTranspose, Graph, Linear, Node


class Macs(NamedTuple):
    """Multiply-adds of convolutions and linear layers.

    Attributes:
        dense: If zeros were multiplied.
        kept: Of the weights that are not zero.
    """

    dense: int
    kept: int


class Weights(NamedTuple):
    """Weights of convolutions and linear layers, biases apart.

    Attributes:
        all: How many.
        zeros: Of these, how many are zero.
    """

    all: int
    zeros: int


def layer_macs(node: Node, graph: Graph) -> Macs:
    """Those of one operation; none but for convolutions and linear layers.

    Example:
        >>> layer = Linear(np.array([[0, 1, 2]], np.float32))
        >>> graph = Graph({0: (2, 3), 1: (2, 1)}, [Node(layer, [0], 1)], [0], [1])
        >>> layer_macs(graph.nodes[0], graph)
        Macs(dense=6, kept=4)
    """
    op = node.op
    if not isinstance(op, (Conv, ConvTranspose, Linear)):
        return Macs(0, 0)
    # each weight meets each pixel of the output once, or of the input if that is transposed
    n, _, *size = graph.shapes[node.inputs[0] if isinstance(op, ConvTranspose) else node.output]
    pixels = n * int(np.prod(size))
    return Macs(op.weight.size * pixels, int(np.count_nonzero(op.weight)) * pixels)


def macs(*graphs: Graph) -> Macs:
    """Those of all operations of all graphs."""
    found = [layer_macs(node, graph) for graph in graphs for node in graph]
    return Macs(sum(each.dense for each in found), sum(each.kept for each in found))


def weights(*graphs: Graph) -> Weights:
    """How many weights graphs have, and how many of them are zero.

    Example:
        >>> layer = Linear(np.array([[0, 1, 2]], np.float32))
        >>> weights(Graph({0: (2, 3), 1: (2, 1)}, [Node(layer, [0], 1)], [0], [1]))
        Weights(all=3, zeros=1)
    """
    nodes = [node for graph in graphs for node in graph]
    found = [node.op.weight for node in nodes if isinstance(node.op, (Conv, ConvTranspose, Linear))]
    total = sum(weight.size for weight in found)
    return Weights(total, total - sum(int(np.count_nonzero(weight)) for weight in found))


def weight_bytes(graph: Graph) -> int:
    """Bytes of all arrays of a graph as they are, zeros included."""
    values = [getattr(node.op, part.name) for node in graph for part in dataclasses.fields(node.op)]
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))
