"""Augmentation of whole batches (batch, channels, height, width), all randomness from a generator.

Each augmentation is two steps: ``draw`` gives the random parameters of a batch, one row an image, and
``apply`` uses them. A process that holds only its share of a global batch draws for all of it and applies its
own rows, so one, two or eight processes see the very same images. Images are float32 in [0, 1] and not yet
normalised.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import functional

Shape = tuple[int, int, int]
Parameters = tuple[Any, ...]  # tensors with one row an image, or such tuples again

CHARACTER_WORDS = frozenset({
    "digit", "digits", "mnist", "emnist", "kmnist", "qmnist", "svhn", "usps", "character", "characters", "char",
    "chars", "letter", "letters", "alphabet", "omniglot", "glyph", "glyphs", "font", "fonts", "text", "ocr", "captcha",
    "plate", "plates", "sign", "signs", "number", "numbers", "word", "words",
})  # fmt: skip
LEFT_RIGHT_SYMMETRIC = frozenset({"fashion-mnist", "cifar10", "cifar100"})


def rows(parameters: Parameters, start: int, stop: int) -> Parameters:
    """The parameters of images ``start .. stop - 1`` of a batch.

    Example:
        >>> rows((torch.arange(4), (torch.arange(4) * 10,)), 1, 3)
        (tensor([1, 2]), (tensor([10, 20]),))
    """
    return tuple(p[start:stop] if isinstance(p, Tensor) else rows(p, start, stop) for p in parameters)


class Augmentation:
    """What every augmentation is: random parameters for a batch, and a function of images and parameters."""

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Random parameters for ``count`` images of ``shape`` (channels, height, width), one row each."""
        raise NotImplementedError

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """The augmented images; never changes ``images`` in place."""
        raise NotImplementedError

    def shape_after(self, shape: Shape) -> Shape:
        """The shape of an image afterwards."""
        return shape

    def set_epoch(self, epoch: int) -> None:
        """Tells which epoch the next batches are of, to those that change on the way; batches tell their own."""

    def __call__(
        self, images: Float[Tensor, "batch channels height width"], generator: Generator
    ) -> Float[Tensor, "batch channels out_height out_width"]:
        """Draws and applies."""
        if images.ndim != 4:
            raise ValueError(f"images must have shape (batch, channels, height, width), got {tuple(images.shape)}")
        channels, height, width = images.shape[1:]
        return self.apply(images, self.draw(len(images), (channels, height, width), generator))


class RandomCrop(Augmentation):
    """Pads every side and cuts out a window of the old size at a random place.

    Args:
        padding: Pixels on each side, >= 1.
        fill: Value of the padding, in the units of the images.

    Raises:
        ValueError: If ``padding`` is below 1.

    Example:
        >>> images = torch.ones(2, 1, 4, 4)
        >>> RandomCrop(1)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 4, 4])
    """

    def __init__(self, padding: int, fill: float = 0.0):
        if padding < 1:
            raise ValueError(f"padding must be >= 1, got {padding}")
        self.padding, self.fill = padding, fill

    def __repr__(self) -> str:
        return f"RandomCrop(padding={self.padding})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Offsets (count, 2) of the window's corner, 0 to twice the padding."""
        return (torch.randint(0, 2 * self.padding + 1, (count, 2), generator=generator),)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """One window an image."""
        (offsets,) = parameters
        count, channels, height, width = images.shape
        padded = functional.pad(images, [self.padding] * 4, value=self.fill)
        y = offsets[:, :1] + torch.arange(height)
        x = offsets[:, 1:] + torch.arange(width)
        image, channel = torch.arange(count), torch.arange(channels)
        return padded[
            image[:, None, None, None], channel[None, :, None, None], y[:, None, :, None], x[:, None, None, :]
        ]


