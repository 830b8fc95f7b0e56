"""Two views of each image, and the policies by which the hosts make them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Generator, Tensor

from netwright.checks import one_of
from netwright.data.augment import Augmentation, Compose, HorizontalFlip, Parameters, Shape, Until, may_flip
from netwright.data.colour import ColourJitter, GaussianBlur, Greyscale, RandomApply
from netwright.data.crops import CenterCrop2, RandomResizedCrop

Crop = Literal["random", "center"]
SMALL = 64  # pixels a side up to which views are made as for CIFAR, beyond as for ImageNet
WARMUP = 20  # epochs of crops anywhere before those about the middle, beyond SMALL
JITTER = (0.4, 0.4, 0.4, 0.1)
FIRST_JITTER = (0.4, 0.4, 0.4, 0.4)  # of version 1 of MoCo


class TwoViews(Augmentation):
    """Two augmented copies of each image of a batch, side by side: (batch, 2, channels, height, width).

    Args:
        first: Makes the first views.
        second: Makes the second ones; by default the same, with random numbers of its own.

    Example:
        >>> views = TwoViews(RandomResizedCrop())(torch.rand(4, 1, 8, 8), torch.Generator().manual_seed(0))
        >>> views.shape, torch.equal(views[:, 0], views[:, 1])
        (torch.Size([4, 2, 1, 8, 8]), False)
    """

    def __init__(self, first: Augmentation, second: Augmentation | None = None):
        self.first, self.second = first, first if second is None else second

    def __repr__(self) -> str:
        return f"TwoViews({self.first!r}, {self.second!r})"

    def set_epoch(self, epoch: int) -> None:
        """Tells both."""
        self.first.set_epoch(epoch)
        self.second.set_epoch(epoch)

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """The parameters of both."""
        return (self.first.draw(count, shape, generator), self.second.draw(count, shape, generator))

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Both views, stacked behind the batch."""
        return torch.stack([self.first.apply(images, parameters[0]), self.second.apply(images, parameters[1])], 1)


def policy(
    shape: Shape,
    name: str = "",
    *,
    classes: Sequence[str] = (),
    crop: Crop = "random",
    blur: bool | None = None,
    warmup: int | None = None,
    version: int = 2,
) -> TwoViews:
    """How SimCLR, MoCo v2 and SimSiam make two views: crop, flip, colour jitter, grey, blur.

    Crops have an area share of 0.2 to 1; the middle of those with ``crop="center"`` lies in a box, as for CIFAR up to
    64 pixels and as for ImageNet beyond. The flip is left out where it may change what an image means. Version 1 of
    MoCo has all images jittered, their hue too, and none blurred.

    Args:
        shape: (channels, height, width) of an image.
        name: Of the data set, from which it is told whether images may be flipped.
        classes: Class names, likewise.
        crop: ``"random"`` anywhere, or ``"center"``.
        blur: Whether half of the views are blurred; by default those of images beyond 64 pixels, but for version 1.
        warmup: With ``crop="center"``, epochs in which crops lie anywhere yet, >= 0; by default 20 beyond 64 pixels, as
            for ImageNet, and none up to there. ``Batches`` tell the views their epoch; in a loop of your own call
            ``views.set_epoch(epoch)``.
        version: 2, or 1 for the views of version 1 of MoCo.

    Raises:
        ValueError: If ``crop`` or ``version`` is unknown, ``warmup`` is negative, or an image has no two dimensions of
            at least 4 pixels.

    Example:
        >>> policy((1, 28, 28), "fashion-mnist").first.steps[:2]
        (RandomResizedCrop(scale=(0.2, 1.0)), HorizontalFlip(p=0.5))
    """
    one_of("crop", crop, get_args(Crop))
    if len(shape) != 3 or min(shape[1:]) < 4:
        raise ValueError(f"shape must be (channels, height, width) with at least 4 x 4 pixels, got {tuple(shape)}")
    if version not in (1, 2):
        raise ValueError(f"version must be 1 or 2, got {version}")
    small = max(shape[1:]) <= SMALL
    wait = (0 if small else WARMUP) if warmup is None else warmup
    if wait < 0:
        raise ValueError(f"warmup must be >= 0, got {warmup}")
    steps: list[Augmentation] = [RandomResizedCrop()]
    if crop == "center":
        middle = CenterCrop2() if small else CenterCrop2(box=(0.2, 0.2, 0.8, 0.8), alpha=0.6)
        steps = [Until(wait, steps[0], middle) if wait else middle]
    if may_flip(shape, name, classes):
        steps.append(HorizontalFlip())
    grey = [Greyscale(0.2)] if shape[0] == 3 else []
    steps += [*grey, ColourJitter(*FIRST_JITTER)] if version == 1 else [RandomApply(ColourJitter(*JITTER), 0.8), *grey]
    if (version == 2 and not small) if blur is None else blur:
        steps.append(RandomApply(GaussianBlur(), p=0.5))
    return TwoViews(Compose(steps))
