"""The convolution of a linear state-space layer beside the recurrences and peers that do the same.

    python benchmarks/lssl.py [NAME ...] [--rounds 5] [--quick]

`kernel`: K = C A^i B by two factors of sqrt(L) blocks, by the whole Krylov matrix, and step by step, three sizes (aim:
splitting at least 2 times as fast as doubling). `layer`: a step of training on 64 sequences of 784 with 64 features:
LSSL and LSSL-f as convolutions, the same LSSL as a recurrence, torch.nn.GRU (aim: at least 2 times as fast). `forward`:
one system on 64 sequences of 784, beside scipy.signal.dlsim for each of them (aim: at least 20 times as fast), and on
one sequence alone, where the kernel, which serves a whole batch, is most of it. `diagonal`: a step of training beside a
diagonal state-space layer in the manner of S4 (S4D, arXiv:2206.11893), which is written here by its formula: the
packages of PyPI do not run (s4-torch 0.0.1 is unfinished, mamba-ssm needs CUDA). `lengths`: a step of training for
lengths from 1,000 to 16,000, and what memory it takes in a process of its own. Two threads, where there are two
processors, alternating rounds: medians and quartiles of the ratio within a round. The figures of all go to
benchmarks/results/; --quick takes small sizes and writes nothing. Exit 1 if an aim is missed.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import scipy.signal
import torch
from torch import Tensor, nn

from netwright.cost import Comparison, compare_times
from netwright.nn.lssl import LSSL, causal_conv, discretize_gbt, hippo, ssm_kernel
from netwright.seeding import seeded, stream
from support.memory import MEASURE, alone, forget_peak, peak
from support.record import Figure, over
from support.whole import recorded

THREADS = min(2, os.cpu_count() or 1)
STATE = 64


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> Comparison:
    found = compare_times(calls, rounds=rounds, threads=THREADS)
    print(found)
    return found


def kernel(rounds: int, quick: bool) -> list[Figure]:
    figures = []
    for H, N, L in [(8, 16, 100)] if quick else [(64, 64, 784), (128, 64, 1024), (64, 128, 4096)]:
        A_bar, B_bar = discretize_gbt(*hippo("legs", N, torch.float32), torch.logspace(-3, -1, H))
        C = torch.randn(H, 1, N, generator=stream(0, "C"))
        found = [ssm_kernel(A_bar, B_bar, C, L, method) for method in ("split", "doubling")]
        assert torch.allclose(*found, atol=1e-4 * float(found[0].abs().max()))
        ways = ("split", "doubling", *(("sequential",) if L < 2000 else ()))
        times = timed({m: partial(ssm_kernel, A_bar, B_bar, C, L, m) for m in ways}, rounds)
        what = f"kernel of H = {H}, N = {N}, L = {L}"
        figures += [over(times[m], f"{what}: {m}, over splitting", least={"doubling": 2}.get(m)) for m in ways[1:]]
    return figures


def training(module: nn.Module, u: Tensor, **options: Any) -> Callable[[], None]:
    def step() -> None:
        module.zero_grad()
        out = module(u, **options)
        (out[0] if isinstance(out, tuple) else out).square().mean().backward()

    return step


def made(H: int, N: int, **options: Any) -> LSSL:
    with seeded(0, "init"):
        return LSSL(H, N, **options)


def layer(rounds: int, quick: bool) -> list[Figure]:
    batch, L, H, N = (4, 50, 8, 8) if quick else (64, 784, 64, 64)
    u = torch.randn(batch, L, H, generator=stream(0, "u"))
    net = made(H, N)
    with torch.no_grad():
        assert torch.allclose(net(u[:2]), net(u[:2], mode="recurrence"), atol=1e-4), "the two views differ"
    with seeded(0, "init"):
        gru = nn.GRU(H, H, batch_first=True)
    calls = {
        "torch.nn.GRU": training(gru, u),
        "LSSL, convolution": training(net, u),
        "LSSL-f, convolution": training(made(H, N, learn=0), u),
    }
    figures = [
        over(each, f"a step of torch.nn.GRU, over {each.name}", inverse=True, least=2)
        for each in timed(calls, rounds).timings[1:]
    ]
    # Its graph keeps every state, so it has a tenth of the batch; the ratio is in favour of the recurrence.
    few = u[: max(1, batch // 10)]
    calls = {"convolution": training(net, few), "recurrence": training(net, few, mode="recurrence")}
    what = f"a step of LSSL as a recurrence, batch {len(few)}, over the convolution"
    return [*figures, over(timed(calls, rounds)["recurrence"], what)]


def forward(rounds: int, quick: bool) -> list[Figure]:
    L, N = (100, 8) if quick else (784, 64)
    A_bar, B_bar = discretize_gbt(*hippo("legs", N), torch.tensor([0.01], dtype=torch.float64))
    count = 2 if quick else 64
    C, u = torch.randn(1, 1, N, dtype=torch.float64), torch.randn(count, L, 1, dtype=torch.float64)
    A, B, c = A_bar[0].numpy(), B_bar[0].numpy()[:, None], C[0].numpy()
    system = (A, B, c @ A, c @ B, 1.0)

    def ours(u: Tensor) -> Tensor:
        return causal_conv(u, ssm_kernel(A_bar, B_bar, C, L))[..., 0]

    def theirs(u: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(scipy.signal.dlsim(system, each.numpy())[1]) for each in u])

    assert torch.allclose(ours(u), theirs(u), atol=1e-8)
    figures = []
    for part, least in ((u, 20), (u[:1], None)):
        times = timed({"netwright": partial(ours, part), "scipy.signal.dlsim": partial(theirs, part)}, rounds)
        what = f"scipy.signal.dlsim on {len(part)} sequences, over kernel and FFT"
        figures.append(over(times["scipy.signal.dlsim"], what, least=least))
    return figures


class Diagonal(nn.Module):
    """A = -1/2 + i pi n, zero-order hold, N / 2 conjugate pairs: the kernel is a Vandermonde product."""

    def __init__(self, H: int, N: int):
        super().__init__()
        self.log_dt = nn.Parameter(torch.rand(H) * math.log(100) + math.log(1e-3))
        self.C = nn.Parameter(torch.randn(H, N // 2, 2) / math.sqrt(2))
        self.log_real = nn.Parameter(torch.full((H, N // 2), math.log(0.5)))
        self.imaginary = nn.Parameter(math.pi * torch.arange(N // 2).repeat(H, 1))
        self.D, self.mix = nn.Parameter(torch.randn(H, 1)), nn.Linear(H, H)

    def forward(self, u: Tensor) -> Tensor:
        dt = self.log_dt.exp()[:, None]
        A = torch.complex(-self.log_real.exp(), self.imaginary)
        C = torch.view_as_complex(self.C) * ((A * dt).exp() - 1) / A
        powers = ((A * dt)[..., None] * torch.arange(u.shape[1])).exp()
        K = 2 * torch.einsum("hn,hnl->hl", C, powers).real
        y = causal_conv(u, K[:, None]) + u[..., None] * self.D
        return self.mix(nn.functional.gelu(y.flatten(2)))


def diagonal(rounds: int, quick: bool) -> list[Figure]:
    figures = []
    for batch, L in [(4, 50)] if quick else [(64, 784), (8, 4096)]:
        H, N = (8, 8) if quick else (64, 64)
        u = torch.randn(batch, L, H, generator=stream(0, "u"))
        with seeded(0, "init"):
            peer = Diagonal(H, N)
        calls = {"LSSL": training(made(H, N), u), "LSSL-f": training(made(H, N, learn=0), u)}
        found = timed(calls | {"diagonal": training(peer, u)}, rounds)["diagonal"]
        figures.append(over(found, f"a step of a diagonal layer, as S4D, over LSSL, batch {batch}, L = {L}"))
    return figures


def lengths(rounds: int, quick: bool) -> list[Figure]:
    figures, H, batch = [], 64, 4
    net = made(H, STATE)
    for L in [100] if quick else [1000, 4000, 16_000]:
        u = torch.randn(batch, L, H, generator=stream(0, "u"))
        found = timed({"step": training(net, u)}, rounds)
        with torch.no_grad():
            gap = float((net(u[:1]) - net(u[:1], mode="recurrence")).abs().max())
        note = f"{alone(MEASURE, batch, L, H):.0f} MiB, largest gap to the recurrence {gap:.1e}"
        what = f"milliseconds of a step, {H} features, states of {STATE}, batch {batch}, length {L}"
        figures.append(Figure(what, found["step"].median_ms, note=note))
    return figures


def measure(batch: int, L: int, H: int) -> None:
    """Memory of a step, in MiB, over that of a process that has made one on a short sequence."""
    torch.set_num_threads(THREADS)
    net = made(H, STATE)
    training(net, torch.randn(batch, 8, H))()
    u = torch.randn(batch, L, H)
    before = forget_peak()
    training(net, u)()
    print(peak() - before)


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(*map(int, sys.argv[2:]))
        sys.exit()
    subjects = {"kernel": kernel, "layer": layer, "forward": forward, "diagonal": diagonal, "lengths": lengths}
    sys.exit(recorded("lssl", __doc__ or "", subjects, rounds=5, threads=THREADS))
