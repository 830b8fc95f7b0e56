"""Inputs that a network gets wrong, found by its gradient: FGSM, PGD and the saliency map attack.

    x' = x + eps sign(grad_x L(x, y))                                                   FGSM
    x <- P(x + alpha sign(grad_x L(x, y))),  P onto the box around the first x           PGD

Goodfellow, Shlens and Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015, arXiv:1412.6572; Madry et
al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv:1706.06083; Papernot et al., "The
Limitations of Deep Learning in Adversarial Settings", EuroS&P 2016, arXiv:1511.07528.
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


def jsma(
    model: nn.Module,
    image: Float[Tensor, " *shape"],
    label: int,
    theta: float,
    *,
    bounds: Bounds = (0.0, 1.0),
    pixels: int | None = None,
) -> Float[Tensor, " *shape"]:
    """The saliency map attack on one image: pairs of numbers are changed by ``theta`` until the class is another.

    In each step the pair (p, q) is taken whose gradients have the largest a |b| with a > 0 > b, where a is that of the
    target's logit and b that of all others together, summed over p and q; with a negative ``theta`` the signs are
    turned. The target is the most probable other class. A number at its bound is not changed further.

    Args:
        model: Gives logits.
        image: Within ``bounds``, without a batch.
        label: Its class.
        theta: Change of a number in one step, not 0.
        bounds: What numbers are cut off to.
        pixels: Most numbers that may change; all by default.

    Raises:
        ValueError: If ``theta`` is 0 or not finite.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
        >>> jsma(net, torch.rand(1, 4, 4), 0, 0.1).shape
        torch.Size([1, 4, 4])
    """
    if theta == 0 or not math.isfinite(theta):
        raise ValueError(f"theta must be finite and not 0, got {theta}")
    x = image.detach().clone()
    most = x.numel() if pixels is None else pixels
    touched = torch.zeros(x.numel(), dtype=torch.bool)
    target: int | None = None
    with in_mode(model, training=False), frozen_statistics(model), torch.enable_grad():
        while True:
            one = x[None].requires_grad_()
            logits = model(one)[0]
            if int(logits.argmax()) != label:
                return x.detach()
            if target is None:
                target = int(logits.detach().index_fill(0, torch.tensor([label]), -math.inf).argmax())
            towards = torch.autograd.grad(logits[target], one, retain_graph=True)[0].flatten()
            away = torch.autograd.grad(logits.sum(), one)[0].flatten() - towards
            flat = x.flatten()
            free = flat < bounds[1] if theta > 0 else flat > bounds[0]
            if int(touched.sum()) + 2 > most:
                free &= touched
            places = free.nonzero().flatten()
            if len(places) < 2:
                return x.detach()
            sign = 1 if theta > 0 else -1
            a = sign * (towards[places, None] + towards[places])
            b = sign * (away[places, None] + away[places])
            score = torch.where((a > 0) & (b < 0), -a * b, -math.inf).fill_diagonal_(-math.inf)
            if not bool((score > 0).any()):
                return x.detach()
            pair = places[torch.tensor(divmod(int(score.argmax()), len(places)))]
            flat[pair] = (flat[pair] + theta).clamp(*bounds)
            touched[pair] = True
            x = flat.view_as(image).detach()


def _check(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")
