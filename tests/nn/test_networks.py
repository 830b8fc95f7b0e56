"""The networks of the experiments: published sizes, shapes, and what their arguments change."""

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import MLP as TorchvisionMLP

from netwright.nn.convnet import MLP, LeNet, SmallConvNet
from netwright.nn.mbconv import MBConv, mobilenet_v2_32
from netwright.nn.resnet import resnet18_cifar
from netwright.seeding import seeded


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_small_convnet():
    network = SmallConvNet(num_classes=10, in_channels=1)
    expected = (9 * 16 + 32) + (16 * 9 * 32 + 64) + (32 * 64 + 64) + (64 * 10 + 10)
    assert parameters(network) == expected
    assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    flat = SmallConvNet((4, 8, 8), hidden=0, num_classes=3, grid=2)
    assert parameters(flat.head) == 8 * 4 * 3 + 3
    assert flat(torch.rand(2, 3, 32, 20)).shape == (2, 3)


def test_small_convnet_is_the_stated_function():
    with seeded(0, "convnet"):
        network = SmallConvNet((4,), hidden=5, num_classes=2, in_channels=1).eval()
    x = torch.rand(3, 1, 6, 6)
    y = nn.functional.conv2d(x, network.features[0].weight, padding=1) / (1 + 1e-5) ** 0.5
    y = nn.functional.max_pool2d(y.relu(), 2).mean((2, 3))
    torch.testing.assert_close(network(x), network.head[2](network.head[0](y).relu()))


@pytest.mark.parametrize(("options", "message"), [
    ({"channels": ()}, r"channels must hold widths >= 1, got \(\)"), ({"channels": (4, 0)}, "channels must hold"),
    ({"hidden": -1}, "hidden must be >= 0, got -1"), ({"num_classes": 0}, "num_classes must be >= 1, got 0"),
    ({"in_channels": 0}, "in_channels must be >= 1, got 0"), ({"grid": 0}, "grid must be >= 1, got 0"),
])  # fmt: skip
def test_small_convnet_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        SmallConvNet(**options)


def test_lenet():
    assert parameters(LeNet()) == 44_426
    assert parameters(LeNet(in_channels=3, image_size=32)) == 62_006  # the well-known count for CIFAR-10
    assert LeNet()(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert LeNet(image_size=16)(torch.rand(1, 1, 16, 16)).shape == (1, 10)
    with pytest.raises(ValueError, match="image_size must be >= 16, got 12"):
        LeNet(image_size=12)
    assert MLP is TorchvisionMLP


def test_resnet18_for_small_pictures():
    network = resnet18_cifar(num_classes=10)
    assert parameters(network) == 11_173_962  # the well-known count of the CIFAR form
    shapes = []
    network.layer1.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    assert resnet18_cifar(7, 1)(torch.rand(2, 1, 16, 16)).shape == (2, 7)
    network.eval()(torch.rand(1, 3, 32, 32))
    assert shapes == [(1, 64, 32, 32)]
    assert network.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("stride", "out", "expansion"), [(1, 8, 6), (1, 12, 6), (2, 8, 6), (1, 8, 1)])
def test_mbconv_is_torchvisions_block(stride, out, expansion):
    with seeded(0, "mbconv"):
        theirs = InvertedResidual(8, out, stride, expansion)
        ours = MBConv(8, out, stride=stride, expansion=expansion)
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    x = torch.rand(2, 8, 7, 7)
    torch.testing.assert_close(ours(x), theirs(x))


def test_mbconv_options():
    grouped = MBConv(8, 8, groups=2, expansion=1, expand=True, kernel_size=5, activation=nn.SiLU, bn_eps=1e-3)
    kinds = [type(part).__name__ for part in grouped.conv]
    assert kinds[:4] == ["Conv2d", "BatchNorm2d", "SiLU", "ChannelShuffle"]
    assert parameters(grouped) == 2 * (8 * 4) + 8 * 25 + 3 * 16
    assert all(part.eps == 1e-3 for part in grouped.modules() if isinstance(part, nn.BatchNorm2d))
    shortcut = MBConv(8, 12, conv_shortcut=True).eval()
    x = torch.rand(1, 8, 5, 5)
    torch.testing.assert_close(shortcut(x), shortcut.conv(x) + shortcut.shortcut(x))
    assert parameters(shortcut.shortcut) == 8 * 12 + 24
    assert MBConv(8, 12, stride=2, conv_shortcut=True).shortcut is None


@pytest.mark.parametrize(("options", "message"), [
    ({"kernel_size": 4}, "kernel_size must be odd and >= 1, got 4"),
    ({"expansion": 0}, "expansion must be >= 1, got 0"),
    ({"stride": 0}, "stride must be >= 1, got 0"), ({"groups": 3}, "groups must divide 8, 48 and 8, got 3"),
    ({"expand": False}, "expand must be true when expansion is above 1, got expansion 6"),
])  # fmt: skip
def test_mbconv_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MBConv(8, 8, **options)


def test_mobilenet_v2_for_small_pictures():
    network = mobilenet_v2_32(10)
    full = models.mobilenet_v2(num_classes=10)
    assert {k: v.shape for k, v in network.state_dict().items()} == {k: v.shape for k, v in full.state_dict().items()}
    sides = []
    for part in network.features:
        part.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    network.eval()(torch.rand(1, 3, 32, 32))
    assert sides == [32] * 4 + [16] * 3 + [8] * 7 + [4] * 5
    assert mobilenet_v2_32(3, 1)(torch.rand(2, 1, 32, 32)).shape == (2, 3)
    assert parameters(mobilenet_v2_32(conv_shortcuts=True)) == 2_296_922
