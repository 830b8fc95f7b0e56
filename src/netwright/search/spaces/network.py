"""The evaluation network: cells of one genotype, stacked; trained from scratch and deployed.

Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", 2019, arXiv:1806.09055. Every node sums two
operations; in training each operation but the identity is dropped per sample with probability ``drop_path`` (p),

    x_i = sum_{(j, o)} b o(x_j) / (1 - p),    b ~ Bernoulli(1 - p).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import one_of
from netwright.search.genotype import CellGenotype, CellsGenotype, Chosen
from netwright.search.spaces.operations import FactorizedReduce, channels_last, operation, relu_conv_bn
from netwright.seeding import seeded

STEM_MULTIPLIER = 3


class Place(NamedTuple):
    """Where a cell stands in the stack: widths of its two inputs, its own, and what halves the resolution."""

    c_before_previous: int
    c_previous: int
    channels: int
    reduction: bool
    reduction_previous: bool


def places(
    channels: int, cells: int, reductions: frozenset[int], stem: str, widths: tuple[int, int]
) -> Iterator[Place]:
    """The cells' places; ``widths`` are the numbers of states a normal and a reduction cell concatenate."""
    if channels < 2:
        raise ValueError(f"channels must be >= 2, got {channels}")
    if cells < 1:
        raise ValueError(f"cells must be >= 1, got {cells}")
    before = previous = channels * (1 if stem == "imagenet" else STEM_MULTIPLIER)
    reduced = stem == "imagenet"
    for index in range(cells):
        reduction = index in reductions
        channels *= 2 if reduction else 1
        yield Place(before, previous, channels, reduction, reduced)
        before, previous, reduced = previous, channels * widths[reduction], reduction


