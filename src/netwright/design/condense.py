"""A user's data made smaller, by dataset quantization, and written as data that ``netwright design`` accepts.

Zhou et al., "Dataset Quantization", ICCV 2023, arXiv:2308.10524. Only the training part is condensed: validation and
test parts are written whole, so that figures can be compared with those of the whole data.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from netwright import storage
from netwright.console import UserError, nearest, note
from netwright.data import Data, load, write_folder
from netwright.data.condense import DatasetQuantizer, penultimate_features
from netwright.data.folder import copy_files
from netwright.data.tensors import Batches, Images, TensorImages
from netwright.design.condense_page import page
from netwright.results import Result
from netwright.seeding import seeded

if TYPE_CHECKING:
    from collections.abc import Mapping

FEATURES = ("trained", "pixels")
EPOCHS, BATCH = 3, 64
CHANNELS, HIDDEN = (32, 64), 64


@dataclasses.dataclass(frozen=True)
class Condensed(Result):
    """What was kept of a data set.

    Attributes:
        data: The data.
        out: Where the smaller data are.
        examples: Training examples there were.
        kept: Training examples that are left.
        ratio: The share that was asked for.
        bins: Number of bins.
        features: What examples were compared by.
        seed: Of splits, training and drawing.
        counts: Training examples that are left of each class.
        feature_seconds: Wall time of making features.
        selection_seconds: Wall time of bins and drawing.
        report: The page about it; empty before it is written.
    """

    data: str
    out: str
    examples: int
    kept: int
    ratio: float
    bins: int
    features: str
    seed: int
    counts: dict[str, int]
    feature_seconds: float
    selection_seconds: float
    report: str = ""


def condense(
    data: str,
    out: str | Path,
    *,
    keep: float,
    features: str = "trained",
    n_bins: int = 10,
    seed: int = 0,
    skip_broken: bool = False,
    drop_unknown: bool = False,
    download: bool = False,
) -> Condensed:
    """Keeps a share of the training part, and writes it with the other parts.

    A folder of image files is copied file by file; other data become PNG files in class folders, or arrays when ``out``
    ends in ``.npz``. ``condensed.json`` beside them tells which examples were kept, and ``report.html`` shows them
    (``NAME.json`` and ``NAME-report.html`` beside ``NAME.npz``).

    Args:
        data: As for :func:`netwright.data.load`.
        out: A folder that does not exist or is empty, or an ``.npz`` file that does not exist.
        keep: Share of the training examples, in (0, 1].
        features: ``"trained"``, what a small network sees before it classifies after three epochs on the whole training
            part; ``"pixels"``; or a ``.npy`` file with a row for each example of ``load(data, seed=seed).train``.
        n_bins: Number of bins.
        seed: Of splits, training and drawing.
        skip_broken: As for :func:`netwright.data.load`.
        drop_unknown: Likewise.
        download: Likewise.

    Raises:
        UserError: If the data cannot be read, something is there already, or an argument is out of its range.
    """
    target = Path(out)
    if not 0 < keep <= 1:
        raise UserError(f"keep must lie in (0, 1], got {keep}", cure="ask for --keep 0.2")
    for name, value, least in (("bins", n_bins, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} must be >= {least}, got {value}")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise UserError("something is there already", where=target, cure="choose another --out")
    found = load(data, seed=seed, skip_broken=skip_broken, drop_unknown=drop_unknown, download=download)
    write = _writer(target, found)
    start = time.monotonic()
    rows = _features(features, found, seed)
    made = time.monotonic()
    try:
        quantizer = DatasetQuantizer(n_bins=n_bins, ratio=keep, random_state=seed).fit(rows, found.train.labels)
        chosen = quantizer.indices()
    except ValueError as error:
        raise UserError(str(error), where=data, cure="keep more, or give other bins or features") from error
    selected = time.monotonic()
    smaller = found.train.subset(torch.from_numpy(chosen))
    write({"train": smaller, "validation": found.validation, "test": found.test})
    counts = np.bincount(smaller.labels.numpy(), minlength=len(found.classes)).tolist()
    result = Condensed(
        data=data,
        out=str(target),
        examples=len(found.train),
        kept=len(chosen),
        ratio=keep,
        bins=n_bins,
        features=features,
        seed=seed,
        counts=dict(zip(found.classes, counts, strict=True)),
        feature_seconds=round(made - start, 2),
        selection_seconds=round(selected - made, 2),
    )
    arrays = target.suffix == ".npz"
    record = target.with_suffix(".json") if arrays else target / "condensed.json"
    storage.write_json(record, {**result.to_dict(), "indices": chosen.tolist()})
    told = page(result, found, rows, quantizer.bins_, chosen)
    report = told.write(target.parent, f"{target.stem}-report") if arrays else told.write(target)
    return dataclasses.replace(result, report=str(report))


def _features(name: str, data: Data, seed: int) -> Tensor | np.ndarray:
    if name == "trained":
        return _trained(data, seed)
    if name == "pixels":
        return torch.cat([x.flatten(1) for x, _ in _in_order(data)])
    if not name.endswith(".npy"):
        raise UserError(f"unknown features {name!r}", cure=f"{nearest(name, FEATURES)}, or a .npy file")
    try:
        rows = np.load(name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"not a NumPy file: {error}", where=name, cure="write it with numpy.save") from error
    if rows.ndim != 2 or len(rows) != len(data.train) or rows.dtype.kind not in "iuf":
        told = f"features must be {len(data.train)} rows of numbers, one for each training example"
        raise UserError(f"{told}, got {rows.dtype} of {rows.shape}", where=name)
    return rows


def _in_order(data: Data) -> Batches:
    return Batches(data.train, 500, shuffle=False, drop_last=False, normalise=data.normalise())


def _trained(data: Data, seed: int) -> Tensor:
    from netwright.nn.convnet import SmallConvNet
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    with seeded(seed, "init", "condense"):
        network = SmallConvNet(CHANNELS, HIDDEN, len(data.classes), data.shape[0], grid=2)
    batches = Batches(data.train, BATCH, seed=seed, normalise=data.normalise(), name="condense")
    fit(
        Classifier(network, lr=0.05),
        batches,
        epochs=EPOCHS,
        callbacks=[CosineProgress()],
        seed=seed,
        description="features",
    )
    note(f"  a network of {sum(p.numel() for p in network.parameters())} parameters compares the examples")
    return penultimate_features(network, _in_order(data))


def _writer(target: Path, data: Data) -> Callable[[Mapping[str, Images]], None]:
    """What writes the parts; refuses before any work is done what it could not write in the end."""
    tensors = {name: part for name, part in data.parts.items() if isinstance(part, TensorImages)}
    if target.suffix == ".npz":
        if len(tensors) < len(data.parts):
            raise UserError("the images do not fit into memory", where=data.source, cure="let --out be a folder")
        return lambda parts: _write_npz(target, parts, data)
    if all(part.files is not None for part in data.parts.values()):
        return lambda parts: copy_files(target, parts, data.classes)
    if any(part.images.dtype != torch.uint8 or data.shape[0] not in {1, 3} for part in tensors.values()):
        raise UserError("these data are no pictures", where=data.source, cure="let --out end in .npz")
    return lambda parts: write_folder(target, dict(parts), data.classes)  # type: ignore[arg-type]  # all in memory here


def _write_npz(target: Path, parts: Mapping[str, Images], data: Data) -> None:
    arrays: dict[str, np.ndarray] = {"classes": np.array(data.classes)}
    for name, suffix in (("train", "train"), ("validation", "val"), ("test", "test")):
        part = parts[name]
        assert isinstance(part, TensorImages)
        arrays[f"x_{suffix}"] = part.images.permute(0, 2, 3, 1).numpy()
        arrays[f"y_{suffix}"] = part.labels.numpy()
    storage.write_arrays(target, arrays)
