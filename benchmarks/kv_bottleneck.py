"""The key-value bottleneck beside an independent implementation, and its lookup and step at the paper's size.

    python benchmarks/kv_bottleneck.py [--rounds 10] [--threads 1] [--tiny]

The peer is ``discrete-key-value-bottleneck-pytorch``, which repeats all values for each example before it gathers some.
Forward and backward at 64 codebooks of 1024 pairs, keys of 8 numbers, 10 classes, batch 128 (aim: at least 5 times as
fast, less than a tenth of its peak memory): median and quartiles of the ratio in alternating rounds; the peak, read on
Linux alone, is that of a process of its own that makes one such step, over one that only builds the module. Then at 256
codebooks of 4096 pairs and batch 256: the lookup beside ``torch.cdist``, and a training step from embeddings and from
kept codes, with dense and with sparse gradients. Exit 1 if an aim is missed. ``--tiny`` checks that it runs, on sizes
that measure nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.console import table
from netwright.cost import compare_times
from netwright.nn.kv_bottleneck import KeyValueBottleneck, nearest_keys
from netwright.seeding import seeded, stream

PEER = "discrete_key_value_bottleneck_pytorch"
INSTALLED = importlib.util.find_spec(PEER) is not None
DIM, KEY_DIM, CLASSES = 64, 8, 10
FASTER, SHARE = 5.0, 0.1

Calls = dict[str, Callable[[], Any]]


def ours(codebooks: int, pairs: int, sparse: bool = False) -> KeyValueBottleneck:
    layer = KeyValueBottleneck(DIM, pairs, codebooks, KEY_DIM, CLASSES, sparse=sparse, generator=stream(0, "init"))
    layer.set_keys(torch.randn(layer.keys.shape, generator=stream(0, "keys")))
    layer.freeze_keys()
    return layer


def theirs(codebooks: int, pairs: int) -> nn.Module:
    peer = importlib.import_module(PEER)
    with seeded(0, "init"):
        module = peer.DiscreteKeyValueBottleneck(
            KEY_DIM,
            dim_embed=DIM,
            num_memories=pairs,
            num_memory_codebooks=codebooks,
            dim_memory=CLASSES,
            codebook_dim=KEY_DIM,
        )
    return module.eval()


def batch(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (count,), generator=stream(0, "labels"))
    return torch.randn(count, DIM, generator=stream(0, "z")), labels


def passes(which: str, codebooks: int, pairs: int, count: int) -> Callable[[], None]:
    """Forward and backward, from embeddings."""
    z, labels = batch(count)
    module = theirs(codebooks, pairs) if which == "peer" else ours(codebooks, pairs, which == "ours, sparse")
    z = z[:, None] if which == "peer" else z

    def once() -> None:
        module.zero_grad()
        functional.cross_entropy(module(z).flatten(1), labels).backward()

    return once


def peak(which: str, sizes: tuple[int, ...], step: bool) -> float:
    """Largest resident memory, in MB, of a process that builds a module and, if told so, makes one step."""
    words = [sys.executable, __file__, "--measure", which, *map(str, sizes), *(["--step"] if step else [])]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def measure(which: str, sizes: list[int], step: bool) -> None:
    torch.set_num_threads(1)
    once = passes(which, *sizes)
    if step:
        once()
    # Not resource.getrusage: a process inherits that peak from the one that started it.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def lookups(codebooks: int, pairs: int, count: int) -> Calls:
    layer = ours(codebooks, pairs)
    heads = layer.heads(batch(count)[0]).contiguous()
    layer.encode(batch(count)[0])
    ready = layer._prepared
    assert ready is not None
    return {
        "ours": lambda: nearest_keys(heads, ready),
        "cdist": lambda: torch.cat([torch.cdist(h, k).argmin(1) for h, k in zip(heads, layer.keys, strict=True)]),
    }


def steps(codebooks: int, pairs: int, count: int) -> Calls:
    """A step of SGD."""
    z, labels = batch(count)

    def step(kept: bool, sparse: bool) -> Callable[[], None]:
        layer = ours(codebooks, pairs, sparse)
        codes = layer.encode(z).to(layer.code_dtype)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)

        def once() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(layer.fetch(codes) if kept else layer(z), labels).backward()
            optimizer.step()

        return once

    return {
        "kept codes, sparse": step(True, True),
        "kept codes, dense": step(True, False),
        "embeddings, sparse": step(False, True),
        "embeddings, dense": step(False, False),
    }


def told(calls: Calls, title: str, rounds: int, threads: int) -> dict[str, float]:
    found = compare_times(calls, rounds=rounds, threads=threads)
    rows = [
        [t.name, f"{t.median_ms:.2f}", f"{t.ratio:.2f}", f"{t.ratio_low:.2f}..{t.ratio_high:.2f}"]
        for t in found.timings
    ]
    print(table(rows, [title, "ms", "over the first", "quartiles"]))
    print()
    return {t.name: t.ratio for t in found.timings}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--step", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(given.measure[0], [int(size) for size in given.measure[1:]], given.step)
        return 0
    rounds = 2 if given.tiny else given.rounds
    sizes = (4, 32, 8) if given.tiny else (64, 1024, 128)
    names = ["ours", "ours, sparse", *(["peer"] if INSTALLED else [])]
    if not INSTALLED:
        print(f"the peer is not installed: pip install {PEER.replace('_', '-')}\n")
    calls = {name: passes(name, *sizes) for name in names}
    ratios = told(calls, "forward and backward, {} x {}, batch {}".format(*sizes), rounds, given.threads)
    used = {name: peak(name, sizes, True) - peak(name, sizes, False) for name in names}
    print(table([[name, f"{mb:.1f}"] for name, mb in used.items()], ["one step of it", "MB above the module"]))
    print()
    large = (4, 64, 8) if given.tiny else (256, 4096, 256)
    told(lookups(*large), "lookup, {} x {}, batch {}".format(*large), rounds, given.threads)
    told(steps(*large), "step of SGD, {} x {}, batch {}".format(*large), rounds, given.threads)
    if given.tiny or not INSTALLED:
        return 0
    met = ratios["peer"] >= FASTER and used["ours, sparse"] < SHARE * used["peer"]
    memory = f"{used['ours, sparse'] / used['peer']:.3f} of its memory with sparse gradients"
    print(f"{ratios['peer']:.1f} times as fast as the peer, {memory}: aims {'met' if met else 'missed'}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
