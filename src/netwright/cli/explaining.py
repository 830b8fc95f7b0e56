"""The verb about what a network looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netwright.cli.common import Debug, Json, Quiet, guarded, show


def explain(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a name, or FILE.py:FUNCTION.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("explained"),
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer by name; maps of several are averaged.  [the last with places]")
    ] = None,
    method: Annotated[
        str, typer.Option(help="eigen-cam, or grad-cam or grad-cam++ of the predicted class.")
    ] = "eigen-cam",
    center: Annotated[bool, typer.Option("--center", help="Take each channel's mean away first (eigen-cam).")] = False,
    size: Annotated[int | None, typer.Option(help="Height and width of the input.  [the network's own]")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Leave a named network untrained, as a control.")
    ] = False,
    download: Annotated[bool, typer.Option("--download", help="Allow the network, to fetch trained weights.")] = False,
    seed: Annotated[int, typer.Option(help="Of random weights.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Where a network's features are in images: a picture of each, its map over it, and a page of all."""
    with guarded(quiet, debug):
        from netwright.design.explaining import explain_images

        found = explain_images(
            model,
            images,
            out,
            layers=layer or (),
            method=method,
            center=center,
            size=size,
            random_weights=random_weights,
            download=download,
            seed=seed,
        )
        show(found, as_json)
