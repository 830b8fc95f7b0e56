"""How much a black box goes by each feature: permutation importance and sensitivity.

Karim et al., "Interpreting Black-box Machine Learning Models for High Dimensional Datasets", IEEE DSAA 2023,
arXiv:2208.13405; the definitions are the usual ones, since the paper gives none.

    PI_i = s(f, X, y) - mean_r s(f, X with column i permuted, y),    SA_i = mean_x |df_yhat(x) / dx_i| sd(x_i)

Permuting a column changes the first affine layer of a network by a matrix of rank one, and only in the rows whose value
changes; nothing else is computed (:mod:`netwright.explain.tabular.probe`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.utils import check_random_state
from torch import nn

from netwright.checks import one_of
from netwright.explain.tabular.inputs import (
    Table,
    as_input,
    as_table,
    checked_columns,
    class_labels,
    coded,
    labels_of,
    moments,
    pieces,
)
from netwright.explain.tabular.probe import Change, Probe
from netwright.nn.modes import in_mode
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Score = Literal["accuracy", "f1", "mcc"]
Method = Literal["gradient", "finite"]
BATCH_CELLS = 4_000_000  # predictions that are held at once
BATCH_ROWS = 65_536  # altered rows that are collected before the black box sees them


@dataclasses.dataclass(frozen=True)
class PermutationImportance(Result):
    """What permuting each feature costs; the names are scikit-learn's.

    Attributes:
        importances: (features, repeats) drops of the score, at most 1 (accuracy, F1) or 2 (MCC).
        importances_mean: (features,).
        importances_std: (features,), with n in the denominator.
        baseline: The score without permutation.
        names: Of the features, where the table had any.
    """

    importances: np.ndarray
    importances_mean: np.ndarray
    importances_std: np.ndarray
    baseline: float
    names: tuple[str, ...] | None = None

    def __str__(self) -> str:
        order = np.argsort(-self.importances_mean, kind="stable")[:10]
        lines = [
            f"{_name(self.names, int(i))}: {self.importances_mean[i]:.4f} ± {self.importances_std[i]:.4f}"
            for i in order
        ]
        return "\n".join([f"score {self.baseline:.4f}; what permuting a feature costs", *lines])

    def plot(self, ax: Axes | None = None, most: int = 20) -> Axes:
        """The largest drops as bars."""
        return bars(self.importances_mean, self.names, "drop of the score", ax, most)


def bars(
    scores: Float[np.ndarray, " features"],
    names: Sequence[str] | None,
    label: str,
    ax: Axes | None = None,
    most: int = 20,
) -> Axes:
    """The largest scores as horizontal bars, the largest on top."""
    from matplotlib.ticker import MaxNLocator

    ax = new_axes(ax, size=(5.0, 0.6 + 0.22 * min(most, len(scores))))
    order = np.argsort(-scores, kind="stable")[:most][::-1]
    ax.barh(range(len(order)), scores[order])
    ax.set_yticks(range(len(order)), [_name(names, int(i)) for i in order])
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(label)
    ax.grid(axis="y", visible=False)
    return ax


def _name(names: Sequence[str] | None, column: int) -> str:
    return f"x{column}" if names is None else names[column]


def permutation_importance(
    predict: Any,
    X: Any,
    y: Any = None,
    score: Score = "accuracy",
    n_repeats: int = 5,
    groups: Int[np.ndarray, " features"] | None = None,
    random_state: Any = None,
    *,
    columns: Sequence[int] | None = None,
    updates: bool = True,
) -> PermutationImportance:
    """The drop of a score when the values of a feature are permuted over the rows.

    With an integer for ``random_state`` the permutations, and so the figures, are those of
    :func:`sklearn.inspection.permutation_importance`.

    Args:
        predict: A module that gives logits (batch, classes), an estimator with ``predict_proba``, or a function that
            gives probabilities (rows, classes) or labels (rows,).
        X: (rows, features) of the training or validation part.
        y: (rows,) labels: of an estimator's ``classes_``, else numbers of classes 0, 1, ... where probabilities are
            predicted. Without them the predictions for X as it is stand in, which measures what the black box goes by,
            right or wrong.
        score: ``"accuracy"``, ``"f1"`` (mean over the classes) or ``"mcc"``.
        n_repeats: Permutations R, >= 1.
        groups: A number for each feature; features of equal number are permuted together and share their importance.
        random_state: Of the permutations; an integer, a ``RandomState`` or None.
        columns: Permute only groups with one of these features; the others' importance is NaN.
        updates: Whether the first affine layer of a module is updated by what changes in place of being computed
            anew; the figures are equal up to rounding.

    Raises:
        ValueError: If an argument is out of its range or shape, X is not finite, or y holds a label that is no class of
            predicted probabilities.

    Example:
        >>> X = np.random.default_rng(0).normal(size=(100, 3))
        >>> found = permutation_importance(lambda X: X[:, 0] > 0, X, random_state=0)
        >>> found.importances_mean.round(2).tolist()
        [0.52, 0.0, 0.0]
    """
    table = as_table(X)
    one_of("score", score, get_args(Score))
    if isinstance(n_repeats, bool) or not isinstance(n_repeats, (int, np.integer)) or n_repeats < 1:
        raise ValueError(f"n_repeats must be a whole number >= 1, got {n_repeats!r}")
    labels, members = _groups(groups, table.shape[1])
    probe = Probe(predict, table, updates=updates)
    predicted = probe.labels()
    if y is None:
        known = predicted
    elif probe.base.ndim == 2:
        known = coded(y, table.shape[0], class_labels(predict, probe.base.shape[1]))
    else:
        known = labels_of(y, table.shape[0])
    classes, numbers = np.unique(np.concatenate([known, predicted]), return_inverse=True)
    numbers = numbers.astype(np.int64)
    truth, base = numbers[: len(known)], numbers[len(known) :]
    baseline = float(scores(base[None], truth, len(classes), score)[0])
    orders = _orders(table.shape[0], int(n_repeats), random_state)
    drops = np.zeros((len(members), n_repeats))
    wanted = None if columns is None else set(labels[checked_columns(columns, table.shape[1], "columns")].tolist())
    if wanted is not None:
        drops[[i not in wanted for i in range(len(members))]] = np.nan
    for chosen, batch in _batches(probe, members, orders, wanted):
        found = np.broadcast_to(base, (len(batch), *orders.shape)).copy()
        if any(len(change.rows) for _, change in batch):
            answered = probe.labels([change for _, change in batch if len(change.rows)])
            places = np.concatenate([place + i * orders.size for i, (place, _) in enumerate(batch)])
            found.reshape(-1)[places] = _coded(classes, answered, score)
        drops[chosen] = baseline - scores(found, truth, len(classes), score)
    importances = drops[labels]
    return PermutationImportance(importances, importances.mean(1), importances.std(1), baseline, table.names)


def _orders(rows: int, repeats: int, random_state: Any) -> Int[np.ndarray, "repeats rows"]:
    """Which row each value comes from in every repeat: scikit-learn's, which permutes what it has permuted before."""
    seed = check_random_state(random_state).randint(np.iinfo(np.int32).max + 1)
    random = check_random_state(seed)
    shuffled, found = np.arange(rows), [np.arange(rows)]
    for _ in range(repeats):
        random.shuffle(shuffled)
        found.append(found[-1][shuffled])
    return np.stack(found[1:])


