"""Coherence without gradients of single examples, against peers that make them all.

    python benchmarks/coherence.py [NAME ...] [--rounds 5] [--quick]

`peers`: 1,000 examples of a convolutional network with 84,000 parameters; the mean squared norm and the norm of the
mean from all gradients by vmap(grad), whole and in chunks of 100, and by opacus where it is installed; each alone in a
process, for its memory, and in turns (aims: 5 times as fast, a twentieth of the memory). `million`: the same of a
network of 1.03 million parameters, by netwright alone. `transformer`: of one of 0.99 million, whose attention has no
rule, for 250 and 1,000 examples: the memory is the same. `callback`: a training with `CoherenceCallback` at its default
cadence, over one without, in turns. `winsorised`: the mean over a batch of 100 by partial and by full sorts. One
thread. When all have run, the figures go beside their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from netwright.cost import compare_times
from netwright.diagnose import coherence_from_gradients, m_coherence, winsorized_mean
from netwright.seeding import seeded, stream
from support.memory import MEASURE, alone, forget_peak, peak
from support.record import Figure, over
from support.whole import recorded

LOSS = nn.CrossEntropyLoss(reduction="none")
EXAMPLES, FEW = 1000, 20  # FEW in a trial


class Tokens(nn.Module):
    """Patches of 4x4 pixels through five layers of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(1, 128, 4, 4), nn.Linear(128, 10)
        self.blocks = nn.Sequential(*[nn.TransformerEncoderLayer(128, 4, 512, batch_first=True) for _ in range(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).mT).mean(1))


