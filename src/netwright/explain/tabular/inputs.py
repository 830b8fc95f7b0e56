"""Rows of features in any usual form, and what a black box of any usual kind answers for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from torch import nn

from netwright.nn.modes import in_mode

CELLS = 4_000_000  # of one piece of a table that is handed over as a dense array


@dataclass(frozen=True)
class Table:
    """A checked table: its values, the names of its columns, and the way back to the form in which it came.

    Attributes:
        values: (rows, features), a floating-point array or a CSR array.
        names: Of the features, where the table had any.
        give: Turns values of the same number of columns into the form in which the table came.
    """

    values: Any
    names: tuple[str, ...] | None
    give: Callable[[Any], Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and features."""
        rows, features = self.values.shape
        return rows, features

    @property
    def sparse(self) -> bool:
        """Whether the values are a CSR array."""
        return sparse.issparse(self.values)

    def rows(self, chosen: Any) -> Table:
        """Only these rows."""
        return Table(self.values[chosen], self.names, self.give)

    def dense(self, columns: Any = slice(None)) -> np.ndarray:
        """A dense array, of some columns if these are told."""
        found = self.values[:, columns]
        return found.toarray() if sparse.issparse(found) else np.asarray(found)

    def single(self, columns: Any) -> Float[np.ndarray, "rows k"]:
        """Some columns as float32, which is how scikit-learn's trees see them."""
        return self.dense(columns).astype(np.float32)

    def name(self, column: int) -> str:
        """Of a feature: its own, else its number."""
        return f"x{column}" if self.names is None else self.names[column]


def as_table(x: Any, name: str = "X", n_features: int | None = None) -> Table:
    """Checks a table of features.

    Args:
        x: (rows, features): an array, a pandas DataFrame, a SciPy sparse matrix or a tensor, of numbers.
        name: Of the argument, for messages.
        n_features: How many features there must be.

    Raises:
        ValueError: If it is no matrix, is empty, holds something that is no number, or NaN or an infinity, or has
            another number of columns.

    Example:
        >>> table = as_table([[1, 2], [3, 4]])
        >>> table.shape, table.values.dtype, table.name(1)
        ((2, 2), dtype('float64'), 'x1')
    """
    names: tuple[str, ...] | None = None
    give: Callable[[Any], Any] = _dense
    if isinstance(x, torch.Tensor):
        values: Any = x.detach().cpu().numpy()
        kind = x.dtype
        give = lambda v: torch.as_tensor(_dense(v), dtype=kind if kind.is_floating_point else None)  # noqa: E731
    elif sparse.issparse(x):
        values, give = sparse.csr_array(x), sparse.csr_array
    elif hasattr(x, "iloc") and hasattr(x, "columns"):
        values, names, give = _from_frame(x, name)
    else:
        values = np.asarray(x)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{name} must be (rows, features) and not empty, got shape {values.shape}")
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold numbers, got {values.dtype}")
    if values.dtype not in (np.float32, np.float64):
        values = values.astype(np.float64)
    known = values.data if sparse.issparse(values) else values
    if not np.isfinite(known).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(known)).sum())} NaN or infinite values")
    if n_features is not None and values.shape[1] != n_features:
        raise ValueError(f"{name} must have {n_features} features, got {values.shape[1]}")
    return Table(values, names, give)


def _dense(values: Any) -> np.ndarray:
    return values.toarray() if sparse.issparse(values) else np.asarray(values)


def _from_frame(frame: Any, name: str) -> tuple[np.ndarray, tuple[str, ...], Callable[[Any], Any]]:
    odd = [str(c) for c, kind in frame.dtypes.items() if getattr(kind, "kind", "O") not in "fiub"]
    if odd:
        raise ValueError(f"{name} must hold numbers, got other things in the column {odd[0]!r}")
    kind, columns = type(frame), frame.columns
    return np.array(frame, dtype=np.float64), tuple(map(str, columns)), lambda v: kind(_dense(v), columns=columns)


