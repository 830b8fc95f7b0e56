"""The two networks of StarGAN, which CDvG uses to change the bias of an image.

Choi, Choi, Kim, Ha, Kim and Choo, "StarGAN: Unified Generative Adversarial Networks for Multi-Domain Image-to-Image
Translation", CVPR 2018, arXiv:1711.09020. Every convolution pads with zeros: padding by reflection would leave the
constant planes of the label constant, and the instance norm after them would remove them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


def image_sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width.

    Raises:
        ValueError: If they are not one or two numbers >= 1.
    """
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"image_size must be one side or (height, width), each >= 1, got {image_size!r}")
    return sides[0], sides[1]


def _at_least(**values: tuple[int, int]) -> None:
    for name, (value, bound) in values.items():
        if value < bound:
            raise ValueError(f"{name} must be >= {bound}, got {value}")


def _normed(conv: nn.Module, width: int) -> list[nn.Module]:
    # By the image's own statistics in evaluation mode too, as the published network, which never leaves training mode.
    return [conv, nn.InstanceNorm2d(width, affine=True, track_running_stats=False), nn.ReLU()]


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        first, second = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.layers = nn.Sequential(*_normed(first, width), *_normed(second, width)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class StarGANGenerator(nn.Module):
    """Turns an image into another class: convolution, down, residual blocks, up, convolution, tanh.

    Args:
        num_domains: Classes, at least 2; the wanted one enters as that many constant channels, one of them 1.
        channels: Of the images.
        width: Of the first convolution; doubled by each down-sampling.
        n_down: Down-samplings by 2, >= 0.
        n_res: Residual blocks, >= 0.
        kernel: Side of the first and the last convolution, odd.

    Raises:
        ValueError: If a number is out of its range; in the forward pass if the images have other channels, sides that
            2^n_down does not divide, or labels that are no classes.

    Example:
        >>> net = StarGANGenerator(10, width=8, n_down=1, n_res=1)
        >>> net(torch.zeros(2, 3, 16, 16), torch.tensor([0, 9])).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self, num_domains: int, channels: int = 3, width: int = 64, n_down: int = 2, n_res: int = 6, kernel: int = 7
    ):
        super().__init__()
        _at_least(num_domains=(num_domains, 2), channels=(channels, 1), width=(width, 1), n_down=(n_down, 0))
        _at_least(n_res=(n_res, 0), kernel=(kernel, 1))
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.num_domains, self.channels, self.n_down = num_domains, channels, n_down
        ends = {"kernel_size": kernel, "padding": kernel // 2, "bias": False}
        halving = {"kernel_size": 4, "stride": 2, "padding": 1, "bias": False}
        layers = _normed(nn.Conv2d(channels + num_domains, width, **ends), width)  # type: ignore[arg-type]
        for _ in range(n_down):
            layers += _normed(nn.Conv2d(width, 2 * width, **halving), 2 * width)  # type: ignore[arg-type]
            width *= 2
        layers += [_Residual(width) for _ in range(n_res)]
        for _ in range(n_down):
            layers += _normed(nn.ConvTranspose2d(width, width // 2, **halving), width // 2)  # type: ignore[arg-type]
            width //= 2
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, channels, **ends), nn.Tanh())  # type: ignore[arg-type]

    def forward(
        self, x: Float[Tensor, "batch channels height width"], c: Int[Tensor, "batch"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Images in [-1, 1] as images of the classes ``c``, in (-1, 1)."""
        if x.ndim != 4 or x.shape[1] != self.channels or any(side % 2**self.n_down for side in x.shape[2:]):
            raise ValueError(
                f"x must have shape (batch, {self.channels}, H, W) with sides divisible by {2**self.n_down}, "
                f"got {tuple(x.shape)}"
            )
        check_classes("c", c, len(x), self.num_domains)
        planes = functional.one_hot(c, self.num_domains).to(x.dtype)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.layers(torch.cat([x, planes], 1))


class StarGANDiscriminator(nn.Module):
    """Tells real images from translated ones, patch by patch, and what class an image looks like.

    Args:
        num_domains: Classes, at least 2.
        image_size: Side of the images, or (height, width).
        channels: Of the images.
        width: Of the first convolution; doubled by each further one.
        n_layers: Convolutions, each of which halves the sides; at least 1 pixel must remain.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> net = StarGANDiscriminator(10, 28, width=8, n_layers=3)
        >>> source, classes = net(torch.zeros(2, 3, 28, 28))
        >>> source.shape, classes.shape
        (torch.Size([2, 1, 3, 3]), torch.Size([2, 10]))
    """

    def __init__(
        self, num_domains: int, image_size: int | Sequence[int], channels: int = 3, width: int = 64, n_layers: int = 6
    ):
        super().__init__()
        _at_least(num_domains=(num_domains, 2), channels=(channels, 1), width=(width, 1), n_layers=(n_layers, 1))
        left = [side // 2**n_layers for side in image_sides(image_size)]
        if min(left) < 1:
            raise ValueError(f"image_size must be >= {2**n_layers} for {n_layers} layers, got {image_size}")
        layers: list[nn.Module] = []
        for number in range(n_layers):
            before = width * 2 ** (number - 1) if number else channels
            layers += [nn.Conv2d(before, width * 2**number, 4, 2, 1), nn.LeakyReLU(0.01)]
        last = width * 2 ** (n_layers - 1)
        self.layers = nn.Sequential(*layers)
        self.source = nn.Conv2d(last, 1, 3, padding=1, bias=False)
        self.classes = nn.Conv2d(last, num_domains, (left[0], left[1]), bias=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch 1 rows columns"], Float[Tensor, "batch domains"]]:
        """How real each patch looks, without bound, and logits of the classes."""
        features = self.layers(x)
        return self.source(features), self.classes(features).flatten(1)


def check_classes(name: str, labels: Tensor, count: int, num_classes: int) -> None:
    """Refuses what is not one class an image.

    Raises:
        ValueError: Naming the argument, the bound and the value.
    """
    if labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(f"{name} must be {count} integers, one an image, got {labels.dtype} of {tuple(labels.shape)}")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"{name} must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
