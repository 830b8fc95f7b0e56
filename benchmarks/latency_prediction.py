"""How well latency tables foretell what random networks take, in PyTorch and in the sparse runtime.

    python benchmarks/latency_prediction.py [--networks 20] [--repeats 400] [--threads 1] [--batch 1] [--calibration 60]
    python benchmarks/latency_prediction.py --quick

For the space `micro-chain`, for the chain of FBNet's blocks on which its experiment runs, and for FBNet's own space at
64x64: a table by operations, corrected by whole calls of other random networks, then random networks of the space by
the clock, which take turns, twice. PyTorch runs them dense, the sparse runtime with 90 % random zeros, of which each
measurement takes the mean of three draws. Aimed at: a rank correlation of at least 0.9 and a median error of at most
15 %, without any constant fitted to the networks. What the two measurements agree in, with other zeros, is about what
a table can reach. The figures go to benchmarks/results/, from where the documentation takes them; --quick looks at
three networks and writes nothing. Exit 1 if an aim is missed. Needs as many cores of its own as threads.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from netwright.papers import chains, fbnet, latencies
from netwright.search import spaces
from support.record import leave, markdown

RUNTIMES = {"PyTorch": {"runtime": "torch"}, "sparse, 90 % zeros": {"runtime": "native", "sparsity": 0.9}}
# What an architecture takes is the mean over draws of its zeros: a small network's time depends on where they lie.
DRAWS = {"PyTorch": 1, "sparse, 90 % zeros": 3}
LEAST_CORRELATION, MOST_ERROR = 0.9, 0.15


def row(space: str, runtime: str, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of one runtime."""
    found = {name.removeprefix(f"{runtime}: "): value for name, value in figures.items() if name.startswith(runtime)}
    return {"space": space, "runtime": runtime, **found}


def good(found: dict[str, Any]) -> bool:
    """Whether both aims are met."""
    return found["Spearman"] >= LEAST_CORRELATION and found["median relative error, no constant"] <= MOST_ERROR


def cells(found: dict[str, Any]) -> list[str]:
    """The cells of a line."""
    measured, predicted = found["measured, ms"], found["predicted, ms"]
    largest = max(abs(p - m) / m for p, m in zip(predicted, measured, strict=True))
    return [
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


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=400, help="timed calls of each network  [400]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calibration", type=int, default=60, help="networks that correct the table  [60]")
    parser.add_argument("--quick", action="store_true", help="three networks; nothing is written")
    options = parser.parse_args()
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
            figures = latencies.tables(
                space, shape, {runtime: {**fields, **settings}}, networks, draws=1 if options.quick else DRAWS[runtime]
            )
            rows.append(row(space.name, runtime, figures))
            print(f"{space.name}, {runtime}: {'both aims met' if good(rows[-1]) else 'an aim missed'}", flush=True)
    head = ["space", "runtime", "measured, ms", "rank correlation", "of two measurements", "correlation"]
    head += ["median error", "largest", "aims"]
    settled = f"threads {options.threads}, batch {options.batch}, {networks} networks a row"
    missed = not all(map(good, rows))
    lines = markdown(head, [cells(each) for each in rows])
    return leave("latency_prediction", rows, lines, settled, missed=missed, quick=options.quick)


if __name__ == "__main__":
    sys.exit(main())
