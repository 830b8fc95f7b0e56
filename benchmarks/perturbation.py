"""How long one projection of DARTS-PT takes, measuring all removals of an edge together, against a pass for each.

    python benchmarks/perturbation.py [--rounds 3] [--threads 1] [--case darts-pt micro-darts-s2]
    python benchmarks/perturbation.py --quick

An edge of n operations is judged by the accuracy of the supernet without each of them. The published loop makes n
passes over the validation batches; here it is run twice: with the operations by themselves in eager PyTorch, in the
published structure and memory order (as in benchmarks/supernet_step.py), and with the compiled operations of netwright,
so that what comes from computing common parts once stands apart from what comes from the kernels. All three take turns
on the same batch. Accuracies must be equal, and losses to 1e-5. Cases: the CIFAR supernet of DARTS without `none`
(C=16, 8 cells, 7 operations, batch 16), and the supernet of the experiment (`micro-darts-s2`: C=8, 3 cells, 2
operations, 16x16 images, batch 64). Measured are the first, a middle and the last edge of both cell types, and a round:
one projection of an edge of each type, as the selection makes them between two tunings, the mean over these edges.
Aimed at: a round twice as fast as the published loop. The figures go to benchmarks/results/; --quick looks at small
networks and writes nothing. Needs as many cores of its own as threads. Exit 1 if scores differ or the aim is missed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.cost import compare_times
from netwright.nn.batchnorm import frozen_statistics
from netwright.search import spaces
from netwright.search.scoring import measure, removals
from netwright.search.supernet import MaskedGate
from netwright.seeding import stream
from supernet_step import Port
from support.record import leave, markdown

FASTER, TOLERANCE, ROUND = 2.0, 1e-5, "a round"
CASES: dict[str, dict[str, Any]] = {
    "darts-pt": {"sizes": {"channels": 16, "cells": 8}, "shape": (3, 32, 32), "batch": 16},
    "micro-darts-s2": {"sizes": {"channels": 8, "cells": 3}, "shape": (1, 16, 16), "batch": 64},
}
LOOPS = {"published loop": "published", "the same on our kernels": "kernels"}
Batches = list[tuple[Tensor, Tensor]]


def scores(network: nn.Module, val: Batches) -> tuple[float, float]:
    """Accuracy and loss in one pass over the batches, as the published code measures them: in training mode."""
    right = loss = 0.0
    with torch.no_grad(), frozen_statistics(network):
        for x, labels in val:
            logits = network(x)
            right += float((logits.argmax(1) == labels).sum())
            loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    seen = sum(len(labels) for _, labels in val)
    return right / seen, loss / seen


def published(port: Port, val: Batches, key: str, names: tuple[str, ...]) -> list[tuple[float, float]]:
    """The published loop: a pass without each operation."""
    found = []
    for name in names:
        port.gone = key, name
        found.append(scores(port, val))
    port.gone = None
    return found


def kernels(supernet: Any, val: Batches, key: str, names: tuple[str, ...]) -> list[tuple[float, float]]:
    """The same loop with the supernet of netwright."""
    inner, found = supernet.keyed_choices()[key].gate, []
    for gone in range(len(names)):
        supernet.set_gate(MaskedGate(inner, [place != gone for place in range(len(names))]), key)
        found.append(scores(supernet, val))
    supernet.set_gate(inner, key)
    return found


def together(supernet: Any, val: Batches, key: str, names: tuple[str, ...]) -> list[tuple[float, float]]:
    """All removals at once."""
    accuracy, loss = measure(supernet, val, {key: removals(len(names), range(len(names)))})
    return list(zip(accuracy.tolist(), loss.tolist(), strict=True))


def difference(ours: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """Largest difference of a score."""
    return max(abs(a - b) for row, with_ in zip(ours, other, strict=True) for a, b in zip(row, with_, strict=True))


def case(name: str, rounds: int, threads: int, quick: bool) -> list[dict[str, Any]]:
    """Edges of a supernet, and the round."""
    told = CASES[name]
    sizes = {"channels": 8, "cells": 3} if quick else told["sizes"]
    batch, shape = (8, (told["shape"][0], 8, 8)) if quick else (told["batch"], told["shape"])
    supernet = spaces.get(name).supernet(shape[0], 10, seed=0, **sizes)
    for alpha in supernet.arch_parameters():
        alpha.data.mul_(500)  # as spread as after a search
    draws = stream(0, "benchmark")
    val = [(torch.randn(batch, *shape, generator=draws), torch.randint(10, (batch,), generator=draws))]
    supernet.train()
    port = Port(supernet).train()
    rows = []
    choices = supernet.keyed_choices()
    for key in chosen(name, list(choices)):
        choice = choices[key]
        ways = {
            "together": lambda key=key, names=choice.names: together(supernet, val, key, names),
            "published": lambda key=key, names=choice.names: published(port, val, key, names),
            "kernels": lambda key=key, names=choice.names: kernels(supernet, val, key, names),
        }
        found = {way: call() for way, call in ways.items()}
        times = compare_times(ways, rounds=rounds, threads=threads)
        rows.append({
            "case": name,
            "edge": key,
            "operations": len(choice),
            "difference": max(difference(found["together"], found[way]) for way in LOOPS.values()),
            "ms": {way: times[way].median_ms for way in ways},
            "ratio": {way: [times[way].ratio_low, times[way].ratio, times[way].ratio_high] for way in LOOPS.values()},
        })  # fmt: skip
        print(f"  {key}: " + ", ".join(f"{rows[-1]['ratio'][way][1]:.2f}" for way in LOOPS.values()), flush=True)
    return [*rows, of_round(name, rows)]


def of_round(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The projection of one edge of each cell type, the mean over the edges."""
    ms = {way: 0.0 for way in ("together", *LOOPS.values())}
    for cell in spaces.get(name).cell_types:
        own = [row for row in rows if row["edge"].startswith(cell)]
        for way in ms:
            ms[way] += sum(row["ms"][way] for row in own) / len(own)
    ratio = {way: [ms[way] / ms["together"]] * 3 for way in LOOPS.values()}
    difference = max(row["difference"] for row in rows)
    return {
        "case": name,
        "edge": ROUND,
        "operations": rows[0]["operations"],
        "difference": difference,
        "ms": ms,
        "ratio": ratio,
    }


