"""Closed forms of the specification `ps-kd`, torchmetrics, scikit-learn and brute force as oracles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, log_loss
from torchmetrics.classification import MulticlassCalibrationError

from netwright.metrics import accuracy, aurc, eaurc, expected_calibration_error, nll, pearson
from netwright.seeding import stream

HAND_PROBS = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.65, 0.35], [0.55, 0.45]])
HAND_LABELS = torch.tensor([0, 0, 1, 0])
METRICS = [accuracy, nll, expected_calibration_error, aurc, eaurc]


def draw(seed, n=400, classes=7, sharpness=2.0):
    generator = stream(seed, "metrics")
    logits = sharpness * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return logits.softmax(1), torch.randint(classes, (n,), generator=generator)


def test_hand_case_of_the_paper_specification():
    assert expected_calibration_error(HAND_PROBS, HAND_LABELS) == pytest.approx(32.5, abs=1e-4)
    assert aurc(HAND_PROBS, HAND_LABELS) == pytest.approx(1000 * (1 / 3 + 1 / 4) / 4, abs=1e-4)
    assert eaurc(HAND_PROBS, HAND_LABELS) == pytest.approx(1000 * ((1 / 3 + 1 / 4) / 4 - 1 / 16), abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bins", [5, 10, 15])
def test_calibration_error_agrees_with_torchmetrics(seed, bins):
    probs, labels = draw(seed)
    oracle = MulticlassCalibrationError(num_classes=7, n_bins=bins, norm="l1")(probs, labels)
    assert expected_calibration_error(probs, labels, n_bins=bins) == pytest.approx(100 * float(oracle), abs=1e-4)


def test_calibration_bins_are_open_below_and_closed_above():
    # Confidence exactly 0.6 belongs to (0.5, 0.6] with the 0.55, so that one bin holds a hit and a miss.
    probs = torch.tensor([[0.6, 0.4], [0.55, 0.45]], dtype=torch.float64)
    assert expected_calibration_error(probs, torch.tensor([0, 1])) == pytest.approx(100 * abs(0.5 - 0.575))
    apart = torch.tensor([[0.6001, 0.3999], [0.55, 0.45]], dtype=torch.float64)
    assert expected_calibration_error(apart, torch.tensor([0, 1])) == pytest.approx(100 * (0.3999 + 0.55) / 2)


def test_calibration_of_a_certain_and_right_classifier_is_zero():
    probs = torch.eye(3)[[0, 1, 2, 0]]
    assert expected_calibration_error(probs, torch.tensor([0, 1, 2, 0])) == 0.0
    assert expected_calibration_error(probs, torch.tensor([1, 2, 0, 1])) == 100.0


@pytest.mark.parametrize("seed", range(5))
def test_likelihood_and_accuracy_agree_with_scikit_learn(seed):
    probs, labels = draw(seed)
    assert nll(probs, labels) == pytest.approx(log_loss(labels, probs, labels=range(7)), rel=1e-9)
    assert accuracy(probs, labels) == accuracy_score(labels, probs.argmax(1))


def test_likelihood_of_an_impossible_class_is_finite():
    value = nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    assert np.isfinite(value)
    assert value > 600


def brute_force_aurc(probs, labels):
    confidence, predicted = probs.max(1)
    order = sorted(range(len(labels)), key=lambda i: -confidence[i].item())
    wrong = [int(predicted[i] != labels[i]) for i in order]
    return 1000 * np.mean([sum(wrong[:k]) / k for k in range(1, len(wrong) + 1)])


def best_aurc(errors, n):
    wrong = [0] * (n - errors) + [1] * errors
    return 1000 * np.mean([sum(wrong[:k]) / k for k in range(1, n + 1)])


@pytest.mark.parametrize("seed", range(5))
def test_risk_coverage_agrees_with_brute_force(seed):
    probs, labels = draw(seed, n=60, classes=4)
    errors = int((probs.argmax(1) != labels).sum())
    assert aurc(probs, labels) == pytest.approx(brute_force_aurc(probs, labels), rel=1e-12)
    assert eaurc(probs, labels) == pytest.approx(aurc(probs, labels) - best_aurc(errors, 60), abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 30), st.integers(0, 30))
def test_excess_is_zero_exactly_for_the_best_ranking(right, wrong):
    confidence = torch.linspace(0.99, 0.51, right + wrong, dtype=torch.float64)
    probs = torch.stack([confidence, 1 - confidence], 1)
    labels = torch.tensor([0] * right + [1] * wrong)
    assert eaurc(probs, labels) == pytest.approx(0.0, abs=1e-9)
    if wrong:
        assert eaurc(probs, labels.flip(0)) > 0


def test_order_of_the_examples_does_not_matter():
    probs, labels = draw(0)
    order = torch.randperm(len(labels), generator=stream(0, "shuffle"))
    for metric in METRICS:
        assert metric(probs[order], labels[order]) == pytest.approx(metric(probs, labels), rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("probs", "labels", "message"),
    [
        (torch.ones(3), torch.zeros(3, dtype=torch.long), "probs must have shape"),
        (
            torch.ones(3, 2) / 2,
            torch.zeros(2, dtype=torch.long),
            r"labels must have shape \(3,\), got \(2,\)",
        ),
        (torch.ones(3, 2) / 2, torch.tensor([0, 1, 2]), r"labels must lie in 0..1, got 0..2"),
        (torch.ones(3, 2) / 2, torch.tensor([0, -1, 1]), r"got -1..1"),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.long), "at least 1 example, got 0"),
    ],
)
def test_bad_input_is_named(metric, probs, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(probs, labels)


def test_zero_bins_are_refused():
    with pytest.raises(ValueError, match="n_bins must be >= 1, got 0"):
        expected_calibration_error(HAND_PROBS, HAND_LABELS, n_bins=0)


@pytest.mark.parametrize("seed", range(5))
def test_correlation_agrees_with_scipy(seed):
    generator = stream(seed, "correlation")
    x = torch.randn(30, generator=generator, dtype=torch.float64)
    y = 1e6 + 0.3 * x + torch.randn(30, generator=generator, dtype=torch.float64)
    assert pearson(x, y) == pytest.approx(float(pearsonr(x.numpy(), y.numpy())[0]), abs=1e-9)
    assert pearson(x.tolist(), (-2 * x + 7).tolist()) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1.0, 2.0], [1.0, 2.0, 3.0], r"two series of one length, at least 2, got shapes \(2,\) and \(3,\)"),
        ([1.0], [1.0], "at least 2"),
        ([[1.0, 2.0]], [[1.0, 2.0]], "two series"),
        ([1.0, 1.0], [1.0, 2.0], "x must be finite and not constant"),
        ([1.0, 2.0], [0.1, 0.1], "y must be finite and not constant"),
        ([1.0, 2.0], [0.1, float("nan")], "y must be finite"),
    ],
)
def test_series_without_a_correlation_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        pearson(x, y)
