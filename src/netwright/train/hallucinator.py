"""Hallucinator: a third positive for contrastive learning, made of the other two in feature space at almost no cost.

Wu, Hobbs and Hovakimyan, "Hallucination Improves the Performance of Unsupervised Visual Representation Learning", ICCV
2023, arXiv:2307.12168.

    e = (1 + r) q - r k,    h = W3 relu(W2 relu(W1 [q; e] + b1) + b2) + b3,    r ~ U(0, 0.1)

The query q is moved on the line from the key k through q and beyond, where it has less in common with k, and a small
network smooths what comes out. The host's own loss then contrasts [q; h] with [k; k], and trains the network along. It
is left away after pre-training.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import number, whole


class Hallucinator(nn.Module):
    """Doubles a batch of pairs of embeddings by hallucinated queries.

    Args:
        dim: Width d of the embeddings, >= 1.
        hidden: Width of the two hidden layers, >= 1; by default 2 d.
        ratio_max: Largest ratio r, >= 0. With 0 nothing is extrapolated and the network remains.
        per_sample: Whether every pair has a ratio of its own, rather than one for the batch.

    Raises:
        ValueError: If a number is out of its range; in a call if q and k are not two matrices of one shape, or of
            another width.

    Example:
        >>> hallucinator = Hallucinator(dim=8)
        >>> q, k = torch.randn(4, 8), torch.randn(4, 8)
        >>> doubled, keys = hallucinator(q, k)
        >>> doubled.shape, torch.equal(doubled[:4], q), torch.equal(keys, torch.cat([k, k]))
        (torch.Size([8, 8]), True, True)
    """

    def __init__(self, dim: int = 128, hidden: int | None = None, ratio_max: float = 0.1, per_sample: bool = False):
        super().__init__()
        whole("dim", dim, ">= 1")
        hidden = 2 * dim if hidden is None else hidden
        whole("hidden", hidden, ">= 1")
        number("ratio_max", ratio_max, ">= 0")
        self.dim, self.ratio_max, self.per_sample = dim, ratio_max, per_sample
        self.smooth = nn.Sequential(
            nn.Linear(2 * dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, dim)
        )

    def extra_repr(self) -> str:
        """The arguments."""
        return f"dim={self.dim}, ratio_max={self.ratio_max}, per_sample={self.per_sample}"

    def drawn_ratio(self, q: Float[Tensor, "batch dim"]) -> Float[Tensor, "..."]:
        """A ratio for the batch (), or for each of its rows (batch, 1), from torch's generator of q's device."""
        # A tensor, since a number would become a constant of a compiled graph.
        shape = (len(q), 1) if self.per_sample else ()
        return self.ratio_max * torch.rand(shape, device=q.device, dtype=q.dtype)

    def forward(
        self, q: Float[Tensor, "batch dim"], k: Float[Tensor, "batch dim"], ratio: float | Tensor | None = None
    ) -> tuple[Float[Tensor, "doubled dim"], Float[Tensor, "doubled dim"]]:
        """Queries [q; h] and keys [k; k], of 2 batch rows each.

        Args:
            q: Queries, of any length.
            k: Their keys; gradients flow into them unless they are detached.
            ratio: r, a number or a tensor that broadcasts to the batch; by default drawn.
        """
        if q.ndim != 2 or q.shape != k.shape:
            raise ValueError(f"q and k must have one shape (batch, dim), got {tuple(q.shape)} and {tuple(k.shape)}")
        if q.shape[1] != self.dim:
            raise ValueError(f"q and k must have {self.dim} columns, got {q.shape[1]}")
        extrapolated = extrapolate(q, k, self.drawn_ratio(q) if ratio is None else ratio)
        return torch.cat([q, self.smooth(torch.cat([q, extrapolated], 1))]), torch.cat([k, k])


def extrapolate(
    q: Float[Tensor, "batch dim"], k: Float[Tensor, "batch dim"], ratio: float | Tensor
) -> Float[Tensor, "batch dim"]:
    """(1 + r) q - r k: from the key through the query and on, by a share r of their distance.

    Example:
        >>> [round(value, 3) for value in extrapolate(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 0.1).tolist()]
        [1.1, -0.1]
    """
    return q + ratio * (q - k)