def _batches(
    probe: Probe, members: list[np.ndarray], orders: Int[np.ndarray, "repeats rows"], wanted: set[int] | None
) -> Iterator[tuple[list[int], list[tuple[np.ndarray, Change]]]]:
    """Some groups with their changes; beside each change the places in (repeats, rows), flat, that it is for."""
    chosen: list[int] = []
    batch: list[tuple[np.ndarray, Change]] = []
    most = max(1, BATCH_CELLS // orders.size)
    count = 0
    for number, columns in enumerate(members):
        if wanted is not None and number not in wanted:
            continue
        now = probe.column(columns)
        if (now == now[0]).all():
            places, change = np.empty(0, np.intp), Change(np.empty(0, np.intp), columns, now[:0])
        else:
            moved = now[orders]
            places = np.flatnonzero((moved != now).any(-1))
            change = Change(places % orders.shape[1], columns, moved.reshape(-1, len(columns))[places])
        chosen.append(number)
        batch.append((places, change))
        count += len(places)
        if len(batch) == most or count >= BATCH_ROWS:
            yield chosen, batch
            chosen, batch, count = [], [], 0
    if batch:
        yield chosen, batch


def _groups(groups: Any, features: int) -> tuple[np.ndarray, list[np.ndarray]]:
    if groups is None:
        return np.arange(features), [np.array([i]) for i in range(features)]
    given = np.asarray(groups)
    if given.shape != (features,):
        raise ValueError(f"groups must be {features} numbers, one a feature, got shape {given.shape}")
    _, labels = np.unique(given, return_inverse=True)
    return labels, [np.flatnonzero(labels == i) for i in range(int(labels.max()) + 1)]


def _coded(classes: np.ndarray, answered: np.ndarray, score: Score) -> np.ndarray:
    """The place of each label among the classes; a class that nobody has or had is wrong in any case."""
    places = np.searchsorted(classes, answered).clip(0, len(classes) - 1)
    return np.where(classes[places] == answered, places, len(classes))


def scores(
    predicted: Int[np.ndarray, "*variants rows"], truth: Int[np.ndarray, " rows"], classes: int, score: Score
) -> Float[np.ndarray, "*variants"]:
    """Accuracy, mean F1 or Matthews' correlation of many predictions for the same labels.

    Args:
        predicted: Classes 0..classes - 1; ``classes`` itself stands for any other.
        truth: Classes 0..classes - 1.
        classes: How many there are.
        score: Which score; F1 is the mean over the classes that are predicted or true, as scikit-learn has it.

    Example:
        >>> scores(np.array([[0, 1, 1, 1], [0, 0, 1, 1]]), np.array([0, 0, 1, 1]), 2, "accuracy").tolist()
        [0.75, 1.0]
    """
    if score == "accuracy":
        return (predicted == truth).mean(-1)
    lead, width = predicted.shape[:-1], classes + 1
    flat = predicted.reshape(-1, predicted.shape[-1])
    codes = (np.arange(len(flat))[:, None] * width + truth) * width + flat
    table = np.bincount(codes.ravel(), minlength=len(flat) * width**2).reshape(-1, width, width).astype(float)
    hit = np.einsum("...ii->...i", table)
    true, guessed = table.sum(-1), table.sum(-2)
    if score == "f1":
        seen = (true + guessed) > 0
        each = np.divide(2 * hit, true + guessed, out=np.zeros_like(hit), where=seen)
        return (each.sum(-1) / seen.sum(-1)).reshape(lead)
    total = float(predicted.shape[-1])
    above = hit.sum(-1) * total - (true * guessed).sum(-1)
    below = np.sqrt((total**2 - (true**2).sum(-1)) * (total**2 - (guessed**2).sum(-1)))
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0).reshape(lead)


