"""Permutation importance of a network by rank-one updates, beside scikit-learn's.

    python benchmarks/surrogate.py [NAME...] [--rounds 5] [--quick]

Both get the same network, rows, labels, seed and therefore the same permutations, one thread, in alternating rounds:
medians and quartiles of the ratio within a round. scikit-learn's calls an estimator whose ``predict`` is one forward
pass of the network in inference mode. The figures of all features are compared afterwards: the largest difference, and
in how many of the features there is any (float32 rounds otherwise when the sum of 784 products is updated than when it
is formed anew, so a row between two classes may change sides).

``images``: 1,000 images of MNIST-5000, d = 784, a hidden layer of 128 (aim: 20 times as fast). ``dense``: normal
values, so that every value changes with its permutation, and no column is constant. ``words``: 2,000 rows of 5,000
binary features, 20 ones in each, of which scikit-learn's permutes 250 (sparse for us, dense for scikit-learn).
``gate``: a self-attention network, d = 500. When all have run, the figures go beside the aim to benchmarks/results/;
--quick writes nothing.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.inspection import permutation_importance as peer
from torch import nn

from netwright.cost import compare_times
from netwright.explain.tabular import SelfAttentionNetwork, permutation_importance
from netwright.seeding import numpy_stream, seeded
from support.record import Figure, over
from support.whole import recorded

REPEATS = 5


class Estimator(ClassifierMixin, BaseEstimator):
    """A network as scikit-learn wants it."""

    def __init__(self, network: nn.Module, classes: int):
        self.network, self.classes = network, classes

    @property
    def classes_(self) -> np.ndarray:
        return np.arange(self.classes)

    def fit(self, X: np.ndarray, y: np.ndarray) -> Estimator:
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def predict(self, X: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return self.network(torch.from_numpy(X)).argmax(1).numpy()


def beside(
    name: str, network: nn.Module, X: Any, columns: int | None, rounds: int, least: float | None = None
) -> list[Figure]:
    """The ratio of the times, and how far the figures differ."""
    network.eval()
    full = X.toarray() if sparse.issparse(X) else X
    with torch.inference_mode():
        classes = network(torch.from_numpy(full[:1])).shape[1]
    estimator = Estimator(network, classes)
    y = estimator.predict(full)
    found: dict[str, Any] = {}

    def ours() -> None:
        chosen = None if columns is None else range(columns)
        found["ours"] = permutation_importance(network, X, y, n_repeats=REPEATS, random_state=0, columns=chosen)

    def theirs() -> None:
        if columns is None:
            found["theirs"] = peer(estimator, full, y, scoring="accuracy", n_repeats=REPEATS, random_state=0)
            return
        first = Estimator(_FirstColumns(network, full, columns), classes)
        found["theirs"] = peer(first, full[:, :columns], y, scoring="accuracy", n_repeats=REPEATS, random_state=0)

    times = compare_times({"ours": ours, "scikit-learn": theirs}, rounds=rounds, threads=1)
    mine = found["ours"].importances[:columns]
    gap = np.abs(mine - found["theirs"].importances)
    print(times)
    note = (
        f"{times['ours'].median_ms:.3g} ms, scikit-learn {times['scikit-learn'].median_ms:.3g}; "
        f"largest difference {gap.max():.1e}, in {int((gap > 1e-12).any(1).sum())} of {len(gap)} features any"
    )
    return [over(times["scikit-learn"], f"{name}: scikit-learn, times as long", least=least, note=note)]


class _FirstColumns(nn.Module):
    """A network whose other columns stay as they are, so that scikit-learn permutes only the first."""

    def __init__(self, network: nn.Module, X: np.ndarray, columns: int):
        super().__init__()
        self.network, self.rest, self.columns = network, torch.from_numpy(X[:, columns:].copy()), columns

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(torch.cat([x, self.rest], 1))


def mlp(features: int, hidden: int, classes: int) -> nn.Sequential:
    with seeded(0, "init"):
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, classes))


def images(rounds: int, quick: bool) -> list[Figure]:
    from netwright.papers import classification

    parts, _ = classification.parts("digits" if quick else "mnist-5000", 0, 1000, 100, 100)
    x = parts["train"].images.flatten(1).float()
    X = (x / x.max()).numpy()
    return beside(f"{len(X)} images, d = {X.shape[1]}", mlp(X.shape[1], 128, 10), X, None, rounds, least=20)


def dense(rounds: int, quick: bool) -> list[Figure]:
    n, d = (100, 20) if quick else (1000, 784)
    X = numpy_stream(0, "dense").normal(size=(n, d)).astype(np.float32)
    return beside(f"{n} x {d}, normal", mlp(d, 128, 10), X, None, rounds)


def words(rounds: int, quick: bool) -> list[Figure]:
    n, d, columns = (100, 200, 10) if quick else (2000, 5000, 250)
    random = numpy_stream(0, "words")
    places = np.stack([random.choice(d, 20, replace=False, p=_zipf(d)) for _ in range(n)])
    X = sparse.csr_array(
        (np.ones(places.size, np.float32), (np.repeat(np.arange(n), 20), places.ravel())), shape=(n, d)
    )
    return beside(f"{n} x {d}, binary, {columns} permuted", mlp(d, 128, 8), X, columns, rounds)


def _zipf(d: int) -> np.ndarray:
    weights = 1 / (np.arange(d) + 10.0)
    return weights / weights.sum()


def gate(rounds: int, quick: bool) -> list[Figure]:
    n, d = (50, 20) if quick else (500, 500)
    X = numpy_stream(0, "gate").normal(size=(n, d)).astype(np.float32)
    with seeded(0, "init"):
        network = SelfAttentionNetwork(d, 5)
    return beside(f"{n} x {d}, self-attention", network, X, None, rounds)


if __name__ == "__main__":
    subjects = {"images": images, "dense": dense, "words": words, "gate": gate}
    sys.exit(recorded("surrogate", __doc__ or "", subjects, rounds=5))
