"""Eigen-CAM beside the package ``grad-cam``, and beside the forward pass that it needs in any case.

    python benchmarks/eigen_cam.py [NAME ...] [--rounds 20] [--quick]

`maps`: the first principal direction of activations that are there already, centred as ``grad-cam`` has it, batch 32
of 512 channels at 28x28 (aim: 5 times as fast) and batch 16 of 2048 channels at 7x7 (20 times). Activations are noise
behind a ReLU, on top of a bright region as a network's have one; then without it, which is the worst case: no direction
stands out, the iteration would not converge, and the Gram matrix is decomposed. `whole`: from images to maps at their
size with ResNet-50's last layer, over its forward pass alone (aim: at most 1.05), and ``grad-cam`` likewise. One
thread, alternating rounds, medians and quartiles of the ratio within a round. When both have run, the figures go beside
their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models

from netwright.cost import compare_times
from netwright.explain import EigenCAM, eigen_cam
from netwright.seeding import seeded, stream
from support.record import Figure, over
from support.whole import recorded

Calls = dict[str, Callable[[], Any]]
INSTALLED = importlib.util.find_spec("pytorch_grad_cam") is not None


def activations(batch: int, channels: int, side: int, bright: float = 1.0) -> torch.Tensor:
    """Half noise and half one bright region that many channels see."""
    generator = stream(0, "activations")
    axis = torch.linspace(-1, 1, side)
    region = torch.exp(-4 * (axis[:, None] ** 2 + (axis - 0.3) ** 2))
    weights = torch.randn(batch, channels, 1, 1, generator=generator).relu()
    return (bright * weights * region + 0.5 * torch.randn(batch, channels, side, side, generator=generator)).relu()


def maps_of(batch: int, channels: int, side: int, bright: float) -> Calls:
    """The computation of maps alone; of ours also as the paper has it, without centring."""
    given = activations(batch, channels, side, bright)
    calls: Calls = {
        "ours": lambda: eigen_cam(given, center=True),
        "ours, uncentred": lambda: eigen_cam(given),
    }
    if INSTALLED:
        from pytorch_grad_cam.utils.svd_on_activations import get_2d_projection

        array = given.numpy()
        calls["grad-cam"] = lambda: get_2d_projection(array)
    return calls


def whole_of(batch: int, size: int, network: nn.Module) -> Calls:
    """From images to maps, beside the forward pass alone."""
    x = torch.randn(batch, 3, size, size, generator=stream(0, "images"))
    ours = EigenCAM(network)

    def plain() -> None:
        with torch.inference_mode():
            network(x)

    calls: Calls = {"forward pass": plain, "ours": lambda: ours(x)}
    ours(x)  # finds the layer
    if INSTALLED:
        from pytorch_grad_cam import EigenCAM as Peer

        assert ours.layers is not None
        peer = Peer(network, ours.layers)
        calls["grad-cam"] = lambda: peer(x, targets=None)
    return calls


def maps(rounds: int, quick: bool) -> list[Figure]:
    sizes = {(2, 64, 14): 5, (2, 128, 7): 20} if quick else {(32, 512, 28): 5, (16, 2048, 7): 20}
    figures = []
    for bright in (1.0, 0.0):
        for (batch, channels, side), aim in sizes.items():
            found = compare_times(maps_of(batch, channels, side, bright), rounds=rounds, threads=1)
            name = f"{batch} x {channels} x {side} x {side}{'' if bright else ', noise'}"
            print(f"{name}\n{found}")
            what = f"maps of {name}: grad-cam, times as long"
            if not INSTALLED:
                figures.append(Figure(what, None, least=aim, note="not installed"))
                continue
            note = (
                f"{found['grad-cam'].median_ms:.3g} ms, ours {found['ours'].median_ms:.3g}, uncentred "
                f"{found['ours, uncentred'].median_ms:.3g}"
            )
            figures.append(over(found["grad-cam"], what, least=aim, note=note))
    return figures


def whole(rounds: int, quick: bool) -> list[Figure]:
    with seeded(0, "init"):
        network = (models.resnet18() if quick else models.resnet50()).eval()
    calls = whole_of(2, 64, network) if quick else whole_of(8, 224, network)
    print(found := compare_times(calls, rounds=rounds, threads=1))
    what = "ResNet-18" if quick else "ResNet-50"
    plain = f"{found['forward pass'].median_ms:.3g} ms the forward pass"
    figures = [over(found["ours"], f"{what}, images to maps, over the forward pass", most=1.05, note=plain)]
    if INSTALLED:
        figures.append(over(found["grad-cam"], f"{what}, images to maps by grad-cam, over the forward pass"))
    return figures


if __name__ == "__main__":
    sys.exit(recorded("eigen_cam", __doc__ or "", {"maps": maps, "whole": whole}, rounds=20))
