"""The normalised adjacency of a graph as a sparse matrix, its cache, and its powers in the limit.

Kipf and Welling, "Semi-Supervised Classification with Graph Convolutional Networks", ICLR 2017, arXiv:1609.02907, and
Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296, for the limits:

    symmetric:  A = D^-1/2 (A0 + I) D^-1/2,   A^k -> psi psi^T / |psi|^2,   psi_i = sqrt(d_i)
    by rows:    P = D^-1 (A0 + I),            P^k -> 1 pi^T,                pi_i = d_i / sum d

for each connected component, with d the degrees of A0 + I.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Mode = Literal["sym", "row"]
_INT32 = 2**31 - 1


def csr(crow: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """A sparse CSR tensor of parts that are known to be right, with 32-bit indices where they do.

    MKL has 32-bit indices, and torch would convert others at every product.
    """
    if max(*size, len(values)) < _INT32:
        crow, columns = crow.int(), columns.int()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse CSR tensor support is in beta.*")
        return torch.sparse_csr_tensor(crow, columns, values, size, check_invariants=False)


def with_values(matrix: Tensor, values: Tensor) -> Tensor:
    """A CSR matrix with the same non-zeros and other values."""
    return csr(matrix.crow_indices(), matrix.col_indices(), values, (matrix.shape[0], matrix.shape[1]))


def transposed_order(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row starts and columns of the transpose of a CSR matrix, and where its values stand in the matrix."""
    crow, columns = matrix.crow_indices().long(), matrix.col_indices().long()
    rows = torch.repeat_interleave(torch.arange(matrix.shape[0], device=matrix.device), crow.diff())
    order = columns.argsort(stable=True)
    starts = columns.bincount(minlength=matrix.shape[1]).cumsum(0)
    return torch.cat([starts.new_zeros(1), starts]), rows[order], order


def transpose(matrix: Tensor) -> Tensor:
    """The transpose of a CSR matrix in CSR; the matrix itself where it is symmetric to the last bit."""
    crow, columns, order = transposed_order(matrix)
    values = matrix.values()[order]
    own = (matrix.crow_indices(), matrix.col_indices(), matrix.values())
    if matrix.shape[0] == matrix.shape[1] and all(
        torch.equal(a.to(b.dtype), b) for a, b in zip((crow, columns, values), own, strict=True)
    ):
        return matrix
    return csr(crow, columns, values, (matrix.shape[1], matrix.shape[0]))


