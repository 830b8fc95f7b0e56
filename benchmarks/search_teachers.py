"""What flat minima cost a search: teachers, a sharpness-aware step and an adversarial one, and what they bring.

    python benchmarks/search_teachers.py [--rounds 20] [--batch 64] [--epochs 20] [--seeds 2]
    python benchmarks/search_teachers.py --quick

Step times over that of DARTS, one thread, space micro-darts-2-shared at 16x16; teachers in turn or vectorised. Then
short searches on digits with every kind, the peers at several strengths, and the largest eigenvalue of the Hessian of
the validation loss in the alphas where each has ended: a peer's time counts at its least strength that flattens as much
as the teachers do. The peers are the sharpness-aware step of the architecture, and the weights trained at the worst
alpha in a box that seven steps of projected gradient ascent find (Chen and Hsieh, ICML 2020, arXiv:2002.05283).

The figures go to benchmarks/results/; --quick takes the smallest sizes and writes nothing. Exit 1 if an aim is missed:
a step with a cache takes at most 1.05 times that of DARTS, one with three snapshots 2.1 times, and less than a peer
that flattens as much.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

from netwright.cost import compare_times, threads
from netwright.data import Batches, load, split_train
from netwright.papers import sd_darts
from netwright.search import spaces
from netwright.search.bilevel import FirstOrder, Step
from netwright.search.objective import Objective, TaskLoss
from netwright.search.searcher import Searcher
from netwright.search.self_distill import SelfDistillation, SnapshotTeachers
from netwright.search.sharpness import SharpnessAware, alpha_hessian_eig
from netwright.search.stages import Stage
from netwright.seeding import stream
from support.record import Figure, record

TEACHERS, LEAST = 3, 1e-9
ADVERSARIAL = "adversarial alpha"
RADII = {sd_darts.AWARE: (0.05, 0.2, 0.8), ADVERSARIAL: (0.1, 0.3, 1.0)}
OURS: dict[str, Callable[[], Objective]] = {
    sd_darts.THREE: SelfDistillation,
    sd_darts.FREE: lambda: SelfDistillation(preset="saf"),
}


class Adversarial(FirstOrder):
    """The weights descend at the worst alpha within a box; the architecture as in :class:`FirstOrder`."""

    def __init__(self, radius: float = 0.3, ascents: int = 7) -> None:
        self.radius, self.ascents = radius, ascents

    def step(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        a_opt: torch.optim.Optimizer | None,
        train_batch: Any,
        val_batch: Any,
        *,
        clip: float | None = 5.0,
    ) -> dict[str, float]:
        """As :meth:`FirstOrder.step`."""
        figures = {} if a_opt is None else super().step(supernet, objective, None, a_opt, None, val_batch)
        known: Any = supernet
        alphas = list(known.arch_parameters())
        saved = [alpha.detach().clone() for alpha in alphas]
        length = 2.5 * self.radius / self.ascents  # far enough to reach a corner of the box
        try:
            for _ in range(self.ascents):
                slopes = torch.autograd.grad(objective(supernet, train_batch, part="weights"), alphas)
                with torch.no_grad():
                    for alpha, middle, slope in zip(alphas, saved, slopes, strict=True):
                        moved = alpha + length * slope.sign()
                        alpha.copy_(moved.clamp(middle - self.radius, middle + self.radius))
            return figures | super().step(supernet, objective, w_opt, None, train_batch, None, clip=clip)
        finally:
            with torch.no_grad():
                for alpha, middle in zip(alphas, saved, strict=True):
                    alpha.copy_(middle)


PEERS: dict[str, Callable[[float], Step]] = {sd_darts.AWARE: SharpnessAware, ADVERSARIAL: Adversarial}


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


def sharpness(seed: int, epochs: int, batch: int, objective: Objective, method: Step | None) -> float:
    """The largest eigenvalue of the alphas' Hessian on the validation half, where a search of digits has ended."""
    data = load("digits")
    halves = [data.train.subset(half) for half in split_train(data.train.labels, 0.5, seed=seed)]
    train, val = (
        Batches(half, batch, seed=seed, normalise=data.normalise(), name=name, indexed=True)
        for half, name in zip(halves, ("weights", "architecture"), strict=True)
    )
    supernet = spaces.get(sd_darts.SPACE).supernet(1, 10, seed=seed)
    stages = [Stage(epochs=epochs, lr=sd_darts.LR)]
    Searcher(supernet, objective=objective, method=method, stages=stages, alpha_lr=sd_darts.ALPHA_LR).search(
        train, val, seed=seed
    )
    held = Batches(halves[1], batch, shuffle=False, normalise=data.normalise())
    return max(LEAST, float(alpha_hessian_eig(supernet, held, max_steps=30)[0]))


