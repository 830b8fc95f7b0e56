"""Attention whose maps of queries, keys, values and outputs are four linear layers, to be decomposed each by itself.

Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762:

    softmax(Q K^T / sqrt(d)) V,    Q, K, V = x W_q, x W_k, x W_v of each head

``torch.nn.MultiheadAttention`` keeps the first three in one matrix, whose rank says nothing of any of them.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

Masking = Bool[Tensor, "*shape"] | Float[Tensor, "*shape"]


class SplitAttention(nn.Module):
    """Takes the place of a ``torch.nn.MultiheadAttention`` and computes the same function.

    Args:
        packed: The attention it starts as; it is not changed.

    Attributes:
        q_proj: Of queries.
        k_proj: Of keys.
        v_proj: Of values.
        out_proj: Of what the heads found.

    Raises:
        ValueError: If the attention adds keys and values of its own (``add_bias_kv``, ``add_zero_attn``).

    Example:
        >>> packed = nn.MultiheadAttention(8, 2, batch_first=True).eval()
        >>> x = torch.rand(3, 5, 8)
        >>> torch.allclose(SplitAttention(packed)(x, x, x)[0], packed(x, x, x)[0], atol=1e-5)
        True
    """

    # What torch's transformer layers ask before they take a faster way, which needs the weights in one matrix.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, packed: nn.MultiheadAttention):
        super().__init__()
        if not splittable(packed):
            raise ValueError("packed must not add keys and values of its own, got add_bias_kv or add_zero_attn")
        self.embed_dim, self.num_heads = packed.embed_dim, packed.num_heads
        self.head_dim, self.dropout, self.batch_first = packed.head_dim, packed.dropout, packed.batch_first
        weights = (
            (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
            if packed.in_proj_weight is None
            else packed.in_proj_weight.chunk(3)
        )
        biases = (None, None, None) if packed.in_proj_bias is None else packed.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(packed.out_proj.weight, packed.out_proj.bias)
        self.train(packed.training)

    def forward(
        self,
        query: Float[Tensor, "*batch targets features"],
        key: Float[Tensor, "*batch sources keys"],
        value: Float[Tensor, "*batch sources values"],
        key_padding_mask: Masking | None = None,
        need_weights: bool = True,
        attn_mask: Masking | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``torch.nn.MultiheadAttention``: the output, and the weights of attention or None.

        Raises:
            ValueError: If ``is_causal`` comes without ``attn_mask``.
        """
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal, got None")
        batched = query.ndim == 3
        if not batched:
            query, key, value = (x[None] for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = functional.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            found = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            found = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(found.transpose(1, 2).flatten(2))
        if not batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Float[Tensor, "batch heads places features"]:
        return x.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """What is added to the scores: minus infinity where a boolean mask is True."""
        found: list[Tensor] = []
        if attn_mask is not None:
            # (targets, sources) for all, or one for each head of each example.
            found.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (len(q), self.num_heads)))
        if padding is not None:
            found.append(padding.reshape(len(q), 1, 1, -1))
        added = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in found
        ]
        return None if not added else added[0] if len(added) == 1 else added[0] + added[1]


def splittable(packed: nn.MultiheadAttention) -> bool:
    """Whether :class:`SplitAttention` can take the place of an attention."""
    return packed.bias_k is None and packed.bias_v is None and not packed.add_zero_attn


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    layer.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)  # type: ignore[assignment]
    return layer
