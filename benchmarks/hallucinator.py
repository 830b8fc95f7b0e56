"""What contrastive losses, the key's moving network and the Hallucinator cost, beside the code one would write instead.

    python benchmarks/hallucinator.py [NAME ...] [--rounds 20] [--quick]

`loss`: NT-Xent forward and backward at batch 512 and width 128, beside ``lightly``'s (not measured where it is not
installed) and beside one that copies similarities by boolean indices (aim: at least 1.5 times as fast as either).
`key`: the update of the key's weights of a ResNet-18, beside a Python loop over parameters (aim: 3 times). `step`:
steps of SimCLR and MoCo (65,536 keys) on a ResNet-18 at 32x32 with the Hallucinator, over those without it (aim: at
most 1.05), in a quarter of the rounds. One thread, alternating rounds: medians and quartiles of the ratio in a round.
The figures of all three go to benchmarks/results/; --quick takes small sizes and writes nothing. Exit 1 if an aim is
missed.
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
from netwright.nn.resnet import resnet18_cifar
from netwright.seeding import seeded, stream
from netwright.train.contrastive import MoCo, SimCLR, nt_xent
from netwright.train.hallucinator import Hallucinator
from support.record import Figure, over
from support.whole import recorded

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


def timed(calls: Calls, rounds: int) -> Comparison:
    found = compare_times(calls, rounds=rounds, threads=1)
    print(found)
    return found


def loss(rounds: int, quick: bool) -> list[Figure]:
    found = timed(losses(*((8, 4) if quick else (512, 128))), rounds)
    figures = [over(found["boolean indices"], "NT-Xent by boolean indices, over ours", least=1.5)]
    if not INSTALLED:
        return [*figures, Figure("NT-Xent of lightly, over ours", None, least=1.5, note="lightly is not installed")]
    return [*figures, over(found["lightly"], "NT-Xent of lightly, over ours", least=1.5)]


def key(rounds: int, quick: bool) -> list[Figure]:
    return [over(timed(following(), rounds)["Python loop"], "the key's weights by a Python loop, over ours", least=3)]


def step(rounds: int, quick: bool) -> list[Figure]:
    few, batch, keys = max(2, rounds // 4), 2 if quick else 32, 64 if quick else 65536
    return [
        over(
            timed(steps(kind, batch, keys), few)["with"],
            f"a step of {kind} with the Hallucinator, over without",
            most=1.05,
        )
        for kind in ("SimCLR", "MoCo")
    ]


if __name__ == "__main__":
    sys.exit(recorded("hallucinator", __doc__ or "", {"loss": loss, "key": key, "step": step}, rounds=20))
