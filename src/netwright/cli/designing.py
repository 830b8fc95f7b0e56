"""Verbs about data and runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from netwright.cli.common import (
    Debug,
    Download,
    DropUnknown,
    Flops,
    Jobs,
    Json,
    LatencyMs,
    LatencyTable,
    Quiet,
    RunPath,
    SampleEpochs,
    Select,
    SkipBroken,
    Space,
    command_line,
    guarded,
    show,
    tell_folder,
)
from netwright.console import UserError

if TYPE_CHECKING:
    from netwright.page import Page

PICTURES = (".png", ".svg", ".pdf")


def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data set by name, a folder or an .npz file.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write one picture of each class here (PNG or SVG).")
    ] = None,
    skip_broken: SkipBroken = False,
    drop_unknown: DropUnknown = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look at the data and say what is wrong: counts, faults, sizes. Exit 1 when a fault would spoil a run."""
    with guarded(quiet, debug):
        from netwright.data import check as look

        if plot is not None and plot.suffix.lower() not in PICTURES:
            raise UserError(f"--plot must end in {', '.join(PICTURES)}, got {plot.name!r}")
        report = look(data, skip_broken=skip_broken, drop_unknown=drop_unknown, download=download)
        if plot is not None:
            from netwright.storage import atomic_path

            with atomic_path(plot) as temporary:
                figure = report.plot().figure
                figure.savefig(temporary, format=plot.suffix.lower().lstrip("."))  # type: ignore[union-attr]
        show(report, as_json)
        if report.spoiled:
            raise typer.Exit(1)


