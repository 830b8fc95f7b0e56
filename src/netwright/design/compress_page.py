"""What ``netwright compress`` leaves: its figures, and the one page about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.compress.chain import Compression, Measured
from netwright.design.measure import wilson
from netwright.design.report import data_blocks, settings_blocks
from netwright.design.run import RunFolder
from netwright.design.verdict import NOISE, file_size, milliseconds, percent
from netwright.page import (
    Block,
    Bullets,
    Cell,
    Code,
    Em,
    Figure,
    Mono,
    Page,
    Paragraph,
    Section,
    Table,
    Text,
    Value,
    colour,
    svg,
)
from netwright.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

KIND, FINISHED = "compression", "compression.json"
ROW = 30  # points that a step takes in the chart
TOLD = {
    "distill": "a smaller student learned what the network answers",
    "low-rank": "layers became two thin ones each, of ranks that were learned",
    "maestro": "layers became two thin ones each, of ranks that were learned and cut in the paper's order",
    "prune": "the smallest weights became zero",
    "quantize": "weights were rounded to a few bits",
    "differentiable-quantization": "weights were rounded to a few levels, and the levels learned",
    "alternating-quantization": "weights were rounded to a few levels, and both were learned in turn",
}


@dataclasses.dataclass(frozen=True)
class Compressed(Result):
    """A compressed network.

    Attributes:
        folder: Where it is.
        model: Which one it was.
        data: What it was trained and measured on; None when there were none.
        methods: What was done to it, in order.
        trained: Whether steps were trained.
        examples: Of the test part; None without data.
        files: Bytes of each file that holds the network, by its path in the folder.
        report: Accuracy, size and speed after each step.
        missing: Forms that could not be written, and why.
        student: Name of the network that ``distill`` trained; None where it did not.
    """

    folder: str
    model: str
    data: str | None
    methods: tuple[str, ...]
    trained: bool
    examples: int | None
    files: dict[str, int]
    report: Compression
    missing: tuple[str, ...]
    student: str | None = None

    def __str__(self) -> str:
        page = Path(self.folder) / "report.html"
        return "\n".join([str(self.report), *self.missing, f"report: {page}", f"folder: {self.folder}"])


def kept(run: RunFolder) -> Compressed:
    """The result of a finished compression, from its folder."""
    found = run.read(FINISHED)
    told = found.pop("report")
    steps = tuple(Measured(**step) for step in told["steps"])
    names = {field.name for field in dataclasses.fields(Compressed)}
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items() if name in names}
    return Compressed(**{**found, "report": Compression(steps, told["ranks"]), "folder": str(run.path)})


def page(folder: str | Path) -> Page:
    """The one-page report of a finished compression.

    Raises:
        UserError: If the folder is missing, or the compression is not finished.
    """
    run = RunFolder(folder, KIND)
    described = run.described()
    run.refuse_unfinished()
    return build(kept(run), described, run.read("data.json") if run.has("data.json") else None)


def build(result: Compressed, described: Mapping[str, Any], data: Mapping[str, Any] | None) -> Page:
    """The page about a result.

    Args:
        result: What was found.
        described: What ``run.json`` holds.
        data: What ``data.json`` holds; None without data.
    """
    ranks: Sequence[Block] = [_ranks(result.report.ranks)] if result.report.ranks else []
    sections = [
        Section("", [chart(result)]),
        Section("After each step", [_figures(result.report), Bullets([_told(name) for name in result.methods])]),
        Section("Files", _files(result)),
        Section("What to doubt", [Bullets(_doubts(result, described["options"]))]),
        Section("Ranks", ranks, folded=True),
        Section("Data", data_blocks(data), folded=True),
        Section("Settings, versions and how to replay", settings_blocks(described), folded=True),
    ]
    figures = {"run": described, "data": data, "result": result.to_dict()}
    title = f"Compression of {result.model}"
    return Page(title, verdict(result), [section for section in sections if section.blocks], figures)


def verdict(result: Compressed) -> Text:
    """One sentence on what is left of size, accuracy and time."""
    first, last = result.report.steps[0], result.report.steps[-1]
    text: list[str | Em] = [
        f"After {listed(result.methods)}, {result.model} takes {file_size(last.bytes)} on disk, "
        f"{result.report.ratio:.1f} times less than before"
    ]
    if first.accuracy is not None and last.accuracy is not None and result.examples is not None:
        low, high = wilson(last.accuracy, result.examples)
        text.append(
            f", and is right on {percent(last.accuracy)} of {result.examples:,} test examples (95 % interval "
            f"{100 * low:.1f} to {percent(high)}; {percent(first.accuracy)} before)"
        )
    before, after = (min(s.torch_ms, s.runtime_ms or s.torch_ms) for s in (first, last))
    if after < (1 - NOISE) * before:
        times = f"{milliseconds(after)} instead of {milliseconds(before)}"
        return [*text, f"; one input takes {times}, each in the runtime that suits it better."]
    return [*text, "; it is ", Em("not faster"), "."]


def listed(names: Sequence[str]) -> str:
    """Names in a sentence.

    Example:
        >>> listed(["low-rank", "prune", "quantize"]), listed(["prune"])
        ('low-rank, prune and quantize', 'prune')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _told(name: str) -> Text:
    return [Mono(name), f": {TOLD[name]}"]


