"""Where the keys of a discrete key-value bottleneck (arXiv:2207.11240) start, and what draws them to the data."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from netwright.console import warn
from netwright.nn.kv_bottleneck.lookup import nearest_keys

KeyInit = Literal["sample", "kmeans", "normal"]
LLOYD_STEPS = 10


def wide(index: Int[Tensor, "codebooks heads"], dim: int) -> Int[Tensor, "codebooks heads dim"]:
    """An index of heads or keys as ``gather`` and ``scatter_add_`` want it."""
    return index[..., None].expand(-1, -1, dim)


def totals(
    heads: Float[Tensor, "codebooks heads dim"], codes: Int[Tensor, "codebooks heads"], pairs: int
) -> tuple[Float[Tensor, "codebooks pairs"], Float[Tensor, "codebooks pairs dim"]]:
    """How many heads have each key for their nearest, and their sum.

    Example:
        >>> counts, sums = totals(torch.tensor([[[1.0], [2.0], [5.0]]]), torch.tensor([[0, 0, 1]]), 2)
        >>> counts.tolist(), sums.flatten().tolist()
        ([[2.0, 1.0]], [3.0, 5.0])
    """
    books, _, dim = heads.shape
    counts = heads.new_zeros(books, pairs).scatter_add_(1, codes, torch.ones_like(heads[..., 0]))
    sums = heads.new_zeros(books, pairs, dim).scatter_add_(1, wide(codes, dim), heads)
    return counts, sums


@torch.no_grad()
def first_keys(
    heads: Float[Tensor, "codebooks heads dim"], pairs: int, how: KeyInit, generator: Generator | None = None
) -> Float[Tensor, "codebooks pairs dim"]:
    """Keys for a first batch of heads.

    Args:
        heads: At least one; fewer than keys are drawn with replacement, with a warning.
        pairs: Keys of a codebook.
        how: ``"sample"``: random heads; ``"kmeans"``: ten steps of Lloyd's algorithm from there; ``"normal"``: random
            points with the mean and the deviation of the heads in each direction.
        generator: On the CPU; the global one by default.
    """
    books, count, dim = heads.shape
    if how == "normal":
        noise = torch.randn(books, pairs, dim, generator=generator).to(heads)
        return noise * heads.std(1, keepdim=True, correction=0) + heads.mean(1, keepdim=True)
    if count < pairs:
        warn(f"{pairs} keys start from {count} embeddings, so that some are equal: give more of them")
        chosen = torch.randint(count, (books, pairs), generator=generator)
    else:
        chosen = torch.rand(books, count, generator=generator).topk(pairs, dim=1, sorted=False).indices
    keys = heads.gather(1, wide(chosen.to(heads.device), dim))
    for _ in range(LLOYD_STEPS if how == "kmeans" else 0):
        counts, sums = totals(heads, nearest_keys(heads, keys), pairs)
        keys = torch.where(counts[..., None] > 0, sums / counts[..., None].clamp(min=1), keys)
    return keys
