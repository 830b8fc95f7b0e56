"""The experiment on grokking: verdicts from made-up figures, the turning points of a run, and one arm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from netwright.papers import grokking as paper
from netwright.results import History

PLAIN = {
    "test accuracy": 0.98,
    "corrupted accuracy": 0.95,
    "IPR, Sarle's coefficient": 0.8,
    "low IPR pruned, test": 1.0,
    "low IPR pruned, corrupted": 0.0,
    "random pruned, test": 0.5,
    "high IPR pruned, test": 0.05,
    "high IPR pruned, corrupted": 0.97,
    "area, IPR": 0.9,
    "area, weight norm": 0.7,
    "area, mean activation": 0.6,
}
DECAYED = {"test accuracy": 1.0, "grokked at step": 80.0, "unlearned at step": 200.0}


def arms(seeds=3, **change):
    """Figures in which every claim holds; ``change`` names a figure of the last seed, in one arm."""
    found = {
        "weight decay 0": dict(PLAIN),
        "weight decay 5": DECAYED | {"corrupted accuracy": 0.4},
        "weight decay 15": DECAYED | {"corrupted accuracy": 0.0},
        "dropout 0.3": {"test accuracy": 1.0, "corrupted accuracy": 0.5},
        "dropout 0.6": {"test accuracy": 0.99, "corrupted accuracy": 0.05},
        "batch norm": {"test accuracy": 1.0, "corrupted accuracy": 0.02, "scale and IPR, Spearman": 0.7},
        "paper's size": dict(PLAIN),
    }
    lists = {arm: {name: [value] * seeds for name, value in figures.items()} for arm, figures in found.items()}
    for arm, figures in change.items():
        for name, value in figures.items():
            lists[arm.replace("_", " ")][name][-1] = value
    return lists


@pytest.mark.parametrize(
    ("arm", "figures", "key", "verdict"),
    [
        ("weight_decay_0", {}, "coexistence", "supported"),
        ("weight_decay_0", {"test accuracy": 0.94}, "coexistence", "not supported"),
        ("weight_decay_0", {"corrupted accuracy": 0.89}, "coexistence", "not supported"),
        ("weight_decay_0", {"corrupted accuracy": None}, "coexistence", "inconclusive"),
        ("weight_decay_0", {}, "low", "supported"),
        ("weight_decay_0", {"low IPR pruned, test": 0.98}, "low", "not supported"),
        ("weight_decay_0", {"low IPR pruned, corrupted": 0.03}, "low", "not supported"),
        ("weight_decay_0", {}, "random", "supported"),
        ("weight_decay_0", {"random pruned, test": 0.85}, "random", "not supported"),
        ("weight_decay_0", {}, "high", "supported"),
        ("weight_decay_0", {"high IPR pruned, test": 0.3}, "high", "not supported"),
        ("weight_decay_0", {"high IPR pruned, corrupted": 0.8}, "high", "not supported"),
        ("weight_decay_0", {}, "ranking", "supported"),
        ("weight_decay_0", {"area, weight norm": 0.85}, "ranking", "not supported"),
        ("weight_decay_0", {"area, mean activation": 0.85}, "ranking", "not supported"),
        ("weight_decay_0", {}, "bimodal", "supported"),
        ("weight_decay_0", {"IPR, Sarle's coefficient": 0.5}, "bimodal", "not supported"),
        ("weight_decay_5", {}, "decay", "supported"),
        ("weight_decay_5", {"corrupted accuracy": 0.96}, "decay", "not supported"),
        ("weight_decay_15", {"corrupted accuracy": 0.2}, "decay", "not supported"),
        ("weight_decay_15", {"test accuracy": 0.5}, "decay", "not supported"),
        ("weight_decay_15", {"test accuracy": None}, "decay", "inconclusive"),
        ("weight_decay_5", {}, "stages", "supported"),
        ("weight_decay_5", {"unlearned at step": 60.0}, "stages", "not supported"),
        ("weight_decay_5", {"unlearned at step": None}, "stages", "supported"),
        ("dropout_0.3", {}, "dropout", "supported"),
        ("dropout_0.6", {"corrupted accuracy": 0.3}, "dropout", "not supported"),
        ("batch_norm", {}, "batch norm", "supported"),
        ("batch_norm", {"scale and IPR, Spearman": 0.1}, "batch norm", "not supported"),
        ("paper's_size", {}, "paper's size", "supported"),
        ("paper's_size", {"random pruned, test": 0.9}, "paper's size", "not supported"),
    ],
)
def test_verdicts(arm, figures, key, verdict):
    assert paper.judge(arms(**{arm: figures}))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}
    few = {arm: figures for arm, figures in arms(seeds=1).items() if arm.startswith("weight")}
    found = paper.judge(few)
    assert {found[key].verdict for key in ("dropout", "batch norm", "paper's size")} == {"inconclusive"}
    assert found["coexistence"].verdict == "supported"


def test_turning_points():
    def history(test, known):
        return History(
            tuple(
                {"step": 10.0 * at, "test_accuracy": a, "corrupted_accuracy": b}
                for at, (a, b) in enumerate(zip(test, known, strict=True))
            )
        )

    found = paper._turns(history([0.1, 0.5, 0.95, 0.8, 1.0], [0.1, 0.5, 0.8, 0.5, 0.3]))
    assert found == {"grokked at step": 20, "unlearned at step": 40, "corrupted accuracy at best": 0.8}
    found = paper._turns(history([0.1, 0.2], [0.1, 0.9]))
    assert found == {"grokked at step": None, "unlearned at step": None, "corrupted accuracy at best": 0.9}


@pytest.mark.parametrize(
    ("test", "corrupted", "place"),
    [
        ([0.7, 0.991, 1.0], [0.5, 0.02, 0.025], 1),  # the last leads by more, but knows too many wrong labels
        ([0.7, 1.0, 0.995], [0.5, 0.02, 0.0], 2),
        ([0.7, 0.98, 0.9], [0.5, 0.0, 0.0], 1),
        ([0.7, 1.0, 1.0], [0.5, 0.1, 0.05], 2),
    ],
)
def test_some_share_of_pruned_neurons_is_enough(test, corrupted, place):
    assert paper._best(torch.tensor(test).double(), torch.tensor(corrupted).double()) == place


def test_the_published_verdicts_follow_from_the_published_figures():
    stored = json.loads((Path(paper.__file__).parent / "results" / "grokking.json").read_text())
    found = paper.judge(stored["figures"])
    assert {key: verdict.verdict for key, verdict in found.items()} == {
        key: claim["verdict"] for key, claim in stored["claims"].items()
    }
    for arm in ("weight decay 0", "paper's size"):  # the shares that were chosen keep to both bounds
        figures = stored["figures"][arm]
        assert min(figures["low IPR pruned, test"]) >= paper.PRUNED_TEST
        assert max(figures["low IPR pruned, corrupted"]) <= paper.PRUNED_CORRUPTED


def test_coefficient_of_bimodality():
    two = torch.cat([torch.zeros(50), torch.ones(50)]).tolist()
    assert paper._sarle(two) == pytest.approx(1)
    assert paper._sarle(torch.linspace(0, 1, 5001).tolist()) == pytest.approx(5 / 9, abs=1e-4)


def test_an_arm_of_each_kind():
    small = {"p": 7, "width": 12, "steps": 5, "corruption": 0.3}
    plain = paper._train(0, small)
    assert plain == paper._train(0, small)
    assert {name for name in PLAIN if name not in plain} == set()
    assert plain["area, weight norm"] != plain["area, IPR"]
    assert 0 <= plain["area, random"] <= 1
    decayed = paper._train(0, small | {"weight_decay": 5.0})
    assert not any("pruned" in name for name in decayed)
    assert "scale and IPR, Spearman" in paper._train(0, small | {"norm": "bn", "batch_size": 8})
