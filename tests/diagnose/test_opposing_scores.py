"""Groups from made-up loss changes, and scores against loops and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from netwright.diagnose.opposing_signals import oscillation_score, outsized_share, scores
from netwright.seeding import stream


def draws(*shape, name="x"):
    return torch.randn(*shape, generator=stream(0, name))


def test_groups_of_a_made_up_change_with_ties_by_index():
    delta = torch.tensor([0.5, 3.0, -2.0, 3.0, -2.0, 0.0, 3.0, -2.0])
    up, down = scores.largest_changes(delta, 2)
    assert up.tolist() == [1, 3]
    assert down.tolist() == [2, 4]


@pytest.mark.parametrize(("examples", "k", "size"), [(10, 0.01, 5), (600, 0.01, 6), (2000, 0.01, 20), (20, 0.5, 10)])
def test_the_size_of_a_group(examples, k, size):
    assert scores.group_size(examples, k) == size


@pytest.mark.parametrize(
    ("examples", "k", "told"),
    [
        (9, 0.01, "must hold at least 10 examples, for two groups of 5, got 9"),
        (100, 0.0, r"k must lie in \(0, 0.5\]"),
        (100, 0.6, "got 0.6"),
        (100, float("nan"), "got nan"),
    ],
)
def test_sizes_that_are_refused(examples, k, told):
    with pytest.raises(ValueError, match=told):
        scores.group_size(examples, k)


def test_oscillation_of_a_change_with_itself_and_its_negative():
    d = draws(30)
    deltas = torch.stack([d, -d, 5 * d, draws(30, name="other")], 1)
    assert oscillation_score(deltas, [0], [1]) == pytest.approx(-1)
    assert oscillation_score(deltas, [0], [2]) == pytest.approx(1)
    expected = np.corrcoef(deltas[:, [0, 3]].mean(1), deltas[:, [1, 2]].mean(1))[0, 1]
    assert oscillation_score(deltas, [0, 3], [1, 2]) == pytest.approx(expected, abs=1e-6)
    scaled = deltas * torch.tensor([3.0, 0.25, 0.25, 3.0])  # each group by its own positive factor
    assert oscillation_score(scaled, [0, 3], [1, 2]) == pytest.approx(expected, abs=1e-6)
    assert oscillation_score(deltas, [0, 3], [1, 2], slice(5, 15)) == pytest.approx(
        np.corrcoef(deltas[5:15, [0, 3]].mean(1), deltas[5:15, [1, 2]].mean(1))[0, 1], abs=1e-6
    )
    many = scores.oscillations(deltas, torch.tensor([[[0, 3], [1, 2]], [[0, 2], [1, 3]]]))
    assert many[0] == pytest.approx(expected, abs=1e-6)
    assert np.isnan(oscillation_score(torch.zeros(5, 2), [0], [1]))


@pytest.mark.parametrize(
    ("groups", "rows", "told"),
    [(([], [1]), 5, "at least 1 example each"), (([0], [1]), 1, "at least 2 steps in the window, got 1")],
)
def test_what_has_no_correlation(groups, rows, told):
    with pytest.raises(ValueError, match=told):
        oscillation_score(draws(rows, 3), *groups)


def test_the_share_of_changes_is_that_of_a_loop():
    delta = draws(50)
    members = [3, 7, 9]
    assert outsized_share(delta, members) == pytest.approx(
        sum(abs(float(delta[i])) for i in members) / sum(abs(float(d)) for d in delta)
    )
    assert outsized_share(torch.ones(50), members) == pytest.approx(3 / 50)
    assert np.isnan(outsized_share(torch.zeros(5), [0]))


def test_random_pairs_are_disjoint_and_any():
    pairs = scores.random_pairs(40, 5, 300, stream(0, "pairs"))
    assert pairs.shape == (300, 2, 5)
    assert all(len(set(pair.flatten().tolist())) == 10 for pair in pairs)
    counts = pairs.flatten().bincount(minlength=40)
    assert counts.min() > 0.6 * counts.float().mean()
    assert torch.equal(pairs, scores.random_pairs(40, 5, 300, stream(0, "pairs")))


@pytest.mark.parametrize("examples", [20, 21, 60, 500])
def test_matched_pairs_have_other_members_and_like_losses(examples):
    losses = draws(examples).exp()
    pair = (losses.argsort()[-5:], losses.argsort()[examples // 2 : examples // 2 + 5])
    matched = scores.matched_pairs(losses, pair, 200, stream(0, "pairs"))
    own = {*pair[0].tolist(), *pair[1].tolist()}
    for drawn in matched:
        members = drawn.flatten().tolist()
        assert len(set(members)) == 10
        assert not own & set(members)
    if examples == 500:
        means = losses[matched].mean(-1).mean(0)
        assert means[1] == pytest.approx(float(losses[pair[1]].mean()), rel=0.1)
        assert means[0] > 3 * losses.mean()  # as high as the others go
        assert len({tuple(sorted(drawn[1].tolist())) for drawn in matched}) > 100


def test_there_are_no_matched_pairs_among_too_few():
    assert len(scores.matched_pairs(draws(19), (torch.arange(5), torch.arange(5, 10)), 7, stream(0))) == 0


def test_steps_worth_a_look():
    mean = torch.tensor([5.0, 3.0, 4.0, 6.0, 2.0, 1.0, 1.5])
    deltas = torch.stack([mean.diff(), -9 * (mean.diff() > 1.5)], 1)
    assert scores.interesting_steps(mean, deltas, "rise") == [1, 2, 5]
    assert scores.interesting_steps(mean, deltas, "spike") == [2]  # the last rise has no fall yet
    assert scores.interesting_steps(mean, deltas, "largest") == [2]
    with pytest.raises(ValueError, match="kind must be one of spike, rise, largest, got 'top'"):
        scores.interesting_steps(mean, deltas, "top")  # type: ignore[arg-type]


def test_alternation_and_persistence():
    size = 2
    wave = torch.tensor([3.0, 2.0, 0.1, -2.0, -3.0])
    assert scores.alternation(torch.stack([wave, -wave, wave]), [0, 1, 2], 1, size) == 1
    assert scores.alternation(torch.stack([wave, wave]), [0, 1], 1, size) == 0
    assert np.isnan(scores.alternation(torch.stack([wave, -wave]), [0, 50], 1, size))
    other = torch.tensor([3.0, 0.2, 0.1, -2.0, 2.0])
    # up {0, 1} and {0, 4}, down {4, 3} and {3, 2}: all of {0, 1, 3, 4} against {0, 2, 3, 4}
    assert scores.persistence(torch.stack([wave, other]), size) == pytest.approx(3 / 5)
