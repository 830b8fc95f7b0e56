import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress.quantize import (
    DifferentiableQuantizer,
    NonuniformQuantizer,
    UniformQuantizer,
    nonuniform_quantize,
    post_training_quantize,
    uniform_quantize,
)
from netwright.seeding import seeded, stream


def network(seed=0):
    with seeded(seed, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)
        )


X = torch.randn(6, 1, 6, 6, generator=stream(0, "x"))


def gradient(quantizer, weight, factor):
    """dL/dw for L = sum(factor * Q(w))."""
    w = weight.clone().requires_grad_()
    (quantizer(w) * factor).sum().backward()
    return w.grad


def test_the_layer_computes_with_rounded_weights():
    net, plain = network(), network()
    rounded = post_training_quantize(net, 3, 16)
    for i in (0, 3, 5):
        assert torch.equal(rounded[i].weight, uniform_quantize(plain[i].weight, 3, 16))
        plain[i].weight.data = uniform_quantize(plain[i].weight.data, 3, 16)
    assert torch.equal(rounded.eval()(X), plain.eval()(X))
    assert not parametrize.is_parametrized(net[0])


def test_fitted_ends_lose_less_and_travel_in_the_state():
    net = network()
    fitted, plain = (post_training_quantize(net, 2, ranges=ranges) for ranges in ("mse", "minmax"))
    for i in (0, 3, 5):
        lost = [(copy[i].weight - net[i].weight).square().mean() for copy in (fitted, plain)]
        assert lost[0] < 0.8 * lost[1]
        assert len(fitted[i].weight.unique()) <= 4 * -(-net[i].weight.numel() // 256)
    plain.load_state_dict(fitted.state_dict())
    assert torch.equal(plain.eval()(X), fitted.eval()(X))
    plain.load_state_dict(post_training_quantize(net, 2).state_dict())
    assert torch.equal(plain[0].weight, uniform_quantize(net[0].weight, 2))


@pytest.mark.parametrize("grad", ["ste", "truncated", "exact"])
def test_gradients_between_fitted_ends(grad):
    w = torch.tensor([-2.0, -0.4, -0.3, -0.1, 0.0, 0.2, 0.3, 0.5])
    found = UniformQuantizer(2, None, grad=grad)
    found.fit_ends_(w)
    assert 0 < found.ends[0, 0] < found.ends[0, 1] <= 1
    passed = gradient(found, w, torch.ones(8))
    if grad != "exact":
        assert passed.tolist() == [0.0 if grad == "truncated" else 1.0, 1, 1, 1, 1, 1, 1, 1]
    else:  # what lies beyond the ends moves with the range of its bucket alone
        low, high = found.ends[0].double()
        v = w.double().requires_grad_()
        span, least = v.max() - v.min(), v.min()
        u = ((v - least) / span - low) / (high - low)
        u = u.clamp(0, 1)
        q = (u.detach() * 3).round() / 3 + u - u.detach()
        (span * ((high - low) * q + low) + least).sum().backward()
        assert torch.allclose(passed.double(), v.grad, atol=1e-5)


def test_straight_through_is_bit_for_bit():
    w, factor = (torch.randn(40, generator=stream(i, "w")) for i in range(2))
    assert torch.equal(gradient(UniformQuantizer(2, 16), w, factor), factor)
    layer = nn.Linear(9, 4)
    parametrize.register_parametrization(layer, "weight", UniformQuantizer(2))
    x = torch.randn(5, 9, generator=stream(0, "in"))
    layer(x).square().sum().backward()
    free = layer.weight.detach().clone().requires_grad_()
    nn.functional.linear(x, free, layer.bias).square().sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, free.grad)


def test_truncated_stops_weights_outside_one():
    w = torch.tensor([-1.5, -0.5, 0.5, 2.0])
    found = UniformQuantizer(4, None, grad="truncated")
    assert torch.equal(found(w), uniform_quantize(w.clamp(-1, 1), 4))
    assert gradient(found, w, torch.ones(4)).tolist() == [0, 1, 1, 0]


def test_exact_gradient_is_that_of_the_graph_and_of_the_closed_form():
    w, factor = (torch.randn(40, generator=stream(i, "w"), dtype=torch.float64) for i in range(2))
    found = gradient(UniformQuantizer(2, 10, grad="exact"), w, factor)
    leaf = w.clone().requires_grad_()
    rows = leaf.view(4, 10)
    beta, alpha = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)
    u = (rows - beta) / alpha
    q = (u * 3).round() / 3
    (((u + (q - u).detach()) * alpha + beta).flatten() * factor).sum().backward()
    assert torch.allclose(found, leaf.grad)
    closed = factor.clone()
    for b in range(4):
        part = slice(10 * b, 10 * b + 10)
        gap = float((factor[part] * (q - u).detach()[b]).sum())
        closed[10 * b + int(w[part].argmax())] += gap
        closed[10 * b + int(w[part].argmin())] -= gap
    assert torch.allclose(found, closed)


