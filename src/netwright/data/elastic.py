"""Elastic deformation: every image is pulled about by a smooth random field of its own.

Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis",
ICDAR 2003, doi:10.1109/ICDAR.2003.1227801.

    x'(i, j) = x(i + alpha (G * u)(i, j), j + alpha (G * v)(i, j)),    u, v uniform on [-1, 1], G a Gaussian of sigma

The Gaussian is separable and each axis is short, so smoothing is a product with one banded matrix an axis, for the
fields of the whole batch at once; no image is filtered by itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional

from netwright.data.augment import Augmentation, Parameters, Shape

TRUNCATE = 4.0  # the Gaussian ends after so many sigma


class Elastic(Augmentation):
    """Elastic deformation, with a field of displacements for each image that all its channels share.

    Args:
        alpha: Scale of the displacements, >= 0. What is scaled is smoothed noise, whose standard deviation away from
            the border is about 0.16 / sigma: 20 with sigma 4 moves a pixel by 0.8 pixels (standard deviation, each
            axis).
        sigma: Width of the Gaussian in pixels, > 0.

    Raises:
        ValueError: If ``alpha`` is negative or ``sigma`` is not positive, or the images are not floats.

    Example:
        >>> images = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
        >>> Elastic(20, 4)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 28, 28])
        >>> torch.allclose(Elastic(0, 4)(images, torch.Generator()), images, atol=1e-5)
        True
    """

    def __init__(self, alpha: float = 20.0, sigma: float = 4.0):
        if not alpha >= 0:
            raise ValueError(f"alpha must be >= 0, got {alpha}")
        if not sigma > 0:
            raise ValueError(f"sigma must be > 0, got {sigma}")
        self.alpha, self.sigma = alpha, sigma

    def __repr__(self) -> str:
        return f"Elastic(alpha={self.alpha:g}, sigma={self.sigma:g})"

    def draw(self, count: int, shape: Shape, generator: Generator | None) -> Parameters:
        """Displacements (count, 2, height, width) in pixels, downwards and to the right."""
        _, height, width = shape
        noise = torch.empty(count, 2, height, width).uniform_(-self.alpha, self.alpha, generator=generator)
        return (smoothed(noise, self.sigma, out=noise),)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Each image read where its field points to."""
        (displacement,) = parameters
        return displaced(images, displacement)


def smoothed(
    fields: Float[Tensor, "*batch height width"], sigma: float, *, out: Tensor | None = None
) -> Float[Tensor, "*batch height width"]:
    """Fields under a Gaussian that ends after 4 sigma, with zeros around them.

    Args:
        fields: Any number of them.
        sigma: Width of the Gaussian in pixels, > 0.
        out: Where the result goes, which may be ``fields``; new memory by default.

    Example:
        >>> spike = torch.zeros(9, 9)
        >>> spike[4, 4] = 1.0
        >>> float(smoothed(spike, 0.5).sum().round(decimals=5))  # no mass is lost away from the border
        1.0
    """
    down, across = (_gaussian(side, sigma, fields) for side in fields.shape[-2:])
    return torch.matmul(down, fields @ across, out=out)


def _gaussian(side: int, sigma: float, like: Tensor) -> Float[Tensor, "side side"]:
    """The (symmetric) matrix whose row i holds the weights that the places of an axis have for place i."""
    reach = int(TRUNCATE * sigma + 0.5)
    weight = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma).square())
    weight = weight / weight.sum()
    distance = (torch.arange(side)[:, None] - torch.arange(side)).abs()
    band = torch.where(distance <= reach, weight[reach + distance.clamp(max=reach)], 0.0)
    return band.to(like)


def displaced(
    images: Float[Tensor, "batch channels height width"], displacement: Float[Tensor, "batch two height width"]
) -> Float[Tensor, "batch channels height width"]:
    """Images read at displaced places, linear between pixels; what lies beyond the outer pixels' centres is 0.

    Args:
        images: Floats.
        displacement: In pixels, downwards and to the right.

    Raises:
        ValueError: If the images are not floats or the displacement has another shape.

    Example:
        >>> image = torch.arange(6.0).view(1, 1, 2, 3)
        >>> right = torch.stack([torch.zeros(2, 3), torch.full((2, 3), 0.5)])[None]
        >>> displaced(image, right)[0, 0]
        tensor([[0.5000, 1.5000, 0.0000],
                [3.5000, 4.5000, 0.0000]])
    """
    if not images.is_floating_point():
        raise ValueError(f"images must be floats, got {images.dtype}")
    count, _, height, width = images.shape
    if displacement.shape != (count, 2, height, width):
        raise ValueError(f"displacement must be {(count, 2, height, width)}, got {tuple(displacement.shape)}")
    down, right = displacement.to(images).unbind(1)
    # grid_sample counts from -1 to 1 between the centres of the outer pixels.
    x = torch.add(_places(width, images), right, alpha=2 / max(1, width - 1))
    y = torch.add(_places(height, images)[:, None], down, alpha=2 / max(1, height - 1))
    grid = torch.stack([x, y], dim=1).permute(0, 2, 3, 1)  # pairs one by one would be copied several times slower
    inside = (x.abs_() <= 1) & (y.abs_() <= 1)
    read = functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return read.mul_(inside[:, None])


def _places(side: int, like: Tensor) -> Float[Tensor, " side"]:
    """Where the pixels of an axis are in the count of ``grid_sample``."""
    return torch.linspace(-1, 1, side).to(like) if side > 1 else like.new_zeros(1)


def elastic_deform(
    x: Float[Tensor, "batch channels height width"],
    alpha: float = 20.0,
    sigma: float = 4.0,
    generator: Generator | None = None,
) -> Float[Tensor, "batch channels height width"]:
    """A batch under :class:`Elastic`, each image with a field of its own.

    Args:
        x: Floats; they are left as they are.
        alpha: Scale of the displacements, >= 0.
        sigma: Width of the Gaussian in pixels, > 0.
        generator: Source of the fields, on the CPU; torch's global one by default.

    Raises:
        ValueError: If a number is out of its range, or ``x`` is no batch of floats.

    Example:
        >>> elastic_deform(torch.zeros(2, 1, 28, 28), generator=torch.Generator().manual_seed(0)).abs().max()
        tensor(0.)
    """
    if x.ndim != 4:
        raise ValueError(f"x must have shape (batch, channels, height, width), got {tuple(x.shape)}")
    augment = Elastic(alpha, sigma)
    channels, height, width = x.shape[1:]
    return augment.apply(x, augment.draw(len(x), (channels, height, width), generator))
