"""Gradients of single examples against autograd example by example, in double precision."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.diagnose import ExampleGradients
from netwright.diagnose import gradients as module
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream

LOSS = nn.CrossEntropyLoss(reduction="none")


def exact(net: nn.Module, x: torch.Tensor, y: torch.Tensor, loss=LOSS) -> torch.Tensor:
    """One backward pass an example."""
    params = [param for param in net.parameters() if param.requires_grad]
    rows = []
    for i in range(len(x)):
        found = torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1]).sum(), params, allow_unused=True)
        there = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
        rows.append(torch.cat([grad.flatten() for grad in there]))
    return torch.stack(rows)


def sizes(net: nn.Module) -> list[int]:
    return [param.numel() for param in net.parameters() if param.requires_grad]


class Tokens(nn.Module):
    """A transformer block: attention without a rule, linear layers on tokens, layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


class Shared(nn.Module):
    """One layer called twice, and a weight that is also used outside its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.tied, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.twice(torch.tanh(self.twice(x)))
        return self.head(torch.tanh(self.tied(x)) @ self.tied.weight)


class Scaled(nn.Module):
    """A parameter that is one number, and another outside any layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.scale * self.head(x + self.shift)


class Branch(nn.Module):
    """A layer whose output is changed in place, and one whose second call leads nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Linear(64, 3)

    def forward(self, x):
        self.conv(x.flip(3))
        return self.head(self.relu(self.conv(x)).flatten(1))


def conv(*layers: nn.Module, outputs: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(outputs, 3))


NETS = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)), (6,)),
    "tokens on linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3), nn.Flatten()), (1, 6)),
    "convolutions": (
        lambda: conv(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), outputs=24),
        (1, 8, 8),
    ),
    "groups, strides, dilation": (
        lambda: conv(
            nn.Conv2d(2, 4, (3, 1), stride=(2, 1), groups=2, bias=False),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, dilation=2, padding=2, groups=4, padding_mode="circular"),
            outputs=96,
        ),
        (2, 8, 8),
    ),
    "one and three axes": (
        lambda: nn.Sequential(
            nn.Conv3d(1, 2, 2), nn.Flatten(2), nn.Conv1d(2, 3, 3, padding="same"), nn.Flatten(), nn.Linear(24, 3)
        ),
        (1, 3, 3, 3),
    ),
    "norms": (
        lambda: conv(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.GroupNorm(2, 4), nn.LayerNorm([6, 6]), outputs=144
        ),
        (1, 8, 8),
    ),
    "small convnet": (lambda: SmallConvNet((4, 6), 8, 3, 1, grid=2), (1, 8, 8)),
    "transformer": (Tokens, (5, 8)),
    "shared": (Shared, (6,)),
    "in place": (Branch, (1, 6, 6)),
    "loose parameters": (Scaled, (6,)),
}
SLOW = {"transformer": 4, "shared": 2, "loose parameters": 2}  # parameters that no rule covers


def made(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    make, shape = NETS[name]
    with seeded(0, "net"):
        net = make().double().eval()
        for part in net.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2.0)
                part.weight.data.uniform_(0.5, 2.0)
        x = torch.randn(7, *shape, dtype=torch.float64)
    return net, x, torch.arange(7) % 3


@pytest.mark.parametrize("name", NETS)
def test_norms_sums_and_rows_are_those_of_autograd(name):
    net, x, y = made(name)
    expected = exact(net, x, y)
    gradients = ExampleGradients(net, LOSS)
    rows, losses = gradients.rows(x, y)
    assert torch.allclose(rows, expected, atol=1e-12)
    assert torch.allclose(losses, LOSS(net(x), y))
    total, squared, again = gradients.norms(x, y)
    assert torch.equal(again, losses)
    parts = expected.split(sizes(net), 1)
    assert torch.allclose(squared, torch.stack([part.square().sum(1) for part in parts], 1), atol=1e-12)
    assert torch.allclose(torch.cat([part.flatten() for part in total.values()]), expected.sum(0), atol=1e-12)
    assert len(gradients.without_rule) == SLOW.get(name, 0)
    kept = (rows, losses, squared, again, *total.values())
    assert not any(part.requires_grad for part in kept)  # none keeps its graph, and with it the batch
    assert all(param.grad is None for param in net.parameters())


@pytest.mark.parametrize("name", NETS)
def test_products_with_a_direction(name):
    net, x, y = made(name)
    gradients = ExampleGradients(net, LOSS)
    direction = {n: torch.randn(p.shape, dtype=p.dtype, generator=stream(1, n)) for n, p in gradients.params.items()}
    flat = torch.cat([direction[n].flatten() for n in gradients.names])
    along = gradients.along(x, y, direction)
    assert torch.allclose(along, exact(net, x, y) @ flat, atol=1e-11)
    assert not along.requires_grad


def test_some_parameters_of_a_transformer():
    """Those that are left out are trained too, and keep no graph either."""
    net, x, y = made("transformer")
    names = ["block.self_attn.in_proj_weight", "head.weight"]
    gradients = ExampleGradients(net, LOSS, names)
    rows, _ = gradients.rows(x, y)
    places = dict(zip((name for name, _ in net.named_parameters()), exact(net, x, y).split(sizes(net), 1), strict=True))
    assert torch.allclose(rows, torch.cat([places[name] for name in gradients.names], 1), atol=1e-12)
    direction = {name: torch.ones_like(param) for name, param in gradients.params.items()}
    along = gradients.along(x, y, direction)
    assert torch.allclose(along, rows.sum(1), atol=1e-11)
    assert not rows.requires_grad
    assert not along.requires_grad


def test_memory_does_not_grow_with_the_examples():
    """Of a transformer, whose attention has no rule; measured where nothing else of the tests is."""
    program = """
