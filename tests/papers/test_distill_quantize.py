"""The verdicts of the experiment from made-up figures."""

from __future__ import annotations

import pytest

from netwright.papers import distill_quantize as paper

SEEDS = 3


def arms(
    *,
    trained=0.80,
    learned=0.75,
    fitted=0.65,
    rounded=0.6,
    single=0.5,
    labels=0.79,
    four=(0.868, 0.866),
    size=1000.0,
    bits=(2, 4),
):
    def arm(level, **more):
        return {"accuracy": [level + 0.002 * i for i in range(SEEDS)]} | {k: [v] * SEEDS for k, v in more.items()}

    found = {
        "student, labels": arm(0.86),
        "student, distilled": arm(0.87),
        "rounded, 2 bits": arm(single),
        "rounded in buckets, 2 bits": arm(rounded),
        "rounded, least error, 2 bits": arm(fitted),
        "learned, 2 bits": arm(learned),
        "labels, 2 bits": arm(labels),
    }
    sizes = {"bytes": size + 200, "header bytes": 200, "formula bytes": 1000.0}
    found["distilled, 2 bits"] = arm(trained, **sizes)
    if 4 in bits:
        found["distilled, 4 bits"], found["learned, 4 bits"] = arm(four[0], **sizes), arm(four[1])
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "trained", "supported"),
        ({"rounded": 0.72}, "trained", "not supported"),
        ({}, "points", "supported"),
        ({"learned": 0.5}, "points", "not supported"),
        ({}, "order", "supported"),
        ({"learned": 0.85}, "order", "not supported"),
        ({}, "four-bits", "supported"),
        ({"four": (0.868, 0.85)}, "four-bits", "not supported"),
        ({"bits": (2,)}, "four-bits", "inconclusive"),
        ({}, "ends", "supported"),
        ({"fitted": 0.82}, "ends", "not supported"),
        ({}, "buckets", "supported"),
        ({"single": 0.7}, "buckets", "not supported"),
        ({}, "teacher", "supported"),
        ({}, "student", "supported"),
        ({}, "size", "supported"),
        ({"size": 1100.0}, "size", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}
