"""Compression against what others do, in alternating rounds on one thread.

    python benchmarks/compression.py [NAME ...] [--rounds 20] [--quick]

`points`: gradient of 16 points over a million weights, against a masked sum for each point. `buckets`: a million
weights rounded to 4 bits in buckets of 256, against a loop over buckets and torch's own fake quantisation, one row a
bucket. `packing`: codes of 4 bits as bytes, against a loop over codes. `penalty`: the hierarchical group lasso of a
layer of rank 512 with its gradient, against a norm for every tail. `step`: a step of quantised distillation against one
of plain distillation, batch 64. `training`: a step at half the rank against factors that are gathered by a mask.
`inference`: linear layers of width 512 to 2,048 at a quarter of the parameters against dense ones. `sizes`: bytes and
error of packed files beside what torch's and torchao's quantisation save (`pip install torchao`). When all have run,
the figures go beside their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable

import torch
from torch import nn

from netwright.compress.distill import DistillationLoss
from netwright.compress.low_rank import LowRankLinear, decompose, hierarchical_group_lasso
from netwright.compress.quantize import (
    DifferentiableQuantizer,
    baked,
    pack,
    post_training_quantize,
    uniform_quantize,
)
from netwright.console import table
from netwright.cost import compare_times
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream
from support.record import Figure, over
from support.whole import recorded


def points(rounds: int, quick: bool) -> list[Figure]:
    count = 10_000 if quick else 1_000_000
    weight = torch.randn(count, generator=stream(0, "w"))
    gradient = torch.randn(count, generator=stream(0, "g"))
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
    print(found := compare_times({"netwright": ours, "a loop over points": looped}, rounds=rounds, threads=1))
    name = "gradient of 16 points: a loop over points, times as long"
    return [over(found["a loop over points"], name, least=5)]


def buckets(rounds: int, quick: bool) -> list[Figure]:
    number = 64 if quick else 4096
    # Minima that are whole multiples of the step, the only ones that torch's zero points can tell.
    rows = torch.randint(0, 16, (number, 256), generator=stream(0, "w")).float()
    rows[:, 0], rows[:, 1] = 0, 15
    rows = (rows + torch.rand(rows.shape, generator=stream(0, "rest")).sub(0.5).mul(0.8) * (rows % 15 > 0) - 8) / 7
    weight = rows.flatten()
    scale, zero = torch.full((number,), 1 / 7), torch.full((number,), 8, dtype=torch.int32)

    def looped() -> torch.Tensor:
        found = []
        for bucket in weight.split(256):
            low = bucket.min()
            span = bucket.max() - low
            found.append(low + span * ((bucket - low) / span * 15).round() / 15)
        return torch.cat(found)

    calls = {
        "netwright": lambda: uniform_quantize(weight, 4),
        "a loop over buckets": looped,
        "torch.fake_quantize": lambda: torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, 0, 15),
    }
    for name, call in calls.items():
        assert torch.allclose(call().flatten(), calls["netwright"](), atol=1e-5), f"{name}: other values"
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found[name], f"rounding in buckets: {name}, times as long") for name in list(calls)[1:]]


def packing(rounds: int, quick: bool) -> list[Figure]:
    side = 32 if quick else 512
    with seeded(0, "init"):
        net = post_training_quantize(nn.Linear(side, side, bias=False), 4)
    quantizer, weight = net.parametrizations.weight[0], net.parametrizations.weight.original

    def looped() -> bytes:
        codes = quantizer.codes(weight)[0].flatten().tolist()
        return bytes(16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True))

    assert looped() in pack(net)
    calls = {"netwright": lambda: pack(net), "a loop over codes": looped}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found["a loop over codes"], "packing: a loop over codes, times as long")]


def penalty(rounds: int, quick: bool) -> list[Figure]:
    side = 32 if quick else 512
    with seeded(0, "init"):
        low = decompose(nn.Linear(side, side))
    factors = [low.U, low.V]

    def looped() -> torch.Tensor:
        return torch.stack([factor[i:].norm() for factor in factors for i in range(side)]).sum()

    def with_gradient(function: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), factors)

    assert torch.allclose(looped(), hierarchical_group_lasso(low), rtol=1e-4)
    calls = {
        "netwright": with_gradient(lambda: hierarchical_group_lasso(low)),
        "a norm for every tail": with_gradient(looped),
    }
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found["a norm for every tail"], "group lasso: a norm for every tail, times as long")]


def step(rounds: int, quick: bool) -> list[Figure]:
    with seeded(0, "init"):
        teacher = SmallConvNet((32, 64), 256, 10, 1, grid=7).eval()
        plain = SmallConvNet((8, 16), 48, 10, 1, grid=7)
    rounded = post_training_quantize(plain, 4).train()
    batch = 8 if quick else 64
    x, y = torch.randn(batch, 1, 28, 28, generator=stream(0, "x")), torch.arange(batch) % 10
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
    print(found := compare_times(calls, rounds=rounds, threads=1))
    name = "a step of quantised distillation over one of distillation"
    return [over(found["quantised distillation"], name, most=1.15)]


class Gathered(nn.Module):
    """Factors of which a boolean mask gathers the columns in use, in every pass."""

    def __init__(self, low: LowRankLinear):
        super().__init__()
        self.u, self.v, self.b = (nn.Parameter(t.detach().clone()) for t in (low.U.T, low.V.T, low.bias))
        self.mask = torch.zeros(low.max_rank, dtype=torch.bool)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.v[:, self.mask]) @ self.u[:, self.mask].T + self.b


def training(rounds: int, quick: bool) -> list[Figure]:
    side = 64 if quick else 1024
    with seeded(0, "init"):
        low = LowRankLinear(side, side)
    gathered = Gathered(low)
    gathered.mask[: side // 2] = True
    x = torch.randn(64, side, generator=stream(0, "x"))

    def step_of(net: nn.Module) -> Callable[[], None]:
        optimiser = torch.optim.SGD(net.parameters(), 1e-3)

        def call() -> None:
            optimiser.zero_grad()
            net(x).square().mean().backward()
            optimiser.step()

        return call

    ours, theirs = step_of(low), step_of(gathered)
    with low.truncate(side // 2):
        print(found := compare_times({"a view": ours, "a gather": theirs}, rounds=rounds, threads=1))
    return [over(found["a gather"], "a step at half the rank: a gather, times as long", least=1.3)]


def inference(rounds: int, quick: bool) -> list[Figure]:
    figures = []
    for width in (64,) if quick else (512, 1024, 2048):
        dense = nn.Linear(width, width)
        low = LowRankLinear.from_dense(dense)
        low.rank = width // 8  # (m + n) r = m n / 4
        plain, x = low.factors(), torch.randn(64, width, generator=stream(0, "x"))
        with torch.inference_mode():
            calls = {"low rank": lambda p=plain, x=x: p(x), "dense": lambda d=dense, x=x: d(x)}
            print(f"width {width}\n{(found := compare_times(calls, rounds=rounds, threads=1))}")
        name = f"linear layer of width {width}, a quarter of the parameters: dense, times as long"
        figures.append(over(found["dense"], name, least=1.5))
    return figures


def sizes(rounds: int, quick: bool) -> list[Figure]:
    side = 256 if quick else 512
    with seeded(0, "init"):
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(768, side), nn.ReLU(), nn.Linear(side, side), nn.ReLU(), nn.Linear(side, 10)
        ).eval()
    x = torch.randn(64, 768, generator=stream(0, "x"))
    whole, answers = _saved(net), net(x).detach()
    rows: list[list[object]] = []
    figures = []

    def row(name: str, size: int, other: Callable[[torch.Tensor], torch.Tensor]) -> None:
        error = float((other(x).detach() - answers).norm() / answers.norm())
        rows.append([name, size, f"{whole / size:.2f}", f"{error:.4f}"])
        note = f"error of the outputs {error:.4f}"
        figures.append(Figure(f"file, times smaller: {name}", whole / size, note=note))

    row("float32, torch.save", whole, net)
    for bits in (8, 4, 2):
        for ranges in ("minmax", "mse") if bits < 8 else ("minmax",):
            rounded = post_training_quantize(net, bits, ranges=ranges)
            row(f"netwright, {bits} bits, {ranges}", len(pack(rounded)), baked(rounded))
    for name, make in {**_torch_ao(), **_torchao()}.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # deprecated, but here to compare with
                other = make(copy.deepcopy(net))
                row(name, _saved(other), other)
        except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
            rows.append([name, str(error).splitlines()[0][:60], "", ""])
            figures.append(Figure(f"file, times smaller: {name}", None, note=str(error).splitlines()[0][:60]))
    print(table(rows, ["weights", "bytes", "times smaller", "error of the outputs"]))
    return figures


def _torch_ao() -> dict[str, Callable[[nn.Module], nn.Module]]:
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:
        print("torch.ao is not there")
        return {}
    return {"torch.ao, dynamic int8": lambda net: quantize_dynamic(net, {nn.Linear}, torch.qint8)}


def _torchao() -> dict[str, Callable[[nn.Module], nn.Module]]:
    try:
        from torchao import quantization
    except ImportError:
        print("torchao is not installed")
        return {}

    def weight_only(dtype: torch.dtype) -> Callable[[nn.Module], nn.Module]:
        def make(net: nn.Module) -> nn.Module:
            config = quantization.IntxWeightOnlyConfig(dtype, quantization.PerGroup(256))
            quantization.quantize_(net, config)
            return net

        return make

    def int8(net: nn.Module) -> nn.Module:
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
        return net

    made: dict[str, Callable[[nn.Module], nn.Module]] = {"torchao, int8 a channel": int8}
    for bits in (4, 2):
        made[f"torchao, int{bits} in groups of 256"] = weight_only(getattr(torch, f"int{bits}"))
    return made


def _saved(net: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    return buffer.tell()


SUBJECTS = {
    "points": points,
    "buckets": buckets,
    "packing": packing,
    "penalty": penalty,
    "step": step,
    "training": training,
    "inference": inference,
    "sizes": sizes,
}

if __name__ == "__main__":
    sys.exit(recorded("compression", __doc__, SUBJECTS, rounds=20))
