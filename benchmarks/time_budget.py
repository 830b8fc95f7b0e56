"""Whether a time budget is kept when half the cores are taken away in the middle of the run.

    python benchmarks/time_budget.py
    python benchmarks/time_budget.py --data fashion-mnist --seconds 300

Designs a network in so many seconds; after half of them every thread of the run is bound to half the cores. The promise
is 115 % of the budget, by the clock on the wall, imports included. Exits with 1 when it is broken.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from netwright.storage import read_json

PROMISE = 1.15


def bind(pid: int, cores: set[int]) -> None:
    """Binds every thread of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def main() -> int:
    """Runs it and prints what was used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--seconds", type=int, default=150)
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    half = set(cores[: max(1, len(cores) // 2)])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "netwright", "design", given.data, "--quiet"]
        start = time.monotonic()
        process = subprocess.Popen([*command, f"--time-budget={given.seconds}s", f"--out={out}"])
        try:
            process.wait(given.seconds / 2)
        except subprocess.TimeoutExpired:
            bind(process.pid, half)
        code = process.wait()
        wall = time.monotonic() - start
        if not (out / "measurements.json").exists():
            sys.stderr.write(f"the run ended with exit code {code} and without a result\n")
            return 2
        figures, plan = read_json(out / "measurements.json"), read_json(out / "plan.json")
    used = figures["goal"]["seconds_used"]
    print(f"cores: {len(cores)}, after {given.seconds / 2:.0f} s {len(half)}")
    print(f"used: {used:.0f} s of {given.seconds} s ({used / given.seconds:.0%})")
    print(f"on the wall, with imports: {wall:.0f} s ({wall / given.seconds:.0%}, promised {PROMISE:.0%})")
    print(f"accuracy: {figures['model']['accuracy']:.3f}, baseline {figures['baseline']['accuracy']:.3f}")
    for change in plan["amendments"]:
        print(f"change of plan: {change['what']} ({change['why']})")
    return int(wall > PROMISE * given.seconds)


if __name__ == "__main__":
    sys.exit(main())
