"""Encoder and decoder of Li et al., AAAI 2018, arXiv:1710.04806: strided convolutions and their mirror image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from netwright.checks import one_of

Init = Literal["paper", "kaiming"]
PAPER_STD = 0.01
MAPS = (32, 32, 32)


def conv_encoder(in_channels: int, maps: Sequence[int], *, init: Init = "kaiming") -> nn.Sequential:
    """3x3 convolutions of stride 2, each with a ReLU: every one halves the picture, rounding up.

    Args:
        in_channels: Channels of the picture, >= 1.
        maps: Channels after each convolution, each >= 1.
        init: Weights, with biases 0: ``"paper"`` from N(0, 0.01^2), as published; ``"kaiming"`` scaled to the fan-in,
            which learns in far fewer epochs.

    Raises:
        ValueError: If a number is below 1, ``maps`` is empty or ``init`` is unknown.

    Example:
        >>> import torch
        >>> conv_encoder(1, (32, 32, 32, 10))(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10, 2, 2])
    """
    _check(in_channels, maps)
    layers: list[nn.Module] = []
    for before, after in zip((in_channels, *maps), maps, strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return _initialised(nn.Sequential(*layers), init)


def conv_decoder(
    out_channels: int, maps: Sequence[int], size: int | tuple[int, int], *, init: Init = "kaiming"
) -> nn.Sequential:
    """The mirror image of :func:`conv_encoder` in transposed convolutions, back to exactly the picture's size.

    Args:
        out_channels: Channels of the picture, >= 1.
        maps: As the encoder has them; the last is what the decoder takes.
        size: Side of the picture, or (height, width), in pixels.
        init: As for the encoder.

    Returns:
        A network whose last layer is a sigmoid: values in (0, 1).

    Raises:
        ValueError: If a number is below 1, ``maps`` is empty or ``init`` is unknown.

    Example:
        >>> import torch
        >>> conv_decoder(1, (32, 32, 32, 10), 28)(torch.rand(2, 10, 2, 2)).shape
        torch.Size([2, 1, 28, 28])
    """
    _check(out_channels, maps)
    sides = [(size, size) if isinstance(size, int) else size]
    if min(sides[0]) < 1:
        raise ValueError(f"size must be >= 1 on both sides, got {size}")
    for _ in maps:
        sides.append(((sides[-1][0] + 1) // 2, (sides[-1][1] + 1) // 2))
    layers: list[nn.Module] = []
    for before, after, small, large in zip(
        maps[::-1], (*maps[-2::-1], out_channels), sides[:0:-1], sides[-2::-1], strict=True
    ):
        # Stride 2 alone gives 2 n - 1, so an even side needs one more.
        more = (large[0] - 2 * small[0] + 1, large[1] - 2 * small[1] + 1)
        layers += [nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=more), nn.ReLU()]
    return _initialised(nn.Sequential(*layers[:-1], nn.Sigmoid()), init)


def mnist_conv_encoder(out_maps: int = 10, *, in_channels: int = 1, init: Init = "kaiming") -> nn.Sequential:
    """The paper's encoder for 28x28 pictures: 32, 32, 32 and ``out_maps`` maps of sides 14, 7, 4 and 2.

    TensorFlow pads strided convolutions after the picture, torch on both sides; the sizes are the same and the maps lie
    half a pixel apart.

    Args:
        out_maps: Maps of the last layer, >= 1; the latent vector has four times as many numbers.
        in_channels: Channels of the picture, >= 1.
        init: As for :func:`conv_encoder`.

    Raises:
        ValueError: If a number is below 1 or ``init`` is unknown.

    Example:
        >>> import torch
        >>> mnist_conv_encoder()(torch.rand(2, 1, 28, 28)).flatten(1).shape
        torch.Size([2, 40])
    """
    return conv_encoder(in_channels, (*MAPS, out_maps), init=init)


def mnist_conv_decoder(out_maps: int = 10, *, out_channels: int = 1, init: Init = "kaiming") -> nn.Sequential:
    """The paper's decoder, from 2x2 by way of 4, 7 and 14 to 28x28; its weights are not those of the encoder.

    Args:
        out_maps: Maps that it takes, as the encoder gives them.
        out_channels: Channels of the picture, >= 1.
        init: As for :func:`conv_encoder`.

    Raises:
        ValueError: If a number is below 1 or ``init`` is unknown.

    Example:
        >>> import torch
        >>> mnist_conv_decoder()(torch.rand(2, 10, 2, 2)).shape
        torch.Size([2, 1, 28, 28])
    """
    return conv_decoder(out_channels, (*MAPS, out_maps), 28, init=init)


def _check(channels: int, maps: Sequence[int]) -> None:
    if not maps or min(channels, *maps) < 1:
        raise ValueError(f"channels and maps must be >= 1, and maps at least one, got {channels} and {tuple(maps)}")


def _initialised(network: nn.Sequential, init: Init) -> nn.Sequential:
    one_of("init", init, get_args(Init))
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            if init == "paper":
                nn.init.normal_(layer.weight, std=PAPER_STD)
            else:
                # Of a transposed layer torch counts what one input reaches as the fan-in.
                mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(layer, nn.ConvTranspose2d) else "fan_in"
                nn.init.kaiming_normal_(layer.weight, mode=mode, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return network