import resource, sys, torch
from torch import nn
from netwright.diagnose import m_coherence
torch.manual_seed(0)
block = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
net = nn.Sequential(block, nn.Flatten(), nn.Linear(64 * 16, 10)).eval()
loss = nn.CrossEntropyLoss(reduction="none")
used = []
for examples in (32, 160):
    batches = ((torch.randn(32, 16, 64), torch.arange(32) % 10) for _ in range(examples // 32))
    m_coherence(net, loss, batches)
    used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print((used[1] - used[0]) // 1024)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 40  # MiB; the graphs of 128 examples more are some hundred
    assert "requires_grad" not in found.stderr


def test_a_direction_without_forward_mode(monkeypatch):
    def refuse(*_):
        raise NotImplementedError("no forward mode")

    monkeypatch.setattr(module, "jvp", refuse)
    test_products_with_a_direction("convolutions")


@pytest.mark.parametrize("name", ["norms", "shared", "tokens on linear"])
def test_chunks_change_nothing(name, monkeypatch):
    net, x, y = made(name)
    whole = ExampleGradients(net, LOSS).norms(x, y)
    monkeypatch.setattr(module, "BUDGET", 1)
    monkeypatch.setattr(module, "WANTED", 1)
    monkeypatch.setattr("netwright.diagnose.layer_rules.CHUNK", 1)
    monkeypatch.setattr("netwright.nn.patches.CHUNK", 1)
    pieces = ExampleGradients(net, LOSS)
    found = pieces.norms(x, y)
    assert pieces._chunk == 1
    assert torch.allclose(found.squared, whole.squared, atol=1e-12)
    assert torch.allclose(found.losses, whole.losses, atol=1e-12)
    assert all(torch.allclose(found.total[n], value, atol=1e-12) for n, value in whole.total.items())


@pytest.mark.parametrize("places", [1, 3, 40])
def test_both_forms_of_a_sequence(places):
    """Few places by products of all pairs, many by the product itself."""
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(4, places, 5, dtype=torch.float64, generator=stream(0, "x"))
    y = torch.zeros(4, places, 3, dtype=torch.float64)
    loss = nn.MSELoss(reduction="none")
    found = ExampleGradients(net, loss).norms(x, y).squared.sum(1)
    assert torch.allclose(found, exact(net, x, y, loss).square().sum(1), atol=1e-11)


def test_agrees_with_vmap_in_single_precision():
    from torch.func import functional_call, grad, vmap

    net, x, y = made("small convnet")
    net, x = net.float(), x.float()
    params = {name: param.detach() for name, param in net.named_parameters()}

    def loss(values, one, target):
        return functional.cross_entropy(functional_call(net, values, (one[None],)), target[None])

    theirs = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    ours = ExampleGradients(net, LOSS).rows(x, y).matrix
    assert torch.allclose(ours, torch.cat([g.flatten(1) for g in theirs.values()], 1), atol=1e-5)


def test_agrees_with_opacus():
    opacus = pytest.importorskip("opacus")
    net, x, y = made("convolutions")
    ours = ExampleGradients(net, LOSS).rows(x, y).matrix
    theirs = opacus.GradSampleModule(net, loss_reduction="sum").train()  # it records in this mode only
    LOSS(theirs(x), y).sum().backward()
    joined = torch.cat([param.grad_sample.flatten(1) for param in theirs.parameters()], 1)
    assert torch.allclose(ours, joined, atol=1e-5)


def test_only_the_parameters_asked_for():
    net, x, y = made("convolutions")
    whole = exact(net, x, y).split(sizes(net), 1)
    assert torch.allclose(ExampleGradients(net, LOSS, ["0"]).rows(x, y).matrix, torch.cat(whole[:2], 1))
    assert ExampleGradients(net, LOSS, ["3.bias", "5"]).names == ("3.bias", "5.weight", "5.bias")
    net[0].requires_grad_(False)
    assert torch.allclose(ExampleGradients(net, LOSS).rows(x, y).matrix, torch.cat(whole[2:], 1))


def test_the_model_is_left_as_it_was():
    net = SmallConvNet((4,), 0, 3, 1)
    x, y = torch.rand(5, 1, 8, 8), torch.arange(5) % 3
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        ExampleGradients(net, LOSS, bn="eval").norms(x, y)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(part.training and not part._forward_hooks for part in net.modules())


def test_what_is_refused():
    net, x, y = made("norms")
    with pytest.raises(ValueError, match="one loss for each of 3 examples, as with reduction='none', got shape"):
        ExampleGradients(net, nn.CrossEntropyLoss()).norms(x, y)
    with pytest.raises(ValueError, match="as many inputs as targets, at least 1, got 7 and 6"):
        ExampleGradients(net, LOSS).norms(x, y[:6])
    with pytest.raises(ValueError, match="at least 1, got 0 and 0"):
        ExampleGradients(net, LOSS).norms(x[:0], y[:0])
    with pytest.raises(ValueError, match="NaN or infinity for 1 of 7 examples, first for number 4"):
        ExampleGradients(net, LOSS).norms(x.index_fill(0, torch.tensor([4]), float("nan")), y)
    with pytest.raises(ValueError, match=r"params must name .* got '1\.wieght'"):
        ExampleGradients(net, LOSS, ["1.wieght"])
    with pytest.raises(ValueError, match="at least 1 name, got 'conv'"):
        ExampleGradients(net, LOSS, "conv")
    with pytest.raises(ValueError, match="direction must have the names and shapes of 10 parameters"):
        ExampleGradients(net, LOSS).along(x, y, {})
    with pytest.raises(ValueError, match="at least 1 parameter that is trained, got 0"):
        ExampleGradients(nn.ReLU(), LOSS)
    with pytest.raises(ValueError, match=r"evaluation mode, got batch norm '?1'? in training"):
        ExampleGradients(net.train(), LOSS)
    with pytest.raises(ValueError, match="bn must be 'eval' or None, got 'train'"):
        ExampleGradients(net, LOSS, bn="train")
    with pytest.raises(ValueError, match="must not normalise by the batch, got 0 without statistics"):
        ExampleGradients(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False)).eval(), LOSS)


def test_a_layer_that_nothing_can_take_apart_is_named():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(5, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    with pytest.raises(ValueError, match=r"got rnn.weight_ih_l0, .* without a rule, and from vmap"):
        ExampleGradients(Last(), LOSS).norms(torch.rand(4, 6, 5), torch.arange(4) % 3)
