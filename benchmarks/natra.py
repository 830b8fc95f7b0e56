"""What natural transformations cost: inversion of a batch, an epoch with transformed images, closed-form directions.

    python benchmarks/natra.py [--rounds 7] [--threads 2] [--tiny]

Inversion: ten steps for 32 and for 256 images at once, over the same images one at a time (aim at 256: at least 5 times
as fast, which needs a machine that computes a batch in parallel; one thread saves no more than the overhead of calls).
Training: an epoch of a small convolutional network on 640 images of 28x28 with the worst of eight transformations from
a grid, over a plain epoch, both under Lightning (aim: at most 3). Directions: the closed form for a generator of 512
numbers a code and 18 layers of 512 channels (aim: below 1,000 ms), beside ``numpy.linalg.svd`` of the stacked weights.
The generator has random weights: nothing measured here depends on them. Alternating rounds; medians and quartiles of
the ratio within a round. ``--tiny`` checks that it runs, on sizes that measure nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from netwright.console import configure, table
from netwright.cost import Timing, compare_times
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
from support.aims import judged

Calls = dict[str, Callable[[], Any]]


def generator(side: int) -> StyleGenerator:
    with seeded(0, "generator"):
        return StyleGenerator((1, side, side))


def inversion(count: int, side: int) -> Calls:
    """Ten steps for a batch, and for each of its images alone."""
    x = torch.rand(count, 1, side, side, generator=stream(0, "x"))
    inverter = BatchInverter(generator(side), steps=10)
    return {
        "one batch": lambda: inverter.invert(x),
        "one at a time": lambda: [inverter.invert(each[None]) for each in x],
    }


def training(count: int, side: int) -> Calls:
    """Epochs: plain, with one random transformation an image, with the worst of eight; grid and decoding."""
    images = torch.randint(0, 256, (count, 1, side, side), dtype=torch.uint8, generator=stream(0, "images"))
    data = TensorImages(images, torch.arange(count) % 10)
    made = torch.randint(0, 256, (count, 5, 5, 1, side, side), dtype=torch.uint8, generator=stream(0, "grid"))
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


def directions(width: int, layers: int) -> Calls:
    """Eigenvectors of A^T A, beside a singular value decomposition of A."""
    a = torch.randn(layers * width, width, generator=stream(0, "A"))
    wide = DecoderGenerator(nn.Identity(), width, weight=a)
    return {
        "ours": lambda: latent_directions(wide, "weights", k=20),
        "numpy.linalg.svd": lambda: np.linalg.svd(a.double().numpy(), full_matrices=False),
    }


def aim(subject: str, timing: Timing) -> str:
    """What the specification asks of a call, and whether it is so."""
    if (subject, timing.name) == ("inversion, 256 images", "one at a time"):
        return judged(timing.ratio, least=5)
    if timing.name == "grid, worst of 8":
        return judged(timing.ratio, most=3)
    if (subject, timing.name) == ("directions", "ours"):
        return judged(timing.median_ms, most=1000)
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    configure(quiet=True)
    subjects = {
        "inversion": inversion(4, 8) if options.tiny else inversion(32, 28),
        "inversion, 256 images": inversion(8, 8) if options.tiny else inversion(256, 28),
        "an epoch": training(64, 8) if options.tiny else training(640, 28),
        "directions": directions(8, 2) if options.tiny else directions(512, 18),
    }
    for name, calls in subjects.items():
        found = compare_times(calls, rounds=options.rounds, threads=options.threads)
        rows = [
            [
                each.name, f"{each.median_ms:.1f}", f"{each.ratio:.2f}", f"{each.ratio_low:.2f}..{each.ratio_high:.2f}",
                "" if options.tiny else aim(name, each),
            ]
            for each in found.timings
        ]  # fmt: skip
        print(table(rows, [name, "ms", "over the first", "quartiles", "aim"]))
        print()


if __name__ == "__main__":
    main()
