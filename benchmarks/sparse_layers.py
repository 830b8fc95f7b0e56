"""What a sparse layer costs against the dense one: training steps of the three DASS stages, and inference.

    python benchmarks/sparse_layers.py

The peer at inference sorts all scores in every forward pass, as the published code does. Ratios are medians over
alternating rounds on one thread; below 1 is faster than the first column.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from netwright.console import table
from netwright.cost import compare_times, threads
from netwright.nn.sparse import init_scores, set_density, sparsify, train_mode

LAYERS = {
    "conv 3x3, 64 to 64, 16x16, batch 32": (lambda: nn.Conv2d(64, 64, 3, padding=1), (32, 64, 16, 16)),
    "conv 1x1, 128 to 128, 16x16, batch 32": (lambda: nn.Conv2d(128, 128, 1), (32, 128, 16, 16)),
    "linear 512 to 512, batch 128": (lambda: nn.Linear(512, 512), (128, 512)),
}
DENSITY = 0.05


class Sorted(nn.Module):
    """The layer with a mask that is found by sorting all scores in each forward pass."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.scores = torch.randn_like(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = self.scores.abs().flatten().sort().indices
        mask = torch.zeros_like(order, dtype=torch.float32)
        mask[order[int((1 - DENSITY) * len(order)) :]] = 1.0
        weight = self.layer.weight * mask.view_as(self.scores)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        return nn.functional.conv2d(x, weight, self.layer.bias, padding=self.layer.padding)


def training_step(layer: nn.Module, x: torch.Tensor):
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    return step


def stage(layer: nn.Module, density: float, what: str) -> nn.Module:
    sparse = sparsify(copy.deepcopy(layer), DENSITY)
    init_scores(sparse, "scaled")
    set_density(sparse, density)
    train_mode(sparse, what)
    return sparse


def main() -> None:
    """Prints the two tables."""
    training, inference = [], []
    with threads(1):
        for name, (make, shape) in LAYERS.items():
            layer, x = make(), torch.randn(shape)
            steps = {
                "dense": training_step(layer, x),
                "stage 1": training_step(stage(layer, 1.0, "weights"), x),
                "stage 2": training_step(stage(layer, DENSITY, "scores"), x),
                "stage 3": training_step(stage(layer, DENSITY, "weights"), x),
            }
            compared = compare_times(steps, rounds=30)
            training.append([name, *(f"{timing.ratio:.2f}" for timing in compared.timings)])
            one = x[:1]
            with torch.inference_mode():
                sparse, peer = stage(layer, DENSITY, "weights").eval(), Sorted(layer)
                compared = compare_times(
                    {"sorting": lambda p=peer, o=one: p(o), "ours": lambda s=sparse, o=one: s(o)}, rounds=100
                )
            inference.append([name, f"{1 / compared.timings[1].ratio:.1f}"])
    print(table(training, ["training step, over dense", "dense", "stage 1", "stage 2", "stage 3"]))
    print()
    print(table(inference, ["inference", "times as fast as sorting"]))


if __name__ == "__main__":
    main()
