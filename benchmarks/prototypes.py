"""What elastic deformation and the prototype layer cost, beside the code that one would write instead.

    python benchmarks/prototypes.py [NAME ...] [--rounds 20] [--quick]

One thread, alternating rounds, medians and quartiles of the ratio peer / ours. `deformation`: elastic deformation of
250 images of 28x28, our batch against scipy, image by image (two Gaussian filters, ``map_coordinates`` of order 1), on
given noise (aim: 10 times as fast) and with the noise drawn; on the same noise the largest difference is told (aim: at
most 1e-3). `layer`: the prototype layer, forward and backward, at batch 250, 15 prototypes and 40 dimensions (the
published network) and at 2048, 200 and 512: against the tensor of all differences, and against ``torch.cdist`` squared.
`steps`: the training step of the published network with deformation, over that without. When all have run, the figures
go beside their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from netwright.cost import compare_times
from netwright.data.elastic import Elastic, displaced, elastic_deform, smoothed
from netwright.explain import PrototypeClassifier, PrototypeLoss, mnist_conv_decoder, mnist_conv_encoder
from netwright.explain.prototypes import squared_distances
from netwright.seeding import seeded, stream
from support.record import Figure, over
from support.whole import recorded

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


def beside(calls: Calls, rounds: int, what: str, least: float | None = None) -> list[Figure]:
    """The time of each peer over ours."""
    found = compare_times(calls, rounds=rounds, threads=1)
    print(found)
    return [
        over(
            timing,
            f"{what}: {timing.name}, times as long",
            least=least,
            note=f"{timing.median_ms:.3g} ms, ours {found['ours'].median_ms:.3g}",
        )
        for timing in found.timings[1:]
    ]


def deformation(rounds: int, quick: bool) -> list[Figure]:
    count = 10 if quick else COUNT
    images = torch.rand(count, 1, SIDE, SIDE, generator=stream(0, "images"))
    noise = torch.empty(count, 2, SIDE, SIDE).uniform_(-1, 1, generator=stream(0, "noise"))
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
        "scipy": lambda: by_scipy(images, random.uniform(-1, 1, (count, 2, SIDE, SIDE)).astype(np.float32)),
    }
    return [
        *beside(given, rounds, f"{count} images deformed, noise given", least=10),
        *beside(whole, rounds, f"{count} images deformed, noise drawn"),
        Figure("largest difference from scipy on the same noise", gap, most=1e-3),
    ]


def distances(batch: int, prototypes: int, dim: int) -> Calls:
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


def layer(rounds: int, quick: bool) -> list[Figure]:
    sizes = ((10, 15, 40),) if quick else ((COUNT, 15, 40), (2048, 200, 512))
    return [
        figure for size in sizes for figure in beside(distances(*size), rounds, "distances, {} x {} x {}".format(*size))
    ]


def steps(rounds: int, quick: bool) -> list[Figure]:
    count = 10 if quick else COUNT
    x = torch.rand(count, 1, SIDE, SIDE, generator=stream(0, "images"))
    y = torch.randint(10, (count,), generator=stream(0, "labels"))

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

    calls = {"plain": step(None), "with elastic deformation": step(Elastic(ALPHA, SIGMA))}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    note = f"{found['with elastic deformation'].median_ms:.3g} ms, plain {found['plain'].median_ms:.3g}"
    what = "a training step of the published network with elastic deformation, over plain"
    return [over(found["with elastic deformation"], what, note=note)]


if __name__ == "__main__":
    subjects = {"deformation": deformation, "layer": layer, "steps": steps}
    sys.exit(recorded("prototypes", __doc__ or "", subjects, rounds=20))
