"""What DAGNN is compared with: entangled convolutions, a linear map of propagated features, personalised PageRank.

Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017, arXiv:1609.02907; Wu
et al., "Simplifying Graph Convolutional Networks", ICML 2019, arXiv:1902.07153; Gasteiger, Bojchevski and Günnemann,
"Predict then Propagate: Graph Neural Networks meet Personalized PageRank", ICLR 2019, arXiv:1810.05997; Zhou et al.,
"Learning with Local and Global Consistency", NIPS 2003.

    GCN:    H_l = relu(A H_{l-1} W_l + b_l)              SGC:  A^K X W + b
    APPNP:  H_l = (1 - alpha) A H_{l-1} + alpha MLP(X)    labels:  the same with the known labels in place of MLP(X)
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from netwright.nn.dagnn.adjacency import AdjacencyCache, gcn_norm
from netwright.nn.dagnn.networks import DropoutLinear, NodeMLP, check_features, check_sizes, full_precision
from netwright.nn.dagnn.propagation import diffuse


class GCN(nn.Module):
    """Graph convolutional network: each layer transforms, propagates one hop and, but for the last, rectifies.

    Weights are drawn as Glorot and Bengio do, as in the paper.

    Args:
        in_dim: Features of a node.
        num_classes: Classes.
        hidden: Width between layers.
        num_layers: Layers, at least 1.
        dropout: Before each layer, in [0, 1).

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> GCN(5, 2)(torch.rand(3, 5), torch.tensor([[0, 1], [1, 0]])).shape
        torch.Size([3, 2])
    """

    def __init__(self, in_dim: int, num_classes: int, hidden: int = 64, num_layers: int = 2, dropout: float = 0.5):
        super().__init__()
        check_sizes(in_dim=(in_dim, 1), num_classes=(num_classes, 1), hidden=(hidden, 1), num_layers=(num_layers, 1))
        widths = [in_dim, *[hidden] * (num_layers - 1), num_classes]
        self.in_dim = in_dim
        self.layers = nn.ModuleList(
            DropoutLinear(wide, out, dropout, bias=False) for wide, out in itertools.pairwise(widths)
        )
        # Behind the propagation, and none at first; with torch's own scale a signal would vanish in many layers.
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(out)) for out in widths[1:])
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.get_parameter("weight"))
        self._adjacency = AdjacencyCache()

    def forward(
        self, x: Float[Tensor, "nodes features"], edge_index: Tensor, edge_weight: Tensor | None = None
    ) -> Float[Tensor, "nodes classes"]:
        """Logits; arguments as for :class:`netwright.nn.dagnn.DAGNN`."""
        check_features(x, self.in_dim)
        last = len(self.layers) - 1
        for place, (layer, bias) in enumerate(zip(self.layers, self.biases, strict=True)):
            z = full_precision(layer(x))
            adj, transposed = self._adjacency(edge_index, len(z), edge_weight, z.dtype)
            z = diffuse(adj, z, 1, transposed=transposed) + bias
            x = z if place == last else z.relu()
        return x


class SGC(nn.Module):
    """Simple graph convolution: K hops of the features, then a linear layer.

    Computed as K hops of what the linear map gives, which is the same and has fewer columns.

    Args:
        in_dim: Features of a node.
        num_classes: Classes.
        K: Hops, at least 0.
        dropout: Of the features, in [0, 1); the paper has none.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(self, in_dim: int, num_classes: int, K: int = 2, dropout: float = 0.0):
        super().__init__()
        check_sizes(in_dim=(in_dim, 1), num_classes=(num_classes, 1), K=(K, 0))
        self.in_dim, self.K = in_dim, K
        self.linear = DropoutLinear(in_dim, num_classes, dropout, bias=False)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self._adjacency = AdjacencyCache()

    def forward(
        self, x: Float[Tensor, "nodes features"], edge_index: Tensor, edge_weight: Tensor | None = None
    ) -> Float[Tensor, "nodes classes"]:
        """Logits; arguments as for :class:`netwright.nn.dagnn.DAGNN`."""
        check_features(x, self.in_dim)
        z = full_precision(self.linear(x))
        adj, transposed = self._adjacency(edge_index, len(z), edge_weight, z.dtype)
        return diffuse(adj, z, self.K, transposed=transposed) + self.bias


class APPNP(nn.Module):
    """Personalised propagation of neural predictions: a perceptron, then K hops that return to it with ``alpha``.

    Edges are not dropped.

    Args:
        in_dim: Features of a node.
        num_classes: Classes.
        hidden: Width of the perceptron.
        K: Hops, at least 0.
        alpha: Share of the perceptron's logits in every hop, in [0, 1].
        dropout: Before each layer of the perceptron, in [0, 1).
        num_mlp_layers: Layers of the perceptron.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        hidden: int = 64,
        K: int = 10,
        alpha: float = 0.1,
        dropout: float = 0.5,
        num_mlp_layers: int = 2,
    ):
        super().__init__()
        check_sizes(K=(K, 0))
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        self.K, self.alpha = K, alpha
        self.mlp = NodeMLP(in_dim, num_classes, hidden, dropout, num_mlp_layers)
        self._adjacency = AdjacencyCache()

    def forward(
        self, x: Float[Tensor, "nodes features"], edge_index: Tensor, edge_weight: Tensor | None = None
    ) -> Float[Tensor, "nodes classes"]:
        """Logits; arguments as for :class:`netwright.nn.dagnn.DAGNN`."""
        z = full_precision(self.mlp(x))
        adj, transposed = self._adjacency(edge_index, len(z), edge_weight, z.dtype)
        return diffuse(adj, z, self.K, self.alpha, transposed=transposed)


def label_propagation(
    edge_index: Tensor,
    y: Int[Tensor, " nodes"],
    known: Bool[Tensor, " nodes"],
    num_classes: int,
    K: int = 50,
    alpha: float = 0.1,
    edge_weight: Tensor | None = None,
) -> Float[Tensor, "nodes classes"]:
    """Scores of the classes from the graph and the known labels alone.

    Args:
        edge_index: As for :class:`netwright.nn.dagnn.DAGNN`.
        y: Classes from 0; those of nodes that are not known do not matter.
        known: Which labels may be used.
        num_classes: Classes.
        K: Hops, at least 0.
        alpha: Share of the known labels in every hop, in [0, 1].
        edge_weight: Finite and >= 0.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> path = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
        >>> y, known = torch.tensor([0, 9, 9, 1]), torch.tensor([True, False, False, True])
        >>> label_propagation(path, y, known, 2).argmax(1)
        tensor([0, 0, 1, 1])
    """
    check_sizes(num_classes=(num_classes, 1))
    if y.shape != known.shape or y.ndim != 1 or known.dtype is not torch.bool:
        raise ValueError(f"known must be a truth value for each of y, got {known.dtype} of {tuple(known.shape)}")
    if bool(known.any()) and not 0 <= int(y[known].min()) <= int(y[known].max()) < num_classes:
        raise ValueError(f"y must lie in 0..{num_classes - 1} where it is known, got {y[known].unique().tolist()}")
    start = F.one_hot(torch.where(known, y, 0), num_classes).float() * known[:, None]
    with torch.no_grad():
        return diffuse(gcn_norm(edge_index, len(y), edge_weight, dtype=start.dtype), start, K, alpha)
