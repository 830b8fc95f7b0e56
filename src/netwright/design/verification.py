"""``netwright verify``: one network, one image, one family of manipulations, and what became of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright import storage
from netwright.console import UserError, nearest, note
from netwright.design.model import RunModel, load
from netwright.page import Images, KeyValues, Page, Paragraph, Picture, Section, png
from netwright.results import Result
from netwright.verify.layerwise import ranking
from netwright.verify.network import Network
from netwright.verify.region import Region
from netwright.verify.result import VerificationResult
from netwright.verify.safety import ENGINES, verify_point

MANIPULATIONS = ("all", "pixels:N", "patch:TOP,LEFT,HEIGHT,WIDTH")
LARGEST = 10**7  # points of a grid
SHOWN = 8  # times that a small picture is enlarged on the page


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is verified.

    Attributes:
        network: As the verifier sees it.
        image: One input, float32, without a batch.
        bounds: Range of its numbers; None where it is no picture.
        classes: Names of the outputs.
        label: Class that the data give it; None where nobody said.
    """

    network: Network
    image: Tensor
    bounds: tuple[float, float] | None
    classes: tuple[str, ...]
    label: str | None


@dataclasses.dataclass(frozen=True)
class Verification(Result):
    """What ``netwright verify`` found.

    Attributes:
        status: ``"safe"``, ``"unsafe"`` or ``"unknown"``.
        scope: ``"box"``: every point, between those of any grid too; ``"grid"``: its points only.
        model, image: As they were given.
        predicted: The class of the image.
        changed_to: Class of the counterexample.
        manipulation, radius: What may change, and by how much.
        numbers: How many numbers of the input vary.
        engine: Which one decided.
        reason: What decided, or why nothing did.
        distance: Largest change of a number in the counterexample.
        as_picture: Whether it is one too once its numbers are rounded to 0..255; None where it is no picture.
        seconds: Wall time.
        files: What was written.
        stats: What was counted.
    """

    status: str
    scope: str
    model: str
    image: str
    predicted: str
    changed_to: str | None
    manipulation: str
    radius: float
    numbers: int
    engine: str
    reason: str
    distance: float | None
    as_picture: bool | None
    seconds: float
    files: tuple[str, ...]
    stats: dict[str, Any]

    def __str__(self) -> str:
        within = f"{self.manipulation} within {self.radius:g} ({self.numbers} numbers vary)"
        if self.status == "safe":
            told = f"safe: no change of {within} takes it from class {self.predicted}"
            told += "" if self.scope == "box" else "; between the points of the grid nothing is proved"
        elif self.status == "unsafe":
            told = f"unsafe: a change of at most {self.distance:.4g} makes {self.predicted} a {self.changed_to}"
            told += "" if self.as_picture is not False else "; rounded to 256 levels it does not"
        else:
            told = f"unknown: {self.reason}"
        lines = [told, f"{within}; {self.engine}: {self.reason}; {self.seconds:.1f} s"]
        return "\n".join([*lines, *self.files])


