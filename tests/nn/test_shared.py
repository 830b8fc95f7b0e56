"""Tensors that layers share stay shared, whatever is done to them."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress.quantize import NonuniformQuantizer, UniformQuantizer
from netwright.nn import shared
from netwright.nn.sparse import clone, unparametrized
from netwright.seeding import seeded


def tied() -> nn.Sequential:
    with seeded(0, "init"):
        net = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))
    net[1].weight = net[0].weight
    return net


class Shift(nn.Module):
    """Baked in twice, it would shift twice."""

    def forward(self, weight):
        return weight + 1


STEPS = {
    "shift": lambda weight: Shift(),
    "uniform": lambda weight: UniformQuantizer(2, 7),
    "points": lambda weight: NonuniformQuantizer(weight, torch.tensor([0.1, 0.4, 0.8])),
}


@pytest.mark.parametrize("name", STEPS)
def test_baking_is_exact_and_keeps_the_tie(name):
    net = tied()
    shared.register(net, [(net[1], "weight", STEPS[name](net[0].weight))])
    first, second = (net[i].weight.detach().clone() for i in (0, 1))
    assert torch.equal(first, second)
    plain = unparametrized(net)
    assert plain[0].weight is plain[1].weight
    assert torch.equal(plain[0].weight, first)
    assert parametrize.is_parametrized(net[0])
    assert list(plain.state_dict()) == list(tied().state_dict())


def test_one_parameter_through_two_parametrizations_is_two_weights():
    net = tied()
    parametrize.register_parametrization(net[0], "weight", Shift())
    parametrize.register_parametrization(net[1], "weight", nn.Tanh())
    expected = [net[i].weight.detach().clone() for i in (0, 1)]
    plain = unparametrized(net)
    assert all(torch.equal(plain[i].weight, expected[i]) for i in (0, 1))
    assert plain[0].weight is not plain[1].weight


def test_owners():
    net = tied()
    users = shared.owners(net)
    assert [name for _, name in users[shared.identity(net[1], "weight")]] == ["weight", "weight"]
    assert sum(len(each) for each in users.values()) == 6
    shared.register(net, [(net[0], "weight", UniformQuantizer(2))])
    assert sum(len(each) for each in shared.owners(net).values()) == 6  # nothing of what computes them
    assert len(shared.owners(clone(net))) == 5


def test_weight_norm_is_baked_too():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    expected = layer.weight.detach().clone()
    assert torch.allclose(unparametrized(layer).weight, expected)
