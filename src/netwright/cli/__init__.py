"""The command ``netwright``: one thin function a verb.

Results go to standard output, progress and warnings to standard error. Exit: 0 done, 1 done but a goal was missed,
2 bad input, 130 stopped. Heavy imports stand inside the verbs, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from netwright import __version__
from netwright.cli import (
    deploying,
    designing,
    diagnosing,
    explaining,
    reproducing,
    searching,
    training,
    verifying,
)

app = typer.Typer(
    name="netwright",
    help="Designs, trains, compresses, explains, verifies and studies neural networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"netwright {__version__}\n")
        raise typer.Exit(0)


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Designs, trains, compresses, explains, verifies and studies neural networks."""


for verb in (
    designing.check,
    designing.condense,
    designing.design,
    searching.search,
    designing.evaluate,
    designing.predict,
    explaining.explain,
    deploying.bench,
    deploying.compress,
    deploying.export,
    searching.latency_table,
    training.train,
    verifying.verify,
    diagnosing.diagnose,
    designing.report,
    designing.doctor,
    reproducing.papers,
    reproducing.reproduce,
    reproducing.cite,
):
    app.command()(verb)


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
