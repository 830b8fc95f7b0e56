"""DAGNN's networks: a perceptron on each node, its gate over hops, and both together.

Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from netwright.checks import whole
from netwright.nn.dagnn.adjacency import (
    AdjacencyCache,
    csr,
    identity,
    same_identity,
    transposed_order,
    with_values,
)
from netwright.nn.dagnn.propagation import gated_propagation


class _SparseProduct(Function):
    """A sparse constant times a dense matrix, with the transpose at hand for the way back."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return torch.mm(matrix, dense.contiguous())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return torch.mm(ctx.transposed, grad.contiguous()), None, None


class _Structure:
    """Keeps where the non-zeros of the features are that were seen last, both ways; its copies are empty."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] = ()
        self._found: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` with other values, and its transpose."""
        key = identity(x)
        if self._found is None or not same_identity(self._of, key):
            crow, columns, order = transposed_order(x)
            matrix = csr(x.crow_indices(), x.col_indices(), x.values(), (x.shape[0], x.shape[1]))
            self._found, self._of = (matrix, csr(crow, columns, x.values(), (x.shape[1], x.shape[0])), order), key
        matrix, transposed, order = self._found
        return with_values(matrix, values), with_values(transposed, values[order])

    def __reduce__(self) -> tuple[Any, ...]:
        return _Structure, ()


class DropoutLinear(nn.Linear):
    """Dropout, then a linear layer; features in sparse CSR are dropped and multiplied without the zeros.

    To drop the non-zeros alone has the same distribution, since zeros stay zeros.

    Args:
        in_features: Of the input.
        out_features: Of the output.
        dropout: Share of features that are dropped in training, in [0, 1).
        bias: Whether the layer has one.

    Raises:
        ValueError: If ``dropout`` is outside [0, 1).

    Example:
        >>> layer = DropoutLinear(3, 2)
        >>> x = torch.eye(3)
        >>> torch.equal(layer(x), layer(x.to_sparse_csr()))
        True
    """

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0, bias: bool = True):
        super().__init__(in_features, out_features, bias)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.dropout = dropout
        self._structure = _Structure()

    def forward(self, x: Float[Tensor, "nodes features"]) -> Float[Tensor, "nodes out"]:
        """Dense outputs of dense or sparse features."""
        if x.layout is torch.strided:
            return super().forward(F.dropout(x, self.dropout, self.training))
        matrix, transposed = self._structure(x, F.dropout(x.values(), self.dropout, self.training))
        with torch.autocast(x.device.type, enabled=False):  # sparse products have no half precision
            found = _SparseProduct.apply(self.weight.T, matrix, transposed)
        return found if self.bias is None else found + self.bias


def check_features(x: Tensor, in_dim: int) -> None:
    """Refuses features of another shape or layout.

    Raises:
        ValueError: If they are not (nodes, ``in_dim``), not floating, not finite, neither dense nor sparse CSR, or
            sparse ones require a gradient.
    """
    if x.ndim != 2 or x.shape[1] != in_dim or not len(x):
        raise ValueError(f"x must have shape (nodes, {in_dim}) with at least 1 node, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must hold floating-point numbers, got {x.dtype}: call x.float()")
    if x.layout not in {torch.strided, torch.sparse_csr}:
        raise ValueError(f"x must be dense or sparse CSR, got {x.layout}")
    if x.layout is torch.sparse_csr and x.requires_grad:
        raise ValueError("x must not require a gradient where it is sparse, got one that does")
    values = (x.values() if x.layout is torch.sparse_csr else x).detach()
    # A sum is finite only if all are; one that overflows asks for a second look.
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise ValueError("x must be finite, got NaN or infinity")


def check_sizes(**sizes: tuple[int, int]) -> None:
    """Refuses what is no whole number or below its bound, given as ``name=(value, bound)``.

    Raises:
        ValueError: Naming the first of them.
    """
    for name, (value, bound) in sizes.items():
        whole(name, value, f">= {bound}")