def pieces(count: int, features: int) -> Iterator[slice]:
    """Slices of so many rows that a dense piece has about four million cells.

    Example:
        >>> list(pieces(5, 2_000_000))
        [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None)]
    """
    step = max(1, CELLS // max(1, features))
    for start in range(0, count, step):
        yield slice(start, start + step)


def answers(black_box: Any, table: Table) -> Float[np.ndarray, "rows classes"]:
    """The class probabilities that a black box gives.

    Args:
        black_box: A module that gives logits (batch, classes), which a softmax follows; it is in evaluation mode
            meanwhile. Or an object with ``predict_proba``; or a function that returns probabilities, given rows in the
            form in which the table came.
        table: The rows.

    Raises:
        ValueError: If what it gives is not (rows, classes) with at least two classes, or not finite.
    """
    if isinstance(black_box, nn.Module):
        found = _softmax(logits(black_box, table))
    else:
        call = function_of(black_box)
        parts = [np.asarray(call(table.give(table.values[part]))) for part in pieces(*table.shape)]
        bad = next((p.shape for p in parts if p.ndim != 2 or p.shape[1] < 2), None)
        if bad is not None or sum(map(len, parts)) != table.shape[0]:
            told = bad if bad is not None else (sum(map(len, parts)), *parts[0].shape[1:])
            raise ValueError(f"black_box must give ({table.shape[0]} rows, >= 2 classes), got shape {told}")
        found = np.concatenate(parts).astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError("black_box must give finite probabilities, got NaN or infinite ones")
    return found


def function_of(black_box: Any) -> Callable[[Any], Any]:
    """``predict_proba`` of an estimator, else the thing itself.

    Raises:
        TypeError: If it cannot be called.
    """
    call = getattr(black_box, "predict_proba", black_box)
    if not callable(call):
        raise TypeError(f"black_box must be a module, an estimator or a function, got {type(black_box).__name__}")
    return call


def class_labels(black_box: Any, classes: int) -> np.ndarray:
    """The labels that the columns of a black box's probabilities stand for: ``classes_``, else 0, 1, ...

    Example:
        >>> class_labels(lambda X: X, 3).tolist()
        [0, 1, 2]
    """
    found = getattr(black_box, "classes_", None)
    return np.arange(classes) if found is None or np.shape(found) != (classes,) else np.asarray(found)


def coded(y: Any, rows: int, known: np.ndarray) -> Int[np.ndarray, " rows"]:
    """The place of each label among those of a black box.

    Args:
        y: (rows,) labels: an array, a Series, a list or a tensor.
        rows: How many there must be.
        known: (classes,) labels, as :func:`class_labels` gives them.

    Raises:
        ValueError: If y has another shape, or a label that is not known.

    Example:
        >>> coded(["yes", "no", "yes"], 3, np.array(["no", "yes"])).tolist()
        [1, 0, 1]
    """
    labels, places = np.unique(labels_of(y, rows), return_inverse=True)
    number = {label: i for i, label in enumerate(known.tolist())}
    odd = [label for label in labels.tolist() if label not in number]
    if odd:
        told = f"0..{len(known) - 1}" if np.array_equal(known, np.arange(len(known))) else ", ".join(map(str, known))
        raise ValueError(f"y must hold classes of the black box, {told}, got {odd[0]!r}")
    return np.array([number[label] for label in labels.tolist()], dtype=np.int64)[places]


def labels_of(y: Any, rows: int) -> np.ndarray:
    """Labels as an array.

    Raises:
        ValueError: If there is not one a row.
    """
    found = y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    if found.shape != (rows,):
        raise ValueError(f"y must be {rows} labels, got shape {found.shape}")
    return found


def as_input(module: nn.Module, values: Any) -> torch.Tensor:
    """Values as a tensor of the type and on the device of a module's parameters."""
    first = next(module.parameters(), None)
    found = torch.as_tensor(_dense(values))
    return found if first is None else found.to(first)


def logits(module: nn.Module, table: Table) -> Float[np.ndarray, "rows classes"]:
    """What a module gives, in evaluation mode, a piece of the rows at a time.

    Raises:
        ValueError: If that is not (rows, classes) with at least two classes.
    """
    found = []
    with in_mode(module, training=False), torch.inference_mode():
        for part in pieces(*table.shape):
            given = module(as_input(module, table.values[part]))
            rows = table.values[part].shape[0]
            if not isinstance(given, torch.Tensor) or given.ndim != 2 or len(given) != rows or given.shape[1] < 2:
                shape = tuple(given.shape) if isinstance(given, torch.Tensor) else type(given).__name__
                raise ValueError(f"black_box must give ({rows} rows, >= 2 classes), got {shape}")
            found.append(given.double().cpu().numpy())
    return np.concatenate(found)


def _softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def moments(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n in the denominator) of each feature; exactly 0 where it is constant.

    Example:
        >>> mean, sd = moments(as_table([[1.0, 5.0], [3.0, 5.0]]))
        >>> mean.tolist(), sd.tolist()
        ([2.0, 5.0], [1.0, 0.0])
    """
    if not table.sparse:
        values = np.asarray(table.values, dtype=np.float64)
        return values.mean(0), np.where(np.ptp(values, axis=0) == 0, 0.0, values.std(0))
    mean = np.asarray(table.values.mean(0)).ravel()
    square = np.asarray(table.values.multiply(table.values).mean(0)).ravel()
    ends = [np.asarray(end.todense()).ravel() for end in (table.values.min(0), table.values.max(0))]
    return mean, np.where(ends[0] == ends[1], 0.0, np.sqrt(np.maximum(0.0, square - mean**2)))


def checked_columns(columns: Sequence[int] | np.ndarray, features: int, name: str) -> np.ndarray:
    """Numbers of features, each in 0..features - 1.

    Raises:
        ValueError: If one is not.
    """
    found = np.asarray(columns)
    whole = found.size == 0 or found.dtype.kind in "iu"
    if not whole or (found.size and (found.min() < 0 or found.max() >= features)):
        raise ValueError(f"{name} must be numbers of features in 0..{features - 1}, got {columns!r}")
    return found.astype(np.intp)


def finite(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Refuses a number outside [low, high].

    Raises:
        ValueError: If it is.
    """
    if not low <= value <= high or not math.isfinite(value):
        bound = f"lie in [{low:g}, {high:g}]" if math.isfinite(high) else f"be >= {low:g}"
        raise ValueError(f"{name} must {bound}, got {value}")