def verify_model(
    model: str,
    image: str,
    *,
    radius: str,
    manipulation: str = "all",
    engine: str = "auto",
    steps: int = 1,
    timeout: float = 60.0,
    out: str | Path | None = None,
    force: bool = False,
    size: int | None = None,
    download: bool = False,
) -> Verification:
    """Verifies one image, and saves a counterexample if there is one.

    Args:
        model: A run, or ``FILE.py:FUNCTION`` that returns a trained network.
        image: An image file, a ``.npy`` or ``.npz`` file with one image, or ``DATA:NUMBER`` for one of a test part.
        radius: Most that a number may change, > 0, of pixels in [0, 1]: ``"0.03"``, ``"8/255"``.
        manipulation: ``"all"`` numbers; ``"pixels:N"``, those N places with the largest derivative of the margin; or
            ``"patch:TOP,LEFT,HEIGHT,WIDTH"``.
        engine: ``"smt"``, ``"bounds"``, ``"grid"``, ``"layerwise"``, or ``"auto"``: the exact one where the network and
            the installation allow, else bounds.
        steps: Of a grid, to each side.
        timeout: Seconds, > 0.
        out: Folder for a counterexample; ``counterexample-IMAGE`` by default.
        force: Whether a folder that is there may be written into.
        size: Height and width of an image file for a network that has no size of its own.
        download: Allows the network, to fetch a data set.

    Raises:
        UserError: If anything given is missing, damaged or out of its range; nothing is written.
    """
    span = _radius(radius)
    if engine not in ("auto", *ENGINES):
        raise UserError(f"unknown engine {engine!r}", cure=nearest(engine, ("auto", *ENGINES)))
    if steps < 1:
        raise UserError(f"steps must be >= 1, got {steps}")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise UserError(f"timeout must be > 0 seconds and finite, got {timeout}")
    if engine == "smt" and not _has_solver():
        raise UserError("the exact engine needs Z3", cure='pip install "netwright[verify]", or take --engine bounds')
    _manipulation(manipulation)
    subject = _subject(model, image, size, download)
    target = Path(f"counterexample-{_stem(image)}") if out is None else Path(out)
    if target.exists() and (not target.is_dir() or (not force and any(target.iterdir()))):
        raise UserError("there is something already", where=target, cure="choose another --out, or add --force")
    dims = _dims(manipulation, subject)
    grid = engine in ("grid", "layerwise")
    region = Region(
        dims, span / steps if grid else span, steps if grid else 1, norm="inf", radius=span, bounds=subject.bounds
    )
    if grid and engine == "grid" and region.count > LARGEST:
        raise UserError(
            f"the grid has {float(region.count):.3g} points, more than {LARGEST}",
            cure="let fewer numbers vary (--manipulation pixels:8), or take --engine smt",
        )
    found, used = _decided(subject, region, engine, timeout)
    files: tuple[str, ...] = ()
    rounded = None
    if found.status == "unsafe":
        assert found.witness is not None
        if subject.bounds is not None:
            eight = (found.witness * 255).round() / 255
            rounded = int(subject.network.logits(eight[None]).argmax()) != found.label
        files = _save(target, subject, found, model, image)
    moved = None if found.witness is None else float((found.witness - subject.image.double()).abs().max())
    return Verification(
        found.status, found.scope, model, image, subject.classes[found.label],
        None if found.witness_class is None else subject.classes[found.witness_class],
        manipulation, span, len(dims), used, found.reason, moved, rounded, found.seconds, files, found.stats,
    )  # fmt: skip


def _has_solver() -> bool:
    return importlib.util.find_spec("z3") is not None


def _decided(subject: Subject, region: Region, engine: str, timeout: float) -> tuple[VerificationResult, str]:
    chosen = engine
    if engine == "auto":
        chosen = "smt" if _has_solver() else "bounds"
        if chosen == "bounds":
            note('Z3 is not installed, so only bounds decide: pip install "netwright[verify]"')
    try:
        found = _verified(subject, region, chosen, timeout)
    except TypeError as error:
        if engine != "auto":
            raise UserError(str(error)) from error
        note(f"only bounds decide: {error}")
        chosen = "bounds"
        try:
            found = _verified(subject, region, chosen, timeout)
        except TypeError as other:
            raise UserError(str(other), cure="let few numbers vary, and add --engine grid") from other
    return found, chosen


def _verified(subject: Subject, region: Region, engine: str, timeout: float) -> VerificationResult:
    return verify_point(
        subject.network,
        subject.image,
        region,
        engine,  # type: ignore[arg-type]
        LARGEST,
        timeout,
        inputs=subject.bounds,
    )


def _radius(text: str) -> float:
    found = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(?:/\s*([0-9.eE+-]+))?\s*", text)
    try:
        value = float(found[1]) / float(found[2] or 1) if found else math.nan
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"radius must be a number > 0, or a fraction like 8/255, got {text!r}")
    return value


def _manipulation(text: str) -> tuple[str, tuple[int, ...]]:
    kind, _, rest = text.partition(":")
    words = rest.split(",") if rest else []
    counts = {"all": 0, "pixels": 1, "patch": 4}
    if kind not in counts:
        raise UserError(f"unknown manipulation {text!r}", cure=f"choose one of {' '.join(MANIPULATIONS)}")
    if len(words) != counts[kind] or not all(re.fullmatch(r"\d{1,9}", word.strip()) for word in words):
        form = next(each for each in MANIPULATIONS if each.startswith(kind))
        raise UserError(f"manipulation must have the form {form}, got {text!r}")
    numbers = tuple(map(int, words))
    if (kind == "pixels" and numbers[0] < 1) or (kind == "patch" and min(numbers[2:]) < 1):
        raise UserError(f"manipulation must change at least 1 pixel, got {text!r}")
    return kind, numbers


