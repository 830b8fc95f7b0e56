"""Coherence without gradients of single examples, against peers that make them all.

    python benchmarks/coherence.py [NAME ...] [--rounds 5]

`peers`: 1,000 examples of a convolutional network with 84,000 parameters; the mean squared norm and the norm of the
mean from all gradients by vmap(grad), whole and in chunks of 100, and by opacus where it is installed; each alone in a
process, for its memory, and in turns. Exit 1 if netwright is not 5 times as fast as each of them, in a twentieth of the
memory. `million`: the same of a network of 1.03 million parameters, by netwright alone.
`transformer`: of one of 0.99 million, whose attention has no rule, for 250 and 1,000 examples: the memory is the same.
`callback`: a training with and without `CoherenceCallback` at its default cadence, in turns. `winsorised`: the mean
over a batch of 100 by partial and by full sorts.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from netwright.cost import compare_times
from netwright.diagnose import coherence_from_gradients, m_coherence, winsorized_mean
from netwright.seeding import seeded, stream

LOSS = nn.CrossEntropyLoss(reduction="none")
EXAMPLES = 1000
FASTER, SMALLER = 5.0, 20.0


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


def data(examples: int = EXAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(examples, 1, 28, 28, generator=stream(0, "x")), torch.arange(examples) % 10


def all_gradients(net: nn.Module, chunk: int | None) -> torch.Tensor:
    params = {name: param.detach() for name, param in net.named_parameters()}

    def loss(values, one, target):
        return functional.cross_entropy(functional_call(net, values, (one[None],)), target[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=chunk)(params, *data())
    return torch.cat([value.flatten(1) for value in found.values()], 1)


def by_opacus(net: nn.Module) -> torch.Tensor:
    from opacus import GradSampleModule

    wrapped = GradSampleModule(net, loss_reduction="sum").train()  # it records in this mode only
    x, y = data()
    LOSS(wrapped(x), y).sum().backward()
    found = torch.cat([param.grad_sample.flatten(1) for param in wrapped.parameters()], 1)
    wrapped.remove_hooks()
    return found


WAYS = {
    "netwright": lambda net: m_coherence(net, LOSS, data()),
    "vmap(grad)": lambda net: coherence_from_gradients(all_gradients(net, None)),
    "vmap(grad), chunks of 100": lambda net: coherence_from_gradients(all_gradients(net, 100)),
    "opacus": lambda net: coherence_from_gradients(by_opacus(net)),
}
FEW = {"netwright, 250 examples": lambda net: m_coherence(net, LOSS, data(250))}


def alone(way: str, size: str) -> None:
    """What one way takes in this process: seconds, and memory over what was there before."""
    net = network(size)
    m_coherence(net, LOSS, tuple(part[:2] for part in data()))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = (WAYS | FEW)[way](net)
    seconds = time.perf_counter() - start
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    count = sum(param.numel() for param in net.parameters())
    print(f"{way}, {count:,} parameters: {seconds:.2f} s, {more:.0f} MiB more than before, {found.m_coherence:.4f}")


def processes(size: str, ways: list[str]) -> dict[str, float]:
    """MiB that each way takes."""
    found = {}
    for way in ways:
        call = [sys.executable, __file__, "--alone", way, size]
        told = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout
        print(told, end="", flush=True)
        found[way] = float(told.split(" MiB")[0].split()[-1])
    return found


def installed() -> list[str]:
    try:
        import opacus
    except ImportError:
        print("opacus is not installed")
        return [way for way in WAYS if way != "opacus"]
    return [way for way in WAYS if opacus]


def peers(rounds: int) -> bool:
    ways = installed()
    memory = processes("84k", ways)
    net = network("84k")
    expected = WAYS["netwright"](net).m_coherence
    assert all(abs(WAYS[way](net).m_coherence - expected) < 1e-3 * expected for way in ways), "another figure"
    found = compare_times({way: lambda way=way: WAYS[way](net) for way in ways}, rounds=rounds)
    print(found)
    ours, others = max(1.0, memory["netwright"]), [way for way in ways if way != "netwright"]
    faster, smaller = min(found[way].ratio for way in others), min(memory[way] / ours for way in others)
    print(f"least of the others: {faster:.1f} times the time, {smaller:.0f} times the memory")
    return faster >= FASTER and smaller >= SMALLER


def million(rounds: int) -> None:
    processes("1M", ["netwright"])


def transformer(rounds: int) -> None:
    processes("transformer", [*FEW, "netwright"])


def callback(rounds: int) -> None:
    from netwright.data import Batches, TensorImages
    from netwright.diagnose import CoherenceCallback
    from netwright.train import Classifier, fit

    images = torch.randint(0, 256, (5000, 1, 28, 28), dtype=torch.uint8, generator=stream(0, "images"))
    train = TensorImages(images, torch.arange(5000) % 10)
    probe = images[:500].float() / 255, train.labels[:500]

    def run(with_it: bool) -> None:
        callbacks = [CoherenceCallback(probe)] if with_it else []
        fit(Classifier(network("84k"), lr=0.01), Batches(train, 50), epochs=4, callbacks=callbacks)

    print(compare_times({"plain": lambda: run(False), "with CoherenceCallback": lambda: run(True)}, rounds=rounds))


def winsorised(rounds: int) -> None:
    rows = torch.randn(100, 84_000, generator=stream(0, "rows"))

    def by_sorting(c: float) -> torch.Tensor:
        ordered = rows.sort(0).values
        count = int(c)
        return rows.clamp(ordered[count], ordered[-1 - count]).mean(0)

    for c in (1, 8):
        assert torch.allclose(winsorized_mean(rows, c), by_sorting(c), atol=1e-6)
        calls = {f"netwright, {c} %": lambda c=c: winsorized_mean(rows, c), "a full sort": lambda c=c: by_sorting(c)}
        print(compare_times(calls, rounds=rounds))


NAMES = {"peers": peers, "million": million, "transformer": transformer, "callback": callback, "winsorised": winsorised}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(*options.alone)
        return 0
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    missed = []
    for name in options.names or NAMES:
        print(f"== {name}")
        if NAMES[name](options.rounds) is False:
            missed.append(name)
    if missed:
        print(f"missed: {', '.join(missed)}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
