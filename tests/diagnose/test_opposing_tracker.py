"""The record of a training against losses computed apart, and its report against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from netwright.diagnose import OpposingSignalTracker, gradient_opposition, sharpness
from netwright.diagnose.opposing_signals.probe import as_tensors, probe_losses
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream

LOSS = nn.CrossEntropyLoss(reduction="none")
X = torch.randn(40, 6, generator=stream(0, "x"))
Y = torch.arange(40) % 3


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def train(net, steps=12, lr=1.0, tracker=None, every=1):
    optimizer = torch.optim.SGD(net.parameters(), lr)
    seen, weights = [], []
    for step in range(steps):
        if tracker is not None:
            tracker.record(step)
        seen.append(LOSS(net(X), Y).detach())
        weights.append(nn.utils.parameters_to_vector(net.parameters()).detach().clone())
        optimizer.zero_grad()
        LOSS(net(X), Y).mean().backward()
        optimizer.step()
    if tracker is not None:
        tracker.record(steps)
    seen.append(LOSS(net(X), Y).detach())
    return torch.stack(seen), weights


@pytest.fixture
def watched():
    net = network()
    tracker = OpposingSignalTracker(net, LOSS, (X, Y), snapshots=50)
    losses, weights = train(net, lr=6.0, tracker=tracker)
    return net, tracker, losses, weights


def test_losses_and_changes_are_those_of_the_parameters_before_each_step(watched):
    _, tracker, losses, _ = watched
    assert torch.allclose(tracker.losses(), losses, atol=1e-6)
    deltas = tracker.deltas()
    assert deltas.shape == (12, 40)
    assert torch.allclose(deltas.sum(0), losses[-1] - losses[0], atol=1e-5)  # it telescopes
    assert tracker.delta_steps == list(range(12))
    groups = tracker.groups(step=4)
    order = sorted(range(40), key=lambda i: -float(deltas[4, i]))
    assert groups.up == tuple(order[:5])
    assert groups.down == tuple(reversed(order[-5:]))
    assert groups.labels[0] == {
        label: count for label in range(3) if (count := [int(Y[i]) for i in groups.up].count(label))
    }
    rises = deltas.mean(1)
    assert tracker.groups().step == int(rises.argmax())
    assert rises.max() > 0
    assert set(tracker.interesting_steps("rise")) == {i for i in range(12) if rises[i] > 0}


@pytest.mark.parametrize("probe", ["pair", "data set", "batches"])
def test_kinds_of_data(probe):
    data = {"pair": (X, Y), "data set": TensorDataset(X, Y), "batches": [(X[:7], Y[:7]), (X[7:], Y[7:])]}[probe]
    x, y = as_tensors(data)
    assert torch.equal(x, X)
    assert torch.equal(y, Y)


def test_training_is_the_same_to_the_bit_with_batch_norm_and_dropout():
    def made():
        with seeded(0, "init"):
            return nn.Sequential(SmallConvNet((4,), 0, 8, 1), nn.Dropout(0.5), nn.Linear(8, 3))

    images = torch.randn(20, 1, 4, 4, generator=stream(0, "images"))
    ends = []
    for watch in (False, True):
        net = made()
        tracker = OpposingSignalTracker(net, LOSS, (images, Y[:20])) if watch else None
        with seeded(0, "training"):
            optimizer = torch.optim.SGD(net.parameters(), 0.5)
            for step in range(4):
                optimizer.zero_grad()
                LOSS(net(images), Y[:20]).mean().backward()
                if tracker is not None:
                    tracker.record(step)
                    with tracker.parameters_of(0):
                        pass
                optimizer.step()
        ends.append({**net.state_dict(), "mode": torch.tensor(net.training)})
    assert all(torch.equal(a, b) for a, b in zip(*(end.values() for end in ends), strict=True))


def test_losses_that_training_has_computed_are_taken_over():
    net = network()
    tracker = OpposingSignalTracker(net, LOSS, (X, Y))
    given = torch.rand(40)
    tracker.record(0, given)
    given.zero_()
    assert tracker.losses()[0].min() > 0  # a copy
    with pytest.raises(ValueError, match=r"losses must hold 40 numbers, got shape \(3,\)"):
        tracker.record(1, torch.rand(3))


def test_both_sides_of_steps_far_apart():
    net = network()
    tracker = OpposingSignalTracker(net, LOSS, (X, Y), every=5, snapshots=9)
    losses, _ = train(net, tracker=tracker)
    assert tracker.steps == [0, 1, 5, 6, 10, 11]
    assert tracker.delta_steps == [0, 5, 10]
    assert torch.allclose(tracker.deltas(), torch.stack([losses[i + 1] - losses[i] for i in (0, 5, 10)]), atol=1e-6)
    assert set(tracker.snapshot_steps) == {0, 5, 10}
    report = tracker.report(5, window=5, n_random=10)
    assert report.steps == (0, 5, 10)
    assert math.isnan(report.alternation)
    with pytest.raises(ValueError, match=r"step must be one of the 3 recorded in 0\.\.10, got 1"):
        tracker.groups(1)


def test_a_ring_keeps_the_last_records():
    net = network()
    tracker = OpposingSignalTracker(net, LOSS, (X, Y), capacity=4, snapshots=9)
    losses, _ = train(net, tracker=tracker)
    assert tracker.steps == [9, 10, 11, 12]
    assert torch.allclose(tracker.losses(), losses[9:], atol=1e-6)
    assert min(tracker.snapshot_steps) >= 9


def test_parameters_of_the_largest_rises_are_kept(watched):
    net, tracker, _, weights = watched
    end = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    for step in (0, 7):
        with tracker.parameters_of(step) as known:
            assert known
            assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), weights[step])
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), end)
    with pytest.raises(RuntimeError), tracker.parameters_of(3):
        raise RuntimeError
    assert torch.equal(nn.utils.parameters_to_vector(net.parameters()), end)
    one = OpposingSignalTracker(network(), LOSS, (X, Y))
    train(one.model, lr=6.0, tracker=one)
    assert one.snapshot_steps == (one.groups().step,)


def test_the_report_is_that_of_loops(watched):
    _, tracker, losses, weights = watched
    report = tracker.report(window=3, n_random=50)
    step, groups = report.step, report.groups
    deltas = (losses[1:] - losses[:-1])[max(0, step - 3) : step + 4]
    up, down = deltas[:, list(groups.up)].mean(1), deltas[:, list(groups.down)].mean(1)
    assert report.pair.oscillation == pytest.approx(float(torch.corrcoef(torch.stack([up, down]))[0, 1]), abs=1e-4)
    change = losses[step + 1] - losses[step]
    members = [*groups.up, *groups.down]
    assert report.pair.share == pytest.approx(float(change[members].abs().sum() / change.abs().sum()), rel=1e-4)
    assert report.even_share == 0.25
    twin = network()
    nn.utils.vector_to_parameters(weights[step], twin.parameters())
    batches = [tracker.examples(group) for group in (groups.up, groups.down)]
    assert report.pair.gradient_cosine == pytest.approx(gradient_opposition(twin, LOSS, *batches), abs=1e-5)
    top, direction = sharpness(twin, LOSS, (X, Y))
    assert report.sharpness == pytest.approx(top, rel=1e-4)
    product = gradient_opposition(twin, LOSS, *batches, direction)
    assert report.pair.slope_product == pytest.approx(product, rel=1e-2)
    assert report.pair.opposed == float(product < 0)
    assert report.random.pairs == report.matched.pairs == 50
    assert report.random.share == pytest.approx(0.25, abs=0.05)
    assert report.pair.share > report.random.share
    assert len(report.curves["up"]) == len(report.steps) + 1
    assert report.curves["all"][0] == pytest.approx(float(losses[report.steps[0]].mean()), rel=1e-5)
    assert tracker.report(window=3, n_random=50) == report
    assert "up and down" in str(report)
    assert len(report.plot().lines) == 4


def test_without_the_parameters_there_are_no_gradients():
    net = network()
    tracker = OpposingSignalTracker(net, LOSS, (X, Y), snapshots=0)
    train(net, tracker=tracker)
    report = tracker.report(n_random=5)
    assert math.isnan(report.pair.gradient_cosine)
    assert math.isnan(report.sharpness)
    assert -1 <= report.pair.oscillation <= 1
    assert report.to_dict()["sharpness"] is None


def test_two_groups_that_share_a_feature_and_need_opposite_outputs_are_found():
    """Twelve of 200 examples carry a large feature, half of them with either answer: beyond the edge they swing."""
    draws = stream(0, "opposed")
    x = 0.2 * torch.randn(200, 5, generator=draws)
    y = (x[:, 0] > 0).float()
    x[:12, 4], y[:6], y[6:12] = 6.0, 0.0, 1.0
    with seeded(0, "init"):
        net = nn.Linear(5, 1)
    loss = lambda output, target: (output[:, 0] - target).square()  # noqa: E731
    top, direction = sharpness(net, loss, (x, y))
    assert direction.abs().argmax() == 4
    tracker = OpposingSignalTracker(net, loss, (x, y), labels=y.long())
    optimizer = torch.optim.SGD(net.parameters(), 2.04 / top)
    for step in range(30):
        optimizer.zero_grad()
        loss(net(x), y).mean().backward()
        tracker.record(step)
        optimizer.step()
    report = tracker.report(20, k=0.03)
    assert {*report.groups.up, *report.groups.down} == set(range(12))
    assert sorted(map(tuple, (table for table in report.groups.labels))) == [(0,), (1,)]
    assert report.pair.oscillation < -0.95
    assert report.random.oscillation > report.pair.oscillation + 0.5
    assert report.alternation == 1
    assert math.isnan(report.pair.slope_product)
    x_rest, _ = tracker.rest(report.groups.up, report.groups.down)
    assert torch.equal(x_rest, x[12:])


def test_a_state_is_taken_up(watched):
    _, tracker, _, _ = watched
    other = OpposingSignalTracker(network(), LOSS, (X, Y))
    other.load_state_dict(tracker.state_dict())
    assert torch.equal(other.deltas(), tracker.deltas())
    other.record(20)
    assert other.delta_steps == tracker.delta_steps
    with pytest.raises(ValueError, match="must be of 20 examples, got 40"):
        OpposingSignalTracker(network(), LOSS, (X[:20], Y[:20])).load_state_dict(tracker.state_dict())


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: OpposingSignalTracker(network(), LOSS, (X[:9], Y[:9])), "10 examples, for two groups of 5, got 9"),
        (lambda: OpposingSignalTracker(network(), LOSS, (X[:0], Y[:0])), "at least 10 examples"),
        (lambda: OpposingSignalTracker(network(), LOSS, []), "at least 1 batch, got 0"),
        (lambda: OpposingSignalTracker(network(), LOSS, (X, Y[:3])), "as many inputs as targets, got 40 and 3"),
        (lambda: OpposingSignalTracker(network(), LOSS, (X, Y), every=0), "every must be >= 1, got 0"),
        (lambda: OpposingSignalTracker(network(), LOSS, (X, Y), capacity=1), "capacity must be >= 2, got 1"),
        (lambda: OpposingSignalTracker(network(), LOSS, (X, Y), labels=Y[:3]), "labels must hold 40 numbers"),
        (lambda: OpposingSignalTracker(network(), nn.CrossEntropyLoss(), (X, Y)).record(0), "one loss for each of 40"),
        (lambda: OpposingSignalTracker(network(), LOSS, (X, Y)).groups(), "both sides of a step, got 0 records"),
        (lambda: OpposingSignalTracker(network(), LOSS, (X / 0, Y)).record(3), "infinity for 40 of 40 at step 3"),
    ],
)  # fmt: skip
def test_what_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"step": 12}, r"step must be one of the 12 recorded in 0\.\.11, got 12"),
        ({"k": 0.0}, "k must lie in"),
        ({"window": 0}, "window must be >= 1, got 0"),
        ({"n_random": 0}, "n_random must be >= 1, got 0"),
    ],
)
def test_reports_that_are_refused(watched, options, told):
    _, tracker, _, _ = watched
    with pytest.raises(ValueError, match=told):
        tracker.report(**options)
    with pytest.raises(ValueError, match="step must be > 12, the last one recorded, got 12"):
        tracker.record(12)


def test_probe_losses_in_chunks_are_those_of_one_pass(monkeypatch):
    monkeypatch.setattr("netwright.diagnose.opposing_signals.probe.CHUNK", 7)
    net = network()
    assert torch.allclose(probe_losses(net, LOSS, X, Y), LOSS(net(X), Y).detach(), atol=1e-6)
