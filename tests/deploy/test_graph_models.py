"""Which published networks become a graph: all of these, and they compute what PyTorch computes in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import eager
from torch import nn

from netwright.deploy.graph import UnsupportedOperator, capture, check, optimise, run, split
from netwright.nn.convnet import LeNet, SmallConvNet
from netwright.nn.mbconv import mobilenet_v2_32
from netwright.search import spaces
from netwright.seeding import stream

TORCHVISION = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0",
    "densenet121", "convnext_tiny", "squeezenet1_1", "shufflenet_v2_x1_0", "googlenet", "inception_v3",
    "regnet_y_400mf", "mnasnet0_5", "vgg11",
)  # fmt: skip
TIMM = (
    "mobilenetv3_small_050", "efficientnet_lite0", "ghostnet_100", "resnet10t", "convnext_atto", "repvgg_a0",
    "mixnet_s", "hardcorenas_a", "lcnet_050", "tinynet_e",
)  # fmt: skip
SIZES = {"inception_v3": 75, "squeezenet1_1": 64, "densenet121": 64}


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and scales without which folding would not be seen."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.running_mean is not None
                assert part.running_var is not None
                part.running_mean.normal_(0, 0.1, generator=draw)
                part.running_var.uniform_(0.5, 1.5, generator=draw)
                if part.affine:
                    part.weight.uniform_(0.5, 1.5, generator=draw)
                    part.bias.normal_(0, 0.1, generator=draw)
        for name, parameter in module.named_parameters():
            if name.endswith(("layer_scale", "gamma")):
                parameter.uniform_(0.2, 1, generator=draw)
    return module.eval()


def assert_exact(module: nn.Module, x: torch.Tensor, tolerance: float = 1e-10) -> None:
    graph = optimise(capture(module, x), precision=np.float64)
    check(graph)
    (expected,) = eager(module, x)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(run(graph, [x])[0], expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def picture(size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    import torchvision

    torch.manual_seed(0)
    options: dict[str, Any] = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    module = torchvision.models.get_model(name, weights=None, num_classes=10, **options)
    assert_exact(randomised(module), picture(SIZES.get(name, 32)))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    assert_exact(randomised(timm.create_model(name, num_classes=10)), picture(32))


@pytest.mark.parametrize("make", [SmallConvNet, LeNet, lambda: mobilenet_v2_32(conv_shortcuts=True)])
def test_ours(make: Any) -> None:
    torch.manual_seed(0)
    module = make()
    lenet = isinstance(module, LeNet)
    assert_exact(randomised(module), picture(28 if lenet else 32, 1 if lenet else 3))


@pytest.mark.parametrize(("seed", "stem"), list(enumerate(["cifar", "strided", "imagenet"])))
@pytest.mark.parametrize("name", sorted(name for name, s in spaces.SPACES.items() if isinstance(s, spaces.Space)))
def test_search_spaces(name: str, seed: int, stem: Any) -> None:
    space = spaces.get(name)
    genotype = space.random(stream(seed, "random"))
    module = space.build(genotype, in_channels=1, num_classes=4, channels=4, cells=3, stem=stem, seed=seed)
    if "noise" in space.primitives:
        # random numbers at every run are no network to deploy
        with pytest.raises(UnsupportedOperator, match="randn_like"):
            capture(module, torch.zeros(1, 1, 33, 33))
        return
    assert_exact(randomised(module), picture({"cifar": 9, "strided": 14, "imagenet": 33}[stem], channels=1))


@pytest.mark.parametrize("stem", ["cifar", "strided", "imagenet"])
def test_chains(stem: Any) -> None:
    space = spaces.get("micro-chain")
    for seed in range(2):
        module = space.build(space.random(stream(seed, "random")), 1, 4, channels=4, stem=stem, seed=seed)
        assert_exact(randomised(module), picture({"cifar": 9, "strided": 14, "imagenet": 33}[stem], channels=1))


def test_a_supernet() -> None:
    module = spaces.get("micro-darts").supernet(in_channels=1, num_classes=3, channels=4)
    # the weights of the mixture are constants, computed in float32
    assert_exact(randomised(module), picture(9, 1), tolerance=1e-6)


def test_a_transformer_is_refused_by_the_names_of_its_nodes_and_can_be_split() -> None:
    import torchvision

    torch.manual_seed(0)
    module = torchvision.models.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32).eval()
    x = picture(32)
    with pytest.raises(UnsupportedOperator) as caught:
        capture(module, x)
    assert [(node.operator, node.path) for node in caught.value.nodes] == [
        ("aten.scaled_dot_product_attention.default", f"encoder.layers.encoder_layer_{i}.self_attention")
        for i in (0, 1)
    ]
    parts = split(module, x)
    assert len(parts.graphs) == 3
    nn.init.normal_(module.heads.head.weight)
    call = split(module, x).compile(lambda graph: lambda inputs: run(optimise(graph), inputs, dtype=torch.float32))
    torch.testing.assert_close(call([x])[0], module(x).detach(), rtol=1e-4, atol=1e-4)
