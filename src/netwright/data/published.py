"""Wide tables in the layout in which they were published: signal strengths of an indoor map, gene expression.

The files are yours to fetch; nothing is downloaded here. Both are of the UCI Machine Learning Repository:
Torres-Sospedra et al., "UJIIndoorLoc: A New Multi-building and Multi-floor Database for WLAN Fingerprint-based Indoor
Localization Problems", IPIN 2014 (data set 310), and Fiorini, "Gene expression cancer RNA-Seq", 2016 (data set 401), a
part of The Cancer Genome Atlas.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from netwright.checks import one_of
from netwright.console import UserError
from netwright.data.table import LabelledTable

IndoorTarget = Literal["BUILDINGID", "FLOOR"]
UNHEARD = 100  # how the files write that an access point is out of reach
WEAKEST = -105  # dBm, just below the weakest signal that was received


def load_ujindoorloc(path: str | os.PathLike[str], target: IndoorTarget = "BUILDINGID") -> LabelledTable:
    """Reads ``trainingData.csv`` or ``validationData.csv`` of UJIIndoorLoc.

    A feature is the strength of an access point's signal, from 0 for one that is not heard to 1 for 0 dBm; where the
    phone was (longitude, latitude), who carried it and when are left out, for they would give the answer away.

    Args:
        path: The file.
        target: The building (3 classes) or the floor (5).

    Raises:
        ValueError: If ``target`` is unknown.
        UserError: If the file is not there or is none of these.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "trainingData.csv"
        >>> _ = file.write_text("WAP001,WAP002,LONGITUDE,BUILDINGID\\n100,-63,-7541.2,1\\n-84,100,-7536.6,0\\n")
        >>> table = load_ujindoorloc(file)
        >>> table.X.round(2).tolist(), [table.classes[i] for i in table.y]
        ([[0.0, 0.4], [0.2, 0.0]], ['1', '0'])
    """
    one_of("target", target, get_args(IndoorTarget))
    file = Path(path)
    header = _header(file)
    points = [name for name in header if name.startswith("WAP")]
    if not points or target not in header:
        missing = target if points else "WAP001"
        raise UserError(f"there is no column {missing!r}", where=file, cure="give trainingData.csv of UJIIndoorLoc")
    places = [header.index(name) for name in points]
    values = _numbers(file, [*places, header.index(target)])
    strength, labels = values[:, :-1], values[:, -1]
    heard = strength != UNHEARD
    if not ((strength[heard] > WEAKEST) & (strength[heard] <= 0)).all():
        told = f"a signal must be {UNHEARD} or lie in ({WEAKEST}, 0] dBm"
        raise UserError(f"{told}, got {strength[heard].max():g} and {strength[heard].min():g}", where=file)
    X = np.where(heard, (strength - WEAKEST) / -WEAKEST, 0.0)
    kinds, y = np.unique(labels, return_inverse=True)
    return LabelledTable(
        X=X,
        y=y,
        names=tuple(points),
        columns=np.array(places),
        classes=tuple(f"{kind:g}" for kind in kinds),
        target=target,
        left_out=tuple(name for name in header if name not in (*points, target)),
    )


def load_gene_expression(folder: str | os.PathLike[str]) -> LabelledTable:
    """Reads ``data.csv`` (a row a sample, a column a gene) and ``labels.csv`` (its kind of tumour).

    Expression levels stay as they are; genes that are the same in all samples are left out.

    Args:
        folder: Where both files are.

    Raises:
        UserError: If a file is not there, is none of these, or both do not name the same samples in the same order.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "data.csv").write_text(",gene_0,gene_1\\nsample_0,0.0,2.0\\nsample_1,0.0,0.6\\n")
        >>> _ = (folder / "labels.csv").write_text(",Class\\nsample_0,PRAD\\nsample_1,LUAD\\n")
        >>> table = load_gene_expression(folder)
        >>> table.names, table.X.tolist(), table.classes, table.left_out
        (('gene_1',), [[2.0], [0.6]], ('LUAD', 'PRAD'), ('gene_0',))
    """
    data, labels = Path(folder) / "data.csv", Path(folder) / "labels.csv"
    genes = _header(data)[1:]
    if _header(labels)[1:] != ["Class"]:
        raise UserError("the second of two columns must be 'Class'", where=labels)
    if not genes:
        raise UserError("there is no column of a gene", where=data)
    told = _words(labels, 2)
    samples = [row[0] for row in _words(data, 1)]
    if samples != [row[0] for row in told]:
        raise UserError("the samples must be those of data.csv, in the same order", where=labels)
    values = _numbers(data, range(1, 1 + len(genes)))
    varies = (values != values[:1]).any(0)
    classes = sorted({row[1] for row in told})
    return LabelledTable(
        X=values[:, varies],
        y=np.array([classes.index(row[1]) for row in told]),
        names=tuple(name for name, kept in zip(genes, varies, strict=True) if kept),
        columns=np.flatnonzero(varies) + 1,
        classes=tuple(classes),
        target="Class",
        left_out=tuple(name for name, kept in zip(genes, varies, strict=True) if not kept),
    )


def _header(file: Path) -> list[str]:
    if not file.is_file():
        raise UserError("no such file", where=file)
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            return [name.strip() for name in next(csv.reader(stream), [])]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"not a CSV file in UTF-8: {error}", where=file) from error


def _numbers(file: Path, columns: Sequence[int]) -> np.ndarray:
    """(rows, columns); twenty thousand columns take numpy's reader a few seconds."""
    try:
        found = np.loadtxt(file, delimiter=",", skiprows=1, usecols=columns, ndmin=2, encoding="utf-8-sig")
    except ValueError as error:
        raise UserError(f"not a table of numbers: {error}", where=file) from error
    if not len(found):
        raise UserError("a table needs rows, got none", where=file)
    if not np.isfinite(found).all():
        raise UserError("a number must be finite, got NaN or infinity", where=file)
    return found


def _words(file: Path, count: int) -> list[list[str]]:
    """The first cells of every row."""
    with file.open(newline="", encoding="utf-8-sig") as stream:
        rows = [[cell.strip() for cell in row[:count]] for row in csv.reader(stream) if row][1:]
    short = next((number for number, row in enumerate(rows, 2) if len(row) < count), None)
    if short is not None:
        raise UserError(f"a row must have at least {count} cells", where=f"{file}, line {short}")
    return rows
