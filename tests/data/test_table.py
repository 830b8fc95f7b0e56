"""CSV files: what is read, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from netwright.console import UserError
from netwright.data.table import read_table

GOOD = "size;colour;code;same;kind\n" + "".join(
    f"{i},5;{('red', 'blue', 'green')[i % 3]};id{i};7;{'cat' if i < 25 else 'dog'}\n".replace(",", ".")
    for i in range(50)
)


def write(tmp_path, text):
    file = tmp_path / "a.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_numbers_and_words(tmp_path):
    found = read_table(write(tmp_path, "\ufeff" + GOOD), "kind")
    assert found.names == ("size", "colour=blue", "colour=green", "colour=red")
    assert found.columns.tolist() == [0, 1, 1, 1]
    assert found.left_out == ("code", "same")
    assert found.classes == ("cat", "dog")
    assert found.y.tolist() == [0] * 25 + [1] * 25
    assert found.X[4].tolist() == [4.5, 1, 0, 0]
    np.testing.assert_array_equal(found.X[:, 1:].sum(1), 1)


def test_two_words_are_one_feature_and_numbers_as_classes_are_in_order(tmp_path):
    text = "a,b,y\n" + "".join(f"{i},{'no' if i % 2 else 'yes'},{(10, 9)[i % 2]}\n" for i in range(20))
    found = read_table(write(tmp_path, text), "y")
    assert found.names == ("a", "b=yes")
    assert found.classes == ("9", "10")


@pytest.mark.parametrize(
    ("text", "target", "told"),
    [
        ("", "y", "a line of names and rows"),
        ("a,y\n", "y", "a line of names and rows"),
        ("a,a,y\n1,2,3\n", "y", "name of its own, got 'a'"),
        ("a,,y\n1,2,3\n", "y", "name of its own"),
        ("a,y\n1,2,3\n", "y", "must have 2 cells, got 3"),
        ("a,y\n1,x\n,z\n", "y", "line 3"),
        ("a,y\nnan,x\n", "y", "has no value"),
        ("a,kind\n1,2\n", "knd", "did you mean kind"),
        ("a,y\n1,x\n2,x\n", "y", "only one class"),
        ("a,y\n" + "1,x\n2,x\n" * 5 + "1,z\n", "y", 'class "z" has 1 rows'),
        ("a,y\n" + "".join(f"1,{i}\n" for i in range(200)), "y", "200 classes"),
        ("a,y\n" + "1,x\n1,z\n" * 6, "y", "no column to learn from"),
        (b"a,y\n\xff\xfe,1\n", "y", "not a CSV file in UTF-8"),
    ],
)
def test_bad_tables(tmp_path, text, target, told):
    with pytest.raises(UserError, match=told):
        read_table(write(tmp_path, text), target)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "none.csv", "y")
