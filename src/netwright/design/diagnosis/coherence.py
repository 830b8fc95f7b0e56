"""The diagnosis of gradient coherence: do the examples of a class, and all of them, pull the weights the same way?

And while the network learned: a run has that on record.

Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv:2203.10036.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netwright.console import task
from netwright.design import charts
from netwright.design.diagnosis.findings import Finding, Sample, cross_entropy
from netwright.diagnose.coherence import CoherenceResult, Sums, alignment
from netwright.diagnose.gradients import ExampleGradients
from netwright.page import Block, Cell, Images, Paragraph, Picture, Table, Value, colour, png, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

MOST_BARS = 30
MOST_PICTURES = 12
LEARNING = "While it learned"
UNRECORDED = (
    "How coherence changed while the network learned is not on record: netwright design records it, and "
    "CoherenceCallback does in a training of your own."
)


def diagnose(sample: Sample) -> Finding:
    """Coherence of all examples, of each class, and the examples that pull against the rest.

    Raises:
        ValueError: If a gradient is not finite.
    """
    order = sample.labels.argsort(stable=True)
    gradients = ExampleGradients(sample.network, cross_entropy)
    whole = Sums()
    classes: list[dict[str, Any]] = []
    with task("gradient coherence", total=2 * len(sample)) as bar:
        for label in sample.labels.unique().tolist():
            own = order[sample.labels[order] == label]
            sums = Sums().add(gradients, sample.batches(own))
            classes.append({"class": sample.classes[label], "examples": len(own), **_of_class(sums)})
            whole.join(sums)
            bar.advance(len(own))
        found = whole.result(per_layer=True)
        if found.mean_grad_norm2 > 0:
            # Without an example itself, whose gradient may be most of the mean once the others are fitted.
            rest = alignment(gradients, list(sample.batches(order)), whole, "coherence", leave_one_out=True)
        else:
            rest = torch.full((len(sample),), math.nan, dtype=torch.float64)
        bar.advance(len(sample))
    for row, own in zip(classes, rest.split([row["examples"] for row in classes]), strict=True):
        row |= {"with the rest": float(own.mean()), "against": int((own < 0).sum())}
    against = int((rest < 0).sum())
    learning = charts.coherence(sample.training)
    figures = {
        **found.to_dict(),
        "pairwise": found.pairwise,
        "against": against,
        "classes": classes,
        "over_training": None if learning is None else [list(point) for point in learning.data],
    }
    worst = order[rest.argsort(stable=True)]
    return Finding(
        title="Gradient coherence",
        verdict=_verdict(found, classes, against),
        chart=_chart(found, classes),
        reading=(
            "A bar is how far two different examples of a class agree: the mean product of their gradients over the "
            "mean square, 1 if they are equal, 0 if they have nothing in common, below 0 if learning one undoes the "
            "other; the line is the same for any two examples, whatever their class.",
            "What is left to learn of a class with a short bar differs from example to example: it is fitted already "
            "where its loss in the table is small, else memorised one by one; compare networks at the same loss only.",
        ),
        figures=figures,
        blocks=[
            _table(classes),
            *_pictures(sample, worst, rest.sort(stable=True).values),
            Paragraph(UNRECORDED) if learning is None else dataclasses.replace(learning, title=LEARNING),
        ],
        details=[_layers(found)],
    )


def _of_class(sums: Sums) -> dict[str, Any]:
    """Figures of one class; those that take two examples are None for a single one."""
    found = {"loss": sums.loss / sums.m, "m_coherence": None, "pairwise": None}
    if sums.m < 2:
        return found
    result = sums.result(quiet=True)
    return found | {"m_coherence": result.m_coherence, "pairwise": result.pairwise}


def _known(row: dict[str, Any]) -> bool:
    return row["pairwise"] is not None and math.isfinite(row["pairwise"])


def _verdict(found: CoherenceResult, classes: list[dict[str, Any]], against: int) -> str:
    if math.isnan(found.alpha):
        return (
            f"Every gradient of {found.m} training examples is zero: nothing is left to learn, and nothing to measure."
        )
    helped = f"A small step on one of {found.m} training examples helps {found.m_coherence:.3g} of them"
    pull = f"{against} of them pull{'s' if against == 1 else ''} against the rest"
    known = [row for row in classes if _known(row)]
    if not known:
        return f"{helped}; {pull}."
    least = min(known, key=lambda row: row["pairwise"])
    return f"{helped}; the examples of class {least['class']} agree least ({least['pairwise']:.3g}); {pull}."


def _chart(found: CoherenceResult, classes: list[dict[str, Any]]) -> str:
    rows = sorted((row for row in classes if _known(row)), key=lambda row: row["pairwise"])
    if len(rows) > MOST_BARS:
        rows = [*rows[: MOST_BARS // 2], *rows[-MOST_BARS // 2 :]]

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        names = [row["class"] if len(row["class"]) <= 24 else f"{row['class'][:23]}\u2026" for row in rows]
        ax.barh(range(len(rows)), [row["pairwise"] for row in rows], color=colour("blue"), height=0.7)
        ax.set_yticks(range(len(rows)), names)
        ax.grid(axis="y", visible=False)
        if math.isfinite(found.pairwise):
            ax.axvline(found.pairwise, color=colour("orange"), label="all classes together")
            ax.legend(loc="lower right")
        ax.axvline(0, color=colour("muted"), linewidth=0.7)
        ax.set_xlabel("coherence of two different examples")

    return svg(paint, width=430, height=80 + 17 * max(3, len(rows)))


def _table(classes: list[dict[str, Any]]) -> Table:
    header = ["class", "examples", "loss", "m-coherence", "of two examples", "with the rest", "against the rest"]
    rows: list[list[Cell]] = [
        [
            row["class"],
            row["examples"],
            row["loss"],
            row["m_coherence"],
            row["pairwise"],
            row["with the rest"],
            row["against"],
        ]
        for row in classes
    ]
    caption = (
        "m-coherence is the number of examples of the class that a step on one of them helps; with the rest is how far "
        "an example agrees with all others, whatever their class; against the rest are those for which that is below 0."
    )
    return Table(header, rows, caption)


def _pictures(sample: Sample, worst: Tensor, rest: Tensor) -> list[Block]:
    chosen = worst[:MOST_PICTURES][rest[:MOST_PICTURES] < 0]
    if not sample.picture or not len(chosen):
        return []
    items = [
        Picture(
            png(sample.images[i].permute(1, 2, 0).numpy()), f"{sample.classes[int(sample.labels[i])]} ({value:.3g})"
        )
        for i, value in zip(chosen.tolist(), rest.tolist(), strict=False)
    ]
    reading = (
        "The examples that pull hardest against the rest, with their labels: a step that helps the others "
        "makes these worse. Look for wrong labels here first; classes that are confused are here too."
    )
    return [Images(items, reading)]


def _layers(found: CoherenceResult) -> Table:
    rows: list[list[Cell]] = [
        [name or "the network", each.m_coherence, Value(each.grad_norm2_mean, f"{each.grad_norm2_mean:.3g}")]
        for name, each in found.per_layer.items()
    ]
    return Table(["layer", "m-coherence", "mean squared gradient"], rows, "Each layer's parameters alone.")
