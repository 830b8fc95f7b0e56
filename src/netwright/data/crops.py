"""Random resized crops of whole batches, anywhere in the image or about its middle.

A crop of random area and proportions is brought back to the size of the image, by bilinear interpolation as
torchvision does it. Peng, Wang, Zhu, Wang and You, "Crafting Better Contrastive Views for Siamese Representation
Learning", CVPR 2022, arXiv:2202.03278, keep the middle of the crop inside a box and push it towards the box's borders,
so that two views hold the same object and differ all the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional

from netwright.data.augment import Augmentation, Parameters, Shape

TRIES = 10  # as torchvision


class RandomResizedCrop(Augmentation):
    """Cuts out a window of random area and proportions, at a random place, and resizes it to the whole image.

    Args:
        scale: Least and largest share of the image's area, in (0, 1].
        ratio: Least and largest width over height, > 0.

    Raises:
        ValueError: If a range is empty or out of its bounds.

    Example:
        >>> images = torch.rand(2, 3, 8, 8)
        >>> RandomResizedCrop()(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, scale: tuple[float, float] = (0.2, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)):
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale must be two ascending shares in (0, 1], got {scale}")
        if len(ratio) != 2 or not 0 < ratio[0] <= ratio[1] < math.inf:
            raise ValueError(f"ratio must be two ascending numbers > 0, got {ratio}")
        self.scale, self.ratio = scale, ratio

    def __repr__(self) -> str:
        return f"{type(self).__name__}(scale={self.scale})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Windows (count, 4) in pixels: top, left, height, width."""
        sizes = self._sizes(count, shape[1:], generator)
        return (torch.cat([self.corners(sizes, shape[1:], generator), sizes], 1),)

    def corners(self, sizes: Tensor, image: Sequence[int], generator: Generator) -> Tensor:
        """Top and left (count, 2) of windows with the heights and widths ``sizes``, uniform over what fits."""
        free = torch.tensor(image) - sizes
        return (torch.rand(len(sizes), 2, generator=generator, dtype=torch.float64) * (free + 1)).long().minimum(free)

    def _sizes(self, count: int, image: Sequence[int], generator: Generator) -> Tensor:
        """Heights and widths: the first of ten draws that fits, else the largest window of the nearest proportions."""
        height, width = image
        draws = torch.rand(2, count, TRIES, generator=generator, dtype=torch.float64)
        area = height * width * (self.scale[0] + (self.scale[1] - self.scale[0]) * draws[0])
        low, high = map(math.log, self.ratio)
        proportion = (low + (high - low) * draws[1]).exp()
        sizes = torch.stack([(area / proportion).sqrt(), (area * proportion).sqrt()], 2).round().long()
        fits = ((sizes >= 1) & (sizes <= torch.tensor(image))).all(2)
        first = fits.float().argmax(1)
        nearest = min(max(width / height, self.ratio[0]), self.ratio[1])
        largest = torch.tensor([min(height, round(width / nearest)), min(width, round(height * nearest))]).clamp_min(1)
        found = sizes[torch.arange(count), first]
        return torch.where(fits.any(1, keepdim=True), found, largest)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Every window, at the size of the image; pixels beyond it do not enter."""
        (windows,) = parameters
        windows = windows.to(images.device)
        height, width = images.shape[-2:]
        y = _places(windows[:, 0], windows[:, 2], height)
        x = _places(windows[:, 1], windows[:, 3], width)
        grid = torch.stack([x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
        return functional.grid_sample(images, grid.to(images.dtype), align_corners=True, padding_mode="border")


class CenterCrop2(RandomResizedCrop):
    """Random resized crops whose middle lies in a box about the middle of the image.

    With lo and hi the corners at which the crop's middle meets the box (as far as the crop stays inside the image),

        top = lo + floor((hi - lo) Beta(alpha, alpha))

    and the same for the left. With ``alpha`` below 1 most middles lie near the box's borders, so two crops of an image
    differ although both hold what is in its middle.

    Args:
        scale: As for :class:`RandomResizedCrop`.
        ratio: Likewise.
        box: Top, left, bottom and right as shares of the image, in [0, 1]. CIFAR: a quarter from each side; ImageNet:
            (0.2, 0.2, 0.8, 0.8).
        alpha: Parameter of the Beta distribution, > 0. CIFAR: 0.1; ImageNet: 0.6.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> crop = CenterCrop2(scale=(0.25, 0.25), ratio=(1, 1), box=(0.5, 0.5, 0.5, 0.5))  # no freedom
        >>> crop(torch.arange(16.0).view(1, 1, 4, 4), torch.Generator())[0, 0].mean()
        tensor(7.5000)
    """

    def __init__(
        self,
        scale: tuple[float, float] = (0.2, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        box: tuple[float, float, float, float] = (0.25, 0.25, 0.75, 0.75),
        alpha: float = 0.1,
    ):
        super().__init__(scale, ratio)
        if len(box) != 4 or not (0 <= box[0] <= box[2] <= 1 and 0 <= box[1] <= box[3] <= 1):
            raise ValueError(f"box must be top, left, bottom, right with 0 <= top <= bottom <= 1, likewise, got {box}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be > 0, got {alpha}")
        self.box, self.alpha = box, alpha

    def __repr__(self) -> str:
        return f"CenterCrop2(scale={self.scale}, box={self.box}, alpha={self.alpha})"

    def corners(self, sizes: Tensor, image: Sequence[int], generator: Generator) -> Tensor:
        """Top and left (count, 2) of windows with the heights and widths ``sizes``."""
        sides = torch.tensor(image)
        free, half = sides - sizes, sizes // 2
        low, high = (
            ((sides * torch.tensor(edge, dtype=torch.float64)).floor().long() - half).clamp_min(0).minimum(free)
            for edge in (self.box[:2], self.box[2:])
        )
        # torch has no Beta distribution with a generator.
        seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
        draws = torch.from_numpy(np.random.default_rng(seed).beta(self.alpha, self.alpha, (len(sizes), 2)))
        return low + ((high - low) * draws).floor().long()


def _places(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Where the pixels of a resized window lie, for grid_sample: -1 and 1 are the middles of the outer pixels."""
    inside = (torch.arange(size, device=start.device) + 0.5) * (length[:, None] / size) - 0.5
    places = start[:, None] + inside.clamp_min(0).minimum(length[:, None] - 1)
    return 2 * places / max(1, size - 1) - 1
