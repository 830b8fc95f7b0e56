"""Parameter groups of their own against optimisers and schedulers that were made with them from the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from netwright.seeding import seeded
from netwright.train.groups import separate_

SCHEDULERS = {
    "none": None,
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.9**epoch),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 6),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.0, [g["lr"] for g in optimizer.param_groups], 2),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], total_steps=10
    ),
    "sequence": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
}


def network() -> nn.Sequential:
    with seeded(0, "net"):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def trained(net: nn.Module, optimizer, scheduler) -> list[torch.Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(6):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return [param.detach().clone() for param in net.parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_as_if_the_groups_had_been_there_from_the_start(kind, name):
    make = SCHEDULERS[name]
    fixed = {"momentum": 0.9} if kind is torch.optim.SGD else {}

    def optimizer(groups):
        return kind(groups, lr=0.02, weight_decay=0.1, **fixed)

    one, other = network(), network()
    chosen = [one[0].bias, one[2].bias]
    rest = [one[0].weight, one[2].weight]
    first = optimizer([{"params": rest}, {"params": chosen, "lr": 0.002, "weight_decay": 0.0}])
    expected = trained(one, first, make(first) if make else None)
    second = optimizer(other.parameters())
    scheduler = make(second) if make else None
    separate_(second, [other[0].bias, other[2].bias, nn.Parameter(torch.zeros(1))], rate=0.1,
              schedulers=[scheduler] if scheduler else [], weight_decay=0.0)  # fmt: skip
    assert [len(group["params"]) for group in second.param_groups] == [2, 2]
    found = trained(other, second, scheduler)
    for a, b in zip(expected, found, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-7)


def test_named_parameters_keep_their_names():
    net = network()
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    separate_(optimizer, [net[2].bias], rate=0.5)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "0.bias", "2.weight"],
        ["2.bias"],
    ]


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="rate must be > 0, got 0"):
        separate_(torch.optim.SGD(network().parameters()), [], rate=0)
