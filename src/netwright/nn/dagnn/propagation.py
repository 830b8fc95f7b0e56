"""Propagation over a graph: products of one sparse matrix with few columns, and one sweep back for the gradient.

Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296:

    H_l = A H_{l-1},   S_l = sigmoid(H_l s + s0),   out = sum_l S_l o H_l
    backward:  g_K = local_K,   g_l = A^T g_{l+1} + local_l,   local_l = S_l o G + a_l s^T
               a_l = S_l (1 - S_l) (<G, H_l> + G^S_l)

so that only the hops are stored, 4 (K + 1) n c bytes, and nothing of the gate but its scores.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from netwright.nn.dagnn.adjacency import transpose


def propagate(
    adj: Tensor, z: Float[Tensor, "nodes classes"], K: int, *, transposed: Tensor | None = None
) -> Float[Tensor, "nodes hops classes"]:
    """All hops ``A^l z`` for l = 0..K.

    Args:
        adj: Sparse CSR (nodes, nodes), of the type of ``z``; a constant.
        z: Features or logits of each node.
        K: Hops, at least 0.
        transposed: Of ``adj``, for the backward pass; found from it by default.

    Raises:
        ValueError: If ``K`` is negative or the shapes do not fit.

    Example:
        >>> from netwright.nn.dagnn import gcn_norm
        >>> pair = gcn_norm(torch.tensor([[0, 1], [1, 0]]), 2)
        >>> propagate(pair, torch.eye(2), 1)[0]
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    _check(adj, z, K)
    with _own_precision(z):
        return _Hops.apply(z, adj, transposed, K)


def diffuse(
    adj: Tensor, z: Float[Tensor, "nodes classes"], K: int, alpha: float = 0.0, *, transposed: Tensor | None = None
) -> Float[Tensor, "nodes classes"]:
    """The last of K hops with return: ``H_l = (1 - alpha) A H_{l-1} + alpha z``, ``H_0 = z``; nothing is stored.

    Args:
        adj: As for :func:`propagate`.
        z: Features or logits of each node.
        K: Hops, at least 0.
        alpha: Share of ``z`` in every hop, in [0, 1]; 0 gives ``A^K z``.
        transposed: As for :func:`propagate`.

    Raises:
        ValueError: If ``K`` or ``alpha`` is out of its range, or the shapes do not fit.
    """
    _check(adj, z, K)
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    with _own_precision(z):
        return _Diffusion.apply(z, adj, transposed, K, alpha)


def gated_propagation(
    adj: Tensor,
    z: Float[Tensor, "nodes classes"],
    weight: Float[Tensor, " classes"],
    bias: Float[Tensor, ""] | None,
    K: int,
    *,
    transposed: Tensor | None = None,
) -> tuple[Float[Tensor, "nodes classes"], Float[Tensor, "nodes hops"]]:
    """The gated sum of all hops and the gates, in one pass; gradients of both, in the logits and in the gate.

    Args:
        adj: As for :func:`propagate`.
        z: Logits of each node.
        weight: The gate's vector.
        bias: The gate's bias, of one element.
        K: Hops, at least 0.
        transposed: As for :func:`propagate`.

    Raises:
        ValueError: If ``K`` is negative or the shapes do not fit.
    """
    _check(adj, z, K)
    if tuple(weight.shape) != (z.shape[1],):
        raise ValueError(f"weight must have shape ({z.shape[1]},), got {tuple(weight.shape)}")
    with _own_precision(z):
        return _Gated.apply(z, weight, bias, adj, transposed, K, torch.is_grad_enabled())


def _own_precision(z: Tensor) -> torch.autocast:
    """Autocast would ask for products in half precision, which sparse matrices do not have."""
    return torch.autocast(z.device.type, enabled=False)


