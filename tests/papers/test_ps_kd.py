"""PS-KD's experiment: verdicts from made-up figures, and one arm."""

from __future__ import annotations

import pytest

from netwright.papers import ps_kd

SEEDS = 5


def arms(**change):
    """Figures in which every claim holds; ``change`` names a figure of PS-KD."""
    plain = {"NLL": 0.5, "ECE": 6.0, "AURC": 36.0, "accuracy": 0.85}
    ours = {"NLL": 0.45, "ECE": 3.5, "AURC": 35.5, "accuracy": 0.851} | change
    smooth = plain | {"AURC": 46.0}
    jitter = (-1, 0.5, 0, 0.5, 1)  # of the difference
    found = {}
    for name, figures in (("cross-entropy", plain), ("label smoothing", smooth), ("PS-KD", ours)):
        scale = {"NLL": 0.01, "ECE": 0.1, "AURC": 0.1, "accuracy": 0.0002} if name == "PS-KD" else {}
        found[name] = {k: [v + scale.get(k, 0) * j for j in jitter] for k, v in figures.items()}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "likelihood", "supported"),
        ({"NLL": 0.495}, "likelihood", "inconclusive"),
        ({"NLL": 0.55}, "likelihood", "not supported"),
        ({}, "calibration", "supported"),
        ({"ECE": 4.6}, "calibration", "not supported"),
        ({}, "ranking", "supported"),
        ({"AURC": 37.0}, "ranking", "not supported"),
        ({}, "accuracy", "supported"),
        ({"accuracy": 0.84}, "accuracy", "not supported"),
        ({}, "smoothing", "supported"),
        ({"AURC": 50.0}, "smoothing", "not supported"),
        ({}, "gain", "supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert ps_kd.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(ps_kd.judge(arms())) == {claim.key for claim in ps_kd.CARD.claims}


def test_arms_differ_in_the_claim_alone():
    sizes = [64, 32, 100, 2]
    plain, smooth, ours = (ps_kd._train(0, *arm, 0.05, sizes, False) for arm in ps_kd.ARMS.values())
    assert plain == ps_kd._train(0, 0.0, 0.0, 0.05, sizes, False)
    assert len({figures["NLL"] for figures in (plain, smooth, ours)}) == 3
    assert set(ps_kd._train(1000, 0.0, 0.0, 0.05, sizes, True)) == {"validation accuracy"}
