"""Writes docs/assets/compiles.md: which networks the sparse runtime runs natively, and what stops it at the others.

Each network has random weights, nine tenths of them zero, and batch norms with random statistics; what comes out is
compared with PyTorch in double precision. `tests/deploy/test_compile_table.py` compares the committed table with what
it finds, network by network.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from netwright.deploy.graph import UnsupportedOperator, capture, optimise
from netwright.deploy.native.runtime import Network

TABLE = Path(__file__).parent.parent / "docs" / "assets" / "compiles.md"
TOLERANCE = 1e-5
SPARSITY = 0.9

# name: side of the image
TORCHVISION = {
    "alexnet": 96, "convnext_tiny": 64, "densenet121": 64, "efficientnet_b0": 64, "googlenet": 64, "inception_v3": 96,
    "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_large": 64, "mobilenet_v3_small": 64, "regnet_x_400mf": 64,
    "regnet_y_400mf": 64, "resnet18": 64, "resnet50": 64, "resnext50_32x4d": 64, "shufflenet_v2_x1_0": 64,
    "squeezenet1_1": 64, "vgg11_bn": 64, "wide_resnet50_2": 64, "efficientnet_v2_s": 64, "swin_t": 64, "vit_b_16": 224,
}  # fmt: skip
TIMM = {
    "convnext_atto": 64, "dla34": 64, "edgenext_xx_small": 64, "efficientnet_lite0": 64, "fbnetc_100": 64,
    "ghostnet_100": 64, "hardcorenas_a": 64, "hrnet_w18_small": 64, "lcnet_050": 64, "mixnet_s": 64,
    "mobilenetv3_small_050": 64, "mobilevit_xxs": 64, "repvgg_a0": 64, "resnet10t": 64, "resnet26d": 64,
    "rexnet_100": 64, "seresnet18": 64, "tinynet_e": 64,
}  # fmt: skip
OWN = {"resnet18_cifar": 32, "mobilenet_v2_32": 32, "SmallConvNet": 28, "micro-darts": 28, "darts (DASS_99)": 32}
NETWORKS = {
    **{f"torchvision:{name}": side for name, side in TORCHVISION.items()},
    **{f"timm:{name}": side for name, side in TIMM.items()},
    **{f"netwright:{name}": side for name, side in OWN.items()},
}


def build(name: str) -> nn.Module:
    """A network of the table with random sparse weights, in evaluation mode."""
    source, _, bare = name.partition(":")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = _own(bare) if source == "netwright" else _known(name)
    generator = torch.Generator().manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            keep = torch.rand(layer.weight.shape, generator=generator) >= SPARSITY
            layer.weight.data.mul_(keep).mul_((1 - SPARSITY) ** -0.5)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


def _known(name: str) -> nn.Module:
    from netwright.nn.pretrained import create

    return create(name)


def _own(name: str) -> nn.Module:
    from netwright.nn.convnet import SmallConvNet
    from netwright.nn.mbconv import mobilenet_v2_32
    from netwright.nn.resnet import resnet18_cifar
    from netwright.search import spaces
    from netwright.search.genotype import DASS_99

    if name == "SmallConvNet":
        return SmallConvNet(in_channels=3)
    if name == "micro-darts":
        space = spaces.get("micro-darts")
        genotype = space.random(torch.Generator().manual_seed(0))
        return space.build(genotype, in_channels=3, num_classes=10, channels=16, cells=3, stem="strided")
    if name.startswith("darts"):
        return spaces.get("darts").build(DASS_99, in_channels=3, num_classes=10, channels=12, cells=8, stem="cifar")
    return {"resnet18_cifar": resnet18_cifar, "mobilenet_v2_32": mobilenet_v2_32}[name]()


def outcome(name: str) -> str:
    """``"native"``, or what stops it.

    Raises:
        ArithmeticError: If the native result is further than 1e-5 from PyTorch in double precision.
    """
    network, side = build(name), NETWORKS[name]
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))
    try:
        graph = optimise(capture(network, (image,)))
    except UnsupportedOperator as error:
        operators = sorted({node.operator for node in error.nodes})
        return "no: " + ", ".join(f"`{operator}`" for operator in operators)
    native = Network(graph)
    found = np.empty(graph.shapes[graph.outputs[0]], np.float32)
    native([image.numpy().ctypes.data], [found.ctypes.data])
    with torch.no_grad():
        expected = network.double()(image.double())
    expected = (expected[0] if isinstance(expected, (tuple, list)) else expected).numpy()
    error = float(np.abs(found.reshape(expected.shape) - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE:
        raise ArithmeticError(f"{name}: relative error {error:.1e}")
    return "native"


def row(name: str) -> str:
    """A line of the table."""
    source, _, bare = name.partition(":")
    return f"| {source} | {bare} | {NETWORKS[name]} | {outcome(name)} |"


def main() -> None:
    lines = ["| from | network | image | runs |", "|---|---|---|---|"]
    for name in NETWORKS:
        lines.append(row(name))
        print(lines[-1], flush=True)
    TABLE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
