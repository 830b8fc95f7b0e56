"""Images with one-hot labels for full-batch descent on the squared error, with a patch on some of them where asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

PLANTED_CLASSES, PATCH, BRIGHTNESS = (0, 7), 6, 3.0


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over classes of the squared error of each example."""
    return (outputs - targets).square().mean(1)


def one_hot_problem(name: str, seed: int, images: int) -> tuple[Tensor, Tensor]:
    """Standardised images of :func:`~netwright.papers.classification.parts` and one-hot labels."""
    from torch.nn import functional

    from netwright.papers.classification import parts

    found, normalise = parts(name, seed, images, 100, 100)
    train = found["train"]
    return normalise(train.images), functional.one_hot(train.labels, 10).float()


def planted(seed: int, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fashion-MNIST with a bright patch on 1 % of the images from each of two classes; who has it is told last."""
    import torch
    from torch.nn import functional

    from netwright.papers.classification import parts
    from netwright.seeding import stream

    found, normalise = parts("fashion-mnist", seed, images, 100, 100)
    train, draws = found["train"], stream(seed, "planted")
    members = []
    for label in PLANTED_CLASSES:
        own = (train.labels == label).nonzero().flatten()
        members.append(own[torch.randperm(len(own), generator=draws)[: max(1, images // 100)]])
    chosen = torch.cat(members)
    pixels = train.images.float() / 255
    pixels[chosen, :, :PATCH, :PATCH] = BRIGHTNESS
    return normalise(pixels), functional.one_hot(train.labels, 10).float(), chosen


def perceptron(widths: Sequence[int], seed: int, *, norm: bool = False) -> nn.Module:
    """A tanh perceptron in torch's initialisation.

    Args:
        widths: Numbers of an input, of each hidden layer, and outputs.
        seed: Of the initialisation, the same with and without normalisation.
        norm: Whether each hidden layer is normalised by the statistics of the batch, in evaluation mode too.
    """
    from functools import partial

    from torch import nn

    from netwright.nn.convnet import MLP
    from netwright.seeding import seeded

    with seeded(seed, "init"):
        layer = partial(nn.BatchNorm1d, track_running_stats=False) if norm else None
        hidden = MLP(widths[0], list(widths[1:]), norm_layer=layer, activation_layer=nn.Tanh)
        return nn.Sequential(nn.Flatten(), hidden)
