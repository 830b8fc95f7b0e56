"""Verdicts over a data set."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from verified import captured, drawn, inputs_of, network, perceptron

from netwright.verify import (
    Network,
    Region,
    few_number_radii,
    robustness_radii,
    robustness_report,
    smt_verify,
    verify_point,
)


def test_counts_and_distances():
    model = captured(1, 4, 12, 3)
    x = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    labels = model.logits(x).argmax(1)
    labels[:3] = (labels[:3] + 1) % 3

    def region(x, label):
        return Region((0, 1, 2, 3), 0.03, 2)

    found = robustness_report(model, (x, labels), region)
    assert (found.inputs, found.wrong) == (20, 3)
    assert found.safe + found.unsafe + found.unknown == 17
    assert found.safe > 0 < found.unsafe
    for i, result in found.results.items():
        assert result.status == verify_point(model, x[i], region(x[i], 0)).status
    assert found.distances == sorted(found.distances)
    assert len(found.distances) == found.unsafe
    assert "unsafe" in str(found)
    line = found.plot().lines[0]
    assert line.get_ydata()[-1] == pytest.approx(found.unsafe / 17)
    with pytest.raises(ValueError, match="as many classes, at least 1, got 2 and 1"):
        robustness_report(model, (x[:2], labels[:1]), region)


def test_results_are_data_and_text():
    found = verify_point(captured(0, 2, 2), torch.tensor([0.5, 0.5]), Region((0,), 5.0, 3))
    told = found.to_dict()
    assert told["status"] in ("safe", "unsafe")
    assert told["witness"] is None or len(told["witness"]) == 2


def test_radii_of_a_linear_network_by_hand():
    """The margin of class 0 is 2 x - 1 + 3 (y - 0.5): the nearest boundary lies at |margin| / 5."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 3.0], [0.0, 0.0]]))
        model.bias.copy_(torch.tensor([-2.5, 0.0]))
    x = torch.tensor([[0.7, 0.6], [0.5, 0.55], [0.2, 0.2]])
    margins = (2 * x[:, 0] + 3 * x[:, 1] - 2.5).abs() / 5
    found = robustness_radii(model, x, model(x).argmax(1))
    for proved, broken, true in zip(found.proved, found.broken, margins.tolist(), strict=True):
        assert true / 2**0.25 - 1e-6 <= proved <= true <= broken + 1e-6
        assert broken <= true * 2**0.25 + 1e-6
    assert "counterexample at" in str(found)


def three(name):
    """A network, three inputs and what it says of them."""
    made = network(name)
    x = torch.stack(inputs_of(made, 6)[1::2])
    return made, x, made.logits(x).argmax(1)


@pytest.mark.parametrize("name", ["perceptron", "branches"])
def test_radii_agree_with_the_exact_engine(name):
    made, x, labels = three(name)
    found = robustness_radii(made, x, labels, largest=1.0, bounds=None)
    for one, label, proved, broken in zip(x, labels.tolist(), found.proved, found.broken, strict=True):
        assert 0 < proved < (broken or math.inf)
        assert smt_verify(made, one - proved, one + proved, label, 30.0).status == "safe"
        if broken is not None:
            assert smt_verify(made, one - broken - 1e-9, one + broken + 1e-9, label, 30.0).status == "unsafe"
    assert any(found.broken)


@pytest.mark.parametrize("name", ["perceptron", "branches"])
def test_the_exact_engine_closes_the_gap(name):
    made, x, labels = three(name)
    before = robustness_radii(made, x, labels, largest=1.0, bounds=None)
    after = robustness_radii(made, x, labels, largest=1.0, bounds=None, solver_timeout=4.0)
    assert before.exact == (False, False, False)
    assert any(after.exact)
    for i in range(3):
        assert after.proved[i] >= before.proved[i]
        assert (after.broken[i] or math.inf) <= (before.broken[i] or math.inf)
        if name == "perceptron" and after.broken[i] is not None:
            assert after.proved[i] < after.broken[i] <= after.proved[i] * 2**0.25 + 1e-9
            assert (
                smt_verify(made, x[i] - after.proved[i], x[i] + after.proved[i], int(labels[i]), 30.0).status == "safe"
            )


def test_few_numbers_on_a_grid_by_hand():
    """The margin of class 0 is 2 x - 1 + 3 (y - 0.5); of one number, y counts most."""
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, 3.0], [0.0, 0.0]]))
        model.bias.copy_(torch.tensor([-2.5, 0.0]))
    x = torch.tensor([[0.75, 0.7], [0.95, 0.9]])  # margins 1.1 and 2.1: y must fall by 0.37, and by 0.7
    labels = torch.tensor([0, 0])
    assert few_number_radii(model, x, labels, 1, 0.5, steps=5) == (pytest.approx(0.4), None)
    both = few_number_radii(model, x, labels, 2, 0.5, steps=5)
    assert both[0] == pytest.approx(0.3)  # 5 r > 1.1
    assert both[1] == pytest.approx(0.5)
    late = few_number_radii(model, x, labels, 2, 0.5, steps=5, timeout=1e-9)
    assert len(late) == 2
    assert all(math.isnan(size) for size in late)
    with pytest.raises(ValueError, match="numbers must be >= 1, got 0"):
        few_number_radii(model, x, labels, 0)
    with pytest.raises(ValueError, match="timeout must be > 0, got 0"):
        few_number_radii(model, x, labels, 1, timeout=0)


def test_radii_without_bounds_or_time():
    x = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    odd = drawn(0, lambda: nn.Sequential(nn.Linear(4, 5), nn.Softplus(), nn.Linear(5, 2)))
    assert robustness_radii(odd, x, odd(x).argmax(1)).proved == (0.0, 0.0, 0.0)
    made = Network(drawn(0, lambda: perceptron(4, 6, 2)), (4,))
    labels = made.logits(x).argmax(1)
    assert robustness_radii(made, x, labels, timeout=1e-9).proved == (0.0, 0.0, 0.0)
    for change, told in (
        ({"labels": 1 - labels}, "one that it does not: 0"),
        ({"labels": labels[:2]}, "as many, at least 1, got 3 and 2"),
        ({"largest": 0.0}, "largest must be > 0 and finite, got 0.0"),
        ({"solver_timeout": -1.0}, "solver_timeout must be >= 0 and finite, got -1"),
        ({"timeout": math.inf}, "timeout must be > 0 and finite, got inf"),
    ):
        with pytest.raises(ValueError, match=told):
            robustness_radii(**{"model": made, "inputs": x, "labels": labels, **change})
