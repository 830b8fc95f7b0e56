"""A selection of channels becomes the order of the columns of the convolutions and linear layers that read it."""

from __future__ import annotations

import numpy as np

from netwright.deploy.graph.ir import Channels, Conv, Graph, Linear
from netwright.deploy.graph.passes.cleaning import remove_unused


def fold_channels(graph: Graph) -> None:
    """Lets ungrouped convolutions and linear layers read what a selection reads, with zeros for what it leaves out.

    A column that the selection repeats becomes the sum of its copies.
    """
    producers = graph.producers()
    for node in graph.nodes:
        op = node.op
        source = producers.get(node.inputs[0]) if node.inputs else None
        if source is None or not isinstance(source.op, Channels):
            continue
        if isinstance(op, Linear) or (isinstance(op, Conv) and op.groups == 1):
            index = source.op.index
            weight = np.zeros((len(op.weight), graph.shapes[source.inputs[0]][1], *op.weight.shape[2:]))
            np.add.at(weight.swapaxes(0, 1), index, op.weight.swapaxes(0, 1))
            op.weight = weight
            node.inputs[0] = source.inputs[0]
    remove_unused(graph)
