"""What teachers cost a search: step times over that of DARTS, and teachers in turn or vectorised.

    python benchmarks/search_teachers.py [--rounds 20] [--batch 64]

One thread, space micro-darts-2-shared at 16x16. The peer to be cheaper than is the sharpness-aware step of the
architecture. Exit 1 if a step with a cache exceeds 1.05 times that of DARTS by more than the spread of the rounds, or
one with three snapshots 2.1 times.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any

import torch
from torch.func import functional_call, stack_module_state, vmap

from netwright.console import table
from netwright.cost import compare_times
from netwright.cost.timing import cpu_name
from netwright.papers import sd_darts
from netwright.search import spaces
from netwright.search.self_distill import SnapshotTeachers
from netwright.seeding import stream

TEACHERS = 3


def passes(rounds: int, batch: int) -> str:
    """Passes of three teachers: by SnapshotTeachers, one after the other, and by vmap over their stacked states."""
    networks: list[Any] = [spaces.get(sd_darts.SPACE).supernet(1, 10, seed=seed) for seed in range(TEACHERS)]
    teachers, x = SnapshotTeachers(TEACHERS), torch.rand(batch, 1, 16, 16, generator=stream(0, "images"))
    for network in networks:
        teachers.push(network)
        for part in network.modules():  # vmap cannot write to running statistics
            if isinstance(part, torch.nn.BatchNorm2d):
                part.track_running_stats = False
                part.running_mean = part.running_var = part.num_batches_tracked = None
    skeleton = copy.deepcopy(networks[0]).to("meta")
    parameters, buffers = stack_module_state(networks)
    student: Any = spaces.get(sd_darts.SPACE).supernet(1, 10)

    def one(parameters: Any, buffers: Any, x: Any) -> Any:
        return functional_call(skeleton, (parameters, buffers), (x,))

    @torch.no_grad()
    def vectorised() -> Any:
        return vmap(one, (0, 0, None))(parameters, buffers, x).softmax(2).mean(0)

    def in_turn() -> Any:
        return teachers.probs(student, x, 1.0)

    assert torch.allclose(in_turn(), vectorised(), atol=1e-5)
    return str(compare_times({"in turn": in_turn, "vectorised": vectorised}, rounds=rounds, threads=1))


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    found = sd_darts.step_times(0, options.rounds, options.batch)
    kinds = [name.removesuffix(", ms") for name in found if name.endswith(", ms")]
    rows = [
        [
            kind,
            f"{found[f'{kind}, ms']:.1f}",
            f"{found[f'{kind}, ratio']:.3f}",
            f"{found[f'{kind}, lower quartile']:.3f} to {found[f'{kind}, upper quartile']:.3f}",
        ]
        for kind in kinds
    ]
    print(f"{cpu_name()}, one thread, batch {options.batch}, {options.rounds} rounds")
    print(table(rows, ["step", "median ms", "ratio", "quartiles"]))
    print(passes(options.rounds, options.batch))
    limits = {sd_darts.FREE: 1.05, sd_darts.THREE: sd_darts.STEP_LIMIT}
    return int(any(found[f"{kind}, lower quartile"] > limit for kind, limit in limits.items()))


if __name__ == "__main__":
    sys.exit(main())
