"""The process that measures: pinned to its cores, with an environment of its own, told what to do line by line.

    python -m netwright.deploy.bench.worker FOLDER

Each line on standard input is a JSON object with ``do`` and its arguments, each line on standard output the answer.
What the runtimes print goes to standard error.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from netwright.console import UserError
from netwright.deploy.bench.peers import Competitor, Prepared
from netwright.deploy.bench.subject import Work, first, resolve

MEMORY_CALLS = 5


@contextmanager
def pinned(cores: Collection[int] | None) -> Iterator[None]:
    """Binds this thread, and those that it starts, to ``cores`` inside the block.

    ``None`` changes nothing, nor does a system that cannot bind.

    Example:
        >>> with pinned(None):
        ...     pass
    """
    if not cores or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def core_choice(threads: int) -> tuple[int, ...] | None:
    """The last ``threads`` of the cores that this process may use; None where the system does not tell.

    Raises:
        UserError: If there are fewer.
    """
    free = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    count = len(free) if free is not None else os.cpu_count() or 1
    if not 1 <= threads <= count:
        raise UserError(f"threads must lie in 1..{count}, the cores of this machine, got {threads}")
    return None if free is None else tuple(free[-threads:])


class Server:
    """Answers the questions of one benchmark.

    Args:
        work: Its files.
        competitors: ``"module:class"`` by name.
        threads: Of every pool.
    """

    def __init__(self, work: Work, competitors: Mapping[str, str], threads: int):
        self._work, self._threads = work, threads
        self._competitors: dict[str, Competitor] = {name: resolve(path)() for name, path in competitors.items()}
        self._prepared: dict[str, Prepared] = {}

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """What a message asks for, or ``{"failed": why}``."""
        ask = getattr(self, f"do_{message.pop('do')}")
        try:
            return ask(**message)
        except Exception as error:  # a runtime may fail in any way; the others go on
            told = " ".join(str(error).split())
            return {"failed": (told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}")[:300]}

    def do_state(self, variables: Sequence[str]) -> dict[str, Any]:
        """Where this process runs, and what its environment says."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
        return {"cores": cores, "environment": {name: os.environ.get(name) for name in variables}}

    def do_prepare(self, name: str) -> dict[str, Any]:
        """Loads the network into a runtime and compares its output with what is expected."""
        begin = time.perf_counter()
        competitor = self._competitors[name]
        self._limit_torch(competitor)
        prepared = competitor.prepare(self._work, self._threads)
        seconds = time.perf_counter() - begin
        deviation = self._work.deviation(first(prepared.call()))
        self._prepared[name] = prepared
        return {
            "version": competitor.version(),
            "deviation": deviation,
            "note": prepared.note,
            "file_bytes": prepared.file_bytes,
            "table_bytes": prepared.table_bytes,
            "seconds": seconds,
        }

    def do_turn(self, name: str, calls: int) -> dict[str, Any]:
        """One untimed call, then seconds of ``calls`` timed ones."""
        from netwright.cost.timing import turn

        return {"seconds": turn(self._prepared[name].call, calls, untimed=1)}

    def do_peaks(self, seconds: float) -> dict[str, Any]:
        """What one core reaches in the best case."""
        from netwright.deploy.bench.roofline import measure_peaks

        return {"peaks": measure_peaks(seconds).to_dict()}

    def do_memory(self, name: str) -> dict[str, Any]:
        """Most memory that is resident while the network runs, beyond that of the imported packages."""
        competitor = self._competitors[name]
        competitor.load()
        self._limit_torch(competitor)
        if competitor.reads == "module":
            self._work.module()  # brings in the code that describes the network, which is not its memory
        _forget_peak()
        before = _resident("VmRSS")
        prepared = competitor.deploy(self._work, self._threads)
        prepared.call()
        _forget_peak()
        for _ in range(MEMORY_CALLS):
            prepared.call()
        after = _resident("VmHWM")
        return {"bytes": None if before is None or after is None else max(0, after - before)}

    def _limit_torch(self, competitor: Competitor) -> None:
        """Nobody else's threads shall wait for torch's, which spin for a while after each use."""
        if competitor.reads == "module":
            import torch

            torch.set_num_threads(self._threads if competitor.pool == "torch" else 1)


def _resident(what: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    line = next((line for line in text.splitlines() if line.startswith(f"{what}:")), None)
    return None if line is None else 1024 * int(line.split()[1])


def _forget_peak() -> None:
    """Gives freed memory back to the system and lets the peak be counted from now on."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (OSError, AttributeError, TypeError):
        return  # then the peak of loading counts too


def serve(questions: IO[str], answers: IO[str], server: Server) -> None:
    """Answers line by line until the questions end."""
    for line in questions:
        answers.write(json.dumps(server.answer(json.loads(line))) + "\n")
        answers.flush()


def main(arguments: Sequence[str]) -> None:
    """Entry point."""
    # The one who asks hears the keyboard and ends this process; its own traceback would only confuse.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(arguments[1])
    with pinned(job["cores"]):
        server = Server(Work(Path(arguments[0])), job["competitors"], job["threads"])
        serve(sys.stdin, answers, server)


if __name__ == "__main__":
    main(sys.argv[1:])
