"""Ranges and affine forms against samples, a second way of computing them, and the network's own arithmetic."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from verified import NETS, captured, drawn, net, network, perceptron, points_of

from netwright.deploy.graph.ir import Activation
from netwright.deploy.graph.reference import activation
from netwright.explain.prototypes import PrototypeClassifier
from netwright.seeding import stream
from netwright.verify import Network, Region, deadline, forms, interval_bounds, verify_point
from netwright.verify.bounds import analyse
from netwright.verify.forms import pieces


def box(shape, radius=0.2, seed=1):
    centre = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return centre - radius, centre + radius


@pytest.mark.parametrize("name", NETS)
def test_intervals_hold_ten_thousand_samples(name):
    made = network(name)
    low, high = box(made.shape)
    bounds = interval_bounds(made, low, high)
    assert len(bounds) == len(made.layers)
    points = points_of(low, high, 10_000)
    for layer, (below, above) in enumerate(bounds):
        seen = made.forward(points, 0, layer)
        assert bool((seen >= below.flatten()).all())
        assert bool((seen <= above.flatten()).all())
        assert bool((seen.amax(0) - seen.amin(0) <= (above - below).flatten()).all())


def test_intervals_are_those_of_positive_and_negative_weights():
    """Interval propagation as other packages have it, weights split by their sign."""
    model = drawn(3, lambda: perceptron(7, 9, 8, 4))
    low, high = box((7,), 0.3)
    lo, hi = low.numpy(), high.numpy()
    expected = []
    for part in model:
        if isinstance(part, nn.Linear):
            w, b = part.weight.detach().double().numpy(), part.bias.detach().double().numpy()
            up, down = np.maximum(w, 0), np.minimum(w, 0)
            lo, hi = up @ lo + down @ hi + b, up @ hi + down @ lo + b
        else:
            lo, hi = np.maximum(lo, 0), np.maximum(hi, 0)
            expected.append((lo, hi))
    expected.append((lo, hi))
    found = interval_bounds(model, low, high)[1:]
    assert len(found) == len(expected) == 3
    for (a, b), (c, d) in zip(found, expected, strict=True):
        assert np.abs(a.numpy() - c).max() < 1e-9
        assert np.abs(b.numpy() - d).max() < 1e-9


@torch.no_grad()
def _by_parts(model, low, high):
    """Interval propagation with nothing of the project's: matrices of affine parts by autograd, split by sign.

    It goes through every layer; what the package auto-lirpa gave for the logits stands beside it.
    """
    found = []
    for part in model.double():
        if isinstance(part, (nn.ReLU, nn.MaxPool2d)):  # monotone
            low, high = part(low[None])[0], part(high[None])[0]
            found.append((low, high))
            continue
        constant = part(torch.zeros_like(low)[None])[0]
        matrix = torch.autograd.functional.jacobian(lambda x, part=part: part(x[None])[0].flatten(), low).flatten(1)
        up, down, lo, hi = matrix.clamp(min=0), matrix.clamp(max=0), low.flatten(), high.flatten()
        low = constant + (up @ lo + down @ hi).reshape(constant.shape)
        high = constant + (up @ hi + down @ lo).reshape(constant.shape)
    return [*found, (low, high)]


@pytest.mark.parametrize("radius", [0.01, 0.3])
def test_intervals_of_convolutions_batch_norms_and_poolings(radius):
    model, shape = net("convolutional")
    low, high = box(shape, radius)
    found = interval_bounds(model, low, high)[1:]
    expected = _by_parts(copy.deepcopy(model), low, high)
    assert len(found) == len(expected) == 4
    for (a, b), (c, d) in zip(found, expected, strict=True):
        assert float((a.flatten() - c.flatten()).abs().max()) < 1e-6
        assert float((b.flatten() - d.flatten()).abs().max()) < 1e-6


KEPT = json.loads((Path(__file__).parents[1] / "oracles" / "auto_lirpa.json").read_text())


@pytest.mark.parametrize("kept", KEPT["bounds"], ids=lambda kept: f"{kept['network']} {kept['radius']}")
def test_intervals_are_those_of_auto_lirpa(kept):
    """Figures that are kept, since the package asks for torch before 1.13."""
    model, shape = net(kept["network"])
    low, high = interval_bounds(model, *box(shape, kept["radius"]))[-1]
    assert np.abs(low.numpy().ravel() - kept["low"]).max() < 1e-5
    assert np.abs(high.numpy().ravel() - kept["high"]).max() < 1e-5


def test_intervals_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [0.5, 0.5]]))
        model[0].bias.copy_(torch.tensor([0.0, -1.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, 0.0]]))
        model[2].bias.zero_()
    found = interval_bounds(model, torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
    assert [b.tolist() for b in found[1]] == [pytest.approx([0, 0], abs=1e-9), pytest.approx([1, 0], abs=1e-9)]
    assert [b.tolist() for b in found[2]] == [pytest.approx([0, -1], abs=1e-9), pytest.approx([1, 0], abs=1e-9)]


@pytest.mark.parametrize("act", [nn.Sigmoid, nn.Tanh, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish])
def test_smooth_activations_have_ranges(act):
    made = Network(drawn(2, lambda: perceptron(4, 12, 3, act=act)), (4,))
    low, high = box((4,), 1.5)
    bounds = interval_bounds(made, low, high)
    seen = made.forward(points_of(low, high, 10_000), 0)
    assert bool(((seen >= bounds[-1][0]) & (seen <= bounds[-1][1])).all())


def values_of(analysis, x):
    """The variables of the forms at one input: units one after another, as they are defined."""
    basis = analysis.basis
    v = torch.cat([torch.ones(1, dtype=torch.float64), x.flatten()[analysis.dims]])
    for group in basis.groups:
        parts = group.candidates @ v
        if group.kind == "relu":
            v = torch.cat([v, parts.clamp(min=0)])
        else:
            v = torch.cat([v, parts.masked_fill(~group.alive, -torch.inf).amax(1)])
    return v


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("radius", [0.01, 0.5, 5.0])
def test_forms_are_the_network(name, radius):
    """At any point of the box the logits follow exactly from inputs and units, and units keep to their ranges."""
    made = network(name)
    low, high = box(made.shape, radius)
    analysis = analyse(made, low, high)
    rows = analysis.layers[-1].matrix(analysis.basis)
    for x in points_of(low, high, 60):
        v = values_of(analysis, x)
        assert bool(((v >= analysis.basis.low - 1e-9) & (v <= analysis.basis.high + 1e-9)).all())
        assert torch.allclose(rows @ v, made.logits(x[None])[0], atol=1e-9)
        for group in analysis.basis.groups:
            below, above = (line @ v[: group.start] for line in reversed(group.lines()))
            unit = v[group.start : group.stop]
            assert bool(((below <= unit + 1e-9) & (unit <= above + 1e-9)).all())
    if radius == 5.0:
        assert analysis.basis.units > 0


@pytest.mark.parametrize("name", NETS)
def test_tight_ranges_hold_and_are_tighter(name):
    made = network(name)
    low, high = box(made.shape, 0.3)
    analysis = analyse(made, low, high)
    out = analysis.layers[-1]
    seen = made.logits(points_of(low, high, 5000))
    for label in range(3):
        least, error, rivals = analysis.margins(label)
        margins = seen[:, label : label + 1] - seen[:, rivals]
        assert bool((margins >= least).all())
        assert bool((least >= out.low.flatten()[label] - out.high.flatten()[rivals] - 1e-9).all())
        assert bool((error > 0).all())
    wide = analyse(made, low, high, forms=False).layers[-1]
    assert float((out.high - out.low).sum()) <= float((wide.high - wide.low).sum()) + 1e-9


@pytest.mark.parametrize("name", NETS)
def test_the_error_holds_float32(name):
    """The network in float32 is off by less than the error says, and by more than nothing."""
    model, made = net(name)[0], network(name)
    low, high = box(made.shape, 0.5)
    out = analyse(made, low, high, forms=False).layers[-1]
    points = points_of(low, high, 5000).float()
    off = (model(points).detach().double() - made.logits(points)).abs().amax(0)
    assert bool((off <= out.error.flatten()).all())
    assert float(off.max()) > 1e-9


@pytest.mark.parametrize("name", ["convolutional", "branches"])
def test_folding_batch_norms_changes_nothing(name):
    model, made = net(name)[0], network(name)
    assert not any(node.op.name == "affine" for node in made.graph)
    points = points_of(*box(made.shape, 1.0), 200)
    assert float((made.forward(points, 0) - made.logits(points)).abs().max()) < 1e-9
    assert float((made.forward(points, 0) - model(points.float()).detach()).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "act",
    [
        Activation("relu"), Activation("leaky_relu", 0.3), Activation("leaky_relu", -0.4), Activation("clamp", -1, 2),
        Activation("clamp", 0.0), Activation("clamp", float("-inf"), 1.0), Activation("hardsigmoid"),
    ],
)  # fmt: skip
def test_pieces_are_the_activation(act):
    z = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    slope, shift, terms = pieces(act)
    made = slope * z + shift + sum(w * (z - knee).relu() for w, knee in terms)
    assert torch.allclose(made, activation(act)(z), atol=1e-12)


def test_layers_end_behind_what_bends():
    assert [layer.shape for layer in network("convolutional").layers] == [
        (1, 8, 8), (3, 8, 8), (3, 4, 4), (4, 2, 2), (3,),
    ]  # fmt: skip
    # Behind the concatenation, the clamp and the last activation everything is on one way.
    assert [layer.shape for layer in network("branches").layers] == [(1, 4, 4), (8, 4, 4), (8, 4, 4), (4, 4, 4), (3,)]


def test_activations_of_layers_are_those_of_the_modules():
    made = network("convolutional")
    x = torch.rand(made.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layer, stop in ((1, 3), (2, 4), (3, 6)):
        expected = x[None]
        for part in list(made.double)[:stop]:
            expected = part(expected)
        assert torch.allclose(made.activation(x, layer), expected.flatten(), atol=1e-12)


def test_bad_bounds():
    model = captured(0, 2, 2)
    for low, high, told in (
        ([0, float("nan")], [1, 1], "finite"),
        ([0, 2], [1, 1], "lower must not be above upper, got 2 > 1"),
    ):
        with pytest.raises(ValueError, match=told):
            interval_bounds(model, torch.tensor(low), torch.tensor(high))
    with pytest.raises(ValueError, match="lower must hold 2 numbers"):
        interval_bounds(model, torch.zeros(3), torch.ones(3))


class Named(nn.Module):
    """Gives a dictionary."""

    def forward(self, x):
        return {"logits": x}


def test_of_a_network_that_gives_more_the_logits_are_verified():
    """A prototype classifier, which also gives distances, encodings and reconstructions."""
    cases = PrototypeClassifier(nn.Identity(), nn.Linear(3, 3), 2, 2, input_shape=(3,))
    with torch.no_grad():
        cases.prototypes.copy_(torch.tensor([[0.0] * 3, [1.0] * 3]))
        cases.linear.weight.copy_(-torch.eye(2))  # the class of the nearer one
    seen = Network(cases, (3,))
    x = torch.rand(20, 3, generator=stream(0, "x"))
    expected = cases(x).logits
    assert torch.allclose(seen.logits(x).float(), expected, atol=1e-5)
    # The distances are squares, which only the grid takes.
    region = Region((0, 1, 2), 0.1, 2)
    unsafe = []
    for each, logits in zip(x, expected, strict=True):
        points = region.points(region.grid(), each.double())
        unsafe.append(bool((cases(points.float()).logits.argmax(1) != logits.argmax()).any()))
        assert (verify_point(seen, each, region, "grid").status == "unsafe") == unsafe[-1]
    assert 0 < sum(unsafe) < len(unsafe)


def test_bad_models():
    wide = nn.Linear(2, 2).double()
    wide.weight.data += 1e-12
    with pytest.raises(ValueError, match=r"float32 numbers, got torch\.float64 in weight"):
        Network(wide, (2,))
    broken = nn.Linear(2, 2)
    broken.bias.data[0] = float("inf")
    with pytest.raises(ValueError, match="finite numbers, got others in bias"):
        Network(broken, (2,))
    with pytest.raises(ValueError, match=r"classes >= 2\), got \(1, 1\)"):
        Network(nn.Linear(2, 1), (2,))
    with pytest.raises(TypeError, match=r"model must give logits, or .* its attribute logits, got a dict"):
        Network(Named(), (2,))
    with pytest.raises(TypeError, match="softplus"):
        Network(nn.Sequential(nn.Linear(2, 2), nn.Softplus()), (2,)).known()


def test_the_model_is_left_as_it_was():
    model, shape = net("convolutional")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Network(model, shape)
    assert all(part.training for part in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_clock_is_looked_at_within_a_layer_and_pieces_change_nothing(monkeypatch):
    convolution = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten()).eval()
    for parameter in convolution.parameters():
        parameter.data = torch.randn(parameter.shape, generator=stream(0, "pieces"))
    small = Network(convolution, (1, 5, 5))
    box = torch.zeros(25), torch.full((25,), 0.1)
    whole = analyse(small, *box)
    looks: list[float] = []
    monkeypatch.setattr(forms, "PIECE", 1)
    monkeypatch.setattr(deadline.time, "monotonic", lambda: looks.append(0.0) or 0.0)
    pieced = analyse(small, *box)
    assert len(looks) > 2 * (1 + 25)  # of every row before each of the convolutions
    for one, other in zip(whole.layers, pieced.layers, strict=True):
        assert torch.allclose(one.low, other.low, atol=1e-12)
        assert torch.allclose(one.high, other.high, atol=1e-12)
    assert torch.allclose(whole.layers[-1].rows, pieced.layers[-1].rows, atol=1e-12)
    for allowed in (3, 20, len(looks) - 1):  # the time is over at the next look, wherever it is
        left = iter([0.0] * allowed + [2.0])
        monkeypatch.setattr(deadline.time, "monotonic", lambda left=left: next(left))
        with pytest.raises(TimeoutError):
            analyse(small, *box, deadline=1.0)
