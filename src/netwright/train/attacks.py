"""Inputs that a network gets wrong, found by its gradient: FGSM and PGD.

    x' = x + eps sign(grad_x L(x, y))                                                   FGSM
    x <- P(x + alpha sign(grad_x L(x, y))),  P onto the box around the first x           PGD

Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv:1412.6572; Madry et
al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.batchnorm import frozen_statistics
from netwright.nn.modes import in_mode

Bounds = tuple[float, float]


def input_gradient(
    model: nn.Module, images: Float[Tensor, "batch *shape"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "batch *shape"]:
    """Gradient of each image's cross-entropy with respect to it; the model is left as it was.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> input_gradient(net, torch.rand(4, 3), torch.zeros(4, dtype=torch.long)).shape
        torch.Size([4, 3])
    """
    with in_mode(model, training=False), frozen_statistics(model), torch.enable_grad():
        x = images.detach().requires_grad_()
        loss = functional.cross_entropy(model(x), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def fgsm(
    model: nn.Module,
    images: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, " batch"],
    eps: float,
    *,
    bounds: Bounds = (0.0, 1.0),
) -> Float[Tensor, "batch *shape"]:
    """One step of length ``eps`` in every number, uphill in the loss.

    Args:
        model: Gives logits.
        images: Within ``bounds``.
        labels: Their classes.
        eps: Length of the step, >= 0.
        bounds: What numbers are cut off to.

    Raises:
        ValueError: If ``eps`` is negative or not finite.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> x = torch.rand(4, 3)
        >>> bool(((fgsm(net, x, torch.zeros(4, dtype=torch.long), 0.1) - x).abs() <= 0.1 + 1e-6).all())
        True
    """
    _check("eps", eps)
    return (images + eps * input_gradient(model, images, labels).sign()).clamp(*bounds).detach()


def pgd(
    model: nn.Module,
    images: Float[Tensor, "batch *shape"],
    labels: Int[Tensor, " batch"],
    lower: Float[Tensor, "batch *shape"],
    upper: Float[Tensor, "batch *shape"],
    *,
    steps: int = 10,
    step: float = 0.25,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch *shape"]:
    """Steps uphill in the loss inside a box; of each image the first point of the way that is wrong, else the last.

    Args:
        model: Gives logits.
        images: Within the box.
        labels: Their classes.
        lower: Least value of each number.
        upper: Largest.
        steps: How many, at least 1.
        step: Length of one, as a share of the box's width.
        generator: Draws the place to begin at; the images themselves when None.

    Raises:
        ValueError: If ``steps`` is below 1 or ``step`` is not positive.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> x = torch.rand(4, 3)
        >>> found = pgd(net, x, torch.zeros(4, dtype=torch.long), x - 0.1, x + 0.1)
        >>> bool(((found - x).abs() <= 0.1 + 1e-6).all())
        True
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if not step > 0:
        raise ValueError(f"step must be > 0, got {step}")
    x = images.detach()
    if generator is not None:
        x = lower + (upper - lower) * torch.rand(x.shape, generator=generator, dtype=x.dtype)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    tail = [1] * (x.ndim - 1)
    for _ in range(steps):
        moved = x + step * (upper - lower) * input_gradient(model, x, labels).sign()
        moved = torch.minimum(torch.maximum(moved, lower), upper)
        x = torch.where(done.view(-1, *tail), x, moved)
        with in_mode(model, training=False), torch.no_grad():
            done |= model(x).argmax(1) != labels
        if bool(done.all()):
            break
    return x.detach()


def _check(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")