def _figures(report: Compression) -> Table:
    first = report.steps[0]
    rows: list[Sequence[Cell]] = [
        [
            step.step,
            None if step.accuracy is None else Value(step.accuracy, percent(step.accuracy, 2)),
            Value(step.bytes, file_size(step.bytes)),
            Value(first.bytes / step.bytes, f"{first.bytes / step.bytes:.1f}"),
            Value(step.nonzeros, f"{step.nonzeros:,}"),
            Value(step.sparse_macs, f"{step.sparse_macs:,}"),
            Value(step.torch_ms, milliseconds(step.torch_ms)),
            None if step.runtime_ms is None else Value(step.runtime_ms, milliseconds(step.runtime_ms)),
        ]
        for step in report.steps
    ]
    header = ["", "test accuracy", "on disk", "times smaller", "weights", "multiply-adds", "PyTorch", "sparse runtime"]
    shown = [i for i in range(len(header)) if i == 0 or any(row[i] is not None for row in rows)]
    return Table([header[i] for i in shown], [[row[i] for i in shown] for row in rows])


def _files(result: Compressed) -> list[Block]:
    rows: list[Sequence[Cell]] = [[[Mono(name)], Value(size, file_size(size))] for name, size in result.files.items()]
    blocks: list[Block] = [Table(["file", "size"], rows)] if rows else []
    if result.missing:
        blocks.append(Bullets(result.missing))
    code = (
        "from netwright.compress import unpacked\n"
        'network = unpacked(open("packed.safetensors", "rb").read(), model)  # model: '
        + (f"the student, {result.student}" if result.student else "the network before")
    )
    return [*blocks, Paragraph("The packed weights are read back bit for bit:"), Code(code, "python")]


def _ranks(ranks: Mapping[str, int]) -> Table:
    return Table(["layer", "rank"], [[name, rank] for name, rank in ranks.items()], "Layers that are two now")


def _doubts(result: Compressed, options: Mapping[str, Any]) -> list[Text]:
    first, last = result.report.steps[0], result.report.steps[-1]
    found: list[Text] = []
    if not result.trained:
        found.append("Nothing was trained: weights were only cut and rounded. With data every step is trained.")
    if first.accuracy is not None and last.accuracy is not None and result.examples:
        a, b = wilson(first.accuracy, result.examples), wilson(last.accuracy, result.examples)
        if max(a[0], b[0]) <= min(a[1], b[1]):
            found.append(
                f"Whether accuracy changed at all is more than {result.examples:,} test examples can tell: the 95 % "
                "intervals before and after share values."
            )
        found.append(f"One run with seed {options['seed']}: other seeds differ, mostly within the interval.")
    found.append(
        "Times are medians of one input on one thread of this machine, in alternating rounds. Low bits make the file "
        "small, and the network no faster: it computes in 32 bits. Zeros pay in the sparse runtime alone."
    )
    return found


