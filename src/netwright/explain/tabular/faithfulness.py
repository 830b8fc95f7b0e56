"""How well a simpler model answers as a black box does, and whether the features that are named carry the answer.

Karim et al., IEEE DSAA 2023, arXiv:2208.13405. Comprehensiveness and sufficiency follow DeYoung et al., "ERASER: A
Benchmark to Evaluate Rationalized NLP Models", ACL 2020, arXiv:1911.03429:

    R^2 = 1 - sum (f - g)^2 / sum (f - mean f)^2,    comprehensiveness = m(x) - m(x without r),
    sufficiency = m(x) - m(only r),    m(x) = f_yhat(x)
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from sklearn.utils import check_random_state

from netwright.explain.tabular.inputs import Table, answers, as_table, checked_columns, moments, pieces

Baseline = Literal["mean", "permutation"]


def agreement(first: Int[np.ndarray, " rows"], second: Int[np.ndarray, " rows"]) -> float:
    """The share of rows for which two models predict the same class.

    Raises:
        ValueError: If the two are not equally long, or empty.

    Example:
        >>> agreement(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
        0.75
    """
    a, b = np.asarray(first), np.asarray(second)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"first and second must be equally many classes, at least 1, got {a.shape} and {b.shape}")
    return float((a == b).mean())


def r_squared(f: Float[np.ndarray, "*shape"], g: Float[np.ndarray, "*shape"]) -> float:
    """The share of the variance of f that g explains: 1 at best, 0 for the mean, below 0 for worse than the mean.

    Args:
        f: Probabilities of the black box, all classes pooled.
        g: Those of the simpler model.

    Returns:
        NaN where f is constant and g is something else; 1 where both are the same.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> r_squared(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 2.0]))
        0.8
    """
    true, guessed = np.asarray(f, dtype=np.float64), np.asarray(g, dtype=np.float64)
    if true.shape != guessed.shape or not true.size:
        raise ValueError(f"f and g must have one shape and not be empty, got {true.shape} and {guessed.shape}")
    left, whole = float(((true - guessed) ** 2).sum()), float(((true - true.mean()) ** 2).sum())
    if whole == 0:
        return 1.0 if left == 0 else float("nan")
    return 1 - left / whole


def comprehensiveness(
    f: Any,
    X: Any,
    top: Int[np.ndarray, "rows features"] | Int[np.ndarray, " features"],
    baseline: Baseline | Float[np.ndarray, " features"] = "mean",
    *,
    background: Any = None,
    random_state: Any = None,
) -> Float[np.ndarray, " rows"]:
    """By how much the probability of the predicted class falls when the named features are taken away.

    The class is the one that is predicted for the whole row, before and after.

    Args:
        f: A module that gives logits, an estimator with ``predict_proba``, or a function that gives probabilities.
        X: (rows, features).
        top: Numbers of features: the same for all rows, (r,), or those of each row, (rows, r).
        baseline: What stands in place of a feature: ``"mean"`` of the background, ``"permutation"``: the values of
            another row of it, drawn at random for each row; or a vector of values.
        background: (rows, features) of the training part; X itself by default.
        random_state: Of the drawing.

    Returns:
        One number a row, in [-1, 1]; high is good. 0 if ``top`` is empty.

    Raises:
        ValueError: If a feature or the baseline is unknown, or X is not finite.

    Example:
        >>> f = lambda X: np.stack([1 - X[:, 0], X[:, 0]], 1)
        >>> comprehensiveness(f, [[1.0, 0.3], [0.8, 0.2]], np.array([0]), baseline=np.array([0.6, 0.0])).round(6)
        array([0.4, 0.2])
    """
    return _fall(f, X, top, baseline, background, random_state, keep=False)


def sufficiency(
    f: Any,
    X: Any,
    top: Int[np.ndarray, "rows features"] | Int[np.ndarray, " features"],
    baseline: Baseline | Float[np.ndarray, " features"] = "mean",
    *,
    background: Any = None,
    random_state: Any = None,
) -> Float[np.ndarray, " rows"]:
    """By how much the probability of the predicted class falls when only the named features are left.

    Args:
        f: As for :func:`comprehensiveness`, and so are the others.
        X: Likewise.
        top: Likewise.
        baseline: Likewise.
        background: Likewise.
        random_state: Likewise.

    Returns:
        One number a row, in [-1, 1]; low is good. 0 if ``top`` names all features.

    Raises:
        ValueError: As :func:`comprehensiveness`.

    Example:
        >>> f = lambda X: np.stack([1 - X[:, 0], X[:, 0]], 1)
        >>> sufficiency(f, [[1.0, 0.3], [0.8, 0.2]], np.array([0])).round(6)
        array([0., 0.])
    """
    return _fall(f, X, top, baseline, background, random_state, keep=True)


def _fall(
    f: Any, X: Any, top: Any, baseline: Any, background: Any, random_state: Any, *, keep: bool
) -> Float[np.ndarray, " rows"]:
    table = as_table(X)
    rows, features = table.shape
    named = checked_columns(top, features, "top")
    if named.ndim not in (1, 2) or (named.ndim == 2 and len(named) != rows):
        raise ValueError(f"top must have shape (r,) or ({rows}, r), got {named.shape}")
    other = table if background is None else as_table(background, "background", features)
    random = check_random_state(random_state)
    whole = answers(f, table)
    predicted = whole.argmax(1)
    held = whole[np.arange(rows), predicted]
    found = np.empty(rows)
    for part in pieces(rows, features):
        count = len(predicted[part])
        chosen = np.zeros((count, features), bool)
        columns = named if named.ndim == 1 else named[part]
        chosen[np.arange(count)[:, None], columns] = True
        there = table.rows(part).dense()
        values = np.where(chosen == keep, there, _replacement(other, baseline, count, random))
        left = answers(f, Table(values, table.names, table.give))
        found[part] = held[part] - left[np.arange(count), predicted[part]]
    return found


def _replacement(background: Table, baseline: Any, count: int, random: np.random.RandomState) -> np.ndarray:
    if isinstance(baseline, str):
        if baseline == "mean":
            return moments(background)[0]
        if baseline != "permutation":
            raise ValueError(f"baseline must be 'mean', 'permutation' or a vector, got {baseline!r}")
        return background.rows(random.randint(background.shape[0], size=count)).dense()
    values = np.asarray(baseline, dtype=np.float64)
    if values.shape != (background.shape[1],) or not np.isfinite(values).all():
        raise ValueError(f"baseline must be {background.shape[1]} finite values, got shape {values.shape}")
    return values
