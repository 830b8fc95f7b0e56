"""The verb that looks into a trained network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netwright.cli.common import Debug, Download, DropUnknown, Json, Quiet, SkipBroken, guarded, show


def diagnose(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a name, or FILE.py:FUNCTION.")],
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="What it was trained on; a run brings its own.")
    ] = None,
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("diagnosis"),
    part: Annotated[
        list[str] | None,
        typer.Option(help="Only coherence, opposing-signals or memorising-neurons; may repeat.  [all that apply]"),
    ] = None,
    examples: Annotated[int, typer.Option(help="Training examples to look at.")] = 1000,
    size: Annotated[int | None, typer.Option(help="Height and width that images are resized to.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    skip_broken: SkipBroken = False,
    drop_unknown: DropUnknown = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look into a trained network: what is learned one by one, what would make training spike, what memorises."""
    with guarded(quiet, debug):
        from netwright.design.diagnosis import diagnose_model

        reading = {"skip_broken": skip_broken, "drop_unknown": drop_unknown, "download": download}
        show(
            diagnose_model(model, data, out, parts=part or (), examples=examples, size=size, seed=seed, **reading),
            as_json,
        )