def _dims(text: str, subject: Subject) -> tuple[int, ...]:
    kind, numbers = _manipulation(text)
    shape = subject.image.shape
    places = torch.arange(subject.image.numel()).reshape(shape)
    if kind == "all":
        return tuple(places.flatten().tolist())
    if kind == "patch":
        top, left, height, width = numbers
        if len(shape) != 3 or top + height > shape[1] or left + width > shape[2]:
            raise UserError(f"the patch must lie within an image of {tuple(shape)}, got {text!r}")
        return tuple(places[:, top : top + height, left : left + width].flatten().tolist())
    # All channels of a pixel vary with it; without a picture every number is one.
    pixels = shape[1] * shape[2] if len(shape) == 3 else subject.image.numel()
    if numbers[0] > pixels:
        raise UserError(f"pixels must be <= {pixels}, as the image has, got {numbers[0]}")
    label = int(subject.network.logits(subject.image[None]).argmax())
    order = ranking(subject.network, subject.image.double().flatten(), 0, "gradient", label)
    chosen = list(dict.fromkeys(place % pixels for place in order))[: numbers[0]]
    return tuple(places.reshape(-1, pixels)[:, chosen].flatten().tolist())


def _stem(image: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(image).stem if Path(image).is_file() else Path(image).name) or "image"


def _subject(model: str, image: str, size: int | None, download: bool) -> Subject:
    if not (Path(model).is_dir() or ".py:" in model or model.endswith(".onnx")):
        raise UserError(
            f"no run and no function: {model!r}", cure="give a run, or FILE.py:FUNCTION that returns a trained network"
        )
    network = load(model)
    if isinstance(network, RunModel):
        pixels, label = _of_run(network, model, image, download)
        classes: Sequence[str] = network.classes
        bounds = (0.0, 1.0) if network.architecture.picture else None
    else:
        pixels, label = _of_function(network, image, size, download)
        bounds = (0.0, 1.0) if float(pixels.min()) >= 0 and float(pixels.max()) <= 1 else None
        classes = ()
    try:
        seen = Network(network, pixels.shape)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the network does not take this image: {str(error).splitlines()[0]}", where=model) from error
    return Subject(seen, pixels, bounds, tuple(classes or map(str, range(seen.classes))), label)


def _numbered(image: str) -> tuple[str, int] | None:
    """The parts of ``DATA:NUMBER``."""
    name, colon, number = image.rpartition(":")
    return (name, int(number)) if colon and re.fullmatch(r"\d{1,9}", number) and not Path(image).exists() else None


def _of_data(name: str, number: int, seed: int, size: tuple[int, int] | None, download: bool) -> tuple[Tensor, str]:
    from netwright.data import load as load_data
    from netwright.data import names
    from netwright.data.tensors import scaled

    files = name not in names() and Path(name).expanduser().is_dir()
    data = load_data(name, seed=seed, size=size if files else None, download=download)
    if number >= len(data.test):
        raise UserError(f"the test part has images 0..{len(data.test) - 1}, got {number}", where=name)
    pixels, label = data.test[number]
    return scaled(pixels), data.classes[int(label)]


def _of_run(model: RunModel, run: str, image: str, download: bool) -> tuple[Tensor, str | None]:
    from netwright.data.tensors import scaled
    from netwright.design.run import RunFolder
    from netwright.design.use import images_of

    shape = model.architecture.shape
    numbered = _numbered(image)
    if numbered is not None:
        # The run's own seed, so that its test part is the one that it never trained on.
        options = RunFolder(run).described()["options"]
        pixels, label = _of_data(*numbered, int(options["seed"]), shape[1:], download)
        if tuple(pixels.shape) != shape:
            raise UserError(f"the images have shape {tuple(pixels.shape)}, the network takes {shape}", where=image)
        return pixels, label
    found = images_of(Path(image), model)
    if len(found) != 1:
        raise UserError(f"one image is verified at a time, got {len(found)}", where=image)
    if tuple(found.shape[1:]) != shape:
        raise UserError(f"the image has shape {tuple(found.shape[1:])}, the network takes {shape}", where=image)
    return scaled(found[0]).float(), None


