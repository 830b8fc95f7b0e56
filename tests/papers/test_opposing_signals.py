"""The experiment on opposing signals: verdicts from made-up figures, and an arm of each kind."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from netwright.papers import opposing_signals as paper
from netwright.papers import oscillating
from netwright.papers.one_hot import PLANTED_CLASSES, perceptron, planted

SPIKE = {
    "oscillation": -0.9,
    "oscillation, random": 0.3,
    "oscillation, same losses": 0.2,
    "spikes": 10.0,
    "spikes opposed": 9.0,
    "spikes opposed along the step": 10.0,
    "share over even": 5.0,
    "sharpness over limit": 1.1,
    "rise with half a step": -0.01,
    "oscillation, any spike": -0.8,
    "oscillation, random, any spike": 0.2,
    "oscillation, pair alone": -0.9,
}


def arms(arm: str = "", **change: float | None):
    """Figures in which every claim holds, but for those of an arm that are changed."""
    found = {f"toy, eta {eta:g}": dict(oscillating.run_toy(0, eta)) for eta in paper.TOY_RATES}
    found |= {name: dict(SPIKE) for name in paper.WATCHED}
    found["planted"] = {"precision": 0.7}
    late = zip(paper.REMOVALS, (10.0, 7.0, 10.5), strict=True)
    found |= {name: {"late sharpness": value} for name, value in late}
    losses = {"Adam": 0.01, "SGD": 0.03, "SplitSGD": 0.012}
    found |= {name: {"training loss": loss} for name, loss in losses.items()}
    for name, rise in {"SGD": 0.5, "Adam": 0.1, "SplitSGD": 0.2}.items():
        found[name]["rise over loss"] = rise
    found |= {f"remedy, {kind}": {"rise over loss": 0.3} for kind in paper.REMEDIES}
    found["remedy, all images"]["rise over loss"] = 2.0
    if arm:
        found[arm] |= {name.replace("_", " "): value for name, value in change.items()}
    return {name: {metric: [value] * 3 for metric, value in figures.items()} for name, figures in found.items()}


@pytest.mark.parametrize(
    ("arm", "figures", "key", "verdict"),
    [
        ("", {}, "toy", "supported"),
        ("toy, eta 0.01", {"curvature": 39.0}, "toy", "not supported"),
        ("toy, eta 0.055", {"curvature": 37.0}, "toy", "not supported"),
        ("toy, eta 0.1", {"diverged": 0.0}, "toy", "not supported"),
        ("", {}, "oscillation", "supported"),
        ("digits, lr 1", {"oscillation": -0.4}, "oscillation", "not supported"),
        ("digits, lr 0.5", {"oscillation, random": -0.5}, "oscillation", "not supported"),
        ("digits, lr 0.5", {"oscillation": None}, "oscillation", "inconclusive"),
        ("", {}, "not just loss", "supported"),
        ("Fashion-MNIST, lr 0.5", {"oscillation, same losses": -0.7}, "not just loss", "not supported"),
        ("", {}, "slopes", "supported"),
        ("digits, lr 1", {"spikes opposed": 7.0}, "slopes", "not supported"),
        ("digits, lr 1", {"spikes": 0.0}, "slopes", "inconclusive"),
        ("", {}, "slopes along the step", "supported"),
        ("digits, lr 0.5", {"spikes opposed along the step": 7.0}, "slopes along the step", "not supported"),
        ("", {}, "share", "supported"),
        ("digits, lr 1", {"share over even": 2.9}, "share", "not supported"),
        ("", {}, "edge", "supported"),
        ("digits, lr 1", {"sharpness over limit": 1.3}, "edge", "not supported"),
        ("digits, lr 1", {"sharpness over limit": 0.7}, "edge", "not supported"),
        ("", {}, "planted", "supported"),
        ("planted", {"precision": 0.5}, "planted", "not supported"),
        ("planted", {"precision": None}, "planted", "inconclusive"),
        ("", {}, "removal", "supported"),
        ("without the planted", {"late_sharpness": 8.5}, "removal", "not supported"),
        ("without random ones", {"late_sharpness": 8.0}, "removal", "not supported"),
        ("", {}, "half step", "supported"),
        ("digits, lr 1", {"rise with half a step": 0.1}, "half step", "not supported"),
        ("", {}, "optimisers", "supported"),
        ("SplitSGD", {"training_loss": 0.0001}, "optimisers", "not supported"),
        ("SGD", {"training_loss": None}, "optimisers", "inconclusive"),
        ("", {}, "first quarter too", "supported"),
        ("digits, lr 1", {"oscillation, any spike": -0.3}, "first quarter too", "not supported"),
        ("digits, lr 0.5", {"oscillation, random, any spike": -0.6}, "first quarter too", "not supported"),
        ("", {}, "pair alone", "supported"),
        ("digits, lr 1", {"oscillation, pair alone": 0.2}, "pair alone", "not supported"),
        ("", {}, "remedies", "supported"),
        ("remedy, clipping", {"rise_over_loss": 2.5}, "remedies", "not supported"),
        ("remedy, BatchNorm", {"rise_over_loss": 2.5}, "remedies", "not supported"),
        ("remedy, without the planted", {"rise_over_loss": 2.5}, "remedies", "not supported"),
        ("Adam", {"rise_over_loss": 0.6}, "remedies", "not supported"),
        ("remedy, BatchNorm", {"rise_over_loss": None}, "remedies", "inconclusive"),
    ],
)
def test_verdicts(arm, figures, key, verdict):
    assert paper.judge(arms(arm, **figures))[key].verdict == verdict


def test_what_was_not_run_decides_nothing():
    few = {name: figures for name, figures in arms().items() if name.startswith(("toy", "digits, lr 1"))}
    found = paper.judge(few)
    assert set(found) == {claim.key for claim in paper.CARD.claims}
    assert {key for key, verdict in found.items() if verdict.verdict == "inconclusive"} == {
        "planted", "removal", "optimisers", "remedies",
    }  # fmt: skip


def test_a_watched_training():
    found = oscillating.watch(0, "digits", 100, 2.0, 24)
    assert set(SPIKE) <= set(found)
    assert found["spikes"] > 0
    assert found["oscillation"] < found["oscillation, random"]
    assert {"oscillation, any spike", "oscillation, random, any spike", "oscillation, pair alone"} <= set(found)
    assert found["step, any spike"] <= found["step"]
    quiet = oscillating.watch(0, "digits", 100, 1e-3, 4)
    assert quiet["spikes"] == 0
    assert quiet["oscillation"] is None


def test_planted_images_and_training_without_them():
    x, y, chosen = planted(0, 200)
    assert len(chosen) == 4
    assert y[chosen].argmax(1).unique().tolist() == list(PLANTED_CLASSES)
    others = torch.ones(200, dtype=torch.bool)
    others[chosen] = False
    assert x[chosen, 0, 0, 0].min() > 1.5 * x[others].max()
    found = oscillating.find_planted(0, 200, 0.5, 12)
    assert found["precision"] is None or 0 <= found["precision"] <= 1
    assert found["output, planted classes, patch times 1"] != found["output, planted classes, patch times 0"]
    sharp = {kind: oscillating.late_sharpness(0, 200, 0.2, 10, kind)["late sharpness"] for kind in paper.REMOVALS}
    assert len(set(sharp.values())) == 3


@pytest.mark.parametrize("name", ["Adam", "SGD", "SplitSGD"])
def test_an_arm_of_each_optimiser(name):
    found = oscillating.optimise(0, name, 0.01, 1e-3, 200, 12)
    assert 0 < found["training loss"] < 0.2
    assert oscillating.optimise(0, "SGD", 1e9, 0.0, 200, 12)["training loss"] is None


def test_spikes_of_the_first_quarter_count_only_where_it_says_so():
    """Of made-up losses that rise most at step 2 and again at step 9 of 16."""
    from netwright.diagnose import OpposingSignalTracker

    means = [1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    x, _ = oscillating.one_hot_problem("digits", 0, 20)
    tracker = OpposingSignalTracker(perceptron((64, 10), 0), oscillating.squared_error, (x, torch.zeros(20, 10)))
    signs = torch.tensor([1.0, -1.0]).repeat(10)
    for step, mean in enumerate(means):
        tracker.record(step, mean + 0.5 * step % 2 * signs)
    assert oscillating._spikes(tracker) == [2, 9]
    assert oscillating._spikes(tracker, 4) == [9]
    assert oscillating._first_quarter_too(tracker)["step, any spike"] == 2


def test_the_pair_alone_takes_its_share_of_the_step():
    """A linear model: the step of both groups alone is what they add to the step of all examples."""
    from netwright.diagnose import OpposingSignalTracker, full_batch_descent

    x, y = oscillating.one_hot_problem("digits", 0, 60)
    network = perceptron((64, 10), 0)
    tracker = OpposingSignalTracker(network, oscillating.squared_error, (x, y), snapshots=5)
    full_batch_descent(
        network, oscillating.squared_error, (x, y), torch.optim.SGD(network.parameters(), 0.5), 3, tracker=tracker
    )
    report = tracker.report(2, curvature=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = oscillating._pair_alone(tracker, report, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    # Of the squared error of a linear model the Hessian is known: 2 / 10 x x^T for each output, with a bias.
    members = [*report.groups.up, *report.groups.down]
    rows = torch.cat([x[members].flatten(1), torch.ones(len(members), 1)], 1).double()
    top = float(torch.linalg.eigvalsh(rows.T @ rows)[-1]) * 2 / 10 / len(members)
    share = 0.5 * len(members) / 60
    assert found["sharpness over limit, pair alone"] == pytest.approx(top * share / 2, rel=1e-2)


@pytest.mark.parametrize("kind", paper.REMEDIES)
def test_an_arm_of_each_remedy(kind):
    found = oscillating.remedy(0, 200, 0.5, 12, kind)
    assert found["rise over loss"] >= 0
    assert found["last loss"] > 0


def test_rises_after_the_first_quarter():
    found = oscillating._rises([9.0, 10.0, 4.0, 2.0, 3.0, 1.0, 2.0, 2.0])
    assert found == {"rise": 2.0, "rise over loss": 1.5}


def test_gradients_are_clipped_to_the_median_of_their_norms():
    network = torch.nn.Linear(2, 1, bias=False)
    before = oscillating._clipped(network)
    lengths = []
    for step, length in enumerate((1.0, 3.0, 10.0, 2.0)):
        network.weight.grad = torch.tensor([[0.6 * length, 0.8 * length]])
        before(step)
        lengths.append(float(network.weight.grad.norm()))
    assert lengths == pytest.approx([1.0, 2.0, 3.0, 2.0], rel=1e-4)  # medians of 1; 1, 3; 1, 3, 10; 1, 2, 3, 10


def test_batch_norm_is_by_the_batch_and_begins_with_the_same_weights():
    plain, normed = perceptron((64, 8, 10), 0), perceptron((64, 8, 10), 0, norm=True).eval()
    weights = [p for p in normed.parameters() if p.ndim == 2]
    assert all(torch.equal(a, b) for a, b in zip((p for p in plain.parameters() if p.ndim == 2), weights, strict=True))
    x = torch.rand(30, 64, generator=torch.Generator().manual_seed(0))
    (norm,) = [part for part in normed.modules() if isinstance(part, torch.nn.BatchNorm1d)]
    seen = []
    norm.register_forward_hook(lambda *a: seen.append(a[2]))
    normed(x)
    assert seen[0].mean(0).abs().max() < 1e-5
    assert (seen[0].var(0, unbiased=False) - 1).abs().max() < 0.01


def test_a_rate_at_the_end_of_its_grid_is_looked_beyond(tmp_path, monkeypatch):
    """SGD is best at a rate above its grid; SplitSGD's two rates are tuned one after the other."""
    from netwright.papers.run import Run

    def optimise(seed, name, lr, lr_large, images, steps):
        best = {"Adam": 0.003, "SGD": 10.0, "SplitSGD": 3.0}[name]
        return {"training loss": abs(lr / best - 1) + abs(lr_large - 0.1) * (name == "SplitSGD"), "learning rate": lr}

    monkeypatch.setattr(oscillating, "optimise", optimise)
    optimise.__qualname__ = "optimise"
    found = paper._optimised(Run("opposing-signals", seeds=3, out=tmp_path), 200, 5)
    assert found["tuned, Adam"] == {"value": [0.003], "inside the grid": [1.0]}
    assert found["tuned, SGD"] == {"value": [9.0], "inside the grid": [1.0]}
    assert found["tuned, SplitSGD, large step"]["value"] == [0.09]
    assert found["tuned, SplitSGD"] == {"value": [2.7], "inside the grid": [1.0]}
    assert found["SplitSGD"]["learning rate"] == [2.7] * 3


