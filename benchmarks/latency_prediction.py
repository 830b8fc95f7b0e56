"""How well latency tables foretell what random networks take, in PyTorch and in the sparse runtime.

    python benchmarks/latency_prediction.py [--networks 20] [--repeats 100] [--threads 1] [--batch 1] [--calibration 30]
    python benchmarks/latency_prediction.py --quick

For the space `micro-chain`, for the chain of FBNet's blocks on which its experiment runs, and for FBNet's own space at
64x64: a table by operations, corrected by whole calls of other random networks, then random networks of the space by
the clock, which take turns, twice. PyTorch runs them dense, the sparse runtime with 90 % random zeros. Aimed at: a rank
correlation of at least 0.9 and a median error of at most 15 %, without any constant fitted to the networks. What the
two measurements agree in is what no table can exceed. The figures go to benchmarks/results/, from where the
documentation takes them; --quick looks at three networks and writes nothing. Needs as many cores of its own as threads.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from netwright import __version__, storage
from netwright.cost import cpu_name
from netwright.papers import chains, fbnet, latencies
from netwright.search import spaces

RESULTS = Path(__file__).parent / "results"
RUNTIMES = {"PyTorch": {"runtime": "torch"}, "sparse, 90 % zeros": {"runtime": "native", "sparsity": 0.9}}
LEAST_CORRELATION, MOST_ERROR = 0.9, 0.15


def row(space: str, runtime: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of one runtime."""
    found = {name.removeprefix(f"{runtime}: "): value for name, value in figures.items() if name.startswith(runtime)}
    return {"space": space, "runtime": runtime, **found}


def good(found: dict[str, Any]) -> bool:
    """Whether both aims are met."""
    return found["Spearman"] >= LEAST_CORRELATION and found["median relative error, no constant"] <= MOST_ERROR


def written(rows: list[dict[str, Any]], settings: dict[str, Any], command: str) -> str:
    """The table as Markdown, with where it comes from."""
    lines = [
        "| space | runtime | measured, ms | rank correlation | of the clock with itself | correlation | median error "
        "| largest | aims |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in rows:
        measured, predicted = found["measured, ms"], found["predicted, ms"]
        largest = max(abs(p - m) / m for p, m in zip(predicted, measured, strict=True))
        cells = [
            found["space"],
            found["runtime"],
            f"{min(measured):.3g} to {max(measured):.3g}",
            f"{found['Spearman']:.3f}",
            f"{found['Spearman, again']:.3f}",
            f"{found['Pearson']:.3f}",
            f"{100 * found['median relative error, no constant']:.1f} %",
            f"{100 * largest:.0f} %",
            "met" if good(found) else "missed",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where = f"threads {settings['threads']}, batch {settings['batch']}, {len(rows[0]['measured, ms'])} networks a row"
    versions = f"netwright {__version__}, torch {torch.__version__}"
    return "\n".join([*lines, "", f"{cpu_name()}, {where}; {versions}. `{command}`", ""])


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=100, help="timed calls of each network  [100]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=30, help="networks that correct the table  [30]")
    parser.add_argument("--quick", action="store_true", help="three networks; nothing is written")
    options = parser.parse_args()
    command = shlex.join(["python", "benchmarks/latency_prediction.py", *sys.argv[1:]])
    asked = options.networks, options.repeats, options.calibration
    networks, repeats, calibration = (3, 5, 2) if options.quick else asked
    settings = {
        "threads": options.threads,
        "batch": options.batch,
        "repeats": repeats,
        "calibration": calibration,
    }
    rows = []
    for space, shape in (
        (spaces.get("micro-chain"), chains.SHAPE),
        (fbnet.space(), chains.SHAPE),
        (spaces.get("fbnet"), (3, 64, 64)),
    ):
        for runtime, fields in RUNTIMES.items():
            figures = latencies.tables(space, shape, {runtime: {**fields, **settings}}, networks)
            rows.append(row(space.name, runtime, figures))
            print(f"{space.name}, {runtime}: {'both aims met' if good(rows[-1]) else 'an aim missed'}", flush=True)
    text = written(rows, settings, command)
    if not options.quick:
        storage.write_json(RESULTS / "latency_prediction.json", rows)
        storage.write_text(RESULTS / "latency_prediction.md", text)
    print(f"\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