def _of_function(network: nn.Module, image: str, size: int | None, download: bool) -> tuple[Tensor, str | None]:
    from netwright.data.pictures import UnreadableError, decode, read_header
    from netwright.design.use import read_array

    if size is not None and size < 1:
        raise UserError(f"size must be >= 1, got {size}")
    numbered = _numbered(image)
    if numbered is not None:
        return _of_data(*numbered, 0, None if size is None else (size, size), download)
    file = Path(image)
    if not file.is_file():
        raise UserError("no such file", where=file, cure="give an image file, a .npy file, or DATA:NUMBER")
    if file.suffix in (".npy", ".npz"):
        array = read_array(file)
        if array.dtype.kind not in "fiu" or not array.size or not np.isfinite(array).all():
            raise UserError(f"the image must hold finite numbers, got {array.dtype} {array.shape}", where=file)
        if array.dtype.kind in "iu":
            if array.min() < 0 or array.max() > 255:
                raise UserError(f"whole numbers must lie in 0..255, got {array.min()}..{array.max()}", where=file)
            array = array.astype(np.float32) / 255
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)), None
    channels = next((part.in_channels for part in network.modules() if isinstance(part, nn.Conv2d)), 1)
    try:
        header = read_header(str(file))
        sides = (size, size) if size is not None else (header.height, header.width)
        pixels = torch.from_numpy(decode(str(file), (channels, *sides)).copy())
    except UnreadableError as error:
        raise UserError(f"not a readable image: {error}", where=file) from error
    return pixels.float() / 255, None


def _save(target: Path, subject: Subject, found: VerificationResult, model: str, image: str) -> tuple[str, ...]:
    """The pair, exactly and as pictures, and a page with the difference between them."""
    assert found.witness is not None
    assert found.witness_class is not None
    before, after = subject.image.double(), found.witness
    largest = float((after - before).abs().max()) or 1.0
    with storage.atomic_path(target / "pair.npz") as temporary, temporary.open("wb") as stream:
        np.savez(stream, image=before.numpy(), counterexample=after.numpy())
    files = [target / "pair.npz"]
    names = {"image": subject.classes[found.label], "counterexample": subject.classes[found.witness_class]}
    pictures = []
    if subject.bounds is not None and before.ndim == 3 and before.shape[0] in (1, 3):
        parts = {"image": before, "counterexample": after, "difference": (after - before) / (2 * largest) + 0.5}
        for name, part in parts.items():
            pixels = part.clamp(0, 1).permute(1, 2, 0).mul(255).round().byte().numpy()
            files.append(target / f"{name}.png")
            storage.write_bytes(files[-1], png(pixels, edge=max(pixels.shape)))
            caption = f"class {names[name]}" if name in names else f"difference: grey is none, white +{largest:.3g}"
            times = max(1, SHOWN * 8 // max(pixels.shape[:2]))
            pictures.append(Picture(png(pixels.repeat(times, 0).repeat(times, 1)), caption))
    figures: dict[str, str | int | float | None] = {
        "network": model,
        "image": image,
        "class": names["image"],
        "class of the counterexample": names["counterexample"],
        "largest change of a number": largest,
        "numbers changed": int((before != after).sum()),
        "found by": found.reason,
    }
    told = "The pair is in pair.npz, exactly; the pictures are rounded to 256 levels."
    page = Page(
        f"A counterexample for {Path(image).name}",
        f"A change of at most {largest:.4g} makes {names['image']} a {names['counterexample']}.",
        [
            Section("The pair", [Images(pictures, told)] if pictures else [Paragraph(told)]),
            Section("Figures", [KeyValues(figures)]),
        ],
        figures,
    )
    page.write(target)
    files += [target / f"report.{kind}" for kind in ("html", "md", "json")]
    return tuple(map(str, files))
