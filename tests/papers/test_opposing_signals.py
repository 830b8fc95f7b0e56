"""The experiment on opposing signals: verdicts from made-up figures, and an arm of each kind."""

from __future__ import annotations

import pytest
import torch

from netwright.papers import opposing_signals as paper
from netwright.papers.one_hot import PLANTED_CLASSES

SPIKE = {
    "oscillation": -0.9,
    "oscillation, random": 0.3,
    "oscillation, same losses": 0.2,
    "spikes": 10.0,
    "spikes opposed": 9.0,
    "share over even": 5.0,
    "sharpness over limit": 1.1,
    "rise with half a step": -0.01,
}


def arms(arm: str = "", **change: float | None):
    """Figures in which every claim holds, but for those of an arm that are changed."""
    found = {f"toy, eta {eta:g}": dict(paper._run_toy(0, eta)) for eta in paper.TOY_RATES}
    found |= {name: dict(SPIKE) for name in paper.WATCHED}
    found["planted"] = {"precision": 0.7}
    late = zip(paper.REMOVALS, (10.0, 7.0, 10.5), strict=True)
    found |= {name: {"late sharpness": value} for name, value in late}
    losses = {"Adam": 0.01, "SGD": 0.03, "SplitSGD": 0.012}
    found |= {name: {"training loss": loss} for name, loss in losses.items()}
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
    ],
)
def test_verdicts(arm, figures, key, verdict):
    assert paper.judge(arms(arm, **figures))[key].verdict == verdict


def test_what_was_not_run_decides_nothing():
    few = {name: figures for name, figures in arms().items() if name.startswith(("toy", "digits, lr 1"))}
    found = paper.judge(few)
    assert set(found) == {claim.key for claim in paper.CARD.claims}
    assert {key for key, verdict in found.items() if verdict.verdict == "inconclusive"} == {
        "planted", "removal", "optimisers",
    }  # fmt: skip


def test_a_watched_training():
    found = paper._watch(0, "digits", 100, 2.0, 24)
    assert set(SPIKE) <= set(found)
    assert found["spikes"] > 0
    assert found["oscillation"] < found["oscillation, random"]
    quiet = paper._watch(0, "digits", 100, 1e-3, 4)
    assert quiet["spikes"] == 0
    assert quiet["oscillation"] is None


def test_planted_images_and_training_without_them():
    x, y, chosen = paper.planted(0, 200)
    assert len(chosen) == 4
    assert y[chosen].argmax(1).unique().tolist() == list(PLANTED_CLASSES)
    others = torch.ones(200, dtype=torch.bool)
    others[chosen] = False
    assert x[chosen, 0, 0, 0].min() > 1.5 * x[others].max()
    found = paper._find_planted(0, 200, 0.5, 12)
    assert found["precision"] is None or 0 <= found["precision"] <= 1
    sharp = {kind: paper._late_sharpness(0, 200, 0.2, 10, kind)["late sharpness"] for kind in paper.REMOVALS}
    assert len(set(sharp.values())) == 3


@pytest.mark.parametrize("name", ["Adam", "SGD", "SplitSGD"])
def test_an_arm_of_each_optimiser(name):
    found = paper._optimise(0, name, 0.01, 1e-3, 200, 12)
    assert 0 < found["training loss"] < 0.2
    assert paper._optimise(0, "SGD", 1e9, 0.0, 200, 12)["training loss"] is None
