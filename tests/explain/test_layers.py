"""Layers found by what they give: networks of torchvision and timm with random weights, layouts and tokens."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from netwright.explain import EigenCAM, GradCAM, eigen_cam, last_places, with_places
from netwright.explain.layers import name_of
from netwright.nn.pretrained import create
from netwright.seeding import seeded, stream

timm_only = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is an extra")
# Network, side of its input, the layer that is found, channels and side of its map.
NETWORKS = [
    ("resnet18", 64, "layer4", 512, 2),
    ("squeezenet1_1", 64, "features", 512, 3),
    ("mobilenet_v3_small", 64, "features", 576, 2),
    ("shufflenet_v2_x0_5", 64, "conv5", 1024, 2),
    ("densenet121", 64, "features", 1024, 2),
    ("googlenet", 64, "inception5b", 1024, 2),
    ("swin_t", 64, "permute", 768, 2),
]
TIMM = [
    ("timm:test_resnet", 64, "layer4", 96, 2),
    ("timm:test_vit", 160, "blocks.5.norm1", 64, 10),
    ("timm:test_convnext", 64, "stages", 64, 2),
    ("timm:mobilevit_xxs", 64, "final_conv", 320, 2),
    ("timm:levit_128s", 224, "stages", 384, 4),
]


def check(name, size, layer, channels, side):
    with seeded(0, "init"):
        net = create(name).eval()
    x = torch.rand(2, 3, size, size, generator=stream(0, "x"))
    part, places = last_places(net, x[:1])
    assert (name_of(net, part), *places.shape[1:]) == (layer, channels, side, side)
    for maps in (EigenCAM(net), GradCAM(net)):
        cams = maps(x)
        assert cams.shape == (2, size, size)
        assert cams.isfinite().all()
        assert 0 <= cams.min() <= cams.max() <= 1
        assert maps.output.shape == (2, 1000)
    assert not any(part._forward_hooks for part in net.modules())
    assert not any(part.training for part in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize(("name", "size", "layer", "channels", "side"), NETWORKS)
def test_networks_of_torchvision(name, size, layer, channels, side):
    check(name, size, layer, channels, side)


@timm_only
@pytest.mark.parametrize(("name", "size", "layer", "channels", "side"), TIMM)
def test_networks_of_timm(name, size, layer, channels, side):
    check(name, size, layer, channels, side)


class Reads(nn.Module):
    """Two layers of attention over tokens of 4x4 patches; the class token, or the mean of all, is classified."""

    def __init__(self, *, mean: bool = False):
        super().__init__()
        self.mean, self.patches = mean, nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.ones(1, 1, 8))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        nn.init.zeros_(self.head.weight)  # as torchvision has it before training

    def forward(self, x):
        tokens = self.patches(x).flatten(2).mT
        tokens = self.norm(self.blocks(torch.cat([self.token.expand(len(x), -1, -1), tokens], 1)))
        return self.head(tokens.mean(1) if self.mean else tokens[:, 0])


@pytest.mark.parametrize(("mean", "layer"), [(False, "blocks.0"), (True, "norm")])
def test_tokens_count_while_the_answer_depends_on_them(mean, layer):
    with seeded(0, "init"):
        net = Reads(mean=mean)
    x = torch.rand(2, 3, 24, 16, generator=stream(0, "x"))
    part, places = last_places(net, x)
    assert name_of(net, part) == layer
    assert places.shape == (2, 8, 6, 4)
    with torch.no_grad():
        tokens = net.blocks[0](torch.cat([net.token.expand(2, -1, -1), net.patches(x).flatten(2).mT], 1))
    if not mean:
        assert torch.allclose(places, tokens[:, 1:].mT.unflatten(2, (6, 4)), atol=1e-5)
        assert torch.allclose(EigenCAM(net, upsample=False)(x), eigen_cam(places), atol=1e-4)


def test_a_network_that_keeps_what_it_computes_can_be_trained_afterwards():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head, self.kept = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), None

        def forward(self, x):
            x = self.conv(x)
            self.kept = torch.ones(x.shape[2:]) if self.kept is None else self.kept
            return self.head((x * self.kept).mean((2, 3)))

    net, x = Keeps(), torch.rand(2, 3, 8, 8)
    EigenCAM(net)(x)
    net(x).sum().backward()
    assert net.conv.weight.grad is not None


@pytest.mark.parametrize("prefixes", [0, 1, 2, 5])
@pytest.mark.parametrize(("size", "grid"), [((32, 32), (4, 4)), ((96, 64), (6, 4)), ((40, 80), (4, 8))])
def test_tokens_are_put_back_where_they_were(prefixes, size, grid):
    places = torch.randn(2, 3, *grid, generator=stream(0, "places"))
    tokens = torch.cat([torch.full((2, prefixes, 3), 9.0), places.flatten(2).mT], 1)
    assert torch.equal(with_places(tokens, size), places)


def test_channels_first_and_last():
    places = torch.randn(2, 5, 6, 4, generator=stream(0, "places"))
    for size in ((48, 32), (47, 31)):
        assert torch.equal(with_places(places, size), places)
        assert torch.equal(with_places(places.permute(0, 2, 3, 1), size), places)
    for nothing in (torch.zeros(2, 12, 197, 64), torch.zeros(2, 3), torch.zeros(2, 5, 3), (places, places)):
        assert with_places(nothing, (48, 32)) is None


def test_pooling_class_scores_and_what_has_no_places_are_passed_over():
    with seeded(0, "init"):
        net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 1), nn.ReLU())
    scored = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(1, 3, 8, 8, generator=stream(0, "x"))
    assert last_places(scored, x)[0] is net[1]
    with pytest.raises(ValueError, match="no layer of Sequential gives a map with places"):
        last_places(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), x)
