"""What elastic deformation and the prototype layer cost, beside the code that one would write instead.

    python benchmarks/prototypes.py [--rounds 20]

One thread, alternating rounds, medians and quartiles of the ratio peer / ours. Elastic deformation of 250 images of
28x28: our batch against scipy, image by image (two Gaussian filters, ``map_coordinates`` of order 1), on given noise
and with the noise drawn; on the same noise the largest difference is told. The prototype layer, forward and backward,
at batch 250, 15 prototypes and 40 dimensions (the published network) and at 2048, 200 and 512: against the tensor of
all differences, and against ``torch.cdist`` squared. Then the training step of the published network, with and without
deformation. Exit 1 if filtering and reading are not 10 times as fast as scipy's loop, or differ by more than 1e-3.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from netwright.console import table
from netwright.cost import compare_times
from netwright.data.elastic import Elastic, displaced, elastic_deform, smoothed
from netwright.explain import PrototypeClassifier, PrototypeLoss, mnist_conv_decoder, mnist_conv_encoder
from netwright.explain.prototypes import squared_distances
from netwright.seeding import seeded, stream

FASTER, TOLERANCE = 10.0, 1e-3
COUNT, SIDE, ALPHA, SIGMA = 250, 28, 20.0, 4.0

Calls = dict[str, Callable[[], Any]]


def by_scipy(images: Tensor, noise: np.ndarray) -> np.ndarray:
    """Elastic deformation image by image."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    out = np.empty((len(images), SIDE, SIDE), np.float32)
    for i, image in enumerate(images[:, 0].numpy()):
        down, right = (ALPHA * ndimage.gaussian_filter(n, SIGMA, mode="constant", cval=0) for n in noise[i])
        out[i] = ndimage.map_coordinates(image, [rows + down, columns + right], order=1)
    return out


def deformation() -> tuple[dict[str, Calls], float]:
    """Both ways on given noise and with a draw of it, and the largest difference on the same noise."""
    images = torch.rand(COUNT, 1, SIDE, SIDE, generator=stream(0, "images"))
    noise = torch.empty(COUNT, 2, SIDE, SIDE).uniform_(-1, 1, generator=stream(0, "noise"))
    drawn = elastic_deform(images, ALPHA, SIGMA, stream(0, "noise"))
    gap = float(np.abs(drawn[:, 0].numpy() - by_scipy(images, noise.numpy())).max())
    generator, random = stream(0, "draws"), np.random.default_rng(0)
    augment = Elastic(ALPHA, SIGMA)
    given: Calls = {
        "ours": lambda: displaced(images, ALPHA * smoothed(noise, SIGMA)),
        "scipy": lambda: by_scipy(images, noise.numpy()),
    }
    whole: Calls = {
        "ours": lambda: augment(images, generator),
        "scipy": lambda: by_scipy(images, random.uniform(-1, 1, (COUNT, 2, SIDE, SIDE)).astype(np.float32)),
    }
    return {f"{COUNT} images deformed, noise given": given, f"{COUNT} images deformed, noise drawn": whole}, gap


def layer(batch: int, prototypes: int, dim: int) -> Calls:
    """Forward and backward of the squared distances."""
    z = torch.randn(batch, dim, generator=stream(0, "z")).requires_grad_()
    p = torch.rand(prototypes, dim, generator=stream(0, "p")).requires_grad_()

    def run(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(z, p).sum(), (z, p))

    return {
        "ours": run(squared_distances),
        "all differences": run(lambda a, b: (a[:, None] - b).square().sum(2)),
        "cdist squared": run(lambda a, b: torch.cdist(a, b) ** 2),
    }


def steps() -> Calls:
    """The training step of the published network at batch 250."""
    x = torch.rand(COUNT, 1, SIDE, SIDE, generator=stream(0, "images"))
    y = torch.randint(10, (COUNT,), generator=stream(0, "labels"))

    def step(augment: Elastic | None) -> Callable[[], None]:
        with seeded(0, "init"):
            network = PrototypeClassifier(mnist_conv_encoder(), mnist_conv_decoder(), 15, 10, input_shape=(1, 28, 28))
        network = network.to(memory_format=torch.channels_last)
        optimizer, loss = torch.optim.Adam(network.parameters(), lr=2e-3), PrototypeLoss()
        generator = stream(0, "deformation")

        def once() -> None:
            images = x if augment is None else augment(x, generator)
            images = images.clone(memory_format=torch.channels_last)
            optimizer.zero_grad()
            loss(network(images), images, y).total.backward()
            optimizer.step()

        return once

    return {"plain": step(None), "with elastic deformation": step(Elastic(ALPHA, SIGMA))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    subjects, gap = deformation()
    for size in ((COUNT, 15, 40), (2048, 200, 512)):
        subjects["distances, {} x {} x {}".format(*size)] = layer(*size)
    rows: list[list[Any]] = []
    ratios: dict[str, float] = {}
    for name, each in subjects.items():
        found = compare_times(each, rounds=rounds, threads=1)
        for peer in found.timings[1:]:
            ratios.setdefault(peer.name, peer.ratio)
            spread = f"{peer.ratio_low:.1f}..{peer.ratio_high:.1f}"
            times = [f"{found['ours'].median_ms:.3f}", f"{peer.median_ms:.3f}"]
            rows.append([name, peer.name, *times, f"{peer.ratio:.1f}", spread])
    print(table(rows, ["what", "peer", "ours, ms", "peer, ms", "times as fast", "quartiles"]))
    print(f"\nlargest difference from scipy on the same noise: {gap:.1e}\n")
    found = compare_times(steps(), rounds=rounds, threads=1)
    rows = [[t.name, f"{t.median_ms:.1f}", f"{t.ratio:.3f}"] for t in found.timings]
    print(table(rows, ["training step of the published network", "ms", "over plain"]))
    return int(ratios["scipy"] < FASTER or gap > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
