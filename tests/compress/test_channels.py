"""Gates on channels, the proximal step, and narrower networks that give the same output."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.models.resnet import BasicBlock, ResNet

from netwright.compress.channels import (
    ChannelGate,
    ProximalSGD,
    add_gates,
    channel_scales,
    gates,
    prune_channels,
    soft_threshold,
    threshold_for,
)
from netwright.cost import count
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream


def with_statistics(net, seed=0):
    """Random parameters and statistics everywhere, so that nothing is equal by chance."""
    generator = stream(seed, "statistics")
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.bias.data):
                tensor.copy_(0.3 * torch.randn(len(tensor), generator=generator))
            for tensor in (part.running_var, part.weight.data):
                tensor.copy_(0.5 + torch.rand(len(tensor), generator=generator))
    return net.double().eval()


def small():
    with seeded(0, "net"):
        return SmallConvNet((6, 8), hidden=5, num_classes=3, in_channels=1, grid=2)


def residual():
    with seeded(0, "net"):
        return ResNet(BasicBlock, [2, 1, 1, 1], num_classes=3)


def mobile():
    with seeded(0, "net"):
        return mobilenet_v2(num_classes=3, width_mult=0.25)


class PreActivation(nn.Module):
    """Batch norm before the convolution; the stream itself has none."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6), nn.BatchNorm2d(4), nn.BatchNorm2d(6)])
        self.convs = nn.ModuleList([nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)])
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.convs[0](self.norms[0](x).relu())
        x = x + self.convs[1](torch.relu(self.norms[1](y)))
        x = nn.functional.adaptive_avg_pool2d(nn.functional.relu(self.norms[2](x)), 2)
        return self.head(x.view(x.size(0), -1))


