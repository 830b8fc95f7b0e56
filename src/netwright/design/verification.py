"""``netwright verify``: one network, one image, one family of manipulations, and what became of it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from netwright import storage
from netwright.console import UserError, nearest, note
from netwright.design.image_subject import ImageSubject, open_image
from netwright.page import Images, KeyValues, Page, Paragraph, Picture, Section, png
from netwright.results import Result
from netwright.verify.encoding import has_z3
from netwright.verify.layer_search import DLV
from netwright.verify.layerwise import ranking
from netwright.verify.region import Region, short_count
from netwright.verify.result import VerificationResult
from netwright.verify.safety import ENGINES, verify_point

MANIPULATIONS = ("all", "pixels:N", "patch:TOP,LEFT,HEIGHT,WIDTH")
CHOICES = ("auto", *ENGINES, "layers")
LARGEST = 10**7  # points of a grid
LAYERS, DIMS = "0:1", 5  # of the search layer by layer
SHOWN = 8  # times that a small picture is enlarged on the page


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
        numbers: How many numbers of the input vary, or of the layer that the region lies in.
        layer: That layer; 0 is the input.
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
    layer: int
    engine: str
    reason: str
    distance: float | None
    as_picture: bool | None
    seconds: float
    files: tuple[str, ...]
    stats: dict[str, Any]

    def __str__(self) -> str:
        within = f"{self.manipulation} within {self.radius:g} ({self.numbers} numbers vary)"
        if self.layer:
            within = f"{self.numbers} numbers of layer {self.layer} within {self.radius:g}"
        if self.status == "safe":
            told = f"safe: no change of {within} takes it from class {self.predicted}"
            told += "" if self.scope == "box" else "; between the points of the grid nothing is proved"
            told += "; that says nothing of other images" if self.layer else ""
        elif self.status == "unsafe":
            told = f"unsafe: a change of at most {self.distance:.4g} makes {self.predicted} a {self.changed_to}"
            told += "" if self.as_picture is not False else "; rounded to 256 levels it does not"
        else:
            told = f"unknown: {self.reason}"
        lines = [told, f"{within}; {self.engine}: {self.reason}; {self.seconds:.1f} s"]
        lines += [
            f"layer {each['layer']}: {each['dims']} numbers vary, {each['points']} points, "
            f"{each['spurious']} counterexamples that no input leads to"
            for each in self.stats.get("layers", [])
        ]
        return "\n".join([*lines, *self.files])


def verify_model(
    model: str,
    image: str,
    *,
    radius: str,
    manipulation: str = "all",
    engine: str = "auto",
    steps: int = 1,
    layers: str | None = None,
    dims: int | None = None,
    timeout: float = 60.0,
    out: str | Path | None = None,
    force: bool = False,
    size: int | None = None,
    download: bool = False,
) -> Verification:
    """Verifies one image, and saves a counterexample if there is one.

    Args:
        model: A run; a name of :mod:`netwright.nn.pretrained`, with its trained weights; or ``FILE.py:FUNCTION`` that
            returns a trained network.
        image: An image file, a ``.npy`` or ``.npz`` file with one image, or ``DATA:NUMBER`` for one of a test part.
        radius: Most that a number may change, > 0, of pixels in [0, 1]: ``"0.03"``, ``"8/255"``.
        manipulation: ``"all"`` numbers; ``"pixels:N"``, those N places with the largest derivative of the margin; or
            ``"patch:TOP,LEFT,HEIGHT,WIDTH"``.
        engine: ``"smt"``, ``"bounds"``, ``"grid"``, ``"layerwise"`` (greedy), ``"layers"`` (the exhaustive search layer
            by layer), or ``"auto"``: the exact one where the network and the installation allow, else bounds.
        steps: Of a grid, to each side.
        layers: For ``"layers"``: ``"FIRST:LAST"``, 0 being the input; ``"0:1"`` by default. Behind the input, the
            radius is that of ``dims`` numbers of the first layer.
        dims: For ``"layers"``: numbers that vary in a layer behind the input, >= 1; 5 by default.
        timeout: Seconds, > 0.
        out: Folder for a counterexample; ``counterexample-IMAGE`` by default.
        force: Whether a folder that is there may be written into.
        size: Height and width of an image file for a network that has no size of its own.
        download: Allows the network, to fetch a data set or trained weights.

    Raises:
        UserError: If anything given is missing, damaged or out of its range; nothing is written.
    """
    span = _radius(radius)
    first, last = _checked(engine, manipulation, steps, layers, dims, timeout)
    subject = open_image(model, image, size, download)
    target = Path(f"counterexample-{_stem(image)}") if out is None else Path(out)
    if target.exists() and (not target.is_dir() or (not force and any(target.iterdir()))):
        raise UserError("there is something already", where=target, cure="choose another --out, or add --force")
    varied = _dims(manipulation, subject)
    grid = engine in ("grid", "layerwise", "layers")
    region = Region(
        varied, span / steps if grid else span, steps if grid else 1, norm="inf", radius=span, bounds=subject.bounds
    )
    if (engine == "grid" or (engine == "layers" and not first)) and region.count > LARGEST:
        raise UserError(
            f"the grid has {short_count(region.count)} points, more than {LARGEST}",
            cure="let fewer numbers vary (--manipulation pixels:8), or take --engine smt",
        )
    if engine == "layers":
        search = DLV(
            subject.network, first, last, dims or DIMS, "activation" if first else varied, span=span / steps,
            steps=steps, bounds=subject.bounds, max_points=LARGEST, timeout=timeout,
        )  # fmt: skip
        found, used = _searched(search, subject), engine
        numbers = min(dims or DIMS, subject.network.layer(first).size) if first else len(varied)
    else:
        found, used = _decided(subject, region, engine, timeout)
        numbers = len(varied)
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
        manipulation, span, numbers, found.layer, used, found.reason, moved, rounded, found.seconds, files, found.stats,
    )  # fmt: skip


def _decided(subject: ImageSubject, region: Region, engine: str, timeout: float) -> tuple[VerificationResult, str]:
    chosen = engine
    if engine == "auto":
        chosen = "smt" if has_z3() else "bounds"
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


def _verified(subject: ImageSubject, region: Region, engine: str, timeout: float) -> VerificationResult:
    return verify_point(
        subject.network,
        subject.image,
        region,
        engine,  # type: ignore[arg-type]
        LARGEST,
        timeout,
        inputs=subject.bounds,
    )


def _checked(
    engine: str, manipulation: str, steps: int, layers: str | None, dims: int | None, timeout: float
) -> tuple[int, int]:
    """Refuses options that do not fit; returns the first and the last layer of the search layer by layer."""
    if engine not in CHOICES:
        raise UserError(f"unknown engine {engine!r}", cure=nearest(engine, CHOICES))
    if engine != "layers" and (layers is not None or dims is not None):
        given = "layers" if layers is not None else "dims"
        raise UserError(f"only the search layer by layer takes {given}", cure="add --engine layers")
    first, last = _layers(LAYERS if layers is None else layers)
    if dims is not None and dims < 1:
        raise UserError(f"dims must be >= 1, got {dims}")
    if steps < 1:
        raise UserError(f"steps must be >= 1, got {steps}")
    if not (timeout > 0 and math.isfinite(timeout)):
        raise UserError(f"timeout must be > 0 seconds and finite, got {timeout}")
    if engine in ("smt", "layers") and not has_z3():
        what = "the exact engine" if engine == "smt" else "the search layer by layer"
        raise UserError(f"{what} needs Z3", cure='pip install "netwright[verify]", or take --engine bounds')
    _manipulation(manipulation)
    if engine == "layers" and first and manipulation != "all":
        raise UserError(f"a manipulation names pixels, and layer {first} has none", cure="leave --manipulation out")
    return first, last


def _searched(search: DLV, subject: ImageSubject) -> VerificationResult:
    try:
        return search.verify(subject.image)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error


def _layers(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"\s*(\d{1,4})\s*:\s*(\d{1,4})\s*", text)
    if found is None or int(found[1]) > int(found[2]):
        raise UserError(f"layers must have the form FIRST:LAST, FIRST at most LAST, got {text!r}")
    return int(found[1]), int(found[2])


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


def _dims(text: str, subject: ImageSubject) -> tuple[int, ...]:
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


def _save(target: Path, subject: ImageSubject, found: VerificationResult, model: str, image: str) -> tuple[str, ...]:
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
