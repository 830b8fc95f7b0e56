"""The experiment on surrogates: verdicts from made-up figures, and its parts."""

from __future__ import annotations

import numpy as np
import pytest

from netwright.papers import black_box_surrogate as paper

JITTER = (-0.002, 0.0, 0.002)


def arms(**change):
    """Figures in which every claim holds; ``change`` names a figure of the top features, or ``ARM: METRIC``."""
    top = {
        "tree agreement": 0.75, "tree R2": 0.6, "tree accuracy": 0.72, "forest agreement": 0.9, "forest R2": 0.88,
        "comprehensiveness": 0.5, "recall": 0.9,
    }  # fmt: skip
    low = {"tree agreement": 0.63, "forest agreement": 0.82, "comprehensiveness": 0.1}
    other = {"tree agreement": 0.7, "forest agreement": 0.88, "comprehensiveness": 0.4}
    each = {"top": top, "random": low, "variance": other, "information": other}
    each |= {name: {"accuracy": 0.9} for name in ("black box", "boosting")} | {"tree on labels": {"accuracy": 0.72}}
    found = {f"{name}, {arm}": dict(figures) for name in ("planted", *paper.REAL) for arm, figures in each.items()}
    for key, value in change.items():
        arm, _, metric = key.rpartition(": ")
        for name, figures in found.items():
            if name.endswith(f", {arm or 'top'}"):
                figures[metric] = value
    return {arm: {k: [v + j for j in JITTER] for k, v in figures.items()} for arm, figures in found.items()}


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "top", "supported"),
        ({"tree agreement": 0.7}, "top", "not supported"),
        ({"forest agreement": 0.85}, "top", "not supported"),
        ({}, "selection", "supported"),
        ({"variance: tree agreement": 0.76}, "selection", "not supported"),
        ({"information: tree agreement": 0.76}, "selection", "supported"),
        ({"information: forest agreement": 0.93}, "selection", "not supported"),
        ({}, "agreement", "supported"),
        ({"forest agreement": 0.84}, "agreement", "not supported"),
        ({"forest R2": 0.6}, "agreement", "not supported"),
        ({}, "planted", "supported"),
        ({"recall": 0.7}, "planted", "not supported"),
        ({"recall": 0.7, "black box: accuracy": 0.8}, "planted", "inconclusive"),
        ({}, "faithful", "supported"),
        ({"comprehensiveness": 0.25}, "faithful", "not supported"),
        ({}, "accuracy", "supported"),
        ({"black box: accuracy": 0.88}, "accuracy", "not supported"),
        ({}, "published", "supported"),
        ({"forest R2": 0.8}, "published", "not supported"),
        ({}, "labels", "supported"),
        ({"tree accuracy": 0.7}, "labels", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict_also_where_arms_are_missing():
    keys = {claim.key for claim in paper.CARD.claims}
    assert set(paper.judge(arms())) == keys
    few = {
        name: {k: v for k, v in figures.items() if not k.startswith("forest")}
        for name, figures in arms().items()
        if name.startswith("MNIST") and name.endswith(("top", "random", "black box"))
    }
    found = paper.judge(few)
    assert set(found) == keys
    assert found["top"].verdict == "supported"
    assert {k for k in keys if found[k].verdict == "inconclusive"} == keys - {"top", "faithful"}


def test_the_planted_rows_are_those_of_make_classification():
    X, y, X_test, y_test = paper._data("planted", 1, (200, 30))
    assert X.shape == (140, 30)
    assert X_test.shape == (60, 30)
    assert abs(np.concatenate([y, y_test]).mean() - 0.5) < 0.1


@pytest.mark.parametrize("kind", ["SAN", "CAE"])
def test_other_black_boxes_run(kind):
    found = paper._trial(0, "planted", kind, [200, 20], 15, True)
    assert "black box: learned" not in found
    assert {"black box: accuracy", "top: tree agreement", "random: comprehensiveness"} <= set(found)
    assert "variance: tree agreement" not in found


def test_all_selections_and_rivals_of_a_full_trial(monkeypatch):
    monkeypatch.setattr(paper, "GRID", (5,))
    monkeypatch.setattr(paper, "DRAWS", 1)
    monkeypatch.setattr("netwright.explain.tabular.models.TREES", 4)
    monkeypatch.setattr("netwright.explain.tabular.models.TREES_FOR_TUNING", 2)
    found = paper._trial(0, "planted", "dense", [120, 20], 3, False)
    for label in ("top", "random", "variance", "information"):
        for metric in ("tree agreement", "forest agreement", "forest R2", "sufficiency"):
            assert f"{label}: {metric}" in found
    assert {"boosting: accuracy", "tree on labels: accuracy", "top: recall"} <= set(found)