def test_stochastic_rounding_in_training_only():
    quantizer = UniformQuantizer(2, None, stochastic=True, generator=stream(0, "chance"))
    w = torch.linspace(0, 1, 50)
    assert not torch.equal(quantizer(w), quantizer(w))
    assert torch.equal(quantizer.eval()(w), uniform_quantize(w, 2))


def test_points_get_the_gradient_of_indexing():
    w = torch.randn(50, generator=stream(0, "w"), dtype=torch.float64)
    factor = torch.randn(50, generator=stream(1, "w"), dtype=torch.float64)
    quantizer = DifferentiableQuantizer(w, 5, 16)
    values, chosen = nonuniform_quantize(w, quantizer.points.detach(), 16)
    assert torch.equal(quantizer(w), values)
    (quantizer(w) * factor).sum().backward()
    points = quantizer.points.detach().clone().requires_grad_()
    span = quantizer.alpha.repeat_interleave(16, 1).flatten()[:50]
    ((span * points[chosen] + 0.0) * factor).sum().backward()
    assert torch.allclose(quantizer.points.grad, points.grad)
    for j in range(5):  # finite differences, where no weight changes its point
        shifted = quantizer.points.detach().clone()
        shifted[j] += 1e-7
        moved, again = nonuniform_quantize(w, shifted, 16)
        assert torch.equal(again, chosen)
        assert float(((moved - values) * factor).sum()) / 1e-7 == pytest.approx(float(points.grad[j]), abs=1e-5)


def test_points_start_at_quantiles_or_evenly():
    w = torch.rand(4001, generator=stream(0, "w")) ** 3
    quantizer = DifferentiableQuantizer(w, 5, None)
    scaled = (w - w.min()) / (w.max() - w.min())
    assert torch.allclose(quantizer.points.detach(), scaled.quantile(torch.linspace(0, 1, 5)), atol=1e-6)
    assert torch.allclose(DifferentiableQuantizer(w, 5, init="uniform").levels(), torch.linspace(0, 1, 5))


def test_points_are_sorted_and_an_empty_one_has_no_gradient():
    w = torch.tensor([0.0, 0.1, 0.9, 1.0])
    quantizer = DifferentiableQuantizer(w, torch.tensor([0.0, 0.5, 1.0]))
    quantizer(w).sum().backward()
    assert quantizer.points.grad.tolist() == [2, 0, 2]
    quantizer.points.data = torch.tensor([0.9, 0.2, 0.4])
    quantizer.sort_()
    assert quantizer.points.tolist() == pytest.approx([0.2, 0.4, 0.9])


def test_a_learned_network_survives_its_state():
    net = nn.Linear(30, 4)
    made = DifferentiableQuantizer(net.weight, 4)
    parametrize.register_parametrization(net, "weight", made)
    made.points.data *= 0.9
    other = nn.Linear(30, 4)
    parametrize.register_parametrization(other, "weight", DifferentiableQuantizer(other.weight, 4))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.weight, net.weight)


def test_both_gradients_at_once():
    """The points' gradient is that of fixed weights, the weights' that of the rounded ones, bit for bit."""
    weight = torch.randn(600, generator=stream(0, "w"))
    factor = torch.randn(600, generator=stream(0, "f"))
    fixed, free = DifferentiableQuantizer(weight, 5), NonuniformQuantizer(weight, 5)
    assert torch.equal(fixed.points, free.points)
    w = weight.clone().requires_grad_()
    assert torch.equal(free(w), fixed(weight))
    (free(w) * factor).sum().backward()
    (fixed(weight) * factor).sum().backward()
    assert torch.equal(free.points.grad, fixed.points.grad)
    assert torch.equal(w.grad, factor)
    values, _ = nonuniform_quantize(2 * weight + 1, free.points.detach())
    assert torch.allclose(free(2 * weight + 1), values, atol=1e-6)  # scales follow the tensor, the fixed ones do not
    assert torch.equal(fixed(2 * weight + 1), fixed(weight))


def test_free_weights_keep_their_zeros():
    weight = torch.randn(40, generator=stream(0, "w"))
    kept = torch.arange(40) % 3 > 0
    quantizer = NonuniformQuantizer(weight, 4, kept=kept)
    w = weight.clone().requires_grad_()
    quantizer(w).sum().backward()
    assert not quantizer(weight)[~kept].any()
    assert torch.equal(w.grad, kept.float())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: UniformQuantizer(0), "bits must lie in 1..16"),
        (lambda: UniformQuantizer(2, 0), "bucket_size"),
        (lambda: UniformQuantizer(2, grad="none"), "grad must be one of"),
        (lambda: UniformQuantizer(2, stochastic=True), "needs a generator"),
        (lambda: DifferentiableQuantizer(torch.ones(4), 1), "points must be at least 2"),
        (lambda: DifferentiableQuantizer(torch.ones(4) / 0), "weight must be finite"),
        (lambda: DifferentiableQuantizer(torch.ones(4), init="random"), "init must be one of"),
        (lambda: NonuniformQuantizer(torch.ones(4), 1), "points must be at least 2"),
        (lambda: NonuniformQuantizer(torch.ones(4) / 0), "weight must be finite"),
        (lambda: NonuniformQuantizer(torch.ones(4), torch.tensor([1.0, 0.0])), "points must be sorted"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
