"""Labels made wrong on purpose, with what was changed."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Int
from torch import Generator, Tensor


def symmetric_noise(
    labels: Int[Tensor, " examples"],
    rate: float,
    num_classes: int,
    generator: Generator,
    exclude_true: bool = False,
) -> tuple[Int[Tensor, " examples"], Bool[Tensor, " examples"]]:
    """Draws the labels of a share of the examples anew, uniformly over the classes.

    Args:
        labels: In 0..num_classes - 1.
        rate: Share of the examples whose label is drawn anew, rounded up, in [0, 1].
        num_classes: C; without ``exclude_true`` a share 1 / C of the new labels is right by chance.
        generator: Of the choice and of the labels.
        exclude_true: Draw among the other classes, so that every new label is wrong.

    Returns:
        The labels, and which of them are other than before.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> labels, generator = torch.zeros(10, dtype=torch.int64), Generator().manual_seed(0)
        >>> noisy, changed = symmetric_noise(labels, 0.3, 5, generator, exclude_true=True)
        >>> int(changed.sum()), bool((noisy[~changed] == 0).all())
        (3, True)
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be one whole number an example, got {labels.dtype} of {tuple(labels.shape)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    count = math.ceil(rate * len(labels) - 1e-9)
    chosen = torch.randperm(len(labels), generator=generator)[:count]
    noisy = labels.clone()
    if exclude_true:
        shift = torch.randint(1, num_classes, (count,), generator=generator)
        noisy[chosen] = (labels[chosen] + shift) % num_classes
    else:
        noisy[chosen] = torch.randint(0, num_classes, (count,), generator=generator)
    return noisy, noisy != labels
