"""The verdicts of the experiment from made-up figures, and the terms that are drawn at random."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netwright.compress.low_rank import decompose
from netwright.papers import maestro as paper

SEEDS = 3


def arms(
    *, error=0.002, free=0.7, gap=0.003, ours=0.86, svd=0.7, tuned=0.85, dense=0.865, leading=0.8, drawn=0.4, single=0.8
):
    def arm(level):
        return {"accuracy": [level + 0.001 * i for i in range(SEEDS)]}

    found = {
        "linear target": {
            "error": [error] * SEEDS,
            "singular value error": [0.001] * SEEDS,
            "superfluous terms": [0.01] * SEEDS,
            "tolerance": [0.005] * SEEDS,
        },
        "linear target, not truncated": {"error at rank 1": [free] * SEEDS},
        "dense": arm(dense),
        "Maestro at 0.3": arm(ours),
    }
    if gap is not None:
        found["autoencoder"] = {"gap": [gap] * SEEDS}
    for share in paper.SHARES:
        found |= {f"Maestro at {share:g}": arm(ours), f"singular values at {share:g}": arm(svd)}
        found[f"singular values, fine-tuned at {share:g}"] = arm(tuned)
    for share in paper.CUTS:
        for order, level in zip(paper.ORDERS, (leading, single), strict=True):
            found[f"leading terms, {order} at {share:g}"] = arm(level)
            found[f"random terms, {order} at {share:g}"] = arm(drawn)
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "svd", "supported"),
        ({"error": 0.006}, "svd", "not supported"),
        ({"free": 0.05}, "svd", "not supported"),
        ({}, "pca", "supported"),
        ({"gap": 0.02}, "pca", "not supported"),
        ({"gap": None}, "pca", "inconclusive"),
        ({}, "curve", "supported"),
        ({"svd": 0.9}, "curve", "not supported"),
        ({}, "dense", "supported"),
        ({"dense": 0.9}, "dense", "not supported"),
        ({}, "deploy", "supported"),
        ({"drawn": 0.9}, "deploy", "not supported"),
        ({"single": 0.3}, "deploy", "supported"),
        ({"single": 0.3}, "deploy-single", "not supported"),
        ({}, "fine-tuned", "supported"),
        ({"tuned": 0.9}, "fine-tuned", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}


def test_random_terms_are_terms_of_the_whole():
    torch.manual_seed(0)
    whole = decompose(nn.Sequential(nn.Linear(8, 6, bias=False)))
    cut = decompose(nn.Sequential(nn.Linear(8, 6, bias=False)))
    cut[0].rank = 2
    drawn = paper._random_terms(whole, cut, 0)
    assert drawn[0].rank == 2
    for i in range(2):
        assert any(torch.equal(drawn[0].U[i], u) for u in whole[0].U)
    assert not torch.equal(drawn[0].U[:2], whole[0].U[:2])
    drawn[0].rank = 6
    assert torch.allclose(drawn[0].weight, whole[0].weight, atol=1e-5)