def chosen(name: str, keys: list[str]) -> list[str]:
    """The first, a middle and the last edge of each cell type."""
    own = [[key for key in keys if key.startswith(cell)] for cell in spaces.get(name).cell_types]
    return [edges[place] for edges in own for place in (0, len(edges) // 2, -1)]


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The table as lines of Markdown; the aim stands at a round of the published loop."""
    head = ["supernet", "edge", "together, ms"]
    head += ["published loop, ms", "times as fast", "on our kernels, ms", "times as fast"]
    found = []
    for row in rows:
        cells = [row["case"], row["edge"], f"{row['ms']['together']:.0f}"]
        for way in LOOPS.values():
            low, middle, high = row["ratio"][way]
            spread = f" [{low:.2f}, {high:.2f}]" if low < high else ""
            cells += [f"{row['ms'][way]:.0f}", f"{middle:.2f}{spread}"]
        if row["edge"] == ROUND:
            cells[4] += f" ({'met' if row['ratio']['published'][1] >= FASTER else 'missed'}: {FASTER:g})"
        found.append(cells)
    return markdown(head, found)


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=tuple(CASES))
    parser.add_argument("--quick", action="store_true", help="small networks, two rounds; nothing is written")
    options = parser.parse_args()
    settings = {"rounds": 2 if options.quick else options.rounds, "threads": options.threads}
    rows = []
    for name in options.case:
        print(f"{name}: times as fast as {' and '.join(LOOPS)}", flush=True)
        rows += case(name, **settings, quick=options.quick)
    largest = max(row["difference"] for row in rows)
    equal = largest <= TOLERANCE
    print(f"scores {'equal' if equal else 'DIFFERENT'} to {TOLERANCE:g}, largest difference {largest:.1e}")
    missed = any(row["ratio"]["published"][1] < FASTER for row in rows if row["edge"] == ROUND)
    said = f"threads {settings['threads']}, {settings['rounds']} alternating rounds, one batch; medians and quartiles"
    code = leave("perturbation", rows, lines(rows), said, missed=missed, quick=options.quick)
    return int(not equal) | code


if __name__ == "__main__":
    sys.exit(main())
