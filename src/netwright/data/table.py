"""A CSV file as a table of numbers and a class a row."""

from __future__ import annotations

import csv
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from netwright.console import UserError, nearest

MOST_VALUES = 20  # of a column of words that becomes columns of zeros and ones
MOST_CLASSES = 100
LEAST_ROWS = 5  # of a class


@dataclass(frozen=True)
class LabelledTable:
    """Rows of features with a class each.

    Attributes:
        X: (rows, features).
        y: (rows,) numbers of classes.
        names: Of the features; ``"colour=red"`` for a value of a column of words.
        columns: (features,) number of the column each feature comes from.
        classes: Names of the classes, in the order of their numbers.
        target: The column of the classes.
        left_out: Columns that are not features: words with more than 20 different values, and constant ones.
    """

    X: Float[np.ndarray, "rows features"]
    y: Int[np.ndarray, " rows"]
    names: tuple[str, ...]
    columns: Int[np.ndarray, " features"]
    classes: tuple[str, ...]
    target: str
    left_out: tuple[str, ...]


def read_table(path: str | os.PathLike[str], target: str) -> LabelledTable:
    """Reads a CSV file with a line of column names.

    A column of numbers is a feature; a column of words with at most 20 different ones is a feature of zeros and ones
    for each of them, or for the second of two. Cells are separated by commas, semicolons or tabs, as the first line
    tells.

    Args:
        path: The file, UTF-8.
        target: The column of the classes.

    Raises:
        UserError: If the file is not there or no such table, a cell is empty or not finite, there is no such column,
            fewer than two or more than 100 classes, or fewer than five rows of one.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = file.write_text("size,colour,kind\\n" + "1.5,red,cat\\n2,blue,dog\\n" * 5)
        >>> table = read_table(file, "kind")
        >>> table.names, table.classes, table.X[0].tolist()
        (('size', 'colour=red'), ('cat', 'dog'), [1.5, 1.0])
    """
    file = Path(path)
    header, rows = _cells(file)
    if target not in header:
        raise UserError(f"there is no column {target!r}", where=file, cure=nearest(target, header))
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    classes = _classes(columns.pop(target), target, file)
    order = {name: number for number, name in enumerate(classes)}
    y = np.array([order[row[header.index(target)]] for row in rows])
    found: list[np.ndarray] = []
    names: list[str] = []
    left_out: list[str] = []
    sources: list[int] = []
    for number, (name, cells) in enumerate(columns.items()):
        each = _features(name, cells)
        left_out += [] if each else [name]
        names += [n for n, _ in each]
        found += [values for _, values in each]
        sources += [number] * len(each)
    if not found:
        raise UserError("there is no column to learn from", where=file, cure="add columns of numbers")
    return LabelledTable(np.stack(found, 1), y, tuple(names), np.array(sources), classes, target, tuple(left_out))


def _cells(file: Path) -> tuple[list[str], list[list[str]]]:
    if not file.is_file():
        raise UserError("no such file", where=file)
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            separator = max(",;\t", key=first.count)
            lines = [(number, row) for number, row in enumerate(csv.reader(stream, delimiter=separator), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"not a CSV file in UTF-8: {error}", where=file) from error
    if len(lines) < 2:
        raise UserError(f"a table needs a line of names and rows, got {len(lines)} lines", where=file)
    header = [name.strip() for name in lines[0][1]]
    twice = [name for name, count in Counter(header).items() if count > 1 or not name]
    if twice:
        raise UserError(f"each column needs a name of its own, got {twice[0]!r}", where=f"{file}, line 1")
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise UserError(f"a row must have {len(header)} cells, got {len(row)}", where=f"{file}, line {number}")
        for name, cell in zip(header, row, strict=True):
            bad = not cell.strip() or cell.strip().lower() in {"na", "nan", "null", "inf", "-inf"}
            if bad:
                cure = "fill it in, or take the row or the column away"
                raise UserError(f"the column {name!r} has no value", where=f"{file}, line {number}", cure=cure)
    return header, [[cell.strip() for cell in row] for _, row in lines[1:]]


def _classes(cells: Sequence[str], target: str, file: Path) -> tuple[str, ...]:
    counts = Counter(cells)
    where = f"{file}, column {target}"
    if len(counts) < 2:
        raise UserError(f'there is only one class, "{next(iter(counts))}"', where=where, cure="give at least two")
    if len(counts) > MOST_CLASSES:
        cure = "name a column of classes with --target"
        raise UserError(f"there are {len(counts)} classes, more than {MOST_CLASSES}", where=where, cure=cure)
    rare = min(counts, key=lambda name: counts[name])
    if counts[rare] < LEAST_ROWS:
        told = f'class "{rare}" has {counts[rare]} rows, {LEAST_ROWS} are needed'
        raise UserError(told, where=where, cure="add rows of it, or take it away")
    numbers = [_number(name) for name in counts]
    if all(n is not None for n in numbers):
        return tuple(sorted(counts, key=float))
    return tuple(sorted(counts))


def _features(name: str, cells: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    numbers = [_number(cell) for cell in cells]
    if all(number is not None for number in numbers):
        values = np.array(numbers, dtype=np.float64)
        return [] if (values == values[0]).all() else [(name, values)]
    kinds = sorted(set(cells))
    if not 2 <= len(kinds) <= MOST_VALUES:
        return []
    words = np.array(cells)
    told = kinds[1:] if len(kinds) == 2 else kinds
    return [(f"{name}={kind}", (words == kind).astype(np.float64)) for kind in told]


def _number(cell: str) -> float | None:
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
