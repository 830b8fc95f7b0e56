"""Grad-CAM against CAM's closed form and the package grad-cam."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision import models

from netwright.explain import EigenCAM, GradCAM
from netwright.nn.activations import class_map
from netwright.seeding import seeded, stream


def network() -> nn.Sequential:
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
        )  # fmt: skip


X = torch.rand(3, 3, 16, 16, generator=stream(0, "x"))


def test_behind_a_mean_it_is_the_classifiers_weights_times_the_features():
    net, target = network(), torch.tensor([4, 0, 2])
    with torch.no_grad():
        features = net[:5](X)
        expected = torch.einsum("bk,bkhw->bhw", net[7].weight[target], features).relu()
    low, high = expected.amin((1, 2), keepdim=True), expected.amax((1, 2), keepdim=True)
    expected = (expected - low) / (high - low).clamp_min(1e-12)
    found = GradCAM(net, upsample=False)(X, target)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, GradCAM(net, upsample=False)(X, (target + 1) % 5), atol=1e-2)


@pytest.mark.parametrize("method", ["gradcam", "gradcam++"])
def test_it_agrees_with_the_package_grad_cam(method):
    package = pytest.importorskip("pytorch_grad_cam")
    with seeded(0, "init"):
        net = models.resnet18().eval()
    x = torch.rand(2, 3, 96, 96, generator=stream(0, "x"))
    kind = {"gradcam": package.GradCAM, "gradcam++": package.GradCAMPlusPlus}[method]
    with kind(net, [net.layer4]) as peer:
        theirs = torch.from_numpy(peer(x, None)).flatten(1)
    ours = GradCAM(net, ["layer4"], method=method)(x).flatten(1)
    for pair in zip(ours, theirs, strict=True):
        assert torch.corrcoef(torch.stack(pair))[0, 1] > 0.999


def test_several_layers_take_one_pass_and_are_averaged():
    net = network()
    one, two = (GradCAM(net, [name])(X) for name in ("1", "4"))
    mean = ((one + two) / 2).flatten(1)
    low, high = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
    calls = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    found = GradCAM(net, ["1", net[4]])(X)
    handle.remove()
    assert torch.allclose(found, ((mean - low) / (high - low)).view_as(one), atol=1e-5)
    assert len(calls) == 1


def test_the_raw_map_is_that_of_class_map():
    net = network()
    raw = class_map(net, X, layer=net[4], method="gradcam")
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    assert torch.allclose(
        GradCAM(net, ["4"], upsample=False)(X), (raw - low) / (high - low).clamp_min(1e-12), atol=1e-5
    )


def test_nothing_is_left_behind():
    net = network().train()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    maps = GradCAM(net)
    maps(X)
    assert net.training
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(part._forward_hooks for part in net.modules())
    with pytest.raises(RuntimeError):
        maps(X[:, :2])
    assert not any(part._forward_hooks for part in net.modules())


def test_one_class_for_all_and_one_layer_by_itself():
    net = network()
    several = GradCAM(net, ["4"])(X, torch.tensor([2, 2, 2]))
    assert torch.equal(GradCAM(net, "4")(X, 2), several)
    assert torch.equal(GradCAM(net, net[4])(X, 2), several)
    assert torch.equal(EigenCAM(net, "4")(X), EigenCAM(net, ["4"])(X))
    # A name of two letters is one name, not two.
    deep = nn.Sequential(*[nn.Identity() for _ in range(11)], *net)
    assert len(EigenCAM(deep, "15").layers) == 1
    assert EigenCAM(deep, "15").layers[0] is net[4]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradCAM(network(), []), ValueError, "target_layers must be at least 1, got 0"),
        (lambda: GradCAM(network(), ["nine"]), TypeError, "must name parts of the model, got 'nine'"),
        (lambda: GradCAM(network(), method="cam")(X), ValueError, "method must be one of"),
        (lambda: GradCAM(network())(X, torch.tensor([0, 1, 5])), ValueError, r"target must lie in 0\.\.4, got 5"),
        (lambda: GradCAM(network())(X, -1), ValueError, r"target must lie in 0\.\.4, got -1"),
        (lambda: GradCAM(network())(X, torch.tensor([0, 1])), ValueError, r"3 classes, one an image, got shape \(2,\)"),
        (lambda: GradCAM(network())(X, torch.ones(3)), ValueError, r"3 classes, .* of torch\.float32"),
        (lambda: GradCAM(network(), "1")(X.byte()), ValueError, r"must be floating-point numbers, .* got torch\.uint8"),
        (lambda: GradCAM(network())(X * math.nan), ValueError, "must be finite, got NaN or infinity"),
        (lambda: GradCAM(network(), "nine"), TypeError, "must name parts of the model, got 'nine'"),
        (lambda: GradCAM(network(), [nn.ReLU()])(X), ValueError, "got ReLU, which was never called"),
        (lambda: GradCAM(network(), ["7"])(X), ValueError, "give a reshape_transform"),
        (lambda: GradCAM(network()[:3])(X), ValueError, r"must give logits \(batch, classes\), got \(3, 8, 8, 8\)"),
        (lambda: EigenCAM(network(), ["7"])(X), ValueError, r"must give \(batch, C, h, w\), got \(3, 5\) from Linear"),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
