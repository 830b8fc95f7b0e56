"""How long a step of a cell network takes, against a straightforward port of the same network in eager PyTorch.

    python benchmarks/supernet_step.py [--rounds 15] [--threads 1 2] [--case darts micro-darts evaluation]
    python benchmarks/supernet_step.py --quick

The port runs every operation by itself, in the published structure and memory order (NCHW), with the weights of ours.
Both make the same steps in turns; the outputs must agree to 1e-5, and in float64 the gradients to 1e-9. Cases: the
CIFAR supernet of DARTS (C=16, 8 cells, batch 16), the micro-darts supernet (C=8, 3 cells, 16x16 images, batch 64), and
the training step of a network found in it. The figures go to benchmarks/results/; --quick makes two rounds of the small
networks and writes nothing. Needs as many cores of its own as threads. Exit 1 if the numbers differ or a first-order
step of the CIFAR supernet is not 1.5 times as fast.
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

from netwright.cost import compare_times
from netwright.search import spaces
from netwright.search.bilevel import FirstOrder, SecondOrder
from netwright.search.fused import library
from netwright.search.spaces.network import drop_path
from netwright.seeding import seeded, stream
from support.record import Figure, over, record

FASTER, TOLERANCE, EXACT = 1.5, 1e-5, 1e-9


class ReLUConvBN(nn.Sequential):
    """ReLU, convolutions, batch norm."""

    def __init__(self, *convolutions: nn.Module, channels: int, affine: bool) -> None:
        super().__init__(nn.ReLU(), *convolutions, nn.BatchNorm2d(channels, affine=affine))


class FactorizedReduce(nn.Module):
    """Two strided convolutions, one on the shifted input, as published."""

    def __init__(self, c_in: int, c_out: int, affine: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.second = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Half the resolution."""
        x = functional.relu(x)
        return self.norm(torch.cat([self.first(x), self.second(x[:, :, 1:, 1:])], dim=1))


