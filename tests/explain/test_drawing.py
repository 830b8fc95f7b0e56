"""Heat over pictures: where it is, where it is not, and that figures come out."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from netwright.explain.drawing import PALE, STRENGTH, draw, overlay


def test_without_heat_the_picture_is_seen_and_full_heat_covers_it():
    from matplotlib import colormaps

    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    values = picture / 255
    grey = (values @ [0.299, 0.587, 0.114])[..., None]
    under = (1 - PALE) * values + PALE * grey
    assert np.allclose(overlay(picture, torch.zeros(3, 4)), under)
    hot = np.array(colormaps["inferno"](1.0)[:3])
    assert np.allclose(overlay(picture, torch.ones(3, 4)), (1 - STRENGTH) * under + STRENGTH * hot)
    assert np.allclose(overlay(values, torch.zeros(3, 4)), under)


def test_heat_is_where_the_map_is():
    cam = torch.zeros(4, 4)
    cam[0, 3] = 1.0
    heat = np.abs(overlay(np.zeros((16, 16, 1), np.uint8), cam)).sum(2)
    assert heat[:4, 12:].min() > 0
    assert heat[10:, :6].max() == 0
    assert np.unravel_index(heat.argmax(), heat.shape) in [(y, x) for y in range(2) for x in range(14, 16)]


@pytest.mark.parametrize("shape", [(40, 60, 3), (60, 20, 1), (8, 8, 1)])
def test_a_figure_of_each_shape(shape):
    figure = draw(
        np.full(shape, 128, np.uint8), torch.rand(7, 7), "a $class$ with a name that is " + "long " * 30, "Eigen"
    )
    with io.BytesIO() as buffer:
        figure.savefig(buffer, format="png", dpi=100)
        pixels = np.asarray(Image.open(buffer).convert("RGB"))
    assert pixels.std() > 10
    left, right, scale = figure.axes
    assert left.get_title(loc="left").endswith("\u2026")
    assert right.get_title(loc="left") == "Eigen"
    assert [tick.get_text() for tick in scale.get_yticklabels()] == ["0", "0.5", "1"]


@pytest.mark.parametrize(
    ("picture", "cam", "message"),
    [
        (np.zeros((4, 4)), torch.zeros(2, 2), r"picture must be \(height, width, 1 or 3\)"),
        (np.zeros((4, 4, 2)), torch.zeros(2, 2), r"picture must be"),
        (np.zeros((4, 4, 3)), torch.zeros(1, 2, 2), r"cam must be \(rows, columns\)"),
    ],
)
def test_what_is_refused(picture, cam, message):
    with pytest.raises(ValueError, match=message):
        overlay(picture, cam)
