"""What a training leaves about biases: translated samples to look at, and accuracies where the data tell their bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from netwright import storage
from netwright.design.run import RunFolder
from netwright.design.verdict import percent
from netwright.page import Block, Cell, Images, Page, Paragraph, Picture, Section, Table, Value, png

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import Data

FIGURES, PICTURES, PAGE = "bias.json", "views.npz", "views"
MOST_CLASSES, ROWS_A_CLASS, MOST_ROWS = 10, 3, 30
GAP = 2  # pixels between two pictures of a strip


def write(
    run: RunFolder, methods: Sequence[Any], network: nn.Module, data: Data, changed: Tensor | None = None
) -> None:
    """Leaves what there is to say: nothing where no method translates and the data tell no bias.

    What an earlier call left of translations stays where no method translates, as for a network that is pruned.

    Args:
        run: Whose folder.
        methods: Of the training; one with a ``translator`` has its samples shown.
        network: That was trained, for images that ``data`` normalises.
        data: That it was trained on.
        changed: Which labels were made wrong on purpose, which has no part in this.
    """
    from torch import Tensor

    from netwright.train.debias import bias_metrics

    figures = read(run) or {}
    bias = getattr(data.test, "bias", None)
    if isinstance(bias, Tensor):
        figures["accuracies"] = bias_metrics(_answers(network, data, data.test), data.test.labels, bias)
    for method in methods:
        if getattr(method, "translator", None) is not None:
            figures["translations"] = _translated(run, method.translator, network, data)
    if figures:
        run.write(FIGURES, figures)
    if "translations" in figures:
        head = Section("", [translation_block(run)])
        verdict = told(figures["translations"])
        Page(f"Translated samples of {data.name}", verdict, [head], figures).write(run.path, PAGE)


def _answers(network: nn.Module, data: Data, images: Any) -> Tensor:
    from netwright.data.tensors import Batches
    from netwright.train import evaluate

    whole = Batches(images, 256, shuffle=False, drop_last=False, normalise=data.normalise())
    return evaluate(network, whole)[0].argmax(1)


def _translated(run: RunFolder, translator: Any, network: nn.Module, data: Data) -> dict[str, Any]:
    """Keeps strips of validation images in other classes, and measures what translating does to them."""
    from netwright.train.debias import quality, translation_rates
    from netwright.train.debias.views import panel, translated

    found = quality.translation_quality(translator, data)
    images, labels = quality.sample(data)
    count = len(data.classes)
    targets = quality.other_classes(labels, count)
    made = translated(translator, images, targets)
    kept = quality.answers(network, made, labels, data.normalise())
    rates = translation_rates(targets, kept, labels, targets)
    shown = [round(i * (count - 1) / max(1, min(count, MOST_CLASSES) - 1)) for i in range(min(count, MOST_CLASSES))]
    rows = [row for label in shown for row in (labels == label).nonzero().flatten()[:ROWS_A_CLASS].tolist()]
    strips = panel(translator, images[rows], shown)
    storage.write_arrays(run / PICTURES, {"strips": strips.permute(0, 1, 3, 4, 2).numpy()})
    return {
        **rates,
        "bias transfer": found.transfer,
        "figure kept": found.kept,
        "change": found.change,
        "faults": list(found.faults()),
        "images": len(labels),
        "classes": [data.classes[label] for label in shown],
        "labels": [data.classes[label] for label in labels[rows].tolist()],
    }


def read(run: RunFolder) -> dict[str, Any] | None:
    """What :func:`write` left of figures; None where there was nothing to say."""
    return run.read(FIGURES) if run.has(FIGURES) else None


def told(figures: dict[str, Any]) -> str:
    """What translating did to validation images, and whether the translator was ready."""
    text = (
        f"Of {figures['images']} validation images that were translated into another class, a network that learns "
        f"what is easy takes {percent(figures['bias transfer'])} for the class they were translated into, and the "
        f"debiased network {percent(figures['signal kept'])} for the class they came from."
    )
    if figures.get("figure kept") is not None:
        text += f" One that sees no colour takes {percent(figures['figure kept'])} for the class they came from."
    faults = figures.get("faults", [])
    if faults:
        text += f" Do not trust the network yet: {'; '.join(faults)}."
    return text


def lines(run: RunFolder) -> list[str]:
    """What the terminal says."""
    figures = read(run) or {}
    found = []
    if "accuracies" in figures:
        found.append(_accuracies_told(figures["accuracies"]))
    if "translations" in figures:
        found += [told(figures["translations"]), f"translated samples: {run.path / PAGE}.html"]
    return found


def _accuracies_told(accuracies: dict[str, float | None]) -> str:
    names = ("unbiased", "aligned", "conflicting", "worst group")
    shown = [f"{name} {percent(value)}" for name in names if (value := accuracies[name]) is not None]
    return f"accuracy by bias: {', '.join(shown)}"


def blocks(run: RunFolder) -> list[Block]:
    """The section of a page: accuracies by bias, and one strip a class.

    Raises:
        UserError: If a file is damaged.
    """
    figures = read(run) or {}
    found: list[Block] = []
    if "accuracies" in figures:
        named = {
            "mean over classes and biases": "unbiased",
            "bias is that of the class": "aligned",
            "bias is another one": "conflicting",
            "worst class and bias": "worst group",
        }
        rows: list[Sequence[Cell]] = [
            [name, Value(value, percent(value, 2))]
            for name, key in named.items()
            if (value := figures["accuracies"][key]) is not None
        ]
        found.append(Table(["test accuracy by bias", ""], rows))
    if "translations" in figures:
        found += [Paragraph(told(figures["translations"])), translation_block(run, each=1)]
    return found


def translation_block(run: RunFolder, each: int = ROWS_A_CLASS) -> Images:
    """Strips of translated samples, and what to look for in them.

    Args:
        run: Whose folder.
        each: Strips a class, at most.

    Raises:
        UserError: If a file is damaged.
    """
    figures = run.read(FIGURES)["translations"]
    (strips,) = storage.read_arrays(run / PICTURES, ["strips"], "delete the folder and run the command again")
    seen = dict.fromkeys(figures["labels"], 0)
    pictures: list[Picture] = []
    for strip, label in zip(strips, figures["labels"], strict=True):
        seen[label] += 1
        if seen[label] <= each and len(pictures) < MOST_ROWS:
            pictures.append(Picture(png(_strip(strip), edge=600), label))
    classes = ", ".join(figures["classes"])
    reading = (
        f"Each row: a validation image, then what the translator makes of it for {classes}. Down a column, what is "
        "easy should be alike: colour, texture, background. Along a row, what makes the class should stay. Where the "
        "figure itself changes, train the translator longer (steps) or try another lambda_rec, smaller ones too; where "
        "nothing changes, the data have no bias that is easier than their signal, and this method has nothing to work "
        "with."
    )
    return Images(pictures, reading, wide=True)


def _strip(pictures: np.ndarray) -> np.ndarray:
    """(columns, height, width, channels) side by side on white, the image itself a little apart, at least 32 high."""
    times = max(1, -(-32 // pictures.shape[1]))
    apart = np.full((pictures.shape[1], GAP, pictures.shape[3]), 255, np.uint8)
    parts = [pictures[0], apart, apart]
    for picture in pictures[1:]:
        parts += [picture, apart]
    return np.concatenate(parts[:-1], 1).repeat(times, 0).repeat(times, 1)
