"""Numbers as arguments: what passes, and the one message of what does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from netwright.checks import number, whole


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        ("> 0", [1e-9, 2, np.float32(3)], [0, -1.0]),
        (">= 1", [1, 1.5], [0.999]),
        ("[0, 1)", [0, 0.5], [1, -0.1]),
        ("(0, 1]", [1, 1e-9], [0, 1.1]),
        ("(-1, 1)", [0, -0.99], [-1, 1]),
        ("[0, 2.5]", [0, 2.5], [2.6]),
    ],
)
def test_the_ends_of_a_bound(bound, inside, outside):
    for value in inside:
        number("x", value, bound)
    for value in outside:
        with pytest.raises(ValueError, match=r"^x must (be|lie in) .*, got "):
            number("x", value, bound)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, "1", None, True, [1.0], 1j])
def test_what_is_no_finite_number(value):
    for bound in (">= 0", "[0, 1]"):
        with pytest.raises(ValueError, match=r"^x must"):
            number("x", value, bound)


@pytest.mark.parametrize("value", [1.0, 1.5, "1", None, True, math.inf])
def test_what_is_no_whole_number(value):
    with pytest.raises(ValueError, match=r"^x must be a whole number >= 1, got"):
        whole("x", value, ">= 1")


def test_whole_numbers_have_a_range_too():
    whole("x", np.int64(3), "[0, 3]")
    with pytest.raises(ValueError, match=r"^x must lie in \[0, 3\), got 3$"):
        whole("x", 3, "[0, 3)")
    with pytest.raises(ValueError, match=r"^x must be >= 1, got 0$"):
        whole("x", 0, ">= 1")
