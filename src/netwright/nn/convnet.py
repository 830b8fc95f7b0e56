"""Small networks for experiments: a convolutional one of any width, LeNet, torchvision's perceptron."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import MLP

__all__ = ["MLP", "LeNet", "SmallConvNet"]


class SmallConvNet(nn.Module):
    """Convolution, batch norm, ReLU and 2x2 pooling for each width, then a hidden layer and the classifier.

    Args:
        channels: Width of each 3x3 convolution; each but the first sees a picture half the size.
        hidden: Width of the layer before the classifier; 0 leaves it out.
        num_classes: Number of outputs.
        in_channels: Channels of the picture.
        grid: Cells a side to which the last features are averaged; 1 is the mean over the picture.

    Raises:
        ValueError: If ``channels`` is empty or holds a width below 1, or another argument is out of its
        range.

    Example:
        >>> import torch
        >>> SmallConvNet(num_classes=10, in_channels=1)(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: Sequence[int] = (16, 32),
        hidden: int = 64,
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        grid: int = 1,
    ):
        super().__init__()
        if not channels or min(channels) < 1:
            raise ValueError(f"channels must hold widths >= 1, got {tuple(channels)}")
        least = {"hidden": (hidden, 0), "num_classes": (num_classes, 1), "in_channels": (in_channels, 1)}
        for name, (value, bound) in {**least, "grid": (grid, 1)}.items():
            if value < bound:
                raise ValueError(f"{name} must be >= {bound}, got {value}")
        layers: list[nn.Module] = []
        for width_in, width in zip((in_channels, *channels), channels, strict=False):
            layers += [nn.Conv2d(width_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid), nn.Flatten())
        width = channels[-1] * grid * grid
        head: list[nn.Module] = [nn.Linear(width, hidden), nn.ReLU()] if hidden else []
        self.head = nn.Sequential(*head, nn.Linear(hidden or width, num_classes))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.features(x))


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max pooling: 5x5 convolutions of 6 and 16 channels, then 120, 84 and the classes.

    LeCun et al., "Gradient-based learning applied to document recognition", Proceedings of the IEEE, 1998.

    Args:
        num_classes: Number of outputs.
        in_channels: Channels of the picture.
        image_size: Height and width of the picture, at least 16.

    Raises:
        ValueError: If ``image_size`` is below 16.

    Example:
        >>> sum(p.numel() for p in LeNet().parameters())
        44426
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 28):
        super().__init__()
        if image_size < 16:
            raise ValueError(f"image_size must be >= 16, got {image_size}")
        side = ((image_size - 4) // 2 - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Linear(16 * side * side, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.features(x))
