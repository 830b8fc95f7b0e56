"""Programs in processes of their own that need not import anything: forks of one that has done so."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

IMPORTED = [
    "netwright.cli",
    "netwright.design.pipeline",
    "netwright.design.plan",
    "netwright.design.search_stage",
    "netwright.design.training_stage",
    "netwright.design.measure",
    "netwright.design.examples",
    "netwright.design.report",
    "netwright.deploy.model",
    "netwright.deploy.onnx",
    "lightning",
    "matplotlib.figure",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "sklearn.datasets",
    "torch.export",
    "torch.onnx",
]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(IMPORTED)


class Forked:
    """A process on the way; killed where the block that it is used in is left before it has ended.

    Args:
        target: What it does.
        *arguments: Of the target.
    """

    def __init__(self, target: Callable[..., None], *arguments: object):
        self._streams = tempfile.TemporaryDirectory(prefix="netwright-command-")
        self._files = [str(Path(self._streams.name, name)) for name in ("out", "err")]
        self._process = _FORKS.Process(target=_run, args=(target, arguments, *self._files))
        self._process.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._streams.cleanup()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None while it still runs after so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def interrupt(self) -> None:
        """Ctrl-C."""
        os.kill(self.pid, signal.SIGINT)

    @property
    def out(self) -> str:
        return Path(self._files[0]).read_text()

    @property
    def err(self) -> str:
        return Path(self._files[1]).read_text()


class Command(Forked):
    """``netwright ARGUMENTS``."""

    def __init__(self, *arguments: str):
        super().__init__(_command, arguments)


class Script(Forked):
    """``python SCRIPT ARGUMENTS`` in a folder; strict where a ``UserWarning`` is an error."""

    def __init__(self, script: Path, *arguments: str, folder: Path, strict: bool = False):
        super().__init__(_script, str(script), arguments, str(folder), strict)


def run_ranks(work: Callable[..., None], *arguments: object, world: int = 2) -> None:
    """``work(rank, *arguments)`` in as many processes as ``world``, of which each must end well."""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Forked(work, rank, *arguments)) for rank in range(world)]
        for process in processes:
            assert process.wait(120) == 0, process.err


def _run(target: Callable[..., None], arguments: tuple[object, ...], *files: str) -> None:
    for handle, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), handle)
    # A test run in the background ignores Ctrl-C, and its children would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    target(*arguments)


def _command(arguments: tuple[str, ...]) -> None:
    from tiny_run import brief

    from netwright.cli import main

    brief()
    sys.argv = ["netwright", *arguments]
    main()


def _script(script: str, arguments: tuple[str, ...], folder: str, strict: bool) -> None:
    os.chdir(folder)
    if strict:
        warnings.simplefilter("error", UserWarning)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