def network(name: str) -> nn.Module:
    if name == "transformer":
        with seeded(0, "init"):
            return Tokens().eval()
    widths, dense = {"84k": ((16, 32), 50), "1M": ((32, 64), 320)}[name]
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(1, widths[0], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(widths[0], widths[1], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(widths[1] * 49, dense), nn.ReLU(), nn.Linear(dense, 10),
        ).eval()  # fmt: skip


def data(examples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(examples, 1, 28, 28, generator=stream(0, "x")), torch.arange(examples) % 10


def all_gradients(net: nn.Module, examples: int, chunk: int | None = None) -> torch.Tensor:
    params = {name: param.detach() for name, param in net.named_parameters()}

    def loss(values, one, target):
        return functional.cross_entropy(functional_call(net, values, (one[None],)), target[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)(params, *data(examples))
    return torch.cat([value.flatten(1) for value in found.values()], 1)


def by_opacus(net: nn.Module, examples: int) -> torch.Tensor:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(net, loss_reduction="sum").train()  # it records in this mode only
    x, y = data(examples)
    LOSS(wrapped(x), y).sum().backward()
    found = torch.cat([param.grad_sample.flatten(1) for param in wrapped.parameters()], 1)
    wrapped.remove_hooks()
    return found


WAYS = {
    "netwright": lambda net, examples: m_coherence(net, LOSS, data(examples)),
    "vmap(grad)": lambda net, examples: coherence_from_gradients(all_gradients(net, examples)),
    "vmap(grad), chunks": lambda net, examples: coherence_from_gradients(all_gradients(net, examples, 100)),
    "opacus": lambda net, examples: coherence_from_gradients(by_opacus(net, examples)),
}


def measure(way: str, size: str, examples: str) -> None:
    """What one way takes in this process: seconds, and memory over what was there before, as JSON."""
    torch.set_num_threads(1)
    net = network(size)
    WAYS[way](net, 2)
    before, start = forget_peak(), time.perf_counter()
    found = WAYS[way](net, int(examples))
    seconds = time.perf_counter() - start
    more = peak() - before
    count = sum(param.numel() for param in net.parameters())
    print(json.dumps({"parameters": count, "seconds": seconds, "MiB": more, "coherence": found.m_coherence}))


def process(way: str, size: str, examples: int) -> dict[str, Any]:
    found: dict[str, Any] = alone(MEASURE, way, size, examples)
    print(
        f"{way}, {found['parameters']:,} parameters, {examples:,} examples: {found['seconds']:.2f} s, "
        f"{found['MiB']:.0f} MiB more than before, {found['coherence']:.4f}"
    )
    return found


def taken(way: str, size: str, examples: int) -> list[Figure]:
    """Seconds and memory of a process of its own."""
    found = process(way, size, examples)
    what = f"{found['parameters']:,} parameters, {examples:,} examples"
    return [Figure(f"{what}: seconds", found["seconds"]), Figure(f"{what}: MiB more than before", found["MiB"])]


def peers(rounds: int, quick: bool) -> list[Figure]:
    examples = FEW if quick else EXAMPLES
    installed = importlib.util.find_spec("opacus") is not None
    ways = [way for way in WAYS if installed or way != "opacus"]
    net = network("84k")
    expected = WAYS["netwright"](net, examples).m_coherence
    assert all(abs(WAYS[way](net, examples).m_coherence - expected) < 1e-3 * expected for way in ways), "another figure"
    memory = {way: process(way, "84k", examples)["MiB"] for way in ways}
    calls = {way: lambda way=way: WAYS[way](net, examples) for way in ways}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    figures = []
    for way in ways[1:]:
        faster, less = (None, None) if way.endswith("chunks") else (5, 20)
        times = f"{found[way].median_ms:.3g} ms, ours {found['netwright'].median_ms:.3g}"
        figures.append(over(found[way], f"84k, {way}: times as long", least=faster, note=times))
        ratio = memory[way] / max(1.0, memory["netwright"])
        told = f"{memory[way]:.0f} MiB, ours {memory['netwright']:.0f}; less than 1 counts as 1"
        figures.append(Figure(f"84k, {way}: times as much memory", ratio, least=less, note=told))
    return figures if installed else [*figures, Figure("84k, opacus: times as long", None, note="not installed")]


def million(rounds: int, quick: bool) -> list[Figure]:
    return taken("netwright", "1M", FEW if quick else EXAMPLES)


def transformer(rounds: int, quick: bool) -> list[Figure]:
    sizes = (FEW // 2, FEW) if quick else (EXAMPLES // 4, EXAMPLES)
    return [figure for examples in sizes for figure in taken("netwright", "transformer", examples)]


def callback(rounds: int, quick: bool) -> list[Figure]:
    from netwright.data import Batches, TensorImages
    from netwright.diagnose import CoherenceCallback
    from netwright.train import Classifier, fit

    count = 500 if quick else 5000
    images = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=stream(0, "images"))
    train = TensorImages(images, torch.arange(count) % 10)
    probe = images[: count // 10].float() / 255, train.labels[: count // 10]

    def run(with_it: bool) -> None:
        callbacks = [CoherenceCallback(probe)] if with_it else []
        epochs = 1 if quick else 4
        fit(Classifier(network("84k"), lr=0.01), Batches(train, 50), epochs=epochs, callbacks=callbacks)

    calls = {"plain": lambda: run(False), "with CoherenceCallback": lambda: run(True)}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found["with CoherenceCallback"], "a training with CoherenceCallback, over plain", most=1.15)]


def winsorised(rounds: int, quick: bool) -> list[Figure]:
    rows = torch.randn(100, 840 if quick else 84_000, generator=stream(0, "rows"))

    def by_sorting(c: float) -> torch.Tensor:
        ordered = rows.sort(0).values
        count = int(c)
        return rows.clamp(ordered[count], ordered[-1 - count]).mean(0)

    figures = []
    for c in (1, 8):
        assert torch.allclose(winsorized_mean(rows, c), by_sorting(c), atol=1e-6)
        calls = {"netwright": lambda c=c: winsorized_mean(rows, c), "a full sort": lambda c=c: by_sorting(c)}
        print(found := compare_times(calls, rounds=rounds, threads=1))
        figures.append(over(found["a full sort"], f"winsorised mean, {c} %: a full sort, times as long"))
    return figures


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(*sys.argv[2:])
        sys.exit()
    subjects = {
        "peers": peers,
        "million": million,
        "transformer": transformer,
        "callback": callback,
        "winsorised": winsorised,
    }
    sys.exit(recorded("coherence", __doc__, subjects, rounds=5))
