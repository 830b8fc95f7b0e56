"""Full-batch descent against a loop, the replay beyond the edge, single steps anew, and the toy model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netwright.diagnose import (
    OpposingSignalTracker,
    edge_replay,
    feature_sweep,
    full_batch_descent,
    opposing_toy,
    replay_step,
    sharpness,
)
from netwright.diagnose.opposing_signals import edge
from netwright.diagnose.opposing_signals.descent import NoEdgeError
from netwright.seeding import seeded, stream

LOSS = nn.CrossEntropyLoss(reduction="none")
X = torch.randn(40, 6, generator=stream(0, "x"))
Y = torch.arange(40) % 3


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(), nn.Linear(8, 3))


def flat(net: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


@pytest.mark.parametrize("chunk", [2**26, 1000])
def test_descent_is_that_of_a_loop(monkeypatch, chunk):
    monkeypatch.setattr(edge, "CHUNK_BYTES", chunk)
    ours, theirs = network(), network().eval()
    tracker = OpposingSignalTracker(ours, LOSS, (X, Y))
    seen: list[int] = []
    means = full_batch_descent(
        ours,
        LOSS,
        (X, Y),
        torch.optim.SGD(ours.parameters(), 0.5, momentum=0.9),
        5,
        tracker=tracker,
        before=seen.append,
    )
    optimizer = torch.optim.SGD(theirs.parameters(), 0.5, momentum=0.9)
    for mean in means[:-1]:
        loss = LOSS(theirs(X), Y).mean()
        assert mean == pytest.approx(float(loss.detach()), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(flat(ours), flat(theirs), atol=1e-5)
    assert ours.training
    assert tracker.steps == seen == list(range(6))
    assert torch.allclose(tracker.losses().mean(1), torch.tensor(means), atol=1e-6)


def test_the_tracker_costs_no_pass_on_the_same_examples_and_one_on_others(monkeypatch):
    passes = []
    module = "netwright.diagnose.opposing_signals.tracker.probe_losses"
    from netwright.diagnose.opposing_signals.probe import probe_losses

    monkeypatch.setattr(module, lambda *arguments: passes.append(1) or probe_losses(*arguments))
    net = network()
    for probe, expected in (((X, Y), 0), ((X[:20], Y[:20]), 4)):
        tracker = OpposingSignalTracker(net, LOSS, probe)
        full_batch_descent(net, LOSS, (X, Y), torch.optim.SGD(net.parameters(), 0.1), 3, tracker=tracker)
        assert len(passes) == expected
        assert len(tracker.steps) == 4


def test_a_descent_that_diverges_says_so():
    net = nn.Linear(1, 1, bias=False)
    x = torch.ones(10, 1)
    loss = lambda output, _: 0.5 * output[:, 0] ** 4  # noqa: E731
    with torch.no_grad():
        net.weight.fill_(100.0)
    with pytest.raises(FloatingPointError, match=r"the mean loss became (inf|nan) before step \d"):
        full_batch_descent(net, loss, (x, x[:, 0]), torch.optim.SGD(net.parameters(), 10.0), 20)
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        full_batch_descent(net, loss, (x, x[:, 0]), torch.optim.SGD(net.parameters(), 10.0), 0)


def test_the_replay_grows_along_the_sharpest_direction_and_leaves_no_trace():
    """On a quadratic every step multiplies what is left along v by 1 - 2 beyond."""
    x = torch.cat([torch.eye(3) * torch.tensor([3.0, 1.0, 0.5])] * 4)
    y = torch.randn(12, generator=stream(0, "y"))
    net = nn.Linear(3, 1, bias=False)
    net.weight.grad = torch.ones(1, 3)
    before = flat(net)
    loss = lambda output, target: 0.5 * (output[:, 0] - target) ** 2  # noqa: E731
    top, _ = sharpness(net, loss, (x, y))
    assert top == pytest.approx(3.0, rel=1e-3)
    tracker, found, lrs = edge_replay(net, loss, (x, y), steps=6, beyond=1.25, growth=1.0)
    assert found == pytest.approx(top)
    assert lrs == pytest.approx([2.5 / top] * 6)
    assert torch.equal(flat(net), before)
    assert net.weight.grad.tolist() == [[1, 1, 1]]
    means = tracker.losses()[:, ::3].mean(1)  # of the examples that see the sharpest direction
    floor = float((y[::3] - y[::3].mean()).square().mean() / 2)
    growth = (means[1:] - floor) / (means[:-1] - floor)
    assert torch.allclose(growth, torch.full((6,), 1.5**2), rtol=1e-2)


def test_steps_grow_while_the_loss_falls_and_shrink_where_it_rises():
    net, x = nn.Linear(1, 1, bias=False), torch.ones(10, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
    loss = lambda output, _: 0.5 * output[:, 0] ** 2  # noqa: E731
    tracker, _, lrs = edge_replay(net, loss, (x, x[:, 0]), steps=4, beyond=0.9, growth=1.5)
    # On curvature 1 the loss falls with 1.8 and rises with 2.7.
    assert lrs == pytest.approx([1.8, 2.7, 1.8, 2.7])
    assert tracker.interesting_steps("rise") == [1, 3]


def test_what_grew_unseen_while_steps_became_long_does_not_run_away():
    """A long shallow descent beside a sharp direction with next to nothing along it, as in a network that is fitted."""
    net = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1e-6, 1.0]]))
    x = torch.cat([torch.tensor([[100.0, 0.0]]).repeat(5, 1), torch.tensor([[0.0, 0.5]]).repeat(5, 1)])
    loss = lambda output, _: 0.5 * output[:, 0] ** 2  # noqa: E731
    tracker, _, lrs = edge_replay(net, loss, (x, torch.zeros(10)), steps=60)
    means = tracker.losses().mean(1)
    (rise, *_) = tracker.interesting_steps("rise")
    assert max(lrs[: rise + 1]) > 1.5 * lrs[0]
    assert len(means) == 61
    assert means.max() < 10 * means[0]
    pair = tracker.report(rise).groups
    assert set(pair.up) == set(range(5))


def test_what_has_no_edge():
    x = torch.ones(12, 2)
    flat_net = nn.Linear(2, 1)
    with pytest.raises(NoEdgeError, match="sharpness must be > 0, got 0"):
        edge_replay(flat_net, lambda output, _: output[:, 0], (x, x[:, 0]))
    with pytest.raises(NoEdgeError, match="losses must stay finite for 2 steps"):
        edge_replay(flat_net, lambda output, _: output[:, 0] ** 20, (1e1 * x, x[:, 0]), beyond=1e6)
    with pytest.raises(
        ValueError, match="losses must be finite, got NaN or infinity for 12 of 12 before the first step"
    ):
        edge_replay(flat_net, lambda output, _: output[:, 0], (x / 0, x[:, 0]))
    for options, told in (({"steps": 1}, "steps must be >= 2, got 1"), ({"beyond": 0.0}, "beyond must be > 0")):
        with pytest.raises(ValueError, match=told):
            edge_replay(network(), LOSS, (X, Y), **options)


def test_half_a_step_is_the_step_with_half_the_rate():
    net = network()
    tracker = OpposingSignalTracker(net, LOSS, (X, Y), snapshots=20)
    full_batch_descent(net, LOSS, (X, Y), torch.optim.SGD(net.parameters(), 6.0), 8, tracker=tracker)
    groups = tracker.groups(3)
    end = flat(net)
    found = replay_step(tracker, groups, 6.0)
    assert torch.equal(flat(net), end)
    deltas = tracker.deltas()[3]
    assert found.up[0] == pytest.approx(float(deltas[list(groups.up)].mean()), abs=1e-4)
    assert found.all[0] == pytest.approx(float(deltas.mean()), abs=1e-4)
    with tracker.parameters_of(3):
        twin = network()
        nn.utils.vector_to_parameters(flat(net), twin.parameters())
    losses = full_batch_descent(twin, LOSS, (X, Y), torch.optim.SGD(twin.parameters(), 3.0), 1)
    assert found.all[1] == pytest.approx(losses[1] - losses[0], abs=1e-5)
    other = OpposingSignalTracker(net, LOSS, (X, Y), snapshots=0)
    other.record(0)
    other.record(1)
    with pytest.raises(ValueError, match="parameters before step 0 must have been kept"):
        replay_step(other, other.groups(), 1.0)
    for options, told in (
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": 1.0, "factor": 1.0}, r"factor must lie in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=told):
            replay_step(tracker, groups, **options)


def test_a_feature_is_swept():
    net = network()
    direction = torch.randn(6, generator=stream(0, "d"))
    found = feature_sweep(net, X[:3], direction, [-1.0, 0.0, 2.0])
    net.eval()
    assert torch.allclose(found[2], net(X[:3] + 2 * direction))
    assert torch.allclose(found[1], net(X[:3]))
    with pytest.raises(ValueError, match=r"direction must broadcast to an input \(6,\), got \(5,\)"):
        feature_sweep(net, X, torch.ones(5), [1.0])
    with pytest.raises(ValueError, match="at least 1 number, got 0"):
        feature_sweep(net, X, direction, [])


class TestToy:
    def test_one_step_by_hand(self):
        found = opposing_toy(1, 1, eta=0.1, steps=1, c0=1.0, u0=0.5, w0=1.0)
        assert (found.c[1], found.w[1], found.u[1]) == pytest.approx((0.975, 1.0, 0.45))
        assert (found.L_plus[0], found.L_minus[0]) == pytest.approx((0.125, 1.125))
        assert (found.L_plus[0] + found.L_minus[0]) / 2 == pytest.approx(0.125 + 0.5)

    def test_gradients_are_those_of_the_loss(self):
        alpha, beta = 3.0, 2.0
        values = torch.tensor([0.7, 0.4, -0.3], dtype=torch.float64, requires_grad=True)
        c, w, u = values
        loss = 0.5 * (c * w - beta) ** 2 + alpha / 2 * c**2 * u**2 + alpha / 2
        (slope,) = torch.autograd.grad(loss, values)
        found = opposing_toy(alpha, beta, eta=1e-3, steps=1, c0=0.7, u0=-0.3, w0=0.4)
        moved = torch.tensor([found.c[1] - 0.7, found.w[1] - 0.4, found.u[1] + 0.3], dtype=torch.float64)
        assert torch.allclose(moved, -1e-3 * slope, rtol=1e-9)
        assert (found.L_plus[0] + found.L_minus[0]) / 2 == pytest.approx(float(loss.detach()))

    def test_losses_are_those_of_the_linear_network_on_drawn_inputs(self):
        """f = c (w . x_s + w_o . x_o) with the feature in k coordinates, y = beta . x_s + sqrt(alpha)."""
        alpha, k, draws = 3.0, 4, stream(0, "toy")
        x_s = torch.randn(200_000, generator=draws, dtype=torch.float64)
        c, w, w_o = 0.8, 0.5, torch.tensor([0.1, 0.3, -0.2, 0.4], dtype=torch.float64)
        found = opposing_toy(alpha, 2.0, eta=0.1, steps=1, c0=c, u0=float(w_o.sum()) / k**0.5, w0=w)
        for sign, loss in ((1, found.L_plus[0]), (-1, found.L_minus[0])):
            x_o = sign * (alpha / k) ** 0.5 * torch.ones(k, dtype=torch.float64)
            error = c * (w * x_s + float(w_o @ x_o)) - (2.0 * x_s + alpha**0.5)
            assert loss == pytest.approx(float(error.square().mean() / 2), rel=2e-2)

    @pytest.mark.parametrize(
        ("eta", "peak", "curvature"),
        [(0.01, 0.001, 40.0), (0.05, 0.001, 40.0), (0.055, 0.170, 34.2), (0.06, 0.325, 30.8), (0.1, None, None)],
    )
    def test_the_regimes(self, eta, peak, curvature):
        found = opposing_toy(10, 4, eta, 400)
        assert found.diverged == (peak is None)
        if peak is not None:
            assert found.peak == pytest.approx(peak, rel=0.01)
            assert found.curvature[-1] == pytest.approx(curvature, rel=5e-3)
        assert str(found)
        assert found.plot() is not None

    def test_losses_around_the_peak_alternate(self):
        found = opposing_toy(10, 4, 0.06, 400)
        losses = list(zip(found.L_plus, found.L_minus, strict=True))
        wanted = [(1.12, 11.71), (12.70, 0.87), (1.01, 12.36), (10.67, 1.59)]
        assert any(
            all(pair == pytest.approx(other, abs=0.01) for pair, other in zip(losses[i : i + 4], wanted, strict=True))
            for i in range(398)
        )

    def test_without_the_feature_it_stays_in_the_valley(self):
        assert set(opposing_toy(10, 4, 0.08, 300, u0=0.0).u) == {0.0}

    def test_the_limit_separates_the_regimes(self):
        """Whether u has grown in the end, by bisection over the step size."""
        low, high = 0.04, 0.06
        while high / low > 1.002:
            middle = (low + high) / 2
            found = opposing_toy(10, 4, middle, 4000)
            low, high = (low, middle) if found.diverged or found.peak > 2e-3 else (middle, high)
        assert low == pytest.approx(2 / 40, rel=0.02)

    def test_what_gradient_flow_conserves(self):
        def drift(eta, steps):
            found = opposing_toy(10, 4, eta, steps, u0=0.1)
            kept = [c * c - w * w - u * u for c, w, u in zip(found.c, found.w, found.u, strict=True)]
            return max(abs(value - kept[0]) for value in kept)

        assert drift(1e-3, 1000) / drift(5e-4, 2000) == pytest.approx(2, rel=0.1)  # O(eta)
        # Steps of 1e-4 keep it to 1e-4 on a milder problem, whose slopes are of order 1.
        found = opposing_toy(1, 0.5, 1e-4, 5000, c0=0.5, u0=0.1)
        kept = [c * c - w * w - u * u for c, w, u in zip(found.c, found.w, found.u, strict=True)]
        assert max(abs(value - kept[0]) for value in kept) < 1e-4
        # And at the paper's figures, alpha 10 and beta 4, until the signal is learned.
        found = opposing_toy(10, 4, 1e-4, 30_000)
        kept = [c * c - w * w - u * u for c, w, u in zip(found.c, found.w, found.u, strict=True)]
        assert max(abs(value - kept[0]) for value in kept) < 1e-4
        assert found.curvature[-1] == pytest.approx(40, rel=1e-2)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"alpha": 0.0}, "alpha must be > 0"),
            ({"beta": float("inf")}, "beta must be > 0 and finite, got inf"),
            ({"eta": -1.0}, "eta must be > 0"),
            ({"steps": 0}, "steps must be >= 1, got 0"),
            ({"u0": float("nan")}, "u0 must be finite, got nan"),
        ],
    )
    def test_refusals(self, options, told):
        with pytest.raises(ValueError, match=told):
            opposing_toy(**({"alpha": 10.0, "beta": 4.0, "eta": 0.1, "steps": 3} | options))
