"""Arrays in a ``.npz`` file, and the idx files of the MNIST family.

A ``.npz`` holds ``x`` and ``y``, or ``x_train``, ``y_train`` and, where they exist, ``x_test``, ``y_test``,
``x_val``, ``y_val``; ``classes`` may name the labels. Shapes: (N, H, W), (N, H, W, C) or (N, C, H, W). The
axis of 1, 3 or 4 is the channels, the last one when both could be; failing that the smaller one. Values:
floats stay as they are (float32); booleans become 0 and 255; whole numbers within 0..255 become uint8; larger
uint16 become round(255 v / 65535).
"""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from netwright.console import UserError
from netwright.data.parts import PARTS, Parts
from netwright.data.problems import Problem, refusal
from netwright.data.tensors import Images, TensorImages

SUFFIXES = {"train": ("train",), "validation": ("val", "valid", "validation"), "test": ("test",)}
CHANNELS = frozenset({1, 3, 4})


def read_npz(path: Path) -> Parts:
    """Reads a ``.npz`` file, never a pickle.

    Raises:
        UserError: If the file is damaged, an array is missing, of a wrong shape or type, or lengths differ.
    """
    arrays = _arrays(path)
    pairs = _pairs(arrays, path)
    problems: list[Problem] = []
    for _, x_name, _ in pairs:
        _check_values(arrays[x_name], x_name, path, problems)
    labels = {part: _labels(arrays[y_name], y_name, path, len(arrays[x_name])) for part, x_name, y_name in pairs}
    names = {x_name: arrays[x_name] for _, x_name, _ in pairs}
    pixels = _pixels(names, path, problems)
    y_train = labels["train"]
    top = int(y_train.max())
    gaps = sorted(set(range(top)) - set(y_train.tolist()))
    if gaps:
        shown = ", ".join(map(str, gaps[:10])) + (" ..." if len(gaps) > 10 else "")
        cure = "number the classes afresh: y = numpy.unique(y, return_inverse=True)[1]"
        message = f"{pairs[0][2]} has labels up to {top} but none of {shown}"
        problems.append(refusal("labels with gaps", message, path, cure))
    highest = max(int(values.max()) for values in labels.values())
    classes = _class_names(arrays.get("classes"), highest + 1, path)
    images: dict[str, Images] = {
        part: TensorImages(torch.from_numpy(pixels[x_name]), torch.from_numpy(labels[part]))
        for part, x_name, _ in pairs
    }
    places = {part: y_name for part, _, y_name in pairs}
    sizes = Counter({part.shape[1:]: 0 for part in images.values()})
    for part in images.values():
        sizes[part.shape[1:]] += len(part)
    return Parts(path.stem, str(path), images, classes, top + 1, places, problems, sizes)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    cure = "write it with numpy.savez_compressed(path, x=images, y=labels)"
    try:
        archive = np.load(path, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise UserError("not a .npz file: it holds a single array", where=path, cure=cure)
        with archive:
            return {name: archive[name] for name in archive.files}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, AttributeError) as error:
        if "Object arrays" in str(error) or "allow_pickle" in str(error):
            raise UserError(
                "it holds Python objects or is no .npz file; only plain arrays are read",
                where=path,
                cure=cure,
            ) from error
        raise UserError(f"not a readable .npz file: {error}", where=path, cure=cure) from error


def _pairs(arrays: dict[str, np.ndarray], path: Path) -> list[tuple[str, str, str]]:
    """(part, name of the images, name of the labels), training first."""
    found = []
    if "x_train" in arrays or "y_train" in arrays:
        for part in PARTS:
            for suffix in SUFFIXES[part]:
                if f"x_{suffix}" in arrays or f"y_{suffix}" in arrays:
                    found.append((part, f"x_{suffix}", f"y_{suffix}"))
        if "x" in arrays:
            raise UserError("both x and x_train are there", where=path, cure="keep one of the two")
    else:
        found.append(("train", "x", "y"))
    if len({part for part, _, _ in found}) < len(found):
        raise UserError("the validation part is there twice", where=path, cure="keep one of x_val and x_validation")
    for _, x_name, y_name in found:
        for name, what in ((x_name, "images"), (y_name, "labels")):
            if name not in arrays:
                there = ", ".join(sorted(arrays)) or "nothing"
                raise UserError(
                    f"{what} are missing: there is no array {name}, only {there}",
                    where=path,
                    cure=f"add {name}",
                )
    return found


def _check_values(x: np.ndarray, name: str, path: Path, problems: list[Problem]) -> None:
    if x.ndim not in {3, 4}:
        shapes = "(N, H, W), (N, H, W, C) or (N, C, H, W)"
        raise UserError(f"{name} must have shape {shapes}, got {x.shape}", where=path, cure=f"reshape {name}")
    if x.size == 0:
        raise UserError(f"{name} holds no images: its shape is {x.shape}", where=path, cure="fill it")
    if x.dtype.kind not in "biuf":
        raise UserError(f"{name} must hold numbers, got {x.dtype}", where=path, cure="convert it to uint8 or float32")
    if x.dtype.kind == "f":
        bad = ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))
        if bad.any():
            message = f"{name} has NaN or infinity in {int(bad.sum())} of {len(x)} images"
            message += f", first in number {int(bad.argmax())}"
            problems.append(refusal("not finite", message, path, "repair these images or take them away"))


