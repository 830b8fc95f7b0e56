"""Several processes of one run: who writes, who waits, and one decision for all.

Under ``torchrun`` every process runs the whole command. The first one writes; the others take part in training and
search and wait at barriers while it measures. ``--devices 2`` without ``torchrun`` starts the same command under it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from netwright.console import UserError

T = TypeVar("T")

_LONG = timedelta(hours=12)


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
    """Runs ``netwright ARGUMENTS`` in ``devices`` processes and returns the exit code of the first that failed.

    Raises:
        UserError: For several nodes without the addresses that they need to find each other.
    """
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}"]
    if nodes > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]
        if missing:
            raise UserError(
                f"--nodes {nodes} needs {', '.join(missing)} in the environment",
                cure="set them on every node, or start netwright under torchrun or srun yourself",
            )
        command += [
            f"--nnodes={nodes}",
            f"--node-rank={os.environ['NODE_RANK']}",
            f"--master-addr={os.environ['MASTER_ADDR']}",
            f"--master-port={os.environ['MASTER_PORT']}",
        ]
    else:
        command.append("--standalone")
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.call([*command, "-m", "netwright", *arguments], env=environment)
