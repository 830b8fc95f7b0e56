import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from netwright.data.condense import DatasetQuantizer, dataset_bins, graphcut_order, sample_bins
from netwright.data.condense.bins import _gains, _rows, _unit
from netwright.data.condense.rounding import controlled_rounding


def random_features(seed, n=40, d=5):
    return np.random.default_rng(seed).normal(size=(n, d)) + 0.5


def similarities(features):
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return (1 + unit @ unit.T) / 2


def distances(features):
    return ((features[:, None] - features[None]) ** 2).sum(2)


def brute_force(features, k, gain, lam=1.0):
    """Every gain from its definition, at every pick."""
    s = similarities(features) if gain == "graphcut" else distances(features)
    picks = []
    for _ in range(k):
        values = np.full(len(features), -np.inf)
        for x in set(range(len(features))) - set(picks):
            if gain == "graphcut":
                values[x] = lam * s[:, x].sum() - 2 * s[picks, x].sum()
            else:
                rest = [p for p in range(len(features)) if p not in picks]
                values[x] = s[picks, x].sum() - s[rest, x].sum()
        picks.append(int(values.argmax()))
    return picks


def angles(*degrees):
    a = np.deg2rad(degrees)
    return np.stack([np.cos(a), np.sin(a)], 1)


def test_hand_case():
    features = angles(0, 25, 80, 150)
    s = similarities(features)
    assert s[np.triu_indices(4, 1)] == pytest.approx([0.95315, 0.58682, 0.06699, 0.78679, 0.21321, 0.67101], abs=5e-6)
    assert s.sum(0) == pytest.approx([2.60697, 2.95315, 3.04462, 1.95121], abs=5e-6)
    assert graphcut_order(features, 4).tolist() == [2, 0, 3, 1]


@pytest.mark.parametrize("gain", ["graphcut", "euclidean"])
@pytest.mark.parametrize("block", [None, 3])
def test_greedy_equals_brute_force(gain, block):
    for seed in range(25):
        features = random_features(seed)
        assert graphcut_order(features, 30, gain=gain, block_size=block).tolist() == brute_force(features, 30, gain)


def test_picks_are_those_of_submodlib_and_apricot():
    """Recorded, since neither installs beside a current NumPy and torch everywhere."""
    kept = json.loads((Path(__file__).parents[2] / "oracles" / "graph_cut.json").read_text())
    features = np.random.default_rng(7).normal(size=(200, 6)) + 0.5
    assert graphcut_order(features, 100).tolist() == kept["picks"]


@pytest.mark.parametrize("lam", [0.0, 0.3, 2.5])
def test_the_weight_of_centrality(lam):
    features = random_features(3)
    assert graphcut_order(features, 40, lam=lam, block_size=7).tolist() == brute_force(features, 40, "graphcut", lam)


def test_the_blocks_have_no_influence():
    features = np.abs(random_features(0, n=700, d=8))
    orders = [graphcut_order(features, 400, block_size=b).tolist() for b in (1, 16, 700)]
    assert orders[0] == orders[1] == orders[2]


def test_both_gains_order_unit_vectors_alike():
    for seed in range(5):
        unit = random_features(seed)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        assert graphcut_order(unit, 40).tolist() == graphcut_order(unit, 40, gain="euclidean").tolist()


def test_bins_do_not_depend_on_scale_or_rotation():
    features = random_features(0, n=120, d=6)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(6, 6)))[0]
    bins = dataset_bins(features, n_bins=5)
    for other in (dataset_bins(7.5 * features, n_bins=5), dataset_bins(features @ rotation, n_bins=5)):
        assert [b.tolist() for b in other] == [b.tolist() for b in bins]


def test_a_duplicate_loses_two_when_its_twin_is_chosen():
    features = np.vstack([random_features(0), random_features(0)[:1]])
    rows = _unit(_rows(features))
    first = (len(rows) + rows.dots(rows.total())) / 2
    before = _gains(rows, rows.take(np.array([5])), first, rows.squares(), "graphcut")
    after = _gains(rows, rows.take(np.array([5, 0])), first, rows.squares(), "graphcut")
    assert before[40] == pytest.approx(before[0], abs=1e-12)
    assert after[40] == pytest.approx(before[40] - 2, abs=1e-12)
    order = graphcut_order(features, 41).tolist()
    assert order.index(0) < order.index(40)  # the lower index of equals
    assert graphcut_order(np.ones((6, 3)), 6).tolist() == [0, 1, 2, 3, 4, 5]


