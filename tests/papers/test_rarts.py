"""RARTS' experiment: verdicts from made-up figures, the arms of the solvable model and of widths."""

from __future__ import annotations

import pytest

from netwright.papers import rarts
from netwright.papers.run import published

SEEDS = 3


def ranks(value):
    return {"percentile": [value + i for i in range(SEEDS)]}


def arms(*, error=1e-8, near=0.0076, rise=0.0, fused=0.45, exact=0.8, widths=(0.95, 0.95), **percentiles):
    found = {f"model: {name}": {"error": [0.0], "distance": [1.0]} for name in rarts.MODEL}
    for name in rarts.MODEL:
        if name.startswith("RARTS"):
            found[f"model: {name}"] = {"error": [error], "distance": [near], "largest rise": [rise]}
    found["step times"] = {"rounds": [20]}
    for name, value in (("fused", fused), ("exact", exact)):
        for part, shift in (("", 0.0), (", lower", -0.01), (", upper", 0.01)):
            found["step times"][f"{name} / DARTS-2{part}"] = [value + shift]
    for name, value in (("RARTS", widths), ("slimming", (0.9, 0.9))):
        found[f"width: {name}"] = {
            f"accuracy at {share:g}": [accuracy + 0.001 * i for i in range(SEEDS)]
            for share, accuracy in zip(rarts.SHARES, value, strict=True)
        }
    named = {"ours": "RARTS", "first": "DARTS-1", "second": "DARTS-2", "short": "DARTS-2, as many passes"}
    named |= {"single": "single level", "random": "random"}
    values = {"ours": 80, "first": 60, "second": 80, "short": 60, "single": 60, "random": 50} | percentiles
    return found | {named[key]: ranks(value) for key, value in values.items()}


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "model", "supported"),
        ({"error": 1e-5}, "model", "not supported"),
        ({"near": 1.5}, "model", "not supported"),
        ({}, "descent", "supported"),
        ({"rise": 1e-6}, "descent", "not supported"),
        ({}, "speed", "supported"),
        ({"fused": 0.56}, "speed", "not supported"),
        ({}, "exact", "not supported"),
        ({"exact": 0.5}, "exact", "supported"),
        ({}, "accuracy", "supported"),
        ({"first": 90}, "accuracy", "not supported"),
        ({}, "second", "supported"),
        ({"second": 84}, "second", "supported"),
        ({"second": 86}, "second", "not supported"),
        ({}, "width", "supported"),
        ({"widths": (0.95, 0.8)}, "width", "not supported"),
        ({}, "splitting", "supported"),
        ({"single": 90}, "splitting", "not supported"),
        ({"short": 90}, "time", "not supported"),
        ({"random": 90}, "random", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert rarts.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(rarts.judge(arms())) == {claim.key for claim in rarts.CARD.claims}


@pytest.mark.parametrize(("name", "a"), [("DARTS-1", 2.0), ("DARTS-2, xi 0.5", 1.0), ("RARTS (10, 10)", 1.081081)])
def test_the_solvable_model(name, a):
    figures = rarts._model(0, *rarts.MODEL[name], 2500)
    assert figures["a"] == pytest.approx(a, abs=1e-6)
    assert figures["error"] < 1e-6
    assert figures["path"][0] == 2.0
    assert len(figures["path"]) in (84, 101)
    assert figures["path"][-1] == pytest.approx(a, abs=1e-2)


def test_the_first_steps_of_the_path_are_those_of_the_paper_and_pencil():
    figures = rarts._model(0, "exact", 10.0, 10.0, 0.01, 1)
    assert (figures["a"], figures["w"], figures["y"]) == pytest.approx((1.3994, -1.2, -1.94), abs=1e-12)


@pytest.mark.parametrize("kind", ["RARTS", "slimming"])
def test_widths_meet_their_budgets(kind):
    found = rarts._width(0, kind, rarts.L1[kind][1], [192, 32, 1, 1], True)
    for share in rarts.SHARES:
        assert 0.5 * share < found[f"share at {share:g}"] <= share
    assert found["validation accuracy"] == pytest.approx(
        sum(found[f"accuracy at {share:g}"] for share in rarts.SHARES) / len(rarts.SHARES)
    )


def test_the_page_shows_how_a_moves_on_the_solvable_model():
    evidence = published("rarts")
    assert evidence is not None
    (picture,) = rarts.pictures(evidence).values()
    (ax,) = picture.axes
    lines = {line.get_label(): line.get_ydata() for line in ax.get_lines()}
    assert set(rarts.MODEL) <= set(lines)
    assert all(lines[name][0] == 2.0 for name in rarts.MODEL)
    assert abs(lines["RARTS (100, 100)"][-1] - 1) < 0.01
    assert abs(lines["DARTS-1"][-1] - 2) < 0.01
