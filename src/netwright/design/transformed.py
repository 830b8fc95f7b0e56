"""What natural transformations make of the user's images: a page to look at, and a section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright import storage
from netwright.console import UserError
from netwright.design.run import RunFolder
from netwright.design.verdict import percent
from netwright.page import Block, Cell, Images, Page, Paragraph, Picture, Section, Table, Value, png

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import Data

FIGURES, PICTURES, NAME = "natra.json", "natra.npz", "transformed"
ROWS, STEPS, GAP, EDGE = 5, 5, 2, 320


def write(
    run: RunFolder, methods: Sequence[Any], network: nn.Module, data: Data, changed: Tensor | None = None
) -> None:
    """Leaves figures, pictures and the page of the method that has transformed images; nothing without such a method.

    Args:
        run: Whose folder.
        methods: Those that were trained with.
        network: What came of it, which has no part in this.
        data: That was trained on.
        changed: Which labels were made wrong on purpose, which has no part in this.
    """
    import torch

    from netwright.data.loading import one_each

    found = next((each for each in methods if hasattr(each, "transformed_samples")), None)
    prepared = None if found is None else found.transformed_samples()
    if found is None or prepared is None:
        return
    transform = prepared.transform
    shown = one_each(data.train, data.classes, limit=ROWS)
    labels = data.train.labels
    index = torch.tensor([int((labels == data.classes.index(name)).nonzero()[0]) for name, _ in shown])
    eps = torch.linspace(-found.eps_max, found.eps_max, STEPS)
    made = torch.stack([
        torch.stack([
            transform.at(index, torch.full_like(index, j), value.expand(len(index))) for value in eps
        ], 1)
        for j in range(transform.num_directions)
    ])  # fmt: skip
    pixels = (made.clamp(0, 1) * 255).round().byte().permute(0, 1, 2, 4, 5, 3).numpy()
    storage.write_arrays(run / PICTURES, {"images": pixels})
    classes = [name for name, _ in shown]
    run.write(FIGURES, {**prepared.figures(), "eps": [round(float(value), 4) for value in eps], "classes": classes})
    page(run).write(run.path, NAME)


def read(run: RunFolder) -> dict[str, Any] | None:
    """The figures that :func:`write` left; None where no method transforms images."""
    return run.read(FIGURES) if run.has(FIGURES) else None


def told(figures: dict[str, Any]) -> str:
    """One sentence on the directions."""
    kept, looked_at = len(figures["flip"]), figures["looked_at"]
    return (
        f"Of {looked_at} directions of the generator {kept} change images visibly and leave the class alone, by the "
        "predictions of a classifier that was trained on the images as they are."
    )


def page(run: RunFolder) -> Page:
    """The page of transformed samples.

    Raises:
        UserError: If no method of the run transforms images, or a file is damaged.
    """
    figures = read(run)
    if figures is None:
        raise UserError("no method of this run transforms images", where=run.path)
    return Page("Natural transformations", told(figures), [Section("", blocks(run, verdict=False))], {"natra": figures})


def lines(run: RunFolder) -> list[str]:
    """What the terminal says."""
    return [f"transformed samples: {run.path / NAME}.html"] if run.has(FIGURES) else []


def blocks(run: RunFolder, *, verdict: bool = True) -> list[Block]:
    """The section of a page: what is known of each direction, and pictures along it.

    Args:
        run: Whose folder.
        verdict: Whether it begins with the sentence that a page of its own has for its verdict.

    Raises:
        UserError: If a file is damaged.
    """
    figures = read(run)
    if figures is None:
        return []
    (images,) = storage.read_arrays(run / PICTURES, ["images"])
    steps = ", ".join(f"{value:g}" for value in figures["eps"])
    reading = (
        f"{told(figures) + ' ' if verdict else ''}A pixel of what the generator makes of the codes of images is off by "
        f"{figures['reconstruction'] ** 0.5:.3f} (root mean square, of 1), and the classifier is right on "
        f"{percent(figures['reference'])} of it; what the codes miss of an image is added again when it is moved. Look "
        "at the pictures: a direction that makes another class of an image teaches wrong labels; a smaller max_flip or "
        "max_directions leaves it out."
    )
    captions = [
        f"direction {j + 1}: {percent(flip)} of predictions change, pixels by {change:.3f}"
        for j, (flip, change) in enumerate(zip(figures["flip"], figures["change"], strict=True))
    ]
    pictures = [Picture(png(_strip(each), edge=EDGE), text) for each, text in zip(images, captions, strict=True)]
    classes = ", ".join(figures["classes"])
    shown = f"An image of each of {classes}, moved by {steps} standard deviations; the middle is 0."
    rows: list[list[Cell]] = [
        [j + 1, Value(flip, percent(flip)), Value(change, f"{change:.3f}")]
        for j, (flip, change) in enumerate(zip(figures["flip"], figures["change"], strict=True))
    ]
    checked = figures.get("step") or 2.0  # at which runs of earlier versions looked
    return [
        Paragraph(reading),
        Images(pictures, shown, wide=True),
        Table(
            ["direction", "changed predictions", "change of a pixel"],
            rows,
            f"At {checked:g} standard deviations, both ways.",
        ),
    ]


def _strip(images: np.ndarray) -> np.ndarray:
    """Rows of images (R, E, H, W, C) side by side with white between them, small ones enlarged."""
    count, steps, height, width, channels = images.shape
    times = max(1, EDGE // (steps * (max(height, width) + GAP)))
    large = images.repeat(times, 2).repeat(times, 3)
    sheet = np.full(
        (count * (times * height + GAP) - GAP, steps * (times * width + GAP) - GAP, channels), 255, np.uint8
    )
    for row in range(count):
        for column in range(steps):
            y, x = row * (times * height + GAP), column * (times * width + GAP)
            sheet[y : y + times * height, x : x + times * width] = large[row, column]
    return sheet
