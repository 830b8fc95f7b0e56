"""The charts of a report, each with one sentence on how to read it. Labels stand beside what they name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.design.verdict import latency
from netwright.page import Figure, colour, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D
    from matplotlib.transforms import Bbox

Figures = Mapping[str, Any]

NETWORKS = {
    "model": "designed, pruned",
    "dense": "designed, dense",
    "baseline": "baseline, pruned",
    "baseline_dense": "baseline, dense",
}
STAGES = {"pretrain": "dense training", "prune": "pruning", "finetune": "fine-tuning"}
SPARSE_RUNTIME = "netwright"
MOST_NUMBERED_CLASSES = 12
MOST_NAMED_CLASSES = 40
MOST_CELLS = 4000


def _hue(network: str) -> str:
    return colour("orange" if network.startswith("baseline") else "blue")


def accuracy_latency(measurements: Figures) -> Figure | None:
    """Accuracy against the latency of one input: in ONNX Runtime, and of pruned networks in the sparse runtime too."""
    rows = []
    for name, label in NETWORKS.items():
        network, timing = measurements.get(name), latency(measurements.get(name))
        if network and timing:
            rows.append({"network": label, "key": name, **_span(network), **timing})
        fast = latency(network, runtime=SPARSE_RUNTIME)
        if network and fast and "dense" not in name:
            rows.append({"network": f"{label}, sparse runtime", "key": f"{name} sparse", **_span(network), **fast})
    if not any(row["key"] == "model" for row in rows):
        return None
    threads = rows[0].get("threads", 1)
    both = any(row["key"].endswith(" sparse") for row in rows)

    def paint(canvas: Canvas) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        ax = canvas.subplots()
        times = [row["median_ms"] for row in rows]
        if max(times) > 8 * min(times):
            ax.set_xscale("log")
            ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.xaxis.set_minor_formatter(NullFormatter())
        else:
            # One slow call must not push all medians to the left edge: its bar is cut instead.
            slow = max(row.get("p90_ms", row["median_ms"]) for row in rows)
            ax.set_xlim(0, max(1.16 * max(times), min(1.16 * slow, 1.5 * max(times))))
        for pair in (("dense", "model"), ("baseline_dense", "baseline")):
            ends = [row for name in pair for row in rows if row["key"] == name]
            if len(ends) == 2:
                ax.plot(
                    [row["median_ms"] for row in ends],
                    [100 * row["accuracy"] for row in ends],
                    color=_hue(pair[1]),
                    linewidth=0.8,
                    linestyle=(0, (1, 2)),
                )
        for row in rows:
            _point(ax, row["median_ms"], row, _hue(row["key"]), hollow="dense" in row["key"])
            low, high = row.get("p10_ms", row["median_ms"]), row.get("p90_ms", row["median_ms"])
            ax.plot([low, high], [100 * row["accuracy"]] * 2, color=_hue(row["key"]), linewidth=1)
        ax.margins(y=0.12)
        where = "" if both else " in ONNX Runtime"
        ax.set_xlabel(f"milliseconds for one input{where}, {threads} thread{'' if threads == 1 else 's'}")
        ax.set_ylabel("test accuracy, %")
        _label(ax, [(r["median_ms"], 100 * r["accuracy"], r["network"], _hue(r["key"])) for r in rows])

    reading = (
        "Up and left is better. Upright bars are 95 % intervals of the accuracy, level bars run from the 10th to "
        "the 90th percentile of the latency; a dotted line joins a network before pruning (hollow) to the same one "
        "after it."
    )
    if both:
        reading += " Where no runtime is named it is ONNX Runtime."
    data = [{k: v for k, v in row.items() if k != "key"} for row in rows]
    return Figure(svg(paint, width=430, height=250), reading, data=data)


def accuracy_sparsity(measurements: Figures, training: Figures | None) -> Figure | None:
    """Accuracy against sparsity: test figures before and after pruning, validation figures on the way."""
    rows = [
        {
            "network": label,
            "key": name,
            "sparsity": measurements[name]["sparsity"],
            **_span(measurements[name]),
        }
        for name, label in NETWORKS.items()
        if (measurements.get(name) or {}).get("sparsity") is not None
    ]
    if len(rows) < 2:
        return None
    way = {
        name: [
            (epoch["sparsity"], epoch["val_accuracy"])
            for epoch in ((training or {}).get(name) or {}).get("prune") or []
            if epoch.get("sparsity") is not None and epoch.get("val_accuracy") is not None
        ]
        for name in ("model", "baseline")
    }

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        for name, points in way.items():
            ax.plot(
                [100 * s for s, _ in points],
                [100 * a for _, a in points],
                ".",
                color=_hue(name),
                alpha=0.45,
                ms=4,
            )
        for pair in (("dense", "model"), ("baseline_dense", "baseline")):
            ends = [row for name in pair for row in rows if row["key"] == name]
            x, y = [100 * row["sparsity"] for row in ends], [100 * row["accuracy"] for row in ends]
            ax.plot(x, y, color=_hue(pair[1]), linewidth=1)
        for row in rows:
            _point(ax, 100 * row["sparsity"], row, _hue(row["key"]), hollow="dense" in row["key"])
        ax.set_xlim(-4, 104)
        ax.margins(y=0.12)
        ax.set_xlabel("weights that are zero, %")
        ax.set_ylabel("accuracy, %")
        _label(ax, [(100 * r["sparsity"], 100 * r["accuracy"], r["network"], _hue(r["key"])) for r in rows])

    small = " Small dots are validation accuracies while the weights were being removed." if any(way.values()) else ""
    return Figure(
        svg(paint, width=430, height=240),
        f"A line that stays level lost nothing to pruning; bars are 95 % intervals on the test examples.{small}",
        data={
            "test": [{k: v for k, v in row.items() if k != "key"} for row in rows],
            "validation_while_pruning": way,
        },
    )


def curves(training: Figures) -> Figure | None:
    """Validation accuracy and training loss over all stages of the designed network and the baseline."""
    runs = {name: training.get(name) or {} for name in ("model", "baseline")}
    lengths = {stage: max(len(run.get(stage) or []) for run in runs.values()) for stage in STAGES}
    starts = {stage: sum(list(lengths.values())[:i]) for i, stage in enumerate(STAGES)}
    panels = {"val_accuracy": ("validation accuracy, %", 100.0), "train_loss": ("training loss", 1.0)}
    lines = {
        figure: {
            name: [
                (starts[stage] + i + 1, scale * epoch[figure])
                for stage in STAGES
                for i, epoch in enumerate(run.get(stage) or [])
                if epoch.get(figure) is not None
            ]
            for name, run in runs.items()
        }
        for figure, (_, scale) in panels.items()
    }
    shown = [figure for figure in panels if any(lines[figure].values())]
    if not shown:
        return None

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        last = sum(lengths.values())
        for ax, figure in zip(axes, shown, strict=True):
            ends = []
            for name, points in lines[figure].items():
                if points:
                    x, y = zip(*points, strict=True)
                    ax.plot(x, y, color=_hue(name), marker="." if len(x) == 1 else None)
                    ends.append((points[-1], "designed" if name == "model" else "baseline", _hue(name)))
            ax.set_title(panels[figure][0], color=colour("muted"))
            ax.grid(axis="x", visible=False)
            ax.set_xlim(0.5, last + 0.5)
            for stage in STAGES:
                if lengths[stage] and starts[stage]:
                    ax.axvline(starts[stage] + 0.5, color=colour("muted"), linewidth=0.7, linestyle=(0, (3, 3)))
            _end_labels(ax, ends)
        for stage, name in STAGES.items():
            if lengths[stage] >= 0.12 * last:
                at = (starts[stage] + 0.5 + lengths[stage] / 2, 1.0)
                axes[0].annotate(
                    name, at, (0, 2), textcoords="offset points", ha="center", va="bottom", color=colour("muted"),
                    xycoords=axes[0].get_xaxis_transform(), fontsize=8.5,
                )  # fmt: skip
        axes[0].set_title(panels[shown[0]][0], color=colour("muted"), pad=17)
        axes[-1].set_xlabel("epoch")
        axes[-1].locator_params(axis="x", integer=True)

    return Figure(
        svg(paint, width=430, height=60 + 150 * len(shown)),
        "Dashed lines separate the stages; the dip where weights are removed should be made good by fine-tuning.",
        data=lines,
    )


def coherence(training: Figures) -> Figure | None:
    """How many examples a step on one of them helps, while the designed network learns; None where nobody looked."""
    epochs = (training.get("model") or {}).get("pretrain") or []
    points = [(i + 1, epoch["m_coherence"]) for i, epoch in enumerate(epochs) if epoch.get("m_coherence") is not None]
    if not points:
        return None
    examples = round(max(epoch.get("coherence_examples", 0) for epoch in epochs))

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        ax.plot(*zip(*points, strict=True), color=colour("blue"), marker="." if len(points) < 3 else None)
        ax.axhline(1, color=colour("muted"), linewidth=0.7, linestyle=(0, (3, 3)))
        ax.set_ylim(bottom=0)
        ax.set_xlim(0.5, len(epochs) + 0.5)
        ax.set_title(f"examples of {examples} that a step on one of them helps", color=colour("muted"))
        ax.set_xlabel("epoch")
        ax.locator_params(axis="x", integer=True)

    return Figure(
        svg(paint, width=430, height=210),
        "A line well above 1 says that training examples pull the weights the same way, so that what is learned from "
        "one serves others. At the dashed line each is fitted alone; a line that falls to it says that what was "
        "common has been learned, and that further epochs mostly memorise.",
        title="Coherence of gradients",
        data=points,
    )


def skips(share: Sequence[float]) -> Figure:
    """Share of skip connections in the architecture that the search would choose, epoch by epoch."""

    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        ax.plot(range(1, len(share) + 1), [100 * s for s in share], marker="." if len(share) < 3 else None)
        ax.set_ylim(0, 100)
        ax.set_title("operations that are skip connections, %", color=colour("muted"))
        ax.set_xlabel("search epoch")
        ax.locator_params(axis="x", integer=True)

    return Figure(
        svg(paint, width=430, height=170),
        "A search that ends near 100 % has collapsed to skip connections, a known fault of differentiable search.",
        title="Skip connections during the search",
        data=list(share),
    )


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """The confusion matrix, each row by its own size, mistakes in another colour than right answers."""
    n = len(matrix)
    names = [classes[i] if i < len(classes) else str(i) for i in range(n)]
    shares = [[count / max(1, sum(row)) for count in row] for row in matrix]
    worst = max((s for i, row in enumerate(shares) for j, s in enumerate(row) if i != j), default=0.0)
    filled = [(count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if count]
    filled = sorted(filled, reverse=True)[:MOST_CELLS]

    def paint(canvas: Canvas) -> None:
        from matplotlib.patches import Rectangle

        ax = canvas.subplots()
        for count, i, j in filled:
            strength = shares[i][j] if i == j else 0.15 + 0.85 * math.sqrt(shares[i][j] / worst)
            hue = colour("blue" if i == j else "orange")
            ax.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, facecolor=hue, alpha=strength, linewidth=0))
            if n <= MOST_NUMBERED_CLASSES:
                ink = colour("surface" if strength > 0.6 else "ink")
                ax.text(j, i, str(count), ha="center", va="center", color=ink, fontsize=8)
        ax.set_xlim(-0.5, n - 0.5)
        ax.set_ylim(n - 0.5, -0.5)
        ax.set_aspect("equal")
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        if n <= MOST_NAMED_CLASSES:
            size = min(8.5, 300 / n)
            long = max(len(name) for name in names) > 4
            short = [name if len(name) <= 18 else name[:17] + "\u2026" for name in names]
            ax.set_xticks(range(n), short, rotation=90 if long else 0, fontsize=size)
            ax.set_yticks(range(n), short, fontsize=size)
        ax.set_xlabel("predicted class")
        ax.set_ylabel("true class")

    edge = 360 if n <= MOST_NUMBERED_CLASSES else 430
    return Figure(
        svg(paint, width=430, height=edge),
        "A row is a true class, a column what it was taken for; blue is right, orange is wrong, stronger is more often"
        + ("." if n <= MOST_NUMBERED_CLASSES else " (a row's colours are shares of that row)."),
        data={"classes": names, "counts": [list(row) for row in matrix]},
    )


CELLS = (
    "From left to right: the outputs of the two cells before, operations (boxes) whose results are summed in the "
    "numbered nodes, and the output, which joins the nodes that dashed lines lead from."
)
CHOICES = "What the search chose at each place, in the order of the network; k is the kernel's side, e the expansion."


def cells(genotype: Figures) -> Figure:
    """The cells that the search found, or the choices of a chain.

    Raises:
        ValueError: If the genotype is not one.
    """
    from netwright.search.drawing import draw
    from netwright.search.genotype import CellsGenotype, Genotype

    found = Genotype.from_dict(dict(genotype))
    is_cells = isinstance(found, CellsGenotype)
    number = 2 if isinstance(found, CellsGenotype) and found.normal != found.reduce else 1
    # The second cell stands below the first, so that both are as large as the page allows.
    across, high = draw(found).get_figure(root=True).get_size_inches()  # type: ignore[union-attr]
    height = min(700.0, 430 * number * high / (across / number))

    def paint(canvas: Canvas) -> None:
        canvas.set_layout_engine("none")
        ax = draw(found, canvas.add_axes((0, 0, 1, 1)))
        for text in ax.texts:
            if text.get_color() == "black" and not (text.get_text().isdigit() or text.get_text().endswith("cell")):
                text.set_color("#010101")  # stands on a light box in the dark scheme too

    return Figure(
        svg(paint, width=430, height=height, formulas=True),
        CELLS if is_cells else CHOICES,
        title="The cells found" if is_cells else "The blocks found",
        data=genotype,
    )


def _span(network: Figures) -> dict[str, Any]:
    interval = network.get("interval")
    return {"accuracy": network["accuracy"], "interval": list(interval) if interval else None}


def _point(ax: Axes, x: float, row: Figures, hue: str, *, hollow: bool) -> None:
    if row["interval"]:
        ax.plot([x, x], [100 * bound for bound in row["interval"]], color=hue, linewidth=1)
    ax.plot([x], [100 * row["accuracy"]], "o", ms=7, mec=hue, mfc=colour("surface") if hollow else hue, mew=1.5)


def _end_labels(ax: Axes, ends: Sequence[tuple[tuple[float, float], str, str]]) -> None:
    """Names up to two lines at their right ends, pushed apart where the names would overlap."""
    low, high = ax.get_ylim()
    heights = [y for (_, y), _, _ in ends]
    missing = 0.14 * (high - low) - (max(heights) - min(heights))
    for (x, y), name, hue in ends:
        if len(ends) == 2 and missing > 0:
            first = y == min(heights) if heights[0] != heights[1] else name == ends[0][1]
            y += (-0.5 if first else 0.5) * missing  # noqa: PLW2901
        ax.annotate(name, (x, y), (5, 0), textcoords="offset points", va="center", color=hue, annotation_clip=False)


def _label(ax: Axes, points: Sequence[tuple[float, float, str, str]]) -> None:
    """Puts each point's name beside it where it covers no other name, mark or bar and stays inside the axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas = FigureCanvasAgg(ax.figure)  # type: ignore[arg-type]
    canvas.draw()
    renderer, scale = canvas.get_renderer(), ax.figure.dpi / 72
    inside = ax.get_window_extent(renderer)
    taken = [box for line in ax.lines for box in _along(line, scale)]
    marks = ax.transData.transform([point[:2] for point in points])
    taken += [Bbox.from_extents(x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale) for x, y in marks]
    for (x, y, name, hue), (left, bottom) in zip(points, marks, strict=True):
        text = ax.annotate(name, (x, y), color=hue, fontsize=9)
        size = text.get_window_extent(renderer)
        text.remove()
        best: tuple[float, Any] = (math.inf, None)
        for dx, dy in (place for far in (9, 16, 26, 40) for place in _around(far)):
            x0 = left + scale * dx - size.width * (0 if dx > 0 else 1 if dx < 0 else 0.5)
            y0 = bottom + scale * dy - size.height * (0 if dy > 0 else 1 if dy < 0 else 0.5)
            box = Bbox.from_bounds(x0, y0, size.width, size.height)
            outside = size.width * size.height - _shared(box, inside)
            cost = sum(_shared(box, other) for other in taken) + 2 * outside + 0.5 * math.hypot(dx, dy) * scale
            if cost < best[0]:
                best = (cost, (dx, dy, box))
        dx, dy, box = best[1]
        across = "left" if dx > 0 else "right" if dx < 0 else "center"
        along = "bottom" if dy > 0 else "top" if dy < 0 else "center"
        ax.annotate(name, (x, y), (dx, dy), textcoords="offset points", ha=across, va=along, color=hue, fontsize=9)
        taken.append(box)
    ax.get_figure(root=True).set_layout_engine("none")  # type: ignore[union-attr]  # the places hold for this layout


def _along(line: Line2D, scale: float) -> list[Bbox]:
    """Small boxes along a straight line, or at the marks of a line that is not drawn, in pixels."""
    import numpy as np
    from matplotlib.transforms import Bbox

    places = line.get_transform().transform(line.get_xydata())
    if line.get_linestyle() != "None" and len(places) == 2:
        steps = max(2, int(np.hypot(*(places[1] - places[0])) / (4 * scale)))
        places = np.linspace(places[0], places[1], steps)
    reach = 2 * scale
    return [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in places]


def _around(far: float) -> list[tuple[float, float]]:
    near = 0.7 * far
    beside = [(far, 0), (-far, 0), (near, near), (near, -near), (-near, near), (-near, -near)]
    return [*beside, (5, far), (-5, far), (5, -far), (-5, -far), (0, far), (0, -far)]


def _shared(a: Bbox, b: Bbox) -> float:
    """Area that two boxes share."""
    across, along = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(across * along) if across > 0 and along > 0 else 0.0
