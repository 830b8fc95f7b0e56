"""The training examples whose label a network doubts: a list to act on, a page section, lines on screen."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright import storage
from netwright.design.run import RunFolder
from netwright.design.verdict import percent
from netwright.page import Block, Bullets, Images, Paragraph, Picture, Table, Value, png

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import Data
    from netwright.train import LabelDoubts

LIST, FIGURES, PICTURES = "doubts.csv", "doubts.json", "doubts.npz"
COLUMNS = ("rank", "file", "array", "row", "index", "label", "suggested", "score", "support")
MOST_PICTURES, MOST_ROWS, MOST_LINES = 24, 100, 10
EDGE = 96  # pixels of a stored picture, at most


def find(methods: Sequence[Any], data: Data) -> LabelDoubts | None:
    """The doubts of the training method that has any; None without such a method."""
    for method in methods:
        if hasattr(method, "doubts"):
            return method.doubts(data.train.labels)
    return None


def write(
    run: RunFolder, methods: Sequence[Any], network: nn.Module, data: Data, changed: Tensor | None = None
) -> None:
    """Leaves what the training method that doubts labels has to say; nothing without such a method.

    Args:
        run: Whose folder.
        methods: That were trained with.
        network: What came of it, which has no part in this.
        data: That was trained on.
        changed: Which labels were made wrong on purpose, if any were.
    """
    found = find(methods, data)
    if found is not None:
        write_list(run, data, found, changed)


def write_list(run: RunFolder, data: Data, found: LabelDoubts, changed: Tensor | None = None) -> None:
    """Leaves the whole list as a table for any program, the figures, and pictures of the most doubtful.

    Args:
        run: Whose folder.
        data: That was trained on.
        found: The doubts of the training part.
        changed: Which labels were made wrong on purpose, if any were.
    """
    names = list(data.classes)
    rows: list[list[Any]] = []
    doubts = zip(found.index, found.given, found.suggested, found.score, found.support, strict=True)
    for rank, (index, given, suggested, score, support) in enumerate(doubts, 1):
        place = data.place("train", index)
        row = "" if place.row is None else place.row
        rows.append([rank, place.file, place.array, row, index, names[given], names[suggested], score, support])
    header = list(COLUMNS)
    figures: dict[str, Any] = {"examples": found.examples, "doubtful": len(found), "columns": header}
    if changed is not None:
        wrong = changed[list(found.index)].tolist() if len(found) else []
        header.append("made_wrong")
        rows = [[*row, int(each)] for row, each in zip(rows, wrong, strict=True)]
        figures |= {"made_wrong": int(changed.sum()), "made_wrong_found": sum(wrong)}
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([header, *rows])
    storage.write_text(run / LIST, buffer.getvalue())
    pictures = [_picture(data, index) for index in found.index[:MOST_PICTURES]]
    if pictures and pictures[0].ndim == 3:
        storage.write_arrays(run / PICTURES, {"images": np.stack(pictures)})
    run.write(FIGURES, {**figures, "rows": rows[:MOST_ROWS]})


def _picture(data: Data, index: int) -> np.ndarray:
    """(height, width, 1 or 3) uint8, at most EDGE pixels a side; of what is no picture, one dimension."""
    image = data.train[index][0]
    if image.shape[0] not in (1, 3) or min(image.shape[1:]) == 1:
        return np.zeros(1)
    step = -(-max(image.shape[1:]) // EDGE)
    pixels = image.numpy().transpose(1, 2, 0)[::step, ::step].astype(np.float64)
    low, high = min(0.0, float(pixels.min())), max(1.0, float(pixels.max()))
    return np.rint((pixels - low) / (high - low) * 255).astype(np.uint8)


def read(run: RunFolder) -> dict[str, Any] | None:
    """What :func:`write_list` left of figures and first rows; None where no method doubts labels."""
    return run.read(FIGURES) if run.has(FIGURES) else None


def told(figures: dict[str, Any]) -> str:
    """One sentence on how many labels are doubted."""
    share = figures["doubtful"] / figures["examples"] if figures["examples"] else 0.0
    text = f"{figures['doubtful']} of {figures['examples']} training labels are doubted ({percent(share)})"
    if "made_wrong" in figures:
        text += f", among them {figures['made_wrong_found']} of the {figures['made_wrong']} that were made wrong"
    return text


def lines(run: RunFolder) -> list[str]:
    """What the terminal says: the most doubtful examples, and where the list is."""
    figures = read(run)
    if figures is None:
        return []
    shown = [
        f"  {_place(row)}: labelled {row['label']}, looks like {row['suggested']} (doubt {row['score']:.2f})"
        for row in _rows(figures)[:MOST_LINES]
    ]
    return [f"{told(figures)}{':' if shown else '.'}", *shown, f"labels to check: {run.path / LIST}"]


def blocks(run: RunFolder) -> list[Block]:
    """The section of a page: pictures of the most doubtful examples, and the head of the list.

    Raises:
        UserError: If a file is damaged.
    """
    figures = read(run)
    if figures is None:
        return []
    reading = (
        f"{told(figures)}: the running average of what the network predicted for the example while it trained holds "
        "most of another class. The doubt is one minus the average's share of the label. A label can be right all the "
        "same, of a rare kind of example above all: look before you change it."
    )
    rows = _rows(figures)
    if not rows:
        return [Paragraph(f"{told(figures)}: the averages of what the network predicted agree with all labels.")]
    made: list[Block] = [Paragraph(reading)]
    captions = [
        f"{_name(row)}: labelled {row['label']}, looks like {row['suggested']} ({row['score']:.2f})"
        for row in rows[:MOST_PICTURES]
    ]
    images = _stored(run / PICTURES)
    if images is None:
        made.append(Bullets(captions))
    else:
        pairs = zip(images, captions, strict=True)
        made.append(Images([Picture(png(image), text) for image, text in pairs], "The most doubtful examples."))
    table = [
        [_place(row), row["label"], row["suggested"], _rounded(row["score"]), _rounded(row["support"])] for row in rows
    ]
    header = ["example", "label", "looks like", "doubt", "support of that"]
    made.append(Table(header, table, f"The first {len(rows)} of {figures['doubtful']}; all are in {LIST}."))
    return made


def _rounded(value: float) -> Value:
    return Value(value, f"{value:.3f}")


def _rows(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [dict(zip(figures["columns"], row, strict=True)) for row in figures["rows"]]


def _place(row: Mapping[str, Any]) -> str:
    """Where the example is: its file, or its row of the user's array."""
    if row["file"]:
        return str(row["file"])
    if row.get("array"):
        return f"{row['array']}[{row['row']}]"
    return f"training example {row['index']}"  # a run of an earlier version


def _name(row: Mapping[str, Any]) -> str:
    return Path(row["file"]).name if row["file"] else _place(row)


def _stored(file: Path) -> np.ndarray | None:
    if not file.exists():
        return None
    images: np.ndarray = storage.read_arrays(file, ["images"])[0]
    return images
