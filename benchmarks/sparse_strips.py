"""Networks whose layers run in strips of rows, beside the same networks layer by layer.

    python benchmarks/sparse_strips.py [--rounds 60]

Random weights and zeros as in `netwright bench`, batch 1, 224x224, one thread; both compilations of a network are
called in turns and must give the same bits. Where the cost model chooses no strips there is nothing to compare. Exit 1
if the bits differ.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import numpy as np
import torch

from netwright.cost import compare_times
from netwright.deploy.graph import capture, optimise
from netwright.deploy.native.runtime import Network
from netwright.design.benchmark import open_model
from netwright.seeding import stream

NETWORKS, SPARSITIES, ROUNDS = ("resnet18", "mobilenet_v2"), (0.9, 0.95, 0.99), 60


def compared(name: str, sparsity: float, rounds: int) -> tuple[int, float, bool]:
    """Layers in strips, time without over time with them (medians), and whether the bits agree."""
    made = open_model(name, sparsity=sparsity, size=224)
    x = torch.randn(1, *made.shape, generator=stream(0, "input"))
    graph = optimise(capture(made.module.eval(), (x,)))
    networks = {"layers": Network(graph, strips=False), "strips": Network(graph)}
    inside = sum("in strips" in what for _, what, _ in networks["strips"].steps)
    if not inside:
        return 0, 1.0, True
    outputs = {key: np.empty(network.outputs[0], np.float32) for key, network in networks.items()}
    calls = {key: partial(network, [x.data_ptr()], [outputs[key].ctypes.data]) for key, network in networks.items()}
    found = compare_times(calls, rounds=rounds, threads=1)
    ratio = found["layers"].median_ms / found["strips"].median_ms
    return inside, ratio, bool((outputs["layers"] == outputs["strips"]).all())


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of calls in turns  [{ROUNDS}]")
    options = parser.parse_args()
    wrong = False
    for name in NETWORKS:
        for sparsity in SPARSITIES:
            inside, ratio, same = compared(name, sparsity, options.rounds)
            told = f"{inside} steps in strips, {ratio:.2f} times as fast" if inside else "no strips"
            print(f"{name} at {sparsity:.0%} zeros: {told}{'' if same else '; the bits differ'}", flush=True)
            wrong = wrong or not same
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
