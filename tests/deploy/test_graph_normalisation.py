"""Norms and poolings of every setting against float64 eager."""

from __future__ import annotations

import pytest
import torch
from networks import assert_captured, fill
from torch import nn

from netwright.deploy.graph import UnsupportedOperator, capture

X = torch.randn(2, 6, 9, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.BatchNorm2d(6), "affine"),
        (nn.BatchNorm2d(6, affine=False, eps=0.1), "affine"),
        (nn.GroupNorm(3, 6), "group_norm"),
        (nn.GroupNorm(1, 6, affine=False, eps=0.1), "group_norm"),
        (nn.InstanceNorm2d(6), "group_norm"),
        (nn.InstanceNorm2d(6, affine=True), "group_norm"),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), "affine"),
        (nn.Softmax(dim=1), "softmax"),
        (nn.LogSoftmax(dim=1), "softmax"),
    ],
)
def test_norms(layer: nn.Module, name: str) -> None:
    graph = assert_captured(fill(layer, 1), X)
    assert [node.op.name for node in graph] == [name]


@pytest.mark.parametrize("layer", [nn.LayerNorm(7), nn.LayerNorm((6, 9, 7)), nn.Softmax(dim=2), nn.Softmax(dim=-1)])
def test_norms_over_other_axes(layer: nn.Module) -> None:
    assert_captured(fill(layer, 1), X)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.InstanceNorm1d(6), nn.LayerNorm((6, 20))])
def test_norms_of_one_axis(layer: nn.Module) -> None:
    assert_captured(fill(layer, 1), torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1)))


def test_a_norm_by_the_statistics_of_the_batch_is_refused() -> None:
    with pytest.raises(UnsupportedOperator, match="statistics of the batch"):
        capture(nn.BatchNorm2d(6, track_running_stats=False).eval(), X)


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": (3, 2), "padding": (1, 1)},
        {"kernel_size": 4, "stride": 3, "padding": 2},
        {"kernel_size": 2, "stride": 3},
    ],
)
def test_poolings(settings: dict[str, int | tuple[int, int]], ceil: bool) -> None:
    assert_captured(nn.MaxPool2d(**settings, ceil_mode=ceil), X)
    for include in (False, True):
        assert_captured(nn.AvgPool2d(**settings, ceil_mode=ceil, count_include_pad=include), X)
    assert_captured(nn.AvgPool2d(**settings, ceil_mode=ceil, divisor_override=5), X)
    if isinstance(settings["kernel_size"], int) and settings["kernel_size"] < 4:
        assert_captured(nn.MaxPool2d(**settings, dilation=2, ceil_mode=ceil), X)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 7), (11, 4)])
def test_adaptive_poolings(size: tuple[int, int]) -> None:
    mean = assert_captured(nn.AdaptiveAvgPool2d(size), X)
    assert len(mean.nodes) == (size != (9, 7))
    assert_captured(nn.AdaptiveMaxPool2d(size), X)


def test_poolings_of_one_axis() -> None:
    x = torch.randn(2, 6, 20, generator=torch.Generator().manual_seed(1))
    for layer in (
        nn.MaxPool1d(3, 2, 1, ceil_mode=True), nn.AvgPool1d(4, 3, 1, True, False), nn.AdaptiveAvgPool1d(3),
        nn.AdaptiveMaxPool1d(7),
    ):  # fmt: skip
        assert_captured(layer, x)


def test_a_single_picture_without_batch() -> None:
    assert_captured(nn.Sequential(nn.Flatten(0, 1), nn.Conv2d(6, 3, 3), nn.MaxPool2d(2)), X[:1])
