"""The sparse runtime beside the dense ones: the table of the documentation, and one layer as a check.

    python benchmarks/sparse_runtime.py --run runs/fashion-mnist
    python benchmarks/sparse_runtime.py --quick

Batch 1, float32, one thread, unstructured random zeros in all convolutions and linear layers but the depthwise ones and
the first: what `netwright bench NAME --size N --sparsity S` measures, with more rounds. A run of `netwright design
fashion-mnist` adds its network, as it was pruned and with random zeros in its dense weights; MobileNet-v2 comes once
more with a weight at least in every row, since its output is constant at 99 % otherwise. The figures go to
benchmarks/results/, from where the documentation takes them; --quick looks at all of it for a second each and writes
nothing. Exit 1 if the check fails: at 95 % zeros a 3x3 convolution of 256 channels at 14x14 takes a third of the time
of the dense one at most.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from netwright import deploy, storage
from netwright.cost import compare_times
from netwright.deploy.bench import COMPETITORS, Benchmark, Recipe, Subject, bench, markdown
from netwright.deploy.bench.result import by
from netwright.design.benchmark import prune_at_random, recipes
from netwright.design.model import load_run
from netwright.nn.sparse import to_dense
from netwright.seeding import stream

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.9, 0.95, 0.99)
# What the table is to reach: network, side of the input, ratio at each sparsity.
TARGETS = {
    ("resnet18", 32): (4.5, 8.5, 25.0),
    ("resnet18", 224): (3.5, 5.0, 8.0),
    ("mobilenet_v2", 32): (3.6, 4.7, 6.0),
    ("mobilenet_v2", 224): (2.5, 3.3, 4.5),
}
DESIGNED = (2.7, 3.2, 3.6)
ROUNDS, SECONDS = 200, 20.0
LEAST = 3.0


def designed(run: str, sparsity: float, seed: int = 0) -> Subject:
    """The network of a run, its dense weights pruned at random."""
    model = load_run(run, weights="model-dense.safetensors")
    network, shape = to_dense(model.network).eval(), model.architecture.shape
    pruned = prune_at_random(network, sparsity, shape, seed=seed)
    example = torch.randn(1, *shape, generator=stream(seed, "bench", "input")).numpy()
    return Subject("designed", network, example, pruned, origin=f"dense weights, random zeros, seed {seed}", seed=seed)


def cells(run: str | None) -> list[tuple[Recipe, float | None]]:
    """What is measured, and what it is to reach."""
    found: list[tuple[Recipe, float | None]] = []
    for (name, size), targets in TARGETS.items():
        found += zip(recipes([name], SPARSITIES, size=size), targets, strict=True)
        if name == "mobilenet_v2":  # which 99 % of zeros at random cut apart
            found.append((recipes([name], SPARSITIES[-1:], keep_at_least=1, size=size)[0], None))
    if run is not None:
        made = [Recipe("sparse_runtime:designed", {"run": run, "sparsity": sparsity}) for sparsity in SPARSITIES]
        found += [*zip(made, DESIGNED, strict=True), (recipes([run])[0], None)]
    return found


def one_layer() -> float:
    """How many times as fast as ``conv2d`` the sparse kernel is on one layer, best over best of 20 rounds."""
    layer = nn.Conv2d(256, 256, 3, padding=1).eval()
    nn.init.normal_(layer.weight, generator=stream(0, "layer"))
    with torch.no_grad():
        layer.weight *= torch.rand(layer.weight.shape, generator=stream(0, "zeros")) >= 0.95
    x = torch.randn(1, 256, 14, 14, generator=stream(0, "input"))
    sparse = deploy.compile(layer, x)
    dense = partial(nn.functional.conv2d, x, layer.weight, layer.bias, padding=1)
    with torch.inference_mode():
        compared = compare_times({"dense": dense, "sparse": partial(sparse, x)}, rounds=20, threads=1)
    return compared["dense"].best_ms / compared["sparse"].best_ms


def written(found: list[Benchmark], targets: list[float | None], command: str) -> str:
    """The table as Markdown, with where it comes from and which targets it misses."""
    first = found[0]
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    lines = [
        markdown(found),
        f"{first.cpu}, {first.threads} thread, batch 1; {versions}; OPENBLAS_CORETYPE unset. `{command}`",
        "",
    ]
    for made, target in zip(found, targets, strict=True):
        ours = made.ours
        if ours is None or ours.ratio is None:
            lines.append(f"- {made.network} {by(made.shape)}: {made.verdict}")
        elif target is not None and ours.ratio < target and made.facts is not None:
            binds = f"; what binds: {made.roofline.binds}" if made.roofline else ""
            zeros = f"{100 * made.facts.pruned_sparsity:.4g} %"
            lines.append(
                f"- {made.network} {by(made.shape)} at {zeros}: {ours.ratio:.2f} of the {target:g} aimed at{binds}"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="a run of netwright design fashion-mnist")
    parser.add_argument("--quick", action="store_true", help="a second each; nothing is written")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the rounds of a network  [20]")
    parser.add_argument(
        "--without", action="append", default=[], choices=list(COMPETITORS), help="leave a runtime out; may repeat"
    )
    options = parser.parse_args()
    # The child that measures finds `designed` by this file's name.
    sys.path.insert(0, os.fspath(Path(__file__).parent))
    if options.quick:
        options.without.append("torch.compile")  # it compiles for a minute
    chosen = [name for name in COMPETITORS if name not in options.without]
    settings: dict[str, Any] = {"rounds": ROUNDS, "seconds": options.seconds, "runtimes": chosen}
    if options.quick:
        settings |= {"rounds": 20, "seconds": 1.0, "memory": False}
    command = shlex.join(["python", "benchmarks/sparse_runtime.py", *sys.argv[1:]])
    ratio = one_layer()
    print(
        f"256 -> 256 channels, 3x3, 14x14, 95 % zeros: {ratio:.1f} times as fast as conv2d, at least {LEAST:g} wanted"
    )
    found: list[Benchmark] = []
    targets: list[float | None] = []
    for recipe, target in cells(options.run):
        made = bench(recipe, **settings, command=command)
        found, targets = [*found, made], [*targets, target]
        print(f"{made.network} {by(made.shape)}: {made.verdict}", flush=True)
        if not options.quick:
            storage.write_json(RESULTS / "sparse_runtime.json", [each.to_dict() for each in found])
            storage.write_text(RESULTS / "sparse_runtime.md", written(found, targets, command))
    print()
    print(written(found, targets, command))
    if options.run is None:
        print("the designed network was left out: give --run RUN")
    return int(ratio < LEAST)


if __name__ == "__main__":
    sys.exit(main())
