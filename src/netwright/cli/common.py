"""What the verbs share: their common options, how they print, and how errors become messages and exit codes."""

from __future__ import annotations

import errno
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from netwright.console import UserError, configure

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no notes.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Processes at once; -1 for every core.")]
Download = Annotated[bool, typer.Option("--download", help="Allow the network, to fetch a data set.")]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Leave out files that cannot be read.")]
DropUnknown = Annotated[bool, typer.Option("--drop-unknown", help="Leave out test classes that training lacks.")]
Select = Annotated[
    str | None,
    typer.Option(
        help="How the search decides: magnitude, argmax, sample, or perturbation (the rule of DARTS-PT without its "
        "tuning between decisions); single-path by its thresholds alone.  [as the method does]"
    ),
]
LatencyMs = Annotated[
    float | None, typer.Option(help="Most milliseconds of one image on one thread, in the sparse runtime.")
]
LatencyTable = Annotated[
    str | None,
    typer.Option(help="A file of netwright latency-table for --latency-ms; measured on this machine when left out."),
]
Space = Annotated[
    str | None,
    typer.Option(
        help="Search space, or one of your own: FILE.py:NAME; single-path needs one of blocks, like micro-chain.  "
        "[micro-darts]"
    ),
]
SampleEpochs = Annotated[
    int | None,
    typer.Option(help="With --select sample: epochs of training for each drawn architecture; the best stays."),
]
Flops = Annotated[
    str | None, typer.Option(help="Most floating-point operations, two a multiply-add, zeros included; like 5M.")
]
Family = Annotated[str | None, typer.Option("--family", help="Only papers of this package, like search.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A folder written by netwright design.")]


@contextmanager
def guarded(quiet: bool, debug: bool) -> Iterator[None]:
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


def tell_folder(options: Any, kind: str = "run") -> None:
    """Says where a run without ``--out`` will lie, once its data are known; the first of several processes does."""
    from netwright.data.sources import refuse_unknown
    from netwright.design.distributed import is_main
    from netwright.design.run import find_folder

    if options.out is None and is_main():
        refuse_unknown(options.data)
        sys.stderr.write(f"run folder: {find_folder(options, kind)}\n")


def show(value: Any, as_json: bool, text: Callable[[], str] | None = None) -> None:
    """Prints a result: as JSON, or as text (by default what it says itself)."""
    from netwright.results import plain

    if as_json:
        sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")
    else:
        sys.stdout.write((text() if text is not None else str(value)) + "\n")


def command_line() -> str:
    """The command as it was given, for the record."""
    return shlex.join(["netwright", *sys.argv[1:]])