def _check(adj: Tensor, z: Tensor, K: int) -> None:
    if K < 0:
        raise ValueError(f"K must be >= 0, got {K}")
    if adj.layout is not torch.sparse_csr:
        raise ValueError(f"adj must be sparse CSR, got {adj.layout}")
    if z.ndim != 2 or tuple(adj.shape) != (len(z), len(z)):
        raise ValueError(f"adj must be square with a row for each of z, got {tuple(adj.shape)} and {tuple(z.shape)}")
    if adj.dtype != z.dtype:
        raise ValueError(f"adj must be of the type of z, {z.dtype}, got {adj.dtype}")


def _backward_matrix(ctx: Any) -> Tensor:
    return transpose(ctx.adj) if ctx.transposed is None else ctx.transposed


class _Hops(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, adj: Tensor, transposed: Tensor | None, K: int) -> Tensor:
        ctx.adj, ctx.transposed = adj, transposed
        hops = z.new_empty(K + 1, *z.shape)
        hops[0] = z
        for hop in range(K):
            torch.mm(adj, hops[hop], out=hops[hop + 1])
        return hops.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back = _backward_matrix(ctx)
        found = grad[:, -1].contiguous()
        for hop in range(grad.shape[1] - 2, -1, -1):
            found = torch.addmm(grad[:, hop].contiguous(), back, found)
        return found, None, None, None


class _Diffusion(Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, adj: Tensor, transposed: Tensor | None, K: int, alpha: float) -> Tensor:
        ctx.adj, ctx.transposed, ctx.K, ctx.alpha = adj, transposed, K, alpha
        start = z.contiguous()
        found = start
        for _ in range(K):
            found = torch.addmm(start, adj, found, beta=alpha, alpha=1 - alpha) if alpha else torch.mm(adj, found)
        return found.clone() if found is start else found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The adjoint runs the same recursion, since it is a polynomial of the transpose.
        start = grad.contiguous()
        if not ctx.K:
            return start, None, None, None, None
        back, alpha = _backward_matrix(ctx), ctx.alpha
        found = start
        for _ in range(ctx.K):
            found = torch.addmm(start, back, found, beta=alpha, alpha=1 - alpha) if alpha else torch.mm(back, found)
        return found, None, None, None, None


class _Gated(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        adj: Tensor,
        transposed: Tensor | None,
        K: int,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        keep = differentiable and any(ctx.needs_input_grad[:3])
        hop = z.contiguous()
        hops = [hop]
        scores = z.new_empty(K + 1, len(z))
        out = torch.zeros_like(hop)
        for place in range(K + 1):
            if place:
                hop = torch.mm(adj, hop)
                if keep:
                    hops.append(hop)
            torch.mv(hop, weight, out=scores[place])
            if bias is not None:
                scores[place] += bias.reshape(())
            scores[place].sigmoid_()
            out.addcmul_(scores[place].unsqueeze(1), hop)
        if keep:
            ctx.adj, ctx.transposed, ctx.bias_shape = adj, transposed, None if bias is None else bias.shape
            ctx.save_for_backward(weight, scores, *hops)
            ctx.set_materialize_grads(False)
        return out, scores.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_scores: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, scores, *hops = ctx.saved_tensors
        slope = torch.zeros_like(hops[0]) if grad is None else grad.contiguous()
        back = _backward_matrix(ctx) if len(hops) > 1 else ctx.adj
        found = None
        for_weight, for_bias = torch.zeros_like(weight), weight.new_zeros(())
        for place in range(len(hops) - 1, -1, -1):
            hop, score = hops[place], scores[place]
            inner = (slope * hop).sum(1)
            if grad_scores is not None:
                inner += grad_scores[:, place]
            inner *= score * (1 - score)
            for_weight += hop.T @ inner
            for_bias += inner.sum()
            local = torch.outer(inner, weight).addcmul_(score.unsqueeze(1), slope)
            found = local if found is None else torch.addmm(local, back, found)
        bias = None if ctx.bias_shape is None else for_bias.reshape(ctx.bias_shape)
        return found, for_weight, bias, None, None, None, None
