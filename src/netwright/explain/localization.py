"""How well a map finds a thing: the box of its largest bright part, and whether its peak lies on it.

The protocol of Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391: what is above a share of the maximum, its
largest connected part, the tight box round it; right if its intersection over union with a true box is at least 0.5.
Pointing game: Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, arXiv:1608.00507.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import ndimage
from torch import Tensor

Box = tuple[int, int, int, int]
"""(x0, y0, x1, y1) in pixels, half open."""


def largest_component_box(cam: Float[Tensor, "height width"], threshold: float = 0.15, connectivity: int = 8) -> Box:
    """The tight box of the largest connected part that is above a share of the maximum.

    Args:
        cam: A map.
        threshold: Share of the maximum, in [0, 1).
        connectivity: 4 or 8 neighbours.

    Returns:
        Of parts equally large, the one that comes first in reading order; the whole picture for a map without a
        positive value.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> cam = torch.zeros(4, 6)
        >>> cam[1:3, 2:5] = 1.0
        >>> largest_component_box(cam)
        (2, 1, 5, 3)
    """
    if cam.ndim != 2:
        raise ValueError(f"cam must be (height, width), got shape {tuple(cam.shape)}")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must lie in [0, 1), got {threshold}")
    if connectivity not in (4, 8):
        raise ValueError(f"connectivity must be 4 or 8, got {connectivity}")
    values = cam.detach().float().cpu().numpy()
    height, width = values.shape
    if not values.max() > 0:
        return 0, 0, width, height
    structure = ndimage.generate_binary_structure(2, 2 if connectivity == 8 else 1)
    parts, count = ndimage.label(values > threshold * values.max(), structure)
    largest = int(np.bincount(parts.ravel(), minlength=count + 1)[1:].argmax())
    ys, xs = ndimage.find_objects(parts)[largest]
    return int(xs.start), int(ys.start), int(xs.stop), int(ys.stop)


def overlap(first: Sequence[float], second: Sequence[float]) -> float:
    """Intersection over union of two boxes.

    Example:
        >>> overlap((0, 0, 2, 2), (1, 0, 3, 2))
        0.3333333333333333
    """
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def localization_error(
    cams: Float[Tensor, "batch height width"],
    boxes: Sequence[Sequence[Box]],
    threshold: float = 0.15,
    iou: float = 0.5,
) -> Bool[Tensor, " batch"]:
    """Of each map, whether its box misses every true box.

    Args:
        cams: Maps at the size of the pictures.
        boxes: The true boxes of each picture, at least one.
        threshold: As for :func:`largest_component_box`.
        iou: Intersection over union that counts as found, in (0, 1].

    Raises:
        ValueError: If there is not one list of boxes a map, a list is empty, a box has no area, or a number is out of
            range.

    Example:
        >>> cam = torch.zeros(1, 4, 6)
        >>> cam[0, 1:3, 2:5] = 1.0
        >>> localization_error(cam, [[(2, 1, 5, 4)]]), localization_error(cam, [[(0, 0, 1, 1)]])
        (tensor([False]), tensor([True]))
    """
    _check(cams, boxes)
    if not 0 < iou <= 1:
        raise ValueError(f"iou must lie in (0, 1], got {iou}")
    found = [largest_component_box(cam, threshold) for cam in cams]
    missed = [max(overlap(box, true) for true in known) < iou for box, known in zip(found, boxes, strict=True)]
    return torch.tensor(missed)


def pointing_game(
    cams: Float[Tensor, "batch height width"], boxes: Sequence[Sequence[Box]], tolerance: float = 15
) -> Bool[Tensor, " batch"]:
    """Of each map, whether its maximum lies on a true box or no further from it than ``tolerance`` pixels.

    Args:
        cams: Maps at the size of the pictures.
        boxes: The true boxes of each picture, at least one.
        tolerance: In pixels, >= 0; the protocol's 15 is for pictures of some hundred pixels.

    Raises:
        ValueError: As :func:`localization_error`, or if ``tolerance`` is negative.

    Example:
        >>> cam = torch.zeros(1, 8, 8)
        >>> cam[0, 2, 5] = 1.0
        >>> pointing_game(cam, [[(0, 0, 4, 4)]], tolerance=0), pointing_game(cam, [[(0, 0, 4, 4)]], tolerance=2)
        (tensor([False]), tensor([True]))
    """
    _check(cams, boxes)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    hits = []
    for cam, known in zip(cams, boxes, strict=True):
        y, x = divmod(int(cam.flatten().argmax()), cam.shape[1])
        gaps = [(max(x0 - x, 0, x - x1 + 1), max(y0 - y, 0, y - y1 + 1)) for x0, y0, x1, y1 in known]
        hits.append(any(across**2 + down**2 <= tolerance**2 for across, down in gaps))
    return torch.tensor(hits)


def _check(cams: Tensor, boxes: Sequence[Sequence[Box]]) -> None:
    if cams.ndim != 3:
        raise ValueError(f"cams must be (batch, height, width), got shape {tuple(cams.shape)}")
    if not cams.isfinite().all():
        raise ValueError("cams must be finite, got NaN or infinity")
    if len(boxes) != len(cams):
        raise ValueError(f"boxes must be one list for each of {len(cams)} maps, got {len(boxes)}")
    for known in boxes:
        if not known:
            raise ValueError("a picture must have at least 1 box, got 0")
        for box in known:
            if not (box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"a box must be (x0, y0, x1, y1) with x0 < x1 and y0 < y1, got {tuple(box)}")
