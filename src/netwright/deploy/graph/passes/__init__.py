"""What is done to a graph between capture and a backend: each pass rewrites a graph in place into an equal one."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np

from netwright.deploy.graph.ir import Graph, Node
from netwright.deploy.graph.passes.activations import fuse_activations, name_products
from netwright.deploy.graph.passes.affine import fold_affine, fold_affine_forward
from netwright.deploy.graph.passes.channels import fold_channels
from netwright.deploy.graph.passes.cleaning import merge_equal, remove_no_ops, remove_unused
from netwright.deploy.graph.passes.dead import fold_constant_channels, remove_dead_channels
from netwright.deploy.graph.passes.padding import fold_padding
from netwright.deploy.graph.passes.residual import fuse_residuals

PASSES = (
    remove_no_ops,
    merge_equal,
    name_products,
    fold_padding,
    fold_channels,
    fold_affine,
    fold_affine_forward,
    fold_affine,
    fuse_activations,
    fuse_residuals,
    fold_constant_channels,
    remove_dead_channels,
    remove_no_ops,
    remove_unused,
)


def optimise(graph: Graph, *, precision: type[np.floating] = np.float32) -> Graph:
    """An equal graph with fewer and cheaper operations.

    Batch norms, paddings, shuffles, activations and residual sums become part of the convolutions beside them, channels
    that are constant part of biases. Weights are changed in float64 and rounded once; a weight that is zero stays zero.

    Args:
        graph: As captured; it is not changed.
        precision: What weights are rounded to; ``numpy.float64`` rounds nothing, which serves tests.

    Example:
        >>> import torch
        >>> from netwright.deploy.graph import capture
        >>> block = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU6()).eval()
        >>> [node.op.name for node in optimise(capture(block, torch.zeros(1, 3, 6, 5)))]
        ['conv']
    """
    graph = _copy(graph)
    for rewrite in PASSES:
        rewrite(graph)
    for node in graph:
        _round(node.op, precision)
    return graph


def _copy(graph: Graph) -> Graph:
    """Nodes and operations of its own; arrays are shared, since passes put new ones in their place."""
    nodes = [Node(copy.copy(node.op), list(node.inputs), node.output, node.path) for node in graph]
    return Graph(dict(graph.shapes), nodes, list(graph.inputs), list(graph.outputs), dict(graph.views))


def _round(op: object, precision: type[np.floating]) -> None:
    for part in dataclasses.fields(op):  # type: ignore[arg-type]
        value = getattr(op, part.name)
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            setattr(op, part.name, np.ascontiguousarray(value, dtype=precision))
