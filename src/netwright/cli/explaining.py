"""The verb about what a network looks at."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from netwright.cli.common import Debug, Json, Quiet, guarded, show
from netwright.console import UserError


def explain(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|MODEL]", help="A run, a name, or FILE.py:FUNCTION; not with --tabular."),
    ] = None,
    images: Annotated[
        list[Path] | None, typer.Argument(metavar="[IMAGE...]", help="Image files; not with --tabular.")
    ] = None,
    out: Annotated[Path, typer.Option(help="A new folder.")] = Path("explained"),
    layer: Annotated[
        list[str] | None, typer.Option(help="A layer by name; maps of several are averaged.  [the last with places]")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="eigen-cam, or grad-cam or grad-cam++ of the predicted class.  [eigen-cam]")
    ] = None,
    center: Annotated[bool, typer.Option("--center", help="Take each channel's mean away first (eigen-cam).")] = False,
    size: Annotated[int | None, typer.Option(help="Height and width of the input.  [the network's own]")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Leave a named network untrained, as a control.")
    ] = False,
    download: Annotated[bool, typer.Option("--download", help="Allow the network, to fetch trained weights.")] = False,
    tabular: Annotated[
        Path | None, typer.Option(metavar="CSV", help="A table to learn and to explain, in place of MODEL and IMAGE.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="With --tabular: the column of the classes.")
    ] = None,
    surrogate: Annotated[
        str | None, typer.Option(help="With --tabular: tree or forest, which stands in for the network.  [tree]")
    ] = None,
    features: Annotated[
        int | None, typer.Option(help="With --tabular: how many features the surrogate sees.  [chosen by agreement]")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="With --tabular: none, dense or conv, an autoencoder in front.  [none]")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="With --tabular: of the network, at most.  [32]")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Where a network's features are in images, a picture of each; or by which features a network decides a table."""
    with guarded(quiet, debug):
        of_tables = {
            "--target": target, "--surrogate": surrogate, "--features": features, "--encoder": encoder,
            "--epochs": epochs,
        }  # fmt: skip
        if tabular is not None:
            of_images = {
                "MODEL": model, "IMAGE": images, "--layer": layer, "--method": method, "--center": center,
                "--size": size, "--random-weights": random_weights, "--download": download,
            }  # fmt: skip
            _refuse(of_images, "--tabular")
            if target is None:
                raise UserError("--target is missing", cure="name the column of the classes with --target COLUMN")
            from netwright.design.tabular import explain_table

            found = explain_table(
                tabular,
                target,
                out,
                surrogate=surrogate or "tree",
                k=features,
                encoder=encoder or "none",
                epochs=32 if epochs is None else epochs,
                seed=seed,
            )
            show(found, as_json)
            return
        _refuse(of_tables, "images", "give --tabular CSV as well")
        if model is None:
            raise UserError("RUN or MODEL is missing", cure="give a network and images, or --tabular CSV")
        from netwright.design.explaining import explain_images

        maps = explain_images(
            model,
            images or [],
            out,
            layers=layer or (),
            method="eigen-cam" if method is None else method,
            center=center,
            size=size,
            random_weights=random_weights,
            download=download,
            seed=seed,
        )
        show(maps, as_json)


def _refuse(options: Mapping[str, object], what: str, cure: str | None = None) -> None:
    """Refuses options that have no meaning here."""
    given = next((name for name, value in options.items() if value not in (None, False, [], ())), None)
    if given is not None:
        raise UserError(f"{given} means nothing for {what}", cure=cure or f"leave {given} out")