def test_a_rate_with_which_a_seed_diverges_is_cut_to_a_third(tmp_path, monkeypatch):
    from netwright.papers.run import Run

    def optimise(seed, name, lr, lr_large, images, steps):
        diverged = name == "SGD" and seed == 2 and lr > 0.5
        return {"training loss": None if diverged else abs(lr - 1.0), "learning rate": lr}

    monkeypatch.setattr(oscillating, "optimise", optimise)
    optimise.__qualname__ = "optimise"
    found = paper._optimised(Run("opposing-signals", seeds=3, out=tmp_path), 200, 5)
    assert found["tuned, SGD"]["value"] == [1.0]
    assert found["final: SGD 1"]["training loss"] == [0.0, 0.0, None]
    assert found["SGD"]["learning rate"] == [0.33] * 3
    assert not [name for name in found if name.startswith("final: SplitSGD")]


def test_slopes_along_the_step_are_those_of_its_own_first_order_changes():
    """Over a tiny step: a group whose loss falls and one whose loss rises have slopes of opposite signs."""
    from netwright.diagnose import OpposingSignalTracker, full_batch_descent

    x, y = oscillating.one_hot_problem("digits", 0, 60)
    network = perceptron((64, 8, 10), 0)
    tracker = OpposingSignalTracker(network, oscillating.squared_error, (x, y), snapshots=5)
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    full_batch_descent(network, oscillating.squared_error, (x, y), optimizer, 3, tracker=tracker)
    report = tracker.report(1, curvature=False)
    delta = tracker.deltas()[tracker.delta_steps.index(1)]
    opposed = bool(delta[list(report.groups.up)].mean() * delta[list(report.groups.down)].mean() < 0)
    assert oscillating._opposed_along_the_step(tracker, report) is opposed
    same = dataclasses.replace(report, groups=dataclasses.replace(report.groups, up=report.groups.down))
    assert oscillating._opposed_along_the_step(tracker, same) is False