class Dense(nn.Module):
    """Branches side by side, one of them twice, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.one, self.two = (
            nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.ReLU()) for _ in range(2)
        )
        self.last = nn.Sequential(nn.Conv2d(15, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.twice = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        a, b = self.one(x), self.two(x)
        x = self.last(torch.cat([a, b, a], 1))
        x = self.twice(self.twice(x))
        return self.head(x.mean((2, 3)))


SHAPES = {small: (1, 12, 12), residual: (3, 32, 32), mobile: (3, 32, 32), PreActivation: (3, 8, 8), Dense: (3, 8, 8)}


def closed(net, share=0.5, seed=0):
    """A share of the gates at zero; joined branches agree on half of them, so that some channels can go."""
    generator = stream(seed, "gates")
    shared = {}
    for gate in gates(net).values():
        n = len(gate.alpha)
        common = shared.setdefault(n, torch.rand(n, generator=generator) < share)
        own = torch.rand(n, generator=generator) < 0.15
        gate.alpha.data[common | own] = 0.0
    return net


@pytest.mark.parametrize("make", SHAPES)
def test_gates_leave_the_function_as_it_was(make):
    net = with_statistics(make())
    gated = add_gates(copy.deepcopy(net)).eval()
    x = torch.randn(2, *SHAPES[make], dtype=torch.float64, generator=stream(0, "x"))
    assert torch.allclose(gated(x), net(x), atol=1e-10)
    for name, part in gated.named_modules():
        if isinstance(part, nn.BatchNorm2d):
            assert not part.weight.requires_grad, name
            assert torch.equal(part.weight, torch.ones_like(part.weight))


@pytest.mark.parametrize("make", SHAPES)
def test_the_pruned_network_gives_the_same_output_and_is_smaller(make):
    net = closed(add_gates(with_statistics(make()))).eval()
    x = torch.randn(2, *SHAPES[make], dtype=torch.float64, generator=stream(0, "x"))
    before = copy.deepcopy(net.state_dict())
    pruned = prune_channels(net)
    assert torch.allclose(pruned(x), net(x), atol=1e-9)
    assert not torch.allclose(net(x), make().double().eval()(x), atol=1e-3)
    assert not gates(pruned)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    full, found = count(net, SHAPES[make]), count(pruned, SHAPES[make])
    assert found.macs < 0.9 * full.macs
    assert set(pruned.state_dict()) == set(make().state_dict())
    assert all(p.requires_grad for p in pruned.parameters())


def test_exactly_the_channels_that_are_zero_go():
    net = add_gates(small())
    net.features[1].gate.alpha.data[[0, 3]] = 0.0
    net.features[5].gate.alpha.data[[1, 2, 7]] = 0.0
    pruned = prune_channels(net)
    assert (pruned.features[0].out_channels, pruned.features[4].in_channels) == (4, 4)
    assert (pruned.features[4].out_channels, pruned.features[5].num_features) == (5, 5)
    assert pruned.head[0].in_features == 5 * 4
    keep = [1, 2, 4, 5]
    assert torch.equal(pruned.features[4].weight, net.features[4].weight[[0, 3, 4, 5, 6]][:, keep])
    columns = [4 * channel + cell for channel in (0, 3, 4, 5, 6) for cell in range(4)]
    assert torch.equal(pruned.head[0].weight, net.head[0].weight[:, columns])


def test_of_branches_that_are_added_a_channel_goes_only_when_it_goes_in_all():
    net = add_gates(with_statistics(residual())).eval()
    stage = [net.bn1, *(block.bn2 for block in net.layer1)]
    for norm, zeros in zip(stage, ([0, 1, 2], [0, 1, 5], [0, 2, 5]), strict=True):
        norm.gate.alpha.data[zeros] = 0.0
    net.layer1[0].bn1.gate.alpha.data[:10] = 0.0
    pruned = prune_channels(net)
    assert pruned.conv1.out_channels == pruned.layer1[1].conv2.out_channels == 63
    assert pruned.layer1[0].conv1.out_channels == 54
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=stream(0, "x"))
    assert torch.allclose(pruned(x), net(x), atol=1e-9)


def test_a_threshold_is_the_same_as_setting_gates_to_zero():
    net = add_gates(with_statistics(small())).eval()
    for gate in gates(net).values():
        gate.alpha.data.uniform_(-1, 1, generator=stream(1, "alpha", len(gate.alpha)))
    zeroed = copy.deepcopy(net)
    for gate in gates(zeroed).values():
        gate.alpha.data[gate.alpha.abs() <= 0.4] = 0.0
    x = torch.randn(2, 1, 12, 12, dtype=torch.float64, generator=stream(0, "x"))
    pruned = prune_channels(net, 0.4)
    assert torch.allclose(pruned(x), zeroed(x), atol=1e-10)
    assert pruned.features[0].out_channels == int((net.features[1].gate.alpha.abs() > 0.4).sum()) < 6


def test_each_layer_keeps_its_strongest_channel():
    net = add_gates(small())
    for gate in gates(net).values():
        gate.alpha.data.uniform_(0.1, 1, generator=stream(1, "alpha", len(gate.alpha)))
    strongest = int(net.features[1].gate.alpha.argmax())
    pruned = prune_channels(net, 2.0)
    assert [pruned.features[0].out_channels, pruned.features[4].out_channels] == [1, 1]
    assert torch.equal(pruned.features[0].weight, net.features[0].weight[[strongest]])


def test_without_gates_gamma_decides():
    net = small()
    net.features[1].weight.data.copy_(torch.tensor([0.1, 2.0, -0.2, 1.0, -3.0, 0.3]))
    pruned = prune_channels(net, 0.25)
    assert torch.equal(pruned.features[1].weight, torch.tensor([2.0, 1.0, -3.0, 0.3]))
    assert {name: len(s) for name, s in channel_scales(net).items()} == {"features.1": 6, "features.5": 8}


def test_the_threshold_meets_the_budget_and_no_smaller_one_does():
    net = add_gates(small())
    for gate in gates(net).values():
        gate.alpha.data.uniform_(0, 1, generator=stream(2, "alpha", len(gate.alpha)))
    shape, full = (1, 12, 12), count(net, (1, 12, 12)).macs
    for share in (0.6, 0.3):
        threshold = threshold_for(net, share, shape)
        assert count(prune_channels(net, threshold), shape).macs <= share * full
        below = max(v for s in channel_scales(net).values() for v in s.tolist() if v < threshold)
        assert count(prune_channels(net, below), shape).macs > share * full
    assert threshold_for(net, 1.0, shape) == 0.0
    with pytest.raises(ValueError, match="share must be reachable"):
        threshold_for(net, 1e-4, shape)


def test_soft_threshold():
    x = torch.tensor([-2.0, -0.5, 0.0, 1.0])
    assert soft_threshold(x, 1.0).tolist() == [-1.0, 0.0, 0.0, 0.0]
    assert torch.equal(soft_threshold(x, 0.0), x)


def test_proximal_steps_end_at_the_lasso_of_a_diagonal_problem():
    """min of sum c (alpha - b)^2 / 2 + mu |alpha| is soft(b, mu / c), with exact zeros."""
    b, c = torch.tensor([1.0, -0.2, 0.3, -2.0]), torch.tensor([1.0, 1.0, 2.0, 0.5])
    alpha = nn.Parameter(torch.zeros(4))
    optimizer = ProximalSGD([alpha], lr=0.3, l1=0.25)
    for _ in range(200):
        optimizer.zero_grad()
        (c * (alpha - b).square() / 2).sum().backward()
        optimizer.step()
    wanted = b.sign() * (b.abs() - 0.25 / c).clamp_min(0)
    assert torch.allclose(alpha.detach(), wanted, atol=1e-6)
    assert alpha[1].item() == 0.0


def test_a_gate_takes_its_shape_from_the_input():
    gate = ChannelGate(3)
    gate.alpha.data.copy_(torch.tensor([1.0, 2.0, 0.0]))
    assert gate(torch.ones(2, 3)).tolist() == [[1.0, 2.0, 0.0]] * 2
    assert gate(torch.ones(1, 3, 2, 2)).sum().item() == 12.0


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: soft_threshold(torch.ones(1), -1.0), "s must be >= 0"),
        (lambda: ProximalSGD([nn.Parameter(torch.ones(1))], lr=0.1, l1=-1.0), "l1 must be >= 0"),
        (lambda: ChannelGate(0), "channels must be >= 1, got 0"),
        (lambda: add_gates(nn.Linear(2, 2)), "must hold a BatchNorm2d"),
        (lambda: add_gates(add_gates(small())), "must have no gates yet, got features.1.gate"),
        (lambda: add_gates(nn.Sequential(nn.BatchNorm2d(2, affine=False))), "must have a gamma"),
        (lambda: prune_channels(small(), -1.0), "threshold must be >= 0"),
        (lambda: prune_channels(nn.Sequential(nn.Linear(2, 2))), "must hold gates or affine batch norms"),
        (lambda: prune_channels(Branching()), "must be traceable"),
        (lambda: threshold_for(small(), 0.0, (1, 12, 12)), r"share must lie in \(0, 1\]"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
