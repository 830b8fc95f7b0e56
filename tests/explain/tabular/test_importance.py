"""Permutation and sensitivity importance: closed forms, scikit-learn's figures, updates beside whole passes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.inspection import permutation_importance as peer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

from netwright.explain.tabular import (
    EmbeddingClassifier,
    MinMax,
    SelfAttentionNetwork,
    combine_ranks,
    correlated_groups,
    permutation_importance,
    sensitivity_importance,
)
from netwright.explain.tabular.importance import scores
from netwright.explain.tabular.probe import Probe, first_affine
from netwright.explain.tabular.ranks import first
from netwright.seeding import numpy_stream, seeded


def rows(n=80, d=6, name="rows"):
    return numpy_stream(0, name).normal(size=(n, d))


def mlp(d=6, classes=3, *before):
    with seeded(0, "init"):
        return nn.Sequential(*before, nn.Linear(d, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, classes)).double()


def networks(X):
    d = X.shape[1]
    normed = nn.BatchNorm1d(d)
    normed.running_mean.copy_(torch.arange(d) / 10)
    with seeded(0, "init"):
        san = SelfAttentionNetwork(d, 3)
        low = SelfAttentionNetwork(d, 3, rank=2, gate="linear")
        coded = EmbeddingClassifier(nn.Sequential(nn.Linear(d, 4), nn.Tanh()), None, nn.Linear(4, 3))
    return {
        "linear": mlp(d),
        "norm": mlp(d, 3, nn.Flatten(), normed),
        "min-max": mlp(d, 3, MinMax(X)),
        "attention": san.double(),
        "low rank": low.double(),
        "encoder": coded.double(),
    }


@pytest.mark.parametrize("names", [("no", "yes"), (1, 2)])
def test_labels_are_those_of_the_estimator(names):
    X = rows()
    y = np.array(names)[(X[:, 0] > 0).astype(int)]
    model = LogisticRegression().fit(X, y)
    theirs = peer(model, X, y, n_repeats=3, random_state=0)
    np.testing.assert_allclose(permutation_importance(model, X, y, n_repeats=3, random_state=0).importances,
                               theirs.importances, atol=1e-12)  # fmt: skip
    assert theirs.importances_mean[0] > 0.3
    by_label = permutation_importance(model.predict, X, y, n_repeats=3, random_state=0)
    np.testing.assert_allclose(by_label.importances, theirs.importances, atol=1e-12)
    with pytest.raises(ValueError, match="y must hold classes of the black box"):
        permutation_importance(model.predict_proba, X, y)


@pytest.mark.parametrize("score", ["accuracy", "f1", "mcc"])
def test_figures_are_those_of_scikit_learn_with_the_same_seed(score):
    X = rows()
    y = (X[:, 0] > 0) + (X[:, 1] > 0.5).astype(int)
    model = LogisticRegression().fit(X, y)
    scoring = {"accuracy": "accuracy", "f1": "f1_macro", "mcc": "matthews_corrcoef"}[score]
    theirs = peer(model, X, y, scoring=scoring, n_repeats=4, random_state=3)
    ours = permutation_importance(model, X, y, score, n_repeats=4, random_state=3)
    np.testing.assert_allclose(ours.importances, theirs.importances, atol=1e-12)
    np.testing.assert_allclose(ours.importances_std, theirs.importances_std, atol=1e-12)


@pytest.mark.parametrize("name", ["linear", "norm", "min-max", "attention", "low rank", "encoder"])
def test_updates_of_the_first_layer_give_what_whole_passes_give(name):
    X = rows()
    X[:, 2] = 1.5  # a constant
    X[X < -0.5] = 0  # many values that do not change
    network = networks(X)[name].eval()
    assert first_affine(network) is not None
    y = numpy_stream(0, "labels").integers(0, 3, len(X))
    with torch.no_grad():
        direct = network(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(Probe(network, _table(X)).base, direct, atol=1e-12)
    fast = permutation_importance(network, X, y, n_repeats=3, random_state=0)
    slow = permutation_importance(network, X, y, n_repeats=3, random_state=0, updates=False)
    np.testing.assert_allclose(fast.importances, slow.importances, atol=1e-12)
    assert np.abs(fast.importances).max() > 0
    assert (fast.importances[2] == 0).all()
    moved = [sensitivity_importance(network, X, "finite", updates=u) for u in (True, False)]
    np.testing.assert_allclose(*moved, atol=1e-12)


def _table(X):
    from netwright.explain.tabular.inputs import as_table

    return as_table(X)


def test_networks_that_cannot_be_updated_are_seen_as_such():
    linear = nn.Linear(4, 2)
    hooked = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    hooked[0].register_forward_hook(lambda module, given, output: output * 2)

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x).abs()

    assert first_affine(nn.Sequential(nn.ReLU(), linear)) is None
    assert first_affine(nn.Sequential(nn.LayerNorm(4), linear)) is None
    assert first_affine(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), linear)) is None
    assert first_affine(hooked) is None
    assert first_affine(Other(4, 2)) is None
    assert first_affine(nn.Sequential(nn.Identity(), linear)) is not None
    X = rows(40, 4)
    found = [permutation_importance(m, X, random_state=0).importances for m in (hooked, Other(4, 2))]
    assert all(np.isfinite(each).all() for each in found)


def test_a_feature_that_does_not_enter_has_importance_zero():
    X = rows()
    f = lambda X: np.stack([X[:, 0] <= 0, X[:, 0] > 0], 1).astype(float)  # noqa: E731
    found = permutation_importance(f, X, random_state=0)
    assert (found.importances[1:] == 0).all()
    assert found.importances_mean[0] > 0.3
    assert (sensitivity_importance(f, X, "finite")[1:] == 0).all()
    net = nn.Linear(6, 2)
    with torch.no_grad():
        net.weight[:, 1:] = 0
    assert (sensitivity_importance(net, X)[1:] == 0).all()
    assert sensitivity_importance(net, X)[0] > 0


def test_a_fair_sign_loses_half_of_its_accuracy():
    X = np.repeat([[1.0], [-1.0]], 2000, axis=0)
    found = permutation_importance(lambda X: (X[:, 0] > 0).astype(int), X, n_repeats=20, random_state=0)
    assert found.importances_mean[0] == pytest.approx(0.5, abs=0.01)
    assert found.baseline == 1


@pytest.mark.parametrize("method", ["gradient", "finite"])
def test_a_linear_model_is_ranked_by_weight_times_deviation(method):
    random = numpy_stream(1, "linear")
    w, spread = random.normal(size=7), np.exp(random.normal(size=7))
    X = random.normal(size=(300, 7)) * spread
    net = nn.Linear(7, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(np.stack([np.zeros(7), w]) * 0.2))
        net.bias.zero_()
    found = sensitivity_importance(net, X, method)
    assert np.argsort(-found).tolist() == np.argsort(-np.abs(w) * X.std(0)).tolist()
    if method == "gradient":
        p = 1 / (1 + np.exp(-0.2 * X @ w))
        np.testing.assert_allclose(found, 0.2 * np.abs(w) * X.std(0) * (p * (1 - p)).mean(), rtol=1e-9)


@pytest.mark.parametrize("kind", ["csr", "frame", "tensor"])
def test_the_form_of_the_table_does_not_matter(kind):
    X = rows()
    X[np.abs(X) < 1] = 0
    given = {"csr": sparse.csr_matrix, "frame": pd.DataFrame, "tensor": torch.from_numpy}[kind](X)
    model = LogisticRegression().fit(X, X[:, 0] > 0.5)
    f = (lambda T: model.predict_proba(T.numpy())) if kind == "tensor" else model
    if kind == "frame":
        f = lambda frame: model.predict_proba(frame[list(range(6))].to_numpy())  # noqa: E731
    for black_box in (f, mlp()):
        found = permutation_importance(black_box, given, random_state=0)
        plain = permutation_importance(model if black_box is f else black_box, X, random_state=0)
        np.testing.assert_allclose(found.importances, plain.importances, atol=1e-12)
        assert found.importances.max() > 0
    np.testing.assert_allclose(sensitivity_importance(mlp(), given), sensitivity_importance(mlp(), X), atol=1e-12)


def test_groups_are_permuted_together():
    X = rows(200, 3)
    X[:, 1] = X[:, 0]
    f = lambda X: (X[:, 0] + X[:, 1] > 0).astype(int)  # noqa: E731
    alone = permutation_importance(f, X, random_state=0)
    groups = correlated_groups(X)
    assert groups[0] == groups[1] != groups[2]
    joint = permutation_importance(f, X, groups=groups, random_state=0)
    assert joint.importances_mean[0] == joint.importances_mean[1] > 1.5 * alone.importances_mean[0]
    order = np.random.RandomState(np.random.RandomState(0).randint(2**31 - 1 + 1))
    shuffled = np.arange(200)
    order.shuffle(shuffled)
    moved = X.copy()
    moved[:, :2] = X[shuffled, :2]
    assert joint.importances[0, 0] == pytest.approx(1 - (f(moved) == f(X)).mean())


def test_some_columns_only():
    X = rows()
    whole = permutation_importance(mlp(), X, random_state=0).importances
    some = permutation_importance(mlp(), X, random_state=0, columns=[1, 4]).importances
    np.testing.assert_array_equal(some[[1, 4]], whole[[1, 4]])
    assert np.isnan(some[[0, 2, 3, 5]]).all()


def test_scores_are_those_of_scikit_learn():
    random = numpy_stream(0, "scores")
    truth, predicted = random.integers(0, 3, 40), random.integers(0, 4, (5, 40))
    for name, oracle in {
        "accuracy": accuracy_score,
        "f1": lambda y, p: f1_score(y, p, average="macro"),
        "mcc": matthews_corrcoef,
    }.items():
        expected = [oracle(truth, p) for p in predicted]
        np.testing.assert_allclose(scores(predicted, truth, 4, name), expected, atol=1e-12)
    assert scores(np.zeros((1, 3), int), np.zeros(3, int), 1, "mcc").tolist() == [0.0]


def test_ranks():
    random = numpy_stream(0, "ranks")
    a, b = random.normal(size=(2, 30))
    expected = (stats.rankdata(-a, "ordinal") + stats.rankdata(-b, "ordinal")) / 2 - 1
    np.testing.assert_allclose(combine_ranks(a, b), expected)
    assert combine_ranks(np.zeros(4)).tolist() == [0, 1, 2, 3]
    order = random.permutation(30)
    np.testing.assert_allclose(combine_ranks(a[order], b[order]), combine_ranks(a, b)[order])
    assert first(np.array([1.0, 0, 1, 0]), 3).tolist() == [1, 3, 0]


def test_correlated_groups_against_all_pairs():
    X = rows(30, 12)
    X[:, 3], X[:, 7], X[:, 9] = X[:, 0] ** 3, -np.exp(X[:, 0]), 2.0
    found = correlated_groups(X, block=5)
    rho = stats.spearmanr(np.delete(X, 9, 1)).statistic
    kept = np.delete(np.arange(12), 9)
    for i, a in enumerate(kept):
        for j, b in enumerate(kept):
            if abs(rho[i, j]) > 0.9:
                assert found[a] == found[b]
    assert found[0] == found[3] == found[7]
    assert len(set(found)) == 10


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"X": np.zeros(3)}, "X must be"),
        ({"X": np.array([[1.0, np.nan]])}, "X must be finite"),
        ({"X": np.array([["a"]])}, "X must hold numbers"),
        ({"X": pd.DataFrame({"a": ["x", "y"]})}, "column 'a'"),
        ({"score": "auc"}, "score must be one of"),
        ({"n_repeats": 0}, "n_repeats must be"),
        ({"y": [1, 2]}, "y must be 80 labels"),
        ({"groups": [1]}, "groups must be 6"),
        ({"columns": [6]}, "columns must be numbers of features"),
        ({"predict": lambda X: X[:1]}, "predict must give"),
        ({"predict": lambda X: X[:, :1]}, "predict must give"),
    ],
)
def test_bad_input(change, told):
    good = {"predict": mlp(), "X": rows()}
    with pytest.raises(ValueError, match=told):
        permutation_importance(**good | change)


def test_bad_input_of_the_others():
    with pytest.raises(TypeError, match="must be a torch module"):
        sensitivity_importance(lambda X: X, rows())
    with pytest.raises(ValueError, match="method must be"):
        sensitivity_importance(mlp(), rows(), "exact")
    with pytest.raises(ValueError, match="must give probabilities"):
        sensitivity_importance(lambda X: X[:, 0] > 0, rows(), "finite")
    for bad, told in (((), "at least 1"), (([1.0], [1.0, 2]), "one length"), (([np.nan],), "finite")):
        with pytest.raises(ValueError, match=told):
            combine_ranks(*map(np.array, bad))
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3"):
        first(np.zeros(3), 4)
    with pytest.raises(ValueError, match="threshold must"):
        correlated_groups(rows(), 1.0)


def test_results_are_text_data_and_picture():
    found = permutation_importance(mlp(), pd.DataFrame(rows(), columns=list("abcdef")), random_state=0)
    assert "a: " in str(found)
    assert found.to_dict()["baseline"] == 1
    assert len(found.plot(most=4).patches) == 4
