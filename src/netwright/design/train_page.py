"""What ``netwright train`` leaves: its figures, and the one page about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.design import remarks
from netwright.design.report import confusion_blocks, data_blocks, settings_blocks
from netwright.design.run import RunFolder
from netwright.design.verdict import percent
from netwright.page import Bullets, Cell, Figure, Page, Section, Table, Text, Value, svg
from netwright.page.pictures import colour
from netwright.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

KIND, FINISHED = "training", "result.json"


@dataclasses.dataclass(frozen=True)
class TrainResult(Result):
    """What a finished training found.

    Attributes:
        folder: Of the run.
        model: The network, as it was named.
        methods: The training methods, as they were named.
        told: What each of them does, a sentence each.
        accuracy: Share of test examples that are right, in [0, 1].
        low: Lower end of its 95 % interval (Wilson).
        high: Upper end.
        nll: Negative log-likelihood on the test part, in nats.
        ece: Expected calibration error, in percent.
        aurc: Area under the risk-coverage curve, times 1000.
        examples: Of the test part.
        parameters: Of the network.
        seconds: Wall time of the training, over all sittings.
        confusion: Counts; row is the true class, column the answer.
        doubted: Training examples whose label the network doubts; None where no method tells.
        before: Accuracy of a linear probe on the features before pre-training without labels; None without such.
        neighbours: Accuracy of the nearest neighbours' vote on the features after it; None likewise.
        preparation: Wall time of what the methods learned of the data before training, over all sittings; None where
            they learn nothing.
    """

    folder: str
    model: str
    methods: tuple[str, ...]
    told: tuple[str, ...]
    accuracy: float
    low: float
    high: float
    nll: float
    ece: float
    aurc: float
    examples: int
    parameters: int
    seconds: float
    confusion: tuple[tuple[int, ...], ...]
    doubted: int | None = None
    before: float | None = None
    neighbours: float | None = None
    preparation: float | None = None


def kept(run: RunFolder) -> TrainResult:
    """The result of a finished training, from its folder."""
    found = run.read(FINISHED)
    found |= {name: tuple(found[name]) for name in ("methods", "told")}
    found |= {"confusion": tuple(map(tuple, found["confusion"]))}
    return TrainResult(folder=str(run.path), **found)


def page(folder: str | Path) -> Page:
    """The one-page report of a finished training.

    Raises:
        UserError: If the folder is missing, or the training is not finished.
    """
    run = RunFolder(folder, KIND)
    described = run.described()
    run.refuse_unfinished()
    result, data = kept(run), run.read("data.json")
    epochs = run.read("training.json")["epochs"]
    sections = [
        Section("", [curve] if (curve := curves(epochs)) is not None else []),
        Section("Figures", [_figures(result)]),
        Section("Methods", [Bullets(result.told)]),
        *(Section(title, remarks.blocks(run, name)) for name, (title, _) in remarks.PARTS.items()),
        Section("What to doubt", [Bullets(_doubts(result, data, described["options"]["seed"]))]),
        Section("Confusion matrix", confusion_blocks(result.to_dict(), data["classes"]), folded=True),
        Section("Data", data_blocks(data), folded=True),
        Section("Settings, versions and how to replay", settings_blocks(described), folded=True),
    ]
    figures = {"run": described, "data": data, "result": result.to_dict(), "training": epochs, **remarks.figures(run)}
    return Page(f"Training on {data['name']}", verdict(result), [s for s in sections if s.blocks], figures)


def verdict(result: TrainResult) -> str:
    """One sentence on what was trained, how, and how good it is."""
    names = [text.partition(":")[0] for text in result.methods if text != "plain"]
    how = f" with {', '.join(names)}" if names else ""
    done, by = ("trained", "") if result.before is None else ("pre-trained without labels", ", by a linear probe")
    before = "" if result.before is None else f"; {percent(result.before)} before"
    return (
        f"{result.model}, {done}{how}, is right on {percent(result.accuracy)} of {result.examples} test examples{by} "
        f"(95 % interval {100 * result.low:.1f} to {percent(result.high)}{before})."
    )


def _figures(result: TrainResult) -> Table:
    probes = {
        "accuracy of the linear probe before pre-training": result.before,
        "accuracy of the vote of the nearest training examples": result.neighbours,
    }
    told: list[Sequence[Cell]] = [
        [name, Value(share, percent(share, 2))] for name, share in probes.items() if share is not None
    ]
    rows: list[Sequence[Cell]] = [
        ["test accuracy", Value(result.accuracy, percent(result.accuracy, 2))],
        *told,
        ["negative log-likelihood, nats", Value(result.nll, f"{result.nll:.4f}")],
        ["expected calibration error", Value(result.ece, f"{result.ece:.2f} %")],
        ["area under the risk-coverage curve, times 1000", Value(result.aurc, f"{result.aurc:.2f}")],
        ["parameters", Value(result.parameters, f"{result.parameters:,}")],
        ["training time, seconds", Value(result.seconds, f"{result.seconds:.0f}")],
    ]
    if (before := result.preparation) is not None:
        rows.append(["time of what methods learn before, seconds", Value(before, f"{before:.0f}")])
    return Table(["on the test part", ""], rows)


def _doubts(result: TrainResult, data: Mapping[str, Any], seed: int) -> list[Text]:
    counts = data["counts"]["train"]
    smallest = min(counts, key=counts.get)
    vain = [
        "The linear probe was as good before pre-training: give it more epochs or images, or another learning rate."
    ]
    return [
        *(vain if result.before is not None and result.accuracy <= result.before else []),
        f"One run with seed {seed}: other seeds differ, mostly within the interval.",
        f"The smallest class in training is {smallest} with {counts[smallest]} examples.",
        "Whether a method helps here is told by the same command without it.",
    ]


def curves(epochs: Sequence[Mapping[str, float]]) -> Figure | None:
    """Validation accuracy and training loss over the epochs; None when neither was recorded."""
    panels = {"val_accuracy": ("validation accuracy, %", 100.0), "train_loss": ("training loss", 1.0)}
    lines = {
        name: [(i + 1, scale * epoch[name]) for i, epoch in enumerate(epochs) if epoch.get(name) is not None]
        for name, (_, scale) in panels.items()
    }
    shown = [name for name in panels if lines[name]]
    if not shown:
        return None

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for ax, name in zip(axes, shown, strict=True):
            ax.plot(*zip(*lines[name], strict=True), color=colour("blue"), marker="." if len(epochs) == 1 else None)
            ax.set_title(panels[name][0], color=colour("muted"))
        axes[-1].set_xlabel("epoch")
        axes[-1].locator_params(axis="x", integer=True)

    sign = "An accuracy that still rises" if "val_accuracy" in shown else "A loss that still falls"
    reading = f"{sign} at the end asks for more epochs."
    return Figure(svg(paint, width=430, height=60 + 150 * len(shown)), reading, data=lines)
