"""Dataset quantization against a greedy that sums over all picks at every pick, and against apricot and submodlib.

    python benchmarks/condense.py [NAME ...] [--rounds 3] [--quick]

`bins`: 2,000 examples in 10 bins, the same picks; the greedy with a whole matrix of similarities is there in two
forms, with gains by their definition at every pick, as in the authors' code, and kept up to date. `large`: 60,000
examples, in ten classes and in one, from given features; seconds and the memory that was needed beside them. `peers`:
500 picks of 2,000, the same ones, where the packages are installed (`pip install apricot-select submodlib-py`).
`sampling`: a tenth of 60,000 examples from 10 bins, against a loop over bins and classes. `gradients`: gradients of the
last layer, against a backward pass for every example. `patches`: images cut and filled together, against one by one.
When all have run, the figures go beside their aims to benchmarks/results/; --quick writes nothing.
"""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import torch
from torch import nn

from netwright.cost import compare_times
from netwright.data.condense import (
    dataset_bins,
    drop_patches,
    graphcut_order,
    last_layer_gradient_features,
    mean_of_kept,
    nearest_kept,
    restore,
    sample_bins,
)
from netwright.seeding import numpy_stream, seeded, stream
from support.record import Figure, over
from support.whole import recorded


def features(n: int, d: int = 64) -> np.ndarray:
    """Half of them zero, as behind a ReLU."""
    random = numpy_stream(0, "features")
    return np.abs(random.normal(size=(n, d))) * (random.random((n, d)) < 0.5)


def similarities(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return (1 + unit @ unit.T) / 2


def matrix_bins(x: np.ndarray, n_bins: int, by_definition: bool) -> list[np.ndarray]:
    """A matrix of all similarities for each bin; gains by their definition at every pick, or kept up to date."""
    left, bins = np.arange(len(x)), []
    for i in range(n_bins - 1):
        s = similarities(x[left])
        gain, picks = s.sum(0), []
        free = np.ones(len(left), bool)
        for _ in range(round(len(left) / (n_bins - i))):
            if by_definition:
                there = np.flatnonzero(free)
                values = s[:, there].sum(0) - 2 * s[picks][:, there].sum(0)
                picks.append(int(there[values.argmax()]))
            else:
                picks.append(int(np.where(free, gain, -np.inf).argmax()))
                gain -= 2 * s[picks[-1]]
            free[picks[-1]] = False
        bins.append(np.sort(left[picks]))
        left = np.delete(left, picks)
    return [*bins, left]


def bins(rounds: int, quick: bool) -> list[Figure]:
    x = features(100 if quick else 2000)
    ours = dataset_bins(x, n_bins=10)
    calls = {"netwright": lambda: dataset_bins(x, n_bins=10)}
    for name, definition in (("gains by definition", True), ("a matrix, kept up to date", False)):
        theirs = matrix_bins(x, 10, definition)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"{name}: other picks"
        calls[name] = lambda definition=definition: matrix_bins(x, 10, definition)
    print(found := compare_times(calls, rounds=rounds, threads=1))
    aims = {"gains by definition": 20, "a matrix, kept up to date": None}
    return [over(found[name], f"{len(x):,} in 10 bins: {name}, times as long", least=aim) for name, aim in aims.items()]


def large(rounds: int, quick: bool) -> list[Figure]:
    count = 2_000 if quick else 60_000
    x = features(count)
    labels = np.arange(count) % 10
    figures = []
    for name, given in (("ten classes", labels), ("one class", None)):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        dataset_bins(x, given, 10)
        seconds = time.perf_counter() - start
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"{count:,} x 64, {name}: {seconds:.1f} s, {more:.0f} MiB more than before")
        note = f"{more:.0f} MiB more than before"
        figures.append(Figure(f"{count:,} x 64, {name}: seconds", seconds, note=note))
    x = features(count // 3)
    start = time.perf_counter()
    dataset_bins(x, np.arange(len(x)) % 10, 10)
    seconds = time.perf_counter() - start
    print(f"{len(x):,} x 64, ten classes: {seconds:.2f} s")
    return [*figures, Figure(f"{len(x):,} x 64, ten classes: seconds", seconds, most=2)]


def peers(rounds: int, quick: bool) -> list[Figure]:
    count, picks = (200, 50) if quick else (2000, 500)
    x = features(count)
    s = similarities(x)
    calls = {"netwright": lambda: graphcut_order(x, picks)}
    missing = []
    try:
        from apricot import GraphCutSelection

        for name in ("naive", "lazy"):
            calls[f"apricot, {name}, similarities given"] = lambda name=name: (
                GraphCutSelection(picks, metric="precomputed", alpha=1.0, optimizer=name).fit(s).ranking
            )
    except ImportError:
        missing.append("apricot-select")
    try:
        from submodlib import GraphCutFunction

        made = GraphCutFunction(n=count, mode="dense", lambdaVal=1.0, separate_rep=False, ggsijs=s)
        options = {"stopIfZeroGain": False, "stopIfNegativeGain": False, "show_progress": False}
        for name in ("NaiveGreedy", "LazyGreedy"):
            calls[f"submodlib, {name}, similarities given"] = lambda name=name: [
                index for index, _ in made.maximize(picks, optimizer=name, **options)
            ]
    except ImportError:
        missing.append("submodlib-py")
    ours = set(graphcut_order(x, picks).tolist())
    notes = {}
    for name, call in calls.items():
        notes[name] = f"{len(ours & set(map(int, call())))} of {picks} picks are the same"
        print(f"{name}: {notes[name]}")
    print(found := compare_times(calls, rounds=rounds, threads=1))
    named = [name for name in calls if name != "netwright"]
    figures = [over(found[n], f"{picks} of {count:,} picks: {n}, times as long", note=notes[n]) for n in named]
    return [*figures, *(Figure(f"{picks} of {count:,} picks: {n}", None, note="not installed") for n in missing)]


def sampling(rounds: int, quick: bool) -> list[Figure]:
    count = 2_000 if quick else 60_000
    labels = np.arange(count) % 10
    bins = np.array_split(numpy_stream(0, "bins").permutation(count), 10)

    def looped() -> np.ndarray:
        random, found = numpy_stream(0, "draw"), []
        for members in bins:
            for label in range(10):
                inside = members[labels[members] == label]
                found.append(random.choice(inside, round(0.1 * len(inside)), replace=False))
        return np.sort(np.concatenate(found))

    assert abs(len(looped()) - len(sample_bins(bins, 0.1, labels))) < 100
    calls = {"netwright": lambda: sample_bins(bins, 0.1, labels), "a loop over bins and classes": looped}
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found["a loop over bins and classes"], "sampling: a loop over bins and classes, times as long")]


