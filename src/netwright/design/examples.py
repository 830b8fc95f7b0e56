"""Test examples in the report: mistakes, where the network's features are, and how far images may change."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from netwright import storage
from netwright.console import UserError
from netwright.design.verdict import percent
from netwright.page import Block, Bullets, Images, Paragraph, Picture, png

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import Data

MISTAKES = ("images", "true", "predicted", "confidence")
MOST_MISTAKES = 24
MOST_MAPS = 6  # of right answers, and of wrong ones
EDGE = 128  # pixels of a picture beside its map
RADII = 10  # images whose robustness radius is looked for
FEW = 4  # numbers that the grid engine varies where there is no solver
UNFINISHED = -1.0  # in place of their radius, where the time was over


def mistakes(data: Data, probs: Tensor, limit: int = 24) -> dict[str, np.ndarray]:
    """The most confident wrong answers on the test part, as arrays for ``mistakes.npz``."""
    import torch

    from netwright.design.measure import first_images, onnx_input

    confidence, predicted = probs.max(1)
    images, labels = first_images(data, len(data.test))
    wrong = torch.nonzero(predicted != labels).flatten()
    order = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit]
    picture = images.dtype == torch.uint8
    return {
        "images": onnx_input(images[order], picture),
        "true": labels[order].numpy(),
        "predicted": predicted[order].numpy(),
        "confidence": confidence[order].numpy(),
    }


def mistake_blocks(file: Path, classes: Sequence[str]) -> list[Block]:
    """The pictures of ``mistakes.npz``; nothing without the file.

    Raises:
        UserError: If the file is damaged.
    """
    if not file.exists():
        return []
    images, *columns = (column[:MOST_MISTAKES] for column in _arrays(file, MISTAKES))
    captions = [_caption(classes, *map(float, numbers)) for numbers in zip(*columns, strict=True)]
    if not captions:
        return [Paragraph("No test example was misclassified.")]
    reading = "Test examples it got wrong, with the true class, what they were taken for, and its confidence."
    if images.ndim != 4 or images.shape[3] not in {1, 3}:
        return [Paragraph(reading), Bullets(captions)]
    return [Images([Picture(png(image), told) for image, told in zip(images, captions, strict=True)], reading)]


def maps(network: nn.Module, data: Data, probs: Tensor, limit: int = MOST_MAPS) -> dict[str, np.ndarray] | None:
    """Eigen-CAM of test images as arrays for ``maps.npz``: right answers of different classes, then wrong ones.

    Of each class the most confident right answer is taken, and of all wrong ones the most confident.

    Args:
        network: Takes standardised images.
        data: Whose test part is looked at.
        probs: Class probabilities of the test part.
        limit: Right answers, and wrong ones.

    Returns:
        None where the data are no pictures, or the network has no layer with places.
    """
    import torch

    from netwright.design.measure import first_images, onnx_input
    from netwright.explain import EigenCAM

    images, labels = first_images(data, len(data.test))
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        return None
    confidence, predicted = probs.max(1)
    order = confidence.argsort(descending=True, stable=True)
    right, wrong = (order[(predicted == labels)[order] == answer] for answer in (True, False))
    firsts = {int(labels[i]): int(i) for i in reversed(right.tolist())}
    chosen = torch.tensor([*[firsts[name] for name in sorted(firsts)][:limit], *wrong[:limit].tolist()])
    if not len(chosen):
        return None
    try:
        cams = EigenCAM(network, upsample=False)(data.normalise()(images[chosen]))
    except ValueError:  # no layer with places, or activations that overflowed
        return None
    return {
        "images": onnx_input(images[chosen], True),
        "true": labels[chosen].numpy(),
        "predicted": predicted[chosen].numpy(),
        "confidence": confidence[chosen].numpy(),
        "maps": cams.numpy().astype(np.float16),
    }


def map_blocks(file: Path, classes: Sequence[str]) -> list[Block]:
    """The pictures of ``maps.npz`` beside their maps; nothing without the file, as in runs of earlier versions.

    Raises:
        UserError: If the file is damaged.
    """
    if not file.exists():
        return []
    import torch

    from netwright.explain.drawing import overlay

    images, *columns, cams = _arrays(file, (*MISTAKES, "maps"))
    items = []
    for image, cam, *numbers in zip(images, cams, *columns, strict=True):
        shown = image.repeat(max(1, EDGE // max(image.shape[:2])), 0).repeat(max(1, EDGE // max(image.shape[:2])), 1)
        plain = np.repeat(shown, 3 // shown.shape[2], axis=2).astype(np.float64) / 255
        heat = overlay(shown, torch.from_numpy(cam.astype(np.float32)))
        both = np.concatenate([plain, np.ones((len(plain), 4, 3)), heat], axis=1)
        told = _caption(classes, *map(float, numbers))
        items.append(Picture(png(both, edge=2 * EDGE + 4), told))
    reading = (
        "Test images it gets right and wrong, and beside each where the features of the last layer with places are "
        "strongest along their first principal direction (Eigen-CAM). No class enters: heat away from the object means "
        "that the network looks at something else."
    )
    return [Images(items, reading, wide=True)] if items else []


def radii(
    network: nn.Module, data: Data, probs: Tensor, limit: int = RADII, share: float = 1.0
) -> dict[str, np.ndarray] | None:
    """Robustness radii of the first test images that a network gets right, as arrays for ``radii.npz``.

    By bounds and an attack; what these leave open is asked of the exact engine where Z3 is installed, else the grid
    engine tells what a change of a few numbers does.

    Args:
        network: Takes standardised images.
        data: Whose test part is looked at.
        probs: Class probabilities of the test part.
        limit: Images.
        share: Of the usual seconds, in (0, 1].

    Returns:
        None where the data are no pictures, or the network gets none right.
    """
    import copy

    import torch
    from torch import nn

    from netwright.data.tensors import scaled
    from netwright.design.measure import first_images, onnx_input
    from netwright.design.timing import BOUNDS_SECONDS, SOLVER_SECONDS
    from netwright.verify import Network, few_number_radii, robustness_radii
    from netwright.verify.encoding import has_z3

    images, labels = first_images(data, len(data.test))
    if images.dtype != torch.uint8 or images.shape[1] not in (1, 3):
        return None
    confidence, predicted = probs.max(1)
    with torch.no_grad():
        seen = Network(nn.Sequential(data.normalise(), copy.deepcopy(network)).eval(), images.shape[1:])
        right = (predicted == labels).nonzero().flatten()[: 2 * limit]
        # In float64 a close call may end otherwise.
        chosen = right[seen.logits(scaled(images[right])).argmax(1) == labels[right]][:limit]
    if not len(chosen):
        return None
    solver, pixels = has_z3(), scaled(images[chosen])
    found = robustness_radii(
        seen,
        pixels,
        labels[chosen],
        tight=False,
        timeout=share * BOUNDS_SECONDS,
        solver_timeout=share * SOLVER_SECONDS * solver,
    )
    few: Sequence[float | None] = (None,) * len(chosen)
    if not solver:
        few = few_number_radii(seen, pixels, labels[chosen], FEW, timeout=share * SOLVER_SECONDS)
    return {
        "images": onnx_input(images[chosen], True),
        "true": labels[chosen].numpy(),
        "predicted": predicted[chosen].numpy(),
        "confidence": confidence[chosen].numpy(),
        "proved": np.array(found.proved),
        "broken": _numbers(found.broken),
        "exact": np.array(found.exact) if solver else np.zeros(len(chosen), dtype=bool),
        "few": _numbers([UNFINISHED if each is not None and math.isnan(each) else each for each in few]),
        "solver": np.full(len(chosen), solver),
    }


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if each is None else each for each in values])


def radius_blocks(file: Path, classes: Sequence[str]) -> list[Block]:
    """The pictures of ``radii.npz`` with their radii; nothing without the file, as in runs of earlier versions.

    Raises:
        UserError: If the file is damaged.
    """
    if not file.exists():
        return []
    images, *columns, proved, broken = _arrays(file, (*MISTAKES, "proved", "broken"))
    told = [_reach(a, b) for a, b in zip(proved, broken, strict=True)]
    reading = (
        "Test images it gets right, and by how many of 255 grey levels every pixel may change at once: up to the first "
        "number the class is certain; with a change of the second one it is another. "
    )
    if not _holds(file, "solver"):  # a run of an earlier version
        reading += "Bounds prove the first, the gradient leads to the second. "
    else:
        exact, few, solver = _arrays(file, ("exact", "few", "solver"))
        if solver.any():
            reading += (
                f"Bounds prove the first, the gradient leads to the second; the exact engine (Z3) decided further for "
                f"{int(exact.sum())} of {len(exact)}. "
            )
        else:
            reading += (
                "Bounds prove the first, the gradient leads to the second; without Z3, the grid engine looked at the "
                f"{FEW} values of pixels that the class depends on most, from level to level of a grid. "
            )
            told = [f"{each}; {_few(size)}" for each, size in zip(told, few, strict=True)]
    reading += "What lies between is open."
    items = [
        Picture(png(image), f"{_caption(classes, *map(float, numbers))}: {each}")
        for image, each, *numbers in zip(images, told, *columns, strict=True)
    ]
    return [Images(items, reading)] if items else []


def _few(size: float) -> str:
    if size == UNFINISHED:
        told = "search not finished"
    else:
        told = f"another class at {255 * size:.3g}" if np.isfinite(size) else "no other class"
    return f"by {FEW} values alone: {told}"


def _holds(file: Path, name: str) -> bool:
    """Whether an array is in a file; a damaged one is told of when it is read."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return name in arrays.files
    except (ValueError, OSError, EOFError, zipfile.BadZipFile):
        return False


def _reach(proved: float, broken: float) -> str:
    told = f"certain up to {255 * proved:.3g}" if proved > 0 else "nothing proved"
    return f"{told}, another class at {255 * broken:.3g}" if np.isfinite(broken) else f"{told}, no other class found"


def _arrays(file: Path, keys: Sequence[str]) -> list[np.ndarray]:
    found: list[np.ndarray] = storage.read_arrays(file, keys)
    if len({len(array) for array in found}) > 1:
        raise UserError("damaged file: arrays of different lengths", where=file, cure="delete it and run again")
    return found


def _caption(classes: Sequence[str], true: float, predicted: float, confidence: float) -> str:
    names = [classes[int(i)] if int(i) < len(classes) else str(int(i)) for i in (true, predicted)]
    taken = "" if int(true) == int(predicted) else f", taken for {names[1]}"
    return f"{names[0]}{taken} ({percent(confidence, 0)})"
