"""What a finished run is used for: predicting images, measuring it on labelled data, and taking it elsewhere."""

from __future__ import annotations

import dataclasses
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netwright import metrics, storage
from netwright.console import UserError, nearest, table
from netwright.design.measure import wilson
from netwright.design.model import RunModel, load_run
from netwright.results import Result

if TYPE_CHECKING:
    from netwright.design.benchmark import Opened

CHUNK = 256
FORMATS = ("onnx", "safetensors", "c", "netwright")


@dataclasses.dataclass(frozen=True)
class Evaluation(Result):
    """A network on labelled data.

    Attributes:
        data: The data.
        images: How many.
        accuracy: Share of right answers, in [0, 1].
        low, high: Wilson's 95 % interval of it.
        nll: Mean negative log-likelihood, nats.
        ece: Expected calibration error, percent.
    """

    data: str
    images: int
    accuracy: float
    low: float
    high: float
    nll: float
    ece: float


@dataclasses.dataclass(frozen=True)
class Predictions(Result):
    """The most probable class of each image.

    Attributes:
        files: What was looked at.
        classes: The most probable class of each.
        probabilities: Its probability, in [0, 1].
    """

    files: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        rows = zip(self.files, self.classes, (f"{p:.3f}" for p in self.probabilities), strict=True)
        return table([list(row) for row in rows], ["image", "class", "probability"])


@dataclasses.dataclass(frozen=True)
class Exported(Result):
    """A network that was written for use elsewhere.

    Attributes:
        network: Which one.
        format: One of ``FORMATS``.
        files: What was written.
        bytes: Size of all of it.
    """

    network: str
    format: str
    files: tuple[str, ...]
    bytes: int


def evaluate_run(
    run: str | Path, data: str | None = None, *, skip_broken: bool = False, download: bool = False
) -> Evaluation:
    """Measures a run's network on labelled data: the test part of the run's own, or other data with the same classes.

    Of other data the test part is measured, and every image where they have none.

    Raises:
        UserError: If the run is not finished, the data cannot be read, or have a class that the network does not know.
    """
    from netwright.data import load, names
    from netwright.design.run import RunFolder

    folder = RunFolder(run)
    model = load_run(folder.path)
    options = folder.described()["options"]
    drop_unknown = False
    if data is None:
        data, drop_unknown = options["data"], options["drop_unknown"]
        skip_broken, download = skip_broken or options["skip_broken"], download or options["download"]
    _, height, width = model.architecture.shape
    # Only images in files can be resized; the run's own seed keeps its training images out of the test part.
    files = str(data) not in names() and Path(data).expanduser().is_dir()
    found = load(
        data,
        seed=options["seed"],
        size=(height, width) if files else None,
        skip_broken=skip_broken,
        drop_unknown=drop_unknown,
        download=download,
    )
    if found.shape[1:] != (height, width):
        raise UserError(
            f"the images are {found.shape[1]} x {found.shape[2]}, the network takes {height} x {width}",
            where=data,
            cure="resize them, or give a folder of image files, which are resized here",
        )
    unknown = [name for name in found.classes if name not in model.classes]
    if unknown:
        raise UserError(
            f"the network does not know the class {unknown[0]!r}",
            where=data,
            cure=f"its classes: {', '.join(model.classes)}",
        )
    place = torch.tensor([model.classes.index(name) for name in found.classes])
    # Training images stay out: the run's own data are known by their path, or by their content when they were moved.
    own = str(data) == options["data"] or found.fingerprint() == folder.read("data.json")["fingerprint"]
    measured = [found.test] if own or "test" not in found.split_off else list(found.parts.values())
    probs, labels = [], []
    for part in (
        whole.subset(torch.arange(start, min(start + CHUNK, len(whole))))
        for whole in measured
        for start in range(0, len(whole), CHUNK)
    ):
        images = part.images if hasattr(part, "images") else torch.stack([part[i][0] for i in range(len(part))])
        probs.append(probabilities(model, images))
        labels.append(place[part.labels])
    p, y = torch.cat(probs), torch.cat(labels)
    share = metrics.accuracy(p, y)
    low, high = wilson(share, len(y))
    return Evaluation(str(data), len(y), share, low, high, metrics.nll(p, y), metrics.expected_calibration_error(p, y))