def chart(result: Compressed) -> Figure:
    """Accuracy, size on disk and latency after each step, a row a step."""
    steps = result.report.steps
    measured = all(step.accuracy is not None for step in steps) and result.examples is not None

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots(1, 2 + measured, sharey=True, squeeze=False)[0]
        places = range(len(steps))
        if measured:
            _accuracies(axes[0], steps, result.examples or 1)
        _sizes(axes[-2], steps)
        _times(axes[-1], steps)
        for ax in axes:
            ax.tick_params(axis="y", length=0)
            ax.spines["left"].set_visible(False)
            ax.grid(axis="y", visible=False)
            ax.locator_params(axis="x", nbins=4)
        axes[0].set_yticks(places, [step.step for step in steps])
        axes[0].set_ylim(len(steps) - 0.4, -0.6)

    reading = "Each row is the network after one more step."
    if measured:
        reading += " Bars through the accuracies are 95 % intervals on the test examples."
    if any(step.runtime_ms is not None for step in steps):
        reading += " Filled dots are milliseconds in PyTorch, hollow ones in netwright's sparse runtime."
    data = [step.to_dict() for step in steps]
    return Figure(svg(paint, width=450, height=52 + ROW * len(steps)), reading, data=data)


def _accuracies(ax: Axes, steps: Sequence[Measured], examples: int) -> None:
    ends = []
    for place, step in enumerate(steps):
        low, high = wilson(step.accuracy or 0.0, examples)
        ends += [low, high]
        ax.plot([100 * low, 100 * high], [place, place], color=colour("blue"), linewidth=1)
        ax.plot([100 * (step.accuracy or 0.0)], [place], "o", ms=6, color=colour("blue"))
        ax.annotate(
            f"{100 * (step.accuracy or 0.0):.1f}", (100 * (step.accuracy or 0.0), place), (0, 5),
            textcoords="offset points", ha="center", fontsize=8.5,
        )  # fmt: skip
    margin = 0.06 * (max(ends) - min(ends))
    ax.set_xlim(100 * (min(ends) - margin), 100 * (max(ends) + margin))
    ax.set_title("test accuracy, %")


def _sizes(ax: Axes, steps: Sequence[Measured]) -> None:
    unit, name = (1e6, "MB") if steps[0].bytes >= 1e6 else (1e3, "kB")
    sizes = [step.bytes / unit for step in steps]
    ax.barh(range(len(steps)), sizes, height=0.55, color=colour("blue"))
    for place, size in enumerate(sizes):
        text = f"{size:.3g}" if size < 100 else f"{size:.0f}"
        ax.annotate(text, (size, place), (3, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.set_xlim(0, 1.24 * max(sizes))
    ax.set_title(f"on disk, {name}")


def _times(ax: Axes, steps: Sequence[Measured]) -> None:
    hue = colour("orange")
    for place, step in enumerate(steps):
        if step.runtime_ms is not None:
            ax.plot([step.torch_ms, step.runtime_ms], [place, place], color=colour("muted"), linewidth=0.8)
            ax.plot([step.runtime_ms], [place], "o", ms=6, mec=hue, mfc=colour("surface"), mew=1.5, clip_on=False)
        ax.plot([step.torch_ms], [place], "o", ms=6, color=hue, clip_on=False)
    most = max(max(step.torch_ms, step.runtime_ms or 0.0) for step in steps)
    ax.set_xlim(0, 1.1 * most)
    ax.set_title("one input, ms")
