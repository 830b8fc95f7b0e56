"""The report of a run: the verdict on the first screen, everything behind it folded below.

:func:`build` reads what the stages left in a run folder; whatever is missing is left out, and while the run goes on the
page says which stage is next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from netwright import storage
from netwright.console import UserError, clock
from netwright.design import charts, remarks
from netwright.design.examples import map_blocks, mistake_blocks, radius_blocks
from netwright.design.readme import onnx_lines, readme_text
from netwright.design.run import RunFolder
from netwright.design.verdict import doubts, file_size, goals, milliseconds, percent, speed, verdict
from netwright.page import (
    Block,
    Bullets,
    Cell,
    Code,
    Em,
    KeyValues,
    Page,
    Paragraph,
    Section,
    Table,
    Text,
    Value,
)

__all__ = ["build", "confusion_blocks", "data_blocks", "readme_text", "settings_blocks"]

PARTS = ("run", "data", "plan", "search", "training", "measurements", "classes", "architecture", *remarks.PARTS)
MOST_CONFUSIONS = 10


def build(folder: str | Path) -> Page:
    """The report of a run folder, finished or not.

    Raises:
        UserError: If the folder is missing, holds no part of a run, or a part is damaged.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UserError("no such run folder", where=path, cure="give the folder that netwright design wrote to (--out)")
    parts = {name: storage.read_json(path / f"{name}.json") for name in PARTS if (path / f"{name}.json").exists()}
    if not parts:
        raise UserError(
            "the folder holds no run",
            where=path,
            cure="give the folder that netwright design wrote to (--out)",
        )
    classes = [
        str(name) for name in parts.get("classes") or (parts.get("data") or {}).get("classes") or _counted(parts)
    ]
    if "training" not in parts and (epochs := _trained(path / "work")):
        parts["training"] = epochs
    measurements = _measured(parts)
    sentence: Text
    if measurements.get("model"):
        sentence, first = verdict(measurements, _tested(measurements)), _finished(parts, measurements, classes)
    else:
        sentence, done = _unfinished(parts)
        first = [Section("Done so far", [Bullets(done)])] if done else []
        if (path / "model.onnx").exists():
            first.append(_use(parts))
    folded: list[tuple[str, Callable[[], Sequence[Block]]]] = [
        ("Every figure, four networks", lambda: _comparison(measurements)),
        (
            "Accuracy against sparsity",
            lambda: _charts(charts.accuracy_sparsity(measurements, parts.get("training"))),
        ),
        ("The architecture", lambda: _search(parts.get("search"))),
        ("Training curves", lambda: _charts(charts.curves(parts.get("training") or {}))),
        ("Do examples agree?", lambda: _charts(charts.coherence(parts.get("training") or {}))),
        ("Confusion matrix", lambda: confusion_blocks(measurements.get("model"), classes)),
        ("Mistakes", lambda: mistake_blocks(path / "mistakes.npz", classes)),
        *((title, partial(remarks.blocks, RunFolder(path), name)) for name, (title, _) in remarks.PARTS.items()),
        ("Where its features are", lambda: map_blocks(path / "maps.npz", classes)),
        ("How far an image may change", lambda: radius_blocks(path / "radii.npz", classes)),
        ("Data", lambda: data_blocks(parts.get("data"))),
        ("Plan and time", lambda: _plan(parts.get("plan"), measurements)),
        ("Settings, versions and how to replay", lambda: settings_blocks(parts.get("run"))),
    ]
    made = [(title, blocks()) for title, blocks in folded]
    sections = first + [Section(title, blocks, folded=True) for title, blocks in made if blocks]
    figures = {
        **{k: v for k, v in parts.items() if k != "classes"},
        "classes": classes,
        "goals": goals(measurements),
    }
    name = (parts.get("data") or {}).get("name") or ((parts.get("run") or {}).get("options") or {}).get("data")
    return Page(f"Report on {name}" if name else "Report", sentence, sections, figures)


def _counted(parts: Mapping[str, Any]) -> list[str]:
    counts = (parts.get("data") or {}).get("counts") or {}
    return list(counts.get("train") or {})