class CentreCrop(Augmentation):
    """Cuts out the middle; draws nothing.

    Args:
        size: Side of the square, or (height, width), in pixels.

    Raises:
        ValueError: If a side is below 1, or an image is smaller than the crop.

    Example:
        >>> CentreCrop(2)(torch.arange(16.0).view(1, 1, 4, 4), torch.Generator()).flatten().tolist()
        [5.0, 6.0, 9.0, 10.0]
    """

    def __init__(self, size: int | tuple[int, int]):
        self.size = (size, size) if isinstance(size, int) else size
        if min(self.size) < 1:
            raise ValueError(f"size must be >= 1 on both sides, got {size}")

    def __repr__(self) -> str:
        return f"CentreCrop(size={self.size})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Nothing."""
        return ()

    def shape_after(self, shape: Shape) -> Shape:
        """The crop's size."""
        return (shape[0], *self.size)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """The middle of each image; an odd rest stays at the bottom and the right."""
        height, width = self.size
        if images.shape[-2] < height or images.shape[-1] < width:
            raise ValueError(f"size must be at most the image's {tuple(images.shape[-2:])}, got {self.size}")
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        return images[..., top : top + height, left : left + width]


class HorizontalFlip(Augmentation):
    """Mirrors an image left to right with probability ``p``.

    Raises:
        ValueError: If ``p`` is outside [0, 1].

    Example:
        >>> HorizontalFlip(1.0)(torch.tensor([[[[1.0, 2.0]]]]), torch.Generator()).flatten().tolist()
        [2.0, 1.0]
    """

    def __init__(self, p: float = 0.5):
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], got {p}")
        self.p = p

    def __repr__(self) -> str:
        return f"HorizontalFlip(p={self.p})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Which images turn round."""
        return (torch.rand(count, generator=generator) < self.p,)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Mirrored where asked."""
        (flipped,) = parameters
        return torch.where(flipped[:, None, None, None], images.flip(-1), images)


class Cutout(Augmentation):
    """Blanks one square at a random place, cut off at the border.

    DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017,
    arXiv:1708.04552. The paper blanks with zeros after normalisation, which is the data's mean before it:
    give it as ``fill``.

    Args:
        size: Side of the square in pixels, >= 1 (the paper: 16 of 32 for CIFAR-10, 8 for CIFAR-100).
        fill: What the square holds: one value, or one a channel.

    Raises:
        ValueError: If ``size`` is below 1.

    Example:
        >>> blanked = Cutout(2)(torch.ones(8, 1, 6, 6), torch.Generator().manual_seed(0))
        >>> bool(((blanked == 0).sum((1, 2, 3)) <= 4).all()), bool((blanked == 0).any())
        (True, True)
    """

    def __init__(self, size: int, fill: float | Sequence[float] = 0.0):
        if size < 1:
            raise ValueError(f"size must be >= 1, got {size}")
        self.size = size
        self.fill = torch.as_tensor(fill, dtype=torch.float32).reshape(-1, 1, 1)

    def __repr__(self) -> str:
        return f"Cutout(size={self.size})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Centres (count, 2), uniform over the pixels."""
        y = torch.randint(0, shape[1], (count,), generator=generator)
        return (torch.stack([y, torch.randint(0, shape[2], (count,), generator=generator)], 1),)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Each image with its square."""
        (centres,) = parameters
        first = centres - self.size // 2
        y, x = (torch.arange(side) - first[:, i : i + 1] for i, side in enumerate(images.shape[-2:]))
        inside = [(distance >= 0) & (distance < self.size) for distance in (y, x)]
        square = inside[0][:, None, :, None] & inside[1][:, None, None, :]
        return torch.where(square, self.fill.to(images.dtype), images)


class Jitter(Augmentation):
    """Random brightness, then random contrast about the image's mean grey, as torchvision defines the two.

    Args:
        brightness: The factor is uniform in [1 - brightness, 1 + brightness]; in [0, 1].
        contrast: Likewise.

    Raises:
        ValueError: If one is outside [0, 1], or the images are not floats.

    Example:
        >>> grey = torch.full((1, 1, 2, 2), 0.5)
        >>> torch.equal(Jitter(0.0, 0.9)(grey, torch.Generator()), grey)  # no contrast to change
        True
    """

    def __init__(self, brightness: float = 0.2, contrast: float = 0.2):
        for name, value in (("brightness", brightness), ("contrast", contrast)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        self.brightness, self.contrast = brightness, contrast

    def __repr__(self) -> str:
        return f"Jitter(brightness={self.brightness}, contrast={self.contrast})"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """Factors (count, 2): brightness, contrast."""
        return (
            1 + (2 * torch.rand(count, 2, generator=generator) - 1) * torch.tensor([self.brightness, self.contrast]),
        )

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Each image with its factors, kept within [0, 1]."""
        if not images.is_floating_point():
            raise ValueError(f"images must be floats in [0, 1], got {images.dtype}")
        brightness, contrast = (factor[:, None, None, None] for factor in parameters[0].unbind(1))
        images = (images * brightness).clamp(0, 1)
        grey = luminance(images) if images.shape[1] == 3 else images
        # In double precision: the order in which a mean is summed depends on the batch, which ranks share out.
        mean = grey.double().mean((1, 2, 3), keepdim=True).to(images.dtype)
        return (mean + (images - mean) * contrast).clamp(0, 1)


