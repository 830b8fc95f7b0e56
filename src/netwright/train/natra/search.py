"""Which natural transformation an image is trained with: one at random, the worst of k, or one found by its gradient.

    (j*, eps*) = argmax over the candidates of CE(f(T_{j,eps}(x)), y)

The adversarial choice is netwright's reading of arXiv:2105.04070. Everything here is free of side effects: networks are
asked for logits without their statistics being changed, and random numbers are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from netwright.train.natra.transform import NaturalTransform, TransformGrid

Search = Literal["random", "worst_of_k", "pgd"]
Source = NaturalTransform | TransformGrid
PGD_STEPS = 5


def check_range(eps_max: float, k: int = 1) -> None:
    """Refuses steps and counts that mean nothing.

    Raises:
        ValueError: If ``eps_max`` is not positive and finite, or ``k`` below 1.
    """
    if not 0 < eps_max < math.inf:
        raise ValueError(f"eps_max must be > 0 and finite, got {eps_max}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")


@torch.no_grad()
def random_transform(
    source: Source, index: Int[Tensor, "batch"], draws: Float[Tensor, "batch 2"], *, eps_max: float = 2.0
) -> Float[Tensor, "batch ..."]:
    """Each image under one transformation, uniform over directions and steps.

    Args:
        source: Transformations, or a grid of what they make.
        index: Of the images in ``source``.
        draws: Two numbers in [0, 1) for each image, as ``torch.rand`` gives them.
        eps_max: Largest step, in standard deviations, > 0.

    Raises:
        ValueError: If ``eps_max`` is not positive.
    """
    check_range(eps_max)
    return source.at(index, *source.choose(draws, eps_max))


@torch.no_grad()
def worst_of_k(
    source: Source,
    logits_of: Callable[[Tensor], Tensor],
    index: Int[Tensor, "batch"],
    labels: Tensor,
    draws: Float[Tensor, "k batch 2"],
    *,
    eps_max: float = 2.0,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch"]]:
    """Each image under that of k random transformations on which the network's loss is largest.

    More draws after the same first ones find nothing less bad.

    Args:
        source: Transformations, or a grid of what they make.
        logits_of: Logits of images in [0, 1]; in evaluation mode, so that no statistics are changed.
        index: Of the images in ``source``.
        labels: Their classes, or rows of probabilities.
        draws: Two numbers in [0, 1) for each of k candidates of each image, k >= 1, as ``torch.rand`` gives them.
        eps_max: Largest step, in standard deviations, > 0.

    Returns:
        The images, and their cross-entropy in nats.

    Raises:
        ValueError: If ``eps_max`` is not positive, or there are no draws.
    """
    check_range(eps_max, len(draws))
    worst: Tensor | None = None
    loss = torch.empty(0)
    for pairs in draws:
        images = source.at(index, *source.choose(pairs, eps_max))
        found = functional.cross_entropy(logits_of(images).float(), labels, reduction="none")
        if worst is None:
            worst, loss = images, found
            continue
        more = found > loss
        loss = torch.where(more, found, loss)
        worst = torch.where(more.view(-1, *[1] * (images.ndim - 1)).to(images.device), images, worst)
    assert worst is not None
    return worst, loss


def pgd_transform(
    transform: NaturalTransform,
    logits_of: Callable[[Tensor], Tensor],
    index: Int[Tensor, "batch"],
    labels: Tensor,
    *,
    eps_max: float = 2.0,
    steps: int = PGD_STEPS,
    coeff: Float[Tensor, "batch directions"] | None = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch"], Float[Tensor, "batch directions"]]:
    """Each image moved along all directions at once, uphill in the loss: signs of the gradient through the generator.

    Args:
        transform: Transformations; a grid has no gradient.
        logits_of: Logits of images in [0, 1], in evaluation mode.
        index: Of the images in ``transform``.
        labels: Their classes, or rows of probabilities.
        eps_max: Largest |c_j|, in standard deviations, > 0.
        steps: Of eps_max / 4 each, >= 1.
        coeff: Where to start; 0 by default.

    Returns:
        Of the points of the way the worst: images, cross-entropy in nats, coefficients.

    Raises:
        ValueError: If ``eps_max`` or ``steps`` is out of its range.
    """
    check_range(eps_max)
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if coeff is None:
        coeff = transform.codes.w.new_zeros(len(index), transform.num_directions)
    best = coeff.detach().clone()
    worst, loss = torch.empty(0), torch.empty(0)
    for step in range(steps + 1):
        with torch.enable_grad():
            at = coeff.detach().requires_grad_()
            images = transform(index, at)
            each = functional.cross_entropy(logits_of(images).float(), labels, reduction="none")
            (slope,) = torch.autograd.grad(each.sum(), at) if step < steps else (torch.zeros_like(at),)
        images, each = images.detach(), each.detach()
        if step == 0:
            worst, loss = images, each
        else:
            more = each > loss
            loss = torch.where(more, each, loss)
            more = more.to(best.device)
            best = torch.where(more[:, None], at.detach(), best)
            worst = torch.where(more.view(-1, *[1] * (images.ndim - 1)), images, worst)
        coeff = (at.detach() + eps_max / 4 * slope.sign()).clamp(-eps_max, eps_max)
    return worst, loss, best
