"""Joining, padding, enlarging and reducing against float64 eager."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from networks import Call, assert_captured
from torch import Tensor, nn
from torch.nn import functional

from netwright.deploy.graph import UnsupportedOperator, capture

X = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: torch.cat([x, x.relu()], 1), ["activate", "concat"]),
        (lambda x: torch.cat([x.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1)], -1).permute(0, 3, 1, 2), ["concat"]),
        (lambda x: torch.stack([x, x.relu()], 2).flatten(1, 2), ["activate", "concat", "channels"]),
        (lambda x: torch.stack([x, x.relu()], 1).flatten(1, 2), ["activate", "concat"]),
        (lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1), None),
        (lambda x: torch.cat([x, torch.ones(2, 2, 4, 5)], 1), ["constant", "concat"]),
        (lambda x: torch.cat([x, x.relu()], 2), None),
        (lambda x: torch.cat([x, x[..., :2]], 3), None),
        (lambda x: torch.cat([x, x], 2), None),
        (lambda x: functional.pad(x, (1, 2, 0, 3)), ["pad"]),
        (lambda x: functional.pad(x, (-1, 2)), ["pad"]),
        (lambda x: functional.pad(x, (0, 0, 0, 0, 1, 2)), ["constant", "constant", "concat"]),
        (lambda x: functional.pad(x[:, :, 0], (1, 1)), None),
        (lambda x: functional.max_pool2d(functional.pad(x, (0, 1, 0, 1), value=-math.inf), 2), ["pool"]),
        (lambda x: functional.avg_pool2d(functional.pad(x, (0, 1, 2, 1)), 2, 2), ["pool"]),
        (
            lambda x: functional.conv2d(functional.pad(x, (3, 1, -1, 0)), torch.ones(2, 6, 2, 2, dtype=x.dtype)),
            ["conv"],
        ),
        (lambda x: functional.interpolate(x, scale_factor=2), ["conv_transpose"]),
        (lambda x: functional.interpolate(x, size=(8, 15)), ["conv_transpose"]),
        (lambda x: functional.interpolate(x[:, :, 0], scale_factor=3), None),
        (lambda x: functional.pixel_unshuffle(x[:, :, :, :4], 2), ["conv"]),
        (lambda x: functional.pixel_shuffle(x[:, :4], 2), ["channels", "conv_transpose"]),
        (lambda x: x.mean((2, 3)), ["adaptive_pool", "reshape"]),
        (lambda x: x.mean((-1, -2), keepdim=True), ["adaptive_pool"]),
        (lambda x: x.mean(2, keepdim=True), ["adaptive_pool"]),
        (lambda x: x.mean(1, keepdim=True), ["conv"]),
        (lambda x: x.sum((1, 2, 3)), None),
        (lambda x: x.mean(), None),
        (lambda x: x.sum(3), None),
        (lambda x: x.amax((2, 3)), ["adaptive_pool", "reshape"]),
        (lambda x: x.amax(1, keepdim=True), None),
        (lambda x: x.max(2).values, None),
        (lambda x: x.view(2, 2, 3, 4, 5).sum(1), ["conv"]),
        (lambda x: x.flatten(1).mean(1, keepdim=True) * x.flatten(1), None),
    ],
)
def test_joining(function: Callable[[Tensor], Tensor], expected: list[str] | None) -> None:
    # without a batch among the axes that are left, of one picture only
    inputs = X if function(X).shape[:1] == X.shape[:1] else X[:1]
    found = [node.op.name for node in assert_captured(Call(function), inputs)]
    assert expected is None or found == expected


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: functional.pad(x, (1, 1, 1, 1), mode="reflect"), "padding mode reflect"),
        (lambda x: functional.pad(x, (1, 1, 1, 1), value=2.0), "pads with 2"),
        (lambda x: functional.interpolate(x, size=(6, 5)), "not by whole factors"),
        (lambda x: torch.cat([x, x], 0), "along the batch"),
    ],
)
def test_refused(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(UnsupportedOperator, match=reason):
        capture(Call(function), X)


def test_circular_padding_of_a_convolution_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="padding mode circular"):
        capture(nn.Conv2d(6, 2, 3, padding=1, padding_mode="circular").eval(), X)
