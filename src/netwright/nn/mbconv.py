"""The inverted residual block, and MobileNet-v2 for small pictures.

Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, arXiv:1801.04381.

    y = x + BN(W3 * act(BN(D * act(BN(W1 * x)))))    W1, W3: 1x1, D: depthwise k x k with stride s
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.mobilenetv2 import InvertedResidual, MobileNetV2

STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MBConv(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; the input is added where shapes allow.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Odd side k of the depthwise convolution.
        expansion: Width of the inside over ``in_channels``.
        stride: Stride of the depthwise convolution.
        groups: Groups of both 1x1 convolutions; above 1, channels are shuffled after the first.
        activation: Makes the non-linearity.
        bn_eps, bn_momentum: Of the batch norms.
        expand: Whether the first 1x1 convolution is there; by default only if ``expansion`` is above 1, as in
            MobileNet-v2 (FBNet keeps it).
        conv_shortcut: Adds a 1x1 convolution of the input where the stride is 1 and the widths differ.

    Raises:
        ValueError: If ``kernel_size`` is even, a number is below 1, or ``groups`` does not divide the widths.

    Example:
        >>> import torch
        >>> MBConv(8, 16, kernel_size=5, expansion=3, stride=2)(torch.rand(1, 8, 14, 14)).shape
        torch.Size([1, 16, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        expansion: int = 6,
        stride: int = 1,
        groups: int = 1,
        activation: Callable[[], nn.Module] = nn.ReLU6,
        bn_eps: float = 1e-5,
        bn_momentum: float = 0.1,
        expand: bool | None = None,
        conv_shortcut: bool = False,
    ):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and >= 1, got {kernel_size}")
        for name, value in (("expansion", expansion), ("stride", stride), ("groups", groups)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        width = in_channels * expansion
        if any(channels % groups for channels in (in_channels, width, out_channels)):
            raise ValueError(f"groups must divide {in_channels}, {width} and {out_channels}, got {groups}")

        def norm(channels: int) -> nn.Module:
            return nn.BatchNorm2d(channels, eps=bn_eps, momentum=bn_momentum)

        layers: list[nn.Module] = []
        if expansion != 1 if expand is None else expand:
            layers += [nn.Conv2d(in_channels, width, 1, groups=groups, bias=False)]
            layers += [norm(width), activation()]
            layers += [nn.ChannelShuffle(groups)] if groups > 1 else []
        elif width != in_channels:
            raise ValueError(f"expand must be true when expansion is above 1, got expansion {expansion}")
        depthwise = nn.Conv2d(width, width, kernel_size, stride, padding=kernel_size // 2, groups=width, bias=False)
        layers += [depthwise, norm(width), activation()]
        layers += [nn.Conv2d(width, out_channels, 1, groups=groups, bias=False)]
        layers += [norm(out_channels)]
        self.conv = nn.Sequential(*layers)
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1 and conv_shortcut:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), norm(out_channels))

    def forward(
        self, x: Float[Tensor, "batch in_channels height width"]
    ) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """The block."""
        y = self.conv(x)
        return y if self.shortcut is None else self.shortcut(x) + y


def _shortcut_block(
    inp: int, oup: int, stride: int, expand_ratio: int, norm_layer: Callable[..., nn.Module] | None = None
) -> MBConv:
    return MBConv(inp, oup, stride=stride, expansion=expand_ratio, activation=nn.ReLU, expand=True, conv_shortcut=True)


def mobilenet_v2_32(
    num_classes: int = 10, in_channels: int = 3, *, conv_shortcuts: bool = False, dropout: float = 0.2
) -> MobileNetV2:
    """torchvision's MobileNet-v2 with strides 1, 1, 2, 2, 1, 2, 1 and a stem of stride 1, for pictures of
    about 32x32.

    It has 88.0 M multiply-adds at 3x32x32. ``conv_shortcuts=True`` is the variant of the literature on
    CIFAR-10, with a convolution on the shortcut where widths differ, an expansion in the first block too, and
    plain ReLU: 91.2 M, given as 94.60 M where two operations for each value of a batch norm are added.

    Example:
        >>> sum(p.numel() for p in mobilenet_v2_32(conv_shortcuts=True).parameters())
        2296922
    """
    block: Any = _shortcut_block if conv_shortcuts else InvertedResidual
    setting = [list(stage) for stage in STAGES]
    network = MobileNetV2(num_classes, inverted_residual_setting=setting, block=block, dropout=dropout)
    stem = nn.Conv2d(in_channels, 32, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out")
    network.features[0][0] = stem
    return network
