"""The rendered nuisance: each number does what it says, ranges are kept, unlabelled pictures are read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from netwright.console import UserError
from netwright.data import TensorImages
from netwright.data.nuisance import NAMES, NARROW, WIDE, Nuisance, render, with_nuisance
from netwright.data.unlabelled import unlabelled_images
from netwright.seeding import stream

NOTHING = {"angle": 0.0, "strength": 0.0, "contrast": 1.0, "slant": 0.0, "thickness": 0.0}


def rendered(x: torch.Tensor, **change: float) -> torch.Tensor:
    row = torch.tensor([(NOTHING | change)[name] for name in NAMES], dtype=x.dtype)
    return render(x, row.expand(len(x), 5))


def picture() -> torch.Tensor:
    return torch.rand(2, 1, 9, 9, generator=stream(0, "picture"), dtype=torch.float64)


def test_nothing_is_the_identity():
    x = picture()
    assert torch.allclose(rendered(x), x, atol=1e-9)


@pytest.mark.parametrize(("angle", "side"), [(0.0, "right"), (math.pi / 2, "top"), (math.pi, "left")])
def test_light(angle, side):
    x = torch.full((1, 1, 5, 5), 0.5, dtype=torch.float64)
    found = rendered(x, angle=angle, strength=0.8)[0, 0]
    row = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=torch.float64)
    expected = {"right": row.expand(5, 5), "top": row.flip(0)[:, None].expand(5, 5), "left": row.flip(0).expand(5, 5)}
    assert torch.allclose(found, expected[side], atol=1e-6)


def test_contrast_and_thickness():
    x = picture()
    assert torch.allclose(rendered(x, contrast=0.4), 0.5 + 0.4 * (x - 0.5), atol=1e-9)
    dot = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    dot[0, 0, 2, 2] = 1.0
    thick = torch.zeros(5, 5, dtype=torch.float64)
    thick[1:4, 1:4] = 0.7
    thick[2, 2] = 1.0
    assert torch.allclose(rendered(dot, thickness=0.7)[0, 0], thick)
    assert torch.allclose(rendered(dot, thickness=-0.7), 0.3 * dot)
    assert torch.allclose(rendered(1 - dot, thickness=-1.0)[0, 0], 1 - thick.gt(0).double())


def test_slant_moves_rows():
    x = torch.zeros(1, 1, 5, 9, dtype=torch.float64)
    x[..., 4] = 1.0
    found = rendered(x, slant=1.0)[0, 0]
    assert found.argmax(1).tolist() == [2, 3, 4, 5, 6]
    assert torch.allclose(found.sum(1), torch.ones(5).double())


def test_ranges_are_kept_and_depend_on_the_seed_alone():
    images = TensorImages(torch.randint(0, 256, (3000, 1, 6, 6), dtype=torch.uint8), torch.arange(3000) % 10)
    for nuisance in (NARROW, WIDE):
        made, numbers = with_nuisance(images, nuisance, 4)
        for name, column in zip(NAMES, numbers.T, strict=True):
            low, high = getattr(nuisance, name)
            assert low <= float(column.min()) <= low + 0.01 * (high - low)
            assert high - 0.01 * (high - low) <= float(column.max()) <= high
        again, same = with_nuisance(images, nuisance, 4)
        assert torch.equal(made.images, again.images)
        assert torch.equal(numbers, same)
        other, _ = with_nuisance(images, nuisance, 4, name="other")
        assert not torch.equal(made.images, other.images)
        assert torch.equal(made.labels, images.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrast": (1.0, 0.5)}, r"contrast must be a range within \[0, 1\], got \(1.0, 0.5\)"),
        ({"strength": (0.0, 1.5)}, "strength must be"),
        ({"angle": (0.0, float("inf"))}, "angle must be"),
    ],
)
def test_bad_ranges(change, message):
    with pytest.raises(ValueError, match=message):
        Nuisance(**change)


def test_bad_images():
    with pytest.raises(ValueError, match="images must be floats"):
        render(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.zeros(1, 5))
    with pytest.raises(ValueError, match=r"numbers must have shape \(2, 5\)"):
        render(picture(), torch.zeros(1, 5))
    with pytest.raises(ValueError, match="images must be uint8"):
        with_nuisance(TensorImages(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.long)), WIDE)


def test_unlabelled_pictures(tmp_path):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    for i, name in enumerate(("b.png", "deep/a.png", "deep/deeper/c.PNG")):
        Image.fromarray(np.full((6, 8), 40 * i, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = unlabelled_images(str(tmp_path), (1, 4, 4))
    assert found.shape == (3, 1, 4, 4)
    assert sorted(found[:, 0, 0, 0].tolist()) == [0, 40, 80]
    assert unlabelled_images(str(tmp_path), (3, 5, 5), limit=2).shape == (2, 3, 5, 5)
    np.savez(tmp_path / "some.npz", x=np.zeros((4, 8, 8), np.uint8), y=np.arange(4) % 2)
    assert unlabelled_images(str(tmp_path / "some.npz"), (1, 8, 8)).shape == (4, 1, 8, 8)
    with pytest.raises(UserError, match="pictures of 1 x 4 x 4, got 1 x 8 x 8"):
        unlabelled_images(str(tmp_path / "some.npz"), (1, 4, 4))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images here"):
        unlabelled_images(str(tmp_path / "empty"), (1, 4, 4))
    with pytest.raises(UserError, match="no such file or folder"):
        unlabelled_images(str(tmp_path / "nowhere"), (1, 4, 4))
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="cannot read the image"):
        unlabelled_images(str(tmp_path), (1, 4, 4))