def sensitivity_importance(
    model: Any, X: Any, method: Method = "gradient", *, updates: bool = True
) -> Float[np.ndarray, " features"]:
    """How far the probability of the predicted class moves when a feature moves by its standard deviation.

    Args:
        model: A module that gives logits (batch, classes); for ``"finite"`` also an estimator with ``predict_proba`` or
            a function that gives probabilities.
        X: (rows, features) of the training or validation part.
        method: ``"gradient"``: the mean over the rows of |df / dx_i| sd(x_i). ``"finite"``: the mean of
            |f(x + sd e_i) - f(x)| and |f(x - sd e_i) - f(x)|. f is the probability of the class that is predicted
            for x.
        updates: As for :func:`permutation_importance`.

    Returns:
        (features,) >= 0; 0 where a feature is constant.

    Raises:
        ValueError: If ``method`` is unknown, X is not finite, or the model gives no probabilities.
        TypeError: If the gradient of something that is no module is asked for.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]])), net.bias.zero_()
        >>> sensitivity_importance(net, [[-1.0, 3.0], [1.0, -2.0]]).round(3).tolist()
        [0.197, 0.0]
    """
    table = as_table(X)
    if method == "finite":
        return _finite(model, table, updates)
    if method != "gradient":
        raise ValueError(f"method must be 'gradient' or 'finite', got {method!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module for the gradient, got {type(model).__name__}: take 'finite'")
    total = np.zeros(table.shape[1])
    with in_mode(model, training=False), torch.enable_grad():
        for part in pieces(*table.shape):
            x = as_input(model, table.values[part]).requires_grad_()
            given = model(x)
            if given.ndim != 2 or given.shape[1] < 2:
                raise ValueError(f"model must give logits (rows, >= 2 classes), got shape {tuple(given.shape)}")
            # The rows do not depend on one another in evaluation mode, so the gradient of the sum holds each row's.
            (slope,) = torch.autograd.grad(given.softmax(1).max(1).values.sum(), x)
            total += slope.abs().sum(0, dtype=torch.float64).cpu().numpy()
    return total / table.shape[0] * moments(table)[1]


def _finite(model: Any, table: Table, updates: bool) -> np.ndarray:
    # A step of a column's own standard deviation is one also behind what acts on each column by itself, so the
    # probe gets the moved values of the table as it is unless it transforms them.
    probe = Probe(model, table, updates=updates)
    if probe.table is not table:
        probe = Probe(model, table, updates=False)
    base = probe.probabilities()
    predicted, rows = base.argmax(1), np.arange(len(base))
    held = base[rows, predicted]
    sd = moments(table)[1]
    found = np.zeros(table.shape[1])
    for i in np.flatnonzero(sd > 0):
        column = np.array([i])
        now = probe.column(column)
        both = np.concatenate([now + sd[i], now - sd[i]])
        moved = probe.probabilities([Change(np.concatenate([rows, rows]), column, both)])
        found[i] = np.abs(moved.reshape(2, len(rows), -1)[:, rows, predicted] - held).mean()
    return found
