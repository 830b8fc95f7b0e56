"""Test examples in the report: mistakes, and where the network's features are in images it gets right and wrong."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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


def _arrays(file: Path, keys: Sequence[str]) -> list[np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = [arrays[key] for key in keys]
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"damaged file: {error}", where=file, cure="delete it and run the command again") from error
    if len({len(array) for array in found}) > 1:
        raise UserError("damaged file: arrays of different lengths", where=file, cure="delete it and run again")
    return found


def _caption(classes: Sequence[str], true: float, predicted: float, confidence: float) -> str:
    names = [classes[int(i)] if int(i) < len(classes) else str(int(i)) for i in (true, predicted)]
    taken = "" if int(true) == int(predicted) else f", taken for {names[1]}"
    return f"{names[0]}{taken} ({percent(confidence, 0)})"