@torch.inference_mode()
def probabilities(model: RunModel, images: Tensor) -> Tensor:
    """Class probabilities of images of 0..255 or floats in [0, 1]; grey and colour become what the network takes."""
    wanted = model.architecture.shape[0]
    if images.shape[1] != wanted:
        if images.shape[1] == 3 and wanted == 1:
            weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
            grey = (images.float() * weights).sum(1, keepdim=True)
            images = grey.round().to(torch.uint8) if images.dtype == torch.uint8 else grey
        elif images.shape[1] == 1:
            images = images.expand(-1, wanted, -1, -1)
        else:
            raise UserError(f"images have {images.shape[1]} channels, the network takes {wanted}")
    return model(images).softmax(1)


def predict_files(run: str | Path, files: Sequence[str | Path]) -> Predictions:
    """The class of each image file, or of each image in ``.npy`` and ``.npz`` files (key ``images`` or the first).

    Raises:
        UserError: If a file is missing, no image, or of a shape that the network cannot take.
    """
    model = load_run(run)
    names: list[str] = []
    parts: list[Tensor] = []
    for file in map(Path, files):
        images = images_of(file, model)
        names += [str(file)] if len(images) == 1 else [f"{file}[{i}]" for i in range(len(images))]
        parts += [probabilities(model, part) for part in images.split(CHUNK)]
    best = torch.cat(parts).max(1)
    return Predictions(
        tuple(names),
        tuple(model.classes[i] for i in best.indices.tolist()),
        tuple(round(p, 6) for p in best.values.tolist()),
    )


def images_of(file: Path, model: RunModel) -> Tensor:
    """The images in a file as a network takes them, (number, channels, height, width): uint8, or floats.

    Raises:
        UserError: As :func:`predict_files`.
    """
    if not file.is_file():
        raise UserError("no such file", where=file)
    return _arrays(file, model) if file.suffix in (".npy", ".npz") else _picture(file, model)


def _picture(file: Path, model: RunModel) -> Tensor:
    from netwright.data.pictures import UnreadableError, decode

    channels, height, width = model.architecture.shape
    if not model.architecture.picture:
        raise UserError("the network was not trained on pictures", where=file, cure="give its input as .npy")
    try:
        return torch.from_numpy(decode(str(file), (channels, height, width)).copy())[None]
    except UnreadableError as error:
        raise UserError(f"not a readable image: {error}", where=file) from error


def _arrays(file: Path, model: RunModel) -> Tensor:
    array = read_array(file)
    given = array.shape
    channels, height, width = model.architecture.shape
    if array.ndim == 3 and array.shape[1:] == (height, width):
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1:3] == (height, width) and array.shape[-1] in (1, 3, channels):
        array = array.transpose(0, 3, 1, 2)
    if (
        array.ndim != 4
        or array.shape[2:] != (height, width)
        or array.shape[1] not in (1, 3, channels)
        or not len(array)
    ):
        raise UserError(
            f"images must be (number, {height}, {width}, channels), got {given}",
            where=file,
            cure="resize them, or give image files",
        )
    kind: type[np.float32 | np.uint8]
    if array.dtype.kind == "f":
        limit, kind = (1.0 if model.architecture.picture else np.inf), np.float32
    else:
        limit, kind = 255, np.uint8
    low, high = (array.min(), array.max()) if array.dtype.kind in "fiu" else (np.nan, np.nan)
    # Written so that a NaN is refused as well; floats that are no picture may be negative.
    if not (np.isfinite(low) and high <= limit and (low >= 0 or limit == np.inf)):
        raise UserError(
            f"images must be whole numbers of 0..255 or floats in [0, 1], got {array.dtype} of {low}..{high}"
            if model.architecture.picture
            else f"the input must be finite floats, got {array.dtype} of {low}..{high}",
            where=file,
        )
    return torch.from_numpy(np.ascontiguousarray(array.astype(kind)))


