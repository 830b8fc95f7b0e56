"""Dataset quantization against a greedy that sums over all picks at every pick, and against apricot and submodlib.

    python benchmarks/condense.py [NAME ...] [--rounds 3]

`bins`: 1,000 examples in 10 bins, the same picks; the greedy with a whole matrix of similarities is there in two
forms, with gains by their definition at every pick, as in the authors' code, and kept up to date. `large`: 60,000
examples, in ten classes and in one, from given features; seconds and the memory that was needed beside them. `peers`:
500 picks of 2,000, where the packages are installed.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from netwright.cost import compare_times
from netwright.data.condense import dataset_bins, graphcut_order
from netwright.seeding import numpy_stream


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


def bins(rounds: int) -> None:
    x = features(1000)
    ours = dataset_bins(x, n_bins=10)
    calls = {"netwright": lambda: dataset_bins(x, n_bins=10)}
    for name, definition in (("gains by definition", True), ("a matrix, kept up to date", False)):
        theirs = matrix_bins(x, 10, definition)
        assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True)), f"{name}: other picks"
        calls[name] = lambda definition=definition: matrix_bins(x, 10, definition)
    print(compare_times(calls, rounds=rounds))


def large(rounds: int) -> None:
    x = features(60_000)
    labels = np.arange(60_000) % 10
    for name, given in (("ten classes", labels), ("one class", None)):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        dataset_bins(x, given, 10)
        seconds = time.perf_counter() - start
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"60,000 x 64, {name}: {seconds:.1f} s, {more:.0f} MiB more than before")


def peers(rounds: int) -> None:
    x = features(2000)
    s = similarities(x)
    calls = {"netwright": lambda: graphcut_order(x, 500)}
    try:
        from apricot import GraphCutSelection

        calls["apricot, similarities given"] = lambda: (
            GraphCutSelection(500, metric="precomputed", alpha=1.0, optimizer="naive").fit(s).ranking
        )
    except ImportError:
        print("apricot-select is not installed")
    try:
        from submodlib import GraphCutFunction

        made = GraphCutFunction(n=2000, mode="dense", lambdaVal=1.0, separate_rep=False, ggsijs=s)
        options = {"optimizer": "NaiveGreedy", "stopIfZeroGain": False, "stopIfNegativeGain": False}
        calls["submodlib, similarities given"] = lambda: made.maximize(500, **options)
    except ImportError:
        print("submodlib-py is not installed")
    print(compare_times(calls, rounds=rounds))


NAMES = {"bins": bins, "large": large, "peers": peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"NAME must be one of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    for name in options.names or NAMES:
        print(f"== {name}")
        NAMES[name](options.rounds)


if __name__ == "__main__":
    main()
