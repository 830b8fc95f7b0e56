"""Data sets with a known bias: each class comes with one colour, one corruption or one texture, nearly always.

What a classifier makes of such data is told by images whose bias does not go with their class. The share of images
whose bias does is the *ratio*; with a ratio of 1 / classes bias and label are independent, as in a fair test set.
Coloured and corrupted pictures are used in this way by Nam et al., "Learning from Failure: Training Debiased Classifier
from Biased Classifier", NeurIPS 2020, arXiv:2007.02561; colours, corruptions and textures here are this library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from jaxtyping import Float, Int, UInt8
from torch import Generator, Tensor

from netwright.console import UserError
from netwright.data.corruptions import CORRUPTIONS, TEXTURES, corrupted, textured
from netwright.data.sources import BIASED_DATA, BIASED_KINDS, NAMED, parts_of
from netwright.data.splits import TEST_SHARE, split_train
from netwright.data.tensors import TensorImages
from netwright.seeding import stream

if TYPE_CHECKING:
    from netwright.data.parts import Parts

BiasKind = Literal["coloured", "corrupted", "textured"]
KINDS: tuple[BiasKind, ...] = get_args(BiasKind)
DEFAULT_RATIO = 0.99

# The corners of the colour cube but black and white, and four between them, all saturated: one channel is empty and one
# full, so that the largest of an image's channels is the grey image that was coloured.
PALETTE: tuple[tuple[float, float, float], ...] = (
    (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 1.0),
    (0.0, 1.0, 1.0), (1.0, 0.5, 0.0), (0.5, 0.0, 1.0), (1.0, 0.0, 0.5), (0.0, 1.0, 0.5),
)  # fmt: skip


class BiasedDataset(TensorImages):
    """Images in memory whose bias is known: :class:`netwright.data.TensorImages` with one more number an image.

    Args:
        images: (N, C, H, W) uint8, or float32.
        labels: (N,) whole numbers >= 0: what is to be learned.
        bias: (N,) whole numbers >= 0: what is not. Bias b is the typical one of class b.
        files: The file each image came from, where there is one.
        rows: (N,) the row of each image in the array or data set it came from.

    Raises:
        ValueError: If a shape, a type or a length is wrong.

    Example:
        >>> images = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
        >>> data = BiasedDataset(images, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
        >>> data.aligned.tolist(), data.subset([2]).bias.tolist()
        ([True, True, False], [0])
    """

    def __init__(
        self,
        images: UInt8[Tensor, "examples channels height width"] | Float[Tensor, "examples channels height width"],
        labels: Int[Tensor, "examples"],
        bias: Int[Tensor, "examples"],
        *,
        files: Sequence[str] | None = None,
        rows: Int[Tensor, "examples"] | None = None,
    ):
        super().__init__(images, labels, files=files, rows=rows)
        if bias.is_floating_point() or bias.shape != labels.shape or (len(bias) and int(bias.min()) < 0):
            raise ValueError(f"bias must be {len(labels)} integers >= 0, got {bias.dtype} of {tuple(bias.shape)}")
        self.bias = bias.to(torch.int64)

    @property
    def aligned(self) -> Tensor:
        """Which images have the bias that is typical of their class."""
        return self.bias == self.labels

    def subset(self, indices: Sequence[int] | Tensor) -> BiasedDataset:
        """A copy of the examples at ``indices``, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        plain = super().subset(chosen)
        return BiasedDataset(plain.images, plain.labels, self.bias[chosen], files=plain.files, rows=plain.rows)

    def with_labels(self, labels: Int[Tensor, "examples"]) -> BiasedDataset:
        """The same images and biases, not copied, with other labels."""
        return BiasedDataset(self.images, labels, self.bias, files=self.files, rows=self.rows)


def draw_bias(
    labels: Int[Tensor, "examples"], ratio: float, num_classes: int, generator: Generator
) -> Int[Tensor, "examples"]:
    """A bias for each label: the label itself with probability ``ratio``, else one of the others, all alike.

    Args:
        labels: In 0..num_classes - 1.
        ratio: Share of bias-aligned examples, in [0, 1]; 1 / num_classes makes bias and label independent.
        num_classes: At least 2.
        generator: Of the choice.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> draw_bias(torch.tensor([0, 1, 2, 1]), 1.0, 3, Generator()).tolist()
        [0, 1, 2, 1]
    """
    if num_classes < 2:
        raise ValueError(f"num_classes must be >= 2, got {num_classes}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio must lie in [0, 1], got {ratio}")
    if labels.ndim != 1 or labels.is_floating_point():
        raise ValueError(f"labels must be one integer an image, got {labels.dtype} of {tuple(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    conflicting = torch.rand(len(labels), generator=generator) >= ratio
    shift = torch.randint(1, num_classes, (len(labels),), generator=generator)
    return torch.where(conflicting, (labels + shift) % num_classes, labels)


def colored_mnist(
    images: UInt8[Tensor, "examples height width"] | UInt8[Tensor, "examples 1 height width"],
    labels: Int[Tensor, "examples"],
    ratio: float,
    palette: Sequence[Sequence[float]] | None = None,
    sigma: float = 0.0,
    generator: Generator | None = None,
) -> BiasedDataset:
    """Grey images in colour: each class has its own, which an image wears with probability ``ratio``.

    The grey value is multiplied by the colour, so a black background stays black.

    Args:
        images: Grey, of MNIST or any other set.
        labels: In 0..colours - 1.
        ratio: Share of bias-aligned images, in [0, 1]; the others wear another class's colour, all alike.
        palette: One colour (red, green, blue) in [0, 1] a class; :data:`PALETTE` by default.
        sigma: Standard deviation of Gaussian noise on each image's colour, >= 0; colours are clipped to [0, 1].
        generator: Of colours and noise; a fixed one by default.

    Raises:
        ValueError: If the images are not grey uint8, or an argument is out of its range.

    Example:
        >>> grey = torch.full((2, 4, 4), 255, dtype=torch.uint8)
        >>> data = colored_mnist(grey, torch.tensor([0, 3]), ratio=1.0)
        >>> data.images[:, :, 0, 0].tolist(), data.bias.tolist()
        ([[255, 0, 0], [255, 255, 0]], [0, 3])
    """
    grey = images[:, None] if images.ndim == 3 else images
    if grey.dtype != torch.uint8 or grey.ndim != 4 or grey.shape[1] != 1:
        raise ValueError(
            f"images must be grey uint8 (N, H, W) or (N, 1, H, W), got {images.dtype} {tuple(images.shape)}"
        )
    if not 0 <= sigma < float("inf"):
        raise ValueError(f"sigma must be >= 0 and finite, got {sigma}")
    colours = _colours(palette)
    draws = stream(0, "colours") if generator is None else generator
    bias = draw_bias(labels, ratio, len(colours), draws)
    worn = colours[bias]
    if sigma:
        worn = (worn + sigma * torch.randn(worn.shape, generator=draws)).clamp(0, 1)
    return BiasedDataset(recolored(grey, worn), labels, bias)


def recolored(
    images: UInt8[Tensor, "examples channels height width"], colours: Float[Tensor, "examples 3"]
) -> UInt8[Tensor, "examples 3 height width"]:
    """Each image in a colour: the largest of its channels, times the colour. The bias transformation that CDvG learns.

    Args:
        images: Grey, or in a colour of which one channel is full.
        colours: One an image, in [0, 1].

    Example:
        >>> red = torch.tensor([[[[200]], [[0]], [[0]]]], dtype=torch.uint8)
        >>> recolored(red, torch.tensor([[0.0, 0.5, 1.0]])).flatten().tolist()
        [0, 100, 200]
    """
    grey = images.amax(1, keepdim=True)
    return (grey * colours[:, :, None, None]).round().byte()


def nearest_color(images: Tensor, palette: Sequence[Sequence[float]] | None = None) -> Int[Tensor, "examples"]:
    """Which colour of a palette each image wears: the one nearest to the mean of its pixels, brightness apart.

    Args:
        images: (N, 3, H, W) uint8, or floats in [0, 1].
        palette: As for :func:`colored_mnist`.

    Example:
        >>> nearest_color(torch.tensor([[[[90]], [[80]], [[5]]]], dtype=torch.uint8)).tolist()  # a dark yellow
        [3]
    """
    means = images.float().flatten(2).mean(2)
    colours = _colours(palette).to(means.device)
    whole = means / means.amax(1, keepdim=True).clamp_min(1e-12)
    return torch.cdist(whole, colours / colours.amax(1, keepdim=True).clamp_min(1e-12)).argmin(1)


def _colours(palette: Sequence[Sequence[float]] | None) -> Tensor:
    colours = torch.tensor(PALETTE if palette is None else [list(colour) for colour in palette])
    if colours.ndim != 2 or colours.shape[1] != 3 or len(colours) < 2:
        raise ValueError(f"palette must hold at least 2 colours of 3 values, got shape {tuple(colours.shape)}")
    if not bool(((colours >= 0) & (colours <= 1)).all()):
        raise ValueError(f"palette must lie in [0, 1], got {float(colours.min()):g}..{float(colours.max()):g}")
    return colours


def corrupted_images(
    images: UInt8[Tensor, "examples channels height width"],
    labels: Int[Tensor, "examples"],
    ratio: float,
    corruptions: Sequence[str] = CORRUPTIONS,
    severity: int = 3,
    generator: Generator | None = None,
) -> BiasedDataset:
    """Images each class of which is spoiled in its own way: the kind of corruption is the bias.

    Args:
        images: Pictures.
        labels: In 0..corruptions - 1.
        ratio: Share of bias-aligned images, in [0, 1].
        corruptions: Names, one a class: see :data:`netwright.data.corruptions.CORRUPTIONS`.
        severity: 1, which an eye hardly sees, to 5.
        generator: Of the choice and of the noise; a fixed one by default.

    Raises:
        ValueError: If the images are not uint8, a corruption is unknown, or an argument is out of its range.

    Example:
        >>> grey = torch.full((2, 1, 8, 8), 128, dtype=torch.uint8)
        >>> data = corrupted_images(grey, torch.tensor([0, 1]), 1.0, ["inverted", "bright"])
        >>> int(data.images[0, 0, 0, 0]) < 128 < int(data.images[1, 0, 0, 0])
        True
    """
    draws = stream(0, "corruptions") if generator is None else generator
    bias = draw_bias(labels, ratio, len(corruptions), draws)
    return BiasedDataset(corrupted(images, bias, corruptions, severity, draws), labels, bias)


def textured_images(
    images: UInt8[Tensor, "examples channels height width"],
    labels: Int[Tensor, "examples"],
    ratio: float,
    strength: float = 0.6,
    generator: Generator | None = None,
) -> BiasedDataset:
    """Images in front of stripes, checks and rings: the texture behind a class is its bias, where it begins is random.

    Args:
        images: Bright on black, as MNIST and Fashion-MNIST are: each pixel is the brighter of image and texture.
        labels: In 0..9.
        ratio: Share of bias-aligned images, in [0, 1].
        strength: Brightness of the texture, in (0, 1].
        generator: Of the choice and of the phases; a fixed one by default.

    Raises:
        ValueError: If the images are not uint8, or an argument is out of its range.

    Example:
        >>> data = textured_images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), 1.0, strength=1.0)
        >>> data.images.amax((1, 2, 3)).min() > 200
        tensor(True)
    """
    draws = stream(0, "textures") if generator is None else generator
    bias = draw_bias(labels, ratio, TEXTURES, draws)
    return BiasedDataset(textured(images, bias, strength, draws), labels, bias)


def biased_names() -> tuple[str, ...]:
    """The biased data sets that :func:`netwright.data.load` makes.

    Example:
        >>> biased_names()[:2]
        ('coloured-mnist-5000', 'coloured-fashion-mnist')
    """
    return tuple(f"{kind}-{name}" for kind in BIASED_KINDS for name in BIASED_DATA)


def read_biased(name: str, root: Path | None, download: bool) -> Parts:
    """The parts of ``KIND-NAME`` or ``KIND-NAME:RATIO``: a biased training part, a fair test part.

    In the test part every bias is as frequent in each class. Data without an official test part have 20 % split off
    before anything is biased. Colours, corruptions and textures are always the same ones.

    Args:
        name: ``coloured-mnist-5000``, ``textured-fashion-mnist:0.95``, ...; the ratio is 0.99 by default.
        root: The data folder.
        download: Whether the images may be downloaded.

    Raises:
        UserError: If the ratio is none, or the images are not on this machine.
    """
    whole, colon, text = name.partition(":")
    kind, _, base = whole.partition("-")
    try:
        ratio = float(text) if colon else DEFAULT_RATIO
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise UserError(f"the share of {name} must lie in [0, 1], got {text!r}", cure=f"write it like {whole}:0.95")
    found = NAMED[base](root, download)
    train = found.images["train"]
    assert isinstance(train, TensorImages)
    if "test" in found.images:
        test = found.images["test"]
    else:
        rest, held = split_train(train.labels, TEST_SHARE, seed=0, name="test")
        train, test = train.subset(rest), train.subset(held)
    made = {
        part: _made(kind, images, share, stream(0, kind, part))
        for part, images, share in (("train", train, ratio), ("test", test, 1 / len(found.classes)))
    }
    return parts_of(whole, f"{found.source}, {kind}, {100 * ratio:g} % bias-aligned", dict(made), found.classes)


def _made(kind: str, images: object, ratio: float, generator: Generator) -> BiasedDataset:
    assert isinstance(images, TensorImages)
    if kind == "coloured":
        return colored_mnist(images.images, images.labels, ratio, generator=generator)
    if kind == "corrupted":
        return corrupted_images(images.images, images.labels, ratio, generator=generator)
    return textured_images(images.images, images.labels, ratio, generator=generator)
