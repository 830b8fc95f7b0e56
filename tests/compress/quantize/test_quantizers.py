import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from netwright.compress import prune
from netwright.compress.quantize import (
    DifferentiableQuantizer,
    UniformQuantizer,
    baked,
    nonuniform_quantize,
    post_training_quantize,
    uniform_quantize,
)
from netwright.nn.sparse import sparsify
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


@pytest.mark.parametrize("make", [lambda net: prune.magnitude(net, 0.8), lambda net: sparsify(net, 0.2)])
def test_zeros_of_pruning_stay(make):
    pruned = make(network())
    rounded = post_training_quantize(pruned, 2)
    before = prune.sparsity(pruned)
    assert prune.sparsity(rounded).kept == before.kept
    weight = rounded[3].weight
    original = prune.effective_weight(pruned[3])
    kept = original != 0
    assert torch.equal(weight[kept], uniform_quantize(original[kept], 2))
    rounded(X).sum().backward()
    gradient = rounded[3].parametrizations.weight.original.grad
    assert gradient[kept].any()
    assert not gradient[~kept].any()
    assert prune.sparsity(baked(rounded)).kept == before.kept


def test_which_tensors_take_part():
    def quantised(**options):
        net = post_training_quantize(network(), 2, **options)
        return {
            n.replace("parametrizations.", "").replace(".original", "")
            for n, _ in net.named_parameters()
            if "orig" in n
        }

    assert quantised() == {"0.weight", "3.weight", "5.weight"}
    assert quantised(quantize_first_last=False) == {"3.weight"}
    assert quantised(quantize="all") == {n for n, _ in network().named_parameters()}


def test_projections_of_attention_take_part():
    with seeded(0, "init"):
        net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    rounded, x = post_training_quantize(net, 2), torch.randn(2, 3, 16, generator=stream(0, "tokens"))
    assert len(rounded.self_attn.in_proj_weight.unique()) <= 4 * 3
    with torch.no_grad():
        assert not torch.allclose(rounded(x), net(x), atol=1e-2)
        assert torch.allclose(baked(rounded)(x), rounded(x), atol=1e-5)
    assert list(baked(rounded).state_dict()) == list(net.state_dict())


def test_baked_is_plain_in_the_usual_order():
    for which in ("weights", "all"):
        rounded = post_training_quantize(network(), 2, quantize=which)
        plain = baked(rounded)
        assert list(plain.state_dict()) == list(network().state_dict())
        assert torch.equal(plain.eval()(X), rounded.eval()(X))
        assert parametrize.is_parametrized(rounded[0])


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: UniformQuantizer(0), "bits must lie in 1..16"),
        (lambda: UniformQuantizer(2, 0), "bucket_size"),
        (lambda: UniformQuantizer(2, grad="none"), "grad must be one of"),
        (lambda: UniformQuantizer(2, stochastic=True), "needs a generator"),
        (lambda: DifferentiableQuantizer(torch.ones(4), 1), "points must be at least 2"),
        (lambda: DifferentiableQuantizer(torch.ones(4) / 0), "weight must be finite"),
        (lambda: DifferentiableQuantizer(torch.ones(4), init="random"), "init must be"),
        (lambda: post_training_quantize(nn.ReLU(), 2), "must hold weights to quantise"),
        (lambda: post_training_quantize(nn.Linear(2, 2), 2, quantize="biases"), "quantize must be one of"),
        (lambda: post_training_quantize(nn.Linear(2, 2), 2, quantize_first_last=False), "without any left"),
        (
            lambda: post_training_quantize(post_training_quantize(nn.Linear(2, 2), 2), 2),
            "another parametrization in",
        ),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
