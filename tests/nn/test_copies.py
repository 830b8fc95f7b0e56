"""Copies that share no class, and networks that answer as one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.nn.copies import separate_copy
from netwright.nn.ensemble import LogitMean


def masked() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    for layer in (net[0], net[2]):
        nn.utils.parametrizations.weight_norm(layer)
    return net


@pytest.mark.parametrize("first", ["copy", "original"])
def test_either_outlives_the_removal_of_the_other(first):
    net, x = masked(), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    expected, other = net(x), separate_copy(net)
    with torch.no_grad():
        other[0].bias += 1.0
    assert torch.equal(net(x), expected)
    moved = other(x)
    order = [other, net] if first == "copy" else [net, other]
    for each in order:
        for layer in (each[0], each[2]):
            parametrize.remove_parametrizations(layer, "weight")
            assert type(layer) is nn.Linear
    assert torch.allclose(net(x), expected, atol=1e-6)
    assert torch.allclose(other(x), moved, atol=1e-6)


def test_torchs_own_copy_does_not():
    """Why there is another one; when this fails, it is not needed any more."""
    net = masked()
    parametrize.remove_parametrizations(copy.deepcopy(net)[0], "weight")
    with pytest.raises(AttributeError):
        net(torch.zeros(1, 6))


def test_a_mean_of_logits():
    nets = [nn.Linear(3, 2) for _ in range(3)]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    mean = LogitMean(nets)
    assert torch.allclose(mean(x), sum(net(x) for net in nets) / 3, atol=1e-6)
    probs = torch.stack([net(x).softmax(1) for net in nets]).log().mean(0).exp()
    assert torch.allclose(mean(x).softmax(1), probs / probs.sum(1, keepdim=True), atol=1e-6)
    with pytest.raises(ValueError, match="at least 1 network, got 0"):
        LogitMean([])