def gcn_norm(
    edge_index: Tensor,
    num_nodes: int,
    edge_weight: Float[Tensor, " edges"] | None = None,
    add_self_loops: bool = True,
    mode: Mode = "sym",
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The normalised adjacency matrix (targets, sources) of a graph in CSR.

    Degrees are those of targets, summed in float64; in an undirected graph, each edge of which is given both ways,
    there is no difference. Edges that occur several times count with the sum of their weights.

    Args:
        edge_index: Integers (2, edges), sources in the first row and targets in the second; or a sparse tensor
            (targets, sources) that holds the weights itself.
        num_nodes: Nodes, at least 1.
        edge_weight: Finite and >= 0; 1 for each edge by default.
        add_self_loops: Gives each node that has no loop one of weight 1; loops that are there keep their weight.
        mode: ``"sym"`` divides by the roots of both degrees, ``"row"`` by the degree of the target, so that each row
            sums to 1. Where a degree is 0 the row is 0.
        dtype: Of the values; that of the weights by default.

    Raises:
        ValueError: If shape, range or weights are others, or weights require a gradient: they are constants here.

    Example:
        >>> gcn_norm(torch.tensor([[0, 1], [1, 0]]), 2).to_dense()
        tensor([[0.5000, 0.5000],
                [0.5000, 0.5000]])
    """
    if mode not in {"sym", "row"}:
        raise ValueError(f"mode must be 'sym' or 'row', got {mode!r}")
    source, target, weight = checked_edges(edge_index, num_nodes, edge_weight)
    dtype = weight.dtype if dtype is None else dtype
    weight = weight.double()
    if add_self_loops:
        missing = torch.ones(num_nodes, dtype=torch.bool, device=source.device)
        missing[source[source == target]] = False
        loops = missing.nonzero().flatten()
        source, target = torch.cat([source, loops]), torch.cat([target, loops])
        weight = torch.cat([weight, weight.new_ones(len(loops))])
    degree = weight.new_zeros(num_nodes).index_add_(0, target, weight)
    inverse = degree.rsqrt() if mode == "sym" else degree.reciprocal()
    inverse[degree == 0] = 0
    # Both roots first: (i, j) and (j, i) are then equal to the last bit, unless an edge is given several times.
    values = weight * (inverse[source] * inverse[target] if mode == "sym" else inverse[target])
    places = torch.stack([target, source])
    size = (num_nodes, num_nodes)
    whole = torch.sparse_coo_tensor(places, values, size, check_invariants=False).coalesce()
    rows, columns = whole.indices()
    starts = torch.cat([rows.new_zeros(1), rows.bincount(minlength=num_nodes).cumsum(0)])
    return csr(starts, columns, whole.values().to(dtype), size)


def checked_edges(edge_index: Tensor, num_nodes: int, edge_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sources, targets and weights, once they are known to be right."""
    if num_nodes < 1:
        raise ValueError(f"num_nodes must be >= 1, got {num_nodes}")
    if edge_index.layout is not torch.strided:
        if tuple(edge_index.shape) != (num_nodes, num_nodes):
            raise ValueError(
                f"a sparse edge_index must have shape ({num_nodes}, {num_nodes}), got {tuple(edge_index.shape)}"
            )
        if edge_weight is not None:
            raise ValueError("edge_weight must be None where edge_index is sparse and holds the weights, got both")
        whole = edge_index.to_sparse_coo().coalesce()
        edge_index, edge_weight = whole.indices().flip(0), whole.values()
    if edge_index.ndim != 2 or edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, edges), got {tuple(edge_index.shape)}")
    if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype is torch.bool:
        raise ValueError(f"edge_index must hold integers, got {edge_index.dtype}")
    source, target = edge_index.long().unbind()
    if len(source) and not 0 <= int(edge_index.min()) <= int(edge_index.max()) < num_nodes:
        found = f"{int(edge_index.min())}..{int(edge_index.max())}"
        raise ValueError(f"edge_index must lie in 0..{num_nodes - 1}, got {found}")
    if edge_weight is None:
        return source, target, torch.ones(len(source), dtype=torch.get_default_dtype(), device=source.device)
    if tuple(edge_weight.shape) != (len(source),):
        raise ValueError(f"edge_weight must have shape ({len(source)},), got {tuple(edge_weight.shape)}")
    if edge_weight.requires_grad:
        raise ValueError("edge_weight must not require a gradient, got one that does: detach() it")
    weight = edge_weight if edge_weight.is_floating_point() else edge_weight.to(torch.get_default_dtype())
    wrong = ~(weight.isfinite() & (weight >= 0))
    if bool(wrong.any()):
        raise ValueError(f"edge_weight must be finite and >= 0, got {float(weight[wrong][0])}")
    return source, target, weight