def gradients(rounds: int, quick: bool) -> list[Figure]:
    count = 16 if quick else 512
    with seeded(0, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(count, 1, 28, 28, generator=stream(0, "x"))
    y = torch.arange(count) % 10
    last = [net[3].bias, net[3].weight]

    def ours() -> torch.Tensor:
        g, h = last_layer_gradient_features(net, [(x, y)])
        return torch.cat([g, (g[:, :, None] * h[:, None]).flatten(1)], 1)

    def looped() -> torch.Tensor:
        found = []
        for image, label in zip(x, y, strict=True):
            loss = nn.functional.cross_entropy(net(image[None]), label[None])
            found.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, last)]))
        return torch.stack(found)

    assert torch.allclose(ours(), looped(), atol=1e-5)
    calls = {
        "netwright": lambda: last_layer_gradient_features(net, [(x, y)]),
        "netwright, written out": ours,
        "a backward pass an example": looped,
    }
    print(found := compare_times(calls, rounds=rounds, threads=1))
    return [over(found["a backward pass an example"], "gradients: a backward pass an example, times as long")]


def patches(rounds: int, quick: bool) -> list[Figure]:
    count = 8 if quick else 256
    images = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=stream(0, "images"))
    importance = torch.rand(count, 16, generator=stream(0, "importance"))
    patched = drop_patches(images, importance, 0.25, 16)
    fillers = {"mean": mean_of_kept, "nearest": nearest_kept}
    figures = []
    for name, filler in fillers.items():

        def looped(filler=filler) -> torch.Tensor:
            return torch.cat([restore(patched[[i]], filler) for i in range(count)])

        assert torch.equal(looped(), restore(patched, filler))
        calls = {"all at once": lambda filler=filler: restore(patched, filler), "image by image": looped}
        print(f"{name}\n{(found := compare_times(calls, rounds=rounds, threads=1))}")
        figures.append(over(found["image by image"], f"filling by {name}: image by image, times as long"))

    def dropped() -> list[object]:
        return [drop_patches(images[[i]], importance[[i]], 0.25, 16) for i in range(count)]

    calls = {"all at once": lambda: drop_patches(images, importance, 0.25, 16), "image by image": dropped}
    print(f"dropping\n{(found := compare_times(calls, rounds=rounds, threads=1))}")
    return [*figures, over(found["image by image"], "dropping patches: image by image, times as long")]


SUBJECTS = {
    "bins": bins,
    "large": large,
    "peers": peers,
    "sampling": sampling,
    "gradients": gradients,
    "patches": patches,
}

if __name__ == "__main__":
    sys.exit(recorded("condense", __doc__, SUBJECTS, rounds=3))