def test_how_well_the_planted_are_fitted():
    x, y, chosen = planted(0, 200)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    with torch.no_grad():
        network[1].weight.zero_()
        network[1].bias.copy_(torch.eye(10)[PLANTED_CLASSES[0]])  # answers the first planted class always
    found = oscillating._fitted(network, x, y, chosen)
    others = torch.ones(200, dtype=torch.bool)
    others[chosen] = False
    assert found["right, planted"] == 0.5
    assert found["loss, planted"] == pytest.approx(0.1)  # 0 or 2 / 10
    assert found["right, others"] == pytest.approx(float((y[others].argmax(1) == PLANTED_CLASSES[0]).float().mean()))


def test_the_patch_is_turned_up_on_images_without_it():
    """Of a linear model that answers class 0 with the brightness of the upper left corner."""
    x, _, chosen = planted(0, 200)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10, bias=False))
    with torch.no_grad():
        network[1].weight.zero_()[0, 0] = 1.0
    found = oscillating._swept(network, x, chosen)
    rise = found["output, planted classes, patch times 1"] - found["output, planted classes, patch times 0"]
    dark, bright = float(x.min()), float(x[chosen, 0, 0, 0].mean())
    assert rise == pytest.approx((bright - dark) / 2, rel=1e-3)  # one of two classes
    half = found["output, planted classes, patch times 0.5"] - found["output, planted classes, patch times 0"]
    assert half == pytest.approx(rise / 2, rel=1e-3)
    assert found["output, other classes, patch times 1"] == 0
