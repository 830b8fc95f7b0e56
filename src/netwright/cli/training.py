"""The verb about training alone."""

from __future__ import annotations

import sys
from typing import Annotated

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
    tell_folder,
)


def train(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A data set by name, a folder or an .npz file.")],
    model: Annotated[
        str, typer.Option(help="A network by name (resnet18, timm:lcnet_050), a run, or FILE.py:FUNCTION.")
    ] = "small_convnet",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="tract, weight-compander, gradient-noise, natra, ps-kd, elr, elr+ or cdvg, as NAME or NAME:ARG=VALUE; "
            "may repeat. Or simclr, moco or simsiam, which train without labels, alone."
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training part.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Examples in a step, over all processes.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate at the start.")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty on weights.")] = 5e-4,
    no_augment: Annotated[bool, typer.Option("--no-augment", help="Train on the images as they are.")] = False,
    hallucinate: Annotated[
        bool, typer.Option("--hallucinate", help="With simclr, moco or simsiam: a further positive in feature space.")
    ] = False,
    crop: Annotated[str, typer.Option(help="Crops of their views: random, or center for near the middle.")] = "random",
    label_noise: Annotated[
        str | None,
        typer.Option(
            metavar="KIND:RATE", help="Make training labels wrong on purpose: symmetric, asymmetric or instance."
        ),
    ] = None,
    precision: Annotated[str, typer.Option(help="32-true, bf16-mixed, 16-mixed or 64-true.")] = "32-true",
    size: Annotated[int | None, typer.Option(help="Height and width that images are resized to.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    devices: Annotated[int, typer.Option(help="Processes on this machine.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines.")] = 1,
    strategy: Annotated[str, typer.Option(help="auto, ddp or fsdp.")] = "auto",
    out: Annotated[str | None, typer.Option(help="Folder of the run.  [runs/NAME-training-DATE]")] = None,
    skip_broken: SkipBroken = False,
    drop_unknown: DropUnknown = False,
    download: Download = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a network of your choice on DATA with any of the training methods. The same command goes on."""
    with guarded(quiet, debug):
        from netwright.design import remarks
        from netwright.design.distributed import is_main, launch, needs_launch
        from netwright.design.run import RunFolder
        from netwright.design.train import TrainOptions
        from netwright.design.train import train as run_training
        from netwright.design.train_page import KIND, verdict

        options = TrainOptions(
            data=data,
            model=model,
            methods=tuple(method or ()),
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            augment=not no_augment,
            hallucinate=hallucinate,
            crop=crop,
            label_noise=label_noise,
            precision=precision,
            size=size,
            seed=seed,
            skip_broken=skip_broken,
            drop_unknown=drop_unknown,
            download=download,
            devices=devices,
            nodes=nodes,
            strategy=strategy,
            out=out,
        )
        if needs_launch(devices, nodes):
            raise typer.Exit(launch(devices, nodes, sys.argv[1:]))
        tell_folder(options, KIND)
        result = run_training(options, command=command_line())
        if is_main():
            show(
                result,
                as_json,
                lambda: "\n".join(
                    [
                        verdict(result),
                        *remarks.lines(RunFolder(result.folder, KIND)),
                        f"report: {result.folder}/report.html",
                        f"run folder: {result.folder}",
                    ]
                ),
            )
