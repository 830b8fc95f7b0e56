"""One network and one image: what ``netwright verify`` looks at."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from netwright.console import UserError
from netwright.design.model import RunModel, is_named, load
from netwright.verify.network import Network


@dataclasses.dataclass(frozen=True)
class ImageSubject:
    """A network and one image, in the numbers that the network takes.

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


def open_image(model: str, image: str, size: int | None, download: bool) -> ImageSubject:
    """A network and the image that is verified.

    Args:
        model: A run; a name of :mod:`netwright.nn.pretrained`, with its trained weights; or ``FILE.py:FUNCTION`` that
            returns a trained network.
        image: An image file, a ``.npy`` or ``.npz`` file with one image, or ``DATA:NUMBER`` for one of a test part.
        size: Height and width of an image file for a network that has no size of its own.
        download: Allows the network, to fetch a data set or trained weights.

    Raises:
        UserError: If either is missing or damaged, or they do not fit.
    """
    classes: Sequence[str] = ()
    bounds: tuple[float, float] | None
    if is_named(model):
        network, pixels, label, classes = _of_name(model, image, size, download)
    else:
        network = load(model)
        if isinstance(network, RunModel):
            pixels, label = _of_run(network, model, image, download)
            classes = network.classes
        else:
            pixels, label = _of_function(network, image, size, download)
    if isinstance(network, RunModel):
        bounds = (0.0, 1.0) if network.architecture.picture else None
    else:
        bounds = (0.0, 1.0) if float(pixels.min()) >= 0 and float(pixels.max()) <= 1 else None
    try:
        seen = Network(network, pixels.shape)
    except TypeError as error:
        cure = "give a network that takes images and gives logits"
        raise UserError(str(error).splitlines()[0], where=model, cure=cure) from error
    except (ValueError, RuntimeError) as error:
        raise UserError(f"the network does not take this image: {str(error).splitlines()[0]}", where=model) from error
    known = classes if len(classes) == seen.classes else map(str, range(seen.classes))
    return ImageSubject(seen, pixels, bounds, tuple(known), label)


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


def _of_name(
    model: str, image: str, size: int | None, download: bool
) -> tuple[nn.Module, Tensor, str | None, tuple[str, ...]]:
    """A network by name, which standardises by itself, with the image and the names of its classes."""
    from netwright.data.tensors import Normalise
    from netwright.design.explaining import seen
    from netwright.nn import pretrained

    try:
        made = pretrained.preprocessing(model)
    except UserError as error:
        told = f"no run, no function and no network by name: {model!r}"
        raise UserError(told, cure="give a run, FILE.py:FUNCTION, or a name as netwright explain takes it") from error
    if size is not None and size < 1:
        raise UserError(f"size must be >= 1, got {size}")
    trained = load(model, pretrained=True, download=download)
    network = nn.Sequential(Normalise(made.mean, made.std), trained).eval()
    file = Path(image)
    if file.is_file() and file.suffix not in (".npy", ".npz"):
        return network, seen(file, made, size), None, pretrained.imagenet_classes()
    return network, *_of_function(network, image, size, download), pretrained.imagenet_classes()


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
