"""Several processes of one run: who writes, who waits, and one decision for all.

Under ``torchrun`` every process runs the whole command. The first one writes; the others take part in training and
search and wait at barriers while it measures. ``--devices 2`` without ``torchrun`` starts the same command once for
each process: torchrun itself would bury the one line of an error, and its exit code, under a report of its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from netwright.console import UserError

T = TypeVar("T")

_LONG = timedelta(hours=12)
_GRACE = 10.0  # seconds that the others get to end by themselves when one has failed


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join() -> None:
    """Joins the process group that ``torchrun`` describes; nothing in a single process."""
    import torch
    from torch import distributed

    if world_size() > 1 and not distributed.is_initialized():
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=_LONG)


def barrier() -> None:
    """Waits for all processes; nothing in a single one."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def in_turn(work: Callable[[], None]) -> None:
    """The first process works before the others, which find what it has left."""
    if is_main():
        work()
    barrier()
    if not is_main():
        work()


def agree(value: T) -> T:
    """The value of the first process, in all of them."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def needs_launch(devices: int, nodes: int) -> bool:
    """Whether the command still has to be started once for each process."""
    return devices * nodes > 1 and "LOCAL_RANK" not in os.environ


def launch(devices: int, nodes: int, arguments: Sequence[str]) -> int:
    """Runs ``netwright ARGUMENTS`` in ``devices`` processes of this machine and returns the exit code of the run.

    Raises:
        UserError: For several nodes without the addresses that they need to find each other.
    """
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
    if nodes > 1 and missing:
        raise UserError(
            f"--nodes {nodes} needs {', '.join(missing)} in the environment",
            cure="set them on every node, or start netwright under torchrun or srun yourself",
        )
    node = int(os.environ["NODE_RANK"]) if nodes > 1 else 0
    shared = {"OMP_NUM_THREADS": "1", **os.environ, "WORLD_SIZE": str(devices * nodes)}
    if nodes == 1:
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    with tempfile.TemporaryFile() as said:
        processes = []
        for local in range(devices):
            ranks = {"RANK": str(node * devices + local), "LOCAL_RANK": str(local)}
            # The first one speaks; what the others say is shown when they alone know why the run stopped.
            streams = {} if local == 0 else {"stdout": subprocess.DEVNULL, "stderr": said}
            command = [sys.executable, "-m", "netwright", *arguments]
            processes.append(subprocess.Popen(command, env={**shared, **ranks}, **streams))  # type: ignore[call-overload]
        codes = _wait(processes)
        failed = {number: code for number, code in enumerate(codes) if code}
        if failed and not codes[0]:
            said.seek(0)
            sys.stderr.write(said.read().decode(errors="replace"))
    for number, code in failed.items():
        if code < 0:
            sys.stderr.write(
                f"error: process {number} was ended by signal {-code}\n  do give the same command again; it goes on\n"
            )
            return 2
    return next(iter(failed.values()), 0)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes of all processes; None for those that had to be ended because another one failed."""
    try:
        deadline = None
        while None in [process.poll() for process in processes]:
            if deadline is None and any(process.returncode for process in processes):
                deadline = time.monotonic() + _GRACE
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except KeyboardInterrupt:
        # The terminal has told the others as well; each leaves by itself, after its last checkpoint.
        for process in processes:
            process.wait()
    hanging = [process for process in processes if process.poll() is None]
    for process in hanging:
        process.kill()
        process.wait()
    return [None if process in hanging else process.returncode for process in processes]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
