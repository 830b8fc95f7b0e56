"""Deep adaptive graph networks: transform each node first, propagate afterwards, let each node weigh its own hops.

Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296.

    Z = MLP(X),   H_l = A^l Z,   S = sigmoid(H s + s0),   out_i = sum_l S_il H_il,   l = 0..K
    A = D^-1/2 (A0 + I) D^-1/2

Graphs are given as torch_geometric gives them, ``edge_index`` with sources in its first row and targets in the second,
or as a sparse matrix (targets, sources); torch_geometric itself is not needed. Propagation is a product of a sparse
matrix in CSR with the logits, and one sweep back.
"""

from netwright.nn.dagnn.adjacency import AdjacencyCache, gcn_norm, limit_operator
from netwright.nn.dagnn.baselines import APPNP, GCN, SGC, label_propagation
from netwright.nn.dagnn.networks import DAGNN, AdaptiveHopGate, NodeMLP
from netwright.nn.dagnn.propagation import diffuse, gated_propagation, propagate
from netwright.nn.dagnn.smoothing import smoothness

__all__ = [
    "APPNP",
    "DAGNN",
    "GCN",
    "SGC",
    "AdaptiveHopGate",
    "AdjacencyCache",
    "NodeMLP",
    "diffuse",
    "gated_propagation",
    "gcn_norm",
    "label_propagation",
    "limit_operator",
    "propagate",
    "smoothness",
]
