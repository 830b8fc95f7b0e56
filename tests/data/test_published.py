"""Published tables: their layout, what is left out, and files that are none of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from netwright.console import UserError
from netwright.data.published import load_gene_expression, load_ujindoorloc

POINTS = [f"WAP{i:03d}" for i in range(1, 521)]
REST = ["LONGITUDE", "LATITUDE", "FLOOR", "BUILDINGID", "SPACEID", "RELATIVEPOSITION", "USERID", "PHONEID", "TIMESTAMP"]


def indoor(folder: Path, rows: int = 12) -> tuple[Path, np.ndarray]:
    """A file of the published layout, and the strengths in it."""
    draws = np.random.default_rng(0)
    strength = np.where(draws.random((rows, 520)) < 0.05, draws.integers(-104, 1, (rows, 520)), 100)
    lines = [",".join([*POINTS, *REST])]
    for number, row in enumerate(strength):
        rest = [-7541.2643, 4864920.7782, number % 5, number % 3, 106, 2, 2, 23, 1371713733]
        lines.append(",".join(map(str, [*row, *rest])))
    file = folder / "trainingData.csv"
    file.write_text("\n".join(lines) + "\n")
    return file, strength


def test_signals_of_the_published_layout(tmp_path: Path):
    file, strength = indoor(tmp_path)
    table = load_ujindoorloc(file)
    assert table.X.shape == (12, 520)
    assert table.names == tuple(POINTS)
    assert table.left_out == tuple(name for name in REST if name != "BUILDINGID")
    assert table.classes == ("0", "1", "2")
    assert table.y.tolist() == [number % 3 for number in range(12)]
    assert (table.X[strength == 100] == 0).all()
    heard = strength != 100
    assert table.X[heard] == pytest.approx((strength[heard] + 105) / 105)
    assert 0 < table.X[heard].min() <= table.X[heard].max() <= 1
    assert load_ujindoorloc(file, "FLOOR").classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("BUILDINGID", "BUILDING", "there is no column 'BUILDINGID'"),
        ("WAP", "AP", "there is no column 'WAP001'"),
        (",100,", ",7,", "a signal must be 100 or lie in"),
        (",100,", ",loud,", "not a table of numbers"),
        (",100,", ",nan,", "must be finite"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, old: str, new: str, message: str):
    file, _ = indoor(tmp_path)
    file.write_text(file.read_text().replace(old, new, 1 if old == ",100," else -1))
    with pytest.raises(UserError, match=message):
        load_ujindoorloc(file)


def test_what_is_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        load_ujindoorloc(tmp_path / "trainingData.csv")
    with pytest.raises(ValueError, match="target must be one of BUILDINGID, FLOOR, got 'SPACEID'"):
        load_ujindoorloc(tmp_path / "trainingData.csv", "SPACEID")  # type: ignore[arg-type]
    (tmp_path / "empty.csv").write_text("WAP001,BUILDINGID\n")
    with pytest.raises(UserError, match="needs rows, got none"), pytest.warns(UserWarning, match="no data"):
        load_ujindoorloc(tmp_path / "empty.csv")


def expression(folder: Path) -> np.ndarray:
    draws = np.random.default_rng(1)
    values = draws.random((6, 40)).round(6) * 12
    values[:, 3] = 0.0
    rows = [f"sample_{i}," + ",".join(map(str, row)) for i, row in enumerate(values)]
    (folder / "data.csv").write_text("\n".join(["," + ",".join(f"gene_{i}" for i in range(40)), *rows]) + "\n")
    kinds = ["PRAD", "LUAD", "BRCA", "KIRC", "COAD", "LUAD"]
    told = [f"sample_{i},{kind}" for i, kind in enumerate(kinds)]
    (folder / "labels.csv").write_text("\n".join([",Class", *told]) + "\n")
    return values


def test_expression_of_genes(tmp_path: Path):
    values = expression(tmp_path)
    table = load_gene_expression(tmp_path)
    assert pytest.approx(np.delete(values, 3, axis=1)) == table.X
    assert table.left_out == ("gene_3",)
    assert table.columns.tolist() == [i for i in range(1, 41) if i != 4]
    assert table.classes == ("BRCA", "COAD", "KIRC", "LUAD", "PRAD")
    assert [table.classes[i] for i in table.y] == ["PRAD", "LUAD", "BRCA", "KIRC", "COAD", "LUAD"]


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("labels.csv", "sample_2", "sample_9", "in the same order"),
        ("labels.csv", "Class", "Kind", "must be 'Class'"),
        ("labels.csv", "sample_5,LUAD", "sample_5", "at least 2 cells"),
        ("data.csv", "sample_1,", "sample_1,x", "not a table of numbers"),
    ],
)
def test_expression_that_does_not_fit(tmp_path: Path, name: str, old: str, new: str, message: str):
    expression(tmp_path)
    file = tmp_path / name
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        load_gene_expression(tmp_path)
