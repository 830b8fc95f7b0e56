from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from netwright.papers.evidence import (
    all_of,
    bootstrap,
    compare,
    decide,
    fisher_exact,
    independent_difference,
    mean,
    paired_difference,
    sign_test,
    spearman,
    standard_error,
)

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


@given(VALUES)
def test_mean_and_standard_error_are_those_of_scipy(values):
    assert mean(values) == pytest.approx(np.mean(values), abs=1e-9)
    assert standard_error(values) == pytest.approx(scipy.stats.sem(values), abs=1e-9)


def test_bootstrap_agrees_with_scipy_and_with_the_normal_limit():
    values = np.random.default_rng(0).normal(3.0, 2.0, 200).tolist()
    low, high = bootstrap(values)
    peer = scipy.stats.bootstrap(
        (values,), np.mean, confidence_level=0.9, method="percentile", n_resamples=10_000, rng=1
    ).confidence_interval
    assert (low, high) == pytest.approx((peer.low, peer.high), abs=0.02)
    half = 1.6449 * standard_error(values)
    assert high - low == pytest.approx(2 * half, rel=0.05)


def test_bootstrap_of_two_arms_agrees_with_welch():
    random = np.random.default_rng(1)
    a, b = random.normal(1.0, 1.0, 150).tolist(), random.normal(0.0, 2.0, 250).tolist()
    found = independent_difference(a, b)
    assert found.mean == pytest.approx(np.mean(a) - np.mean(b))
    welch = scipy.stats.ttest_ind(a, b, equal_var=False)
    assert found.mean / found.standard_error == pytest.approx(welch.statistic)
    assert found.interval[1] - found.interval[0] == pytest.approx(2 * 1.6449 * found.standard_error, rel=0.05)


def test_bootstrap_of_two_values_in_closed_form():
    # The four resamples of {0, 1} have means 0, 1/2, 1/2, 1: each end has probability 1/4.
    assert bootstrap([0.0, 1.0], level=0.9) == (0.0, 1.0)
    assert bootstrap([0.0, 1.0], level=0.4) == (0.5, 0.5)


def test_bootstrap_is_seeded_and_covers():
    assert bootstrap([1.0, 2.0, 4.0]) == bootstrap([1.0, 2.0, 4.0])
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(random.normal(0.0, 1.0, 30).tolist(), resamples=500)
        hits += low <= 0 <= high
    assert 0.82 <= hits / 200 <= 0.95


def test_pairing_removes_what_pairs_share():
    base = [0.0, 10.0, 20.0, 30.0]
    better = [v + 1 + 0.01 * i for i, v in enumerate(base)]
    assert compare(better, base).verdict == "supported"
    assert compare(better, base, paired=False).verdict == "inconclusive"
    assert paired_difference(better, base).mean == pytest.approx(1.015)


@pytest.mark.parametrize(
    ("a", "b", "options", "verdict"),
    [
        ([0.9, 0.91, 0.92], [0.8, 0.8, 0.8], {}, "supported"),
        ([0.8, 0.81, 0.82], [0.9, 0.9, 0.9], {}, "not supported"),
        ([0.8, 0.9, 1.0], [0.9, 0.9, 0.9], {}, "inconclusive"),
        ([0.9, 0.91, 0.92], [0.8, 0.8, 0.8], {"direction": "less"}, "not supported"),
        ([0.9, 0.91, 0.92], [0.8, 0.8, 0.8], {"margin": 0.2}, "not supported"),
        ([0.79, 0.8, 0.81], 0.8, {"margin": -0.05}, "supported"),
        ([0.79, 0.8, 0.81], 0.8, {}, "inconclusive"),
        ([0.9, None, 0.92], [0.8, 0.8, 0.8], {}, "inconclusive"),
        ([0.9, math.nan, 0.92], [0.8, 0.8, 0.8], {}, "inconclusive"),
        ([0.9], [0.1], {}, "inconclusive"),
        ([1.0, 2.0, 3.0], 0.5, {"errors": 2.0}, "supported"),
        ([1.0, 2.0, 3.0], 0.5, {"errors": 3.0}, "inconclusive"),
    ],
)
def test_compare(a, b, options, verdict):
    assert compare(a, b, **options).verdict == verdict


def test_compare_says_how_it_decided():
    found = compare([2.0, 3.0], [1.0, 1.0])
    assert found.statistic == pytest.approx(1.5)
    assert found.interval == (1.0, 2.0)
    assert found.reason == "claimed > 0: 1.5, 90 % interval 1 to 2, n = 2"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: compare([1.0], [1.0], direction="up"), "direction must be 'greater' or 'less', got 'up'"),
        (lambda: compare([1.0, 2.0], [1.0]), "got 2 and 1"),
        (lambda: compare([], []), "at least 1"),
        (lambda: bootstrap([1.0, 2.0], level=1.0), r"level must lie in \(0, 1\), got 1.0"),
        (lambda: bootstrap([1.0], [1.0], [1.0]), "arms must be 1 or 2, got 3"),
        (lambda: independent_difference([], [1.0]), "got 0 and 1"),
        (lambda: spearman([1.0], [1.0]), "at least 2"),
    ],
)
def test_bad_input_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_all_of_follows_the_rule_of_the_paper():
    yes, no, unknown = decide(True, 1.0, "a"), decide(False, 2.0, "b"), decide(None, 3.0, "c")
    assert all_of(yes, yes).verdict == "supported"
    assert all_of(yes, unknown).verdict == "inconclusive"
    assert all_of(yes, unknown, no).verdict == "not supported"
    assert (all_of(yes, no).statistic, all_of(yes, no).reason) == (1.0, "a; b")
    assert decide(True, math.nan).verdict == "inconclusive"


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-5, 5)), min_size=3, max_size=15))
def test_spearman_is_that_of_scipy(pairs):
    x, y = [float(p[0]) for p in pairs], [p[1] for p in pairs]
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(x, y))
    else:
        assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y).statistic, abs=1e-9)


def test_sign_test_and_fisher_in_closed_form():
    assert sign_test([1, 1, 1, 0], [0, 0, 0, 0]) == pytest.approx(0.125)
    assert sign_test([0, 1, 1], [1, 0, 0]) == pytest.approx(0.5)
    assert sign_test([0, 0, 0], [1, 1, 1], direction="less") == pytest.approx(0.125)
    assert sign_test([1.0], [1.0]) == 1.0
    # All 4 successes in the arm of 4 out of 8: 1 / C(8, 4).
    assert fisher_exact(4, 4, 0, 4) == pytest.approx(1 / 70)