class AdjacencyCache:
    """Keeps the normalised adjacency of the graph that was asked for last, and its transpose.

    It is made anew when other tensors are given, or when the same ones have been changed in place. Copies and pickles
    of a cache are empty. A change that torch does not see (through NumPy's memory, or ``tensor.data``) goes unnoticed.

    Args:
        add_self_loops: As for :func:`gcn_norm`.
        mode: As for :func:`gcn_norm`.

    Example:
        >>> cache = AdjacencyCache()
        >>> edge_index = torch.tensor([[0, 1], [1, 0]])
        >>> adj, transposed = cache(edge_index, 2)
        >>> cache(edge_index, 2)[0] is adj, transposed is adj    # an undirected graph
        (True, True)
    """

    def __init__(self, add_self_loops: bool = True, mode: Mode = "sym"):
        self.add_self_loops, self.mode = add_self_loops, mode
        self._of: tuple[Any, ...] = ()
        self._found: tuple[Tensor, Tensor] | None = None

    def __call__(
        self,
        edge_index: Tensor,
        num_nodes: int,
        edge_weight: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """The matrix and its transpose, in CSR."""
        key = (num_nodes, dtype, *identity(edge_index), *identity(edge_weight))
        if self._found is None or not same_identity(self._of, key):
            matrix = gcn_norm(edge_index, num_nodes, edge_weight, self.add_self_loops, self.mode, dtype=dtype)
            self._found, self._of = (matrix, transpose(matrix)), key
        return self._found

    def __reduce__(self) -> tuple[Any, ...]:
        return AdjacencyCache, (self.add_self_loops, self.mode)


def identity(tensor: Tensor | None) -> tuple[Any, Any]:
    """Which tensor it is and how often it was changed; never equal to anything where torch does not count changes."""
    if tensor is None:
        return None, None
    return weakref.ref(tensor), object() if tensor.is_inference() else tensor._version


def same_identity(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Whether two keys made with :func:`identity` name the same living tensors, unchanged.

    Example:
        >>> x = torch.ones(2)
        >>> before = identity(x)
        >>> same_identity(before, identity(x)), same_identity(before, identity(x.add_(1)))
        (True, False)
    """

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, weakref.ref) and isinstance(other, weakref.ref):
            return one() is not None and one() is other()
        return bool(one == other)

    return len(a) == len(b) and all(map(same, a, b))


def limit_operator(adj: Tensor, mode: Mode = "sym") -> Float[Tensor, "nodes nodes"]:
    """What the powers of a normalised adjacency tend to, as a dense matrix; each component has a limit of its own.

    The distance falls as the power of the second largest absolute eigenvalue. Computed in float64 from the leading
    eigenvector of each component: meant for up to some thousand nodes.

    Args:
        adj: An undirected graph's matrix, from :func:`gcn_norm` with the same ``mode``.
        mode: ``"sym"`` or ``"row"``.

    Raises:
        ValueError: If the graph is directed, or powers have no limit: a component without loops that is bipartite.

    Example:
        >>> path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])     # degrees with loops 2, 3, 2
        >>> limit_operator(gcn_norm(path, 3, mode="row"), "row")[0]
        tensor([0.2857, 0.4286, 0.2857])
    """
    from scipy.sparse.csgraph import connected_components

    if mode not in {"sym", "row"}:
        raise ValueError(f"mode must be 'sym' or 'row', got {mode!r}")
    if adj.ndim != 2 or adj.shape[0] != adj.shape[1]:
        raise ValueError(f"adj must be square, got {tuple(adj.shape)}")
    dense = adj.to_dense().double()
    # By rows P_ij P_ji = A_ij^2 in an undirected graph.
    alike = dense if mode == "sym" else (dense * dense.T).sqrt()
    count, member = connected_components((dense != 0).cpu().numpy(), directed=False)
    found = torch.zeros_like(dense)
    for component in range(count):
        nodes = torch.from_numpy((member == component).nonzero()[0]).to(dense.device)
        block, sides = alike[nodes][:, nodes], dense[nodes][:, nodes]
        values, vectors = torch.linalg.eigh(block)
        if not bool(sides.any()):  # a node without any edge: its row is zero
            continue
        leading = vectors[:, -1].abs()
        left = leading if mode == "sym" else leading.square() / leading.square().sum()
        if float((left @ sides - left).abs().max()) > 1e-5 or not torch.allclose(block, block.T, atol=1e-6):
            raise ValueError(f"adj must be that of an undirected graph, normalised by mode {mode!r}, got another one")
        if float(values[0]) < -1 + 1e-6:
            raise ValueError(f"adj must have eigenvalues > -1, got {float(values[0]):.6g}: add loops")
        limit = torch.outer(leading, leading) if mode == "sym" else left.expand(len(nodes), -1)
        found[nodes[:, None], nodes] = limit
    return found.to(adj.dtype)
