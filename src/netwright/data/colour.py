"""Colour jitter, greyscale and blur of whole batches, and augmentations that happen to some images only.

Each is what torchvision has under the same name, with parameters of its own for each image; the order of the steps of
colour jitter is fixed.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional

from netwright.data.augment import Augmentation, Jitter, Parameters, Shape, luminance


class ColourJitter(Augmentation):
    """Random brightness, contrast, saturation and hue, one after another; grey images have the first two alone.

    Args:
        brightness: The factor is uniform in [1 - brightness, 1 + brightness]; in [0, 1].
        contrast: Likewise.
        saturation: Likewise.
        hue: The turn of the colour circle is uniform in [-hue, hue]; in [0, 0.5].

    Raises:
        ValueError: If one is out of its range.

    Example:
        >>> red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
        >>> ColourJitter(0, 0, 0, 0)(red, torch.Generator()).flatten().tolist()
        [1.0, 0.0, 0.0]
    """

    def __init__(self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1):
        self.light = Jitter(brightness, contrast)
        if not 0 <= saturation <= 1:
            raise ValueError(f"saturation must lie in [0, 1], got {saturation}")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5], got {hue}")
        self.saturation, self.hue = saturation, hue

    def __repr__(self) -> str:
        light = f"brightness={self.light.brightness}, contrast={self.light.contrast}"
        return f"ColourJitter({light}, saturation={self.saturation}, hue={self.hue})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Factors (count, 2) of brightness and contrast; factor of saturation and turn of hue (count, 2)."""
        light = self.light.draw(count, shape, generator)
        spread = torch.tensor([self.saturation, self.hue])
        colour = torch.tensor([1.0, 0.0]) + (2 * torch.rand(count, 2, generator=generator) - 1) * spread
        return (light, colour)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Each image with its factors, kept within [0, 1]."""
        light, colour = parameters
        images = self.light.apply(images, light)
        if images.shape[1] != 3:
            return images
        saturation, turn = (value.view(-1, 1, 1, 1) for value in colour.unbind(1))
        grey = luminance(images)
        return turned((grey + (images - grey) * saturation).clamp(0, 1), turn)


class Greyscale(Augmentation):
    """Takes the colour away with probability ``p``.

    Raises:
        ValueError: If ``p`` is outside [0, 1].

    Example:
        >>> grey = Greyscale(1.0)(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1), torch.Generator())
        >>> [round(value, 4) for value in grey.flatten().tolist()]
        [0.2989, 0.2989, 0.2989]
    """

    def __init__(self, p: float = 0.2):
        self.p = _share(p)

    def __repr__(self) -> str:
        return f"Greyscale(p={self.p})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Which images lose their colour."""
        return (torch.rand(count, generator=generator) < self.p,)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Grey where asked; images without three channels as they are."""
        (chosen,) = parameters
        if images.shape[1] != 3:
            return images
        return torch.where(chosen.view(-1, 1, 1, 1), luminance(images), images)


class GaussianBlur(Augmentation):
    """Blurs with a Gaussian of random width; the border is mirrored.

    Args:
        sigma: Least and largest standard deviation, in pixels, > 0.
        size: Pixels of the kernel, odd; by default a tenth of the image's shorter side.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> image = torch.zeros(1, 1, 5, 5)
        >>> image[0, 0, 2, 2] = 1
        >>> round(GaussianBlur((1, 1), size=3)(image, torch.Generator())[0, 0, 2, 2].item(), 4)
        0.2042
    """

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), size: int | None = None):
        if not 0 < sigma[0] <= sigma[1]:
            raise ValueError(f"sigma must be two ascending numbers > 0, got {sigma}")
        if size is not None and (size < 1 or size % 2 == 0):
            raise ValueError(f"size must be odd and >= 1, got {size}")
        self.sigma, self.size = sigma, size

    def __repr__(self) -> str:
        return f"GaussianBlur(sigma={self.sigma})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Standard deviations (count,)."""
        low, high = self.sigma
        return (low + (high - low) * torch.rand(count, generator=generator),)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Blurred along the rows, then along the columns; a sum over the kernel's few pixels."""
        (sigma,) = parameters
        size = 2 * (min(images.shape[-2:]) // 20) + 1 if self.size is None else self.size
        radius = size // 2
        distance = torch.arange(-radius, radius + 1, device=images.device)
        weights = (-0.5 * (distance / sigma[:, None].to(images)) ** 2).softmax(1).view(-1, size, 1, 1, 1)
        for axis in (-1, -2):
            length = images.shape[axis]
            pads = (radius, radius, 0, 0) if axis == -1 else (0, 0, radius, radius)
            padded = functional.pad(images, pads, mode="reflect")
            shifted = (weights[:, i] * padded.narrow(axis, i, length) for i in range(size))
            images = sum(shifted, start=torch.zeros_like(images))
        return images


class RandomApply(Augmentation):
    """Another augmentation that happens to each image with probability ``p``.

    Raises:
        ValueError: If ``p`` is outside [0, 1].

    Example:
        >>> from netwright.data.augment import HorizontalFlip
        >>> RandomApply(HorizontalFlip(1.0), p=0.0)(torch.tensor([[[[1.0, 2.0]]]]), torch.Generator()).tolist()
        [[[[1.0, 2.0]]]]
    """

    def __init__(self, step: Augmentation, p: float = 0.5):
        self.step, self.p = step, _share(p)

    def __repr__(self) -> str:
        return f"RandomApply({self.step!r}, p={self.p})"

    def set_epoch(self, epoch: int) -> None:
        """Tells the other one."""
        self.step.set_epoch(epoch)

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Which images are changed, and the parameters of all."""
        return (torch.rand(count, generator=generator) < self.p, self.step.draw(count, shape, generator))

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Changed where asked; the step must keep the shape."""
        chosen, inner = parameters
        return torch.where(chosen.view(-1, 1, 1, 1), self.step.apply(images, inner), images)


def turned(images: Tensor, turn: Tensor) -> Tensor:
    """Images in [0, 1] with their hue turned by a share of the colour circle; value and saturation stay.

    With value v, chroma c and hue h in sixths, a channel is v - c max(0, min(k, 4 - k, 1)), k = (n + h) mod 6, where n
    is 5, 3 and 1 for red, green and blue.
    """
    value, chroma = images.amax(1, keepdim=True), images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    red, green, blue = (channel[:, None] for channel in images.unbind(1))
    divisor = torch.where(chroma > 0, chroma, 1)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    offsets = torch.tensor([5.0, 3.0, 1.0], device=images.device, dtype=images.dtype).view(1, 3, 1, 1)
    k = (offsets + hue + 6 * turn) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _share(p: float) -> float:
    if not 0 <= p <= 1:
        raise ValueError(f"p must lie in [0, 1], got {p}")
    return p