def condense(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data set by name, a folder or an .npz file.")],
    out: Annotated[Path, typer.Option(help="A new folder, or a new .npz file.")],
    keep: Annotated[float, typer.Option(help="Share of the training examples to keep, in (0, 1].")] = 0.2,
    features: Annotated[str, typer.Option(help="trained, pixels, or a .npy file with a row an example.")] = "trained",
    bins: Annotated[int, typer.Option(help="Number of bins.")] = 10,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    skip_broken: SkipBroken = False,
    drop_unknown: DropUnknown = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Keep the part of DATA that is worth training on (dataset quantization), as data that design accepts."""
    with guarded(quiet, debug):
        from netwright.design.condense import condense as shrink

        options = {"skip_broken": skip_broken, "drop_unknown": drop_unknown, "download": download}
        show(shrink(data, out, keep=keep, features=features, n_bins=bins, seed=seed, **options), as_json)


def design(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A data set by name, a folder or an .npz file.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights that are zero, in [0, 1).  [0.95]")] = None,
    time_budget: Annotated[str | None, typer.Option(help="Wall time, like 90s, 10m or 1h30m.")] = None,
    accuracy: Annotated[float | None, typer.Option(help="Goal for the test accuracy; exit 1 when missed.")] = None,
    search: Annotated[
        str | None,
        typer.Option(help="dass, darts, rarts, sd-darts, proxylessnas, fbnet, single-path or random.  [dass]"),
    ] = None,
    space: Space = None,
    select: Select = None,
    sample_epochs: SampleEpochs = None,
    latency_ms: LatencyMs = None,
    latency_table: LatencyTable = None,
    flops: Flops = None,
    train_method: Annotated[
        list[str] | None,
        typer.Option(
            help="tract, weight-compander, gradient-noise, natra, ps-kd, elr or elr+, like elr:lam=3; may repeat."
        ),
    ] = None,
    pruning: Annotated[str | None, typer.Option(help="magnitude or hydra.  [magnitude]")] = None,
    baseline: Annotated[str | None, typer.Option(help="Network to compare with.  [mobilenet_v2]")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width that images are resized to.")] = None,
    channels: Annotated[int | None, typer.Option(help="Width of the network.")] = None,
    cells: Annotated[int | None, typer.Option(help="Depth of the network.")] = None,
    search_channels: Annotated[int | None, typer.Option(help="Width of the supernet.")] = None,
    search_epochs: Annotated[int | None, typer.Option(help="Epochs of the search.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of training, pruning and fine-tuning together.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step, over all processes.  [64]")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.  [0.1]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.  [0]")] = None,
    devices: Annotated[int | None, typer.Option(help="Processes on this machine.  [1]")] = None,
    nodes: Annotated[int | None, typer.Option(help="Machines.  [1]")] = None,
    strategy: Annotated[str | None, typer.Option(help="auto, ddp or fsdp.  [auto]")] = None,
    logger: Annotated[str | None, typer.Option(help="csv, tensorboard or none.  [csv]")] = None,
    config: Annotated[Path | None, typer.Option(help="A run.json to replay; options given here come first.")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the run.  [runs/NAME-DATE]")] = None,
    jobs: Jobs = 1,
    skip_broken: SkipBroken = False,
    drop_unknown: DropUnknown = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Design a sparse network for DATA: search, train, prune, export, measure, report. The same command goes on."""
    given: dict[str, Any] = {
        "data": data,
        "sparsity": sparsity,
        "time_budget": time_budget,
        "accuracy_goal": accuracy,
        "search": search,
        "space": space,
        "select": select,
        "sample_epochs": sample_epochs,
        "latency_ms": latency_ms,
        "latency_table": latency_table,
        "train_method": tuple(train_method) if train_method else None,
        "pruning": pruning,
        "baseline": baseline,
        "size": size,
        "channels": channels,
        "cells": cells,
        "search_channels": search_channels,
        "search_epochs": search_epochs,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "devices": devices,
        "nodes": nodes,
        "strategy": strategy,
        "logger": logger,
        "out": out,
        "jobs": jobs if jobs != 1 else None,
        "skip_broken": skip_broken or None,
        "drop_unknown": drop_unknown or None,
        "download": download or None,
    }
    with guarded(quiet, debug):
        from netwright.design.distributed import is_main, launch, needs_launch
        from netwright.design.options import Options, duration, from_config, quantity
        from netwright.design.pipeline import design as run_design
        from netwright.design.plan import Plan

        settings = {name: value for name, value in given.items() if value is not None}
        if time_budget is not None:
            settings["time_budget"] = duration(time_budget)
        if flops is not None:
            settings["flops"] = quantity(flops)
        plan = None
        if config is not None:
            saved = from_config(config)
            replays = {**saved, **settings}
            same = all(saved.get(n) == v for n, v in settings.items() if n not in ("out", "devices", "nodes", "jobs"))
            earlier = config.parent / "plan.json"
            if same and earlier.is_file():
                plan = Plan.from_dict(json.loads(earlier.read_text()))
            settings = {**replays, "out": out}
        if "data" not in settings:
            raise UserError("DATA is missing", cure="name a data set (digits), a folder or an .npz file")
        options = Options(**settings)
        if needs_launch(options.devices, options.nodes):
            raise typer.Exit(launch(options.devices, options.nodes, sys.argv[1:]))
        tell_folder(options)
        result = run_design(options=options, plan=plan, command=command_line())
        if is_main():
            show(result, as_json, lambda: _told(result.folder))
            if result.missed and not as_json:
                sys.stdout.write("missed: " + "; ".join(result.missed) + "\n")
        if not result.goal_met:
            raise typer.Exit(1)


def _told(folder: str | Path, page: Page | None = None) -> str:
    from netwright.design import remarks
    from netwright.design.report import build
    from netwright.design.run import RunFolder
    from netwright.page import text_of

    told = [text_of((page or build(folder)).verdict), *remarks.lines(RunFolder(folder))]
    return "\n".join([*told, f"report: {Path(folder) / 'report.html'}", f"run folder: {folder}"])


def evaluate(
    run: RunPath,
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="Labelled data; the run's own when left out.")
    ] = None,
    skip_broken: SkipBroken = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Accuracy of a run's network on labelled data, with its 95 % interval."""
    with guarded(quiet, debug):
        from netwright.design.use import evaluate_run

        show(evaluate_run(run, data, skip_broken=skip_broken, download=download), as_json)


def predict(
    run: RunPath,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or one .npy or .npz of images.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """The class of each image, with its probability."""
    with guarded(quiet, debug):
        from netwright.design.use import predict_files

        show(predict_files(run, images), as_json)


def report(run: RunPath, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write report.html, report.md and report.json of a run, finished or not."""
    with guarded(quiet, debug):
        from netwright.design import compress_page, train_page
        from netwright.design.report import build
        from netwright.design.run import RunFolder

        folder = RunFolder(run)
        pages = {"compression": compress_page.page, "training": train_page.page}
        kind = folder.written_by()
        if kind not in pages:
            folder.described()  # says so if there is no run
        made = pages.get(kind or "", build)(run)
        made.write(run)
        if as_json:
            sys.stdout.write((run / "report.json").read_text())
        else:
            show(None, False, lambda: _told(run, made))


def doctor(
    full: Annotated[bool, typer.Option("--full", help="Show paths too.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Versions, cores, extras, data sets found, write access: what a bug report needs."""
    with guarded(quiet, debug):
        from netwright.design.doctor import doctor as examine

        show(examine(full=full), as_json)
