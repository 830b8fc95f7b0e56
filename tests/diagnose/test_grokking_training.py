"""Phases, the plain loop against Lightning's and against a loop on one-hot inputs, and networks that grok."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from netwright.diagnose.grokking import (
    PHASES,
    SETTINGS,
    IPRCallback,
    ModularConfig,
    ModularRegressor,
    PairBatches,
    classify_phase,
    measure,
    memorising_neurons,
    neuron_ipr,
    one_hot_mse,
    one_hot_pairs,
    pruning_curve,
    train_modular,
)
from netwright.diagnose.grokking import callbacks as watching
from netwright.train import fit

SMALL = ModularConfig(p=11, width=24, corruption=0.2, weight_decay=2.0, steps=12)


@pytest.mark.parametrize(
    ("accuracies", "phase"),
    [
        ((1.0, 0.1, 1.0), "memorization"),
        ((0.9, 0.4999, 0.9), "memorization"),
        ((1.0, 0.9, 0.9), "coexistence"),
        ((0.85, 1.0, 0.5), "partial inversion"),
        ((0.65, 1.0, 0.1), "full inversion"),
        ((0.65, 1.0, 0.1001), "partial inversion"),
        ((0.3, 0.4, 0.0), "forgetting"),
        ((0.95, 0.7, 0.9), "forgetting"),
        ((1.0, 0.9, math.nan), "generalization"),
        ((0.9, 0.1, math.nan), "memorization"),
        ((0.5, 0.1, math.nan), "confusion"),
        ((1.0, 0.89, math.nan), "confusion"),
    ],
)
def test_phases(accuracies, phase):
    assert classify_phase(*accuracies) == phase
    assert phase in PHASES


@pytest.mark.parametrize("values", [(-0.1, 1, 1), (1, 1.01, 1), (1, math.nan, 1), (math.nan, 1, 1), (1, 1, 2)])
def test_bad_accuracies(values):
    with pytest.raises(ValueError, match=r"_acc must lie in \[0, 1\], got"):
        classify_phase(*values)


def test_the_loss_is_that_of_torch():
    output = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2, 2, 1, 3])
    one_hot = nn.functional.one_hot(target, 5).double()
    expected = nn.functional.mse_loss(output, one_hot)
    assert one_hot_mse(output, target).item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(loss, output)[0] for loss in (one_hot_mse(output, target), expected))
    assert torch.allclose(ours, theirs, atol=1e-15)
    with pytest.raises(ValueError, match=r"target must be 6 labels, got shape \(4,\)"):
        one_hot_mse(output, target[:4])


@pytest.mark.parametrize(
    "changes",
    [{}, {"dropout": 0.3}, {"norm": "bn"}, {"batch_size": 16, "norm": "bn", "dropout": 0.2}],
    ids=["full batch", "dropout", "batch norm", "small batches"],
)
def test_the_plain_loop_does_what_lightning_does(changes):
    config = dataclasses.replace(SMALL, **changes)
    batches = PairBatches(config.data("train"), config.batch_size, config.seed)
    module = ModularRegressor(config)
    fit(module, batches, epochs=config.steps // len(batches), seed=config.seed)
    model = config.model()
    train_modular(config, model)
    for name, value in module.network.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_plain_loop_does_what_a_loop_on_one_hot_inputs_does():
    config = dataclasses.replace(SMALL, steps=6)
    ours, theirs = config.model().double(), config.model().double()
    history = train_modular(config, ours)
    data = config.data("train")
    x, y = one_hot_pairs(data.pairs, 11).double(), nn.functional.one_hot(data.targets, 11).double()
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=2.0)
    for _ in range(6):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(theirs.fc2(theirs.fc1(x).square()), y)
        loss.backward()
        optimizer.step()
    assert history.last["train_loss"] == pytest.approx(loss.item(), rel=1e-9)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_what_is_recorded():
    history = train_modular(dataclasses.replace(SMALL, steps=25), log_every=10)
    assert history.column("step") == [10, 20, 25]
    model = SMALL.model()
    train_modular(SMALL, model)
    found = measure(model, SMALL.data())
    again = train_modular(SMALL, log_every=100)
    assert {name: again.last[name] for name in found} == found
    assert again.phase == classify_phase(*(found[f"{name}_accuracy"] for name in ("train", "test", "corrupted")))
    assert [line.get_label() for line in history.plot().lines] == ["training labels", "test", "corrupted labels"]
    clean = train_modular(dataclasses.replace(SMALL, corruption=0.0, steps=2))
    assert [line.get_label() for line in clean.plot().lines] == ["training labels", "test"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0 and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be > 0 and finite, got nan"),
        ({"weight_decay": -1}, "weight_decay must be >= 0 and finite, got -1"),
        ({"weight_decay": math.inf}, "weight_decay must be >= 0 and finite, got inf"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        ModularConfig(**changes)


def test_bad_runs():
    with pytest.raises(ValueError, match="log_every must be >= 1, got 0"):
        train_modular(SMALL, log_every=0)
    with pytest.raises(ValueError, match=r"batch_size must lie in 1..60, got 61"):
        train_modular(dataclasses.replace(SMALL, batch_size=61))
    with pytest.raises(FloatingPointError, match="the loss became nan at step"):
        train_modular(dataclasses.replace(SMALL, lr=1e30, steps=20))


def test_settings_are_those_of_the_table():
    table = {
        "grokking": (0.5, 0, 5, 100),
        "coexistence": (0.5, 0.35, 0, 1000),
        "partial inversion": (0.5, 0.35, 5, 500),
        "full inversion": (0.5, 0.35, 15, 500),
        "forgetting": (0.5, 0.35, 20, 5000),
        "batch norm": (0.65, 0.2, 0, 8000),
        "mini-batch": (0.65, 0.2, 0, 64_000),
    }
    assert {
        name: (found.train_frac, found.corruption, found.weight_decay, found.steps) for name, found in SETTINGS.items()
    } == table
    assert {(found.p, found.width) for found in SETTINGS.values()} == {(97, 500)}
    assert SETTINGS["batch norm"].lr == pytest.approx(0.005)


def test_the_callback_logs_what_the_functions_give():
    watch = IPRCallback(SMALL.data(), every=2)
    module = ModularRegressor(SMALL)
    history = fit(module, PairBatches(SMALL.data("train")), epochs=4, callbacks=[watch])
    means = history.column("ipr/mean")
    assert math.isnan(means[0])
    assert means[1] == means[2] != means[3]  # the Trainer keeps the last figure
    ipr = neuron_ipr(module.network)
    assert history.last["ipr/mean"] == pytest.approx(float(ipr.mean()))
    for share, name in ((0.1, "q10"), (0.5, "q50"), (0.9, "q90")):
        assert history.last[f"ipr/{name}"] == pytest.approx(float(ipr.quantile(share)))
    found = measure(module.network, SMALL.data())
    assert {name: history.last[name] for name in found} == pytest.approx(found)
    assert PHASES[int(history.last["phase"])] == watch.phase
    assert module.network.training
    alone = IPRCallback(quantiles=())
    assert (
        "phase" not in fit(ModularRegressor(SMALL), PairBatches(SMALL.data("train")), epochs=1, callbacks=[alone]).last
    )


def test_looks_become_rarer_the_more_they_are_worth(monkeypatch):
    """By default the first epoch is looked at, then each in which 8 times the examples of a look were trained on."""
    examples = len(SMALL.data("train"))
    monkeypatch.setattr(watching, "LOOK", examples // 4 - 1)
    watch = IPRCallback()
    history = fit(ModularRegressor(SMALL), PairBatches(SMALL.data("train")), epochs=5, callbacks=[watch])
    means = history.column("ipr/mean")
    assert len(set(means)) == 3  # of epochs 1, 2 and 4
    assert means[1] == means[2] != means[3] == means[4]
    few = IPRCallback(SMALL.data())
    fit(ModularRegressor(SMALL), PairBatches(SMALL.data("train"), 16), epochs=4, callbacks=[few])
    assert few._cadence == math.ceil(8 * (examples // 4 - 1 + len(SMALL.data())) / (16 * (examples // 16)))


def test_the_callback_refuses():
    for options, message in (
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"quantiles": [1.5]}, r"quantiles must lie in \[0, 1\], got \(1.5,\)"),
        ({"r": 1}, "r must be >= 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            IPRCallback(**options)
    other = nn.Sequential(nn.Linear(22, 11))
    with pytest.raises(ValueError, match="must hold 2 linear layers, got 1"):
        fit(ModularRegressor(SMALL, other), PairBatches(SMALL.data("train")), epochs=1, callbacks=[IPRCallback()])


def test_memory_and_rule_live_in_different_neurons():
    """The paper in small: both at once, and what is left without the neurons of either kind."""
    config = ModularConfig(p=41, width=200, train_frac=0.7, corruption=0.2, steps=300)
    model, data = config.model(), config.data()
    history = train_modular(config, model)
    assert history.phase == "coexistence"
    low = pruning_curve(model, data, "low", [130])
    assert float(low["corrupted"][0]) < 0.1
    assert float(low["test"][0]) > 0.95
    high = pruning_curve(model, data, "high", [60])
    assert float(high["test"][0]) < 0.5
    assert float(high["corrupted"][0]) > 0.8
    found = memorising_neurons(model, data)
    assert found.phase == "coexistence"
    assert found.before["corrupted"] - found.without["corrupted"] > 0.5
    decayed = train_modular(dataclasses.replace(config, weight_decay=15.0))
    assert decayed.phase == "full inversion"