def _tested(measurements: Mapping[str, Any]) -> int | None:
    matrix = (measurements.get("model") or {}).get("confusion")
    return sum(map(sum, matrix)) if matrix else None


def _trained(folder: Path) -> dict[str, Any]:
    """Epochs of the stages that are done, as ``training.json`` will hold them."""
    files = {(w, s): folder / f"{w}-{s}.json" for w in ("model", "baseline") for s in charts.STAGES}
    found: dict[str, Any] = {}
    for (which, stage), file in files.items():
        if file.exists():
            found.setdefault(which, {})[stage] = storage.read_json(file)["epochs"]
    return found


def _measured(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The measurements, with the goals and the names that only the options tell."""
    measurements = dict(parts.get("measurements") or {})
    options = (parts.get("run") or {}).get("options") or {}
    for key in charts.NETWORKS:
        if (measurements.get(key) or {}).get("name") == key:
            ours = f"{options.get('space')} cells found by {options['search']}" if options.get("search") else None
            name = options.get("baseline") if key.startswith("baseline") else ours
            measurements[key] = {**measurements[key], "name": name}
    set_goals = {"sparsity": options.get("sparsity"), "accuracy": options.get("accuracy_goal")}
    measurements["goal"] = {**set_goals, **(measurements.get("goal") or {})}
    return measurements


def _finished(parts: Mapping[str, Any], measurements: Mapping[str, Any], classes: Sequence[str]) -> list[Section]:
    seed = ((parts.get("run") or {}).get("options") or {}).get("seed", (parts.get("search") or {}).get("seed"))
    return [
        Section("", [Paragraph(speed(measurements)), *_charts(charts.accuracy_latency(measurements))]),
        _use(parts),
        Section("What to doubt", [Bullets(doubts(measurements, parts.get("data"), classes, seed))]),
    ]


def _use(parts: Mapping[str, Any]) -> Section:
    picture = (parts.get("architecture") or {}).get("picture", True)
    return Section("How to use it", [Code(onnx_lines(picture), "python")])


def _unfinished(parts: Mapping[str, Any]) -> tuple[list[str | Em], list[str]]:
    """The verdict on a run that goes on, and what is done."""
    training = parts.get("training") or {}
    steps = [
        ("checking the data", "data" in parts),
        ("the plan", "plan" in parts),
        ("the search for an architecture", "search" in parts),
    ]
    best = ""
    for which, owner in (("model", "the network"), ("baseline", "the baseline")):
        for stage, name in charts.STAGES.items():
            epochs = (training.get(which) or {}).get(stage)
            steps.append((f"{name} of {owner}", bool(epochs)))
            score = epochs[-1].get("val_accuracy") if epochs else None
            if which == "model" and score is not None:
                best = f" After {name} the network is right on {percent(score)} of the validation examples."
    waiting = [name for name, done in steps if not done] or ["measuring"]
    sentence: list[str | Em] = [Em("This run is not finished"), f": the next stage is {waiting[0]}.{best}"]
    return sentence, [name for name, done in steps if done]


def _charts(*made: charts.Figure | None) -> list[Block]:
    return [chart for chart in made if chart is not None]


def _comparison(measurements: Mapping[str, Any]) -> list[Block]:
    found = {name: measurements[name] for name in charts.NETWORKS if measurements.get(name)}
    header = ["", *(charts.NETWORKS[name] for name in found)]
    lines: dict[str, tuple[str, Callable[[Any], str]]] = {
        "test accuracy": ("accuracy", lambda v: percent(v, 2)),
        "95 % interval": ("interval", lambda v: f"{100 * v[0]:.2f}\u2013{percent(v[1], 2)}"),
        "negative log-likelihood, nats": ("nll", "{:.4f}".format),
        "expected calibration error": ("ece", lambda v: f"{v:.2f} %"),
        "sparsity": ("sparsity", lambda v: percent(v, 2)),
        "parameters": ("parameters", "{:,}".format),
        "parameters not zero": ("nonzeros", "{:,}".format),
        "multiply-adds": ("macs", _count),
        "multiply-adds not by zero": ("sparse_macs", _count),
        "ONNX file": ("file_bytes", file_size),
        "ONNX file, gzipped": ("gzip_bytes", file_size),
        "ONNX against torch, largest difference": ("agreement", "{:.1e}".format),
        "training time": ("train_seconds", clock),
    }
    rows = [_row(label, [m.get(key) for m in found.values()], show) for label, (key, show) in lines.items()]
    if not (kept := [row for row in rows if row]):
        return []
    note = (
        "Intervals are Wilson's, on the test examples. Sparsity is the share of zeros among the weights of "
        "convolutions and linear layers."
    )
    names = ", ".join(dict.fromkeys(str(m["name"]) for m in found.values() if m.get("name")))
    told = Paragraph(f"Networks: {names}. {note}" if names else note)
    return [Table(header, kept), *_latencies(list(found.values()), header), told]


def _row(label: str, values: Sequence[Any], show: Callable[[Any], str]) -> list[Cell]:
    """A line of a table; nothing when no network has the figure."""
    if all(value is None for value in values):
        return []
    return [label, *(None if value is None else Value(value, show(value)) for value in values)]


def _latencies(networks: Sequence[Mapping[str, Any]], header: Sequence[str]) -> list[Block]:
    """One table for each runtime and number of threads, one pair of lines for each batch size."""
    timed: dict[tuple[str, int], dict[int, list[Any]]] = {}
    for i, network in enumerate(networks):
        for entry in network.get("latency") or []:
            batches = timed.setdefault((entry["runtime"], entry.get("threads", 1)), {})
            batches.setdefault(entry["batch"], [None] * len(networks))[i] = entry
    tables: list[Block] = []
    for (runtime, threads), batches in timed.items():
        rows = []
        for batch, entries in batches.items():
            medians = [entry and entry["median_ms"] for entry in entries]
            spans = [[e["p10_ms"], e["p90_ms"]] if e and "p10_ms" in e and "p90_ms" in e else None for e in entries]
            rows.append(_row(f"batch {batch}, median", medians, milliseconds))
            rows.append(_row(f"batch {batch}, 10th to 90th percentile", spans, _span))
        threaded = f"{threads} thread{'' if threads == 1 else 's'}"
        caption = f"Latency in {runtime}, {threaded}, preprocessing included"
        tables.append(Table(header, [row for row in rows if row], caption))
    return tables


def _span(times: Sequence[float]) -> str:
    return f"{milliseconds(times[0]).removesuffix(' ms')}\u2013{milliseconds(times[1])}"


def _count(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,}"


def _search(search: Mapping[str, Any] | None) -> list[Block]:
    if not search:
        return []
    blocks: list[Block] = []
    genotype = search.get("genotype")
    if genotype:
        try:
            blocks.append(charts.cells(genotype))
        except ValueError as error:
            blocks.append(Paragraph(f"The cells cannot be drawn: {error}."))
            blocks.append(Code(json.dumps(genotype, indent=1, ensure_ascii=False), "json"))
    if search.get("skip_share"):
        blocks.append(charts.skips(search["skip_share"]))
    facts: dict[str, Cell] = {}
    if search.get("wall_time") is not None:
        facts["time of the search"] = Value(search["wall_time"], clock(search["wall_time"]))
    if search.get("seed") is not None:
        facts["seed"] = search["seed"]
    if isinstance(search.get("cost"), (int, float)):
        facts["expected cost"] = Value(search["cost"], f"{search['cost']:.4g}")
    return [*blocks, *([KeyValues(facts)] if facts else [])]


def confusion_blocks(model: Mapping[str, Any] | None, classes: Sequence[str]) -> list[Block]:
    """Confusion matrix and most frequent mistakes of a network's figures; nothing without them."""
    matrix = (model or {}).get("confusion")
    if not matrix:
        return []

    def name(i: int) -> str:
        return classes[i] if i < len(classes) else str(i)

    wrong = [(-n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n]
    rows: list[list[Cell]] = [
        [name(i), name(j), -n, Value(-n / sum(matrix[i]), percent(-n / sum(matrix[i])))]
        for n, i, j in sorted(wrong)[:MOST_CONFUSIONS]
    ]
    table = Table(["true class", "taken for", "cases", "of that class"], rows, "The most frequent mistakes")
    return [charts.confusion(matrix, classes), *([table] if rows else [])]


def data_blocks(data: Mapping[str, Any] | None) -> list[Block]:
    """What a run wrote down of its data; nothing without it."""
    if not data:
        return []
    counts = data.get("counts") or {}
    names = dict.fromkeys(name for part in counts.values() for name in part)
    blocks: list[Block] = []
    facts: dict[str, Cell] = {"name": str(data["name"])} if data.get("name") else {}
    if data.get("shape"):
        facts["channels, height, width"] = " \u00d7 ".join(str(size) for size in data["shape"])
    for part, of in counts.items():
        facts[f"{part} examples"] = Value(sum(of.values()), f"{sum(of.values()):,}")
    if facts:
        blocks.append(KeyValues(facts))
    if names:
        rows: list[list[Cell]] = [[name, *(part.get(name, 0) for part in counts.values())] for name in names]
        blocks.append(Table(["class", *counts], rows, "Examples of each class"))
    problems = data.get("problems")
    if problems:
        faults: list[list[Cell]] = [
            [
                str(p.get("kind", "")),
                str(p.get("message", "")),
                str(p.get("where", "")),
                "yes" if p.get("spoils") else "no",
            ]
            for p in problems
        ]
        blocks.append(Table(["fault", "what", "where", "spoils a run"], faults))
    elif problems is not None:
        blocks.append(Paragraph("No faults were found."))
    return blocks


def _plan(plan: Mapping[str, Any] | None, measurements: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    if plan and plan.get("stages"):
        rows: list[list[Cell]] = [
            [
                str(stage["name"]),
                Value(stage["seconds"], clock(stage["seconds"])),
                ", ".join(f"{name} {value}" for name, value in (stage.get("sizes") or {}).items()),
                str(stage.get("why") or ""),
            ]
            for stage in plan["stages"]
        ]
        total = sum(stage["seconds"] for stage in plan["stages"])
        rows.append(["in all", Value(total, clock(total)), "", ""])
        blocks.append(Table(["stage", "planned", "sizes", "why"], rows))
    changes = (plan or {}).get("amendments") or []
    if changes:
        blocks.append(Paragraph("What changed on the way:"))
        blocks.append(Bullets([_amendment(change) for change in changes]))
    time = goals(measurements).get("time")
    used = (measurements.get("goal") or {}).get("seconds_used")
    if time:
        share = percent(time["reached"] / time["wanted"], 0)
        blocks.append(Paragraph(f"Used: {clock(time['reached'])} of {clock(time['wanted'])}, {share} of the budget."))
    elif used is not None:
        blocks.append(Paragraph(f"Used: {clock(used)}; no time budget was set."))
    return blocks


def _amendment(change: Any) -> str:
    if not isinstance(change, Mapping):
        return str(change)
    if change.get("what"):
        return f"{change['what']} ({change['why']})" if change.get("why") else str(change["what"])
    return ", ".join(f"{name} {value}" for name, value in change.items())


def settings_blocks(run: Mapping[str, Any] | None) -> list[Block]:
    """Command, options, versions and machine of a run; nothing without them."""
    if not run:
        return []
    blocks: list[Block] = []
    if run.get("command"):
        blocks += [Paragraph("The same command replays this run:"), Code(str(run["command"]), "sh")]
    for title, key in (("Options", "options"), ("Versions", "versions"), ("Machine", "machine")):
        values = {str(name): _shown(value) for name, value in (run.get(key) or {}).items()}
        if values:
            blocks += [Paragraph([Em(title)]), KeyValues(values)]
    if run.get("started"):
        blocks.append(Paragraph(f"Started {run['started']}."))
    return blocks


def _shown(value: Any) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, dict)) and not value:
        return None
    return value if value is None or isinstance(value, (int, float, str)) else json.dumps(value, ensure_ascii=False)
