"""The classifier that tells which directions leave the class of an image alone."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor, nn

from netwright.data import Batches, Normalise, TensorImages
from netwright.data.splits import subset
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded
from netwright.train.classifier import Classifier
from netwright.train.fitting import fit
from netwright.train.natra.fitting import Pictures
from netwright.train.natra.recipe import GENERATOR_IMAGES
from netwright.train.schedules import CosineProgress

CHANNELS = (16, 32)


def reference_network(
    shape: tuple[int, int, int], num_classes: int, channels: Sequence[int] = CHANNELS
) -> nn.Sequential:
    """The untrained network behind the layer that standardises images in [0, 1], by 0 and 1 so far."""
    side = min(shape[1:]) // 2 ** len(channels)
    network = SmallConvNet(channels, in_channels=shape[0], num_classes=num_classes, grid=max(1, min(4, side)))
    return nn.Sequential(Normalise([0.0] * shape[0], [1.0] * shape[0]), network)


def reference_classifier(
    images: Pictures,
    labels: Int[Tensor, "images"],
    *,
    epochs: int = 10,
    channels: Sequence[int] = CHANNELS,
    seed: int = 0,
) -> nn.Sequential:
    """A small network trained on images as they are, behind the layer that standardises them: [0, 1] to logits.

    Example:
        >>> import torch
        >>> pictures = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
        >>> reference_classifier(pictures, torch.arange(32) % 3, epochs=1)(pictures[:2] / 255).shape
        torch.Size([2, 3])
    """
    data = TensorImages(images, labels)
    if len(data) > GENERATOR_IMAGES:
        data = data.subset(subset(data, GENERATOR_IMAGES, seed=seed))
    mean, square = data.moments()
    std = (square - mean**2).clip(1e-8) ** 0.5
    normalise = Normalise(mean.tolist(), std.tolist())
    with seeded(seed, "init", "reference"):
        whole = reference_network(tuple(images.shape[1:]), int(labels.max()) + 1, channels)  # type: ignore[arg-type]
    network = whole[1]
    batches = Batches(data, 64, seed=seed, normalise=normalise, name="reference")
    fit(
        Classifier(network, lr=0.05), batches, epochs=epochs, callbacks=[CosineProgress()], seed=seed,
        description="natra: reference",
    )  # fmt: skip
    return nn.Sequential(normalise, network).eval().requires_grad_(False)
