"""ResNet for small pictures.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385.
"""

from __future__ import annotations

from torch import nn
from torchvision.models import ResNet, resnet18


def resnet18_cifar(num_classes: int = 10, in_channels: int = 3) -> ResNet:
    """torchvision's ResNet-18 with a 3x3 stem of stride 1 and no max pooling, for pictures of about 32x32.

    Example:
        >>> sum(p.numel() for p in resnet18_cifar().parameters())
        11173962
    """
    network = resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network
