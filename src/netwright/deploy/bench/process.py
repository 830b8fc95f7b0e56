"""A measuring process, seen from the one that asks: started with an environment of its own, spoken to in JSON lines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from netwright import storage
from netwright.deploy.bench.subject import Work

# They would change what a runtime does, or how its threads wait; the processes that measure do not inherit them.
UNSET = (
    "OPENBLAS_CORETYPE",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "KMP_BLOCKTIME",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
)


class WorkerLostError(RuntimeError):
    """A measuring process ended without being asked to."""


class Worker:
    """A measuring process, seen from the one that asks.

    Args:
        work: The benchmark's files.
        competitors: ``"module:class"`` by name.
        threads: Of every pool.
        cores: What it is pinned to.
        torch_threads: Threads that PyTorch gets in this process.
    """

    def __init__(
        self,
        work: Work,
        competitors: Mapping[str, str],
        threads: int,
        cores: Sequence[int] | None,
        torch_threads: int,
    ):
        job = {"competitors": dict(competitors), "threads": threads, "cores": cores}
        self._log = tempfile.TemporaryFile(dir=work.folder)  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "netwright.deploy.bench.worker", str(work.folder), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(torch_threads),
            text=True,
            encoding="utf-8",
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one question.

        Raises:
            WorkerLostError: If the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerLostError(f"its process ended with {_ending(self._process.wait())}{self._last_words()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1].strip()[:200]}" if lines else ""


def environment(torch_threads: int) -> dict[str, str]:
    """The environment of a measuring process: this one's, without what would change a runtime's choices.

    Example:
        >>> made = environment(2)
        >>> made["OMP_NUM_THREADS"], "OPENBLAS_CORETYPE" in made
        ('2', False)
    """
    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(torch_threads))
    own = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(storage.cache_folder("inductor")),
    }
    return {**kept, **limits, **own}


@contextmanager
def measuring(
    work: Work, competitors: Mapping[str, str], threads: int, cores: Sequence[int] | None, torch_threads: int
) -> Iterator[Worker]:
    """A measuring process that ends with the block."""
    worker = Worker(work, competitors, threads, cores, torch_threads)
    try:
        yield worker
    finally:
        worker.close()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
