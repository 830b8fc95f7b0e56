"""What a black box answers when some columns of some rows take other values.

Moving column i of a row by delta moves the output of an affine first layer, z = W x + b, by delta W_i: one column of W
instead of a product with all of it. So where a network begins with such a layer, its output is kept for every row, and
an altered row costs O(n_1) before the other layers in place of O(d n_1). Self-attention networks begin with such layers
as well (beside the input itself, which the gate multiplies). Any other black box gets altered rows in large pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy import sparse
from torch import Tensor, nn

from netwright.explain.tabular.inputs import CELLS, Table, as_input, function_of
from netwright.nn.modes import in_mode

ROWS = 2048  # altered rows of one pass: their first layer stays in a processor's cache


@dataclass(frozen=True)
class Change:
    """Other values for some columns of some rows.

    Attributes:
        rows: (m,) which rows, each as often as there are variants of it.
        columns: (c,) which columns.
        values: (m, c) what stands there.
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class FirstAffine:
    """A network in two parts: an affine map of its input, and everything behind it.

    Attributes:
        before: What acts on each column by itself, in front of the map.
        weight: (n_1, features).
        bias: (n_1,), or None.
        rest: Turns the map's output and the input, both of the same rows, into logits.
        needs_input: Whether ``rest`` looks at the input.
    """

    before: nn.Sequential
    weight: Tensor
    bias: Tensor | None
    rest: Callable[[Tensor, Tensor | None], Tensor]
    needs_input: bool


def first_affine(model: nn.Module) -> FirstAffine | None:
    """Takes a network apart behind its first affine layer, or None where it does not begin with one.

    Looks into :class:`torch.nn.Sequential`, passes over what acts on each column by itself (dropout, which does nothing
    in evaluation mode, batch norm, flattening, a module with ``columnwise = True``), and takes a linear layer, or a
    module that has ``first_affine()`` and ``after_affine(z, x)``.

    Example:
        >>> parts = first_affine(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
        >>> tuple(parts.weight.shape)
        (4, 3)
        >>> first_affine(nn.Sequential(nn.ReLU(), nn.Linear(3, 2))) is None
        True
    """
    parts = list(_flattened(model))
    for place, part in enumerate(parts):
        if _hooked(part):
            return None
        if not _columnwise(part):
            return _taken_apart(nn.Sequential(*parts[:place]), part, nn.Sequential(*parts[place + 1 :]))
    return None


def _taken_apart(before: nn.Sequential, part: Any, behind: nn.Sequential) -> FirstAffine | None:
    if isinstance(part, nn.Linear) and type(part).forward is nn.Linear.forward:
        return FirstAffine(before, part.weight, part.bias, lambda z, x: behind(z), False)
    if hasattr(part, "first_affine") and hasattr(part, "after_affine"):
        weight, bias = part.first_affine()
        return FirstAffine(before, weight, bias, lambda z, x: behind(part.after_affine(z, x)), True)
    return None


def _flattened(model: nn.Module) -> Iterator[nn.Module]:
    inside: Any = None
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        inside = model
    elif callable(getattr(model, "in_sequence", None)):
        inside = model.in_sequence()  # type: ignore[operator]
    if inside is None or _hooked(model):
        yield model
        return
    for part in inside:
        yield from _flattened(part)


def _hooked(part: nn.Module) -> bool:
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _columnwise(part: nn.Module) -> bool:
    if isinstance(part, nn.BatchNorm1d):
        return part.track_running_stats
    return isinstance(part, (nn.Identity, nn.Flatten, nn.Dropout, nn.AlphaDropout)) or getattr(
        part, "columnwise", False
    )


