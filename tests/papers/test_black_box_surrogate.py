"""The experiment on surrogates: verdicts from made-up figures, and its parts."""

from __future__ import annotations

import numpy as np
import pytest

from netwright.explain.tabular import models
from netwright.papers import black_box_surrogate as paper
from netwright.papers import surrogates

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
    each |= {name: {"accuracy": 0.9} for name in ("black box", "boosting")}
    each |= {f"tree on labels{which}": {"accuracy": 0.72} for which in ("", ", own features")}
    each |= {alone: {"tree agreement": 0.72, "forest agreement": 0.88} for alone in ("attention", "perturbation")}
    own = ("boosting", "tree on labels", "tree on labels, own features")
    found = {
        f"{name}, {arm}": dict(figures)
        for name in ("planted", *paper.REAL, *paper.OTHERS)
        for arm, figures in each.items()
        if (name in paper.OTHERS or arm not in ("attention", "perturbation"))
        and not (name in paper.OTHERS and arm in own)
    }
    for key, value in change.items():
        arm, _, metric = key.rpartition(": ")
        for name, figures in found.items():
            if name.endswith(f", {arm or 'top'}") or name == arm:
                figures[metric] = value
    # Figures of the top features and of the others jump together, as they do from seed to seed.
    return {
        arm: {k: v if isinstance(v, list) else [v + j for j in JITTER] for k, v in figures.items()}
        for arm, figures in found.items()
    }


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
        ({"tree on labels: accuracy": 0.74}, "labels", "not supported"),
        ({"tree on labels, own features: accuracy": 0.74}, "labels", "not supported"),
        # One of the black boxes is enough, be it a self-attention network or one behind an encoder.
        ({"MNIST (SAN), top: tree agreement": 0.7}, "top", "not supported"),
        ({"MNIST (CAE), top: comprehensiveness": 0.2}, "faithful", "not supported"),
        ({"MNIST (CAE + SAN), variance: forest agreement": 0.93}, "selection", "not supported"),
        ({"MNIST (CAE), top: forest R2": 0.6}, "agreement", "not supported"),
        ({}, "both", "supported"),
        ({"MNIST (SAN), attention: tree agreement": 0.8}, "both", "not supported"),
        ({"MNIST (CAE + SAN), perturbation: forest agreement": 0.95}, "both", "not supported"),
        ({}, "paper's boxes", "supported"),
        ({"MNIST (SAN), black box: accuracy": 0.85}, "paper's boxes", "not supported"),
        ({"MNIST (SAN), black box: accuracy": 0.85}, "accuracy", "supported"),
        # A mean beyond the bound is not enough where the seeds scatter across it.
        ({"tree agreement": [0.9, 0.9, 0.6]}, "top", "inconclusive"),
        ({"recall": [1.0, 1.0, 0.7]}, "planted", "inconclusive"),
        ({"forest R2": [0.95, 0.95, 0.8]}, "published", "inconclusive"),
        ({"comprehensiveness": [0.5, 0.5, 0.2]}, "faithful", "inconclusive"),
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
    X, y, X_test, y_test = surrogates.data_of("planted", 1, (200, 30))
    assert X.shape == (140, 30)
    assert X_test.shape == (60, 30)
    assert abs(np.concatenate([y, y_test]).mean() - 0.5) < 0.1


@pytest.mark.parametrize("kind", ["SAN", "CAE", "CAE + SAN"])
def test_other_black_boxes_run(kind):
    found = surrogates.trial(0, "planted", kind, [200, 20], 15, True)
    assert "black box: learned" not in found
    assert {"black box: accuracy", "top: tree agreement", "random: comprehensiveness"} <= set(found)
    assert "variance: tree agreement" not in found
    assert ("attention: tree agreement" in found) == ("SAN" in kind)
    assert ("perturbation: tree agreement" in found) == ("SAN" in kind)


def test_all_selections_and_rivals_of_a_full_trial(monkeypatch):
    monkeypatch.setattr(surrogates, "GRID", (5,))
    monkeypatch.setattr(surrogates, "DRAWS", 1)
    monkeypatch.setattr(surrogates, "ROWS", 40)
    monkeypatch.setattr("netwright.explain.tabular.models.TREES", 4)
    monkeypatch.setattr("netwright.explain.tabular.models.TREES_FOR_TUNING", 2)
    looked_at, widths = [], []
    rules, tuned = surrogates.rules, models.tuned

    def ruled(X, y, seed):
        looked_at.append(len(X))
        return rules(X, y, seed)

    def seen(kind, values, *more):
        widths.append(values.shape[1])
        return tuned(kind, values, *more)

    monkeypatch.setattr(surrogates, "rules", ruled)
    monkeypatch.setattr(models, "tuned", seen)
    found = surrogates.trial(0, "planted", "dense", [120, 20], 3, False)
    for label in ("top", "random", "variance", "information"):
        for metric in ("tree agreement", "forest agreement", "forest R2", "sufficiency"):
            assert f"{label}: {metric}" in found
    trees = {f"tree on labels{which}: accuracy" for which in ("", ", own features", ", all features")}
    assert {"boosting: accuracy", "top: recall", *trees} <= set(found)
    # Every ranking looks at the same rows, and a tree on the labels at as many features as the surrogate.
    assert looked_at == [40]
    assert widths == [5, 5, 20]


def test_the_rows_of_a_ranking_are_those_of_the_black_boxes_own(monkeypatch):
    from netwright.explain.tabular import SurrogateExplainer, permutation_importance

    X, y, *_ = surrogates.data_of("planted", 0, (200, 20))
    network = surrogates.black_box("dense", X, y, 5, 0)
    found = SurrogateExplainer(
        network, k=3, importance_rows=50, importances=["permutation"], n_repeats=1, random_state=0
    ).fit(X)
    assert len(found.ranked_on_) == 50
    seed = np.random.RandomState(0).randint(2**31 - 1)
    again = permutation_importance(network, X[found.ranked_on_], n_repeats=1, random_state=seed)
    np.testing.assert_allclose(again.importances_mean, found.importances_["permutation"], atol=1e-12)
