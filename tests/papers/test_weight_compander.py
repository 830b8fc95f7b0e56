"""The experiment of Weight Compander: verdicts from made-up figures, and one arm."""

from __future__ import annotations

import pytest

from netwright.papers import weight_compander as paper

JITTER = (-1, 0.5, 0, 0.5, 1)


def arm(accuracy=0.8, kurtosis=0.5, near=0.08, largest=4.0, held=0.8):
    figures = {"accuracy": accuracy, "validation accuracy": held, "kurtosis 0": kurtosis, "near zero 0": near}
    figures |= {"largest 0": largest, "kurtosis 2": kurtosis, "near zero 2": near, "largest 2": largest}
    return {name: [value + 0.001 * j for j in JITTER] for name, value in figures.items()}


def arms(fashion=None, digits=None, learned=None):
    """Figures in which every claim holds."""
    plain = {name: [value[2]] * 5 for name, value in arm().items()}
    better = {"accuracy": 0.81, "kurtosis": -1.0, "near": 0.04, "largest": 2.0, "held": 0.82}
    found = {}
    for name, change in (("fashion", fashion), ("digits", digits)):
        found |= {f"{name}, plain": plain, f"{name}, fixed": arm(**better | (change or {}))}
        found |= {f"{name}, learned": arm(**(better | {"accuracy": 0.83, "held": 0.81} | (learned or {})))}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "mechanism", "supported"),
        ({"fashion": {"kurtosis": 0.6}}, "mechanism", "not supported"),
        ({"digits": {"largest": 3.999}}, "mechanism", "inconclusive"),
        ({"digits": {"near": 0.09}}, "mechanism", "not supported"),
        ({}, "gain", "supported"),
        ({"digits": {"accuracy": 0.8}}, "gain", "supported"),
        ({"digits": {"accuracy": 0.79}}, "gain", "not supported"),
        ({"fashion": {"accuracy": 0.8}, "digits": {"accuracy": 0.8}}, "gain", "not supported"),
        ({"fashion": {"held": 0.8}, "learned": {"accuracy": 0.7}}, "gain", "not supported"),
        ({}, "learned", "supported"),
        ({"learned": {"accuracy": 0.7}}, "learned", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_one_set_or_one_seed_tells_nothing_of_the_gain():
    digits = {name: figures for name, figures in arms().items() if name.startswith("digits")}
    assert paper.judge(digits)["gain"].verdict == "inconclusive"
    one = {name: {key: values[:1] for key, values in figures.items()} for name, figures in arms().items()}
    assert {verdict.verdict for verdict in paper.judge(one).values()} == {"inconclusive"}
    assert set(paper.judge(one)) == {claim.key for claim in paper.CARD.claims}


@pytest.mark.parametrize("name", ["plain", "learned"])
def test_an_arm_on_images(name):
    found = paper._train(0, "fashion", name, 0.05, 5e-4, 1, [64, 32, 64])
    layers = ["features.0", "features.4", "head.0", "head.2"]
    assert {key for key in found if key.startswith("kurtosis")} == {f"kurtosis {layer}" for layer in layers}
    assert 0 <= found["accuracy"] <= 1