class Compose(Augmentation):
    """One augmentation after another; with none, the images as they are.

    Example:
        >>> Compose([RandomCrop(4), HorizontalFlip()])
        Compose([RandomCrop(padding=4), HorizontalFlip(p=0.5)])
    """

    def __init__(self, steps: Sequence[Augmentation] = ()):
        self.steps = tuple(steps)

    def __repr__(self) -> str:
        return f"Compose([{', '.join(map(repr, self.steps))}])"

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """The parameters of each step in turn."""
        parameters = []
        for step in self.steps:
            parameters.append(step.draw(count, shape, generator))
            shape = step.shape_after(shape)
        return tuple(parameters)

    def set_epoch(self, epoch: int) -> None:
        """Tells every step."""
        for step in self.steps:
            step.set_epoch(epoch)

    def shape_after(self, shape: Shape) -> Shape:
        """The last step's shape."""
        for step in self.steps:
            shape = step.shape_after(shape)
        return shape

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """Every step in turn."""
        for step, own in zip(self.steps, parameters, strict=True):
            images = step.apply(images, own)
        return images


class Until(Augmentation):
    """One augmentation in the first epochs, another one from then on.

    Args:
        epochs: How many have the first, >= 0.
        first: The one.
        then: The other, which leaves images of the same shape.

    Raises:
        ValueError: If ``epochs`` is negative.

    Example:
        >>> change = Until(2, HorizontalFlip(0.0), HorizontalFlip(1.0))
        >>> change.set_epoch(2)
        >>> change(torch.tensor([[[[1.0, 2.0]]]]), torch.Generator()).flatten().tolist()
        [2.0, 1.0]
    """

    def __init__(self, epochs: int, first: Augmentation, then: Augmentation):
        if epochs < 0:
            raise ValueError(f"epochs must be >= 0, got {epochs}")
        self.epochs, self.first, self.then = epochs, first, then
        self.set_epoch(0)

    def __repr__(self) -> str:
        return f"Until({self.epochs}, {self.first!r}, {self.then!r})"

    def set_epoch(self, epoch: int) -> None:
        """Chooses between the two."""
        self._now = self.first if epoch < self.epochs else self.then
        self._now.set_epoch(epoch)

    def draw(self, count: int, shape: Shape, generator: Generator) -> Parameters:
        """The parameters of the one whose turn it is."""
        return self._now.draw(count, shape, generator)

    def shape_after(self, shape: Shape) -> Shape:
        """Its shape."""
        return self._now.shape_after(shape)

    def apply(self, images: Tensor, parameters: Parameters) -> Tensor:
        """It alone."""
        return self._now.apply(images, parameters)