def read_array(file: Path) -> np.ndarray:
    """The array of a ``.npy`` file; of a ``.npz``, ``images``, ``x`` or the first.

    Raises:
        UserError: If the file is damaged, holds none, or would have to be unpickled.
    """
    try:
        content = np.load(file, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            return content
        with content:
            keys = list(content)
            if not keys:
                raise UserError("the file holds no array", where=file)
            return content["images" if "images" in keys else "x" if "x" in keys else keys[0]]
    except UserError:
        raise
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"not a NumPy file of images: {error}", where=file) from error


def export_model(
    model: str,
    format: str,
    out: str | Path,
    *,
    sparsity: float | None = None,
    size: int | None = None,
    seed: int = 0,
    force: bool = False,
) -> Exported:
    """Writes the network of a run or a name.

    Args:
        model: As in :func:`netwright.design.benchmark.open_model`.
        format: ``"onnx"``, a file with its preprocessing, for batches of any size; ``"safetensors"``, the weights, with
            the architecture as JSON beside them; ``"c"``, a folder of C99 that needs nothing else; or ``"netwright"``,
            what :func:`netwright.deploy.load` reads. The last two take one input at a time.
        out: The file; the folder, for the last two.
        sparsity: As in ``open_model``.
        size: Likewise.
        seed: Likewise.
        force: Whether what is there may be replaced.

    Raises:
        UserError: If the format is unknown, something is there already, or the network cannot be written so.
    """
    from netwright.design.benchmark import open_model

    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}", cure=nearest(format, FORMATS))
    target = Path(out)
    wanted = [target]
    if format == "safetensors":
        if target.suffix == ".json":
            raise UserError("the weights must not be called .json", where=target, cure="name it .safetensors")
        wanted.append(target.with_suffix(".json"))
    for path in wanted:
        if path.exists() and not force:
            raise UserError("there is something already", where=path, cure="choose another --out, or add --force")
    found = open_model(model, sparsity=sparsity, size=size, seed=seed)
    {"onnx": _to_onnx, "safetensors": _to_safetensors, "c": _to_c, "netwright": _to_netwright}[format](found, target)
    files = [
        file for path in wanted for file in ([path] if path.is_file() else sorted(path.rglob("*"))) if file.is_file()
    ]
    return Exported(found.name, format, tuple(map(str, files)), sum(file.stat().st_size for file in files))


def _to_onnx(found: Opened, target: Path) -> None:
    from netwright.deploy import onnx

    architecture, channels = found.architecture, found.shape[0]
    if architecture is None:
        with torch.inference_mode():
            outputs = found.module(torch.zeros(1, *found.shape)).shape[-1]
        classes, mean, std = tuple(map(str, range(outputs))), (0.0,) * channels, (1.0,) * channels
    else:
        classes, mean, std = architecture.classes, architecture.mean, architecture.std
    picture = architecture is None or architecture.picture
    scale = 255.0 if picture else None
    onnx.export(found.module, target, shape=found.shape, mean=mean, std=std, classes=classes, scale=scale)


def _to_safetensors(found: Opened, target: Path) -> None:
    if found.architecture is None:
        raise UserError(
            "a function in a Python file has no architecture that could be written",
            where=found.name,
            cure="choose another --format",
        )
    storage.write_tensors(target, found.module.state_dict())
    storage.write_json(target.with_suffix(".json"), found.architecture.to_dict())


def _to_netwright(found: Opened, target: Path) -> None:
    from netwright import deploy

    deploy.compile(found.module, torch.zeros(1, *found.shape)).save(target)


def _to_c(found: Opened, target: Path) -> None:
    from netwright.deploy import export_c

    told: dict[str, Any] = {}
    if found.architecture is not None:
        known = found.architecture
        scale = 255.0 if known.picture else None
        told = {"classes": known.classes, "preprocessing": export_c.Preprocessing(known.mean, known.std, scale)}
    # Made apart, so that what was there is replaced file by file, and only by files that are whole.
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=target) as folder:
        for file in export_c.export(found.module, folder, example_input=torch.zeros(1, *found.shape), **told):
            file.replace(target / file.name)
