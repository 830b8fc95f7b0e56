"""The page about a condensed data set: what the bins hold, what was kept of each class, and the kept images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from netwright.design.verdict import percent
from netwright.page import (
    Bullets,
    Cell,
    Code,
    Figure,
    KeyValues,
    Mono,
    Page,
    Section,
    Table,
    Text,
    Value,
    colour,
    svg,
)
from netwright.seeding import numpy_stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from netwright.data import Data
    from netwright.design.condense import Condensed

MOST_POINTS = 1200
MOST_ROWS = 10
MOST_COLUMNS = 10
EDGE = 40  # pixels of an image in the sheet


def page(result: Condensed, data: Data, features: Tensor | np.ndarray, bins: Sequence[np.ndarray], chosen: Any) -> Page:
    """The page about a result.

    Args:
        result: What was kept.
        data: The whole data.
        features: Of each training example, a row each.
        bins: Indices of the examples of each bin.
        chosen: Indices of the examples that are kept.
    """
    rows = _unit(torch.as_tensor(np.asarray(features)).float())
    labels, kept = data.train.labels.numpy(), np.asarray(chosen)
    pictures = [] if (made := sheet(data, bins, kept)) is None else [made]
    sections = [
        Section("", pictures),
        Section("What the bins hold", [typicality(rows, labels, bins)]),
        Section("What was kept", [landscape(rows, kept, result.seed), _counts(result, data)]),
        Section("How to use it", [Code(f"netwright design {result.out}", "sh")]),
        Section("What to doubt", [Bullets(_doubts(result))]),
        Section("Settings", [KeyValues(_settings(result))], folded=True),
    ]
    figures = {"result": result.to_dict(), "indices": kept.tolist()}
    return Page(f"{data.name}, condensed", verdict(result), [s for s in sections if s.blocks], figures)


def verdict(result: Condensed) -> str:
    """One sentence on what is left."""
    low, high = min(result.counts.values()), max(result.counts.values())
    each = f"{low}" if low == high else f"{low} to {high}"
    share = percent(result.kept / result.examples)
    return (
        f"{result.kept:,} of {result.examples:,} training examples were kept ({share}), {each} of each class, from "
        "typical to unusual; validation and test parts are whole."
    )


def _unit(rows: Tensor) -> Tensor:
    flat = rows.flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)


def typicality(rows: Tensor, labels: np.ndarray, bins: Sequence[np.ndarray]) -> Figure:
    """The cosine between each example and the mean of its class, bin by bin.

    Args:
        rows: Unit features (examples, numbers).
        labels: Class of each example.
        bins: Indices of each bin.
    """
    groups = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    means = _unit(torch.zeros(int(groups.max()) + 1, rows.shape[1]).index_add_(0, groups, rows))
    cosines = (rows * means[groups]).sum(1).numpy()
    quartiles = [np.percentile(cosines[b], [25, 50, 75]).tolist() if len(b) else [None] * 3 for b in bins]
    shown = [(i + 1, *q) for i, q in enumerate(quartiles) if q[0] is not None]

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        places, low, middle, high = zip(*shown, strict=True)
        ax.fill_between(places, low, high, color=colour("blue"), alpha=0.18, linewidth=0)
        ax.plot(places, middle, "o-", color=colour("blue"), ms=4)
        ax.set_xlabel("bin, in the order of selection")
        ax.set_ylabel("cosine to the mean of the class")
        ax.locator_params(axis="x", integer=True)

    reading = (
        "The line is the median of a bin, the band runs from the lower to the upper quartile. Early bins hold typical "
        "examples, late ones what is unlike the rest of its class; the same share is kept of each."
    )
    return Figure(svg(paint, width=430, height=210), reading, data={"quartiles": quartiles})


def landscape(rows: Tensor, kept: np.ndarray, seed: int) -> Figure:
    """All examples and those that are kept, along the two directions in which features differ most.

    Args:
        rows: Unit features (examples, numbers).
        kept: Indices of what is kept.
        seed: Of the choice of examples that are drawn, where there are many.
    """
    random = numpy_stream(seed, "condense", "page")
    count = len(rows)
    drawn = np.sort(random.choice(count, min(count, MOST_POINTS), replace=False))
    chosen = np.isin(drawn, kept)
    centred = rows[drawn] - rows[drawn].mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    places = (vectors[:, -2:] * values[-2:].clamp_min(0).sqrt()).flip(1)
    # An eigenvector's sign is arbitrary: the larger side points right and up.
    places = (places * places[places.abs().argmax(0), torch.arange(places.shape[1])].sign()).numpy()
    share = float(values[-2:].clamp_min(0).sum() / values.clamp_min(0).sum().clamp_min(1e-12))

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        ax.plot(*places[~chosen].T, "o", ms=2.4, color=colour("muted"), alpha=0.35, mew=0)
        ax.plot(*places[chosen].T, "o", ms=3.6, color=colour("orange"), mew=0)
        ax.set_aspect("equal", adjustable="datalim")
        ax.grid(visible=False)
        ax.set_xticklabels([])
        ax.set_yticklabels([])
        ax.tick_params(length=0)
        ax.set_xlabel("first principal component")
        ax.set_ylabel("second")

    some = f" {len(drawn):,} examples, drawn at random, are shown." if len(drawn) < count else ""
    reading = (
        f"Orange examples are kept, grey ones left out. The two directions hold {percent(share, 0)} of the variance of "
        f"the features, so neighbours here may be far apart elsewhere.{some}"
    )
    data = {"index": drawn.tolist(), "kept": chosen.tolist(), "place": np.round(places, 4).tolist()}
    return Figure(svg(paint, width=430, height=300), reading, data=data)


def sheet(data: Data, bins: Sequence[np.ndarray], kept: np.ndarray) -> Figure | None:
    """One kept image for each class and bin; None where the data are no pictures.

    Args:
        data: The whole data.
        bins: Indices of each bin.
        kept: Indices of what is kept.
    """
    images = getattr(data.train, "images", None)  # None when they stay on disk, as files of pictures
    if data.shape[0] not in {1, 3} or (images is not None and images.dtype != torch.uint8):
        return None
    labels = data.train.labels.numpy()
    classes = list(range(min(len(data.classes), MOST_ROWS)))
    columns = np.unique(np.linspace(0, len(bins) - 1, min(len(bins), MOST_COLUMNS)).round().astype(int)).tolist()
    inside = [np.intersect1d(bins[column], kept) for column in columns]
    found = [[next(iter(b[labels[b] == label]), None) for b in inside] for label in classes]
    tiles = [[None if i is None else _tile(data.train[int(i)][0]) for i in row] for row in found]
    side = max(max(tile.shape[:2]) for row in tiles for tile in row if tile is not None) + 2
    grid = np.zeros((side * len(classes), side * len(columns), 4), np.uint8)
    for r, row in enumerate(tiles):
        for c, tile in enumerate(row):
            if tile is not None:
                top, left = (side * place + (side - size) // 2 for place, size in zip((r, c), tile.shape, strict=False))
                grid[top : top + tile.shape[0], left : left + tile.shape[1]] = tile

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        ax.imshow(grid, interpolation="none", extent=(0.5, len(columns) + 0.5, len(classes) - 0.5, -0.5))
        ax.set_xticks(range(1, len(columns) + 1), [str(column + 1) for column in columns])
        ax.set_yticks(classes, [data.classes[label][:16] for label in classes])
        ax.set_xlabel("bin, from typical to unusual")
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for spine in ax.spines.values():
            spine.set_visible(False)

    more = "" if len(data.classes) == len(classes) else f" {len(classes)} of {len(data.classes)} classes are shown."
    reading = f"One kept example of each class and bin; an empty place has none.{more}"
    width = 430.0
    height = 44 + (width - 70) * len(classes) / len(columns)
    return Figure(svg(paint, width=width, height=height), reading, title="Kept examples", data={"index": found})


def _tile(image: Tensor) -> np.ndarray:
    """An image of floats in [0, 1], (channels, height, width), as a small one of uint8 (height, width, 4)."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    small = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    small.thumbnail((EDGE, EDGE))
    return np.asarray(small.convert("RGBA"))