def test_zero_vectors_are_half_similar_to_all():
    features = np.vstack([angles(0, 30, 60), np.zeros((1, 2))])
    unit = np.vstack([angles(0, 30, 60), np.zeros((1, 2))])
    s = (1 + unit @ unit.T) / 2
    start = s.sum(0)
    assert start[3] == pytest.approx(2.0)
    assert graphcut_order(features, 4)[0] == int(start.argmax())


def test_factors_stand_for_their_outer_products():
    random = np.random.default_rng(0)
    g, h = random.normal(size=(60, 4)), random.normal(size=(60, 7))
    explicit = np.concatenate([g, np.einsum("nc,nd->ncd", g, h).reshape(60, -1)], 1)
    for gain in ("graphcut", "euclidean"):
        assert graphcut_order((g, h), 60, gain=gain).tolist() == graphcut_order(explicit, 60, gain=gain).tolist()


def test_bins_are_greedy_on_what_is_left():
    features = random_features(2, n=30)
    left, expected = list(range(30)), []
    for bins_left in (3, 2, 1):
        picks = brute_force(features[left], round(len(left) / bins_left), "graphcut")
        expected.append(sorted(left[p] for p in picks))
        left = [x for i, x in enumerate(left) if i not in picks]
    assert [b.tolist() for b in dataset_bins(features, n_bins=3)] == expected


@pytest.mark.parametrize("balanced", [True, False])
def test_bins_are_a_partition_of_even_parts(balanced):
    labels = np.repeat([0, 1, 2, 3], [50, 23, 7, 2])
    labels = labels[np.random.default_rng(0).permutation(82)]
    bins = dataset_bins(random_features(0, n=82), labels, 9, balanced=balanced)
    assert np.sort(np.concatenate(bins)).tolist() == list(range(82))
    sizes = [[int((labels[b] == c).sum()) for b in bins] for c in range(4)] if balanced else [[len(b) for b in bins]]
    assert all(max(size) - min(size) <= 1 for size in sizes)


def test_everything_and_as_many_bins_as_examples():
    bins = dataset_bins(random_features(0), n_bins=40)
    assert [len(b) for b in bins] == [1] * 40
    assert sample_bins(bins, 1.0).tolist() == list(range(40))


def test_one_bin_is_uniform_sampling():
    bins = dataset_bins(random_features(0, n=20), n_bins=1)
    draws = np.zeros(20)
    for seed in range(2000):
        draws[sample_bins(bins, 0.3, seed=seed)] += 1
    error = np.sqrt(0.3 * 0.7 / 2000)
    assert np.abs(draws / 2000 - 0.3).max() < 4 * error


def test_every_example_is_as_likely_in_uneven_bins_of_uneven_classes():
    labels = np.repeat([0, 1], [31, 16])
    bins = dataset_bins(random_features(0, n=47), labels, 5)
    draws = np.zeros(47)
    for seed in range(2000):
        draws[sample_bins(bins, 0.2, labels, seed=seed)] += 1
    share = 9 / 47
    assert np.abs(draws / 2000 - share).max() < 5 * np.sqrt(share * (1 - share) / 2000)


def test_shares_of_bins_and_classes():
    labels = np.repeat([0, 1, 2], [300, 100, 60])
    bins = dataset_bins(random_features(0, n=460), labels, 10)
    for ratio in (0.05, 0.1, 0.33, 0.6):
        chosen = sample_bins(bins, ratio, labels)
        assert len(chosen) == len(set(chosen.tolist())) == round(ratio * 460)
        for c in range(3):
            wanted = ratio * (labels == c).sum()
            assert abs((labels[chosen] == c).sum() - wanted) <= 1
            for b in bins:
                cell = b[labels[b] == c]
                assert abs(np.isin(cell, chosen).sum() - ratio * len(cell)) <= 1
        for b in bins:
            assert abs(np.isin(b, chosen).sum() - round(ratio * len(b))) <= 1


@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.1, 0.5])
def test_bins_keep_their_totals_when_classes_are_many(ratio):
    """By cells alone, bins would be off by many examples."""
    labels = np.arange(1000) % 25
    bins = dataset_bins(random_features(0, n=1000), labels, 10)
    for seed in range(5):
        chosen = sample_bins(bins, ratio, labels, seed=seed, allow_empty=True)
        for b in bins:
            assert abs(np.isin(b, chosen).sum() - round(ratio * len(b))) <= 1
        assert np.ptp(np.bincount(labels[chosen], minlength=25)) <= 1


