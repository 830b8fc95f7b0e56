"""Activations and arithmetic against float64 eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from networks import ACTIVATIONS, Call, assert_captured
from torch import Tensor, nn

from netwright.deploy.graph import UnsupportedOperator, capture

X = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0)) * 3
COLUMN = torch.linspace(-1, 1, 6)[:, None, None]
PLANE = torch.linspace(-1, 1, 20).view(4, 5)


@pytest.mark.parametrize("make", ACTIVATIONS)
def test_activations(make: Callable[[], nn.Module]) -> None:
    assert_captured(nn.Sequential(make()), X)


@pytest.mark.parametrize("layer", [nn.ELU(0.3), nn.CELU(0.4), nn.LeakyReLU(-0.5), nn.Hardtanh(-3, -1)])
def test_settings_of_activations(layer: nn.Module) -> None:
    assert_captured(layer, X)


@pytest.mark.parametrize("x", [X, X.mean((2, 3)), X[:, :, 0]])
def test_a_slope_for_each_channel(x: Tensor) -> None:
    layer = nn.PReLU(6)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 6))
    assert_captured(layer, x)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x.clamp(min=-1.0), ["activate"]),
        (lambda x: x.clamp_max(0.5), ["activate"]),
        (lambda x: x.clamp(0).relu_(), ["activate", "activate"]),
        (lambda x: x + 0, []),
        (lambda x: x * 1, []),
        (lambda x: x + torch.zeros(6, 1, 1), []),
        (lambda x: 2 - x / 3, ["affine"]),
        (lambda x: (x * COLUMN + 1) * 2, ["affine"]),
        (lambda x: COLUMN - x, ["affine"]),
        (lambda x: torch.sub(x, COLUMN, alpha=3), ["affine"]),
        (lambda x: -x, ["affine"]),
        (lambda x: x * PLANE, ["constant", "mul"]),
        (lambda x: x.permute(0, 2, 3, 1) * PLANE[..., None] + PLANE[0, 0], None),
        (lambda x: x + x.relu(), ["activate", "add"]),
        (lambda x: torch.add(x, x.relu(), alpha=0.5), None),
        (lambda x: x * x.mean((2, 3), keepdim=True), ["adaptive_pool", "mul"]),
        (lambda x: x.mean((2, 3), keepdim=True) - x, ["adaptive_pool", "affine", "add"]),
        (lambda x: x * x.mean((2, 3))[:, :, None, None], ["adaptive_pool", "mul"]),
        (lambda x: x * x.mean(1, keepdim=True), ["conv", "channels", "mul"]),
        (lambda x: x.mean(2, keepdim=True) * x.mean(3, keepdim=True), None),
        (lambda x: x.permute(0, 2, 3, 1) * x.mean((2, 3))[:, None, None], ["adaptive_pool", "mul", "channels"]),
        (lambda x: x.flatten(1) + x.transpose(2, 3).flatten(1), None),
        (lambda x: nn.functional.channel_shuffle(x, 2) + x, ["channels", "add"]),
        (lambda x: x**3 + x.square(), None),
        (lambda x: x.sigmoid() * x, ["activate"]),
        (lambda x: x * nn.functional.relu6(x + 3) / 6, None),
        (lambda x: x * (nn.functional.relu6(x + 3) / 6), ["activate"]),
    ],
)
def test_arithmetic(function: Callable[[Tensor], Tensor], expected: list[str] | None) -> None:
    found = [node.op.name for node in assert_captured(Call(function), X)]
    assert expected is None or [name for name in found if name != "reshape"] == [n for n in expected if n != "reshape"]


def test_two_inputs_that_broadcast() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | tuple[Tensor]]:
            return {"product": x * y, "more": (y.relu(),)}

    assert_captured(Two(), X, torch.randn(2, 1, 4, 5, generator=torch.Generator().manual_seed(1)))
    assert_captured(Two(), torch.randn(2, 6, 1, 1, generator=torch.Generator().manual_seed(1)), X)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: 1 / (x.abs() + 1), "aten.abs|divisor"),
        (lambda x: x**0.5, "exponent is 0.5"),
        (lambda x: x / x.mean(1, keepdim=True), "divisor is computed"),
    ],
)
def test_refused(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(UnsupportedOperator, match=reason):
        capture(Call(function), X)
