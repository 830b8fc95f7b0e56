"""Steps of a search on a chain by every gate, against each other and against ports of other people's.

    python benchmarks/search_chain.py [--rounds 30] [--threads 1] [--batch 64] [--space micro-chain]
    python benchmarks/search_chain.py --quick

The algorithms of NNI do not install beside a torch of today, so they are ported here in the straightforward way, with
our blocks and values: every choice by itself, outputs stacked and summed by weights; gates that draw by one multinomial
a choice and run all candidates again in the backward pass; gradients of all parameters in both halves of a step. Steps
take turns; the learning rates are zero, so that all stay the same network. Memory is counted, not timed: bytes that
autograd keeps. The figures go to benchmarks/results/, with what is aimed at beside each; --quick makes two rounds and
writes nothing. Needs as many cores of its own as threads. Exit 1 if the port's output is not ours, or an aim is missed.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.cost import compare_times, saved_bytes
from netwright.cost.timing import Comparison
from netwright.nn.batchnorm import frozen_statistics
from netwright.search import spaces
from netwright.search.binary_gate import BinaryGate
from netwright.search.fbnet import GumbelSoftmaxGate
from netwright.search.latency import ExpectedLatency
from netwright.search.objective import TaskLoss
from netwright.search.phased import Phased
from netwright.search.proxyless import GateGradient
from netwright.search.supernet import Choice, Supernet
from netwright.seeding import seeded, stream
from support.record import Figure, over, record

TAU, TOLERANCE = 1.0, 1e-5
Batch = tuple[Tensor, Tensor]


class Stacked(nn.Module):
    """A choice that runs all candidates and sums their stacked outputs by softmax or Gumbel-softmax."""

    def __init__(self, choice: Choice, alpha: Tensor, gumbel: bool) -> None:
        super().__init__()
        self.operations = nn.ModuleList(choice.candidates.values())
        self.alpha = nn.Parameter(alpha.detach().clone())
        self.gumbel = gumbel

    def forward(self, x: Tensor) -> Tensor:
        """The mixture."""
        weights = functional.gumbel_softmax(self.alpha, TAU) if self.gumbel else self.alpha.softmax(0)
        outputs = torch.stack([operation(x) for operation in self.operations])
        return (outputs * weights.view(-1, 1, 1, 1, 1)).sum(0)


class Recomputing(torch.autograd.Function):
    """The output of one candidate; all others run in the backward pass, for the gradient of every gate."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, y: Tensor, x: Tensor, operations: list[nn.Module], active: int) -> Tensor:
        ctx.save_for_backward(y, x)
        ctx.operations, ctx.active = operations, active
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        y, x = ctx.saved_tensors
        found = []
        with torch.no_grad():
            for number, operation in enumerate(ctx.operations):
                output = y if number == ctx.active else operation(x)
                found.append((output * grads[0]).sum())
        return torch.stack(found), grads[0], None, None, None


class Sampled(Stacked):
    """A choice that draws one candidate by itself and recomputes the others."""

    def forward(self, x: Tensor) -> Tensor:
        """The output of the candidate drawn."""
        p = self.alpha.softmax(0)
        active = int(torch.multinomial(p.detach(), 1))
        y = self.operations[active](x)
        if not self.alpha.requires_grad:
            return y
        return Recomputing.apply(p, y, x, list(self.operations), active)


def port(ours: Supernet, make: Callable[[Choice, Tensor], nn.Module]) -> nn.Module:
    """A copy of the network in which every choice is what ``make`` makes of it."""
    copied: Any = copy.deepcopy(ours)
    for name, choice in list(copied.named_choices()):
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, make(choice, copied.arch[choice.key]))
    return copied.network.to(memory_format=torch.channels_last)


def port_steps(network: nn.Module, batch: Batch) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of the weights and one of the architecture, each with the gradients of everything."""
    alphas = [p for name, p in network.named_parameters() if name.endswith(".alpha")]
    weights = [p for name, p in network.named_parameters() if not name.endswith(".alpha")]
    w_opt = torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=4e-5)
    a_opt = torch.optim.Adam(alphas, lr=0.0, betas=(0.0, 0.999))
    x = batch[0].clone(memory_format=torch.channels_last)

    def step(optimizer: torch.optim.Optimizer) -> None:
        network.zero_grad()
        functional.cross_entropy(network(x), batch[1]).backward()
        optimizer.step()

    return partial(step, w_opt), partial(step, a_opt)


def our_steps(supernet: Supernet, batch: Batch) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A step of the weights and one of the architecture."""
    w_opt = torch.optim.SGD(supernet.weight_parameters(), lr=0.0, momentum=0.9, weight_decay=4e-5)
    a_opt = torch.optim.Adam(supernet.arch_parameters(), lr=0.0, betas=(0.0, 0.999))
    binary = any(isinstance(choice.gate, BinaryGate) for _, choice in supernet.named_choices())
    step = partial((GateGradient() if binary else Phased()).step, supernet, TaskLoss(), clip=None)
    return partial(step, w_opt, None, batch, None), partial(step, None, a_opt, None, batch)


def difference(space: Any, batch: Batch) -> float:
    """How far the port's mixture is from ours, in the network's output."""
    ours = space.supernet(1, 10, seed=0).train()
    theirs = port(ours, lambda choice, alpha: Stacked(choice, alpha, gumbel=False))
    with torch.no_grad():
        return float((ours(batch[0]) - theirs(batch[0])).abs().max())


