"""Verbs about architecture search by itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.cli.common import (
    Debug,
    Download,
    DropUnknown,
    Flops,
    Json,
    LatencyMs,
    LatencyTable,
    Quiet,
    SampleEpochs,
    Select,
    SkipBroken,
    Space,
    command_line,
    guarded,
    show,
)
from netwright.console import UserError, nearest

STEMS = ("cifar", "strided", "imagenet")


def search(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data set by name, a folder or an .npz file.")],
    method: Annotated[
        str | None, typer.Option(help="dass, darts, rarts, sd-darts, proxylessnas, fbnet or single-path.  [dass]")
    ] = None,
    space: Space = None,
    select: Select = None,
    sample_epochs: SampleEpochs = None,
    latency_ms: LatencyMs = None,
    latency_table: LatencyTable = None,
    flops: Flops = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of zeros that the architecture is for, in [0, 1).  [0.95]")
    ] = None,
    time_budget: Annotated[str | None, typer.Option(help="Wall time, like 90s, 10m or 1h30m.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of all stages together.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.  [64]")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width that images are resized to.")] = None,
    search_channels: Annotated[int | None, typer.Option(help="Width of the supernet.  [8]")] = None,
    channels: Annotated[int | None, typer.Option(help="Width of the network that the limits are for.  [32]")] = None,
    cells: Annotated[int | None, typer.Option(help="Depth of the network that the limits are for.  [3]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.  [0]")] = None,
    out: Annotated[str | None, typer.Option(help="Folder of the search.  [runs/NAME-search-DATE]")] = None,
    skip_broken: SkipBroken = False,
    drop_unknown: DropUnknown = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Search an architecture for DATA and no more: the genotype, how alpha went, the skip share of every epoch."""
    given = {
        "data": data,
        "search": method,
        "space": space,
        "select": select,
        "sample_epochs": sample_epochs,
        "latency_ms": latency_ms,
        "latency_table": latency_table,
        "sparsity": sparsity,
        "search_epochs": epochs,
        "batch_size": batch_size,
        "size": size,
        "search_channels": search_channels,
        "channels": channels,
        "cells": cells,
        "seed": seed,
        "out": out,
        "skip_broken": skip_broken or None,
        "drop_unknown": drop_unknown or None,
        "download": download or None,
    }
    with guarded(quiet, debug):
        from netwright.design.options import Options, duration, quantity
        from netwright.design.run import find_folder
        from netwright.design.searching import KIND
        from netwright.design.searching import search as run_search

        _check_own_names(method, epochs)
        settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if time_budget is not None:
            settings["time_budget"] = duration(time_budget)
        if flops is not None:
            settings["flops"] = quantity(flops)
        options = Options(**settings)
        folder = find_folder(options, KIND)
        result = run_search(dataclasses.replace(options, out=str(folder)), command_line())
        show(result, as_json, lambda: f"{result}\nfolder: {folder}")


def _check_own_names(method: str | None, epochs: int | None) -> None:
    """What Options would refuse under the names that these have in ``netwright design``."""
    from netwright.search import METHODS

    known = [name for name in METHODS if name != "random"]
    if method not in (None, "random", *known):
        raise UserError(f"unknown --method {method!r}", cure=nearest(str(method), known))
    if epochs is not None and epochs < 1:
        raise UserError(f"epochs must be >= 1, got {epochs}")


def latency_table(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="A search space, like micro-chain, or FILE.py:NAME.")],
    out: Annotated[Path, typer.Option(help="The JSON file.")],
    shape: Annotated[str, typer.Option(help="Channels, height and width of one input.")] = "3,32,32",
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    channels: Annotated[int | None, typer.Option(help="Width of the networks.  [the space's own]")] = None,
    cells: Annotated[int | None, typer.Option(help="Depth of the networks.  [the space's own]")] = None,
    stem: Annotated[str, typer.Option(help="cifar, strided or imagenet: by how much the stem shrinks.")] = "cifar",
    runtime: Annotated[str, typer.Option(help="torch, or native for the sparse runtime.")] = "torch",
    sparsity: Annotated[float, typer.Option(help="Share of zeros of random weights, in [0, 1).")] = 0.0,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option(help="Inputs of one call.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed calls of each network.")] = 100,
    calibration: Annotated[
        int, typer.Option(help="Random networks whose whole calls correct the table; 0 for none.")
    ] = 30,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure every operation of a search space on this machine, for --latency-table of search and design."""
    with guarded(quiet, debug):
        from netwright.design.user_code import open_space, sizes_of

        opened = open_space(space)
        if out.exists() and not force:
            raise UserError("the file is there already", where=out, cure="choose another --out, or add --force")
        if classes < 1:
            raise UserError(f"classes must be >= 1, got {classes}")
        if channels is not None and channels < 2:
            raise UserError(f"channels must be >= 2, got {channels}")
        if cells is not None and cells < 1:
            raise UserError(f"cells must be >= 1, got {cells}")
        if stem not in STEMS:
            raise UserError(f"stem must be one of {', '.join(STEMS)}, got {stem!r}")
        given = _shape(shape)
        from netwright.search.latency import Setup, measure

        sizes = {"channels": channels, "cells": cells, "stem": stem}
        options = sizes_of(opened, **{name: size for name, size in sizes.items() if size is not None})
        setup = Setup(runtime, sparsity, threads, batch, repeats, calibration, options)  # type: ignore[arg-type]
        table = measure(opened, given, classes, setup)
        table.save(out)
        show(table, as_json)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"shape must be C,H,W, got {text!r}", cure="for example --shape 1,28,28") from None
    if min(channels, height, width) < 1:
        raise UserError(f"shape must hold numbers >= 1, got {text!r}", cure="for example --shape 1,28,28")
    return channels, height, width