def test_every_cell_is_as_likely_and_every_total_is_whole():
    counts = np.random.default_rng(1).integers(0, 9, (5, 4))
    whole, total, sums = counts.sum(), 30, np.zeros((5, 4))
    for seed in range(2000):
        found = controlled_rounding(counts, total, np.random.default_rng(seed))
        exact = counts * total / whole
        assert found.sum() == total
        assert (np.abs(found - exact) < 1).all()
        assert (np.abs(found.sum(0) - exact.sum(0)) < 1).all()
        assert (np.abs(found.sum(1) - exact.sum(1)) < 1).all()
        sums += found
    part = exact - np.floor(exact)
    assert (np.abs(sums / 2000 - exact) <= 5 * np.sqrt(part * (1 - part) / 2000) + 1e-9).all()


def test_a_seed_decides_among_equals():
    features = np.ones((12, 3))
    assert [b.tolist() for b in dataset_bins(features, n_bins=2)] == [list(range(6)), list(range(6, 12))]
    drawn = [dataset_bins(features, n_bins=2, seed=seed)[0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    apart = random_features(0, n=30)
    assert all(map(np.array_equal, dataset_bins(apart, n_bins=3, seed=5), dataset_bins(apart, n_bins=3)))


def test_subsets_of_one_seed_are_nested():
    labels = np.arange(200) % 4
    bins = dataset_bins(random_features(0, n=200), labels, 10)
    small, large = (set(sample_bins(bins, r, labels, seed=3).tolist()) for r in (0.2, 0.5))
    assert small < large
    assert sample_bins(bins, 0.2, labels, seed=4).tolist() != sorted(small)


def test_estimator():
    features, labels = torch.from_numpy(random_features(0, n=100)), torch.arange(100) % 5
    quantizer = DatasetQuantizer(ratio=0.2, features=lambda x: x * 2).fit(features, labels)
    assert [b.tolist() for b in quantizer.bins_] == [b.tolist() for b in dataset_bins(features, labels, 10)]
    data = TensorDataset(features, labels)
    assert quantizer.subset(data).indices == quantizer.indices().tolist()
    assert len(quantizer.subset(data, 0.5)) == 50
    assert quantizer.get_params()["n_bins"] == 10
    with pytest.raises(ValueError, match="100 examples"):
        quantizer.subset(TensorDataset(labels[:50]))


X = random_features(0)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: dataset_bins(X, n_bins=0), r"n_bins must lie in 1..40, got 0"),
        (lambda: dataset_bins(X, n_bins=41), r"n_bins must lie in 1..40, got 41"),
        (lambda: dataset_bins(X, [1, 2]), r"labels must be 40 classes"),
        (lambda: dataset_bins(X[0]), r"shape \(examples, numbers\), got \(5,\)"),
        (lambda: dataset_bins(np.where(X > 1.5, np.nan, X)), "features must be finite"),
        (lambda: dataset_bins((X, X[:3])), "pair of equal length"),
        (lambda: dataset_bins(X, gain="cosine"), "gain must be one of"),
        (lambda: graphcut_order(X, 41), "k must lie in 1..40"),
        (lambda: graphcut_order(X, 3, lam=float("inf")), "lam must be finite"),
        (lambda: graphcut_order(X, 3, block_size=0), "block_size must be >= 1"),
        (
            lambda: controlled_rounding(np.ones((2, 2), int), 5, np.random.default_rng(0)),
            r"total must lie in 0..4, got 5",
        ),
        (lambda: controlled_rounding(np.zeros((2, 2), int), 0, np.random.default_rng(0)), "not all 0"),
        (lambda: sample_bins([np.arange(5)], 0), r"ratio must lie in \(0, 1\], got 0"),
        (lambda: sample_bins([np.arange(5)], 1.1), r"ratio must lie in \(0, 1\], got 1.1"),
        (lambda: sample_bins([np.arange(5), np.arange(3)], 0.5), "exactly once"),
        (lambda: sample_bins([np.arange(40)], 0.05, np.arange(40) % 10), "none of 8"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_a_class_may_vanish_when_told():
    assert len(sample_bins([np.arange(40)], 0.05, np.arange(40) % 10, allow_empty=True)) == 2
