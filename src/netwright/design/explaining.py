"""What a network looks at in pictures of the user's: maps over photographs, and a page with all of them."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright.console import UserError, nearest, table, task
from netwright.design import cases
from netwright.design.model import RunModel, input_channels, is_named, load
from netwright.design.verdict import percent
from netwright.explain.prototypes import PrototypeClassifier
from netwright.nn.activations import logits_of
from netwright.page import Images, KeyValues, Mono, Page, Picture, Section, Text, png
from netwright.results import Result, save_figure
from netwright.seeding import seeded
from netwright.storage import new_folder, refuse_taken

if TYPE_CHECKING:
    from PIL.Image import Image

    from netwright.explain.maps import LayerMaps
    from netwright.nn.activations import CamMethod
    from netwright.nn.pretrained import Preprocessing

METHODS = {"eigen-cam": "Eigen-CAM", "grad-cam": "Grad-CAM", "grad-cam++": "Grad-CAM++"}
SIZE = 224  # of the input of a function in a Python file, unless it is told
CHUNK = 32  # images of one pass
LARGEST = 1024  # longer side of a picture, in pixels
LEAST_EDGE = 128
DPI = 300
PAGE_BYTES = 2_400_000  # of pictures; the page itself stays under 3 MB
PIXEL_BYTES = 2.2  # of a photograph as PNG


@dataclasses.dataclass(frozen=True)
class Explained(Result):
    """Maps of images.

    Attributes:
        network: Which network.
        method: ``"eigen-cam"``, ``"grad-cam"`` or ``"grad-cam++"``.
        layers: The layers that were looked at.
        files: The images.
        classes: The most probable class of each.
        probabilities: Its probability, in [0, 1].
        pictures: The figure of each image, inside the folder.
        folder: Where they are, with ``explained.html``.
        prototypes: The learned cases that each image is nearest to, the nearest first, where the network goes by such;
            pictures of them, with the same names, are in the folder's ``prototypes``.
    """

    network: str
    method: str
    layers: tuple[str, ...]
    files: tuple[str, ...]
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    pictures: tuple[str, ...]
    folder: str
    prototypes: tuple[cases.Near, ...] = ()

    def __str__(self) -> str:
        shares = (f"{p:.3f}" for p in self.probabilities)
        rows = [list(row) for row in zip(self.files, self.classes, shares, self.pictures, strict=True)]
        told = [table(rows, ["image", "class", "probability", "picture"])]
        told.append(f"{METHODS[self.method]} of {', '.join(self.layers)}")
        if self.prototypes:
            told.append(cases.told(self.files, self.prototypes))
        return "\n".join([*told, f"page: {self.folder}/explained.html"])


@dataclasses.dataclass(frozen=True)
class _Network:
    """A network, and how it is fed: the central square of a picture, or all of it."""

    name: str
    module: nn.Module
    channels: int
    size: tuple[int, int]
    crop: float | None
    normalise: nn.Module
    classes: tuple[str, ...] | None


def explain_images(
    model: str,
    images: Sequence[str | Path],
    out: str | Path,
    *,
    layers: Sequence[str] = (),
    method: str = "eigen-cam",
    center: bool = False,
    size: int | None = None,
    random_weights: bool = False,
    download: bool = False,
    seed: int = 0,
) -> Explained:
    """Writes a figure of each image (the image, its map over it, the scale) and a page of all.

    Of a network that goes by learned cases (:class:`netwright.explain.PrototypeClassifier`) also those nearest to each
    image.

    Args:
        model: A run; ``torchvision:NAME``, ``timm:NAME`` or a bare name, with its trained weights; or
            ``FILE.py:FUNCTION``, whose network is given floats in [0, 1].
        images: Image files. A run sees the whole picture, a network by name its central square, as its source says.
        out: A folder that is not there yet, or is empty.
        layers: Names of layers, as in ``named_modules``; several maps are averaged. The last one with places when
            empty.
        method: ``"eigen-cam"``, which knows no class, or ``"grad-cam"`` or ``"grad-cam++"`` of the predicted class.
        center: For ``"eigen-cam"``: whether each channel's mean is taken away first.
        size: Height and width of the input; the network's own when None.
        random_weights: Take a name's random weights: what a map shows even so it does not owe to training.
        download: Whether trained weights may be fetched.
        seed: Of random weights.

    Raises:
        UserError: If the network, a layer or an image is not there or cannot be used so, or something is in ``out``
            already. Nothing is written then.
    """
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}", cure=nearest(method, METHODS))
    if center and method != "eigen-cam":
        raise UserError("only eigen-cam can be centred", cure="leave --center out, or choose --method eigen-cam")
    for name, value, least in (("size", size, 1), ("seed", seed, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} must be >= {least}, got {value}")
    if not images:
        raise UserError("IMAGE is missing", cure="give at least one image file")
    files = [Path(image) for image in images]
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise UserError("no such file", where=missing)
    refuse_taken(out)
    network = _open(model, size, random_weights, download, seed)
    maker = _maker(network, layers, method, center)
    written, classes, shares, items = _file_names(files), [], [], []
    edge, near = _edge(len(files)), cases.Cases(network.module, network.classes)
    with new_folder(out) as folder, task("images", total=len(files)) as bar:
        for start in range(0, len(files), CHUNK):
            part = files[start : start + CHUNK]
            pictures = [_read(file, network) for file in part]
            x = torch.stack([_input(picture, network) for picture in pictures])
            cams, probs = _maps(network, maker, x)
            near.add(x, written[start : start + CHUNK], folder, DPI)
            confidence, best = probs.max(1)
            classes += [_class_name(network, i, probs.shape[1]) for i in best.tolist()]
            shares += [round(p, 6) for p in confidence.tolist()]
            for i, (file, picture, cam) in enumerate(zip(part, pictures, cams, strict=True), start):
                title = f"{classes[i]}, {percent(shares[i], 0)}"
                _draw(folder / written[i], picture, cam, title, f"{METHODS[method]}, {', '.join(maker.layer_names)}")
                items.append(_beside(picture, cam, edge, [title, " (", Mono(file.name), ")"]))
                bar.advance()
        found = Explained(
            network=network.name,
            method=method,
            layers=tuple(maker.layer_names),
            files=tuple(map(str, files)),
            classes=tuple(classes),
            probabilities=tuple(shares),
            pictures=tuple(written),
            folder=str(out),
            prototypes=tuple(near.near),
        )
        _page(found, items, near.section()).write(folder, "explained")
    return found


def _open(model: str, size: int | None, random_weights: bool, download: bool, seed: int) -> _Network:
    from netwright.data.tensors import Normalise
    from netwright.nn import pretrained

    own = not is_named(model)
    if random_weights and own:
        raise UserError("only a network by name has random weights", where=model, cure="leave --random-weights out")
    with seeded(seed, "init"):
        network = load(model) if own else load(model, pretrained=not random_weights, download=download)
    if isinstance(network, RunModel):
        known = network.architecture
        if not known.picture:
            raise UserError("the network was not trained on pictures", where=model, cure="only pictures can be shown")
        if size is not None and (size, size) != tuple(known.shape[1:]):
            told = f"the network takes {known.shape[1]} x {known.shape[2]}, not {size}"
            raise UserError(told, where=model, cure="leave --size out")
        name, shape = Path(model).resolve().name, known.shape
        return _Network(name, network.network, shape[0], shape[1:], None, network.normalise, network.classes)
    sides = None if size is None else (size, size)
    if own:
        channels = input_channels(network)
        if channels not in (1, 3):
            raise UserError(f"the network takes {channels} channels, a picture has 1 or 3", where=model)
        sides = sides or _recorded(network) or (SIZE, SIZE)
        return _Network(Path(model).name, network, channels, sides, 1.0, nn.Identity(), None)
    made = pretrained.preprocessing(model)
    classes = None if random_weights else pretrained.imagenet_classes()
    normalise = Normalise(made.mean, made.std)
    return _Network(model, network, len(made.mean), sides or made.size, made.crop, normalise, classes)


def _recorded(network: nn.Module) -> tuple[int, int] | None:
    """Height and width of the pictures that a prototype classifier was made for, if that is what it is."""
    known = network.input_shape if isinstance(network, PrototypeClassifier) else None
    return None if known is None or len(known) != 3 else (known[1], known[2])


def _read(file: Path, network: _Network) -> Image:
    """The part of a picture that the network sees, in the picture's own pixels."""
    from netwright.data.pictures import UnreadableError, upright

    try:
        image = upright(str(file), grey=network.channels == 1)
    except UnreadableError as error:
        raise UserError(f"not a readable image: {error}", where=file) from error
    if network.crop is None:
        return image
    (height, width), shorter = network.size, network.crop * min(image.size)
    across, down = shorter * min(1.0, width / height), shorter * min(1.0, height / width)
    left, top = round((image.width - across) / 2), round((image.height - down) / 2)
    return image.crop((left, top, left + max(1, round(across)), top + max(1, round(down))))


