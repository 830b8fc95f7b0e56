"""Memory of a process of its own: what another one had at its peak cannot be given back, nor told apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MEASURE = "--measure"  # the first word that asks a script for one figure
STATUS = Path("/proc/self/status")


def peak() -> float:
    """Largest resident memory in MiB; of this program alone, where getrusage also counts the one that started it."""
    return int(STATUS.read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 1024


def forget_peak() -> float:
    """Begins the peak anew at what is resident now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak()


def alone(*words: object) -> Any:
    """What this script prints as JSON when a process of its own runs it with these words."""
    command = [sys.executable, sys.argv[0], *map(str, words)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