def flatness(epochs: int, batch: int, seeds: int, radii: dict[str, tuple[float, ...]]) -> dict[str, dict[float, float]]:
    """The eigenvalue over that of DARTS, a geometric mean over seeds, by kind and strength (0 where there is none)."""

    def ended(objective: Callable[[], Objective], method: Callable[[], Step | None]) -> list[float]:
        return [math.log(sharpness(seed, epochs, batch, objective(), method())) for seed in range(seeds)]

    plain = mean(ended(TaskLoss, lambda: None))

    def ratio(objective: Callable[[], Objective], method: Callable[[], Step | None]) -> float:
        return math.exp(mean(ended(objective, method)) - plain)

    found = {kind: {0.0: ratio(lambda t=term: TaskLoss() + t(), lambda: None)} for kind, term in OURS.items()}
    for kind, strengths in radii.items():
        found[kind] = {each: ratio(TaskLoss, lambda k=kind, r=each: PEERS[k](r)) for each in strengths}
    return found


def compared(times: dict[str, float], flat: dict[str, dict[float, float]]) -> list[Figure]:
    """The time of teachers over that of each peer, at the peer's least strength that flattens as much."""
    figures = []
    for ours in OURS:
        reached = flat[ours][0.0]
        for peer in PEERS:
            what = f"a step with {ours} over one with {peer}, at equal flattening"
            enough = [strength for strength, value in flat[peer].items() if value <= reached]
            share = times[f"{ours}, ratio"] / times[f"{peer}, ratio"]
            if reached >= 1:
                figures.append(Figure(what, None, most=1.0, note="the teachers flatten nothing"))
            elif enough:
                figures.append(Figure(what, share, most=1.0, note=f"strength {min(enough):g} flattens as much"))
            else:
                figures.append(Figure(what, share, note="no strength tried flattens as much"))
    return figures


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20, help="of each search  [20]")
    parser.add_argument("--seeds", type=int, default=2, help="searches of each kind and strength  [2]")
    parser.add_argument("--quick", action="store_true", help="the smallest sizes; nothing is written")
    options = parser.parse_args()
    radii = RADII
    if options.quick:
        options.rounds, options.batch, options.epochs, options.seeds = 2, 16, 1, 1
        radii = {kind: strengths[:1] for kind, strengths in RADII.items()}
    found = sd_darts.step_times(0, options.rounds, options.batch, peers={ADVERSARIAL: Adversarial()})
    most = {sd_darts.FREE: 1.05, sd_darts.THREE: sd_darts.STEP_LIMIT}
    figures = [
        Figure(
            f"a step with {kind} over one of DARTS",
            found[f"{kind}, ratio"],
            found[f"{kind}, lower quartile"],
            found[f"{kind}, upper quartile"],
            most=most.get(kind),
            note=f"{found[f'{kind}, ms']:.3g} ms",
        )
        for kind in (sd_darts.THREE, sd_darts.ONE, sd_darts.FREE, *PEERS)
    ]
    print(passes(options.rounds, options.batch))
    with threads(1):
        flat = flatness(options.epochs, options.batch, options.seeds, radii)
    figures += [
        Figure(f"largest eigenvalue with {kind}{f' {strength:g}' if strength else ''} over that of DARTS", value)
        for kind, values in flat.items()
        for strength, value in values.items()
    ]
    figures += compared(found, flat)
    settings = {"threads": 1, "batch": options.batch, "rounds": options.rounds}
    settings |= {"epochs": options.epochs, "seeds": options.seeds}
    return record("search_teachers", figures, settings, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
