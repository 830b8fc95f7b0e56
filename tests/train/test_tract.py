"""TrAct against ridge regression, its limits, the layer on unfolded patches, and the authors' package."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from netwright.train.tract import (
    TrActConv1d,
    TrActConv2d,
    TrActLinear,
    apply_tract,
    remove_tract,
    traced,
    tract,
    tract_gradient,
)

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_by_hand():
    x, grad = torch.tensor([[1.0, 2], [3, -1]], dtype=DOUBLE), torch.tensor([[0.5], [-1]], dtype=DOUBLE)
    expected = torch.tensor([[-5.5 / 13.01, 8.95 / 13.01]], dtype=DOUBLE)
    assert expected.flatten().tolist() == pytest.approx([-0.422752, 0.687932], abs=1e-6)
    for form in ("primal", "dual", "auto"):
        assert torch.allclose(tract_gradient(x, grad, 0.1, form), expected, atol=1e-12)


@pytest.mark.parametrize(("batch", "inputs"), [(7, 20), (20, 7), (8, 8)])
@pytest.mark.parametrize("lambda_", [0.01, 0.1, 3.0])
def test_both_forms_are_ridge_regression(batch, inputs, lambda_):
    from sklearn.linear_model import Ridge

    x, grad = drawn(batch, inputs), drawn(batch, 5, seed=1)
    primal, dual = (tract_gradient(x, grad, lambda_, form) for form in ("primal", "dual"))
    assert torch.allclose(primal, dual, atol=1e-10)
    ridge = Ridge(alpha=lambda_ * batch, fit_intercept=False).fit(x.numpy(), batch * grad.numpy())
    assert torch.allclose(primal, torch.as_tensor(ridge.coef_), atol=1e-8)


def test_limits_and_scale():
    x, grad = drawn(6, 9), drawn(6, 4, seed=1)
    plain = grad.T @ x
    assert float((1e8 * tract_gradient(x, grad, 1e8) - plain).abs().max() / plain.abs().max()) < 1e-6
    # lambda -> 0 with independent rows: a step of length eta moves the batch's pre-activations by -eta b G.
    small = tract_gradient(x, grad, 1e-10)
    assert float((x @ small.T - 6 * grad).abs().max()) < 1e-6 * float((6 * grad).abs().max())
    assert torch.allclose(tract_gradient(3 * x, grad, 0.9), tract_gradient(x, grad, 0.1) / 3, atol=1e-12)
    white = torch.linalg.qr(drawn(12, 5))[0] * 12**0.5
    assert torch.allclose(tract_gradient(white, drawn(12, 4)), drawn(12, 4).T @ white / 1.1, atol=1e-12)


def both(plain: nn.Module, x: torch.Tensor, lambda_: float = 0.1):
    """Outputs and gradients of a layer and of its TrAct form for the same loss."""
    found = []
    for layer in (plain, tract(copy.deepcopy(plain), lambda_)):
        inputs = x.clone().requires_grad_()
        out = layer(inputs)
        (out * drawn(*out.shape, seed=5, dtype=x.dtype)).sum().backward()
        bias = None if layer.bias is None else layer.bias.grad
        found.append((out.detach(), inputs.grad, bias, layer.weight.grad))
    return found


@pytest.mark.parametrize(
    "shape",
    [(4, 6), (40, 6), (2, 3, 5, 6)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    torch.manual_seed(0)
    x = drawn(*shape)
    plain, ours = both(nn.Linear(6, 3, bias, dtype=DOUBLE), x)
    for a, b in zip(plain[:3], ours[:3], strict=True):
        assert a is None if b is None else torch.equal(a, b)
    out_grad = drawn(*shape[:-1], 3, seed=5).reshape(-1, 3)
    assert torch.allclose(ours[3], tract_gradient(x.reshape(-1, 6), out_grad), atol=1e-10)


CONVOLUTIONS = {
    "plain": {},
    "stride": {"stride": 2},
    "uneven": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (1, 2)},
    "dilation": {"dilation": 2, "padding": 2},
    "same": {"kernel_size": 4, "padding": "same"},
    "valid": {"padding": "valid", "bias": False},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "groups": {"groups": 2, "padding": 1},
    "few rows": {"kernel_size": 7},
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_is_linear_on_patches(name):
    torch.manual_seed(0)
    options = {"kernel_size": 3, **CONVOLUTIONS[name]}
    layer = nn.Conv2d(4, 6, **options, dtype=DOUBLE)
    x = drawn(1 if name == "few rows" else 3, 4, 9, 8)
    plain, ours = both(layer, x)
    for a, b in zip(plain[:3], ours[:3], strict=True):
        assert a is None if b is None else torch.equal(a, b)
    # The oracle: patches as a convolution with one-hot kernels reads them, and the pure function on them.
    kernel = layer.kernel_size
    per_group = 4 // layer.groups * kernel[0] * kernel[1]
    probe = torch.eye(per_group, dtype=DOUBLE).reshape(per_group, 4 // layer.groups, *kernel)
    for group in range(layer.groups):
        part = x.chunk(layer.groups, 1)[group]
        alone = {name: value for name, value in options.items() if name not in ("groups", "bias")}
        reading = nn.Conv2d(4 // layer.groups, per_group, bias=False, **alone)
        rows = reading._conv_forward(part, probe, None).permute(0, 2, 3, 1).reshape(-1, per_group)
        out = drawn(*ours[0].shape, seed=5).chunk(layer.groups, 1)[group]
        grad = out.permute(0, 2, 3, 1).reshape(len(rows), -1)
        expected = tract_gradient(rows, grad).reshape(-1, 4 // layer.groups, *kernel)
        found = ours[3].chunk(layer.groups, 0)[group]
        assert float((found - expected).abs().max()) < 1e-10 * float(expected.abs().max())


def test_convolution_of_one_dimension():
    torch.manual_seed(0)
    x = drawn(5, 3, 11)
    plain, ours = both(nn.Conv1d(3, 4, 3, stride=2, padding=1, dtype=DOUBLE), x)
    layer = nn.Conv2d(3, 4, (1, 3), stride=(1, 2), padding=(0, 1), dtype=DOUBLE)
    flat = both(layer, x[:, :, None])[1]
    assert torch.equal(plain[0], ours[0])
    assert torch.allclose(ours[3], flat[3][:, :, 0], atol=1e-10)


def test_pieces_of_a_large_batch(monkeypatch):
    torch.manual_seed(0)
    x, layer = drawn(9, 2, 8, 8), nn.Conv2d(2, 3, 3, dtype=DOUBLE)
    whole = both(layer, x)[1][3]
    monkeypatch.setattr("netwright.nn.patches.CHUNK", 1)
    assert torch.allclose(both(layer, x)[1][3], whole, atol=1e-12)


def test_the_authors_package():
    theirs = pytest.importorskip("torch_tract")
    torch.manual_seed(0)
    cases = [(nn.Linear(6, 3), (20, 6)), (nn.Linear(30, 3), (20, 30)), (nn.Conv2d(3, 4, 3, 2, 1), (5, 3, 9, 9))]
    for plain, shape in cases:
        x = drawn(*shape)
        plain.double()  # in float32 the two are 1e-5 apart, mostly by the rounding of theirs
        weights = []
        for layer in (theirs.TrAct(copy.deepcopy(plain), l=0.1), tract(copy.deepcopy(plain))):
            layer(x).square().sum().backward()
            weights.append(layer.weight.grad)
        assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 1e-8


def test_gradcheck_fails_for_the_weight_alone():
    layer, x = TrActLinear(4, 3, dtype=DOUBLE), drawn(5, 4).requires_grad_()

    def of(weight, bias, x):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    weight, bias = (p.detach().clone() for p in layer.parameters())
    assert torch.autograd.gradcheck(of, (weight, bias.requires_grad_(), x))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(of, (weight.requires_grad_(), bias, x))


def test_no_second_derivative():
    layer = TrActLinear(4, 3)
    loss = layer(torch.ones(2, 4)).square().sum()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, layer.weight, create_graph=True)


def test_a_layer_that_is_called_twice_adds_both():
    layer = TrActLinear(4, 3, dtype=DOUBLE)
    first, second = drawn(6, 4), drawn(9, 4, seed=1)
    (layer(first).sum() + layer(second).sum()).backward()
    ones = [torch.ones(len(x), 3, dtype=DOUBLE) for x in (first, second)]
    assert torch.allclose(layer.weight.grad, sum(map(tract_gradient, (first, second), ones)), atol=1e-10)


def test_autocast_solves_in_float32():
    layer = tract(nn.Linear(6, 3))
    x = drawn(8, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    expected = tract_gradient(x, torch.ones(8, 3))
    assert layer.weight.grad.dtype == torch.float32
    assert torch.allclose(layer.weight.grad, expected, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:Error detected in _Precondition")
def test_inputs_that_are_not_finite(capsys, monkeypatch):
    monkeypatch.setattr("netwright.train.tract.gradient._warned", set())
    layer, x = TrActLinear(4, 3), torch.ones(6, 4)
    x[0, 0] = float("nan")
    for _ in range(2):
        layer.zero_grad()
        layer(x).sum().backward()
    assert capsys.readouterr().err.count("not finite") == 1
    assert layer.weight.grad[:, 1:].tolist() == [[6.0] * 3] * 3  # the plain gradient
    with torch.autograd.set_detect_anomaly(True, check_nan=False), pytest.raises(FloatingPointError, match="finite"):
        layer(x).sum().backward()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def test_wrapping_keeps_parameters_keys_and_copies():
    net = network()
    before, keys = dict(net.named_parameters()), list(net.state_dict())
    assert apply_tract(net) is net
    assert traced(net) == ["0"]
    assert "lambda_=0.1" in repr(net[0])
    assert isinstance(copy.deepcopy(net)[0], TrActConv2d)
    assert list(net.state_dict()) == keys
    assert all(net.get_parameter(name) is value for name, value in before.items())
    remove_tract(net)
    assert type(net[0]) is nn.Conv2d
    assert all(net.get_parameter(name) is value for name, value in before.items())


def test_which_layer():
    assert traced(apply_tract(network(), layer="3")) == ["3"]

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(self.first(x))

    assert traced(apply_tract(Backwards())) == ["last"]
    assert traced(apply_tract(Backwards(), example_input=torch.ones(1, 4))) == ["first"]


def test_a_subclass_that_is_never_called_is_passed_over():
    """The projection of attention is a subclass of ``nn.Linear`` whose weight attention reads by itself."""

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    assert traced(apply_tract(Attending())) == ["head"]
    assert traced(apply_tract(Attending(), example_input=torch.ones(2, 3, 4))) == ["head"]
    with pytest.raises(TypeError, match="got NonDynamicallyQuantizableLinear"):
        apply_tract(Attending(), layer="attention.out_proj")


def test_layers_of_their_own():
    assert TrActConv2d(1, 2, 3, stride=2, lambda_=0.5).lambda_ == 0.5
    assert TrActConv1d(1, 2, 3, bias=False).bias is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: TrActLinear(2, 2, lambda_=0), ValueError, "lambda_ must be > 0 and finite, got 0"),
        (lambda: tract(nn.Linear(2, 2), float("nan")), ValueError, "got nan"),
        (lambda: tract(nn.ReLU()), TypeError, "layer must be one of Linear, Conv1d, Conv2d, got ReLU"),
        (lambda: tract(nn.Conv3d(1, 1, 1)), TypeError, "got Conv3d"),
        (lambda: tract(TrActLinear(2, 2)), TypeError, "got TrActLinear"),
        (lambda: tract(nn.ConvTranspose2d(1, 1, 1)), NotImplementedError, "transposed"),
        (lambda: tract(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), ValueError, "apply TrAct first"),
        (lambda: apply_tract(network(), layer="9"), ValueError, "no layer is called '9'"),
        (lambda: apply_tract(nn.ReLU()), ValueError, "must have a layer of Linear, Conv1d, Conv2d, got none"),
        (lambda: tract_gradient(torch.ones(2, 3), torch.ones(3, 2)), ValueError, "of one batch"),
        (lambda: tract_gradient(torch.ones(2, 3), torch.ones(2, 2), form="both"), ValueError, "form must be"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
