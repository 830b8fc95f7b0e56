"""Winsorised gradients, M3 and RM3 against their definitions, SciPy and plain SGD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats.mstats import winsorize
from torch import nn

from netwright.diagnose import MedianOfMeans, RunningMedian, WinsorizedGradients, winsorized_mean
from netwright.diagnose.suppression import median_of_three
from netwright.seeding import seeded, stream

LOSS = nn.CrossEntropyLoss(reduction="none")


def net() -> nn.Module:
    with seeded(0, "net"):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr)


X = torch.randn(12, 4, dtype=torch.float64, generator=stream(0, "x"))
Y = torch.arange(12) % 3


def test_one_of_five():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0])
    assert float(winsorized_mean(values, 20)) == 3
    assert float(winsorized_mean(values, 19.9)) == float(values.mean())
    assert float(winsorized_mean(values, 0)) == float(values.mean())
    assert float(winsorized_mean(values, 49.9)) == 3


@pytest.mark.parametrize(("b", "c"), [(50, 8), (50, 16), (100, 1), (7, 30), (3, 34), (12, 49.9)])
def test_scipy_agrees(b, c):
    G = torch.randn(b, 11, dtype=torch.float64, generator=stream(b, "G"))
    k = int(c * b // 100)
    expected = np.array([winsorize(G[:, i].numpy().copy(), limits=(k / b, k / b)).mean() for i in range(11)])
    assert winsorized_mean(G, c).numpy() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(winsorized_mean(G.T, c, dim=1), winsorized_mean(G, c))


def test_a_winsorised_step_is_that_of_the_matrix():
    model = net()
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    rows = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(LOSS(model(X[i : i + 1]), Y[i : i + 1]).sum(), model.parameters())
                ]
            )
            for i in range(12)
        ]
    )
    loss = WinsorizedGradients(sgd(model), model, LOSS, c=20).step((X, Y))
    assert float(loss) == pytest.approx(float(LOSS(net()(X), Y).mean()))
    after = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    assert torch.allclose(after, start - 0.1 * winsorized_mean(rows, 20), atol=1e-12)
    assert not torch.allclose(after, start - 0.1 * rows.mean(0), atol=1e-6)


def plain_steps(count: int) -> list[torch.Tensor]:
    model = net()
    optimizer = sgd(model)
    for _ in range(count):
        optimizer.zero_grad()
        LOSS(model(X), Y).mean().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def test_without_clipping_it_is_sgd():
    model = net()
    optimizer = WinsorizedGradients(sgd(model), model, LOSS, c=0)
    for _ in range(3):
        optimizer.step((X, Y))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), plain_steps(3), strict=True))


def test_one_wild_example_is_held():
    wild = X.clone()
    wild[0] *= 1000
    moved = []
    for c in (0, 10):
        with seeded(0, "linear"):
            model = nn.Linear(4, 3).double()
        start = model.weight.detach().clone()
        WinsorizedGradients(sgd(model, 1.0), model, LOSS, c).step((wild, Y))
        moved.append(float((model.weight - start).norm().detach()))
    assert moved[0] > 20 > 1 > moved[1] > 0


def test_the_median_of_three_groups():
    assert median_of_three(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([9.0])).item() == 2

    class Weight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x * self.w

    model = Weight()
    x = torch.tensor([[1.0], [2.0], [9.0]])
    MedianOfMeans(sgd(model, 1.0), model, lambda out, _: out[:, 0]).step((x, x))
    assert model.w.item() == -2


def test_groups_are_dealt_anew_and_repeatably():
    def run(seed: int, resume: bool = False) -> torch.Tensor:
        model = net()
        optimizer = MedianOfMeans(sgd(model), model, LOSS, seed)
        optimizer.step((X, Y))
        if resume:
            fresh = MedianOfMeans(sgd(model), model, LOSS, seed)
            fresh.load_state_dict(optimizer.state_dict())
            optimizer = fresh
        optimizer.step((X, Y))
        return torch.nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(run(0), run(0))
    assert torch.equal(run(0), run(0, resume=True))
    assert not torch.equal(run(0), run(1))


def descend(gradients: list[float], resume_at: int | None = None) -> list[float]:
    w = nn.Parameter(torch.zeros(1))
    optimizer, seen = RunningMedian(torch.optim.SGD([w], 1.0)), []
    for number, gradient in enumerate(gradients):
        if number == resume_at:
            state, optimizer = optimizer.state_dict(), RunningMedian(torch.optim.SGD([w], 1.0))
            optimizer.load_state_dict(state)
        w.grad = torch.tensor([gradient])
        before = w.item()
        optimizer.step()
        seen.append(before - w.item())
    return seen


def test_the_running_median_follows_the_majority():
    assert descend([5.0, -5.0, 5.0, -5.0, -5.0]) == [5, 0, 5, -5, -5]
    assert descend([5.0, -5.0, 5.0, -5.0, -5.0], resume_at=3) == [5, 0, 5, -5, -5]
    assert descend([2.0, 2.0, 2.0, 2.0]) == [2, 2, 2, 2]
    assert descend([1.0, 2.0, 9.0]) == [1, 1.5, 2]


def test_the_running_median_remembers_on_the_device_of_its_parameters():
    """A checkpoint is read into main memory wherever the training runs."""
    optimizer = RunningMedian(sgd(nn.Linear(2, 1, device="meta")))
    optimizer.remember({"older": [[torch.zeros(1, 2), None], [torch.ones(1, 2), torch.ones(1)]]})
    older = optimizer.memory()["older"]
    assert [[None if grad is None else grad.device.type for grad in grads] for grads in older] == [
        ["meta", None], ["meta", "meta"],
    ]  # fmt: skip


def test_the_running_median_calls_the_closure():
    model = net()
    optimizer = RunningMedian(sgd(model))

    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(X), Y).mean()
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) == pytest.approx(float(LOSS(net()(X), Y).mean()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(model.parameters(), plain_steps(1), strict=True))
    optimizer.param_groups[0]["lr"] = 0.0
    before = [param.detach().clone() for param in model.parameters()]
    optimizer.step(closure)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def with_nan(make):
    """A step on a batch with a number that is none; the weights stay."""
    model = net()
    before = [param.clone() for param in model.parameters()]
    x = X[:9].clone()
    x[4, 0] = math.nan
    try:
        make(model).step((x, Y[:9]))
    finally:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


def running_with_nan():
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[1.0, math.nan]])
    RunningMedian(sgd(model)).step()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: winsorized_mean(torch.ones(4), 50), r"c must lie in \[0, 50\), in percent, got 50"),
        (lambda: winsorized_mean(torch.ones(4), -1), r"c must lie in \[0, 50\)"),
        (lambda: winsorized_mean(torch.ones(0, 4), 5), r"at least 1 value along axis 0, got shape \(0, 4\)"),
        (lambda: winsorized_mean(torch.tensor([1.0, math.nan, 2.0]), 34), "G must be finite, got NaN .* in 1 places"),
        (lambda: with_nan(lambda model: WinsorizedGradients(sgd(model), model, LOSS)), "G must be finite"),
        (lambda: with_nan(lambda model: MedianOfMeans(sgd(model), model, LOSS)), "gradients must be finite"),
        (lambda: running_with_nan(), "gradients must be finite, got NaN or infinity in 1 places"),
        (lambda: WinsorizedGradients(sgd(net()), net(), LOSS), "no more and no fewer"),
        (lambda: MedianOfMeans(sgd(net()), net(), LOSS, seed=-1), "seed must be an integer >= 0, got -1"),
        (lambda: MedianOfMeans(sgd(net()), net(), LOSS).step((X[:2], Y[:2])), "at least 3 examples, got 2"),
    ],
)
def test_what_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_batch_norm_in_training_is_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="batch norm"):
        WinsorizedGradients(sgd(model), model, LOSS)