class Probe:
    """Answers of a black box for rows of a table with some values changed.

    Args:
        black_box: A module that gives logits, an estimator, or a function that gives probabilities or labels.
        table: The rows.
        updates: Whether a network's first affine layer is updated in place of being computed anew.

    Attributes:
        base: (rows, classes) logits or probabilities of the rows as they are, or (rows,) labels.
        fast: Whether an affine first layer was found.

    Raises:
        ValueError: If the black box gives neither (rows, classes) nor (rows,).
        TypeError: If it cannot be called.
    """

    def __init__(self, black_box: Any, table: Table, *, updates: bool = True):
        self.black_box = black_box
        self.parts = first_affine(black_box) if updates and isinstance(black_box, nn.Module) else None
        if self.parts is not None and self.parts.weight.shape[1] != table.shape[1]:
            self.parts = None
        if self.parts is not None and len(self.parts.before):
            with in_mode(self.parts.before, training=False), torch.inference_mode():
                moved = self.parts.before(as_input(black_box, table.values))
            table = Table(moved.cpu().numpy(), table.names, table.give)
        self.table = table
        self._call = None if isinstance(black_box, nn.Module) else function_of(black_box)
        if self.parts is not None:
            self._hidden = self._first_layer(self.parts)
            width = max(self.parts.weight.shape[0], table.shape[1] if self.parts.needs_input else 1)
            self._limit = max(64, min(ROWS, CELLS // width))
            self._columns = self.parts.weight.detach().T.contiguous()
        else:
            self._limit = max(64, min(ROWS, CELLS // table.shape[1]))
        rows = table.shape[0]
        self.base = self._checked(self([Change(np.arange(rows), np.empty(0, np.intp), np.empty((rows, 0)))]))

    @property
    def fast(self) -> bool:
        """Whether an affine first layer was found."""
        return self.parts is not None

    def _first_layer(self, parts: FirstAffine) -> Tensor:
        if not self.table.sparse:
            with torch.inference_mode():
                return nn.functional.linear(as_input(self.black_box, self.table.values), parts.weight, parts.bias)
        weight = parts.weight.detach()
        found = torch.as_tensor(np.asarray(self.table.values @ weight.cpu().numpy().T)).to(weight)
        return found if parts.bias is None else found + parts.bias.detach()

    def _checked(self, found: np.ndarray) -> np.ndarray:
        rows = self.table.shape[0]
        if found.shape[0] != rows or found.ndim > 2 or (found.ndim == 2 and found.shape[1] < 2):
            raise ValueError(f"predict must give ({rows} rows, >= 2 classes) or ({rows},) labels, got {found.shape}")
        return found

    def labels(self, changes: Sequence[Change] | None = None) -> np.ndarray:
        """The predicted classes, of the rows as they are without changes."""
        found = self.base if changes is None else self(changes)
        return found.argmax(1) if found.ndim == 2 else found

    def probabilities(self, changes: Sequence[Change] | None = None) -> Float[np.ndarray, "rows classes"]:
        """The probabilities of the classes.

        Raises:
            ValueError: If the black box gives labels.
        """
        found = self.base if changes is None else self(changes)
        if found.ndim != 2:
            raise ValueError(f"model must give probabilities (rows, classes), got shape {found.shape}")
        if not isinstance(self.black_box, nn.Module):
            return found
        shifted = np.exp(found - found.max(1, keepdims=True))
        return shifted / shifted.sum(1, keepdims=True)

    def __call__(self, changes: Sequence[Change]) -> np.ndarray:
        """What the black box gives for all changed rows, one after another."""
        small = [part for change in changes for part in self._split(change)]
        found: list[np.ndarray] = []
        batch: list[Change] = []
        count = 0
        for change in small:
            if batch and count + len(change.rows) > self._limit:
                found.append(self._answer(batch))
                batch, count = [], 0
            batch.append(change)
            count += len(change.rows)
        if batch:
            found.append(self._answer(batch))
        return np.concatenate(found)

    def _split(self, change: Change) -> Iterator[Change]:
        for start in range(0, len(change.rows), self._limit):
            part = slice(start, start + self._limit)
            yield Change(change.rows[part], change.columns, change.values[part])

    def _answer(self, batch: list[Change]) -> np.ndarray:
        return self._fast(batch, self.parts) if self.parts is not None else self._plain(batch)

    def _fast(self, batch: list[Change], parts: FirstAffine) -> np.ndarray:
        rows = np.concatenate([change.rows for change in batch])
        start = 0
        with in_mode(self.black_box, training=False), torch.inference_mode():
            hidden = self._hidden.index_select(0, torch.from_numpy(rows))
            for change in batch:
                stop = start + len(change.rows)
                if len(change.columns):
                    delta = change.values - self._old(change)
                    moved = torch.from_numpy(delta).to(hidden)
                    hidden[start:stop].addmm_(moved, self._columns[torch.from_numpy(change.columns)])
                start = stop
            given = torch.from_numpy(self._altered(batch)).to(hidden) if parts.needs_input else None
            return parts.rest(hidden, given).cpu().numpy()

    def _old(self, change: Change) -> np.ndarray:
        if self.table.sparse:
            return self._by_column[:, change.columns].toarray()[change.rows]
        return self.table.values[change.rows[:, None], change.columns]

    @property
    def _by_column(self) -> Any:
        if not hasattr(self, "_csc"):
            self._csc = sparse.csc_array(self.table.values)
        return self._csc

    def column(self, numbers: np.ndarray) -> np.ndarray:
        """(rows, columns) values of some columns, after what acts on each column by itself."""
        return self._by_column[:, numbers].toarray() if self.table.sparse else self.table.values[:, numbers]

    def _altered(self, batch: list[Change]) -> np.ndarray:
        found = self.table.rows(np.concatenate([change.rows for change in batch])).dense()
        start = 0
        for change in batch:
            found[start : start + len(change.rows), change.columns] = change.values
            start += len(change.rows)
        return found

    def _plain(self, batch: list[Change]) -> np.ndarray:
        values = self._altered(batch)
        if self._call is not None:
            return np.asarray(self._call(self.table.give(values)))
        with in_mode(self.black_box, training=False), torch.inference_mode():
            given: np.ndarray = self.black_box(as_input(self.black_box, values)).cpu().numpy()
        return given
