"""Compression against what others do, in alternating rounds on one thread.

    python benchmarks/compression.py [NAME ...] [--rounds 20]

`points`: gradient of 16 points over a million weights, against a masked sum for each point. `step`: a step of quantised
distillation against one of plain distillation, batch 64. `training`: a step at half the rank against factors that are
gathered by a mask. `inference`: linear layers of width 512 to 2,048 at a quarter of the parameters against dense ones.
`sizes`: bytes of packed files beside the state that torch's and torchao's quantisation save.
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable

import torch
from torch import nn

from netwright.compress.distill import DistillationLoss
from netwright.compress.low_rank import LowRankLinear
from netwright.compress.quantize import DifferentiableQuantizer, pack, post_training_quantize
from netwright.cost import compare_times
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream


def points(rounds: int) -> None:
    weight = torch.randn(1_000_000, generator=stream(0, "w"))
    gradient = torch.randn(1_000_000, generator=stream(0, "g"))
    quantizer = DifferentiableQuantizer(weight, 16)
    span = quantizer.alpha.expand_as(quantizer.u).flatten()[: len(weight)]

    def ours() -> torch.Tensor:
        return torch.autograd.grad(quantizer(weight), quantizer.points, gradient)[0]

    def looped() -> torch.Tensor:
        levels = quantizer.points.detach()
        chosen = torch.bucketize(quantizer.u, (levels[1:] + levels[:-1]) / 2).flatten()[: len(weight)]
        values = torch.zeros_like(weight)
        total = torch.zeros(16)
        for j in range(16):
            mask = chosen == j
            values[mask] = span[mask] * levels[j]
            total[j] = (gradient[mask] * span[mask]).sum()
        return total

    assert torch.allclose(ours(), looped(), rtol=1e-3, atol=0.5)
    print(compare_times({"netwright": ours, "a loop over points": looped}, rounds=rounds, threads=1))


def step(rounds: int) -> None:
    with seeded(0, "init"):
        teacher = SmallConvNet((32, 64), 256, 10, 1, grid=7).eval()
        plain = SmallConvNet((8, 16), 48, 10, 1, grid=7)
    rounded = post_training_quantize(plain, 4).train()
    x, y = torch.randn(64, 1, 28, 28, generator=stream(0, "x")), torch.arange(64) % 10
    loss = DistillationLoss()

    def step_of(net: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.Adam(net.parameters(), 1e-3)

        def call() -> None:
            optimiser.zero_grad()
            with torch.no_grad():
                taught = teacher(x)
            loss(net(x), taught, y).backward()
            optimiser.step()

        return call

    calls = {"distillation": step_of(plain), "quantised distillation": step_of(rounded)}
    print(compare_times(calls, rounds=rounds, threads=1))


class Gathered(nn.Module):
    """Factors of which a boolean mask gathers the columns in use, in every pass."""

    def __init__(self, low: LowRankLinear):
        super().__init__()
        self.u, self.v, self.b = (nn.Parameter(t.detach().clone()) for t in (low.U.T, low.V.T, low.bias))
        self.mask = torch.zeros(low.max_rank, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.v[:, self.mask]) @ self.u[:, self.mask].T + self.b


def training(rounds: int) -> None:
    with seeded(0, "init"):
        low = LowRankLinear(1024, 1024)
    gathered = Gathered(low)
    gathered.mask[:512] = True
    x = torch.randn(64, 1024, generator=stream(0, "x"))

    def step_of(net: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.SGD(net.parameters(), 1e-3)

        def call() -> None:
            optimiser.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()

        return call

    ours, theirs = step_of(low), step_of(gathered)
    with low.truncate(512):
        print(compare_times({"a view": ours, "a gather": theirs}, rounds=rounds, threads=1))


def inference(rounds: int) -> None:
    for width in (512, 1024, 2048):
        dense = nn.Linear(width, width)
        low = LowRankLinear.from_dense(dense)
        low.rank = width // 8  # (m + n) r = m n / 4
        plain, x = low.factors(), torch.randn(64, width, generator=stream(0, "x"))
        with torch.inference_mode():
            calls = {"low rank": lambda p=plain, x=x: p(x), "dense": lambda d=dense, x=x: d(x)}
            print(f"width {width}\n{compare_times(calls, rounds=rounds, threads=1)}")


def sizes(rounds: int) -> None:
    with seeded(0, "init"):
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )
    print(f"float32: {_saved(net)} bytes; packed at 32 bits: {len(pack(net))}")
    for bits in (8, 4, 2):
        print(f"packed at {bits} bits: {len(pack(post_training_quantize(net, bits)))} bytes")
    try:
        from torch.ao.quantization import quantize_dynamic

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but here to compare with
            print(f"torch.ao, dynamic int8: {_saved(quantize_dynamic(net, {nn.Linear}, torch.qint8))} bytes")
    except (ImportError, RuntimeError) as error:
        print(f"torch.ao: {error}")
    try:
        import copy

        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

        for name, config in (("int8", Int8WeightOnlyConfig()), ("int4", Int4WeightOnlyConfig())):
            other = copy.deepcopy(net)
            quantize_(other, config)
            print(f"torchao, weight-only {name}: {_saved(other)} bytes")
    except ImportError:
        print("torchao is not installed")
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        print(f"torchao: {error}")


def _saved(net: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.tell()


NAMES = {"points": points, "step": step, "training": training, "inference": inference, "sizes": sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    for name in options.names or NAMES:
        print(f"== {name}")
        NAMES[name](options.rounds)


if __name__ == "__main__":
    main()
