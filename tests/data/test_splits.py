"""Splits: disjoint, complete, apportioned by Webster's method, never through a group of copies."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from netwright.data.splits import split_train, subset

labelled = st.lists(st.integers(0, 5), min_size=1, max_size=80).map(np.array)


def is_webster(taken, totals):
    """The min-max inequality that characterises Webster's apportionment of seats ``taken`` to parties ``totals``."""
    present = totals > 0
    upper = (taken[present] + 0.5) / totals[present]
    lower = (taken[present] - 0.5) / totals[present]
    return lower.max() <= upper.min() + 1e-9


@settings(max_examples=150, deadline=None)
@given(labels=labelled, share=st.floats(0.01, 1.0), seed=st.integers(0, 5))
def test_a_subset_is_exact_stratified_and_nested(labels, share, seed):
    n = max(1, int(share * len(labels)))
    chosen = subset(torch.from_numpy(labels), n, seed)
    assert len(set(chosen.tolist())) == n
    assert chosen.tolist() == sorted(chosen.tolist())
    taken, totals = np.bincount(labels[chosen.numpy()], minlength=6), np.bincount(labels, minlength=6)
    assert is_webster(taken, totals)
    if n > 1:
        assert set(subset(labels, n - 1, seed).tolist()) < set(chosen.tolist())


@settings(max_examples=150, deadline=None)
@given(labels=labelled, fraction=st.floats(0.05, 0.95), seed=st.integers(0, 5))
def test_a_split_is_disjoint_complete_and_leaves_no_class_without_training(labels, fraction, seed):
    assume(np.bincount(labels).max() > 1)
    rest, held = split_train(labels, fraction, seed)
    assert sorted(rest.tolist() + held.tolist()) == list(range(len(labels)))
    assert len(held) >= 1
    assert set(labels[rest.numpy()]) == set(labels)
    movable = len(labels) - len(set(labels))
    assert len(held) == min(max(1, round(fraction * len(labels))), movable)


@settings(max_examples=150, deadline=None)
@given(
    groups=st.lists(st.integers(0, 25), min_size=2, max_size=80).map(np.array),
    fraction=st.floats(0.05, 0.6),
    seed=st.integers(0, 3),
)
def test_copies_stay_together(groups, fraction, seed):
    labels = groups % 3
    several = any(len(set(groups[labels == c])) > 1 for c in set(labels.tolist()))
    if not several:
        with pytest.raises(ValueError, match="2 different examples"):
            split_train(labels, fraction, seed, groups=groups)
        return
    rest, held = split_train(labels, fraction, seed, groups=groups)
    assert sorted(rest.tolist() + held.tolist()) == list(range(len(labels)))
    assert not set(groups[rest.numpy()]) & set(groups[held.numpy()])
    assert len(held) >= 1
    assert set(labels[rest.numpy()]) == set(labels)


def test_a_split_depends_on_who_is_whose_copy_not_on_the_keys():
    labels = np.arange(90) % 3
    plain = split_train(labels, 0.2, seed=0)[1].tolist()
    keys = np.random.default_rng(0).permutation(90)
    assert split_train(labels, 0.2, seed=0, groups=keys)[1].tolist() == plain


def test_shares_of_large_classes_are_exact():
    labels = torch.tensor([0] * 500 + [1] * 300 + [2] * 200)
    rest, held = split_train(labels, 0.1, seed=0)
    assert labels[held].bincount().tolist() == [50, 30, 20]
    assert labels[rest].bincount().tolist() == [450, 270, 180]


def test_the_choice_is_random_by_seed_and_stream():
    labels = torch.zeros(100, dtype=torch.int64)
    first = split_train(labels, 0.2, seed=0)[1].tolist()
    assert first == split_train(labels, 0.2, seed=0)[1].tolist()
    assert first != split_train(labels, 0.2, seed=1)[1].tolist()
    assert first != split_train(labels, 0.2, seed=0, name="other")[1].tolist()
    assert first != list(range(20))
    counts = sum(torch.zeros(100).index_fill(0, split_train(labels, 0.2, seed=s)[1], 1.0) for s in range(300))
    assert abs(counts / 300 - 0.2).max() < 0.1  # each example is as likely as any other


def test_many_small_equal_classes_share_by_chance_not_by_number():
    labels = np.repeat(np.arange(40), 4)
    held = [labels[split_train(labels, 0.1, seed=s)[1].numpy()] for s in range(5)]
    assert all(len(h) == 16 for h in held)
    assert len({tuple(h) for h in held}) == 5
    assert max(h.max() for h in held) > 35


def test_a_data_set_serves_in_place_of_its_labels():
    class Data:
        labels = torch.tensor([0, 1] * 10)

    assert split_train(Data(), 0.5, 0)[1].tolist() == split_train(Data.labels, 0.5, 0)[1].tolist()
    assert subset(Data(), 4, 0).tolist() == subset(Data.labels, 4, 0).tolist()


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_is_refused(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\), got"):
        split_train([0, 1, 0, 1], fraction, 0)


@pytest.mark.parametrize("n", [0, -1, 5])
def test_a_size_outside_is_refused(n):
    with pytest.raises(ValueError, match=rf"n must lie in 1..4, got {n}"):
        subset([0, 1, 0, 1], n, 0)


def test_labels_must_be_whole_numbers_and_enough():
    with pytest.raises(ValueError, match="labels must be one whole number"):
        subset([0.5, 1.0], 1, 0)
    with pytest.raises(ValueError, match="2 different examples"):
        split_train([0, 1, 2], 0.5, 0)
    with pytest.raises(ValueError, match="groups must be 2 numbers, got 3"):
        split_train([0, 0], 0.5, 0, groups=[1, 2, 3])
