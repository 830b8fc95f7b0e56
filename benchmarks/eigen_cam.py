"""Eigen-CAM beside the package ``grad-cam``, and beside the forward pass that it needs in any case.

    python benchmarks/eigen_cam.py [--rounds 20] [--threads 1] [--tiny]

Maps alone: the first principal direction of activations that are there already, centred as ``grad-cam`` has it, batch
32 of 512 channels at 28x28 (aim: 5 times as fast) and batch 16 of 2048 channels at 7x7 (20 times). Activations are
noise behind a ReLU, on top of a bright region as a network's have one; then without it, which is the worst case: no
direction stands out, the iteration would not converge, and the Gram matrix is decomposed. Whole: from images to maps
at their size with ResNet-50's last layer, over its forward pass alone (aim: at most 1.05), and ``grad-cam`` likewise.
All in alternating rounds: medians and quartiles of the ratio within a round. Exit 1 if an aim is missed. ``--tiny``
checks that it runs, on sizes that measure nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision import models

from netwright.console import table
from netwright.cost import compare_times
from netwright.explain import EigenCAM, eigen_cam
from netwright.seeding import seeded, stream

Calls = dict[str, Callable[[], Any]]
INSTALLED = importlib.util.find_spec("pytorch_grad_cam") is not None


def activations(batch: int, channels: int, side: int, bright: float = 1.0) -> torch.Tensor:
    """Half noise and half one bright region that many channels see."""
    generator = stream(0, "activations")
    axis = torch.linspace(-1, 1, side)
    region = torch.exp(-4 * (axis[:, None] ** 2 + (axis - 0.3) ** 2))
    weights = torch.randn(batch, channels, 1, 1, generator=generator).relu()
    return (bright * weights * region + 0.5 * torch.randn(batch, channels, side, side, generator=generator)).relu()


def maps(batch: int, channels: int, side: int, bright: float) -> Calls:
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


def whole(batch: int, size: int, network: nn.Module) -> Calls:
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    rounds, threads = (2, given.threads) if given.tiny else (given.rounds, given.threads)
    sizes = {(2, 64, 14): 5, (2, 128, 7): 20} if given.tiny else {(32, 512, 28): 5, (16, 2048, 7): 20}
    if not INSTALLED:
        print("grad-cam is not installed: pip install grad-cam\n")
    rows: list[list[Any]] = []
    missed = False
    cases = [(*shape, bright, aim) for bright in (1.0, 0.0) for shape, aim in sizes.items()]
    for batch, channels, side, bright, aim in cases:
        found = compare_times(maps(batch, channels, side, bright), rounds=rounds, threads=threads)
        for timing in found.timings:
            faster = f"{timing.ratio:.2f}" if timing.name == "grad-cam" else ""
            spread = f"{timing.ratio_low:.2f}..{timing.ratio_high:.2f}"
            judged = faster and not given.tiny
            told = f">= {aim}: {'met' if timing.ratio >= aim else 'missed'}" if judged else ""
            missed |= told.endswith("missed")
            name = f"{batch} x {channels} x {side} x {side}{'' if bright else ', noise'}"
            rows.append([name, timing.name, f"{timing.median_ms:.1f}", faster, spread if faster else "", told])
    print(table(rows, ["activations", "maps by", "ms", "time / ours", "quartiles", "aim"]))
    print()
    with seeded(0, "init"):
        network = (models.resnet18() if given.tiny else models.resnet50()).eval()
    found = compare_times(
        whole(2, 64, network) if given.tiny else whole(8, 224, network), rounds=rounds, threads=threads
    )
    rows = []
    for timing in found.timings:
        judged = timing.name == "ours" and not given.tiny
        told = f"<= 1.05: {'met' if timing.ratio <= 1.05 else 'missed'}" if judged else ""
        missed |= told.endswith("missed")
        spread = f"{timing.ratio_low:.3f}..{timing.ratio_high:.3f}"
        rows.append([timing.name, f"{timing.median_ms:.1f}", f"{timing.ratio:.3f}", spread, told])
    print(table(rows, ["ResNet, images to maps", "ms", "over the forward pass", "quartiles", "aim"]))
    print(f"\n{found.cpu}, {found.threads} threads, {found.rounds} rounds")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
