"""The layout of a folder of images: which folders are parts, which are classes, which files are images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from netwright.console import UserError
from netwright.data.parts import PARTS
from netwright.data.pictures import extensions
from netwright.data.problems import Problem, counted, listing

PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass
class Layout:
    """The images of each part, with their classes, and what was strange.

    Attributes:
        places: How the user calls each part (``testing/``).
        files: (class, path) of each image of each part.
        problems: Faults of the layout.
    """

    places: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def ordered(names: Iterable[str]) -> list[str]:
    """Names in the order of classes: sorted, by value when all are numbers.

    Example:
        >>> ordered(["10", "9"]), ordered(["10", "9", "a"])
        (['9', '10'], ['10', '9', 'a'])
    """
    names = list(names)
    if all(name.isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def _visible(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in extensions() and path.is_file()


def _below(folder: Path) -> Iterator[str]:
    """Every image below a folder, through symbolic links too, but never round in a circle."""
    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        if real in seen:
            continue
        seen.add(real)
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions():
                yield os.path.join(here, name)


def find_images(root: Path) -> Layout:
    """Goes through a folder without opening any image.

    Raises:
        UserError: If the folder cannot be read, or its layout makes no sense.
    """
    try:
        children = _visible(root)
    except OSError as error:
        raise UserError(f"cannot read the folder: {error.strerror}", where=root) from error
    folders = [p for p in children if p.is_dir()]
    parts = _part_folders(root, folders)
    found = Layout()
    for part, place in parts.items() if parts else [("train", root)]:
        inside = _visible(place)
        found.places[part] = "." if place == root else f"{place.name}/"
        entries = []
        for folder in ordered(p.name for p in inside if p.is_dir()):
            paths = list(_below(place / folder))
            entries += [(folder, path) for path in paths]
            if not paths:
                message = f'class "{folder}" has no images in {found.places[part]}'
                found.problems.append(Problem("empty class", message, str(place / folder), False))
        found.files[part] = entries
        loose = [p.name for p in inside if _is_image(p)]
        if loose:
            message = f"{counted(len(loose), 'image')} outside every class folder, left out: {listing(loose)}"
            found.problems.append(Problem("loose images", message, str(place), False, "move them into class folders"))
        if not entries and (part == "train" or not loose):
            _refuse_empty(place, part, len(loose))
        if not entries:  # a test part without labels, as competitions have it
            del found.places[part], found.files[part]
    return found


def _refuse_empty(place: Path, part: str, loose: int) -> None:
    cure = "give a folder with one folder of images for each class"
    if loose:
        raise UserError(f"{counted(loose, 'image')} but no class folders", where=place, cure=cure)
    raise UserError("no images", where=place, cure=cure if part == "train" else "fill the folder or take it away")


def _part_folders(root: Path, folders: list[Path]) -> dict[str, Path]:
    """The folder of each part, or nothing when the folders are classes."""
    parts: dict[str, Path] = {}
    for folder in folders:
        part = PART_NAMES.get(folder.name.lower())
        if part is None:
            continue
        if part in parts:
            raise UserError(
                f"{parts[part].name}/ and {folder.name}/ are the same part",
                where=root,
                cure="keep one of the two",
            )
        parts[part] = folder
    others = [folder.name for folder in folders if folder not in parts.values()]
    if others and len(parts) < 2:
        return {}  # a class may well be called "train"
    if others:
        raise UserError(
            f"{listing(others)} beside {', '.join(p.name for p in parts.values())} is no part",
            where=root,
            cure="move the other folders away, or give the folder whose folders are the classes",
        )
    if parts and "train" not in parts:
        raise UserError(
            f"there is {' and '.join(f'{p.name}/' for p in parts.values())} but no train/",
            where=root,
            cure="name the training part train, or give the folder whose folders are the classes",
        )
    return {part: parts[part] for part in PARTS if part in parts}
