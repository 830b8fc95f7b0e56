"""What contrastive losses, the key's moving network and the Hallucinator cost, beside the code one would write instead.

    python benchmarks/hallucinator.py [--rounds 20] [--threads 1] [--tiny]

NT-Xent forward and backward at batch 512 and width 128, beside ``lightly``'s (left out when it is not installed) and
beside one that copies similarities by boolean indices (aim: at least 1.5 times as fast as either). The update of the
key's weights of a ResNet-18, beside a Python loop over parameters (aim: 3 times). Steps of SimCLR and MoCo (65,536
keys) on a ResNet-18 at 32x32 with the Hallucinator, over those without it (aim: at most 1.05). All in alternating
rounds: medians and quartiles of the ratio in a round. ``--tiny`` checks that it runs, on sizes that measure nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.console import table
from netwright.cost import compare_times
from netwright.nn.resnet import resnet18_cifar
from netwright.seeding import seeded, stream
from netwright.train.contrastive import MoCo, SimCLR, nt_xent
from netwright.train.hallucinator import Hallucinator

Calls = dict[str, Callable[[], Any]]
INSTALLED = importlib.util.find_spec("lightly") is not None
TEMPERATURE = 0.1


def by_boolean_indices(z1: Tensor, z2: Tensor) -> Tensor:
    """NT-Xent as it is often written: positives and negatives are copied out of the matrix."""
    z = functional.normalize(torch.cat([z1, z2]))
    similarities = z @ z.T
    count = len(z1)
    images = torch.cat([torch.arange(count)] * 2)
    same, own = images[:, None] == images, torch.eye(2 * count, dtype=torch.bool)
    similarities, same = similarities[~own].view(2 * count, -1), same[~own].view(2 * count, -1)
    positives, negatives = similarities[same].view(2 * count, -1), similarities[~same].view(2 * count, -1)
    logits = torch.cat([positives, negatives], 1) / TEMPERATURE
    return functional.cross_entropy(logits, torch.zeros(2 * count, dtype=torch.long))


def losses(batch: int, dim: int) -> Calls:
    """Forward and backward of the loss."""
    z1, z2 = (z.requires_grad_() for z in torch.randn(2, batch, dim, generator=stream(0, "embeddings")))
    kinds: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "ours": lambda a, b: nt_xent(a, b, TEMPERATURE),
        "boolean indices": by_boolean_indices,
    }
    if INSTALLED:
        from lightly.loss import NTXentLoss

        kinds["lightly"] = NTXentLoss(TEMPERATURE)
    values = [kind(z1, z2).item() for kind in kinds.values()]
    assert max(values) - min(values) < 1e-4, values
    return {name: lambda kind=kind: torch.autograd.grad(kind(z1, z2), (z1, z2)) for name, kind in kinds.items()}


def encoder() -> nn.Module:
    network = resnet18_cifar()
    network.fc = nn.Identity()
    return network


def following() -> Calls:
    """The update of the key's weights."""
    with seeded(0, "init"):
        host = MoCo(encoder, queue_size=16)
    pairs = [*zip(host.key_backbone.parameters(), host.backbone.parameters(), strict=True)]
    pairs += zip(host.key_head.parameters(), host.head.parameters(), strict=True)

    def loop() -> None:
        for own, query in pairs:
            own.data = own.data * host.momentum + query.data * (1 - host.momentum)

    return {"ours": host.follow, "Python loop": loop}


def steps(kind: str, batch: int, keys: int) -> Calls:
    """Training steps without and with the Hallucinator."""
    x1, x2 = torch.randn(2, batch, 3, 32, 32, generator=stream(0, "images"))
    calls: Calls = {}
    for name, extra in (("without", None), ("with", Hallucinator(128))):
        with seeded(0, "init"):
            host = (
                SimCLR(encoder, 128, 0.2, extra)
                if kind == "SimCLR"
                else MoCo(encoder, 128, keys, temperature=0.2, hallucinator=extra)
            )
        optimizer = torch.optim.SGD([p for p in host.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

        def step(host: nn.Module = host, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            host(x1, x2).backward()
            optimizer.step()

        calls[name] = step
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    rounds = 2 if given.tiny else given.rounds
    if not INSTALLED:
        print("lightly is not installed: pip install lightly\n")
    rows: list[list[Any]] = []
    cases: list[tuple[str, Calls, float, bool]] = [
        ("NT-Xent, 512 x 128", losses(*((8, 4) if given.tiny else (512, 128))), 1.5, True),
        ("key's weights, ResNet-18", following(), 3.0, True),
        ("step of SimCLR, ResNet-18", steps("SimCLR", 2 if given.tiny else 32, 0), 1.05, False),
        ("step of MoCo, ResNet-18", steps("MoCo", 2 if given.tiny else 32, 64 if given.tiny else 65536), 1.05, False),
    ]
    for name, calls, aim, faster in cases:
        some = max(2, rounds // 4) if name.startswith("step") else rounds
        found = compare_times(calls, rounds=some, threads=given.threads)
        for number, timing in enumerate(found.timings):
            met = timing.ratio >= aim if faster else timing.ratio <= aim
            told = (
                f"{'>=' if faster else '<='} {aim}: {'met' if met else 'missed'}" if number and not given.tiny else ""
            )
            spread = f"{timing.ratio_low:.3f}..{timing.ratio_high:.3f}"
            rows.append([name, timing.name, f"{timing.median_ms:.2f}", f"{timing.ratio:.3f}", spread, told])
    print(table(rows, ["what", "by", "ms", "over the first", "quartiles", "aim"]))
    print(f"\n{found.cpu}, {found.threads} threads, {rounds} rounds, a quarter of them for steps")


if __name__ == "__main__":
    main()
