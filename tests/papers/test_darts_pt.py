"""The verdicts of DARTS-PT's experiment from made-up figures, and its random genotypes."""

from __future__ import annotations

import pytest

from netwright.papers import darts_pt
from netwright.search import spaces
from netwright.seeding import stream

SEEDS = 5


def arms(*, right=6, alpha_right=2, ours=0.8, theirs=0.7, noise_free=1.0, skips=(0.4, 0.2)):
    def network(accuracy, **figures):
        return {"accuracy": [accuracy + 0.001 * i for i in range(SEEDS)]} | {k: [v] * SEEDS for k, v in figures.items()}

    edges = {}
    for number in range(1, darts_pt.EDGES + 1):
        edges[f"truth, edge {number}"] = [0.1] * SEEDS
        edges[f"perturbation, edge {number}"] = [0.2 if number <= right else -0.2] * SEEDS
        edges[f"alpha, edge {number}"] = [0.2 if number <= alpha_right else -0.2] * SEEDS
    return {
        "search: S2": edges,
        "S2 magnitude": network(theirs, **{"skip share": skips[0]}),
        "S2 perturbation": network(ours, **{"skip share": skips[1]}),
        "S2 random, as many convolutions": network(theirs),
        "S2 perturbation, alpha fixed": network(ours),
        "S4 magnitude": network(theirs),
        "S4 perturbation": network(ours, **{"convolution share": noise_free}),
    }


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "agreement", "supported"),
        ({"alpha_right": 6}, "agreement", "not supported"),
        ({"right": 5, "alpha_right": 4}, "agreement", "inconclusive"),
        ({}, "accuracy", "supported"),
        ({"ours": 0.6}, "accuracy", "not supported"),
        ({"ours": 0.6}, "equal", "not supported"),
        ({"ours": 0.6}, "fixed", "not supported"),
        ({"ours": 0.6}, "accuracy-s4", "not supported"),
        ({}, "noise", "supported"),
        ({"noise_free": 0.89}, "noise", "not supported"),
        ({}, "skips", "supported"),
        ({"skips": (0.1, 0.2)}, "skips", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert darts_pt.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(darts_pt.judge(arms())) == {claim.key for claim in darts_pt.CARD.claims}


def test_a_random_genotype_has_as_many_convolutions():
    space = spaces.get("micro-darts-s2")
    supernet = space.supernet(1, 3, channels=2)
    for seed in range(5):
        chosen = space.random(stream(seed, "chosen"))
        drawn = darts_pt._alike(supernet, chosen, stream(seed, "drawn"))
        assert drawn.convolutions == chosen.convolutions
