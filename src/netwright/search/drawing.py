"""Drawings of cells, for papers and reports.

A cell is drawn from left to right: circles are states, boxes are operations. Every operation is a vertex of its own, so
edges that run in parallel stay apart and labels never lie on one another; an edge that passes other layers gets a
place in each of them (the layered drawing of Sugiyama, Tagawa and Toda, "Methods for visual understanding of
hierarchical system structures", 1981).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import networkx as nx
import numpy as np

from netwright.search.genotype import CellGenotype, CellsGenotype, ChoiceGenotype, Genotype

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FONT_POINTS = 8.0
GAP = 0.34  # inches between layers
HEIGHTS = {"state": 0.44, "operation": 0.42, "pass": 0.17}
WIDTHS = {"input": 0.4, "node": 0.3, "output": 0.4, "operation": 0.62, "pass": 0.0}
MARGIN = 0.08
TITLE = 0.3
BETWEEN = 0.6  # inches between the two cells
COLOURS = {"sep": "#9ecae1", "dil": "#c6b7e2", "max": "#fdd0a2", "avg": "#fee391", "skip": "#c7e9c0"}
EDGES = {"sep": "#3182bd", "dil": "#756bb1", "max": "#e6550d", "avg": "#b8860b", "skip": "#31a354"}
OTHER = "#e5e5e5"
HUES = ("#9ecae1", "#c7e9c0", "#fee391", "#c6b7e2", "#fdd0a2", "#bfd3e6", "#d9c8b4")
PER_LINE = 7
GREY = "#777777"


@dataclass(frozen=True)
class _Layout:
    graph: nx.DiGraph
    place: dict[str, tuple[float, float]]
    routes: list[list[str]]
    width: float
    height: float


def _layers(cell: CellGenotype) -> tuple[nx.DiGraph, list[list[str]]]:
    """The layered graph with a place for every passing edge, and the route of every edge through it."""
    plain = nx.DiGraph()
    plain.add_nodes_from(range(cell.nodes + 2))
    plain.add_edges_from((predecessor, state) for _, predecessor, state in cell.edges())
    rank = {state: i for i, states in enumerate(nx.topological_generations(plain)) for state in states}
    rank |= {0: 0, 1: 0}
    graph = nx.DiGraph()
    for state in range(cell.nodes + 2):
        kind = "input" if state < 2 else "node"
        label = ("$c_{k-2}$", "$c_{k-1}$")[state] if state < 2 else str(state - 2)
        graph.add_node(f"s{state}", layer=2 * rank[state], kind=kind, label=label)
    last = 2 * max(rank.values()) + 1
    graph.add_node("out", layer=last, kind="output", label="$c_k$")
    routes = []

    def connect(start: str, end: str, operation: str = "") -> None:
        layers = range(graph.nodes[start]["layer"] + 1, graph.nodes[end]["layer"])
        steps = [start, *(f"{start}-{end}-{layer}" for layer in layers), end]
        for name, layer in zip(steps[1:-1], layers, strict=True):
            graph.add_node(name, layer=layer, kind="pass")
        nx.add_path(graph, steps)
        routes.append([operation, *steps])

    for i, (name, predecessor, state) in enumerate(cell.edges()):
        graph.add_node(f"o{i}", layer=2 * rank[state] - 1, kind="operation", label=name)
        connect(f"s{predecessor}", f"o{i}", name)
        connect(f"o{i}", f"s{state}", name)
    for state in cell.concat:
        connect(f"s{state}", "out")
    return graph, routes


def _crossings(graph: nx.DiGraph, y: dict[str, float]) -> int:
    """Number of pairs of edges between neighbouring layers that cross."""
    total = 0
    by_layer: dict[int, list[tuple[float, float]]] = {}
    for start, end in graph.edges:
        by_layer.setdefault(graph.nodes[start]["layer"], []).append((y[start], y[end]))
    for edges in by_layer.values():
        a, b = np.array(edges).T
        total += int((((a[:, None] - a) * (b[:, None] - b)) < 0).sum()) // 2
    return total


def _layout(cell: CellGenotype) -> _Layout:
    from sklearn.isotonic import isotonic_regression

    graph, routes = _layers(cell)
    y = {name: float(p[1]) for name, p in nx.multipartite_layout(graph, subset_key="layer").items()}
    layers: dict[int, list[str]] = {}
    for name, layer in graph.nodes(data="layer"):
        layers.setdefault(layer, []).append(name)
    half = {
        name: HEIGHTS["operation" if kind == "operation" else "pass" if kind == "pass" else "state"] / 2
        for name, kind in graph.nodes(data="kind")
    }

    def settle(name: str, sides: str) -> float:
        near = [*(graph.predecessors(name) if "p" in sides else ()), *(graph.successors(name) if "s" in sides else ())]
        return float(np.mean([y[other] for other in near])) if near else y[name]

    def sweep(order: list[int], sides: str, reorder: bool) -> None:
        for layer in order:
            wish = {name: settle(name, sides) for name in layers[layer]}
            names = sorted(layers[layer], key=lambda name: (wish if reorder else y)[name])
            room = np.cumsum([0.0, *(half[a] + half[b] for a, b in itertools.pairwise(names))])
            fitted = isotonic_regression(np.array([wish[name] for name in names]) - room) + room
            y.update(zip(names, fitted.tolist(), strict=True))

    order = sorted(layers)
    best = None
    for _ in range(12):
        sweep(order, "p", reorder=True)
        sweep(order[::-1], "s", reorder=True)
        crossings = _crossings(graph, y)
        if best is None or crossings < best[0]:
            best = crossings, dict(y)
    if best is not None:
        y = best[1]
    for layer in order * 2:
        for a, b in itertools.combinations(layers[layer], 2):
            swapped = y | {a: y[b], b: y[a]}
            if _crossings(graph, swapped) < _crossings(graph, y):
                y = swapped
    for _ in range(12):
        sweep(order, "ps", reorder=False)
        sweep(order[::-1], "ps", reorder=False)

    x, edge = {}, MARGIN
    for layer in order:
        width = max(WIDTHS[graph.nodes[name]["kind"]] for name in layers[layer])
        x.update({name: edge + width / 2 for name in layers[layer]})
        edge += width + GAP
        for name in layers[layer]:
            graph.nodes[name]["layer_width"] = width
    low = min(y[name] - half[name] for name in y) - MARGIN
    high = max(y[name] + half[name] for name in y) + MARGIN
    place = {name: (x[name], y[name] - low) for name in y}
    return _Layout(graph, place, routes, edge - GAP + MARGIN, high - low)


def _label(operation: str) -> str:
    """``sep_conv_3x3`` -> "sep conv", "3x3" on two lines."""
    words = operation.removesuffix("_connect").split("_")
    if len(words) > 1 and words[-1][:1].isdigit():
        return " ".join(words[:-1]) + "\n" + words[-1].replace("x", "×")
    return "\n".join(words)


def _paint(layout: _Layout, ax: Axes, left: float, bottom: float, scale: float) -> None:
    from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path

    graph = layout.graph
    at = {name: (left + x, bottom + y) for name, (x, y) in layout.place.items()}
    for operation, *route in layout.routes:
        kind = operation.split("_")[0]
        points: list[tuple[float, float]] = []
        for name in route:
            x, y = at[name]
            reach = graph.nodes[name]["layer_width"] / 2
            if graph.nodes[name]["kind"] != "pass":
                reach = WIDTHS[graph.nodes[name]["kind"]] / 2
            points += [(x - reach, y), (x + reach, y)]
        points = points[1:-1]
        vertices, codes = [points[0]], [Path.MOVETO]
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            middle = (x0 + x1) / 2
            vertices += [(middle, y0), (middle, y1), (x1, y1)]
            codes += [Path.CURVE4] * 3
        arrow = FancyArrowPatch(
            path=Path(vertices, codes),
            arrowstyle="-|>" if operation == "" or route[-1].startswith("s") else "-",
            mutation_scale=7 * scale,
            linewidth=(1.3 if operation else 0.9) * scale,
            linestyle="-" if operation else (0, (3, 2)),
            color=EDGES.get(kind, GREY),
            zorder=1,
        )
        ax.add_patch(arrow)
    for name, data in graph.nodes(data=True):
        (x, y), kind = at[name], data["kind"]
        if kind == "pass":
            continue
        if kind == "operation":
            width, height = WIDTHS[kind], HEIGHTS["operation"] - 0.1
            colour = data["label"].split("_")[0]
            ax.add_patch(
                FancyBboxPatch(
                    (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.05",
                    facecolor=COLOURS.get(colour, OTHER), edgecolor=EDGES.get(colour, GREY),
                    linewidth=0.8 * scale, zorder=2,
                )
            )  # fmt: skip
        else:
            radius = WIDTHS[kind] / 2
            face = "white" if kind == "node" else "#dddddd"
            ax.add_patch(Circle((x, y), radius, facecolor=face, edgecolor="black", linewidth=0.8 * scale, zorder=2))
        text = _label(data["label"]) if kind == "operation" else data["label"]
        ax.text(
            x, y, text, ha="center", va="center_baseline" if kind == "node" else "center",
            fontsize=FONT_POINTS * scale, linespacing=0.95, zorder=3,
        )  # fmt: skip


def _draw_choices(genotype: ChoiceGenotype, ax: Axes | None) -> Axes:
    """A row of boxes, from left to right and then on the next line; what is skipped is pale."""
    from matplotlib.patches import FancyBboxPatch

    columns = min(PER_LINE, len(genotype.decisions))
    longest = max(len(line) for pair in genotype.decisions for line in (pair[0], *_label(pair[1]).split("\n")))
    box_width, box_height = max(WIDTHS["operation"], 0.075 * longest + 0.1), HEIGHTS["operation"]
    step = box_width + GAP / 2, box_height + TITLE
    lines = math.ceil(len(genotype.decisions) / columns)
    width, height = columns * step[0] - GAP / 2 + 2 * MARGIN, lines * step[1] + MARGIN
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=(width, height)).add_axes((0, 0, 1, 1))
    window = ax.get_window_extent()
    dpi = ax.get_figure(root=True).dpi  # type: ignore[union-attr]
    scale = min(window.width / dpi / width, window.height / dpi / height)
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_axis_off()
    for number, (key, name) in enumerate(genotype.decisions):
        line, column = divmod(number, columns)
        left, bottom = MARGIN + column * step[0], height - (line + 1) * step[1]
        skipped = name.startswith("skip")
        face = OTHER if skipped else HUES[int("".join(filter(str.isdigit, name.split("_")[0])) or 0) % len(HUES)]
        ax.add_patch(
            FancyBboxPatch(
                (left, bottom), box_width, box_height, boxstyle="round,pad=0,rounding_size=0.05", facecolor=face,
                edgecolor=GREY, linewidth=0.8 * scale, linestyle="--" if skipped else "-",
            )
        )  # fmt: skip
        middle = left + box_width / 2
        ax.text(middle, bottom + box_height / 2, _label(name), ha="center", va="center", fontsize=FONT_POINTS * scale)
        ax.text(
            middle, bottom + box_height + 0.04, key, ha="center", va="bottom", color=GREY,
            fontsize=(FONT_POINTS - 1.5) * scale,
        )  # fmt: skip
    return ax


def draw(genotype: Genotype | CellGenotype, ax: Axes | None = None) -> Axes:
    """Draws the normal and the reduction cell side by side; one cell where both are the same or one is given.

    The genotype of a space of choices is a row of boxes, one for each choice.

    States are circles (the two inputs, the numbered nodes, the output), operations are boxes coloured by kind, dashed
    lines lead to the concatenation. On given axes the second cell stands below the first where that leaves more room,
    and text is scaled to the axes' size at the time of the call.

    Args:
        genotype: What to draw.
        ax: Axes to draw on; by default those of a new figure of the right size.

    Returns:
        The axes; ``ax.figure.savefig`` writes the picture.

    Example:
        >>> from netwright.search.genotype import DARTS_V2
        >>> ax = draw(DARTS_V2)
        >>> sorted({text.get_text() for text in ax.texts if "\\n" in text.get_text()})
        ['dil conv\\n3×3', 'max pool\\n3×3', 'sep conv\\n3×3']
    """
    if isinstance(genotype, ChoiceGenotype):
        return _draw_choices(genotype, ax)
    if isinstance(genotype, CellGenotype):
        cells = {"cell": genotype}
    elif not isinstance(genotype, CellsGenotype):
        raise TypeError(f"genotype must be one of a cell space or of a space of choices, got {type(genotype).__name__}")
    elif genotype.normal == genotype.reduce:
        cells = {"normal and reduction cell": genotype.normal}
    else:
        cells = {"normal cell": genotype.normal, "reduction cell": genotype.reduce}
    layouts = {title: _layout(cell) for title, cell in cells.items()}
    widths, heights = [layout.width for layout in layouts.values()], [layout.height for layout in layouts.values()]
    between = BETWEEN * (len(cells) - 1)
    beside = sum(widths) + between, max(heights) + TITLE
    below = max(widths), sum(heights) + TITLE * len(cells) + between
    if ax is None:
        from matplotlib.figure import Figure

        ax = Figure(figsize=beside).add_axes((0, 0, 1, 1))
    box = ax.get_window_extent()
    dpi = ax.get_figure(root=True).dpi  # type: ignore[union-attr]
    scales = {size: min(box.width / dpi / size[0], box.height / dpi / size[1]) for size in (beside, below)}
    width, height = size = max(scales, key=lambda size: scales[size])
    scale, stacked = scales[size], size == below
    ax.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    ax.set_axis_off()
    left, top = 0.0, height
    for title, layout in layouts.items():
        room = width if stacked else layout.width
        free = 0.0 if stacked else (height - TITLE - layout.height) / 2
        x = left + (room - layout.width) / 2
        _paint(layout, ax, x, top - TITLE - free - layout.height, scale)
        ax.text(left + room / 2, top - TITLE / 2, title, ha="center", va="center", fontsize=(FONT_POINTS + 1) * scale)
        if stacked:
            top -= TITLE + layout.height + BETWEEN
        else:
            left += layout.width + BETWEEN
    return ax
