"""The command ``netwright``: one thin function a verb.

Results go to standard output, progress and warnings to standard error. Exit: 0 done, 1 done but a goal was missed,
2 bad input, 130 stopped. Heavy imports stand inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from netwright import __version__
from netwright.console import UserError, configure

app = typer.Typer(
    name="netwright",
    help="Designs, trains, compresses, explains, verifies and studies neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Processes at once; -1 for every core.")]
Download = Annotated[bool, typer.Option("--download", help="Allow the network, to fetch a data set.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave out files that cannot be read.")]
DropUnknown = Annotated[bool, typer.Option("--drop-unknown", help="Leave out test classes that training lacks.")]
Family = Annotated[str | None, typer.Option("--family", help="Only papers of this package, like search.")]
PICTURES = (".png", ".svg", ".pdf")
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A folder written by netwright design.")]


@contextmanager
def _guarded(quiet: bool, debug: bool) -> Iterator[None]:
    """Turns what a verb raises into one message and an exit code."""
    configure(quiet=quiet)
    try:
        yield
    except KeyboardInterrupt as stopped:
        told = str(stopped) or "stopped"
        _leave(f"{told}; the same command goes on", 130, debug)
    except UserError as error:
        _leave(f"error: {error}", 2, debug)
    except FloatingPointError as error:
        _leave(f"error: {error}", 2, debug)
    except ModuleNotFoundError as error:
        _leave(f"error: {error.name} is not installed\n  do pip install {error.name}", 2, debug)
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        what = "the disk is full" if full else (error.strerror or type(error).__name__)
        where = f"\n  in {error.filename}" if error.filename else ""
        cure = "free some room and give the same command again" if full else "add --debug to see where it came from"
        _leave(f"error: {what}{where}\n  do {cure}", 2, debug)
    except typer.Exit:
        raise
    except Exception as error:  # whatever else: one line for the user, the rest on request
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        told = first if isinstance(error, ValueError) and first else f"{type(error).__name__}: {first}"
        _leave(f"error: {told}\n  do add --debug to see where it came from", 2, debug)


def _leave(message: str, code: int, debug: bool) -> NoReturn:
    if debug and code == 2:
        import traceback

        traceback.print_exc()
    sys.stderr.write(message + "\n")
    raise typer.Exit(code)


def _print(value: Any, as_json: bool, text: Callable[[], str] | None = None) -> None:
    from netwright.results import plain

    if as_json:
        sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write((text() if text is not None else str(value)) + "\n")


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"netwright {__version__}\n")
        raise typer.Exit(0)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Designs, trains, compresses, explains, verifies and studies neural networks."""


@app.command()
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
    with _guarded(quiet, debug):
        from netwright.data import check as look

        if plot is not None and plot.suffix.lower() not in PICTURES:
            raise UserError(f"--plot must end in {', '.join(PICTURES)}, got {plot.name!r}")
        report = look(data, skip_broken=skip_broken, drop_unknown=drop_unknown, download=download)
        if plot is not None:
            from netwright.storage import atomic_path

            with atomic_path(plot) as temporary:
                figure = report.plot().figure
                figure.savefig(temporary, format=plot.suffix.lower().lstrip("."))  # type: ignore[union-attr]
        _print(report, as_json)
        if report.spoiled:
            raise typer.Exit(1)


