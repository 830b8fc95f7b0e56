"""The experiment of gradient noise: verdicts from made-up figures; stacked restarts against separate networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.papers import gradient_noise as paper

SEEDS = 8


def arms():
    """Figures in which every claim holds."""
    values = {
        "small start, no noise": [0.1] * SEEDS,
        "small start, noise": [0.5] * SEEDS,
        "small start, constant noise": [0.4] * SEEDS,
        "He's start, no noise": [0.95] * SEEDS,
        "He's start, noise": [0.951] * SEEDS,
        "zero start, no noise": [0.1] * SEEDS,
        "zero start, noise": [0.6] * 2 + [0.1] * (SEEDS - 2),
    }
    return {name: {"accuracy": each} for name, each in values.items()}


@pytest.mark.parametrize(
    ("name", "values", "key", "verdict"),
    [
        (None, None, "start", "supported"),
        ("small start, no noise", [0.1] * 4 + [0.5] * 4, "start", "not supported"),
        ("small start, noise", [0.19] * 8, "start", "not supported"),
        (None, None, "harmless", "supported"),
        ("He's start, noise", [0.9] * 8, "harmless", "not supported"),
        (None, None, "zero", "supported"),
        ("zero start, noise", [0.4] * 8, "zero", "not supported"),
        ("zero start, no noise", [0.6] * 8, "zero", "not supported"),
        (None, None, "schedule", "supported"),
        ("small start, constant noise", [0.9] * 8, "schedule", "not supported"),
    ],
)
def test_verdicts(name, values, key, verdict):
    figures = arms()
    if name:
        figures[name] = {"accuracy": values}
    assert paper.judge(figures)[key].verdict == verdict


def test_few_restarts_cannot_tell():
    few = {name: {"accuracy": figures["accuracy"][:3]} for name, figures in arms().items()}
    assert paper.judge(few)["start"].verdict == "inconclusive"
    assert set(paper.judge(few)) == {claim.key for claim in paper.CARD.claims}


@pytest.mark.parametrize("std", [0.1, -1.0, 0.0])
def test_stacked_restarts_are_networks_of_their_own(std):
    weights, biases = paper._start(range(3), [6, 5, 5, 4], std)
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 7, 6, generator=draws), torch.randint(4, (3, 7), generator=draws)
    loss = functional.cross_entropy(paper._logits(x, weights, biases).flatten(0, 1), y.flatten(), reduction="sum") / 7
    (100 * loss).backward()
    before = [param.grad.clone() for param in (*weights, *biases)]
    paper._clip([*weights, *biases])
    for r in range(3):
        layers = [nn.Linear(*sizes) for sizes in ((6, 5), (5, 5), (5, 4))]
        for layer, weight, bias in zip(layers, weights, biases, strict=True):
            layer.weight.data, layer.bias.data = weight.detach()[r].T.clone(), bias.detach()[r, 0].clone()
        net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        (100 * functional.cross_entropy(net(x[r]), y[r])).backward()
        for number, layer in enumerate(layers):
            assert torch.allclose(before[number][r], layer.weight.grad.T, atol=1e-4)
        norm = nn.utils.clip_grad_norm_(net.parameters(), paper.CLIP)
        for number, layer in enumerate(layers):
            assert torch.allclose(weights[number].grad[r], layer.weight.grad.T, atol=1e-4)
            assert torch.allclose(biases[number].grad[r, 0], layer.bias.grad, atol=1e-4)
        assert (std == 0.0) or norm > paper.CLIP
    if std < 0:
        assert weights[1].detach().std() == pytest.approx((2 / 5) ** 0.5, rel=0.2)


def test_the_best_setting_is_chosen_on_held_out_images():
    found = {
        "small start, noise, lr 0.1": {"accuracy": [[0.9, 0.9]], "validation accuracy": [[0.2, 0.2]], "eta": [0.01]},
        "small start, noise, lr 0.01": {"accuracy": [[0.3, 0.3]], "validation accuracy": [[0.4, 0.2]], "eta": [0.1]},
    }
    assert paper._best(found, "small start, noise")["accuracy"] == [0.3, 0.3]
