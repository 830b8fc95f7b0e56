"""The reference against torch where the graph says something of its own, and the rule for weights that are zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from networks import fill
from torch import Tensor, nn
from torch.nn import functional

from netwright.deploy.graph import Graph, Node, capture, optimise, run
from netwright.deploy.graph.ir import (
    ACTIVATIONS,
    Activate,
    Activation,
    Conv,
    ConvTranspose,
    GroupNorm,
    Linear,
    Op,
    Pool,
    Shape,
)
from netwright.deploy.graph.reference import activation, kernel_of

X = torch.randn(1, 3, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def apply(op: Op, shape: Shape, *inputs: Tensor, kept_only: bool = False) -> Tensor:
    return kernel_of(op, shape, dtype=torch.float64, kept_only=kept_only)(*inputs)


def test_a_convolution_pads_each_side_for_itself() -> None:
    weight = np.arange(18.0).reshape(1, 3, 3, 2)
    y = apply(Conv(weight, None, (2, 1), (1, -1, 2, 3)), (1, 1, 4, 7), X)
    padded = functional.pad(X, (-1, 3, 1, 2))
    assert torch.equal(y, functional.conv2d(padded, torch.from_numpy(weight), stride=(2, 1)))


def test_residual_before_activation() -> None:
    op = Conv(np.ones((3, 3, 1, 1)), np.array([1.0, 2.0, 3.0]), act=Activation("relu"))
    expected = (X.sum(1, keepdim=True) + torch.tensor([1.0, 2.0, 3.0])[:, None, None] + X).relu()
    torch.testing.assert_close(apply(op, (1, 3, 7, 6), X, X), expected, rtol=1e-12, atol=1e-12)


def test_a_transposed_convolution_ends_where_its_output_ends() -> None:
    weight = np.arange(54.0).reshape(3, 2, 3, 3)
    whole = functional.conv_transpose2d(X, torch.from_numpy(weight), stride=2)
    y = apply(ConvTranspose(weight, None, (2, 2), (1, 0)), (1, 2, 15, 11), X)
    assert torch.equal(y[:, :, :14], whole[:, :, 1:, :11])
    assert not y[:, :, 14].any()


def test_windows_of_a_pooling_may_pad_unevenly() -> None:
    op = Pool("max", (2, 2), (2, 2), (1, 0, 0, 2))
    expected = functional.max_pool2d(functional.pad(X, (0, 2, 1, 0), value=-math.inf), 2)
    assert torch.equal(apply(op, (1, 3, 4, 4), X), expected)
    counted = apply(Pool("avg", (2, 2), (2, 2), (1, 0, 0, 2), include_pad=False), (1, 3, 4, 4), X)
    assert not counted[..., 3].any()  # windows without a pixel
    torch.testing.assert_close(counted[0, :, 0, 0], X[0, :, 0, :2].mean(1))


@pytest.mark.parametrize("kind", [kind for kind in ACTIVATIONS if kind != "none"])
def test_activations_do_something(kind: str) -> None:
    x = torch.linspace(-4, 4, 50)
    assert not torch.equal(activation(Activation(kind, 0.1, 1.0))(x), x)


def test_inputs_are_checked() -> None:
    graph = Graph(
        {0: (1, 2, 1, 3), 1: (1, 2, 1, 3)}, [Node(Activate(Activation("relu")), [0], 1)], [0], [1], {0: (1, 2, 3)}
    )
    assert run(graph, [-torch.ones(1, 2, 3)])[0].shape == (1, 2, 1, 3)
    with pytest.raises(ValueError, match=r"input 0 must have shape \(1, 2, 3\), got \(1, 3, 2\)"):
        run(graph, [torch.ones(1, 3, 2)])
    with pytest.raises(ValueError, match="inputs must be 1 tensors, got 2"):
        run(graph, [X, X])
    with pytest.raises(TypeError, match="must be an operation of a graph, got Op"):
        kernel_of(Op(), (1, 1), dtype=torch.float64)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_dropped_weight_does_not_exist(transposed: bool) -> None:
    """Number by number: the sum over kept weights of what they meet, in Python's own arithmetic."""
    draw = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 2, 2, 2, generator=draw, dtype=torch.float64)
    weight *= torch.rand(weight.shape, generator=draw) < 0.5
    x = X.clone()
    x[0, 0, 1, 1], x[0, 1, 4, 2], x[0, 2, 4, 3], x[0, 0, 0, 5] = math.nan, math.inf, -math.inf, math.inf
    kind = ConvTranspose if transposed else Conv
    kernel = weight if transposed else weight.transpose(0, 1).contiguous()
    shape = (1, 2, 8, 7) if transposed else (1, 2, 6, 5)
    y = apply(kind(kernel.numpy()), shape, x, kept_only=True)
    expected = torch.zeros(shape, dtype=torch.float64)
    for c, o, i, j in weight.nonzero().tolist():
        for row in range(7):
            for column in range(6):
                target = (row + i, column + j) if transposed else (row - i, column - j)
                if 0 <= target[0] < shape[2] and 0 <= target[1] < shape[3]:
                    expected[0, o, *target] += weight[c, o, i, j] * x[0, c, row, column]
    assert expected.isnan().any()
    assert expected.isinf().any()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert not torch.equal(apply(kind(kernel.numpy()), shape, x).isnan(), y.isnan())


def test_a_network_keeps_what_is_not_finite_away_from_dropped_weights() -> None:
    layer = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]]))
    x = torch.tensor([[2.0, math.inf, math.inf]])
    graph = optimise(capture(layer.eval(), x))
    assert torch.equal(run(graph, [x], kept_only=True)[0].isnan(), torch.tensor([[False, True]]))
    assert run(graph, [x])[0].isnan().all()
    assert isinstance(graph.nodes[0].op, Linear)


def test_a_group_norm_keeps_small_differences_of_large_numbers() -> None:
    x = (1000 + X.float()).contiguous()
    op = GroupNorm(3, None, None)
    exact = functional.group_norm(x.double(), 3)
    torch.testing.assert_close(apply(op, (1, 3, 7, 6), x.double()), exact, rtol=1e-8, atol=1e-8)
    single = kernel_of(op, (1, 3, 7, 6), dtype=torch.float32)(x)
    assert (single - exact).abs().max() < (functional.group_norm(x, 3) - exact).abs().max()


def test_precision_is_chosen() -> None:
    network = fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()), 0).eval()
    graph = capture(network, X.float())
    single, double = (run(graph, [X.float()], dtype=dtype)[0] for dtype in (torch.float32, torch.float64))
    assert single.dtype == torch.float32
    assert 0 < (single - double).abs().max() < 1e-5
