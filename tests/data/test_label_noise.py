"""Noisy labels: exact counts, the distribution of the new labels, repeatability."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from netwright.data.label_noise import symmetric_noise
from netwright.seeding import stream

LABELS = torch.arange(5000) % 5


def test_new_labels_are_uniform_over_the_classes():
    noisy, changed = symmetric_noise(LABELS, 1.0, 5, stream(0, "noise"))
    assert chisquare(noisy[LABELS == 2].bincount(minlength=5).numpy()).pvalue > 0.001
    assert float(changed.double().mean()) == pytest.approx(0.8, abs=0.02)
    assert torch.equal(changed, noisy != LABELS)


def test_without_the_true_class_the_count_is_exact():
    noisy, changed = symmetric_noise(LABELS, 0.3, 5, stream(0, "noise"), exclude_true=True)
    assert int(changed.sum()) == 1500
    shifts = (noisy - LABELS)[changed] % 5
    assert chisquare(shifts.bincount(minlength=5)[1:].numpy()).pvalue > 0.001
    assert int(symmetric_noise(LABELS[:7], 0.3, 5, stream(0, "noise"), True)[1].sum()) == 3  # rounded up


def test_the_generator_decides_and_the_labels_stay():
    before = LABELS.clone()
    runs = [symmetric_noise(LABELS, 0.5, 5, stream(seed, "noise"))[0] for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(LABELS, before)
    assert torch.equal(symmetric_noise(LABELS, 0.0, 5, stream(0, "noise"))[0], LABELS)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((LABELS, 1.1, 5), r"rate must lie in \[0, 1\], got 1.1"),
        ((LABELS, float("nan"), 5), "rate must lie"),
        ((LABELS, 0.5, 4), "labels must lie in 0..3, got 0..4"),
        ((LABELS[:0], 0.5, 1), "num_classes must be >= 2, got 1"),
        ((LABELS.float(), 0.5, 5), "one whole number an example, got torch.float32"),
    ],
)
def test_what_is_refused(arguments, told):
    with pytest.raises(ValueError, match=told):
        symmetric_noise(*arguments, stream(0, "noise"))
