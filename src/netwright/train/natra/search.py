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
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.train.natra.transform import NaturalTransform, TransformGrid

Search = Literal["random", "worst_of_k", "pgd"]
Source = NaturalTransform | TransformGrid
PGD_STEPS = 5
TOGETHER = 2**18  # numbers of the images that pass through a network together without gradient


def check_range(eps_max: float, k: int = 1) -> None:
    """Refuses steps and counts that mean nothing.

    Raises:
        ValueError: If ``eps_max`` is not positive and finite, or ``k`` below 1.
    """
    if not 0 < eps_max < math.inf:
        raise ValueError(f"eps_max must be > 0 and finite, got {eps_max}")
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")


def depends_on_batch(network: nn.Module) -> bool:
    """Whether logits may depend on what else is in the batch: a part trains, or a batch norm has no statistics."""
    return any(
        part.training or (isinstance(part, _BatchNorm) and part.running_mean is None) for part in network.modules()
    )


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
    apart: bool | None = None,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch"]]:
    """Each image under that of k random transformations on which the network's loss is largest.

    More draws after the same first ones find nothing less bad. All candidates pass through the network together, equal
    ones once.

    Args:
        source: Transformations, or a grid of what they make.
        logits_of: Logits of images in [0, 1]; in evaluation mode, so that no statistics are changed.
        index: Of the images in ``source``.
        labels: Their classes, or rows of probabilities.
        draws: Two numbers in [0, 1) for each of k candidates of each image, k >= 1, as ``torch.rand`` gives them.
        eps_max: Largest step, in standard deviations, > 0.
        apart: Whether a batch of each candidate passes by itself, as logits that depend on what else is in the batch
            ask for. By default only where ``logits_of`` is a module that is in training mode, or has a batch norm
            without statistics.

    Returns:
        The images, and their cross-entropy in nats.

    Raises:
        ValueError: If ``eps_max`` is not positive, or there are no draws.
    """
    check_range(eps_max, len(draws))
    if apart is None:
        apart = isinstance(logits_of, nn.Module) and depends_on_batch(logits_of)
    direction, eps = (each.view(draws.shape[:2]) for each in source.choose(draws.flatten(0, 1), eps_max))
    images, which = source.candidates(index, direction, eps)
    if apart:
        losses = torch.stack([_losses(logits_of, images[rows], labels) for rows in which])
    else:
        owner = torch.empty(len(images), dtype=torch.long)
        owner[which] = torch.arange(len(index)).expand_as(which)
        largest = max(2 * len(index), TOGETHER // max(1, images[:1].numel()))
        pieces = max(1, math.ceil(len(images) / largest))
        both = zip(images.chunk(pieces), owner.chunk(pieces), strict=True)
        losses = torch.cat([_losses(logits_of, part, labels[rows]) for part, rows in both])[which]
    # The first of equal ones; a loss that is no number is never the largest.
    best = losses.masked_fill(losses.isnan(), -math.inf).argmax(0, keepdim=True)
    chosen = which.to(images.device).gather(0, best.to(images.device))[0]
    return images[chosen], losses.gather(0, best)[0]


def _losses(logits_of: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits_of(images).float(), labels, reduction="none")


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
    best, still = coeff.detach().clone(), transform.still(index)
    worst, loss = torch.empty(0), torch.empty(0)
    for step in range(steps + 1):
        with torch.enable_grad():
            at = coeff.detach().requires_grad_()
            images = transform(index, at, still=still)
            each = _losses(logits_of, images, labels)
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
