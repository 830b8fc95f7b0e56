"""Whether a time budget is kept when half the cores are taken away in the middle of the run.

    python benchmarks/time_budget.py

Designs a network for the digits in 150 seconds; after half of them every thread of the run is bound to half the cores.
The promise is 115 % of the budget.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from netwright.storage import read_json

BUDGET_SECONDS = 150
PROMISE = 1.15


def bind(pid: int, cores: set[int]) -> None:
    """Binds every thread of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def main() -> int:
    """Runs it and prints what was used."""
    cores = sorted(os.sched_getaffinity(0))
    half = set(cores[: max(1, len(cores) // 2)])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "netwright", "design", "digits", "--quiet"]
        start = time.monotonic()
        process = subprocess.Popen([*command, f"--time-budget={BUDGET_SECONDS}s", f"--out={out}"])
        time.sleep(BUDGET_SECONDS / 2)
        bind(process.pid, half)
        process.wait()
        wall = time.monotonic() - start
        goal = read_json(out / "measurements.json")["goal"]
        changes = read_json(out / "plan.json")["amendments"]
    print(f"cores: {len(cores)}, then {len(half)}")
    print(f"used {goal['seconds_used']:.0f} s of {BUDGET_SECONDS} s ({goal['seconds_used'] / BUDGET_SECONDS:.0%})")
    print(f"wall clock with imports: {wall:.0f} s; changes of plan: {len(changes)}")
    return int(wall > PROMISE * BUDGET_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