class CifarStem(nn.Module):
    """3x3 convolution and batch norm at full resolution; both cell inputs are its output."""

    stride = 1

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        width = STEM_MULTIPLIER * channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=self.stride, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two states the first cell takes."""
        s = channels_last(self.layers(x))
        return s, s


class StridedStem(CifarStem):
    """The same at half the resolution, where a network of twice the width costs about as much."""

    stride = 2


class ImageNetStem(nn.Module):
    """Three 3x3 convolutions of stride 2; the cell inputs are the outputs of the second and the third."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.first = nn.Sequential(
            nn.Conv2d(in_channels, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.second = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two states the first cell takes."""
        s0 = channels_last(self.first(x))
        return s0, self.second(s0)


Stem = Literal["cifar", "strided", "imagenet"]
STEMS: dict[str, type[CifarStem] | type[ImageNetStem]] = {
    "cifar": CifarStem,
    "strided": StridedStem,
    "imagenet": ImageNetStem,
}


def make_stem(name: str, in_channels: int, channels: int) -> CifarStem | ImageNetStem:
    """The stem of that name.

    Raises:
        ValueError: If the name is unknown or ``in_channels`` below 1.
    """
    one_of("stem", name, STEMS)
    if in_channels < 1:
        raise ValueError(f"in_channels must be >= 1, got {in_channels}")
    return STEMS[name](in_channels, channels)


class Inputs(nn.Module):
    """Brings a cell's two inputs to its width and to one resolution."""

    def __init__(self, place: Place, *, affine: bool) -> None:
        super().__init__()
        shrink = FactorizedReduce if place.reduction_previous else relu_conv_bn
        self.before = shrink(place.c_before_previous, place.channels, affine=affine)
        self.previous = relu_conv_bn(place.c_previous, place.channels, affine=affine)

    def forward(self, s0: Tensor, s1: Tensor) -> list[Tensor]:
        """States 0 and 1 of the cell."""
        return [self.before(s0), self.previous(s1)]


def drop_path(x: Float[Tensor, "batch ..."], probability: float) -> Float[Tensor, "batch ..."]:
    """Zeroes whole samples with ``probability`` and scales the others by 1 / (1 - probability).

    The mask comes from torch's global generator, as dropout's does.

    Example:
        >>> torch.equal(drop_path(torch.ones(3, 2), 0.0), torch.ones(3, 2))
        True
    """
    if probability == 0.0:
        return x
    keep = 1.0 - probability
    mask = x.new_empty(x.shape[0], *([1] * (x.dim() - 1))).bernoulli_(keep)
    return x * mask.div_(keep)


class Cell(nn.Module):
    """One cell of a genotype: (B, C0, H0, W0) and (B, C1, H, W) -> (B, len(concat) C, H/s, W/s)."""

    def __init__(self, genotype: CellGenotype, place: Place) -> None:
        super().__init__()
        self.genotype = genotype
        self.inputs = Inputs(place, affine=True)
        self.operations = nn.ModuleList()
        for name, predecessor in genotype.ops:
            stride = 2 if place.reduction and predecessor < 2 else 1
            made: Any = operation(name, place.channels, stride)
            made.chosen = Chosen(name, stride, "")
            self.operations.append(made)

    def forward(self, s0: Tensor, s1: Tensor, drop: float = 0.0) -> Tensor:
        """The output, each operation but the identity dropped per sample with probability ``drop`` in training."""
        states = self.inputs(s0, s1)
        outputs: list[Tensor] = []
        for module, (_, predecessor) in zip(self.operations, self.genotype.ops, strict=True):
            y = module(states[predecessor])
            if self.training and not isinstance(module, nn.Identity):
                y = drop_path(y, drop)
            outputs.append(y)
            if len(outputs) == 2:
                states.append(outputs[0] + outputs[1])
                outputs = []
        return torch.cat([states[i] for i in self.genotype.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """A second classifier in the middle of the network: pooling to 2x2, 1x1 and 2x2 convolution, linear.

    The published head pools 8x8 maps with a 5x5 window and stride 3 (7x7 maps with stride 2). Here the window follows
    the size: stride floor(3/8 H), at least 1, and whatever window then gives two positions an axis, so 8x8 and 7x7
    are the published head; an axis of one pixel is repeated.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """The auxiliary logits."""
        x = functional.relu(x)
        height, width = x.shape[-2:]
        if height == 1 or width == 1:
            x = x.expand(-1, -1, max(height, 2), max(width, 2))
            height, width = x.shape[-2:]
        stride = max(1, 3 * height // 8), max(1, 3 * width // 8)
        pooled = functional.avg_pool2d(x, (height - stride[0], width - stride[1]), stride)
        return self.classifier(self.features(pooled))


class Network(nn.Module):
    """The evaluation network of a genotype: stem, cells, global average pool, linear classifier.

    ``forward`` always returns the logits; :meth:`forward_with_auxiliary` returns the auxiliary head's beside them.

    Args:
        genotype: What the cells hold.
        in_channels: Channels of the images.
        num_classes: Number of classes, at least 1.
        channels: Width of the first cell, at least 2.
        cells: Number of cells, at least 1.
        reductions: Indices of the cells that halve the resolution and double the width.
        drop_path: Probability in [0, 1) of dropping an operation for a sample in training; settable at any time.
        auxiliary: Whether there is an auxiliary head after cell 2L//3.
        stem: ``cifar`` keeps the resolution, ``strided`` halves it, ``imagenet`` divides it by 8.
        seed: Of the initial weights; ``None`` draws from torch's global generator.

    Raises:
        ValueError: If a number is out of range or the stem unknown.
    """

    def __init__(
        self,
        genotype: CellsGenotype,
        in_channels: int,
        num_classes: int,
        *,
        channels: int,
        cells: int,
        reductions: frozenset[int],
        drop_path: float = 0.0,
        auxiliary: bool = False,
        stem: Stem = "cifar",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be >= 1, got {num_classes}")
        self.genotype = genotype
        self.num_classes = num_classes
        self.drop_path = drop_path
        widths = len(genotype.normal.concat), len(genotype.reduce.concat)
        with nullcontext() if seed is None else seeded(seed, "init"):
            stack = list(places(channels, cells, reductions, stem, widths))
            self.stem = make_stem(stem, in_channels, channels)
            self.cells = nn.ModuleList(
                Cell(genotype.reduce if place.reduction else genotype.normal, place) for place in stack
            )
            outputs = [place.channels * widths[place.reduction] for place in stack]
            self.classifier = nn.Linear(outputs[-1], num_classes)
            self.auxiliary_cell = 2 * cells // 3
            self.auxiliary = AuxiliaryHead(outputs[self.auxiliary_cell], num_classes) if auxiliary else None

    @property
    def drop_path(self) -> float:
        """Probability of dropping an operation for a sample in training."""
        return self._drop_path

    @drop_path.setter
    def drop_path(self, probability: float) -> None:
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), got {probability}")
        self._drop_path = float(probability)

    def features(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch features"]:
        """What the classifier reads: the last cell's output, averaged over positions."""
        return self._run(x)[0]

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        return self.classifier(self.features(x))

    def forward_with_auxiliary(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> tuple[Float[Tensor, "batch classes"], Float[Tensor, "batch classes"]]:
        """The logits and the auxiliary head's logits.

        Raises:
            ValueError: If the network was built without auxiliary head.
        """
        if self.auxiliary is None:
            raise ValueError("the network must be built with auxiliary=True to have auxiliary logits")
        pooled, middle = self._run(x)
        return self.classifier(pooled), self.auxiliary(middle)

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        s0, s1 = self.stem(x)
        middle = s1
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, self._drop_path)
            if index == self.auxiliary_cell:
                middle = s1
        return s1.mean((2, 3)), middle
