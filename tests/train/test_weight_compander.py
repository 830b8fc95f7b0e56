"""Weight Compander against its closed forms, their limits, and what a network computed before."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.seeding import seeded
from netwright.train import Classifier
from netwright.train.weight_compander import (
    FUNCTIONS,
    WeightCompander,
    add_effective_decay_,
    apply_weight_compander,
    compand,
    companded,
    crossover,
    expand_inverse,
    param_groups,
    remove_weight_compander,
    scale_rates_,
    weight_statistics,
)

A, B = 0.3, 0.2


def net() -> nn.Sequential:
    with seeded(0, "net"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        )


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_values_and_slopes():
    v = doubles(0.05, 0.1, 0.5, 1, 2, 0).requires_grad_()
    w = compand(v, A, B)
    expected = doubles(0.0734936, 0.1390943, 0.3570870, 0.4120202, 0.4413383, 0)
    assert torch.allclose(w, expected, atol=5e-8, rtol=0)
    w.sum().backward()
    assert torch.allclose(v.grad[[0, 1, 2, 5]], doubles(1.4117647, 1.2, 0.2068966, 1.5), atol=5e-8, rtol=0)
    assert WeightCompander(A, B).bound == pytest.approx(0.4712389, abs=1e-7)


def test_crossover():
    assert crossover(A, B) == pytest.approx(0.2902208, abs=1e-7)
    assert crossover(B, A) is None
    assert crossover(B, B) is None
    for a, b in ((A, B), (1.0001, 1.0), (50.0, 0.01)):
        v = doubles(crossover(a, b))
        assert float(compand(v, a, b)) == pytest.approx(float(v), rel=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inverse_symmetry_and_order(name):
    step = WeightCompander(A, B, function=name)
    reach = {"erf": 2, "tanh": 3}.get(name, 5)
    v = torch.linspace(-reach * B, reach * B, 201)
    w = step(v)
    assert torch.allclose(step.right_inverse(w), v, atol=1e-5 if name in ("tanh", "erf") else 1e-6)
    inside = torch.linspace(-0.99, 0.99, 101) * min(step.bound, 1.0)
    assert torch.allclose(step(step.right_inverse(inside)), inside, atol=1e-6)
    assert torch.equal(step(-v), -w)
    assert bool((w.diff() > 0).all())
    slope = {"erf": 2 / math.sqrt(math.pi)}.get(name, 1.0)
    assert float(step(torch.tensor(1e-4)) / 1e-4) == pytest.approx(slope * A / B, rel=1e-3)


@pytest.mark.parametrize("learnable", [False, True])
def test_gradients(learnable):
    v = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a, b = (torch.tensor(x, dtype=torch.float64, requires_grad=learnable) for x in (A, B))
    grad = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    compand(v, a, b).backward(grad)
    assert torch.allclose(v.grad, grad * A * B / (B**2 + v**2), atol=1e-10)
    if learnable:
        assert torch.allclose(a.grad, (grad * (v / B).atan()).sum(), atol=1e-10)
        assert torch.allclose(b.grad, -(grad * A * v / (B**2 + v**2)).sum(), atol=1e-10)
    assert torch.autograd.gradcheck(compand, (v, a, b))
    assert torch.autograd.gradgradcheck(compand, (v, a, b))


def test_limits():
    v = torch.linspace(-1, 1, 101, dtype=torch.float64)
    for s in (10.0, 1e3):
        assert float((compand(v, s, s) - v).abs().max()) <= 1 / (3 * s**2)
    v = v[v.abs() > 0.01]
    assert torch.allclose(compand(v, 0.7, 1e-12), 0.7 * math.pi / 2 * v.sign(), atol=1e-9)


def test_scale_family():
    v = torch.linspace(-1, 1, 21, dtype=torch.float64)
    assert torch.allclose(compand(3 * v, 3 * A, 3 * B), 3 * compand(v, A, B), atol=1e-14)


def test_half_precision_is_computed_in_float32():
    v = torch.linspace(-1, 1, 21).half()
    assert torch.equal(compand(v, A, B), compand(v.float(), A, B).half())


def test_match_keeps_the_function_and_removal_keeps_it_again():
    x = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    model = net().eval()
    before, keys = model(x), set(model.state_dict())
    apply_weight_compander(model, init="match")
    assert sorted(companded(model)) == ["0", "4", "6"]
    matched = model(x)
    assert torch.allclose(matched, before, rtol=0, atol=1e-5)
    latent = net()
    apply_weight_compander(latent)
    after = latent.eval()(x)
    assert not torch.allclose(after, before, atol=1e-2)
    for wrapped, expected in ((model, matched), (latent, after)):
        remove_weight_compander(wrapped)
        assert set(wrapped.state_dict()) == keys
        assert torch.allclose(wrapped(x), expected, rtol=0, atol=1e-6)


def test_latent_weights_are_the_old_ones():
    model, plain = apply_weight_compander(net()), net()
    assert torch.equal(model[4].parametrizations.weight.original, plain[4].weight)
    assert "4.parametrizations.weight.original" in model.state_dict()
    std = float(plain[4].weight.detach().std())
    step = companded(model)["4"]
    assert float(step.b) == pytest.approx(2 * std)
    assert float(step.a) == pytest.approx(2.4 * std)


def test_weights_beyond_the_bound_are_clamped_with_a_warning(capsys):
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[10.0, 0.1]]))
    apply_weight_compander(layer, 1.0, 1.0, init="match")
    assert "1 weights were larger" in capsys.readouterr().err
    assert layer.weight[0].tolist() == pytest.approx([0.999 * math.pi / 2, 0.1], abs=1e-4)


def test_a_step_of_sgd_in_closed_form():
    model = apply_weight_compander(nn.Linear(6, 4, bias=False).double(), A, B)
    latent, before = model.parametrizations.weight.original, model.weight.detach().clone()
    x = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    upstream = 2 * (x @ before.T).T @ x  # dL/dw of the sum of squares
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    slope = A * B / (B**2 + latent.detach() ** 2)
    (model(x) ** 2).sum().backward()
    optimizer.step()
    expected = -1e-6 * slope**2 * upstream
    assert float((model.weight.detach() - before - expected).norm() / expected.norm()) < 1e-4


def test_bounded_under_abuse():
    model = apply_weight_compander(net(), learnable=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    draws = torch.Generator().manual_seed(0)
    for _ in range(200):
        optimizer.zero_grad()
        x, y = torch.randn(8, 1, 6, 6, generator=draws), torch.randint(3, (8,), generator=draws)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for name, step in companded(model).items():
        weight = model.get_submodule(name).weight
        assert bool(weight.isfinite().all())
        assert float(weight.detach().abs().max()) <= step.bound * (1 + 1e-6)
        assert 0.1 * (1 - 1e-6) <= float((step.a / step.start_a).detach()) <= 10 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("SGD", "groups"), ("SGD", "taken out"), ("SGD", "classifier"), ("Adam", "groups"), ("Adam", "taken out")],
)
def test_learned_parameters_move_at_a_hundredth_of_the_learning_rate(name, kind):
    """Their first step against that of log a and log b themselves, whatever the optimiser."""
    lr = 1e-4
    layer = apply_weight_compander(nn.Linear(6, 4, bias=False).double(), A, B, learnable=True)
    step, x = companded(layer)[""], torch.ones(1, 6, dtype=torch.float64)
    v = layer.parametrizations.weight.original.detach()
    logs = [torch.tensor(math.log(value), dtype=torch.float64, requires_grad=True) for value in (A, B)]
    (x @ compand(v, *(log.exp() for log in logs)).T).sum().backward()
    make = getattr(torch.optim, name)
    make(logs, lr=0.01 * lr).step()
    if kind == "groups":
        optimizer = make(param_groups(layer, 5e-4, lr), lr=lr)
    elif kind == "taken out":
        optimizer = make(layer.parameters(), lr=lr, weight_decay=5e-4)
        scale_rates_(optimizer, layer)
    else:
        optimizer = Classifier(layer, lr=lr, momentum=0.0).configure_optimizers()
    layer(x).sum().backward()
    optimizer.step()
    # log a = log a_0 + alpha to first order, so that both have the same gradient at the start.
    for moved, log, start in ((step.alpha, logs[0], A), (step.beta, logs[1], B)):
        assert float(moved.detach()) == pytest.approx(float(log.detach()) - math.log(start), rel=1e-3)
    assert {"parametrizations.weight.0.alpha", "parametrizations.weight.0.beta"} <= set(layer.state_dict())
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert groups[id(step.alpha)] is groups[id(step.beta)]
    assert (groups[id(step.alpha)]["lr"], groups[id(step.alpha)]["weight_decay"]) == (pytest.approx(1e-2 * lr), 0.0)
    scale_rates_(optimizer, layer)
    assert groups[id(step.alpha)]["lr"] == pytest.approx(1e-2 * lr), "taken out once"


def test_param_groups():
    model = apply_weight_compander(net(), learnable=True)
    decayed, free = param_groups(model, 5e-4)
    assert (decayed["weight_decay"], free["weight_decay"]) == (5e-4, 0.0)
    named = {id(p): name for name, p in model.named_parameters()}
    names = [sorted(named[id(p)] for p in group["params"]) for group in (decayed, free)]
    assert sorted(names[0] + names[1]) == sorted(named.values())
    assert all(name.endswith("original") for name in names[0])
    assert {"0.parametrizations.weight.0.alpha", "6.parametrizations.weight.0.beta", "1.weight", "4.bias"} <= {
        *names[1]
    }


def test_effective_decay_is_the_gradient_of_the_penalty():
    model = apply_weight_compander(nn.Linear(6, 4).double(), A, B)
    latent = model.parametrizations.weight.original
    model(torch.ones(1, 6, dtype=torch.float64)).sum().backward()
    before = latent.grad.clone()
    add_effective_decay_(model, 0.1)
    penalty = 0.05 * compand(latent, A, B).pow(2).sum()
    assert torch.allclose(latent.grad - before, torch.autograd.grad(penalty, latent)[0], atol=1e-12)


def test_statistics():
    layer = nn.Linear(100, 100)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(100, 100, generator=torch.Generator().manual_seed(0)))
    found = weight_statistics(layer)[""]
    assert found["kurtosis"] == pytest.approx(0, abs=0.1)
    assert found["near zero"] == pytest.approx(0.0797, abs=0.01)
    assert 3.3 < found["largest"] < 5
    with torch.no_grad():
        layer.weight.copy_(torch.ones(100, 100).tril() * 2 - 1)
    assert weight_statistics(layer)[""]["kurtosis"] == pytest.approx(-2, abs=0.01)


def test_one_evaluation_when_cached():
    layer = apply_weight_compander(nn.Linear(3, 3))
    calls = []
    layer.parametrizations.weight[0].register_forward_hook(lambda *_: calls.append(1))
    with parametrize.cached():
        layer(layer(torch.ones(1, 3)))
    assert len(calls) == 1


def test_excluded_layers_stay():
    assert sorted(companded(apply_weight_compander(net(), exclude=["0", "6"]))) == ["4"]
    assert sorted(companded(apply_weight_compander(net(), layers=[nn.Conv2d]))) == ["0"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: WeightCompander(0, 1), ValueError, "a must be > 0 and finite, got 0"),
        (lambda: WeightCompander(1, float("inf")), ValueError, "b must be > 0 and finite, got inf"),
        (lambda: WeightCompander(1, 1, function="sine"), ValueError, "function must be one of arctan"),
        (lambda: apply_weight_compander(net(), a=-1), ValueError, "a must be > 0"),
        (lambda: apply_weight_compander(net(), init="both"), ValueError, "init must be one of latent, match"),
        (lambda: apply_weight_compander(net(), exclude=["nine"]), ValueError, "exclude must name layers"),
        (lambda: apply_weight_compander(nn.ReLU()), ValueError, "must have a layer"),
        (
            lambda: apply_weight_compander(apply_weight_compander(net())),
            ValueError,
            "layer '0' must not be companded twice",
        ),
        (lambda: apply_weight_compander(nn.Linear(2, 2, dtype=torch.complex64)), TypeError, "got torch.complex64"),
        (lambda: param_groups(net(), -1), ValueError, "weight_decay must be >= 0"),
        (lambda: param_groups(net(), 0, lr=0), ValueError, "lr must be > 0"),
        (lambda: crossover(-1, 1), ValueError, "a must be > 0"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_constant_layer_needs_b():
    layer = nn.Linear(3, 3)
    nn.init.zeros_(layer.weight)
    with pytest.raises(ValueError, match="b must be given"):
        apply_weight_compander(layer)
    assert companded(apply_weight_compander(layer, b=0.1))
    assert not layer.weight.any()


def test_tied_layers_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="2 layers with 1 weights"):
        apply_weight_compander(model)


def test_expand_inverse_is_the_tangent():
    assert float(expand_inverse(torch.tensor(0.2), A, B)) == pytest.approx(B * math.tan(0.2 / A), rel=1e-6)
