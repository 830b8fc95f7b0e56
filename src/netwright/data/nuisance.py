"""Images with a rendered nuisance: light from a side, contrast, slant and thickness, none of which decides the class.

What natural images vary in beside their class is seldom known. Here it is: each image is changed by five numbers that
are kept, so that an experiment can have a training part from a narrow range, a test part from a wide one, and can ask
whether what a method finds is what was rendered. Rendering is done on the whole batch, in this order:

- thickness t: (1 - |t|) x + |t| times the largest (t > 0) or least (t < 0) value within 3x3 pixels;
- slant s: rows move to the right by s times their distance from the middle row;
- contrast c: 0.5 + c (x - 0.5);
- light from angle a with strength b: times 1 + b (u cos a + v sin a), where u and v run from -1 to 1 to the right and
  upwards.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional

from netwright.data.tensors import TensorImages, scaled
from netwright.results import Result
from netwright.seeding import stream

NAMES = ("angle", "strength", "contrast", "slant", "thickness")
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Nuisance(Result):
    """Ranges that the numbers of a rendering are drawn from, uniformly and independently.

    Attributes:
        angle: Where the light comes from, in radians; 0 is the right.
        strength: Of the light's gradient, in [0, 1].
        contrast: In [0, 1]; 1 leaves it.
        slant: In pixels a row, in [-1, 1].
        thickness: In [-1, 1]; 0 leaves it.

    Raises:
        ValueError: If a range is turned round or reaches beyond its bounds.

    Example:
        >>> Nuisance(contrast=(0.5, 0.5)).draw(2, torch.Generator()).shape
        torch.Size([2, 5])
    """

    angle: Range = (0.0, 0.0)
    strength: Range = (0.0, 0.0)
    contrast: Range = (1.0, 1.0)
    slant: Range = (0.0, 0.0)
    thickness: Range = (0.0, 0.0)

    def __post_init__(self) -> None:
        bounds = {
            "angle": (-math.inf, math.inf), "strength": (0, 1), "contrast": (0, 1), "slant": (-1, 1),
            "thickness": (-1, 1),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            low, high = getattr(self, name)
            if not least <= low <= high <= most or not math.isfinite(high - low):
                raise ValueError(f"{name} must be a range within [{least}, {most}], got {(low, high)}")

    def draw(self, count: int, generator: Generator) -> Float[Tensor, "count 5"]:
        """The five numbers of ``count`` renderings, in the order of ``NAMES``."""
        low, high = torch.tensor([getattr(self, name) for name in NAMES]).T
        return low + (high - low) * torch.rand(count, len(NAMES), generator=generator)


NARROW = Nuisance((-0.3, 0.3), (0.0, 0.25), (0.85, 1.0), (-0.05, 0.05), (-0.1, 0.1))
WIDE = Nuisance((-math.pi, math.pi), (0.0, 0.9), (0.4, 1.0), (-0.4, 0.4), (-0.8, 0.8))


def render(
    images: Float[Tensor, "batch channels height width"], numbers: Float[Tensor, "batch 5"]
) -> Float[Tensor, "batch channels height width"]:
    """Images in [0, 1] with the nuisance of the five numbers of each.

    Args:
        images: Floats in [0, 1].
        numbers: Angle, strength, contrast, slant and thickness, a row for each image.

    Raises:
        ValueError: If the images are not floats, or there is not a row for each.

    Example:
        >>> x = torch.rand(3, 1, 8, 8)
        >>> nothing = torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0]]).expand(3, 5)
        >>> torch.allclose(render(x, nothing), x, atol=1e-6)
        True
    """
    if not images.is_floating_point() or images.ndim != 4:
        raise ValueError(
            f"images must be floats (batch, channels, height, width), got {images.dtype} of {images.ndim} axes"
        )
    if numbers.shape != (len(images), len(NAMES)):
        raise ValueError(f"numbers must have shape ({len(images)}, {len(NAMES)}), got {tuple(numbers.shape)}")
    angle, strength, contrast, slant, thickness = (column[:, None, None, None] for column in numbers.unbind(1))
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    thick, thin = functional.max_pool2d(padded, 3, 1), -functional.max_pool2d(-padded, 3, 1)
    x = torch.lerp(images, torch.where(thickness > 0, thick, thin), thickness.abs())
    x = _slanted(x, slant)
    x = 0.5 + contrast * (x - 0.5)
    height, width = x.shape[-2:]
    right = torch.linspace(-1, 1, width).to(x)
    up = torch.linspace(1, -1, height).to(x)[:, None]
    return (x * (1 + strength * (right * angle.cos() + up * angle.sin()))).clamp(0, 1)


def _slanted(x: Tensor, slant: Tensor) -> Tensor:
    """Rows moved to the right, linear between pixels; black comes in."""
    height, width = x.shape[-2:]
    away = torch.arange(height).to(x) - (height - 1) / 2
    columns = torch.arange(width).to(x) - slant[:, 0] * away[:, None]
    across = 2 * columns / max(1, width - 1) - 1
    down = torch.linspace(-1, 1, height).to(x)[None, :, None].expand_as(across)
    grid = torch.stack([across, down], 3)
    return functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def with_nuisance(
    images: TensorImages, nuisance: Nuisance, seed: int = 0, *, name: str = "nuisance"
) -> tuple[TensorImages, Float[Tensor, "images 5"]]:
    """A part of a data set under a nuisance, and the numbers of each image.

    Args:
        images: uint8.
        nuisance: What is drawn from: :data:`NARROW`, :data:`WIDE` or another.
        seed: Of the draws.
        name: Of the stream of draws, so that parts differ.

    Raises:
        ValueError: If the images are not uint8.

    Example:
        >>> from netwright.data import load
        >>> some = load("digits").test.subset(range(4))
        >>> rendered, numbers = with_nuisance(some, WIDE)
        >>> rendered.images.shape, numbers.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4, 5]))
    """
    if images.images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, got {images.images.dtype}")
    numbers = nuisance.draw(len(images), stream(seed, name))
    made = [
        render(scaled(part), own).mul(255).round().byte()
        for part, own in zip(images.images.split(2048), numbers.split(2048), strict=True)
    ]
    return TensorImages(torch.cat(made), images.labels, files=images.files, rows=images.rows), numbers