def _counts(result: Condensed, data: Data) -> Table:
    before = data.counts()["train"]
    rows: list[Sequence[Cell]] = [
        [name, Value(count, f"{count:,}"), Value(left, f"{left:,}"), Value(left / count, percent(left / count))]
        for (name, left), count in zip(result.counts.items(), before.values(), strict=True)
    ]
    return Table(["class", "examples", "kept", "share"], rows)


def _doubts(result: Condensed) -> list[Text]:
    compared = {
        "trained": "what a small network sees that was trained on the whole data for three epochs",
        "pixels": "their pixels, which say little of what is on a picture",
    }.get(result.features, f"the rows of {result.features}")
    return [
        "Every example is as likely to be kept as in a random sample of each class; bins only make the sample more "
        "even. Such a random sample is the baseline to beat, and a strong one.",
        f"Examples were compared by {compared}; other features give other bins.",
        [f"One draw with seed {result.seed}; ", Mono("--seed"), " gives others from the same bins."],
    ]


def _settings(result: Condensed) -> dict[str, Cell]:
    return {
        "data": result.data,
        "share asked for": Value(result.ratio, percent(result.ratio)),
        "bins": result.bins,
        "features": result.features,
        "seed": result.seed,
        "seconds for features": result.feature_seconds,
        "seconds for selection": result.selection_seconds,
    }
