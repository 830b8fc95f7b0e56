"""Pictures with true boxes: folders of images, as ImageNet has them, and PASCAL-style XML files beside them.

The validation part of ILSVRC 2012 is a folder of images, by themselves or in class folders, and an archive of XML
files, one an image, of the same name; so is its training part, where some images have none. Nothing is fetched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from torch import Tensor
from torch.utils.data import Dataset

from netwright.console import UserError
from netwright.data.pictures import UnreadableError, decode, extensions
from netwright.data.tensors import scaled

Box = tuple[int, int, int, int]


class Annotation(NamedTuple):
    """What an XML file says of a picture.

    Attributes:
        size: Height and width of the picture, in the pixels of the boxes.
        names: The class of each object.
        boxes: (x0, y0, x1, y1) of each object, in pixels, half open.
    """

    size: tuple[float, float]
    names: tuple[str, ...]
    boxes: tuple[tuple[float, float, float, float], ...]


class BoxedImages(Dataset[tuple[Tensor, int, list[Box]]]):
    """Images with their class and the boxes of their objects: (image, label, boxes).

    Images are resized to one size, their aspect ratio not being kept, and boxes with them: how much two boxes overlap
    is the same before and after.

    Args:
        images: A folder of images, in class folders or not, however deep.
        annotations: A folder of XML files, however deep; each is of the image that has its name. Images without one
            are left out, as are files of images that are not there.
        size: Height and width of every image.
        classes: Names of the labels in order; by default all names there are, sorted, which for the synsets of
            ImageNet is the order of pretrained networks.
        one_based: Whether the first pixel has the number 1 and the last one is inside the box, as PASCAL VOC counts.

    Attributes:
        files: The images, sorted by their name.
        classes: Names of the labels.
        labels: (N,) whole numbers, of the first object of each image.

    Raises:
        UserError: If a folder is missing, no image has an annotation, two images or two annotations have one name, a
            file is damaged, or a class is unknown.
        ValueError: If ``size`` is not positive.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> root = Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (40, 20)).save(root / "cat.png")
        >>> box = "<bndbox><xmin>10</xmin><ymin>5</ymin><xmax>20</xmax><ymax>15</ymax></bndbox>"
        >>> size = "<size><width>40</width><height>20</height></size>"
        >>> text = f"<annotation>{size}<object><name>n02123045</name>{box}</object></annotation>"
        >>> _ = (root / "cat.xml").write_text(text)
        >>> image, label, boxes = BoxedImages(root, root, size=(40, 40))[0]
        >>> image.shape, label, boxes
        (torch.Size([3, 40, 40]), 0, [(10, 10, 20, 30)])
    """

    def __init__(
        self,
        images: str | os.PathLike[str],
        annotations: str | os.PathLike[str],
        *,
        size: tuple[int, int] = (224, 224),
        classes: Sequence[str] | None = None,
        one_based: bool = False,
    ):
        if min(size) < 1:
            raise ValueError(f"size must be >= 1 x 1, got {size[0]} x {size[1]}")
        pictures = _by_name(Path(images), extensions(), "image")
        notes = _by_name(Path(annotations), {".xml"}, "annotation")
        both = sorted(pictures.keys() & notes.keys())
        if not both:
            raise UserError(
                f"none of {len(pictures)} images has one of {len(notes)} annotations",
                where=annotations,
                cure="give the folder of XML files that have the names of the images",
            )
        self.size, self.files = size, tuple(pictures[name] for name in both)
        self._notes = [read_annotation(notes[name], one_based=one_based) for name in both]
        found = {name for note in self._notes for name in note.names}
        self.classes = tuple(sorted(found)) if classes is None else tuple(classes)
        places = {name: i for i, name in enumerate(self.classes)}
        unknown = next((n for n, note in zip(both, self._notes, strict=True) if note.names[0] not in places), None)
        if unknown is not None:
            raise UserError("the class is not among those given", where=notes[unknown], cure="add it to classes")
        self.labels = torch.tensor([places[note.names[0]] for note in self._notes])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int, list[Box]]:
        height, width = self.size
        try:
            pixels = decode(str(self.files[index]), (3, height, width))
        except UnreadableError as error:
            raise UserError(f"not a readable image: {error}", where=self.files[index]) from error
        return scaled(torch.from_numpy(pixels.copy())), int(self.labels[index]), self.boxes(index)

    def boxes(self, index: int) -> list[Box]:
        """The boxes of an image, in pixels of the resized one, each at least one pixel wide and high."""
        note = self._notes[index]
        down, across = self.size[0] / note.size[0], self.size[1] / note.size[1]
        found = []
        for x0, y0, x1, y1 in note.boxes:
            left, right = _pixels(x0 * across, x1 * across, self.size[1])
            top, bottom = _pixels(y0 * down, y1 * down, self.size[0])
            found.append((left, top, right, bottom))
        return found


def _pixels(low: float, high: float, most: int) -> tuple[int, int]:
    first = min(max(round(low), 0), most - 1)
    return first, min(max(round(high), first + 1), most)


def _by_name(folder: Path, endings: frozenset[str] | set[str], what: str) -> dict[str, Path]:
    """Files by their name without its ending."""
    if not folder.is_dir():
        raise UserError("no such folder", where=folder)
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in endings or path.name.startswith(".") or not path.is_file():
            continue
        if path.stem in found:
            raise UserError(f"two {what}s have the name {path.stem!r}", where=path, cure=f"see {found[path.stem]}")
        found[path.stem] = path
    if not found:
        raise UserError(f"no {what} in the folder", where=folder)
    return found


def read_annotation(path: str | os.PathLike[str], *, one_based: bool = False) -> Annotation:
    """Reads a PASCAL-style XML file; boxes are cut off at the edges of the picture.

    Args:
        path: The file.
        one_based: As for :class:`BoxedImages`.

    Raises:
        UserError: If the file is missing, no XML, defines entities of its own, or lacks a size or an object, or a box
            has no area.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from error
    # No annotation needs them, and they can be made to fill the memory.
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise UserError("an annotation must not define entities", where=path)
    try:
        root = ElementTree.fromstring(text)
        height, width = _number(root, "size/height"), _number(root, "size/width")
        names, boxes = [], []
        for thing in root.iter("object"):
            corners = [_number(thing, f"bndbox/{name}") for name in ("xmin", "ymin", "xmax", "ymax")]
            x0, y0, x1, y1 = corners if not one_based else [corners[0] - 1, corners[1] - 1, *corners[2:]]
            box = (max(x0, 0.0), max(y0, 0.0), min(x1, width), min(y1, height))
            if not (box[0] < box[2] and box[1] < box[3]):
                raise ValueError(f"a box must have an area inside {width:g} x {height:g}, got {tuple(corners)}")
            names.append((thing.findtext("name") or "").strip())
            boxes.append(box)
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"not an annotation: {error}", where=path) from error
    if not boxes or not all(names) or not (height > 0 and width > 0):
        raise UserError("an annotation must have a size and at least 1 object with a name", where=path)
    return Annotation((height, width), tuple(names), tuple(boxes))


def _number(root: ElementTree.Element, name: str) -> float:
    value = float(root.findtext(name) or "nan")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a number, got {root.findtext(name)!r}")
    return value
