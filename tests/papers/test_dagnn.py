"""DAGNN's experiment: verdicts from made-up figures, and one arm of each model."""

from __future__ import annotations

import pytest

from netwright.papers import dagnn

JITTER = (-0.002, 0.001, 0.0, 0.001, 0.002)


def arms(**change):
    """Figures in which every claim holds; ``change`` gives the accuracy of an arm, or its smoothness by ``smooth_``."""
    accuracy = {f"GCN_{depth}": value for depth, value in zip(dagnn.LAYERS, (0.66, 0.70, 0.68, 0.5, 0.2), strict=True)}
    accuracy |= {
        f"DAGNN_{hops}": value for hops, value in zip(dagnn.HOPS, (0.68, 0.70, 0.72, 0.73, 0.725, 0.72), strict=True)
    }
    accuracy |= {"mean_40": 0.69, "perceptron": 0.55, "APPNP_10": 0.72}
    smooth = {"GCN_20": 0.02, "GCN_10": 0.2, "GCN_5": 0.4, "GCN_2": 0.5}
    accuracy |= {name: value for name, value in change.items() if not name.startswith("smooth_")}
    smooth |= {name.removeprefix("smooth_"): value for name, value in change.items() if name.startswith("smooth_")}
    found = {}
    for graph in dagnn.GRAPHS:
        for name, value in accuracy.items():
            count = dagnn.DEEP_SEEDS if name in {"GCN_10", "GCN_20"} else 5
            sign = -1 if name.startswith("DAGNN") or name == "GCN_20" else 1
            found[f"{graph}, {name.replace('_', ' ')}"] = {
                "accuracy": [value + sign * j for j in JITTER[:count]],
                "validation accuracy": [value] * count,
                "smoothness": [smooth.get(name, 0.3) + j for j in JITTER[:count]],
            }
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "depth", "supported"),
        ({"GCN_20": 0.65}, "depth", "not supported"),
        ({"GCN_20": 0.6}, "depth", "inconclusive"),
        ({}, "hops", "supported"),
        ({"DAGNN_20": 0.70}, "hops", "not supported"),
        ({"DAGNN_20": 0.80}, "hops", "supported"),  # its own best
        ({}, "gain", "supported"),
        ({"GCN_5": 0.75}, "gain", "not supported"),
        ({"perceptron": 0.72}, "gain", "not supported"),
        ({}, "gate", "supported"),
        ({"mean_40": 0.72}, "gate", "inconclusive"),
        ({"mean_40": 0.74}, "gate", "not supported"),
        ({}, "APPNP", "supported"),
        ({"APPNP_10": 0.75}, "APPNP", "not supported"),
        ({}, "smoothness", "supported"),
        ({"smooth_GCN_20": 0.2}, "smoothness", "not supported"),
        ({"smooth_GCN_2": 0.01}, "smoothness", "not supported"),
        ({"smooth_GCN_10": 0.6}, "smoothness", "not supported"),  # not with every step of depth
        ({"smooth_GCN_10": 0.42}, "smoothness", "supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert dagnn.judge(arms(**change))[key].verdict == verdict


def test_the_gate_needs_one_graph_and_is_refuted_by_both():
    figures = arms()
    worse = [value + 0.1 for value in figures["digits, mean 40"]["accuracy"]]
    figures["digits, mean 40"]["accuracy"] = worse
    assert dagnn.judge(figures)["gate"].verdict == "supported"
    del figures["debian, mean 40"]
    assert dagnn.judge(figures)["gate"].verdict == "inconclusive"


def test_the_best_depth_is_asked_of_validation_nodes():
    figures = arms()
    figures["debian, DAGNN 1"]["validation accuracy"] = [0.99] * 5
    assert "best number of hops 1:" in dagnn.judge(figures)["hops"].reason


def test_digits_alone_decide_nothing_but_the_gate():
    figures = {name: value for name, value in arms().items() if name.startswith("digits")}
    found = dagnn.judge(figures)
    assert {key for key, verdict in found.items() if verdict.verdict != "inconclusive"} == {"gate"}
    assert set(found) == {claim.key for claim in dagnn.CARD.claims}


@pytest.mark.parametrize("model", dagnn.TUNED_AT)
def test_an_arm_of_each_model(model):
    depth = min(2, dagnn.TUNED_AT[model])
    found = dagnn._train(0, "digits", model, depth, 5e-4, 0.5, [2, 40])
    assert found == dagnn._train(0, "digits", model, depth, 5e-4, 0.5, [2, 40])
    assert found["accuracy"] != dagnn._train(1, "digits", model, depth, 5e-4, 0.5, [2, 40])["accuracy"]
    assert found["nodes"] == 1797


def test_label_propagation_knows_the_digits():
    assert dagnn._labels(0, "digits")["accuracy"] > 0.9
