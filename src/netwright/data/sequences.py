"""Sequences as data sets: images read pixel by pixel, and time series of the UCR and UEA archives through aeon.

A sequence is an image of one row: channels are the numbers at each time, the width is the length. So splits, checks,
batches and training take it as they take images, and a sequence model reads it row by row. Time series are named
``aeon:NAME`` wherever a data set is named; those that ship with aeon need no network, the others ``--download``.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional

from netwright.console import UserError, nearest
from netwright.data.parts import Parts
from netwright.data.sources import SERIES_PREFIX, allowed_download, data_home, parts_of, tensor_images
from netwright.data.tensors import Images, TensorImages
from netwright.seeding import stream

if TYPE_CHECKING:
    from netwright.data.loading import Data

CURE = 'install it with: pip install "netwright[series]"'
SOURCE_PARTS = {"train": "TRAIN", "test": "TEST"}


def as_sequences(data: Data, *, pool: int = 1, permutation_seed: int | None = None) -> Data:
    """Images as sequences of their pixels, row after row: shape (channels, 1, height x width).

    Sequential MNIST is ``as_sequences(load("mnist-5000"))``, permuted MNIST the same with a ``permutation_seed``.

    Args:
        data: Images in memory.
        pool: Side of the squares of pixels that are replaced by their mean, >= 1; a rest at the right and the bottom
            is left out.
        permutation_seed: Seed of one order of the pixels for all images; None keeps rows together.

    Raises:
        ValueError: If ``pool`` is below 1 or larger than the images.
        UserError: If the images are on disk.

    Example:
        >>> from netwright.data import load
        >>> as_sequences(load("digits"), pool=2).shape
        (1, 1, 16)
    """
    from netwright.data.loading import channel_statistics

    channels, height, width = data.shape
    if not 1 <= pool <= min(height, width):
        raise ValueError(f"pool must lie in 1..{min(height, width)}, got {pool}")
    length = (height // pool) * (width // pool)

    def rows(part: Images) -> TensorImages:
        if not isinstance(part, TensorImages):
            raise UserError(
                f"{data.name} is too large to be read as sequences: its images are on disk",
                cure="load it with a smaller size, or a larger memory_limit",
            )
        return pixel_rows(part, pool=pool, permutation_seed=permutation_seed)

    train, validation, test = (rows(part) for part in (data.train, data.validation, data.test))
    mean, std = channel_statistics(train)
    return dataclasses.replace(
        data,
        name=f"{data.name} as sequences",
        train=train,
        validation=validation,
        test=test,
        shape=(channels, 1, length),
        mean=mean,
        std=std,
    )


def pixel_rows(part: TensorImages, *, pool: int = 1, permutation_seed: int | None = None) -> TensorImages:
    """The images of one part as images of one row; arguments as for :func:`as_sequences`.

    Example:
        >>> part = TensorImages(torch.zeros(2, 3, 8, 6, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> pixel_rows(part, pool=2).shape
        (3, 1, 12)
    """
    images = part.images
    if pool > 1:
        images = functional.avg_pool2d(images.float(), pool)
        images = images.round().byte() if part.images.dtype == torch.uint8 else images
    flat = images.flatten(2)
    if permutation_seed is not None:
        flat = flat[:, :, torch.randperm(flat.shape[2], generator=stream(permutation_seed, "pixels"))]
    return TensorImages(flat[:, :, None].contiguous(), part.labels, files=part.files, rows=part.rows)


def series_names() -> tuple[str, ...]:
    """The classification problems that ship with aeon and can be loaded; none where it is not installed.

    Example:
        >>> all(name.isidentifier() for name in series_names())
        True
    """
    folder = _bundled()
    if folder is None:
        return ()
    found = {path.name: _files(folder, path.name) for path in folder.iterdir()}
    return tuple(sorted(name for name, files in found.items() if files and _usable(files["train"])))


def _usable(path: Path) -> bool:
    """Whether the head of a file says: classes, and series of one length."""
    head = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.lower().startswith("@data"):
                break
            head += line.lower()
    return re.search(r"^@classlabel\s+true", head, re.M) is not None and "@equallength false" not in head


def read_series(name: str, root: Path | None, download: bool) -> Parts:
    """Training and test part of a classification problem of the archives, as aeon's files have them.

    Args:
        name: The archive's name of it, ``"BasicMotions"``.
        root: The data folder; that of the cache by default.
        download: Whether aeon may fetch what is not on this machine.

    Raises:
        UserError: If aeon is missing, nothing is called so, or the series are of different lengths, have gaps, or are
            no classification problem.
    """
    bundled = _bundled()
    if bundled is None:
        raise UserError(f"{SERIES_PREFIX}{name} needs aeon, which is not installed", cure=CURE)
    if not name.isidentifier():
        raise UserError(f"no series can be called {name!r}", cure=nearest(name, series_names()))
    home = data_home(root) / "aeon"
    files = _files(bundled, name) or _files(home, name)
    if files is None and download:
        allowed_download(name, lambda: _fetch(name, home))
        files = _files(home, name)
    if files is None:
        raise UserError(
            f"the series {name!r} are not on this machine",
            where=home / name,
            cure=f"add --download, or {nearest(name, series_names())}",
        )
    found = {part: _read(path) for part, path in files.items()}
    lengths = {values.shape[1:] for values, _ in found.values()}
    if len(lengths) > 1:
        raise UserError(f"training and test series differ in shape: {sorted(lengths)}", where=files["train"])
    classes = sorted(set(found["train"][1]))
    further = sorted(set(found["test"][1]) - set(classes))
    number = {label: i for i, label in enumerate([*classes, *further])}
    images: dict[str, Images] = {
        part: tensor_images(values[:, :, None].astype(np.float32), np.array([number[label] for label in labels]))
        for part, (values, labels) in found.items()
    }
    parts = parts_of(f"{SERIES_PREFIX}{name}", str(files["train"].parent), images, tuple(number))
    parts.known = len(classes)
    return parts


def _bundled() -> Path | None:
    """The folder of data inside aeon, without importing it."""
    import importlib.util

    found = importlib.util.find_spec("aeon")
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "datasets" / "data"


def _files(folder: Path, name: str) -> dict[str, Path] | None:
    paths = {part: folder / name / f"{name}_{suffix}.ts" for part, suffix in SOURCE_PARTS.items()}
    return paths if all(path.is_file() for path in paths.values()) else None


def _fetch(name: str, home: Path) -> None:
    from aeon.datasets import load_classification

    home.mkdir(parents=True, exist_ok=True)
    load_classification(name, extract_path=str(home))


def _read(path: Path) -> tuple[np.ndarray, list[str]]:
    """Values (examples, channels, length) and the label of each."""
    from aeon.datasets import load_from_ts_file

    try:
        values, labels, facts = load_from_ts_file(str(path), return_meta_data=True)
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"damaged file of series: {error}", where=path, cure="delete it and load it again") from error
    told: dict[str, Any] = dict(facts)
    if not told.get("classlabel", True):
        raise UserError("these series have numbers to predict, and no classes", where=path)
    if not isinstance(values, np.ndarray) or values.ndim != 3:
        lengths = sorted({one.shape[-1] for one in values})
        raise UserError(f"the series are of different lengths, {lengths[0]} to {lengths[-1]}", where=path)
    if not np.isfinite(values).all():
        raise UserError(f"{int((~np.isfinite(values)).any((1, 2)).sum())} series have gaps", where=path)
    return values, [str(label) for label in labels]
