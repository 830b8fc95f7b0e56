"""What trainings against a critic share: the penalty on its slope, and a block in which it gets no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn


def gradient_penalty(
    D: Callable[[Tensor], Any],
    real: Float[Tensor, "batch *image"],
    fake: Float[Tensor, "batch *image"],
    generator: Generator | None = None,
) -> Float[Tensor, ""]:
    """How far the critic's slope is from 1 between real and made images: the mean of (|grad D| - 1)^2.

    Gulrajani et al., "Improved Training of Wasserstein GANs", NeurIPS 2017, arXiv:1704.00028. The slope is that of the
    *sum* of what D gives for an image, as StarGAN has it for a map of patches; it can be differentiated again.

    Args:
        D: Gives numbers (batch, ...), or a tuple that begins with them.
        real: Images.
        fake: As many made ones, of the same shape.
        generator: Of the place on the line between the two, uniform for each pair; the global one by default.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> round(gradient_penalty(lambda x: 3 * x, torch.zeros(2, 1), torch.ones(2, 1)).item(), 6)
        4.0
    """
    if real.shape != fake.shape or real.ndim < 2:
        raise ValueError(
            f"real and fake must have one shape (batch, ...), got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    place = torch.rand(len(real), *[1] * (real.ndim - 1), generator=generator, dtype=real.dtype).to(real.device)
    between = torch.lerp(fake.detach(), real.detach(), place).requires_grad_()
    with torch.enable_grad():
        given = D(between)
        source = given[0] if isinstance(given, tuple) else given
        (slope,) = torch.autograd.grad(source.sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Its parameters ask for no gradient inside the block, so that a backward pass leaves none on them."""
    asking = [param for param in module.parameters() if param.requires_grad]
    try:
        for param in asking:
            param.requires_grad_(False)
        yield
    finally:
        for param in asking:
            param.requires_grad_(True)
