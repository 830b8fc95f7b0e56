"""The key-value bottleneck beside an independent implementation, and its lookup and step at the paper's size.

    python benchmarks/kv_bottleneck.py [NAME ...] [--rounds 10] [--quick]

The peer is ``discrete-key-value-bottleneck-pytorch``, which repeats all values for each example before it gathers some.
`passes`: forward and backward at 64 codebooks of 1024 pairs, keys of 8 numbers, 10 classes, batch 128 (aim: at least 5
times as fast, less than a tenth of its peak memory): median and quartiles of the ratio in alternating rounds; the peak,
read on Linux alone, is that of a process of its own that makes one such step, over one that only builds the module.
`lookup` and `step` at 256 codebooks of 4096 pairs and batch 256: the lookup beside ``torch.cdist``, and a training step
from embeddings and from kept codes, with dense and with sparse gradients. One thread. The figures of all three go to
benchmarks/results/; --quick takes small sizes and writes nothing. Exit 1 if an aim is missed.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.cost import Comparison, compare_times
from netwright.nn.kv_bottleneck import KeyValueBottleneck, nearest_keys
from netwright.seeding import seeded, stream
from support.memory import MEASURE, alone
from support.memory import peak as highest
from support.record import Figure, over
from support.whole import recorded

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


def pass_of(which: str, codebooks: int, pairs: int, count: int) -> Callable[[], None]:
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
    return float(alone(MEASURE, which, *sizes, *(["--step"] if step else [])))


def measure(which: str, sizes: list[int], step: bool) -> None:
    torch.set_num_threads(1)
    once = pass_of(which, *sizes)
    if step:
        once()
    print(highest())


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


def steps_of(codebooks: int, pairs: int, count: int) -> Calls:
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


def timed(calls: Calls, rounds: int) -> Comparison:
    found = compare_times(calls, rounds=rounds, threads=1)
    print(found)
    return found


def passes(rounds: int, quick: bool) -> list[Figure]:
    """Time and memory of a pass, beside the peer's."""
    sizes = (4, 32, 8) if quick else (64, 1024, 128)
    names = ["ours", "ours, sparse", *(["peer"] if INSTALLED else [])]
    found = timed({name: pass_of(name, *sizes) for name in names}, rounds)
    used = {name: peak(name, sizes, True) - peak(name, sizes, False) for name in names}
    figures = [Figure(f"MB of one pass above the module: {name}", mb) for name, mb in used.items()]
    slower, smaller = (
        "forward and backward of the peer, over ours",
        "memory of ours with sparse gradients, over the peer's",
    )
    if not INSTALLED:
        note = f"the peer is not installed: pip install {PEER.replace('_', '-')}"
        return [*figures, Figure(slower, None, least=FASTER, note=note), Figure(smaller, None, most=SHARE, note=note)]
    return [
        *figures,
        over(found["peer"], slower, least=FASTER),
        Figure(smaller, used["ours, sparse"] / used["peer"], most=SHARE),
    ]


def lookup(rounds: int, quick: bool) -> list[Figure]:
    """Which keys are nearest."""
    found = timed(lookups(*((4, 64, 8) if quick else (256, 4096, 256))), rounds)
    return [over(found["cdist"], "the lookup by torch.cdist, over ours")]


def step(rounds: int, quick: bool) -> list[Figure]:
    """A step of SGD in four ways."""
    found = timed(steps_of(*((4, 64, 8) if quick else (256, 4096, 256))), rounds)
    return [over(each, f"a step from {each.name}, over kept codes, sparse") for each in found.timings[1:]]


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        measure(sys.argv[2], [int(size) for size in sys.argv[3:6]], "--step" in sys.argv)
    else:
        sys.exit(
            recorded("kv_bottleneck", __doc__ or "", {"passes": passes, "lookup": lookup, "step": step}, rounds=10)
        )