def seen(file: Path, made: Preprocessing, size: int | None = None) -> Tensor:
    """The central square of a picture, as a network by name sees it: (channels, height, width) in [0, 1].

    Args:
        file: A picture.
        made: How the network's source makes pictures ready; what it standardises by is left out.
        size: Height and width; those of ``made`` when None.

    Raises:
        UserError: If the file is no readable picture.
    """
    sides = made.size if size is None else (size, size)
    network = _Network("", nn.Identity(), len(made.mean), sides, made.crop, nn.Identity(), None)
    return _input(_read(file, network), network)


def _maps(network: _Network, maker: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Maps and class probabilities, from one pass."""
    try:
        cams = maker(x)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a network of anybody's fails in any way on an input of another size
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        told = "no map can be made" if isinstance(error, ValueError) else "the network fails on the images"
        cure = f"choose another --layer, or another --size than {network.size[0]}"
        raise UserError(f"{told}: {first}", where=network.name, cure=cure) from error
    logits = logits_of(maker.output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(f"the network must give (batch, classes), got {shape}", where=network.name)
    return cams, logits.float().softmax(1)


def _input(picture: Image, network: _Network) -> Tensor:
    from PIL.Image import Resampling

    height, width = network.size
    small = np.asarray(picture.resize((width, height), Resampling.BILINEAR)).reshape(height, width, -1)
    return network.normalise(torch.from_numpy(small.transpose(2, 0, 1).copy()).float() / 255)


def _maker(network: _Network, layers: Sequence[str], method: str, center: bool) -> LayerMaps:
    from netwright.explain import EigenCAM, GradCAM

    known = [name for name, _ in network.module.named_modules() if name]
    unknown = next((name for name in layers if name not in known), None)
    if unknown is not None:
        near = nearest(unknown, known)
        cure = near if near.endswith("?") else f"choose one of {len(known)} layers, {known[0]} to {known[-1]}"
        raise UserError(f"the network has no layer {unknown!r}", where=network.name, cure=cure)
    chosen = list(layers) or None
    several = len(layers) > 1  # maps of one layer are drawn from its own places
    if method == "eigen-cam":
        return EigenCAM(network.module, chosen, center=center, upsample=several)
    kind: CamMethod = "gradcam" if method == "grad-cam" else "gradcam++"
    return GradCAM(network.module, chosen, method=kind, upsample=several)


def _class_name(network: _Network, number: int, outputs: int) -> str:
    known = network.classes
    return known[number] if known is not None and len(known) == outputs else f"class {number}"


def _file_names(files: Sequence[Path]) -> list[str]:
    """A name for each figure, safe and not taken."""
    names: list[str] = []
    for file in files:
        stem = re.sub(r"[^\w.-]+", "_", file.stem).strip("._")[:80] or "image"
        name, number = stem, 1
        while f"{name}.png" in names:
            number += 1
            name = f"{stem}-{number}"
        names.append(f"{name}.png")
    return names


def _draw(file: Path, picture: Image, cam: Tensor, title: str, subtitle: str) -> None:
    from netwright.explain.drawing import draw

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a class named in a script the font lacks
        save_figure(draw(_shown(picture, LARGEST), cam, title, subtitle), file, dpi=DPI)


def _shown(picture: Image, longest: int) -> np.ndarray:
    """(height, width, 1 or 3), its longer side at most so many pixels."""
    copy = picture.copy()
    copy.thumbnail((longest, longest))
    array = np.asarray(copy)
    return array[..., None] if array.ndim == 2 else array


def _edge(count: int) -> int:
    """Pixels of a panel on the page: two of every picture, base64 included, stay within what a page may hold."""
    return int(min(384.0, max(64.0, (PAGE_BYTES * 0.75 / (2 * PIXEL_BYTES * count)) ** 0.5)))


def _beside(picture: Image, cam: Tensor, edge: int, caption: Text) -> Picture:
    """A picture and its map beside it."""
    from netwright.explain.drawing import overlay

    shown = _shown(picture, edge)
    larger = max(1, LEAST_EDGE // max(shown.shape[:2]))  # so that the gap is one, and a browser shows pixels
    shown = shown.repeat(larger, axis=0).repeat(larger, axis=1)
    plain = (np.repeat(shown, 3, axis=2) if shown.shape[2] == 1 else shown).astype(np.float64) / 255
    both = np.concatenate([plain, np.ones((len(plain), 4, 3)), overlay(shown, cam)], axis=1)
    return Picture(png(both, edge=2 * edge + 4), caption)


def _page(found: Explained, items: Sequence[Picture], more: Sequence[Section]) -> Page:
    what = (
        "Bright is where the layer's features are strongest along their first principal direction; no class enters, "
        "so a wrong answer does not move the map."
        if found.method == "eigen-cam"
        else "Bright is where the layer's features speak for the predicted class."
    )
    count = f"{len(items)} image{'' if len(items) == 1 else 's'}"
    sentence = f"{METHODS[found.method]} of {found.network}, layer {', '.join(found.layers)}, for {count}."
    facts = {"network": found.network, "method": METHODS[found.method], "layers": ", ".join(found.layers)}
    reading = (
        f"Each image as the network sees it, and its map over it. {what} Every map has a scale of its own, 0 to 1."
    )
    maps = Section("", [Images(items, reading, wide=True)])
    sections = [maps, *more, Section("Settings", [KeyValues(facts)], folded=True)]
    return Page("Where a network looks", sentence, sections, found.to_dict())
