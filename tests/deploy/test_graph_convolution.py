"""Convolutions and linear layers of every setting against float64 eager."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from networks import Call, assert_captured
from torch import Tensor, nn
from torch.nn import functional

from netwright.deploy.graph import UnsupportedOperator, capture
from netwright.deploy.graph.ir import Conv

X = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(0))


def numbers(like: Tensor, *shape: int) -> Tensor:
    return (torch.arange(math.prod(shape), dtype=like.dtype) % 7 - 2).view(shape)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 1),
        nn.Conv2d(6, 4, (3, 2), stride=(2, 3), padding=(0, 2), dilation=(3, 1), bias=False),
        nn.Conv2d(6, 9, 3, groups=3, padding=1),
        nn.Conv2d(6, 12, 3, groups=6, stride=2),
        nn.Conv2d(6, 4, (4, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(6, 4, 3, padding="valid"),
        nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2)),
        nn.ConvTranspose2d(6, 6, 4, groups=3, dilation=2, bias=False),
        nn.Linear(7, 3),
    ],
)
def test_layers(layer: nn.Module) -> None:
    torch.manual_seed(0)
    assert_captured(layer, X)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(6, 4, 3, stride=2, padding=1, dilation=2), nn.ConvTranspose1d(6, 4, 3, 2, 1, 1), nn.Linear(20, 3)],
)
def test_one_axis(layer: nn.Module) -> None:
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))
    graph = assert_captured(layer, x)
    assert graph.views[graph.inputs[0]] == (2, 6, 20)
    assert len(graph.views[graph.outputs[0]]) == 3


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.flatten(1) @ numbers(x, 378, 2), ["reshape", "linear"]),
        (
            lambda x: torch.addmm(numbers(x, 2), x.mean((2, 3)), numbers(x, 6, 2)),
            ["adaptive_pool", "reshape", "linear"],
        ),
        (lambda x: numbers(x, 3, 6) @ x.flatten(2), ["conv", "reshape"]),
        (lambda x: functional.linear(x.permute(0, 2, 3, 1).flatten(1), numbers(x, 2, 378)), ["reshape", "linear"]),
        (lambda x: functional.linear(x.permute(0, 2, 3, 1).flip(3), numbers(x, 1, 6)).squeeze(3), None),
    ],
)
def test_products(function: Callable[[Tensor], Tensor], expected: list[str] | None) -> None:
    found = [node.op.name for node in assert_captured(Call(function), X)]
    assert expected is None or found == expected


def test_weights_computed_from_constants_are_folded() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) * 2
            return functional.conv2d(x, weight, self.bias)

    torch.manual_seed(0)
    layer = Standardised(6, 4, 3).eval()
    graph = capture(layer, X)
    assert [node.op.name for node in graph] == ["conv"]
    op = graph.nodes[0].op
    assert isinstance(op, Conv)
    assert abs(op.weight.mean()) < 1e-7


def test_a_weight_computed_from_the_input_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="computed from the input"):
        capture(Call(lambda x: functional.conv2d(x, x.mean((2, 3), keepdim=True))), X)
    with pytest.raises(UnsupportedOperator, match="both depend on the input"):
        capture(Call(lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2)), X)
