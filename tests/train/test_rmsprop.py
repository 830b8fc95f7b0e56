"""RMSProp in TensorFlow's form, against timm's."""

import copy

import pytest
import torch
from torch import nn

from netwright.seeding import seeded, stream
from netwright.train.rmsprop import RMSpropTF


def network():
    with seeded(0, "init"):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"momentum": 0.0}, {"alpha": 0.5, "eps": 1e-8}])
def test_steps_are_those_of_timm(options):
    optim = pytest.importorskip("timm.optim")
    settings = {"lr": 0.05, "alpha": 0.9, "eps": 1e-3, "momentum": 0.9, "weight_decay": 0.0} | options
    nets = network(), network()
    optimizers = RMSpropTF(nets[0].parameters(), **settings), optim.RMSpropTF(nets[1].parameters(), **settings)
    draw = stream(0, "x")
    start = [p.detach().clone() for p in nets[0].parameters()]
    for step in range(10):
        x = torch.randn(6, 4, generator=draw, dtype=torch.float64)
        for net, optimizer in zip(nets, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for ours, theirs, before in zip(nets[0].parameters(), nets[1].parameters(), start, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
        assert (ours - before).abs().max() > 1e-3


def test_it_is_not_the_form_of_torch():
    nets = network(), network()
    others = (
        RMSpropTF(nets[0].parameters(), lr=0.01),
        torch.optim.RMSprop(nets[1].parameters(), 0.01, 0.9, 1e-3, momentum=0.9),
    )
    for net, optimizer in zip(nets, others, strict=True):
        net(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert not torch.allclose(nets[0][0].weight, nets[1][0].weight)


def test_parameters_without_gradient_stay_and_states_are_restored():
    w, idle = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([2.0]))
    optimizer = RMSpropTF([w, idle], lr=0.1, weight_decay=0.5)
    w.grad = torch.tensor([1.0])
    assert optimizer.step(lambda: torch.tensor(7.0)).item() == 7.0
    assert idle.item() == 2.0
    twin = nn.Parameter(w.detach().clone())
    other = RMSpropTF([twin, idle], lr=9.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, opt in ((w, optimizer), (twin, other)):
        p.grad = torch.tensor([-0.3])
        opt.step()
    assert twin.item() == w.item()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"alpha": 1.0}, r"alpha must lie in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, r"momentum must lie in \[0, 1\), got -0.1"),
        ({"eps": -1.0}, "eps must be >= 0, got -1.0"),
        ({"weight_decay": float("nan")}, "weight_decay must be >= 0, got nan"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RMSpropTF([nn.Parameter(torch.zeros(1))], **options)
