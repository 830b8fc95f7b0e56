"""One thread over two in the sparse runtime, and with --run the accuracy of a run's network with int8 weights.

    python benchmarks/sparse_threads.py [--run runs/fashion-mnist]

Random weights and zeros as in `netwright bench`, batch 1, 224x224; both compilations of a network are called in turns
and must give the same bits. Needs two cores of its own. Exit 1 if the bits differ, or int8 costs more than 0.2 points.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from netwright import data, deploy
from netwright.cost import compare_times
from netwright.design.benchmark import open_model
from netwright.design.model import load_run
from netwright.seeding import stream

ROUNDS, IMAGES, POINTS = 60, 100, 0.002


def threads(name: str, sparsity: float) -> tuple[float, bool]:
    """Time of one thread over that of two, best over best, and whether the bits agree."""
    made = open_model(name, sparsity=sparsity, size=224)
    x = torch.randn(1, *made.shape, generator=stream(0, "input"))
    nets = {number: deploy.compile(made.module, x, threads=number) for number in (1, 2)}
    same = torch.equal(nets[1](x).clone(), nets[2](x))
    found = compare_times({str(number): partial(net, x) for number, net in nets.items()}, rounds=ROUNDS, threads=1)
    return found["1"].best_ms / found["2"].best_ms, same


def int8(run: str) -> tuple[float, float]:
    """Accuracy on the run's test images with float32 and with int8 weights."""
    model = load_run(run)
    test = data.load(Path(run).name).test
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (model.architecture.mean, model.architecture.std))
    x = (test.images.float() / 255 - mean) / std
    exact = deploy.compile(model.network.eval(), x[:IMAGES])
    with tempfile.TemporaryDirectory() as folder:
        coarse = deploy.load(exact.save(Path(folder) / "int8", quantize="int8"))
    found = []
    for net in (exact, coarse):
        right = sum(
            int((net(x[i : i + IMAGES]).argmax(1) == test.labels[i : i + IMAGES]).sum())
            for i in range(0, len(x) - IMAGES + 1, IMAGES)
        )
        found.append(right / (len(x) // IMAGES * IMAGES))
    return found[0], found[1]


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of netwright design, its folder named like its data set")
    options = parser.parse_args()
    failed = False
    for name in ("resnet18", "mobilenet_v2"):
        for sparsity in (0.9, 0.95, 0.99):
            ratio, same = threads(name, sparsity)
            failed |= not same
            print(f"{name} {sparsity:.0%}: {ratio:.2f}, {'same bits' if same else 'OTHER BITS'}", flush=True)
    if options.run is not None:
        exact, coarse = int8(options.run)
        failed |= exact - coarse > POINTS
        print(f"{options.run}: {exact:.2%} with float32, {coarse:.2%} with int8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