def luminance(images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """Grey of red, green and blue, as torchvision weighs them.

    Example:
        >>> round(luminance(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)).item(), 4)
        0.2989
    """
    red, green, blue = images.unbind(1)  # no product of matrices: its rounding depends on the batch
    return (0.2989 * red + 0.587 * green + 0.114 * blue)[:, None]


def two_views(images: Tensor, augment: Augmentation, generator: Generator) -> tuple[Tensor, Tensor]:
    """Two independently augmented copies of a batch, for contrastive learning.

    Example:
        >>> a, b = two_views(torch.rand(4, 1, 8, 8), RandomCrop(2), torch.Generator().manual_seed(0))
        >>> a.shape == b.shape, torch.equal(a, b)
        (True, False)
    """
    return augment(images, generator), augment(images, generator)


def mixup(
    images: Float[Tensor, "batch ..."],
    targets: Float[Tensor, "batch classes"],
    alpha: float,
    generator: Generator,
    *,
    symmetric: bool = True,
) -> tuple[Float[Tensor, "batch ..."], Float[Tensor, "batch classes"]]:
    """Mixes every example with another one, inputs and targets alike.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018, arXiv:1710.09412.

        x' = lam x_i + (1 - lam) x_j,    y' = lam y_i + (1 - lam) y_j,    lam ~ Beta(alpha, alpha)

    with one ``lam`` a batch and j a random permutation of i.

    Args:
        images: The inputs.
        targets: Rows of class probabilities (one-hot labels, say).
        alpha: Parameter of the Beta distribution, > 0.
        generator: Source of the mixing weight and the permutation.
        symmetric: Uses ``max(lam, 1 - lam)``, so each example stays nearer to itself.

    Raises:
        ValueError: If ``alpha`` is not positive or the two batches differ in length.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0]]), torch.eye(2)
        >>> mixed, target = mixup(x, y, 1.0, torch.Generator().manual_seed(0))
        >>> torch.allclose(mixed[:, 0], target[:, 1])  # inputs and targets share the weight
        True
    """
    if alpha <= 0:
        raise ValueError(f"alpha must be > 0, got {alpha}")
    if targets.ndim != 2 or len(targets) != len(images):
        raise ValueError(f"targets must have shape ({len(images)}, classes), got {tuple(targets.shape)}")
    seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
    weight = float(np.random.default_rng(seed).beta(alpha, alpha))
    if symmetric:
        weight = max(weight, 1 - weight)
    other = torch.randperm(len(images), generator=generator)
    return torch.lerp(images[other], images, weight), torch.lerp(targets[other], targets, weight)


def may_flip(shape: Shape, name: str = "", classes: Sequence[str] = ()) -> bool:
    """Whether mirroring keeps the label, by the rules of :func:`standard`.

    Example:
        >>> may_flip((3, 32, 32), "cifar10"), may_flip((1, 8, 8), "digits"), may_flip((3, 64, 64), "birds")
        (True, False, True)
        >>> may_flip((3, 64, 64), "arrows", classes=["turn-left", "turn-right"])
        False
    """
    if name in LEFT_RIGHT_SYMMETRIC:
        return True
    words = set(re.split(r"[^a-z]+", name.lower()))
    of_classes = {word for label in classes for word in re.split(r"[^a-z]+", label.lower())}
    characters = bool(classes) and all(len(label) == 1 or label.isdigit() for label in classes)
    return shape[0] == 3 and not words & CHARACTER_WORDS and not of_classes & {"left", "right"} and not characters


def standard(
    shape: Shape, name: str = "", *, classes: Sequence[str] = (), mean: float | Sequence[float] = 0.0
) -> Compose:
    """The default policy of a data set.

    - Sequences (height or width 1): nothing.
    - Every image: a random crop after padding by an eighth of the shorter side (4 of 32).
    - A horizontal flip for ``fashion-mnist``, ``cifar10`` and ``cifar100``, and for other data only when it
      is RGB and nothing speaks of characters or of left and right: no such word in the name or a class, and
      classes that are more than single letters or numbers.
    - Cutout for images of 16 pixels or more: half the side for ``cifar10``, a quarter elsewhere.

    Args:
        shape: (channels, height, width).
        name: Name of the data set.
        classes: Class names, where they are known.
        mean: What cutout fills with, in the units of the images.

    Raises:
        ValueError: If ``shape`` is not three sizes.

    Example:
        >>> standard((1, 8, 8), "digits")
        Compose([RandomCrop(padding=1)])
        >>> standard((3, 32, 32), "cifar10")
        Compose([RandomCrop(padding=4), HorizontalFlip(p=0.5), Cutout(size=16)])
    """
    if isinstance(shape, str) or len(shape) != 3:
        raise ValueError(f"shape must be (channels, height, width), got {shape!r}")
    side = min(shape[1:])
    if side == 1:
        return Compose()
    steps: list[Augmentation] = [RandomCrop(max(1, side // 8))]
    if may_flip(shape, name, classes):
        steps.append(HorizontalFlip())
    if side >= 16:
        steps.append(Cutout(side // 2 if name == "cifar10" else side // 4, fill=mean))
    return Compose(steps)