def _labels(y: np.ndarray, name: str, path: Path, count: int) -> np.ndarray:
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        cure = f"give the class numbers: {name}.argmax(1)" if y.ndim == 2 else "give one whole number an image"
        raise UserError(f"{name} must have shape (N,), got {y.shape}", where=path, cure=cure)
    if len(y) != count:
        x_name = f"x{name[1:]}"
        raise UserError(
            f"{x_name} has {count} images but {name} has {len(y)} labels", where=path, cure="make them agree"
        )
    whole = y.dtype.kind in "biu" or (y.dtype.kind == "f" and bool(np.isfinite(y).all() and (y == np.floor(y)).all()))
    if not whole:
        cure = "number the classes: y = numpy.unique(y, return_inverse=True)[1]"
        raise UserError(f"{name} must hold whole numbers, got {y.dtype} such as {y[0]!s}", where=path, cure=cure)
    if (y < 0).any():
        raise UserError(f"{name} must be >= 0, got {int(y.min())}", where=path, cure="number the classes from 0")
    if float(y.max()) > 1_000_000:
        raise UserError(
            f"{name} must hold class numbers, got {int(y.max())}",
            where=path,
            cure="number the classes from 0",
        )
    return y.astype(np.int64)


def _pixels(arrays: dict[str, np.ndarray], path: Path, problems: list[Problem]) -> dict[str, np.ndarray]:
    """Every array as (N, C, H, W), uint8 or float32, all by the same rule."""
    first = next(iter(arrays))
    axis = _channel_axis(arrays[first].shape, first, path, problems)
    kinds = {x.dtype.kind for x in arrays.values()}
    values = dict(arrays)
    if "f" in kinds:
        values = {name: x.astype(np.float32) for name, x in values.items()}
    elif kinds == {"b"}:
        values = {name: x.astype(np.uint8) * np.uint8(255) for name, x in values.items()}
    else:
        low, high = min(int(x.min()) for x in values.values()), max(int(x.max()) for x in values.values())
        if low < 0 or (high > 255 and any(x.dtype != np.uint16 for x in values.values())):
            cure = "scale them to uint8, or to float32"
            raise UserError(f"{first} must hold pixels in 0..255, got {low}..{high}", where=path, cure=cure)
        if high > 255:
            values = {name: (x.astype(np.uint32) * 255 + 32767) // 65535 for name, x in values.items()}
        values = {name: x.astype(np.uint8) for name, x in values.items()}
    shaped = {}
    for name, x in values.items():
        if x.shape[1:] != arrays[first].shape[1:]:
            message = f"{first} holds images of {arrays[first].shape[1:]} but {name} of {x.shape[1:]}"
            raise UserError(message, where=path, cure="make them agree")
        shaped[name] = np.ascontiguousarray(x[:, None] if axis is None else np.moveaxis(x, axis, 1))
    return shaped


def _channel_axis(shape: tuple[int, ...], name: str, path: Path, problems: list[Problem]) -> int | None:
    if len(shape) == 3:
        return None
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first and last and shape[1] != shape[3]:
        message = f"{name} of shape {shape} could be (N, H, W, C) or (N, C, H, W); read as (N, H, W, C)"
        problems.append(Problem("ambiguous shape", message, str(path), False, "use another size if that is wrong"))
    if last:
        return 3
    if first:
        return 1
    if shape[1] == shape[3]:
        cure = "use (N, H, W, C) or (N, C, H, W)"
        raise UserError(f"{name} of shape {shape} does not show which axis is the channels", where=path, cure=cure)
    return 1 if shape[1] < shape[3] else 3


def _class_names(names: Any, count: int, path: Path) -> tuple[str, ...]:
    if names is None:
        return tuple(str(label) for label in range(count))
    texts = tuple(str(name) for name in np.ravel(names))
    if len(texts) < count or len(set(texts)) < len(texts):
        message = f"classes must name {count} labels, each differently, got {len(set(texts))} different names"
        raise UserError(message, where=path, cure="give one name for each label")
    return texts[:count]


IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def find_idx(folder: Path) -> dict[str, tuple[Path, Path]] | None:
    """The four idx files of a folder, plain or ``.gz``; nothing when one is missing."""
    found = {}
    for part, names in IDX_FILES.items():
        paths = [p for name in names for p in (folder / name, folder / f"{name}.gz") if p.is_file()]
        wanted = {p.name.removesuffix(".gz"): p for p in reversed(paths)}
        if len(wanted) < len(names):
            return None
        found[part] = (wanted[names[0]], wanted[names[1]])
    return found


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes.

    Raises:
        UserError: If the file is damaged.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = data[3]
        shape = tuple(np.frombuffer(data, ">u4", axes, 4).tolist())
        if data[:3] != b"\x00\x00\x08" or len(data) != 4 + 4 * axes + math.prod(shape):
            raise ValueError("its length and its header disagree")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"damaged idx file: {error}", where=path, cure="install or download it again") from error


def read_idx_folder(found: dict[str, tuple[Path, Path]], name: str, classes: tuple[str, ...] | None = None) -> Parts:
    """The two parts of an MNIST-like folder.

    Raises:
        UserError: If a file is damaged or images and labels differ in number.
    """
    images: dict[str, Images] = {}
    for part, (image_path, label_path) in found.items():
        x, y = read_idx(image_path), read_idx(label_path)
        if x.ndim != 3 or y.shape != x.shape[:1] or len(y) == 0:
            message = f"{x.shape} images and {y.shape} labels do not belong together"
            raise UserError(message, where=image_path, cure="install or download them again")
        images[part] = TensorImages(torch.from_numpy(x[:, None]), torch.from_numpy(y.astype(np.int64)))
    known = int(images["train"].labels.max()) + 1
    count = max(known, int(images["test"].labels.max()) + 1)
    names = classes if classes is not None and len(classes) >= count else tuple(map(str, range(count)))
    sizes = Counter({images["train"].shape[1:]: sum(map(len, images.values()))})
    folder = found["train"][0].parent
    return Parts(
        name,
        str(folder),
        images,
        names,
        max(known, len(names)),
        {"train": "train", "test": "test"},
        sizes=sizes,
    )
