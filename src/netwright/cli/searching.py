"""Verbs about architecture search by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netwright.cli.common import Debug, Json, Quiet, guarded, show
from netwright.console import UserError, nearest


def latency_table(
    space: Annotated[str, typer.Argument(metavar="SPACE", help="A search space, like micro-chain.")],
    out: Annotated[Path, typer.Option(help="The JSON file.")],
    shape: Annotated[str, typer.Option(help="Channels, height and width of one input.")] = "3,32,32",
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    channels: Annotated[int | None, typer.Option(help="Width of the networks.  [the space's own]")] = None,
    runtime: Annotated[str, typer.Option(help="torch, or native for the sparse runtime.")] = "torch",
    sparsity: Annotated[float, typer.Option(help="Share of zeros of random weights, in [0, 1).")] = 0.0,
    threads: Annotated[int, typer.Option(help="Threads of the runtime.")] = 1,
    batch: Annotated[int, typer.Option(help="Inputs of one call.")] = 1,
    repeats: Annotated[int, typer.Option(help="Timed calls of each network.")] = 100,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure what every operation of a search space takes on this machine, for searches that watch the latency."""
    with guarded(quiet, debug):
        from netwright.search.spaces import SPACES

        if space not in SPACES:
            raise UserError(f"unknown search space {space!r}", cure=nearest(space, SPACES))
        if out.exists() and not force:
            raise UserError("the file is there already", where=out, cure="choose another --out, or add --force")
        if classes < 1:
            raise UserError(f"classes must be >= 1, got {classes}")
        if channels is not None and channels < 2:
            raise UserError(f"channels must be >= 2, got {channels}")
        given = _shape(shape)
        from netwright.search.latency import Setup, measure

        options = {} if channels is None else {"channels": channels}
        setup = Setup(runtime, sparsity, threads, batch, repeats, options)  # type: ignore[arg-type]
        table = measure(SPACES[space], given, classes, setup)
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
