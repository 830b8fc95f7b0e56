"""How much of a bias a classifier has learned, and how well a translator changes the bias and keeps the signal."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


def bias_metrics(
    pred: Int[Tensor, "examples"], y: Int[Tensor, "examples"], bias: Int[Tensor, "examples"]
) -> dict[str, float]:
    """Accuracies by what the bias says; bias b is the typical one of class b.

    Args:
        pred: Predicted classes.
        y: True classes.
        bias: Known biases.

    Returns:
        All in [0, 1]: ``accuracy``, the plain one; ``unbiased``, the mean over the cells (class, bias) that have
        images; ``aligned`` and ``conflicting``, where the bias is that of the class and where not; ``worst group``, the
        lowest of a cell. NaN where there are no images.

    Raises:
        ValueError: If the three are not integers of one length.

    Example:
        >>> y, bias = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        >>> bias_metrics(bias, y, bias)["unbiased"]  # goes by the bias alone
        0.5
    """
    for name, values in (("pred", pred), ("y", y), ("bias", bias)):
        if values.is_floating_point() or values.shape != y.shape or values.ndim != 1:
            raise ValueError(f"{name} must be {len(y)} integers, got {values.dtype} of {tuple(values.shape)}")
    right, aligned = (pred == y).double(), bias == y
    _, cell = torch.stack([y, bias]).unique(dim=1, return_inverse=True) if len(y) else (None, y)
    counts = cell.bincount()
    cells = torch.zeros(len(counts), dtype=torch.float64, device=right.device).index_add_(0, cell, right) / counts

    def mean(values: Tensor) -> float:
        return float(values.mean()) if len(values) else math.nan

    return {
        "accuracy": mean(right),
        "unbiased": mean(cells),
        "aligned": mean(right[aligned]),
        "conflicting": mean(right[~aligned]),
        "worst group": float(cells.min()) if len(cells) else math.nan,
    }


def translation_rates(
    bias: Int[Tensor, "images"], signal: Int[Tensor, "images"], y: Int[Tensor, "images"], targets: Int[Tensor, "images"]
) -> dict[str, float]:
    """What translating changed, over the images whose target is not their own class.

    Args:
        bias: Of the translated images, as someone reads it who knows it: nearest colour, a biased classifier.
        signal: Class of the translated images, by someone who does not see the bias.
        y: Classes before.
        targets: Classes that they were turned into.

    Returns:
        Shares in [0, 1], NaN where every target is the image's own class: ``bias transfer``, whose bias is that of the
        target; ``signal kept``, whose signal is still that of ``y``; ``signal flip``, whose signal is the target's.

    Example:
        >>> given = torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([1, 1]), torch.tensor([0, 1])
        >>> translation_rates(*given)
        {'bias transfer': 1.0, 'signal kept': 1.0, 'signal flip': 0.0}
    """
    other = targets != y
    pairs: dict[str, Any] = {
        "bias transfer": bias == targets,
        "signal kept": signal == y,
        "signal flip": signal == targets,
    }
    some = bool(other.any())
    return {name: float(same[other].double().mean()) if some else math.nan for name, same in pairs.items()}
