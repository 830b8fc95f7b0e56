"""The verdicts of the experiment from made-up figures, and its selections."""

from __future__ import annotations

import numpy as np
import pytest

from netwright.papers import dataset_quantization as paper
from netwright.seeding import numpy_stream

SEEDS = 5


def arms(
    *,
    ours=0.85,
    greedy=0.80,
    chance=0.85,
    whole=0.852,
    noise=0.001,
    coverage=(1.0, 1.2),
    ratios=paper.RATIOS,
    second=0.8,
):
    def arm(level, far, wobble):
        found = {f"accuracy at {r} %": [level + wobble * (i - 2) for i in range(SEEDS)] for r in ratios}
        return found | {f"coverage at {r} %": [far + 0.01 * i for i in range(SEEDS)] for r in ratios}

    digits = {} if second is None else {"digits: DQ": arm(ours, 1.0, 0), "digits: graph cut": arm(second, 1.0, 0.001)}
    return digits | {
        "DQ": arm(ours, coverage[0], noise),
        "graph cut": arm(greedy, coverage[1], 0.002),
        "random": arm(chance, 1.0, 0.004),
        "all data": {"accuracy": [whole + 0.001 * (i - 2) for i in range(SEEDS)]},
    }


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "one-shot", "supported"),
        ({"greedy": 0.9}, "one-shot", "not supported"),
        ({}, "whole", "supported"),
        ({"whole": 0.86}, "whole", "not supported"),
        ({"ratios": (10, 30)}, "whole", "inconclusive"),
        ({}, "random", "supported"),
        ({"chance": 0.87}, "random", "not supported"),
        ({"chance": 0.83}, "margin", "supported"),
        ({}, "spread", "supported"),
        ({"noise": 0.01}, "spread", "not supported"),
        ({}, "digits", "supported"),
        ({"second": 0.9}, "digits", "not supported"),
        ({"second": None}, "digits", "inconclusive"),
        ({}, "diversity", "supported"),
        ({"coverage": (1.3, 1.2)}, "diversity", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}


@pytest.mark.parametrize("method", paper.METHODS)
def test_selections_have_their_size_and_every_class(method):
    random = numpy_stream(0, "features")
    features, labels = random.normal(size=(400, 6)), np.arange(400) % 4
    found = paper._selected(method, features, labels, [5, 30, 60], 0)
    for ratio, chosen in found.items():
        assert len(set(chosen)) == len(chosen) == 4 * ratio
        assert np.bincount(labels[chosen]).tolist() == [ratio] * 4


def test_the_first_bin_is_the_greedy_selection():
    random = numpy_stream(0, "features")
    features, labels = random.normal(size=(400, 6)), np.arange(400) % 4
    greedy, first = (set(paper._selected(m, features, labels, [10], 0)[10]) for m in ("graph cut", "DQ, first bins"))
    assert greedy == first


def test_k_center_takes_the_farthest():
    line = np.array([[0.0], [1.0], [2.0], [10.0], [4.6]])
    assert paper._farthest(line, 5).tolist() == [4, 3, 0, 2, 1]
