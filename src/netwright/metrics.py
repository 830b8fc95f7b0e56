"""Metrics of classifiers: likelihood, calibration, and how well confidence ranks the errors; correlation.

Definitions of Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021,
arXiv:2006.12000; every part of netwright uses these and no others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def _check(probs: Tensor, labels: Tensor) -> None:
    if probs.ndim != 2:
        raise ValueError(f"probs must have shape (examples, classes), got {tuple(probs.shape)}")
    if labels.shape != probs.shape[:1]:
        raise ValueError(f"labels must have shape ({probs.shape[0]},), got {tuple(labels.shape)}")
    if len(labels) == 0:
        raise ValueError("labels must hold at least 1 example, got 0")
    if labels.min() < 0 or labels.max() >= probs.shape[1]:
        raise ValueError(f"labels must lie in 0..{probs.shape[1] - 1}, got {int(labels.min())}..{int(labels.max())}")


def accuracy(probs: Float[Tensor, "examples classes"], labels: Int[Tensor, "examples"]) -> float:
    """Share of examples whose most probable class is the true one, in [0, 1]; logits serve as well.

    Example:
        >>> accuracy(torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1]))
        0.5
    """
    _check(probs, labels)
    return float((probs.argmax(1) == labels).double().mean())


def nll(probs: Float[Tensor, "examples classes"], labels: Int[Tensor, "examples"]) -> float:
    """Mean negative log-likelihood of the true class, in nats.

    Example:
        >>> round(nll(torch.tensor([[0.5, 0.5]]), torch.tensor([1])), 4)
        0.6931
    """
    _check(probs, labels)
    return float(-probs.double().gather(1, labels[:, None]).clamp_min(1e-300).log().mean())


def expected_calibration_error(
    probs: Float[Tensor, "examples classes"], labels: Int[Tensor, "examples"], n_bins: int = 10
) -> float:
    """Expected calibration error in percent: ``100 sum_b (n_b / n) |accuracy_b - confidence_b|``.

    Args:
        probs: Class probabilities.
        labels: True classes.
        n_bins: Equal-width bins (lo, hi] of the largest probability.

    Raises:
        ValueError: If shapes disagree, a label is out of range, or ``n_bins`` is below 1.

    Example:
        >>> probs = torch.tensor([[.95, .05], [.85, .15], [.65, .35], [.55, .45]])
        >>> round(expected_calibration_error(probs, torch.tensor([0, 0, 1, 0])), 3)
        32.5
    """
    _check(probs, labels)
    if n_bins < 1:
        raise ValueError(f"n_bins must be >= 1, got {n_bins}")
    confidence, predicted = probs.double().max(1)
    correct = (predicted == labels).double()
    bins = (torch.ceil(confidence * n_bins).long() - 1).clamp(0, n_bins - 1)
    gap = torch.zeros(n_bins, dtype=torch.float64).index_add_(0, bins.cpu(), (correct - confidence).cpu())
    return float(100 * gap.abs().sum() / len(labels))


def _risks(probs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    _check(probs, labels)
    confidence, predicted = probs.double().max(1)
    order = torch.argsort(confidence, descending=True, stable=True)
    errors = (predicted != labels).double()[order]
    counts = torch.arange(1, len(labels) + 1, dtype=torch.float64, device=errors.device)
    return errors.cumsum(0) / counts, int(errors.sum())


def aurc(probs: Float[Tensor, "examples classes"], labels: Int[Tensor, "examples"]) -> float:
    """Area under the risk-coverage curve, times 1000: the mean over k of the error among the k most confident.

    Example:
        >>> probs = torch.tensor([[.95, .05], [.85, .15], [.65, .35], [.55, .45]])
        >>> round(aurc(probs, torch.tensor([0, 0, 1, 0])), 3)
        145.833
    """
    risks, _ = _risks(probs, labels)
    return float(1000 * risks.mean())


def eaurc(probs: Float[Tensor, "examples classes"], labels: Int[Tensor, "examples"]) -> float:
    """Excess of :func:`aurc` over the best possible ranking with the same number of errors, times 1000.

    Example:
        >>> probs = torch.tensor([[.95, .05], [.85, .15], [.65, .35], [.55, .45]])
        >>> round(eaurc(probs, torch.tensor([0, 0, 1, 0])), 3)
        83.333
    """
    risks, errors = _risks(probs, labels)
    n = len(labels)
    j = torch.arange(1, errors + 1, dtype=torch.float64)
    best = (j / (n - errors + j)).sum() / n
    return float(1000 * (risks.mean().cpu() - best))


def pearson(x: Sequence[float] | Tensor, y: Sequence[float] | Tensor) -> float:
    """Linear correlation ``sum (x - mean x)(y - mean y) / (n s_x s_y)`` of two series, in [-1, 1].

    Raises:
        ValueError: If the series are not of one length, at least 2, or one is constant or not finite.

    Example:
        >>> round(pearson([1, 2, 3], [2.0, 4.0, 7.0]), 4)
        0.9934
    """
    pair = [torch.as_tensor(side, dtype=torch.float64).cpu() for side in (x, y)]
    if pair[0].ndim != 1 or pair[0].shape != pair[1].shape or len(pair[0]) < 2:
        shapes = " and ".join(str(tuple(side.shape)) for side in pair)
        raise ValueError(f"x and y must be two series of one length, at least 2, got shapes {shapes}")
    for name, side in zip("xy", pair, strict=True):
        if not side.isfinite().all() or bool((side == side[0]).all()):
            raise ValueError(f"{name} must be finite and not constant, got {side.tolist()[:5]}")
    gaps = [side - side.mean() for side in pair]
    units = [gap / torch.linalg.vector_norm(gap) for gap in gaps]
    return float((units[0] @ units[1]).clamp(-1, 1))
