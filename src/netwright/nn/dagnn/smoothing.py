"""How alike the representations of all nodes have become: the smoothness metric value.

Liu, Gao and Ji, "Towards Deeper Graph Neural Networks", KDD 2020, arXiv:2007.09296:

    D(a, b) = 1/2 | a/|a| - b/|b| |,   SMV = mean over pairs i != j of D(x_i, x_j)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 2**22  # numbers of a block of distances: 32 MB


def smoothness(
    x: Float[Tensor, "nodes features"],
    max_pairs: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """The mean distance of the directions of two nodes: 0 where all agree, 1 where two are opposite.

    A row of zeros has distance 1/2 to any other direction. Computed in float64.

    Args:
        x: At least two rows, finite.
        max_pairs: Draws so many pairs, with replacement, where there are more; all pairs by default.
        generator: Of the pairs.

    Raises:
        ValueError: If there are fewer than two rows, values that are not finite, or ``max_pairs`` is below 1.

    Example:
        >>> smoothness(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor(0.7071)
    """
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"x must have shape (nodes, features) with at least 2 nodes, got {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite, got NaN or an infinity")
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"max_pairs must be >= 1, got {max_pairs}")
    # By the largest number first: the squares of tiny ones would vanish.
    wide = x.detach().double()
    wide = wide / wide.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    unit = wide / wide.norm(dim=1, keepdim=True).clamp_min(0.5)
    n = len(unit)
    if max_pairs is not None and max_pairs < n * (n - 1) // 2:
        first = torch.randint(n, (max_pairs,), generator=generator).to(x.device)
        other = torch.randint(n - 1, (max_pairs,), generator=generator).to(x.device)
        other += other >= first
        return ((unit[first] - unit[other]).norm(dim=1).mean() / 2).to(x.dtype)
    squares = unit.square().sum(1)
    total = unit.new_zeros(())
    for places in torch.arange(n, device=x.device).split(max(1, _BLOCK // n)):
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, whose rounding would give equal directions a distance of 1e-8.
        gaps = torch.addmm(squares[places, None] + squares, unit[places], unit.T, alpha=-2)
        total += torch.where(gaps > 1e-14, gaps, 0).sqrt().sum()
    return (total / (2 * n * (n - 1))).to(x.dtype)
