"""Which weights to keep for an exact ratio: the choice behind magnitude pruning.

Lee, Park, Mo, Ahn and Shin, "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv:2010.07611:
with the weights of a layer in ascending order of size, the u-th has the score

    score(u) = W_u^2 / sum_{v >= u} W_v^2

and one threshold holds for the scores of all layers (scope ``"lamp"``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.nn.sparse import FixedMask, effective_weight, mask_of, top_k_mask

Scope = Literal["layer", "global", "lamp"]


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """The sparsity as a float.

    Raises:
        ValueError: If it is outside [0, 1).
    """
    value = float(sparsity)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {sparsity}")
    return value


@torch.no_grad()
def exact_masks(
    chosen: Sequence[nn.Module], sparsity: float, scope: Scope, keep_at_least: int, *, regrow: bool = False
) -> list[Tensor]:
    """The 0/1 mask of each layer's weight; together they keep exactly round((1 - sparsity) n) of n weights.

    Args:
        chosen: Layers, with or without a :class:`~netwright.nn.sparse.FixedMask`.
        sparsity: Share of zeros, in [0, 1).
        scope: ``"layer"`` gives every layer the same share, as nearly as whole numbers allow; ``"global"``
            keeps the largest weights wherever they are; ``"lamp"`` those with the largest :func:`lamp_scores`,
            of which every layer has one at least.
        keep_at_least: Weights that every layer keeps (all that it has, if fewer), >= 0.
        regrow: Whether masked weights may be chosen.

    Raises:
        ValueError: If an argument is out of bounds, or the ratio leaves too few weights, or more than there
            are.

    Example:
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[0.1, -3.0, 2.0, 0.2]])
        >>> exact_masks([layer], 0.5, "layer", 1)
        [tensor([[0., 1., 1., 0.]])]
    """
    check_sparsity(sparsity)
    one_of("scope", scope, get_args(Scope))
    if keep_at_least < 0:
        raise ValueError(f"keep_at_least must be >= 0, got {keep_at_least}")
    scores = [_scores(layer, regrow) for layer in chosen]
    sizes = [score.numel() for score in scores]
    keep = round((1 - sparsity) * sum(sizes))
    most = [
        int((score > 0).sum()) if isinstance(mask_of(layer), FixedMask) and not regrow else score.numel()
        for layer, score in zip(chosen, scores, strict=True)
    ]
    least = [min(keep_at_least, m) for m in most]
    if keep < sum(least):
        raise ValueError(
            f"sparsity must leave {keep_at_least} or more weights in each of {len(chosen)} layers: at most "
            f"{1 - sum(least) / sum(sizes):.6g}, got {sparsity}"
        )
    if keep > sum(most):
        raise ValueError(
            f"sparsity must be >= {1 - sum(most) / sum(sizes):.6g}, which the module has already, unless weights "
            f"may regrow; got {sparsity}"
        )
    if scope != "global":
        counts = _shares(keep, sizes, least, most) if scope == "layer" else _lamp_counts(scores, keep, least)
        return [_largest(score, n) for score, n in zip(scores, counts, strict=True)]
    flat = [
        torch.where(_largest(score, n) > 0, torch.inf, score).flatten().to(scores[0].device)
        for score, n in zip(scores, least, strict=True)
    ]
    whole = _largest(torch.cat(flat), keep)
    return [part.view_as(score).to(score) for part, score in zip(whole.split(sizes), scores, strict=True)]


def lamp_scores(weight: Float[Tensor, "*shape"]) -> Float[Tensor, "weights"]:
    """How much of what would be left of a layer goes with each weight, if all smaller ones went before it.

    The largest weight has the score 1 and no other more than 1/2, so one threshold for all layers keeps a weight of
    each. Scaling a layer does not change its scores.

    Args:
        weight: The weights of one layer, finite; only their sizes matter.

    Returns:
        Scores in [0, 1], float64, on the CPU, of the weights in ascending order of size; 0 exactly where the weight
        is 0.

    Example:
        >>> lamp_scores(torch.tensor([2.0, -4.0, 1.0]))
        tensor([0.0476, 0.2000, 1.0000], dtype=torch.float64)
    """
    # NumPy sorts values alone, many times as fast as torch, which always sorts their places too.
    size = torch.from_numpy(np.sort(weight.detach().abs().flatten().double().cpu().numpy()))
    smallest = torch.finfo(torch.float64).tiny
    # In units of the largest, since squares of small weights would be nothing, even in float64.
    square = (size / size[-1].clamp_min(smallest)).square()
    left = square.flip(0).cumsum(0).flip(0)
    return torch.where(size > 0, (square / left).clamp_min(smallest), 0.0)


def _lamp_counts(scores: list[Tensor], keep: int, least: list[int]) -> list[int]:
    """How many weights of each layer are among the ``keep`` with the largest LAMP scores."""
    ranks = [lamp_scores(score) for score in scores]
    for rank, n in zip(ranks, least, strict=True):
        rank[len(rank) - n :] = torch.inf
    chosen = _largest(torch.cat(ranks), keep)
    return [int(part.sum()) for part in chosen.split([len(rank) for rank in ranks])]


def _scores(layer: nn.Module, regrow: bool) -> Tensor:
    """Sizes of the weights; unless they may regrow, 0 where a mask is and above 0 elsewhere in that layer."""
    mask = mask_of(layer)
    if not isinstance(mask, FixedMask):
        return effective_weight(layer).detach().abs()
    keep = mask.mask().clone()
    if regrow:
        mask.set_mask(torch.ones_like(keep))
        try:
            return effective_weight(layer).detach().abs()
        finally:
            mask.set_mask(keep)
    size = effective_weight(layer).detach().abs()
    return torch.where(keep > 0, size.clamp_min(torch.finfo(size.dtype).tiny), 0)


def _largest(scores: Tensor, count: int) -> Tensor:
    return top_k_mask(scores, count / scores.numel()) if count else torch.zeros_like(scores)


def _shares(total: int, sizes: list[int], least: list[int], most: list[int]) -> list[int]:
    """Divides ``total`` in proportion to ``sizes``, each share between ``least`` and ``most``.

    Integers throughout: shares that leave their bounds are fixed there, the others divide the rest, and what
    rounding down leaves goes to the largest remainders.
    """
    fixed: dict[int, int] = {}
    while True:
        free = [i for i in range(len(sizes)) if i not in fixed]
        rest, size = total - sum(fixed.values()), sum(sizes[i] for i in free)
        low = [i for i in free if rest * sizes[i] < least[i] * size]
        high = [i for i in free if rest * sizes[i] > most[i] * size]
        if not low and not high:
            break
        lacking = sum(least[i] * size - rest * sizes[i] for i in low)
        exceeding = sum(rest * sizes[i] - most[i] * size for i in high)
        fixed |= {i: least[i] for i in low} if lacking >= exceeding else {i: most[i] for i in high}
    shares = fixed | {i: rest * sizes[i] // size for i in free}
    by_remainder = sorted(free, key=lambda i: -(rest * sizes[i] % size))
    for i in by_remainder[: total - sum(shares.values())]:
        shares[i] += 1
    return [shares[i] for i in range(len(sizes))]
