"""Verbs about networks that run elsewhere, or faster, or smaller."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from netwright.cli.common import (
    Debug,
    Download,
    DropUnknown,
    Json,
    Quiet,
    SkipBroken,
    command_line,
    guarded,
    show,
)


def bench(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN|MODEL...", help="Runs, names (resnet18, timm:lcnet_050), FILE.py:FUNCTION, .onnx."),
    ] = None,
    sparsity: Annotated[
        list[float] | None, typer.Option(help="Share of zeros of random weights, in [0, 1); may repeat.  [0.95]")
    ] = None,
    keep_at_least: Annotated[int, typer.Option(help="Weights that every output channel keeps even so.")] = 0,
    size: Annotated[int | None, typer.Option(help="Height and width of the input.  [the network's own]")] = None,
    threads: Annotated[int, typer.Option(help="Threads of every runtime, each on a core of its own.")] = 1,
    batch: Annotated[int, typer.Option(help="Inputs of one call.")] = 1,
    rounds: Annotated[int, typer.Option(help="Most rounds.")] = 100,
    seconds: Annotated[float, typer.Option(help="No round begins later, once there are ten.")] = 5.0,
    runtime: Annotated[list[str] | None, typer.Option(help="Only this runtime; may repeat.  [all]")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the JSON here too.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time a sparse network in netwright's runtime and in the dense ones, in turns, with what the machine allows."""
    with guarded(quiet, debug):
        from netwright.deploy.bench import bench as measure
        from netwright.deploy.bench import summary
        from netwright.design.benchmark import recipes
        from netwright.results import plain
        from netwright.storage import write_json

        options: dict[str, Any] = {"threads": threads, "rounds": rounds, "seconds": seconds, "runtimes": runtime or ()}
        planned = recipes(models or [], sparsity or [], keep_at_least=keep_at_least, size=size, batch=batch, seed=seed)
        found = [measure(recipe, **options, command=command_line()) for recipe in planned]
        result = found[0] if len(found) == 1 else found
        if out is not None:
            write_json(out, plain(result))
        show(result, as_json, lambda: str(found[0]) if len(found) == 1 else summary(found))


def compress(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a name, or FILE.py:FUNCTION.")],
    out: Annotated[Path, typer.Option(help="A folder.")],
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA]", help="What to train and measure on; a run brings its own.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="distill, low-rank or maestro, prune, quantize or differentiable-quantization or "
            "alternating-quantization; may repeat, in this order."
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            metavar="RUN|MODEL", help="Network that distill trains.  [a small one of at most half the parameters]"
        ),
    ] = None,
    params: Annotated[float, typer.Option(help="Share of parameters that low-rank leaves, in (0, 1).")] = 0.5,
    sparsity: Annotated[float, typer.Option(help="Share of zeros after prune, in [0, 1).")] = 0.9,
    bits: Annotated[int, typer.Option(help="Of a weight after quantize, 1..16.")] = 4,
    bucket_size: Annotated[int, typer.Option(help="Weights that share a scale; 0 for one a tensor.")] = 256,
    augment: Annotated[
        bool, typer.Option("--augment", help="Train on images that are shifted and flipped, as the data allow.")
    ] = False,
    epochs: Annotated[int, typer.Option(help="Of training, for every step that trains.")] = 3,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 0.02,
    size: Annotated[int | None, typer.Option(help="Height and width of the input.  [the data's own]")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Begin anew, in place of what is there.")] = False,
    skip_broken: SkipBroken = False,
    drop_unknown: DropUnknown = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a network smaller by a chain of methods, and tell what each did. The same command goes on."""
    with guarded(quiet, debug):
        from netwright.design.compression import Wish, compress_model

        wish = Wish(
            tuple(method or ()),
            student=student or "",
            share=params,
            sparsity=sparsity,
            bits=bits,
            bucket_size=bucket_size,
            augment=augment,
            epochs=epochs,
            lr=lr,
            seed=seed,
        )
        reading = {"skip_broken": skip_broken, "drop_unknown": drop_unknown, "download": download}
        made = compress_model(model, data, out, wish, size=size, force=force, command=command_line(), **reading)
        show(made, as_json)


def export(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run, a name, or FILE.py:FUNCTION.")],
    format: Annotated[str, typer.Option(help="onnx, safetensors, c or netwright.")],
    out: Annotated[Path, typer.Option(help="The file; the folder of C.")],
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros of random weights, in [0, 1).  [0.95]")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of the input.  [the network's own]")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a network for use elsewhere: ONNX, weights, C, or a file of netwright's runtime."""
    with guarded(quiet, debug):
        from netwright.design.use import export_model

        made = export_model(model, format, out, sparsity=sparsity, size=size, seed=seed, force=force)
        show(made, as_json, lambda: "\n".join([*made.files, f"{made.bytes} bytes"]))