@app.command()
def design(
    data: Annotated[
        str | None, typer.Argument(metavar="DATA", help="A data set by name, a folder or an .npz file.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Share of weights that are zero, in [0, 1).  [0.95]")] = None,
    time_budget: Annotated[str | None, typer.Option(help="Wall time, like 90s, 10m or 1h30m.")] = None,
    accuracy: Annotated[float | None, typer.Option(help="Goal for the test accuracy; exit 1 when missed.")] = None,
    search: Annotated[str | None, typer.Option(help="dass, darts or random.  [dass]")] = None,
    space: Annotated[str | None, typer.Option(help="Search space.  [micro-darts]")] = None,
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
    with _guarded(quiet, debug):
        from netwright.design.distributed import is_main, launch, needs_launch
        from netwright.design.options import Options, duration, from_config
        from netwright.design.pipeline import design as run_design
        from netwright.design.plan import Plan
        from netwright.design.run import find_folder

        settings = {name: value for name, value in given.items() if value is not None}
        if time_budget is not None:
            settings["time_budget"] = duration(time_budget)
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
        if options.out is None and is_main():
            folder = find_folder(options)
            sys.stderr.write(f"run folder: {folder}\n")
        result = run_design(options=options, plan=plan, command=_command())
        if is_main():
            _print(result, as_json, lambda: _told(result.folder))
            if result.missed and not as_json:
                sys.stdout.write("missed: " + "; ".join(result.missed) + "\n")
        if not result.goal_met:
            raise typer.Exit(1)


def _told(folder: str | Path) -> str:
    from netwright.design.report import build
    from netwright.page import text_of

    return f"{text_of(build(folder).verdict)}\nreport: {Path(folder) / 'report.html'}\nrun folder: {folder}"


def _command() -> str:
    import shlex

    return shlex.join(["netwright", *sys.argv[1:]])


@app.command()
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
    with _guarded(quiet, debug):
        from netwright.design.use import evaluate_run

        _print(evaluate_run(run, data, skip_broken=skip_broken, download=download), as_json)


@app.command()
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
    with _guarded(quiet, debug):
        from netwright.design.use import predict_files

        _print(predict_files(run, images), as_json)


@app.command()
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
    with _guarded(quiet, debug):
        from netwright.deploy.bench import bench as measure
        from netwright.deploy.bench import summary
        from netwright.design.benchmark import recipes
        from netwright.results import plain
        from netwright.storage import write_json

        options: dict[str, Any] = {"threads": threads, "rounds": rounds, "seconds": seconds, "runtimes": runtime or ()}
        planned = recipes(models or [], sparsity or [], keep_at_least=keep_at_least, size=size, batch=batch, seed=seed)
        found = [measure(recipe, **options, command=_command()) for recipe in planned]
        result = found[0] if len(found) == 1 else found
        if out is not None:
            write_json(out, plain(result))
        _print(result, as_json, lambda: str(found[0]) if len(found) == 1 else summary(found))


@app.command()
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
    with _guarded(quiet, debug):
        from netwright.design.use import export_model

        made = export_model(model, format, out, sparsity=sparsity, size=size, seed=seed, force=force)
        _print(made, as_json, lambda: "\n".join([*made.files, f"{made.bytes} bytes"]))


@app.command()
def report(run: RunPath, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Write report.html, report.md and report.json of a run, finished or not."""
    with _guarded(quiet, debug):
        from netwright.design.report import build
        from netwright.design.run import RunFolder

        RunFolder(run).described()
        build(run).write(run)
        if as_json:
            sys.stdout.write((run / "report.json").read_text())
        else:
            _print(None, False, lambda: _told(run))


@app.command()
def doctor(
    full: Annotated[bool, typer.Option("--full", help="Show paths too.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Versions, cores, extras, data sets found, write access: what a bug report needs."""
    with _guarded(quiet, debug):
        from netwright.design.doctor import doctor as examine

        _print(examine(full=full), as_json)


@app.command()
def papers(family: Family = None, as_json: Json = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """All published methods, with what their reproductions found here."""
    with _guarded(quiet, debug):
        from netwright.console import table
        from netwright.papers import list_papers

        rows = list_papers(family)

        def text() -> str:
            names = ("slug", "verdict", "budget", "seeds", "seconds", "title")
            return table([[_cell(row[name]) for name in names] for row in rows], names)

        _print(rows, as_json, text)


def _cell(value: Any) -> object:
    if value is None:
        return "-"
    return f"{value:.0f}" if isinstance(value, float) else value if isinstance(value, (int, str)) else len(value)


@app.command()
def reproduce(
    slugs: Annotated[
        list[str] | None, typer.Argument(metavar="SLUG...", help="Papers, as netwright papers lists them, or all.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Every paper of this package, like search.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="A few seconds in place of minutes; no verdict to publish.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.")] = None,
    scale: Annotated[float, typer.Option(help="Multiplies data and epochs, for larger machines.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Folder of the evidence.  [reproduce/SLUG]")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep full evidence in the package itself.")] = False,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster, or local.")] = None,
    jobs: Jobs = 1,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Run the experiments that test papers' claims. Exit 0 whatever is found; an interrupted run goes on."""
    with _guarded(quiet, debug):
        from netwright.papers import reproduce as run_papers

        found = run_papers(
            slugs or (),
            fast=fast,
            seeds=seeds,
            scale=scale,
            jobs=jobs,
            ray=ray,
            out=out,
            record=record,
            family=family,
        )
        _print([evidence.to_dict() for evidence in found], as_json, lambda: "\n\n".join(map(str, found)))


@app.command()
def cite(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A paper's slug, or a public name of netwright.")],
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """BibTeX for a method."""
    with _guarded(quiet, debug):
        from netwright.papers.index import cite as bibtex

        entry = bibtex(name)
        _print({"name": name, "bibtex": entry}, as_json, lambda: entry)


def main() -> None:
    """Entry point."""
    # A closed pipe (netwright papers | head) ends the program quietly.
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Threads that wait actively make a training step 20 times slower as soon as another program wants a core; threads
    # that sleep at once make it 1.6 times slower when none does. About 0.1 ms of waiting costs little in either case.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # for runtimes other than GNU's, which know no such count
    app()
