"""The verb about what a network certainly does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from netwright.cli.common import Debug, Download, Json, Quiet, guarded, show


def verify(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a name, or FILE.py:FUNCTION.")],
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="An image file, a .npy file, or DATA:NUMBER of its test part.")
    ],
    radius: Annotated[str, typer.Option(help="Most that a pixel in [0, 1] may change: 0.03, or 8/255.")],
    manipulation: Annotated[str, typer.Option(help="all, pixels:N or patch:TOP,LEFT,HEIGHT,WIDTH.")] = "all",
    engine: Annotated[str, typer.Option(help="auto, smt, bounds, grid, layers or layerwise.")] = "auto",
    steps: Annotated[int, typer.Option(help="Of the grid, to each side.")] = 1,
    layers: Annotated[
        str | None, typer.Option(metavar="FIRST:LAST", help="Of --engine layers; 0 is the input.  [0:1]")
    ] = None,
    dims: Annotated[
        int | None, typer.Option(help="Numbers that vary in a layer behind the input, with --engine layers.  [5]")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds.")] = 60.0,
    size: Annotated[int | None, typer.Option(help="Height and width of an image file.  [its own]")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a counterexample.  [counterexample-IMAGE]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is there.")] = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that no change of an image within a radius changes its class, or show one that does. Exit 0 if proved."""
    with guarded(quiet, debug):
        from netwright.design.verification import verify_model

        found = verify_model(
            model, image, radius=radius, manipulation=manipulation, engine=engine, steps=steps, layers=layers,
            dims=dims, timeout=timeout, out=out, force=force, size=size, download=download,
        )  # fmt: skip
        show(found, as_json)
        if found.status != "safe":
            raise typer.Exit(1)