def told(found: Comparison, name: str, what: str, **aims: float) -> Figure:
    """How many times as long as the first of a comparison another takes."""
    timing, first = found[name], found.timings[0]
    note = f"{timing.median_ms:.3g} ms and {first.median_ms:.3g} ms"
    figure = over(timing, f"{what}, threads {found.threads}", note=note, **aims)
    print(f"  {' | '.join(figure.row())}", flush=True)
    return figure


def times(space: Any, batch: Batch, rounds: int, threads: int) -> list[Figure]:
    """Times of all steps in one series of rounds a kind of step."""
    n = sum(map(len, space.choices().values())) / len(space.choices())
    gates = {
        "mixture": None,
        "Gumbel": GumbelSoftmaxGate(TAU),
        "two": BinaryGate("two"),
        "full": BinaryGate("full"),
        "full, recomputed": BinaryGate("full_recompute"),
    }
    ours = {name: space.supernet(1, 10, seed=0, gate=gate).train() for name, gate in gates.items()}
    ports = {
        "port of Gumbel": port(ours["Gumbel"], lambda choice, alpha: Stacked(choice, alpha, gumbel=True)),
        "port of full": port(ours["full"], lambda choice, alpha: Sampled(choice, alpha, gumbel=False)),
    }
    steps = {name: our_steps(net, batch) for name, net in ours.items()}
    steps |= {name: port_steps(net, batch) for name, net in ports.items()}
    timed = partial(compare_times, rounds=rounds, threads=threads)

    def both(name: str) -> Callable[[], None]:
        def run() -> None:
            for step in steps[name]:
                step()

        return run

    print(f"{space.name}, {n:g} candidates a choice, batch {len(batch[0])}, threads {threads}, {rounds} rounds")
    both_steps = timed({name: both(name) for name in ("port of Gumbel", "Gumbel")})
    weight = timed({name: steps[name][0] for name in ("two", "mixture", "Gumbel", "port of full")})
    others = ("full, recomputed", "full", "mixture")
    architecture = timed({name: steps[name][1] for name in ("two", "port of full", *others)})
    net = ours["Gumbel"]
    table = {key: 1.0 + number for number, key in enumerate(net.operations(tuple(batch[0].shape[1:])))}
    cost = ExpectedLatency(table)
    looked_up = timed(
        {"step": steps["Gumbel"][1], "look-up": lambda: torch.autograd.grad(cost(net), net.arch_parameters())}
    )
    return [
        told(both_steps, "Gumbel", "both steps: Gumbel gate over its port", most=0.9),
        told(weight, "mixture", "weight step: mixture over binary gate", least=0.6 * n),
        told(weight, "Gumbel", "weight step: Gumbel gate over binary gate"),
        told(weight, "port of full", "weight step: port of binary gates over binary gate"),
        told(architecture, "port of full", "architecture step: port (recomputes all) over gates of two", least=n / 2),
        *(told(architecture, name, f"architecture step: {name} over gates of two") for name in others),
        told(looked_up, "look-up", "latency by look-up with its gradient over an architecture step", most=0.02),
    ]


def memory(space: Any, batch: Batch, passes: int) -> list[Figure]:
    """Bytes kept in an architecture pass, over those of the network of the path that was drawn."""
    x = batch[0]

    def kept(network: Any) -> int:
        with frozen_statistics(network):
            return saved_bytes(lambda: network(x))

    figures = []
    mixture = kept(space.supernet(1, 10, seed=0).train())
    for mode in ("two", "full", "full_recompute"):
        net = space.supernet(1, 10, seed=0, gate=BinaryGate(mode)).train()
        shares = []
        for number in range(passes):
            with seeded(0, "memory", number):
                net.redraw("alpha", len(x))
            path = {key: choice.names[int(choice.drawn[0])] for key, choice in net.keyed_choices().items()}
            alone = kept(space.build(space.genotype(path), 1, 10, seed=0).train())
            shares.append((kept(net) / alone, mixture / alone))
        mean, soft = (sum(each) / passes for each in zip(*shares, strict=True))
        note = f"at most {max(share for share, _ in shares):.3f}; the mixture {soft:.2f}"
        what = f"memory of an architecture pass of gates {mode} over that of one path's network, mean of {passes}"
        figures.append(Figure(what, mean, most=1.3 if mode == "two" else None, note=note))
        print(f"  {' | '.join(figures[-1].row())}", flush=True)
    return figures


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--space", default="micro-chain")
    parser.add_argument("--quick", action="store_true", help="two rounds; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.batch = 2, 8
    space, draws = spaces.get(options.space), stream(0, "batch")
    batch = (
        torch.rand(options.batch, 1, *space.shape, generator=draws),
        torch.randint(10, (options.batch,), generator=draws),
    )
    far = difference(space, batch)
    figures = [Figure("largest difference between our mixture's output and its port's", far, most=TOLERANCE)]
    figures += memory(space, batch, 2 if options.quick else 20)
    for threads in options.threads:
        figures += times(space, batch, options.rounds, threads)
    settings = {"space": options.space, "batch": options.batch, "rounds": options.rounds}
    return int(not far <= TOLERANCE) | record("search_chain", figures, settings, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
