"""One step of each search method against its peers on the same supernet, in alternating rounds on one thread.

    python benchmarks/search_steps.py [NAME ...] [--rounds 30] [--quick]

`rarts`: RARTS, fused and exact, and first-order DARTS over second-order DARTS, batch 64: ours, and a port of the
published unrolled step, which copies the network and goes through the weights one by one. Other packages that hold such
a step (xautodl, the DARTS repository, NNI) come with it inside a script or a trainer of their own and for a torch of
their time, so it was written here anew from the paper's equations. Its gradient must be ours to 1e-3.

The figures go to benchmarks/results/; --quick takes small batches and writes nothing. Exit 1 if an aim is missed.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from netwright.papers.rarts import step_times
from netwright.search import spaces
from netwright.search.bilevel import SecondOrder
from netwright.search.objective import TaskLoss
from netwright.seeding import stream
from support.record import Figure, over, record
from support.subjects import run

EPS, TOLERANCE = 1e-2, 1e-3


class Unrolled:
    """Second-order DARTS as published: the step ahead on a copy of the network, the mixed derivative by differences."""

    def gradient(
        self, net: Any, objective: Any, w_opt: torch.optim.Optimizer, train_batch: Any, val_batch: Any
    ) -> list[Tensor]:
        """The gradient of the architecture."""
        group, weights, alphas = w_opt.param_groups[0], list(net.weight_parameters()), list(net.arch_parameters())
        slopes = torch.autograd.grad(objective(net, train_batch, "weights"), weights, allow_unused=True)
        ahead = copy.deepcopy(net)
        ahead.zero_grad()
        with torch.no_grad():
            for there, weight, slope in zip(ahead.weight_parameters(), weights, slopes, strict=True):
                moved = group["weight_decay"] * weight + (0.0 if slope is None else slope)
                buffer = w_opt.state[weight].get("momentum_buffer")
                there.copy_(weight - group["lr"] * (moved if buffer is None else group["momentum"] * buffer + moved))
        objective(ahead, val_batch, "alpha").backward()
        vectors = [torch.zeros_like(w) if w.grad is None else w.grad for w in ahead.weight_parameters()]
        size = EPS / torch.cat([vector.flatten() for vector in vectors]).norm()

        def shifted(by: Any) -> tuple[Tensor, ...]:
            with torch.no_grad():
                for weight, vector in zip(weights, vectors, strict=True):
                    weight.add_(by * vector)
            return torch.autograd.grad(objective(net, train_batch, "weights"), alphas)

        above, below = shifted(size), shifted(-2 * size)
        with torch.no_grad():
            for weight, vector in zip(weights, vectors, strict=True):
                weight.add_(size * vector)
        mixed = [(a - b) / (2 * size) for a, b in zip(above, below, strict=True)]
        return [a.grad - group["lr"] * m for a, m in zip(ahead.arch_parameters(), mixed, strict=True)]

    def step(
        self,
        net: Any,
        objective: Any,
        w_opt: torch.optim.Optimizer,
        a_opt: torch.optim.Optimizer,
        train_batch: Any,
        val_batch: Any,
        *,
        clip: float | None = 5.0,
    ) -> None:
        """Both updates."""
        for alpha, gradient in zip(
            net.arch_parameters(), self.gradient(net, objective, w_opt, train_batch, val_batch), strict=True
        ):
            alpha.grad = gradient
        a_opt.step()
        w_opt.zero_grad()
        objective(net, train_batch, "weights").backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(list(net.weight_parameters()), clip)
        w_opt.step()


def difference() -> float:
    """How far the port's gradient is from ours, relatively, in float64."""
    draws = stream(0, "batches")
    train, val = (
        (torch.rand(8, 1, 16, 16, generator=draws).double(), torch.randint(10, (8,), generator=draws)) for _ in range(2)
    )
    found = []
    for ours in (True, False):
        net = spaces.get("micro-darts-2-shared").supernet(1, 10, seed=0).double().train()
        w_opt = torch.optim.SGD(net.weight_parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
        if ours:
            a_opt = torch.optim.SGD(net.arch_parameters(), lr=1.0)
            before = [a.detach().clone() for a in net.arch_parameters()]
            SecondOrder().step(net, TaskLoss(), w_opt, a_opt, train, val)
            found.append([b - a.detach() for a, b in zip(net.arch_parameters(), before, strict=True)])
        else:
            found.append(Unrolled().gradient(net, TaskLoss(), w_opt, train, val))
    a, b = (torch.cat([part.flatten() for part in each]) for each in found)
    return float((a - b).norm() / b.norm())


def rarts(rounds: int, quick: bool) -> int:
    batch = 4 if quick else 64
    rounds = 2 if quick else rounds
    far = difference()
    times = step_times(rounds, batch, {"port": Unrolled()})
    print(times)
    port, ours = times["port"], times.timings[0]

    def beside(name: str, what: str, **aims: float) -> Figure:
        timing = times[name]
        ratios = [each / port.ratio for each in (timing.ratio, timing.ratio_low, timing.ratio_high)]
        note = f"{timing.median_ms:.3g} ms and {port.median_ms:.3g} ms"
        return Figure(f"{what} over the port of DARTS's second order", *ratios, note=note, **aims)

    figures = [
        Figure("relative difference between our second-order gradient and the port's", far, most=TOLERANCE),
        beside("RARTS fused", "a step of RARTS", most=0.45),
        beside("RARTS exact", "a step of RARTS in exact order"),
        beside(ours.name, "a second-order step of ours"),
        over(times["RARTS fused"], "a step of RARTS over a second-order step of ours", most=0.55),
        over(times["RARTS exact"], "a step of RARTS in exact order over a second-order step of ours"),
        over(times["DARTS-1"], "a first-order step over a second-order step of ours"),
    ]
    settings = {"space": "micro-darts-2-shared", "batch": batch, "threads": 1, "rounds": rounds}
    return record("search_steps_rarts", figures, settings, quick=quick)


SUBJECTS = {"rarts": rarts}

if __name__ == "__main__":
    sys.exit(run(__doc__, SUBJECTS, rounds=30))
