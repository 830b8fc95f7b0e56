"""Attacks where the answer is known: linear models, boxes, and a network that has a gap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.train.attacks import fgsm, input_gradient, jsma, pgd


def linear(weight, bias=0.0) -> nn.Module:
    """Two classes; the margin of the first is w x + b."""
    model = nn.Linear(len(weight), 2)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.tensor(weight), torch.zeros(len(weight))]))
        model.bias.copy_(torch.tensor([bias, 0.0]))
    return model


def test_a_step_along_the_sign():
    model = linear([1.0, -2.0, 0.5])
    x = torch.tensor([[0.5, 0.5, 0.95]])
    for label, sign in ((0, -1), (1, 1)):
        moved = fgsm(model, x, torch.tensor([label]), 0.1)
        expected = (x + sign * 0.1 * torch.tensor([[1.0, -1.0, 1.0]])).clamp(0, 1)
        assert torch.allclose(moved, expected)


def test_the_gradient_is_that_of_the_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3)).double()
    x, y = torch.rand(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    found = input_gradient(model, x, y)
    assert model.training
    model.eval()

    def loss(each):
        return functional.cross_entropy(model(each), y, reduction="sum").item()

    for place in ((0, 1), (3, 4)):
        step = torch.zeros_like(x)
        step[place] = 1e-6
        slope = (loss(x + step) - loss(x - step)) / 2e-6
        assert slope == pytest.approx(float(found[place]), abs=1e-6)


def test_projected_steps_reach_the_corner_of_a_linear_model():
    model = linear([1.0, -2.0, 0.5], 5.0)
    x = torch.tensor([[0.5, 0.4, 0.6]])
    low, high = x - 0.2, x + 0.2
    moved = pgd(model, x, torch.tensor([0]), low, high, steps=10)
    assert torch.allclose(moved, torch.tensor([[0.3, 0.6, 0.4]]))
    drawn = pgd(model, x, torch.tensor([0]), low, high, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(drawn, moved)


def test_projected_steps_stop_at_the_first_wrong_point():
    model = linear([1.0, 1.0], -0.9)
    x = torch.tensor([[0.5, 0.5], [2.0, 2.0]])
    moved = pgd(model, x, torch.tensor([0, 0]), x - 0.4, x + 0.4, steps=8, step=0.125)
    assert moved[0].tolist() == pytest.approx([0.4, 0.4])
    assert moved[1].tolist() == pytest.approx([1.6, 1.6])


def test_the_saliency_map_takes_the_pair_that_helps_most():
    model = nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, -1.0, 0.0, -1.0], [0.0, 1.0, 0.1, 2.0]]))
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    x = torch.zeros(4)
    moved = jsma(model, x, 0, 0.5)
    # Numbers 1 and 3 raise class 1 and lower class 0: margin 1 - 5 theta after one step.
    assert moved.tolist() == [0.0, 0.5, 0.0, 0.5]
    small = jsma(model, x, 0, 0.1)
    assert small.tolist() == pytest.approx([0.0, 0.3, 0.0, 0.3]) or small.tolist() == pytest.approx(
        [0.0, 0.2, 0.0, 0.2]
    )
    assert int(model(small[None]).argmax()) == 1
    assert torch.equal(jsma(model, x, 0, 0.5, pixels=1), x)


def test_the_saliency_map_gives_up():
    model = linear([0.0, 0.0, 0.0], 1.0)
    x = torch.rand(3)
    assert torch.equal(jsma(model, x, 0, 0.1), x)
    assert torch.equal(jsma(model, torch.ones(3), 0, 0.1), torch.ones(3))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, x, y: fgsm(m, x, y, -0.1), "eps must be >= 0 and finite, got -0.1"),
        (lambda m, x, y: fgsm(m, x, y, math.nan), "eps must be"),
        (lambda m, x, y: pgd(m, x, y, x, x, steps=0), "steps must be >= 1, got 0"),
        (lambda m, x, y: pgd(m, x, y, x, x, step=0.0), "step must be > 0"),
        (lambda m, x, y: jsma(m, x[0], 0, 0.0), "theta must be finite and not 0"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call(linear([1.0, 1.0]), torch.rand(2, 2), torch.tensor([0, 1]))
