"""Ways to spoil pictures and textures to put behind them, each image of a batch its own, without a loop over images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Int, UInt8
from torch import Generator, Tensor
from torch.nn import functional

SEVERITIES = 5


def _noise(x: Tensor, s: float, generator: Generator) -> Tensor:
    return x + (0.06 + 0.06 * s) * torch.randn(x.shape, generator=generator)


def _speckle(x: Tensor, s: float, generator: Generator) -> Tensor:
    return x * (1 + (0.15 + 0.15 * s) * torch.randn(x.shape, generator=generator))


def _impulse(x: Tensor, s: float, generator: Generator) -> Tensor:
    draws = torch.rand(x.shape, generator=generator)
    share = 0.02 + 0.03 * s
    return torch.where(draws < share / 2, 0.0, torch.where(draws > 1 - share / 2, 1.0, x))


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    channels, (rows, columns) = x.shape[1], kernel.shape
    padded = functional.pad(x, (columns // 2, columns // 2, rows // 2, rows // 2), mode="replicate")
    return functional.conv2d(padded, kernel.expand(channels, 1, -1, -1), groups=channels)


def _blur(x: Tensor, s: float, generator: Generator) -> Tensor:
    places = torch.arange(-3, 4.0)
    line = torch.exp(-0.5 * (places / (0.4 + 0.3 * s)) ** 2)
    kernel = line[:, None] * line
    return _filtered(x, kernel / kernel.sum())


def _motion(x: Tensor, s: float, generator: Generator) -> Tensor:
    length = 2 * round(s) + 1
    return _filtered(x, torch.full((1, length), 1 / length))


def _bright(x: Tensor, s: float, generator: Generator) -> Tensor:
    return x + 0.1 * s


def _contrast(x: Tensor, s: float, generator: Generator) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (0.8 - 0.13 * s)


def _pixelated(x: Tensor, s: float, generator: Generator) -> Tensor:
    height, width = x.shape[2:]
    small = max(1, round(height / (1 + 0.4 * s))), max(1, round(width / (1 + 0.4 * s)))
    return functional.interpolate(functional.adaptive_avg_pool2d(x, small), (height, width), mode="nearest")


def _striped(x: Tensor, s: float, generator: Generator) -> Tensor:
    rows = torch.arange(x.shape[2])[:, None]
    return torch.where(rows % 4 == 0, x + (1 - 2 * x) * min(1.0, 0.2 * s), x)


def _inverted(x: Tensor, s: float, generator: Generator) -> Tensor:
    return x + (1 - 2 * x) * (0.5 + 0.1 * s)


_WAYS: dict[str, Callable[[Tensor, float, Generator], Tensor]] = {
    "noise": _noise,
    "speckle": _speckle,
    "impulse": _impulse,
    "blur": _blur,
    "motion": _motion,
    "bright": _bright,
    "contrast": _contrast,
    "pixelated": _pixelated,
    "striped": _striped,
    "inverted": _inverted,
}
CORRUPTIONS = tuple(_WAYS)
TEXTURES = 10


def corrupted(
    images: UInt8[Tensor, "examples channels height width"],
    kinds: Int[Tensor, "examples"],
    corruptions: Sequence[str],
    severity: int,
    generator: Generator,
) -> UInt8[Tensor, "examples channels height width"]:
    """Images spoiled each in its own way.

    Args:
        images: Pictures.
        kinds: Index into ``corruptions`` for each image.
        corruptions: Names out of :data:`CORRUPTIONS`.
        severity: In 1..5.
        generator: Of noise.

    Raises:
        ValueError: If the images are not uint8, a name is unknown or ``severity`` is out of its range.

    Example:
        >>> images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
        >>> corrupted(images, torch.tensor([0, 1]), ["bright", "blur"], 5, Generator()).amax((1, 2, 3)).tolist()
        [128, 0]
    """
    _check_pictures(images)
    if unknown := [name for name in corruptions if name not in _WAYS]:
        raise ValueError(f"corruptions must be among {', '.join(CORRUPTIONS)}, got {unknown[0]!r}")
    if not 1 <= severity <= SEVERITIES:
        raise ValueError(f"severity must lie in 1..{SEVERITIES}, got {severity}")
    found = images.clone()
    for kind, name in enumerate(corruptions):
        chosen = (kinds == kind).nonzero().flatten()
        for rows in chosen.split(4096):
            if len(rows):
                spoiled = _WAYS[name](images[rows].float() / 255, float(severity), generator)
                found[rows] = (spoiled.clamp(0, 1) * 255).round().byte()
    return found


def textured(
    images: UInt8[Tensor, "examples channels height width"],
    kinds: Int[Tensor, "examples"],
    strength: float,
    generator: Generator,
) -> UInt8[Tensor, "examples channels height width"]:
    """Bright images in front of textures: stripes in five directions, waves of twice their length crossed, and rings.

    Args:
        images: Bright on black.
        kinds: Texture of each image, in 0..9.
        strength: Brightness of the texture, in (0, 1].
        generator: Of the phases.

    Raises:
        ValueError: If the images are not uint8 or ``strength`` is out of its range.

    Example:
        >>> textured(torch.full((1, 1, 8, 8), 255, dtype=torch.uint8), torch.tensor([3]), 0.5, Generator()).min()
        tensor(255, dtype=torch.uint8)
    """
    _check_pictures(images)
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], got {strength}")
    count, _, height, width = images.shape
    found = torch.empty_like(images)
    phases = 2 * math.pi * torch.rand(count, 2, generator=generator)
    y, x = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    for rows in torch.arange(count).split(4096):
        kind, phase = kinds[rows, None, None], phases[rows, :, None, None]
        angle = math.pi / 5 * (kind % 5)
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        stripes = (2 * math.pi / 5 * along + phase[:, 0]).cos()
        crossed = (math.pi / 5 * along + phase[:, 0]).cos() * (math.pi / 5 * across + phase[:, 1]).cos()
        far = (x - width / 2).hypot(y - height / 2)
        rings = (2 * math.pi / 4 * far + phase[:, 0]).cos()
        wave = torch.where(kind < 5, stripes, torch.where(kind < 9, crossed, rings))
        behind = (255 * strength * (wave + 1) / 2).round().byte()
        found[rows] = torch.maximum(images[rows], behind[:, None])
    return found


def _check_pictures(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}")
