"""What a source of data gives before anything is split: up to three parts, classes and faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from netwright.data.problems import NAMES_SHOWN, Problem, counted, listing, refusal
from netwright.data.tensors import Images

PARTS = ("train", "validation", "test")
LEAK_SPOILS_ABOVE = 0.01  # share of a part that another part holds too


@dataclass
class Parts:
    """The parts as they were found.

    Attributes:
        name: Name of the data set.
        source: Where it comes from, in words or as a path.
        images: The parts that exist, by the names of :data:`PARTS`; ``train`` always does.
        classes: First the classes of the training part, then those that only other parts have.
        known: How many classes the training part has.
        places: How the user calls each part (``testing/``, ``y_test``).
        problems: Faults found while reading.
        sizes: Number of images of each (height, width), as stored.
        folder: The folder that holds the parts, when there is one.
    """

    name: str
    source: str
    images: dict[str, Images]
    classes: tuple[str, ...]
    known: int
    places: dict[str, str]
    problems: list[Problem] = field(default_factory=list)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    folder: Path | None = None

    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class in each part."""
        return {
            part: dict(
                zip(
                    self.classes,
                    np.bincount(images.labels, minlength=len(self.classes)).tolist(),
                    strict=True,
                )
            )
            for part, images in self.images.items()
        }

    def where(self, part: str, label: str | None = None) -> str:
        """The folder of a part or of one of its classes; else the source and the user's name of the part."""
        if self.folder is None:
            return f"{self.source}, {self.places[part]}"
        place = self.folder / self.places[part]
        return str(place if label is None else place / label)

    def number_rows(self) -> None:
        """Lets every image that is in no file know its row, as the source has it, before any is taken away."""
        for images in self.images.values():
            if images.files is None and images.rows is None:
                images.rows = torch.arange(len(images))

    def drop_unknown(self) -> None:
        """Takes away every image whose class is not in the training part."""
        for part, images in self.images.items():
            keep = np.flatnonzero(images.labels.numpy() < self.known)
            if len(keep) < len(images):
                self.images[part] = images.subset(keep.tolist())
        self.classes = self.classes[: self.known]


def class_problems(parts: Parts, *, drop_unknown: bool) -> list[Problem]:
    """Faults of the class lists: one class, one image, classes that a part lacks or that training lacks."""
    counts = parts.counts()
    train, classes = counts["train"], parts.classes[: parts.known]
    problems = []
    if len(classes) == 1:
        inner = parts.folder / classes[0] if parts.folder is not None and parts.places["train"] == "." else None
        cure = "give at least two classes"
        if inner is not None and any(child.is_dir() for child in inner.iterdir()):
            cure += f"; if the folders inside are the classes, give {inner}"
        problems.append(refusal("one class", f'there is only one class, "{classes[0]}"', parts.where("train"), cure))
    single = [label for label in classes if train[label] == 1]
    if single and len(classes) > 1:
        noun = "class has" if len(single) == 1 else "classes have"
        problems.append(
            refusal(
                "one image",
                f"{len(single)} {noun} only one image to train on: {listing(single)}",
                parts.where("train", single[0]),
                "add at least one image, or take the class away",
            )
        )
    for part in parts.images:
        if part == "train":
            continue
        for label in parts.classes[parts.known :]:
            if counts[part][label]:
                problems.append(_unknown(parts, part, label, counts[part][label], drop_unknown))
        missing = [label for label in classes if not counts[part][label]]
        if missing:
            noun = "class has" if len(missing) == 1 else "classes have"
            message = f"{len(missing)} {noun} no image in {parts.places[part]}: {listing(missing)}"
            problems.append(Problem("missing class", message, parts.where(part), False))
    return problems


def _unknown(parts: Parts, part: str, label: str, count: int, drop: bool) -> Problem:
    places = f"is in {parts.places[part]} but not in {parts.places['train']}"
    message = f'class "{label}" {places} ({counted(count, "image")})'
    where = parts.where(part, label)
    if drop:
        return Problem("unknown class", f"{message}, left out", where, False)
    target = "training examples of it" if parts.folder is None else f"some to {parts.where('train', label)}"
    return refusal(
        "unknown class",
        message,
        where,
        f"{'add' if parts.folder is None else 'move'} {target}, or add --drop-unknown",
    )


def duplicate_problems(parts: Parts, digests: dict[str, np.ndarray]) -> list[Problem]:
    """Identical images in two parts, and identical images of one part with different labels."""
    problems = []
    keys = {part: group_keys(rows) for part, rows in digests.items()}
    names = [part for part in PARTS if part in keys]
    for i, first in enumerate(names):
        problems += _disagreeing(parts, first, keys[first])
        for second in names[i + 1 :]:
            shared = np.flatnonzero(np.isin(keys[second], keys[first]))
            if len(shared) == 0:
                continue
            other = int(np.flatnonzero(keys[first] == keys[second][shared[0]])[0])
            pair = f"{_file(parts, second, int(shared[0]))} = {_file(parts, first, other)}"
            what = f"{counted(len(shared), 'image')} of {parts.places[second]}"
            message = f"{what} {'is' if len(shared) == 1 else 'are'} also in {parts.places[first]} ({pair})"
            spoils = len(shared) > LEAK_SPOILS_ABOVE * len(keys[second])
            problems.append(
                Problem("duplicates", message, parts.where(second), spoils, "take them out of one of the two")
            )
    return problems


def _disagreeing(parts: Parts, part: str, keys: np.ndarray) -> list[Problem]:
    labels = parts.images[part].labels.numpy()
    pairs = np.unique(np.stack([keys.view(np.int64), labels]), axis=1)[0]
    copies, counts = np.unique(pairs, return_counts=True)
    doubtful = np.flatnonzero(np.isin(keys.view(np.int64), copies[counts > 1]))
    if len(doubtful) == 0:
        return []
    files = [_file(parts, part, int(i)) for i in doubtful[:NAMES_SHOWN]] + [""] * (len(doubtful) - NAMES_SHOWN)
    message = f"{len(doubtful)} identical images of {parts.places[part]} carry different labels: {listing(files)}"
    return [Problem("labels", message, parts.where(part), False, "keep each image in one class")]


def _file(parts: Parts, part: str, index: int) -> str:
    files = parts.images[part].files
    if files is None:
        rows = parts.images[part].rows
        return f"{parts.places[part]}[{index if rows is None else int(rows[index])}]"
    return str(Path(files[index]).relative_to(parts.folder)) if parts.folder else files[index]


def group_keys(digests: np.ndarray) -> np.ndarray:
    """One uint64 for each image: the first half of its digest. Equal images have equal keys."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
