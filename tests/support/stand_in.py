"""Runtimes and a network for tests of the benchmark, found by name in the processes that measure."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import nn

from netwright.deploy.bench import Competitor, Prepared, Subject
from netwright.seeding import seeded, stream


def network(**_: object) -> nn.Sequential:
    """A small network of which the second and the last layer are pruned to a quarter."""
    with seeded(0, "tiny"):
        first = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, groups=8)]
        net = nn.Sequential(*first, nn.Flatten(), nn.Linear(128, 5)).eval()
    for layer in (net[2], net[5]):
        with torch.no_grad():
            layer.weight.flatten()[torch.arange(layer.weight.numel()) % 4 > 0] = 0
    return net


def tiny(batch: int = 1) -> Subject:
    """The network with an input."""
    example = torch.randn(batch, 3, 8, 8, generator=stream(0, "tiny")).numpy()
    return Subject("tiny", network(), example, ("2", "5"), origin="made for a test")


def unseeded() -> Subject:
    """A network whose weights are different in every process."""
    return Subject("unseeded", nn.Linear(4, 3).eval(), np.ones((1, 4), np.float32))


class Sparse(Competitor):
    """PyTorch under another name."""

    package = "torch"
    dense = False
    pool = "torch"

    def prepare(self, work, threads):
        module, x = work.module(), torch.from_numpy(work.input())
        note = f"{torch.get_num_threads()} threads in process {os.getpid()}"
        return Prepared(lambda: module(x).detach(), note, file_bytes=100, table_bytes=50)


class Dense(Sparse):
    """A dense one with threads of its own."""

    dense = True
    pool = "own"


class Missing(Sparse):
    """One that is not installed."""

    package = "no_such_package"


class Wrong(Dense):
    """One whose output is off."""

    def prepare(self, work, threads):
        made = super().prepare(work, threads)
        return Prepared(lambda: 1.01 * made.call())


class Unable(Dense):
    """One that cannot take the network."""

    def prepare(self, work, threads):
        raise NotImplementedError("no such\noperator")


class Fatal(Dense):
    """One that takes its process down."""

    def prepare(self, work, threads):
        os.write(2, b"it broke\n")
        os.abort()


class Hungry(Sparse):
    """One that keeps 64 MiB."""

    def prepare(self, work, threads):
        made, kept = super().prepare(work, threads), np.ones(2**23)
        return Prepared(lambda: (made.call(), kept))


class Moody(Dense):
    """One that works three times."""

    def prepare(self, work, threads):
        made, left = super().prepare(work, threads), [3]

        def call():
            left[0] -= 1
            if left[0] < 0:
                self.end()
            return made.call()

        return Prepared(call)

    def end(self):
        raise RuntimeError("enough")


class Doomed(Moody):
    """One that works three times and then takes its process down."""

    def end(self):
        os.abort()


SPARSE, DENSE = {"sparse": "stand_in:Sparse"}, {"dense": "stand_in:Dense"}