def operation(name: str, c: int, stride: int, search: bool) -> nn.Module:
    """A primitive; ``none`` is left out by the caller, as its zeros change nothing."""
    affine, kernel = not search, int(name[-1]) if name[-1].isdigit() else 0
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(c, c, affine)
    if "pool" in name:
        pool = nn.MaxPool2d(3, stride, 1) if "max" in name else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(c, affine=False)) if search else pool

    def separable(step: int, dilation: int) -> nn.Module:
        padding = dilation * (kernel // 2)
        depthwise = nn.Conv2d(c, c, kernel, step, padding, dilation, groups=c, bias=False)
        return ReLUConvBN(depthwise, nn.Conv2d(c, c, 1, bias=False), channels=c, affine=affine)

    return nn.Sequential(separable(stride, 1), separable(1, 1)) if "sep" in name else separable(stride, 2)


class Port(nn.Module):
    """A network of cells; every edge of a cell holds its operations, mixed by softmax(alpha) if there are several.

    Args:
        ours: A supernet or an evaluation network of netwright, whose structure and values are taken.

    Attributes:
        gone: An edge's key and the operation that does not run on it, or nothing.
    """

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.search = hasattr(ours, "arch")
        self.arch = nn.ParameterDict({k: v.detach().clone() for k, v in ours.arch.items()} if self.search else {})
        self.stem = copy.deepcopy(ours.stem.layers)
        self.classifier = copy.deepcopy(ours.classifier)
        self.cells = nn.ModuleList()
        self.plans: list[tuple[list[tuple[int, int]], tuple[int, ...]]] = []
        self.keys: list[list[str]] = []
        self.drop = 0.0
        self.gone: tuple[str, str] | None = None
        for cell in ours.cells:
            part = nn.ModuleDict({"edges": nn.ModuleList()})
            for name in ("before", "previous"):
                part[name] = self._input(getattr(cell.inputs, name))
            if self.search:
                nodes = range(2, cell.nodes + 2)
                plan = [(source, state) for state in nodes for source in range(state)]
                self.keys.append([choice.key for choice in cell.choices()])
                for choice in cell.choices():
                    part["edges"].append(nn.ModuleDict({n: self._taken(n, o) for n, o in choice.candidates.items()}))
                concat = tuple(nodes)
            else:
                plan = [(source, 2 + i // 2) for i, (_, source) in enumerate(cell.genotype.ops)]
                for (name, _), op in zip(cell.genotype.ops, cell.operations, strict=True):
                    part["edges"].append(nn.ModuleDict({name: self._taken(name, op)}))
                concat = cell.genotype.concat
            self.plans.append((plan, concat))
            self.cells.append(part)

    def _input(self, ours: Any) -> nn.Module:
        weights = [m for m in ours.modules() if isinstance(m, nn.Conv2d)]
        norm = next(m for m in ours.modules() if isinstance(m, nn.BatchNorm2d))
        c_in, c_out = weights[0].in_channels, norm.num_features
        if len(weights) == 2:
            return _filled(FactorizedReduce(c_in, c_out, norm.affine), ours)
        return _filled(ReLUConvBN(nn.Conv2d(c_in, c_out, 1, bias=False), channels=c_out, affine=norm.affine), ours)

    def _taken(self, name: str, ours: nn.Module) -> nn.Module:
        strides = [m.stride for m in ours.modules() if hasattr(m, "stride")]
        stride = 1 if not strides else strides[0][0] if isinstance(strides[0], tuple) else strides[0]
        norms = [m.num_features for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
        return (
            nn.Identity()
            if name == "none"
            else _filled(operation(name, norms[0] if norms else 1, stride, self.search), ours)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        s0 = s1 = self.stem(x)
        for number, (cell, (plan, concat)) in enumerate(zip(self.cells, self.plans, strict=True)):
            states = [cell["before"](s0), cell["previous"](s1)]
            for edge, (operations, (source, state)) in enumerate(zip(cell["edges"], plan, strict=True)):
                x = states[source]
                if self.search:
                    key = self.keys[number][edge]
                    named = zip(self.arch[key].softmax(0), operations.items(), strict=True)
                    y = sum(w * op(x) for w, (name, op) in named if name != "none" and (key, name) != self.gone)
                else:
                    (op,) = operations.values()
                    y = op(x)
                    y = drop_path(y, self.drop) if self.training and not isinstance(op, nn.Identity) else y
                if state == len(states):
                    states.append(y)
                else:
                    states[state] = states[state] + y
            s0, s1 = s1, torch.cat([states[i] for i in concat], dim=1)
        return self.classifier(functional.adaptive_avg_pool2d(s1, 1).flatten(1))

    def arch_parameters(self) -> list[nn.Parameter]:
        """The architecture parameters."""
        return list(self.arch.parameters())


def _filled(module: nn.Module, ours: nn.Module) -> nn.Module:
    """The module with the values of ours; both hold theirs in the same order."""
    values = dict(zip(module.state_dict(), ours.state_dict().values(), strict=True))
    module.load_state_dict(values)
    return module


def cases(name: str) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Our network and a batch."""
    generator = stream(0, "batch")
    if name == "darts":
        return spaces.get("darts").supernet(3, 10, channels=16, cells=8), _batch(16, (3, 32, 32), generator)
    space = spaces.get("micro-darts")
    batch = _batch(64, (1, 16, 16), generator)
    if name == "micro-darts":
        return space.supernet(1, 10, channels=8, cells=3), batch
    genotype = space.genotype({**_sep_and_dil(space)})
    return space.build(genotype, 1, 10, channels=8, cells=3, seed=0), batch


def _sep_and_dil(space: Any) -> dict[str, str]:
    """One operation of each kind, in turn, on the two edges from a cell's inputs to each node."""
    names = [name for name in space.choosable if name != "none"]
    return {
        spaces.edge_key(cell, source, state): names[(2 * state + source) % len(names)]
        for cell in space.cell_types
        for state in range(2, space.nodes + 2)
        for source in (0, 1)
    }


def _batch(size: int, shape: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(size, *shape, generator=generator), torch.randint(10, (size,), generator=generator)


def objective(network: nn.Module, batch: tuple[Tensor, Tensor], part: str) -> Tensor:
    """Cross-entropy."""
    return functional.cross_entropy(network(batch[0]), batch[1])


def differences(
    ours: nn.Module, port: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[float, float, dict[str, float]]:
    """How far ours is from the port, each tensor by its largest entry.

    Returns:
        The difference of the logits; that of all gradients that have the same name in both, in float64, where our
        kernels have no part; and for both networks how far the gradients in float32 are from those in float64. In
        float32 the gradients of a deep network with kinks differ between any two orders of summation.
    """
    found: dict[tuple[str, torch.dtype], dict[str, Tensor]] = {}
    for dtype in (torch.float32, torch.float64):
        for which, network in (("ours", ours), ("port", port)):
            copied, x = copy.deepcopy(network).to(dtype), batch[0].to(dtype)
            logits = copied(x)
            named = {n: p for n, p in copied.named_parameters() if n.startswith(("arch.", "stem.", "classifier."))}
            grads = torch.autograd.grad(functional.cross_entropy(logits, batch[1]), list(named.values()))
            names = [name.replace("stem.layers.", "stem.") for name in named]
            found[which, dtype] = {"logits": logits.detach(), **dict(zip(names, grads, strict=True))}

    def largest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        assert a.keys() == b.keys()
        return max(float((a[n] - v).abs().max() / v.abs().max().clamp_min(1e-12)) for n, v in b.items())

    exact = found["port", torch.float64]
    logits = largest(*({"logits": found[which, torch.float32]["logits"]} for which in ("ours", "port")))
    rounding = {which: largest(found[which, torch.float32], exact) for which in ("ours", "port")}
    return logits, largest(found["ours", torch.float64], exact), rounding


def steps(network: Any, batch: tuple[Tensor, Tensor]) -> dict[str, Callable[[], Any]]:
    """What is timed of a network. The learning rates are zero, so that both stay the same network."""
    architecture = {id(p) for p in network.arch_parameters()} if len(getattr(network, "arch", ())) else set()
    weights = [p for p in network.parameters() if id(p) not in architecture]
    w_opt = torch.optim.SGD(weights, lr=0.0, momentum=0.9, weight_decay=3e-4)

    def train() -> None:
        w_opt.zero_grad()
        objective(network, batch, "weights").backward()
        nn.utils.clip_grad_norm_(weights, 5.0)
        w_opt.step()

    def look() -> None:
        with torch.no_grad():
            network(batch[0])

    if not architecture:
        return {"training step": train, "forward only": look}
    a_opt = torch.optim.Adam([p for p in network.parameters() if id(p) in architecture], lr=0.0)
    arguments = (network, objective, w_opt, a_opt, batch, batch)
    return {
        "first-order step": partial(FirstOrder().step, *arguments),
        "second-order step": partial(SecondOrder(xi=0.025).step, *arguments),
        "forward only": look,
    }


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    known = ("darts", "micro-darts", "evaluation")
    parser.add_argument("--case", nargs="+", choices=known, default=known)
    parser.add_argument("--quick", action="store_true", help="two rounds of small networks; nothing is written")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.threads, options.case = 2, [1], known[1:]
    failed, figures = False, list[Figure]()
    if library.kernels(8) is None:
        print("no C compiler: operations run by themselves, in channels-last order")
    for case in options.case:
        with seeded(0, "benchmark"):
            ours, batch = cases(case)
        port = Port(ours)
        logits, grads, rounding = differences(ours, port, batch)
        failed |= not (logits < TOLERANCE and grads < EXACT)
        print(
            f"{case}: outputs differ by {logits:.1e}, gradients in float64 by {grads:.1e}; rounding of gradients in "
            f"float32 {rounding['ours']:.1e}, the port's {rounding['port']:.1e}",
            flush=True,
        )
        left, right = steps(ours, batch), steps(port, batch)
        for threads in options.threads:
            for name, step in left.items():
                found = compare_times({"ours": step, "port": right[name]}, rounds=options.rounds, threads=threads)
                least = FASTER if (case, name) == ("darts", "first-order step") else None
                took = f"{found['ours'].median_ms:.1f} ms, the port {found['port'].median_ms:.1f} ms"
                what = f"{case}, {name}, threads {threads}: times as fast as the port"
                figures.append(over(found["port"], what, least=least, note=took))
                print(f"  {' | '.join(figures[-1].row())}", flush=True)
    settings = {"threads": " and ".join(map(str, options.threads)), "rounds": options.rounds}
    return int(failed) | record("supernet_step", figures, settings, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
