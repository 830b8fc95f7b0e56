"""Maps as pictures: heat over a photograph, and the figure with the original beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = "inferno"
STRENGTH = 0.85  # opacity where the map is 1
PALE = 0.65  # share of the photograph's colour that is taken away under the heat
PANEL = 3.0  # inches of a panel's longer side


def overlay(picture: np.ndarray, cam: Float[Tensor, "rows columns"]) -> Float[np.ndarray, "height width 3"]:
    """A map as heat over a picture: opacity grows with the value, so that where it is 0 the picture is seen.

    The picture loses most of its colour under it, since two scales of colours cannot be read at once.

    Args:
        picture: (height, width, 1 or 3), uint8 or floats in [0, 1].
        cam: In [0, 1]; resized to the picture, smoothly (bicubic), so give it as small as the layer is.

    Returns:
        Floats in [0, 1].

    Raises:
        ValueError: If a shape is another one.

    Example:
        >>> heat = overlay(np.zeros((4, 4, 3), np.uint8), torch.zeros(2, 2))
        >>> heat.shape, float(heat.max())
        ((4, 4, 3), 0.0)
    """
    from matplotlib import colormaps

    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] not in (1, 3):
        raise ValueError(f"picture must be (height, width, 1 or 3), got shape {array.shape}")
    if cam.ndim != 2:
        raise ValueError(f"cam must be (rows, columns), got shape {tuple(cam.shape)}")
    values = array.astype(np.float64) / 255 if array.dtype == np.uint8 else array.astype(np.float64)
    grey = values @ np.array([0.299, 0.587, 0.114]) if array.shape[2] == 3 else values[..., 0]
    under = (1 - PALE) * values + PALE * grey[..., None]
    wanted = functional.interpolate(cam[None, None].double(), array.shape[:2], mode="bicubic", align_corners=False)
    heat = wanted[0, 0].clamp(0, 1).cpu().numpy()
    opacity = STRENGTH * heat[..., None]
    return (1 - opacity) * under + opacity * colormaps[COLOURS](heat)[..., :3]


def draw(picture: np.ndarray, cam: Float[Tensor, "rows columns"], title: str = "", subtitle: str = "") -> Figure:
    """A figure for a paper: the picture, its map over it, and the scale.

    Args:
        picture: As for :func:`overlay`.
        cam: Likewise.
        title: Over the picture: the predicted class, say.
        subtitle: Over the map: the method and its layer.

    Raises:
        ValueError: As :func:`overlay`.

    Example:
        >>> from netwright.results import save_figure
        >>> figure = draw(np.zeros((40, 60, 3), np.uint8), torch.rand(7, 7), "a cat, 78 %", "Eigen-CAM, layer4")
        >>> len(figure.axes)
        3
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    heat = overlay(picture, cam)
    shown = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
    height, width = heat.shape[:2]
    tall, wide = PANEL * height / max(height, width), PANEL * width / max(height, width)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9, "font.family": "sans-serif"}):
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04, wspace=0.02)
        figure = Canvas(figsize=(2 * wide + 0.85, tall + 0.35), layout=layout)
        left, right, scale = figure.subplots(1, 3, width_ratios=[1, 1, 0.045])
        for ax, image, text, weight in ((left, shown, title, "bold"), (right, heat, subtitle, "normal")):
            ax.imshow(image, interpolation="bilinear" if max(height, width) > 64 else "nearest")
            ax.set_axis_off()
            _title(ax, text, wide, weight)
        _scale(scale, height / (0.045 * width))
    return figure


def _title(ax: Axes, text: str, wide: float, weight: str) -> None:
    """As much of a text as fits over a panel, from the left."""
    most = max(8, int(wide * 15))
    short = text if len(text) <= most else text[: most - 1].rstrip() + "\u2026"
    ax.set_title(short, loc="left", fontsize=9, fontweight=weight, pad=4)


def _scale(ax: Axes, aspect: float) -> None:
    """The colours of the heat over a grey picture."""
    steps = torch.linspace(1, 0, 256)[:, None]
    ax.imshow(overlay(np.full((256, 1, 3), 0.75), steps), extent=(0, 1, 0, 1), aspect=aspect)
    ax.set_xticks([])
    ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
    ax.yaxis.tick_right()
    ax.tick_params(length=2, width=0.5, labelsize=8)
    for spine in ax.spines.values():
        spine.set_linewidth(0.5)
