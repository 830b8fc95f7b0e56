"""One data set, ready to train on: three parts, the classes, the statistics of the training part."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from netwright.checks import one_of
from netwright.console import UserError, table
from netwright.data.augment import Compose, standard
from netwright.data.parts import PARTS, Parts, class_problems, duplicate_problems, group_keys
from netwright.data.problems import Problem, refuse
from netwright.data.sources import Reading, read
from netwright.data.splits import TEST_SHARE, VALIDATION_SHARE, split_train
from netwright.data.tensors import Images, Normalise
from netwright.results import Result, new_axes
from netwright.storage import digest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES_SHOWN = 20
PER_LINE = 5
CONSTANT_BELOW = 1e-6  # a channel that varies less is not divided by its deviation


@dataclass(frozen=True)
class Place:
    """Where an example is in its source: a file, or a row of an array or of a part of a named data set.

    Attributes:
        file: Its path; empty for a row of an array.
        array: ``"y_train"`` of a ``.npz``, ``"train"`` of a named data set; empty for a file.
        row: Within the array, from 0; None for a file.

    Example:
        >>> str(Place(array="y_train", row=28)), str(Place("photos/cat/7.png"))
        ('y_train[28]', 'photos/cat/7.png')
    """

    file: str = ""
    array: str = ""
    row: int | None = None

    def __str__(self) -> str:
        return self.file or f"{self.array}[{self.row}]"


@dataclass(frozen=True, eq=False)
class Data(Result):
    """A data set in three parts that share no image.

    Attributes:
        name: Its name, or that of its folder or file.
        train: What to learn from: ``TensorImages``, or ``FolderImages`` when larger than memory.
        validation: What to choose by.
        test: What to report.
        classes: Name of each label; those of the training part.
        shape: (channels, height, width).
        mean: One value a channel, over the training part, of values scaled to [0, 1] (of the values as they
            are when the images are floats).
        std: Likewise; 1 for a channel that is constant.
        problems: Faults that do not keep the data from being used.
        source: Where the data comes from.
        split_off: Parts that the data had not, and that were split off the training part.
        arrays: For each part the name of the array or the part that ``rows`` of its images are rows of.
    """

    name: str
    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    problems: tuple[Problem, ...]
    source: str
    split_off: tuple[str, ...] = ()
    arrays: Mapping[str, str] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Images]:
        """The three parts by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def place(self, part: str, index: int) -> Place:
        """Where an example of a part is in what was loaded.

        Args:
            part: ``"train"``, ``"validation"`` or ``"test"``.
            index: Within the part.

        Raises:
            ValueError: If there is no such part.
            IndexError: If there is no such example.

        Example:
            >>> place = load("digits").place("train", 5)  # the rows before it may be in other parts
            >>> place.array, place.row >= 5
            ('train', True)
        """
        one_of("part", part, self.parts)
        images = self.parts[part]
        if not 0 <= index < len(images):
            raise IndexError(f"index must lie in 0..{len(images) - 1}, got {index}")
        if images.files is not None:
            return Place(images.files[index])
        if images.rows is None:
            return Place(array=part, row=index)
        return Place(array=self.arrays.get(part, part), row=int(images.rows[index]))

    def normalise(self) -> Normalise:
        """The layer that standardises images with the training part's statistics."""
        return Normalise(self.mean, self.std)

    def augmentation(self) -> Compose:
        """The default augmentation of this data set: :func:`netwright.data.augment.standard`."""
        return standard(self.shape, self.name, classes=self.classes, mean=self.mean)

    def fingerprint(self) -> str:
        """SHA-256 over the images and labels of all parts and the names of the classes, 64 hexadecimal digits.

        Whether the images lie in memory or on disk makes no difference.
        """
        contents = [part.digests().tobytes() + part.labels.numpy().tobytes() for part in self.parts.values()]
        return digest("data", list(self.classes), list(self.shape), *contents)

    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class in each part."""
        return {
            name: dict(zip(self.classes, np.bincount(p.labels, minlength=len(self.classes)).tolist(), strict=True))
            for name, p in self.parts.items()
        }

    def summary(self) -> str:
        """A few lines for a person: shape, sizes of the parts, statistics and problems."""
        counts = self.counts()["train"]
        ends = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        low, high = (f"{counts[name]} ({name})" for name in ends)
        spread = f"{min(counts.values())}" if len(set(counts.values())) == 1 else f"{low} to {high}"
        rows: list[list[object]] = [
            ["source", self.source],
            ["images", " + ".join(f"{len(part)} {name}" for name, part in self.parts.items())],
            ["shape", " x ".join(map(str, self.shape))],
            ["classes", f"{len(self.classes)}, of {spread} training images"],
            ["mean", ", ".join(f"{value:.4f}" for value in self.mean)],
            ["std", ", ".join(f"{value:.4f}" for value in self.std)],
        ]
        rows += [["note", problem.message] for problem in self.problems]
        return table(rows, ["data", self.name])

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images, JSON-able."""
        return {
            "name": self.name,
            "source": self.source,
            "shape": list(self.shape),
            "classes": list(self.classes),
            "counts": self.counts(),
            "mean": list(self.mean),
            "std": list(self.std),
            "problems": [vars(problem) for problem in self.problems],
            "fingerprint": self.fingerprint(),
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """One training picture of each class, the first 20 classes."""
        return draw(one_each(self.train, self.classes), ax)


def one_each(images: Images, classes: tuple[str, ...], limit: int = PICTURES_SHOWN) -> list[tuple[str, Tensor]]:
    """The first picture of each class that has one, for at most ``limit`` classes."""
    _, first = np.unique(images.labels.numpy(), return_index=True)
    return [(classes[int(images.labels[i])], images[int(i)][0]) for i in first[:limit]]


def draw(pictures: list[tuple[str, Tensor]], ax: Axes | None = None, *, columns: int = PER_LINE) -> Axes:
    """Draws named pictures in a grid, sequences as curves above each other.

    Args:
        pictures: Names, of one line or two, and pictures (channels, height, width).
        ax: Where; a new figure by default.
        columns: Pictures in a line of the grid.
    """
    columns = min(columns, max(1, len(pictures)))
    lines = -(-len(pictures) // columns)
    if pictures and min(pictures[0][1].shape[1:]) == 1:
        ax = new_axes(ax, size=(5.0, 0.4 * len(pictures) + 0.8))
        for i, (_, sequence) in enumerate(pictures):
            values = sequence.reshape(len(sequence), -1).T
            span = float(values.max() - values.min()) or 1.0
            ax.plot(0.8 * (values - values.min()) / span - i)
        ax.set_yticks([0.4 - i for i in range(len(pictures))], [label for label, _ in pictures])
        return ax
    ax = new_axes(ax, size=(1.1 * columns, 1.1 * lines + 0.1))
    for i, (label, picture) in enumerate(pictures):
        line, column = divmod(i, columns)
        low, high = min(0.0, float(picture.min())), max(1.0, float(picture.max()))
        shown = ((picture - low) / (high - low)).permute(1, 2, 0).numpy()
        shown = shown if shown.shape[2] == 3 else shown[:, :, 0]
        height, width = (0.39 * side / max(shown.shape[:2]) for side in shown.shape[:2])
        x, y = column + 0.5, -line - 0.6
        ax.imshow(shown, cmap="gray", vmin=0, vmax=1, extent=(x - width, x + width, y - height, y + height))
        name = "\n".join(part[:14] for part in label.split("\n"))
        ax.text(x, -line - 0.1, name, ha="center", va="center", fontsize=7, parse_math=False)
    ax.set_xlim(0, columns)
    ax.set_ylim(-max(1, lines), 0)
    ax.set_axis_off()
    return ax


def channel_statistics(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, 1 for a constant one, of values scaled to [0, 1]."""
    mean, square = images.moments()
    deviation = np.sqrt(np.clip(square - mean**2, 0, None))
    return tuple(mean.tolist()), tuple(np.where(deviation < CONSTANT_BELOW, 1.0, deviation).tolist())


def load(
    name_or_path: str | os.PathLike[str],
    *,
    seed: int = 0,
    download: bool = False,
    skip_broken: bool = False,
    drop_unknown: bool = False,
    size: tuple[int, int] | None = None,
    root: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
) -> Data:
    """Loads a data set by its name or its path.

    Without a test part, 20 % become it; without a validation part, 10 % of the training part become it; both
    stratified and by ``seed``, copies of one image always staying together. Nothing is downloaded unless
    asked for.

    Args:
        name_or_path: ``digits``, ``mnist-5000``, ``mnist1d``, ``fashion-mnist``, ``cifar10``, ``cifar100``;
            ``aeon:NAME`` for time series (see :mod:`netwright.data.sequences`); ``coloured-mnist-5000`` and others with
            a known bias (see :mod:`netwright.data.biased`); else a folder of class folders (see
            :mod:`netwright.data.folder`), a folder of MNIST's idx files or of CIFAR's batches, or a ``.npz`` (see
            :mod:`netwright.data.arrays`). Write ``./digits`` for a folder called so.
        seed: Seed of the splits.
        download: Allows torchvision to download what is not on this machine.
        skip_broken: Leaves out files that cannot be read.
        drop_unknown: Leaves out images of classes that the training part does not have.
        size: (height, width) that a folder's images are resized to.
        root: The data folder for downloads, by default ``data`` in the cache (``NETWRIGHT_CACHE``).
        memory_limit: Bytes above which a folder's images stay on disk; by default 40 % of the available
        memory.

    Raises:
        UserError: If the data is missing, damaged, or such that a run on it would be worth nothing.
        ValueError: If ``size`` or ``memory_limit`` is out of its range.

    Example:
        >>> data = load("digits")
        >>> len(data.train), len(data.validation), len(data.test), data.shape
        (1294, 144, 359, (1, 8, 8))
    """
    how = Reading(download=download, skip_broken=skip_broken, size=size, root=root, memory_limit=memory_limit)
    parts = read(name_or_path, how)
    parts.number_rows()
    problems = parts.problems + class_problems(parts, drop_unknown=drop_unknown)
    refuse(problems)
    parts.drop_unknown()
    digests = {part: images.digests() for part, images in parts.images.items()}
    problems += duplicate_problems(parts, digests)
    return _split(parts, problems, group_keys(digests["train"]), seed)


def _split(parts: Parts, problems: list[Problem], groups: np.ndarray, seed: int) -> Data:
    images, split_off = dict(parts.images), []
    for part, share in (("test", TEST_SHARE), ("validation", VALIDATION_SHARE)):
        if part in images and len(images[part]) > 0:
            continue
        try:
            rest, held = split_train(images["train"].labels, share, seed, groups=groups, name=part)
        except ValueError as error:
            raise UserError(
                f"too few different images to split off a {part} part: {len(images['train'])}",
                where=parts.where("train"),
                cure=f"add images, or give a {part} part",
            ) from error
        images["train"], images[part] = images["train"].subset(rest), images["train"].subset(held)
        groups = groups[rest.numpy()]
        split_off.append(part)
    mean, std = channel_statistics(images["train"])
    train, validation, test = (images[part] for part in PARTS)
    return Data(
        name=parts.name,
        train=train,
        validation=validation,
        test=test,
        classes=parts.classes,
        shape=train.shape,
        mean=mean,
        std=std,
        problems=tuple(problems),
        source=parts.source,
        split_off=tuple(split_off),
        arrays={part: parts.places["train" if part in split_off else part] for part in PARTS},
    )
