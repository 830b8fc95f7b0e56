"""Accuracies by bias and rates of translation, by hand and by a table."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from netwright.seeding import stream
from netwright.train.debias import bias_metrics, translation_rates


def test_right_on_aligned_alone():
    y = torch.arange(10).repeat_interleave(10).repeat(3)
    bias = torch.arange(10).repeat(10).repeat(3)
    found = bias_metrics(bias, y, bias)
    assert found["unbiased"] == pytest.approx(0.1)
    assert found["worst group"] == 0
    assert (found["aligned"], found["conflicting"]) == (1, 0)
    assert found["accuracy"] == pytest.approx(0.1)


def test_unequal_cells_by_brute_force():
    draws = stream(0, "cells")
    y, bias, pred = torch.randint(4, (3, 500), generator=draws)
    y, bias = y**2 // 3, bias  # classes 0, 1, 3: unequal, one missing
    found = bias_metrics(pred, y, bias)
    chosen = [(y == a) & (bias == b) for a in range(4) for b in range(4)]
    cells = [np.mean((pred == y)[rows].numpy()) for rows in chosen if rows.any()]
    assert found["unbiased"] == pytest.approx(np.mean(cells))
    assert found["worst group"] == pytest.approx(min(cells))
    assert found["aligned"] == pytest.approx(float((pred == y)[y == bias].double().mean()))
    assert found["conflicting"] == pytest.approx(float((pred == y)[y != bias].double().mean()))


def test_what_is_not_there_is_no_number():
    y = torch.tensor([0, 1])
    found = bias_metrics(y, y, y)
    assert math.isnan(found["conflicting"])
    assert found["unbiased"] == found["worst group"] == 1
    nothing = torch.zeros(0, dtype=torch.int64)
    assert all(math.isnan(value) for value in bias_metrics(nothing, nothing, nothing).values())
    assert all(math.isnan(value) for value in translation_rates(y, y, y, y).values())


def test_rates_leave_reconstructions_out():
    y, targets = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 2, 1])
    bias, signal = torch.tensor([1, 0, 2, 0]), torch.tensor([0, 1, 0, 0])
    found = translation_rates(bias, signal, y, targets)
    assert found == pytest.approx({"bias transfer": 2 / 3, "signal kept": 2 / 3, "signal flip": 1 / 3})


@pytest.mark.parametrize("place", [0, 1, 2])
def test_bad_input(place):
    values = [torch.tensor([0, 1])] * 3
    values[place] = torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=f"{('pred', 'y', 'bias')[place]} must be 2 integers"):
        bias_metrics(*values)
    values[place] = torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="integers"):
        bias_metrics(*values)
