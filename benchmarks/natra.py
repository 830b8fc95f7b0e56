"""What natural transformations cost: inversion of a batch, an epoch with transformed images, closed-form directions.

    python benchmarks/natra.py [NAME ...] [--rounds 7] [--quick]

`inversion`: ten steps for 32 and for 256 images at once, over the same images one at a time (aim at 256: at least 5
times as fast, which needs a machine that computes a batch in parallel; one thread saves no more than the overhead of
calls). `training`: an epoch of a small convolutional network on 640 images of 28x28 with the worst of eight
transformations from a grid, over a plain epoch, both under Lightning (aim: at most 3). `directions`: the closed form
for a generator of 512 numbers a code and 18 layers of 512 channels (aim: below 1 second), beside ``numpy.linalg.svd``
of the stacked weights. The generator has random weights: nothing measured here depends on them. Alternating rounds on
two threads, or one on a machine with one core; medians and quartiles of the ratio within a round. The figures of all
three go to benchmarks/results/; --quick takes small sizes and writes nothing. Exit 1 if an aim is missed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from netwright.console import configure
from netwright.cost import Comparison, compare_times
from netwright.data import Batches, TensorImages
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream
from netwright.train import Classifier, NaTraTraining, fit
from netwright.train.natra import (
    BatchInverter,
    DecoderGenerator,
    LatentCodes,
    NaturalTransform,
    StyleGenerator,
    TransformGrid,
    latent_directions,
)
from support.record import Figure, over
from support.whole import recorded

THREADS = min(2, os.cpu_count() or 1)
Calls = dict[str, Callable[[], Any]]


def generator(side: int) -> StyleGenerator:
    with seeded(0, "generator"):
        return StyleGenerator((1, side, side))


def inverting(count: int, side: int) -> Calls:
    """Ten steps for a batch, and for each of its images alone."""
    x = torch.rand(count, 1, side, side, generator=stream(0, "x"))
    inverter = BatchInverter(generator(side), steps=10)
    return {
        "one batch": lambda: inverter.invert(x),
        "one at a time": lambda: [inverter.invert(each[None]) for each in x],
    }


def epochs(count: int, side: int) -> Calls:
    """Epochs: plain, with one random transformation an image, with the worst of eight; grid and decoding."""
    images = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=stream(0, "images"))
    data = TensorImages(images, torch.arange(count) % 10)
    made = torch.randint(0, 256, (count, 5, 5, 1, side, side), dtype=torch.uint8, generator=stream(0, "grid"))
    made[:, :, 2] = images[:, None]  # a step of 0 leaves an image as it is
    grid = TransformGrid(made, torch.linspace(-2, 2, 5))
    style = generator(side)
    w = torch.randn(count, 1, style.num_layers, style.w_dim, generator=stream(0, "w"))
    decoded = NaturalTransform(style, LatentCodes(w), latent_directions(style, "weights", k=5), images / 255)

    def epoch(*methods: NaTraTraining) -> Callable[[], None]:
        with seeded(0, "init"):
            net = SmallConvNet(in_channels=1, grid=4)

        def run() -> None:
            fit(Classifier(net, lr=1e-3), Batches(data, 64, indexed=bool(methods)), epochs=1, callbacks=methods)

        return run

    return {
        "plain": epoch(),
        "grid, one at random": epoch(NaTraTraining(grid, "random")),
        "grid, worst of 8": epoch(NaTraTraining(grid, k=8)),
        "decoded, worst of 8": epoch(NaTraTraining(decoded, k=8)),
    }


def decomposing(width: int, layers: int) -> Calls:
    """Eigenvectors of A^T A, beside a singular value decomposition of A."""
    a = torch.randn(layers * width, width, generator=stream(0, "A"))
    wide = DecoderGenerator(nn.Identity(), width, weight=a)
    return {
        "ours": lambda: latent_directions(wide, "weights", k=20),
        "numpy.linalg.svd": lambda: np.linalg.svd(a.double().numpy(), full_matrices=False),
    }


def timed(calls: Calls, rounds: int) -> Comparison:
    found = compare_times(calls, rounds=rounds, threads=THREADS)
    print(found)
    return found


def inversion(rounds: int, quick: bool) -> list[Figure]:
    """Two sizes of a batch, of which the specification has the larger."""
    figures = []
    for count, least in ((4, None), (8, 5)) if quick else ((32, None), (256, 5)):
        found = timed(inverting(count, 8 if quick else 28), rounds)
        figures.append(
            over(found["one at a time"], f"inversion of {count} images one at a time, over a batch", least=least)
        )
    return figures


def training(rounds: int, quick: bool) -> list[Figure]:
    """What each kind of transformation adds to an epoch."""
    found = timed(epochs(64, 8) if quick else epochs(640, 28), rounds)
    aims = {"grid, worst of 8": 3}
    return [
        over(each, f"an epoch, {each.name}, over a plain one", most=aims.get(each.name)) for each in found.timings[1:]
    ]


def directions(rounds: int, quick: bool) -> list[Figure]:
    """Seconds of the closed form."""
    found = timed(decomposing(8, 2) if quick else decomposing(512, 18), rounds)
    return [
        Figure("seconds for the directions of 18 layers of 512 channels", found["ours"].median_ms / 1e3, most=1),
        over(found["numpy.linalg.svd"], "numpy.linalg.svd, over ours"),
    ]


if __name__ == "__main__":
    configure(quiet=True)
    subjects = {"inversion": inversion, "training": training, "directions": directions}
    sys.exit(recorded("natra", __doc__ or "", subjects, rounds=7, threads=THREADS))
