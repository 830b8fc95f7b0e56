"""SplitSGD against a loop over coordinates, and against SGD where no coordinate is large."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from netwright.seeding import seeded, stream
from netwright.train import SplitSGD


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> torch.Tensor:
    x = torch.randn(8, 4, generator=stream(0, "x"), dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(net.parameters()).detach()


def by_hand(lr, lr_large, momentum, quantile, warmup=None, steps=6) -> torch.Tensor:
    net = network()
    x = torch.randn(8, 4, generator=stream(0, "x"), dtype=torch.float64)
    params = list(net.parameters())
    means = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        grads = torch.autograd.grad(net(x).square().sum(), params)
        means = [momentum * m + (1 - momentum) * g for m, g in zip(means, grads, strict=True)]
        if warmup is None or step < warmup:
            sizes = sorted(abs(value) for m in means for value in m.flatten().tolist())
            threshold = sizes[math.ceil(quantile * len(sizes)) - 1]
        with torch.no_grad():
            for p, m in zip(params, means, strict=True):
                for place, value in enumerate(m.flatten().tolist()):
                    p.view(-1)[place] -= math.copysign(lr_large, value) if abs(value) > threshold else lr * value
    return nn.utils.parameters_to_vector(params).detach()


@pytest.mark.parametrize("warmup", [None, 2])
@pytest.mark.parametrize(("momentum", "quantile"), [(0.9, 0.9), (0.0, 0.5), (0.5, 0.01)])
def test_steps_are_those_of_a_loop_over_coordinates(momentum, quantile, warmup):
    net = network()
    found = train(net, SplitSGD(net.parameters(), 0.05, 0.01, momentum, quantile, warmup=warmup))
    assert torch.allclose(found, by_hand(0.05, 0.01, momentum, quantile, warmup), atol=1e-12)
    other = by_hand(0.05, 0.01, momentum, quantile, 2 if warmup is None else None)
    assert not torch.allclose(found, other, atol=1e-6)


def test_without_large_coordinates_it_is_dampened_sgd():
    nets = network(), network()
    ours = train(nets[0], SplitSGD(nets[0].parameters(), 0.05, 7.0, 0.9, quantile=1 - 1e-12))
    sgd = torch.optim.SGD(nets[1].parameters(), 0.05, momentum=0.9, dampening=0.9)
    for param in nets[1].parameters():  # torch's first mean is the gradient; ours begins at 0
        sgd.state[param]["momentum_buffer"] = torch.zeros_like(param)
    assert torch.allclose(ours, train(nets[1], sgd), atol=1e-12)


def test_a_schedule_changes_both_rates():
    w = nn.Parameter(torch.zeros(2))
    optimizer = SplitSGD([w], lr=0.1, lr_large=0.02, momentum=0.0, quantile=0.5)
    optimizer.param_groups[0]["lr"] = 0.05
    w.grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    assert w.tolist() == pytest.approx([-0.05, 0.01])


def test_a_changed_length_counts():
    w = nn.Parameter(torch.zeros(2))
    optimizer = SplitSGD([w], lr=0.1, lr_large=0.02, momentum=0.0, quantile=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.param_groups[0]["lr_large"] = 0.08
    w.grad = torch.tensor([1.0, -2.0])
    optimizer.step()
    assert w.tolist() == pytest.approx([-0.1, 0.08])
    schedule.step()
    optimizer.step()
    assert w.tolist() == pytest.approx([-0.1 - 0.05, 0.08 + 0.04])


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
        ({"lr_large": -1.0}, "lr_large must be > 0 and finite, got -1.0"),
        ({"momentum": 2.0}, r"momentum must lie in \[0, 1\), got 2.0"),
    ],
)
def test_bad_values_of_a_group_are_named(own, told):
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=told):
        SplitSGD([{"params": [a]}, {"params": [b], **own}])
    optimizer = SplitSGD([a])
    with pytest.raises(ValueError, match=told):
        optimizer.add_param_group({"params": [b], **own})
    assert len(optimizer.param_groups) == 1


def test_groups_have_rates_of_their_own_and_one_threshold():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5, "lr_large": 0.3}]
    optimizer = SplitSGD(groups, lr=0.1, lr_large=0.02, momentum=0.0, quantile=0.5)
    a.grad, b.grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    optimizer.step()
    assert a.tolist() == pytest.approx([-0.1, -0.2])
    assert b.tolist() == pytest.approx([-0.3, -0.3])


def test_states_are_restored_and_what_has_no_gradient_stays():
    nets = network(), network()
    whole = train(nets[0], SplitSGD(nets[0].parameters(), warmup=2), steps=6)
    first = SplitSGD(nets[1].parameters(), warmup=2)
    train(nets[1], first, steps=3)
    again = SplitSGD(nets[1].parameters(), warmup=2)
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert torch.equal(train(nets[1], again, steps=3), whole)
    idle = nn.Parameter(torch.ones(2))
    assert SplitSGD([idle]).step(lambda: 7.0) == 7.0
    assert idle.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr_large": float("inf")}, "lr_large must be > 0 and finite, got inf"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"quantile": 0.0}, r"quantile must lie in \(0, 1\), got 0.0"),
        ({"quantile": 1.0}, r"quantile must lie in \(0, 1\), got 1.0"),
        ({"warmup": 0}, "warmup must be >= 1, got 0"),
    ],
)
def test_bad_values_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        SplitSGD([nn.Parameter(torch.zeros(1))], **options)
