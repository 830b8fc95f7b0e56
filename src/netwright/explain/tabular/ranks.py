"""Several importances as one order of the features, and features that say the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import rankdata

from netwright.explain.tabular.inputs import as_table, finite


def combine_ranks(*scores: Float[np.ndarray, " features"]) -> Float[np.ndarray, " features"]:
    """The mean rank of each feature over several scores: 0 for one that is first in all of them.

    Of equal scores the feature with the lower index comes first.

    Args:
        scores: Importances, large where a feature matters; at least one.

    Raises:
        ValueError: If there is none, or they are no equally long vectors of finite numbers.

    Example:
        >>> combine_ranks(np.array([0.1, 0.9, 0.1]), np.array([3.0, 2.0, 1.0])).tolist()
        [0.5, 0.5, 2.0]
    """
    if not scores:
        raise ValueError("scores must be at least 1, got 0")
    found = [np.asarray(score, dtype=np.float64) for score in scores]
    shapes = {score.shape for score in found}
    if len(shapes) > 1 or found[0].ndim != 1:
        raise ValueError(f"scores must be vectors of one length, got shapes {sorted(shapes)}")
    if not all(np.isfinite(score).all() for score in found):
        raise ValueError("scores must be finite, got NaN or infinite ones")
    return np.mean([_ranks(score) for score in found], axis=0)


def _ranks(score: np.ndarray) -> np.ndarray:
    found = np.empty(len(score))
    found[np.argsort(-score, kind="stable")] = np.arange(len(score))
    return found


def first(ranks: Float[np.ndarray, " features"], k: int) -> Int[np.ndarray, " k"]:
    """The k features of lowest rank, best first; of equals the lower index.

    Raises:
        ValueError: If k is not in 1..features.

    Example:
        >>> first(np.array([0.5, 0.5, 2.0, 0.0]), 2).tolist()
        [3, 0]
    """
    if not 1 <= k <= len(ranks):
        raise ValueError(f"k must lie in 1..{len(ranks)}, the number of features, got {k}")
    return np.argsort(ranks, kind="stable")[:k]


def correlated_groups(X: Any, threshold: float = 0.9, block: int = 512) -> Int[np.ndarray, " features"]:
    """A number for each feature, equal for features that a chain of correlations joins.

    Permuted one by one, features that carry the same look unimportant, each being replaced by the others; permuted
    together (``groups`` of :func:`~netwright.explain.tabular.importance.permutation_importance`) they do not.

    Args:
        X: (rows, features), at least two rows.
        threshold: Spearman correlations above it in absolute value join, in [0, 1).
        block: Features compared with all at once.

    Raises:
        ValueError: If X is no finite matrix or a number is out of its range.

    Example:
        >>> a, b = np.random.default_rng(0).normal(size=(2, 50))
        >>> correlated_groups(np.stack([a, b, -a**3], 1)).tolist()
        [0, 1, 0]
    """
    table = as_table(X)
    finite("threshold", threshold, 0, np.nextafter(1, 0))
    if table.shape[0] < 2:
        raise ValueError(f"X must have at least 2 rows, got {table.shape[0]}")
    # Ranks one by one: average ranks need a sort a column, and a sparse table is dense as ranks in any case.
    ranks = rankdata(table.dense(), axis=0) - (table.shape[0] + 1) / 2
    norms = np.sqrt((ranks**2).sum(0))
    unit = np.divide(ranks, norms, out=np.zeros_like(ranks), where=norms > 0)
    joined = []
    for start in range(0, table.shape[1], block):
        near = np.argwhere(np.abs(unit[:, start : start + block].T @ unit) > threshold)
        joined.append(near + np.array([start, 0]))
    pairs = np.concatenate(joined)
    d = table.shape[1]
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(d, d))
    groups: np.ndarray = connected_components(graph, directed=False)[1]
    return groups
