"""Whether a translator is ready to make views: it changes what is easy in the data, and leaves the rest.

Nobody tells what the bias is, so two small networks stand for it and for the signal: one that was made to learn what is
easy (generalised cross-entropy, arXiv:2007.02561), and, for pictures in colour, one that sees no colour. In its first
steps a translator changes everything; views of that time teach a classifier nothing.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from netwright.data.splits import subset
from netwright.data.tensors import Batches, Normalise, TensorImages
from netwright.nn.convnet import SmallConvNet
from netwright.results import Result
from netwright.seeding import seeded
from netwright.train.classifier import Classifier, evaluate
from netwright.train.debias.failure import BiasedClassifier
from netwright.train.debias.measures import translation_rates
from netwright.train.debias.views import Translates, translated
from netwright.train.fitting import fit

if TYPE_CHECKING:
    from netwright.data import Data

READER_STEPS, READER_BATCH = 300, 64
MOST_IMAGES, MOST_GREY = 500, 5000


@dataclasses.dataclass(frozen=True)
class TranslationQuality(Result):
    """What translating into another class does to validation images.

    Attributes:
        images: How many were translated.
        chance: What guessing would reach of the two shares: one by the number of classes.
        transfer: Share that a reader of what is easy takes for the class they were translated into.
        kept: Share that a reader of grey pictures takes for the class they came from; None for pictures without colour.
        change: Mean absolute change of a pixel, in [0, 1].
    """

    images: int
    chance: float
    transfer: float
    kept: float | None
    change: float

    @property
    def enough(self) -> float:
        """Either share should reach at least that: twice chance, or half of what is above chance where that is less."""
        return min(2 * self.chance, (1 + self.chance) / 2)

    def faults(self) -> tuple[str, ...]:
        """Why the translator should not be used yet, each with what to do; empty where it may be.

        Example:
            >>> TranslationQuality(500, 0.1, 0.95, 0.8, 0.2).faults()
            ()
            >>> print(*TranslationQuality(500, 0.1, 0.1, 0.9, 0.001).faults())
            the bias hardly changes: 10 % of the translations have that of their new class, chance is 10 %; more steps
        """
        found = []
        if self.transfer < self.enough:
            found.append(
                f"the bias hardly changes: {100 * self.transfer:.0f} % of the translations have that of their new "
                f"class, chance is {100 * self.chance:.0f} %; more steps"
            )
        if self.kept is not None and self.kept < self.enough:
            found.append(
                f"the figure itself changes: {100 * self.kept:.0f} % of the translations keep it, chance is "
                f"{100 * self.chance:.0f} %; more steps, or another lambda_rec"
            )
        return tuple(found)


def translation_quality(translator: Translates, data: Data, *, most: int = MOST_IMAGES) -> TranslationQuality:
    """Translates validation images into other classes, and lets two readers judge; they take a few seconds.

    Args:
        translator: Turns images into other classes.
        data: Pictures; the readers are trained on the training part.
        most: Images that are translated, at most, >= 1.
    """
    images, labels = sample(data, most)
    targets = other_classes(labels, len(data.classes))
    made = translated(translator, images, targets)
    read = answers(reader_of_bias(data), made, labels, data.normalise())
    shape: Tensor | None = None
    if data.shape[0] > 1:
        reader, normalise = _reader_of_grey(data)
        shape = answers(reader, _grey(made), labels, normalise)
    rates = translation_rates(read, labels if shape is None else shape, labels, targets)
    change = float((made.float() - images.float()).abs().mean()) / 255
    kept = None if shape is None else rates["signal kept"]
    return TranslationQuality(len(labels), 1 / len(data.classes), rates["bias transfer"], kept, change)


def sample(data: Data, most: int = MOST_IMAGES) -> tuple[UInt8[Tensor, "images ..."], Int[Tensor, "images"]]:
    """Validation images as bytes and their labels, stratified."""
    part = data.validation
    chosen = subset(part, min(most, len(part)), seed=0)
    pixels = torch.stack([part[i][0] for i in chosen.tolist()])
    return (255 * pixels).round().byte(), part.labels[chosen]


def other_classes(labels: Int[Tensor, "images"], count: int) -> Int[Tensor, "images"]:
    """A class for each that is never its own, all in turn.

    Example:
        >>> other_classes(torch.tensor([0, 0, 2]), 3).tolist()
        [1, 2, 0]
    """
    return (labels + 1 + torch.arange(len(labels)) % (count - 1)) % count


def answers(network: nn.Module, images: Tensor, labels: Tensor, normalise: Normalise) -> Int[Tensor, "images"]:
    """What a network takes images for."""
    whole = Batches(TensorImages(images, labels), 256, shuffle=False, drop_last=False, normalise=normalise)
    return evaluate(network, whole)[0].argmax(1)


def reader_of_bias(data: Data) -> nn.Module:
    """A small network that was made to learn what is easy in the data: it reads the bias, if there is one."""
    network = _small(data, data.shape[0])
    batches = Batches(data.train, READER_BATCH, normalise=data.normalise(), steps=READER_STEPS, name="reader")
    fit(BiasedClassifier(network), batches, epochs=1, description="reader of the bias")
    return network


def _reader_of_grey(data: Data) -> tuple[nn.Module, Normalise]:
    chosen = subset(data.train.labels, min(MOST_GREY, len(data.train)), seed=0)  # the whole may not fit into memory
    images = torch.stack([data.train[i][0] for i in chosen.tolist()])
    grey = TensorImages(_grey((255 * images).round().byte()), data.train.labels[chosen])
    mean, square = grey.moments()
    normalise = Normalise(mean.tolist(), ((square - mean**2).clip(1e-8) ** 0.5).tolist())
    network = _small(data, 1)
    batches = Batches(grey, READER_BATCH, normalise=normalise, steps=READER_STEPS, name="reader of grey")
    fit(Classifier(network, lr=0.05), batches, epochs=1, description="reader of the figure")
    return network, normalise


def _small(data: Data, channels: int) -> SmallConvNet:
    with seeded(0, "reader"):
        return SmallConvNet((8, 16), num_classes=len(data.classes), in_channels=channels)


def _grey(images: Tensor) -> Tensor:
    """The largest channel: of a coloured figure whose colour has a full channel, the figure."""
    return images.amax(1, keepdim=True)