class NodeMLP(nn.Module):
    """A perceptron on the features of each node, dropout before every layer; as a baseline it ignores the graph.

    Args:
        in_dim: Features of a node.
        num_classes: Outputs.
        hidden: Width of the hidden layers.
        dropout: In [0, 1).
        num_mlp_layers: Linear layers, at least 1.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> NodeMLP(5, 3)(torch.rand(4, 5)).shape
        torch.Size([4, 3])
    """

    def __init__(self, in_dim: int, num_classes: int, hidden: int = 64, dropout: float = 0.8, num_mlp_layers: int = 2):
        super().__init__()
        check_sizes(
            in_dim=(in_dim, 1),
            num_classes=(num_classes, 1),
            hidden=(hidden, 1),
            num_mlp_layers=(num_mlp_layers, 1),
        )
        widths = [in_dim, *[hidden] * (num_mlp_layers - 1), num_classes]
        self.in_dim, self.num_classes = in_dim, num_classes
        self.layers = nn.ModuleList(DropoutLinear(wide, out, dropout) for wide, out in itertools.pairwise(widths))

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Tensor | None = None,
        edge_weight: Tensor | None = None,
    ) -> Float[Tensor, "nodes classes"]:
        """Logits; the graph is there for the same call as of the networks that use it."""
        check_features(x, self.in_dim)
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class AdaptiveHopGate(nn.Module):
    """Weighs the hops of each node by sigmoids of one linear function of their values, shared by nodes and hops.

    Args:
        dim: Numbers of a hop.
        bias: Whether the function has one; the paper's equation has none, the authors' network does.

    Raises:
        ValueError: If ``dim`` is below 1.

    Example:
        >>> gate = AdaptiveHopGate(2)
        >>> out, scores = gate(torch.rand(4, 6, 2))
        >>> out.shape, scores.shape
        (torch.Size([4, 2]), torch.Size([4, 6]))
    """

    def __init__(self, dim: int, bias: bool = True):
        super().__init__()
        check_sizes(dim=(dim, 1))
        self.projection = nn.Linear(dim, 1, bias)

    def forward(
        self, h: Float[Tensor, "nodes hops classes"]
    ) -> tuple[Float[Tensor, "nodes classes"], Float[Tensor, "nodes hops"]]:
        """The weighted sum over hops, and the weights."""
        dim = self.projection.in_features
        if h.ndim != 3 or h.shape[2] != dim:
            raise ValueError(f"h must have shape (nodes, hops, {dim}), got {tuple(h.shape)}")
        scores = self.projection(h).squeeze(2).sigmoid()
        return torch.einsum("nl,nlc->nc", scores, h), scores


class DAGNN(nn.Module):
    """Deep adaptive graph network: a perceptron, K hops of its logits, and a learned gate over them for each node.

    Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296. The normalised adjacency is
    kept between calls with the same graph; it is made anew when the tensors of the graph are others or were changed.

    Args:
        in_dim: Features of a node.
        num_classes: Classes.
        hidden: Width of the perceptron.
        K: Hops, at least 0; the paper uses 5 to 20.
        dropout: Before each layer of the perceptron, in [0, 1).
        gate_bias: Whether the gate has a bias.
        num_mlp_layers: Layers of the perceptron.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> x, edge_index = torch.rand(3, 5), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
        >>> network = DAGNN(in_dim=5, num_classes=2, K=10).eval()
        >>> logits, gates = network(x, edge_index, return_gates=True)
        >>> logits.shape, gates.shape
        (torch.Size([3, 2]), torch.Size([3, 11]))
    """

    def __init__(
        self,
        in_dim: int,
        num_classes: int,
        hidden: int = 64,
        K: int = 10,
        dropout: float = 0.8,
        gate_bias: bool = True,
        num_mlp_layers: int = 2,
    ):
        super().__init__()
        check_sizes(K=(K, 0))
        self.K = K
        self.mlp = NodeMLP(in_dim, num_classes, hidden, dropout, num_mlp_layers)
        self.gate = AdaptiveHopGate(num_classes, gate_bias)
        self._adjacency = AdjacencyCache()

    def forward(
        self,
        x: Float[Tensor, "nodes features"],
        edge_index: Tensor,
        edge_weight: Float[Tensor, " edges"] | None = None,
        return_gates: bool = False,
    ) -> Any:
        """Logits (nodes, classes), and the gates (nodes, K + 1) when asked for.

        Args:
            x: Dense or sparse CSR.
            edge_index: Integers (2, edges), each undirected edge both ways; or a sparse matrix (targets, sources).
            edge_weight: Finite and >= 0; constants.
            return_gates: Whether the gates are wanted.

        Raises:
            ValueError: If features or graph are of another shape or range.
        """
        z = full_precision(self.mlp(x))
        adj, transposed = self._adjacency(edge_index, len(z), edge_weight, z.dtype)
        line = self.gate.projection
        weight = line.weight[0].to(z.dtype)
        bias = None if line.bias is None else line.bias.to(z.dtype)
        logits, gates = gated_propagation(adj, z, weight, bias, self.K, transposed=transposed)
        return (logits, gates) if return_gates else logits


def full_precision(z: Tensor) -> Tensor:
    """Half precision, as autocast gives it, in single: sparse products have no other.

    Example:
        >>> full_precision(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return z if z.dtype in {torch.float32, torch.float64} else z.float()
