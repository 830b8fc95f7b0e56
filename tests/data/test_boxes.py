"""Folders with boxes: pairing by name, scaling, XML that is wrong in any way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from netwright.console import UserError
from netwright.data.boxes import BoxedImages, read_annotation
from netwright.explain.localization import overlap


def xml(*things: tuple[str, tuple[object, ...]], size: tuple[object, object] = (200, 100)) -> str:
    """An annotation of a picture of (width, height)."""
    objects = ""
    for name, box in things:
        corners = "".join(f"<{n}>{v}</{n}>" for n, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        objects += f"<object><name>{name}</name><bndbox>{corners}</bndbox></object>"
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{objects}</annotation>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, one of them in a class folder, two with an annotation; one annotation without an image."""
    (tmp_path / "val" / "n02").mkdir(parents=True)
    (tmp_path / "boxes" / "val").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name, size in (("val/a.JPEG", (200, 100)), ("val/n02/b.JPEG", (50, 80)), ("val/c.JPEG", (20, 20))):
        pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, format="JPEG")
    (tmp_path / "boxes" / "val" / "a.xml").write_text(xml(("n07", (20, 10, 120, 60)), ("n07", (0, 0, 10, 10))))
    (tmp_path / "boxes" / "val" / "b.xml").write_text(xml(("n02", (5, 8, 45, 72)), size=(50, 80)))
    (tmp_path / "boxes" / "val" / "d.xml").write_text(xml(("n99", (5, 8, 45, 72))))
    return tmp_path


def test_images_and_boxes_are_paired_by_name_and_scaled(folder: Path):
    data = BoxedImages(folder / "val", folder / "boxes", size=(40, 40))
    assert [file.name for file in data.files] == ["a.JPEG", "b.JPEG"]
    assert data.classes == ("n02", "n07")
    assert data.labels.tolist() == [1, 0]
    image, label, boxes = data[0]
    assert image.shape == (3, 40, 40)
    assert 0 <= image.min() < image.max() <= 1
    assert (label, boxes) == (1, [(4, 4, 24, 24), (0, 0, 2, 4)])
    assert data[1][2] == [(4, 4, 36, 36)]


def test_overlaps_do_not_depend_on_the_size():
    first, second = (20, 10, 120, 60), (60, 20, 160, 90)
    scaled = [tuple(v * f for v, f in zip(box, (0.3, 1.7, 0.3, 1.7), strict=True)) for box in (first, second)]
    assert overlap(*scaled) == pytest.approx(overlap(first, second))


def test_pixels_counted_from_one(tmp_path: Path):
    (tmp_path / "a.xml").write_text(xml(("cat", (1, 1, 200, 100))))
    assert read_annotation(tmp_path / "a.xml", one_based=True).boxes == ((0, 0, 200, 100),)
    assert read_annotation(tmp_path / "a.xml").boxes == ((1, 1, 200, 100),)


def test_boxes_are_cut_off_at_the_edges_and_never_vanish(tmp_path: Path):
    (tmp_path / "a.xml").write_text(xml(("cat", (-5, 90, 300, 101))))
    assert read_annotation(tmp_path / "a.xml").boxes == ((0, 90, 200, 100),)
    Image.new("RGB", (200, 100)).save(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(xml(("cat", (199, 99, 200, 100))))
    assert BoxedImages(tmp_path, tmp_path, size=(10, 10))[0][2] == [(9, 9, 10, 10)]


def test_classes_in_a_given_order(folder: Path):
    data = BoxedImages(folder / "val", folder / "boxes", classes=["n07", "n02"])
    assert data.labels.tolist() == [0, 1]
    with pytest.raises(UserError, match="not among those given"):
        BoxedImages(folder / "val", folder / "boxes", classes=["n07"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an annotation"),
        ("<annotation>", "not an annotation"),
        (xml(), "at least 1 object"),
        (xml(("", (1, 1, 5, 5))), "object with a name"),
        (xml(("cat", (1, 1, 1, 5))), r"must have an area inside 200 x 100, got \(1.0, 1.0, 1.0, 5.0\)"),
        (xml(("cat", (500, 1, 600, 5))), "must have an area"),
        (xml(("cat", ("one", 1, 1, 5))), "not an annotation"),
        (xml(("cat", ("nan", 1, 1, 5))), "bndbox/xmin must be a number, got 'nan'"),
        (xml(("cat", (1, 1, 5, 5)), size=("", 5)), "size/width must be a number"),
        ('<!DOCTYPE a [<!ENTITY b "c">]>' + xml(("cat", (1, 1, 5, 5))), "must not define entities"),
    ],
)
def test_damaged_annotations(tmp_path: Path, text: str, message: str):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=message) as found:
        read_annotation(tmp_path / "a.xml")
    assert "a.xml" in str(found.value)


def test_what_is_refused(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="size must be >= 1 x 1, got 0 x 5"):
        BoxedImages(folder / "val", folder / "boxes", size=(0, 5))
    with pytest.raises(UserError, match="no such folder"):
        BoxedImages(folder / "nowhere", folder / "boxes")
    with pytest.raises(UserError, match="no annotation in the folder"):
        BoxedImages(folder / "val", folder / "val")
    (folder / "boxes" / "a.xml").write_text("")
    with pytest.raises(UserError, match="two annotations have the name 'a'"):
        BoxedImages(folder / "val", folder / "boxes")
    (folder / "other").mkdir()
    (folder / "other" / "z.xml").write_text(xml(("cat", (1, 1, 5, 5))))
    with pytest.raises(UserError, match="none of 3 images has one of 1 annotations"):
        BoxedImages(folder / "val", folder / "other")
    with pytest.raises(UserError, match="cannot be read"):
        read_annotation(folder / "nothing.xml")
    (folder / "val" / "a.JPEG").write_bytes(b"no image")
    (folder / "boxes" / "a.xml").unlink()
    with pytest.raises(UserError, match="not a readable image"):
        BoxedImages(folder / "val", folder / "boxes")[0]
