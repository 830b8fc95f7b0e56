"""Surrogates, rules, contributions and counterfactuals, beside scikit-learn's trees and brute force."""

from __future__ import annotations

import importlib.util
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from netwright.explain.tabular import (
    RuleList,
    SelfAttentionNetwork,
    SurrogateExplainer,
    agreement,
    comprehensiveness,
    r_squared,
    sufficiency,
)
from netwright.explain.tabular.contributions import saabas, tree_shap
from netwright.explain.tabular.counterfactuals import above, deviations, nearest, up_to
from netwright.explain.tabular.models import tuned
from netwright.explain.tabular.rules import Rule, forest_rules, tree_rules
from netwright.seeding import numpy_stream, seeded


@pytest.fixture(scope="module")
def X():
    return numpy_stream(0, "rows").normal(size=(400, 8)).astype(np.float32).astype(np.float64)


@pytest.fixture(scope="module")
def tree(X):
    """A black box that is a tree of depth three on three of the features."""
    used = X.copy()
    used[:, 3:] = 0
    y = (X[:, 0] > 0.2).astype(int) + ((X[:, 1] > -0.3) & (X[:, 2] < 0.4))
    return DecisionTreeClassifier(max_depth=3, random_state=0).fit(used, y)


@pytest.fixture(scope="module")
def explainer(X, tree):
    return SurrogateExplainer(tree, k=3, random_state=0, n_repeats=2).fit(X)


@pytest.fixture(scope="module")
def forest(X, tree):
    return SurrogateExplainer(tree, "forest", k=4, random_state=0, n_repeats=2).fit(X)


def test_a_tree_is_reproduced_from_the_features_it_goes_by(X, tree, explainer):
    assert sorted(explainer.columns_.tolist()) == [0, 1, 2]
    found = explainer.fidelity(X, tree.predict(X))
    assert found["agreement"] == found["accuracy"] == found["black_box_accuracy"] == 1
    assert (explainer.rules().predict(X) == tree.predict(X)).all()


@pytest.mark.parametrize("simplify", [False, True])
def test_rules_of_a_tree(X, explainer, simplify):
    rules = explainer.rules(simplify=simplify)
    held = np.array([rule.holds(_table(X)) for rule in rules])
    order = [(-rule.confidence, -rule.support, len(rule.conditions)) for rule in rules]
    assert order == sorted(order)
    if simplify:
        assert (rules.predict(X) == explainer.predict(X)).mean() > 0.97
        assert sum(len(r.conditions) for r in rules) <= sum(len(r.conditions) for r in explainer.rules())
        return
    assert (held.sum(0) == 1).all()
    assert sum(rule.support for rule in rules) == pytest.approx(1)
    assert (rules.predict(X) == explainer.predict(X)).all()
    assert rules.coverage(X) == 1
    for rule, mask in zip(rules, held, strict=True):
        assert rule.support == pytest.approx(mask.mean())
        assert rule.confidence == pytest.approx((explainer._predicted[mask] == rule.prediction).mean())


def _table(X):
    from netwright.explain.tabular.inputs import as_table

    return as_table(X)


def test_rules_of_random_trees_divide_the_space():
    random = numpy_stream(0, "trees")
    for depth in (1, 4, None):
        X = random.normal(size=(200, 4))
        y = random.integers(0, 3, 200)
        model = DecisionTreeClassifier(max_depth=depth, random_state=0).fit(X.astype(np.float32), y)
        listed = RuleList(tree_rules(model, np.arange(4), X.astype(np.float32), y), 4, 0)
        far = random.normal(size=(500, 4)) * 3
        assert (np.array([rule.holds(_table(far)) for rule in listed]).sum(0) == 1).all()
        assert (listed.predict(far) == model.predict(far)).all()


def test_redundant_bounds_are_merged():
    X = np.linspace(0, 10, 50)[:, None]
    y = np.digitize(X[:, 0], [2, 5])
    model = DecisionTreeClassifier(random_state=0).fit(X, y)
    told = {rule.text(["age"], ["a", "b", "c"]) for rule in tree_rules(model, np.array([0]), X, y)}
    assert len(told) == 3
    assert all(text.count("age") <= 1 for text in told)


def test_simplification_drops_what_does_not_help_and_keeps_what_does():
    random = numpy_stream(0, "drop")
    X = random.random((400, 2))
    y = (X[:, 0] > 0.5).astype(int)
    rule = Rule({0: (0.5, np.inf), 1: (0.3, 0.9)}, 1, 0.1, 1.0)
    empty = Rule({1: (7.0, np.inf)}, 0, 0.0, 0.0)
    found = RuleList((rule, empty), 2, 0).simplified(X, y)
    assert found[0].bounds == {0: (0.5, np.inf)}
    assert found[0].confidence == 1
    assert found[0].support == pytest.approx((X[:, 0] > 0.5).mean())
    assert len(found) == 1  # nothing is known of the other one
    unseen = Rule({1: (7.0, np.inf)}, 0, 0.2, 1.0)
    assert not RuleList((unseen,), 2, 0).simplified(X, y).rules
    # Brute force: no single removal keeps the confidence.
    tight = Rule({0: (0.5, np.inf), 1: (-np.inf, 0.4)}, 1, 0.1, 1.0)
    both = ((X[:, 0] > 0.5) & (X[:, 1] <= 0.4)).astype(int)
    assert RuleList((tight,), 2, 0).simplified(X, both)[0].bounds == tight.bounds


def test_simplified_rules_that_never_decide_are_left_out():
    random = numpy_stream(0, "drop")
    X = random.random((400, 2))
    y = (X[:, 0] > 0.5).astype(int)
    wide, narrow = Rule({0: (0.5, np.inf)}, 1, 0.5, 1.0), Rule({0: (0.7, np.inf), 1: (-np.inf, 0.5)}, 1, 0.2, 1.0)
    anything, after = Rule({}, 0, 1.0, 0.9), Rule({0: (0.5, np.inf)}, 0, 0.2, 0.4)
    found = RuleList((wide, narrow, anything, after), 2, 0).simplified(X, y)
    assert [rule.text() for rule in found] == ["IF x0 > 0.5 THEN 1", "IF anything THEN 0"]
    assert found[1].support == 1
    assert found[1].confidence == pytest.approx((y == 0).mean())
    everything = RuleList((wide, narrow, anything, after), 2, 0)
    assert (found.predict(X) == everything.predict(X)).all()


@pytest.mark.parametrize("kind", ["tree", "forest"])
def test_simplified_rules_are_judged_on_rows_that_they_do_not_come_from(kind):
    """Nothing predicts this black box, so no rule can be right for much more than half of any new rows."""
    random = numpy_stream(0, "noise")
    X, fresh = random.normal(size=(1200, 4)), random.normal(size=(4000, 4))
    f = lambda X: np.eye(2)[(np.sin(X @ np.full(4, 1e4)) * 1e4 % 1 > 0.5).astype(int)]  # noqa: E731
    found = SurrogateExplainer(f, kind, k=4, ranks=np.arange(4), random_state=0).fit(X)
    rules = found.rules(simplify=True)
    assert (rules.predict(fresh) == f(fresh).argmax(1)).mean() == pytest.approx(0.5, abs=0.03)
    told = np.average([rule.confidence for rule in rules], weights=[rule.support for rule in rules])
    assert told < 0.65
    table, held = found._held
    assert set(held.tolist()).isdisjoint(found._train.tolist())
    for rule in rules:
        holds = rule.holds(table)
        assert rule.support == pytest.approx(holds.mean())
        right = (found._predicted[held] == rule.prediction)[holds]
        assert rule.confidence == pytest.approx(right.mean())


def test_rules_of_a_forest_are_chosen_by_new_rows_got_right(X, forest):
    listed = forest.rules(max_rules=6)
    assert 1 <= len(listed) <= 6
    held = {rule.text(): rule.holds(_table(X)) for rule in listed}
    for rule in listed:
        assert rule.support == pytest.approx(held[rule.text()].mean())
        assert rule.confidence >= 0.8
    model, y = forest.surrogate_, forest._predicted
    first = forest_rules(model, forest.columns_, forest._values, y, max_rules=1)[0]
    gain = (np.where(y == first.prediction, 1, -1) * first.holds(_table(X))).sum()
    best = 0
    for member in model.estimators_:
        paths = member.decision_path(forest._values).toarray().astype(bool)
        for mask in paths.T:
            counts = np.bincount(y[mask], minlength=3)
            if mask.any() and counts.max() / mask.sum() >= 0.8:
                best = max(best, 2 * counts.max() - mask.sum())
    assert gain == best
    assert (forest.rules().predict(X) == y).mean() > 0.9


def test_contributions_add_up(X, explainer, forest):
    for found in (explainer, forest):
        values = X[:, found.columns_].astype(np.float32)
        base, parts = saabas(found.surrogate_, values)
        np.testing.assert_allclose(base + parts.sum(1), found.surrogate_.predict_proba(values), atol=1e-12)
        why = found.explain(X[5])
        np.testing.assert_allclose(why.base + why.contributions.sum(0), why.probabilities, atol=1e-12)
        assert why.prediction == found.predict(X[5:6])[0]
        assert why.rule is not None
        assert why.rule.holds(_table(X[5:6]))[0]
        assert "black box" in str(why)
        assert len(why.plot().patches) >= 1


def test_contributions_by_walking_down_a_tree(X):
    y = numpy_stream(0, "walk").integers(0, 3, len(X))
    model = DecisionTreeClassifier(max_depth=4, random_state=0).fit(X, y)
    tree = model.tree_
    _, parts = saabas(model, X[:7])
    for row, found in zip(X[:7].astype(np.float32), parts, strict=True):
        expected, node = np.zeros((8, 3)), 0
        while tree.children_left[node] >= 0:
            left = row[tree.feature[node]] <= tree.threshold[node]
            child = (tree.children_left if left else tree.children_right)[node]
            expected[tree.feature[node]] += tree.value[child, 0] - tree.value[node, 0]
            node = child
        np.testing.assert_allclose(found, expected, atol=1e-12)
    with pytest.raises(TypeError, match="decision tree or a random forest"):
        saabas(nn.Linear(2, 2), X)


@pytest.mark.skipif(importlib.util.find_spec("shap") is None, reason="shap is not installed")
def test_tree_shap_adds_up_and_is_that_of_shap(X, explainer):
    import shap

    values = X[:5, explainer.columns_].astype(np.float32)
    base, parts = tree_shap(explainer.surrogate_, values)
    np.testing.assert_allclose(base + parts.sum(1), explainer.surrogate_.predict_proba(values), atol=1e-6)
    theirs = shap.TreeExplainer(explainer.surrogate_).shap_values(values)
    np.testing.assert_allclose(parts, np.asarray(theirs), atol=1e-9)


@pytest.mark.skipif(importlib.util.find_spec("shap") is None, reason="shap is not installed")
@pytest.mark.parametrize("classes", [2, 3])
def test_contributions_to_a_boosting_are_told_as_margins(X, explainer, classes):
    f = lambda X: np.eye(classes)[np.digitize(X[:, 0] + X[:, 1], [0, 1][: classes - 1])]  # noqa: E731
    found = SurrogateExplainer(f, "boosting", k=2, ranks=np.arange(8), cv=2, random_state=0).fit(X)
    why = found.explain(X[0], "shap")
    margins = found.surrogate_.decision_function(X[:1, found.columns_].astype(np.float32))[0]
    expected = margins if classes == 3 else [-margins, margins]
    np.testing.assert_allclose(why.base + why.contributions.sum(0), expected, atol=1e-6)
    assert why.units == why.to_dict()["units"] == "margin"
    assert f"adds to the margin of class {why.prediction}" in str(why)
    assert why.plot().get_xlabel() == f"adds to the margin of class {why.prediction}"
    plain = explainer.explain(X[0], "shap")
    assert plain.units == "probability"
    assert f"adds to class {plain.prediction}" in str(plain)


@pytest.mark.skipif(importlib.util.find_spec("shap") is None, reason="shap is not installed")
def test_tree_shap_is_shapleys_value_over_all_coalitions(X, explainer):
    """Of the expectation of a tree where a coalition's features are known and the others follow the training rows."""
    model, values = explainer.surrogate_, X[:4, explainer.columns_].astype(np.float32)
    tree, size = model.tree_, values.shape[1]

    def expected(x, known, node=0):
        left, right = tree.children_left[node], tree.children_right[node]
        if left < 0:
            return tree.value[node, 0] / tree.value[node, 0].sum()
        if tree.feature[node] in known:
            return expected(x, known, left if x[tree.feature[node]] <= tree.threshold[node] else right)
        share = tree.weighted_n_node_samples[[left, right]] / tree.weighted_n_node_samples[node]
        return share[0] * expected(x, known, left) + share[1] * expected(x, known, right)

    base, parts = tree_shap(model, values)
    for x, found in zip(values, parts, strict=True):
        np.testing.assert_allclose(base, expected(x, ()), atol=1e-6)
        for i in range(size):
            others = [j for j in range(size) if j != i]
            value = 0.0
            for count in range(size):
                weight = math.factorial(count) * math.factorial(size - count - 1) / math.factorial(size)
                for known in itertools.combinations(others, count):
                    value += weight * (expected(x, (*known, i)) - expected(x, known))
            np.testing.assert_allclose(found[i], value, atol=1e-6)


def test_counterfactual_of_one_threshold():
    X = np.array([[1.0], [2.0], [3.0], [4.0], [6.0], [7.0], [8.0], [9.0]] * 10)
    f = lambda X: np.stack([X[:, 0] <= 5, X[:, 0] > 5], 1).astype(float)  # noqa: E731
    found = SurrogateExplainer(f, k=1, class_names=["low", "high"], random_state=0).fit(X)
    other = found.counterfactual([3.0], "high")
    assert other.changed[0] == pytest.approx(5 + 1e-6, abs=1e-9)
    assert other.distance == pytest.approx(2 / 2.5, abs=1e-5)  # the median deviation from 5 is 2.5
    assert other.valid_black_box
    assert found.predict(other.changed[None]).tolist() == [1]
    assert "for high" in str(other)
    assert other.plot().get_xlabel() == "value"
    same = found.counterfactual([3.0], "low")
    assert same.distance == 0
    assert same.columns == ()
    assert found.counterfactual([3.0], "high", immutable=[0]) is None
    assert found.counterfactual([3.0], "high", ranges={0: (0.0, 4.0)}) is None
    assert found.counterfactual([3.0], "high", ranges={0: (6.0, 9.0)}).changed[0] == 6


def test_counterfactuals_against_all_leaves(X, explainer):
    model, scale = explainer.surrogate_, deviations(X[:, explainer.columns_].astype(np.float32).astype(float))
    rows = X[:20, explainer.columns_]
    for x, full, target, fixed in itertools.product(range(5), [True], range(3), [(), (0,)]):
        found = explainer.counterfactual(X[x], target, immutable=fixed)
        expected = _brute(model, rows[x], target, scale, np.isin(explainer.columns_, fixed))
        assert full
        if expected is None:
            assert found is None
            continue
        assert found.distance == pytest.approx(expected, abs=1e-6)
        assert explainer.predict(found.changed[None])[0] == target
        assert all(found.changed[i] == X[x, i] for i in fixed)
        moved = np.abs(found.changed - X[x])[explainer.columns_] / scale
        assert moved.sum() == pytest.approx(found.distance)


def test_counterfactuals_of_random_trees_against_all_leaves():
    """Of every depth, with open ends, fixed features and ranges."""
    random = numpy_stream(0, "random trees")
    tried = none = 0
    for number in range(30):
        X = random.normal(size=(120, 4)).astype(np.float32).astype(float)
        y = random.integers(0, 3, 120)
        model = DecisionTreeClassifier(max_depth=(1, 3, 6, None)[number % 4], random_state=number).fit(X, y)
        scale = deviations(X)
        fixed = random.random(4) < 0.3
        limits = np.where(random.random(4) < 0.3, -0.5, -np.inf), np.where(random.random(4) < 0.3, 0.5, np.inf)
        for x, target in itertools.product(X[:4], range(3)):
            found = nearest(model, x, target, scale, fixed, limits)
            expected = _brute(model, x, target, scale, fixed, limits)
            assert (found is None) == (expected is None)
            tried += 1
            if found is None:
                none += 1
                continue
            assert found[1] == pytest.approx(expected, abs=1e-6)  # an end is rounded to a float32 number inwards
            assert model.predict(found[0][None]) == target
            assert (found[0] == x)[fixed].all()
    assert 20 < none < tried - 100


def _brute(model, x, target, scale, fixed, limits=(-np.inf, np.inf)):
    """The nearest leaf by walking down to each of them, number by number."""
    tree, best = model.tree_, None
    least, most = (np.broadcast_to(bound, x.shape) for bound in limits)

    def moved(i, low, high):
        """How far a number must move to lie in (low, high] as float32, and within its limits; None if it cannot."""
        if low < np.float32(x[i]) <= high and (fixed[i] or least[i] <= x[i] <= most[i]):
            return 0.0
        ends = max(low + 1e-6, least[i]), min(high, most[i])
        return None if fixed[i] or ends[0] > ends[1] else abs(min(max(x[i], ends[0]), ends[1]) - x[i])

    def walk(node, low, high):
        nonlocal best
        if tree.children_left[node] < 0:
            if model.classes_[tree.value[node, 0].argmax()] == target:
                gaps = [moved(i, low[i], high[i]) for i in range(len(x))]
                if None not in gaps:
                    distance = float((np.array(gaps) / scale).sum())
                    best = distance if best is None else min(best, distance)
            return
        i, t = tree.feature[node], tree.threshold[node]
        left, right = high.copy(), low.copy()
        left[i], right[i] = min(high[i], t), max(low[i], t)
        walk(tree.children_left[node], low, left)
        walk(tree.children_right[node], right, high)

    walk(0, np.full(len(x), -np.inf), np.full(len(x), np.inf))
    return best


def test_counterfactuals_of_a_forest_are_confirmed_by_it(X, forest):
    found = [forest.counterfactual(x, target) for x in X[:3] for target in (0, 1)]
    assert sum(other is not None for other in found) > 4
    for other in found:
        if other is not None:
            assert forest.predict(other.changed[None])[0] == other.target


def test_bounds_hold_as_float32_too():
    bounds = np.array([5.0, 100.0, 1e8, -1e8, 0.1, 1e-12, np.float64(np.float32(0.1)) + 1e-10])
    assert (above(bounds).astype(np.float32) > bounds).all()
    assert (up_to(bounds).astype(np.float32) <= bounds).all()
    assert np.abs(above(bounds) - bounds).max() < 10
    assert up_to(np.array([np.inf]))[0] == np.inf


def test_k_is_the_smallest_that_comes_close(X, tree):
    found = SurrogateExplainer(tree, k_grid=(1, 2, 3, 5, 8, 500), n_repeats=2, random_state=0).fit(X)
    assert set(found.k_agreements_) == {1, 2, 3, 5, 8}
    best = max(found.k_agreements_.values())
    assert found.k_ == min(k for k, value in found.k_agreements_.items() if value >= best - 0.01) == 3
    assert len(found.columns_) == 3


def test_depth_and_leaf_size_are_chosen_by_agreement_over_folds():
    X = numpy_stream(0, "tuned").normal(size=(120, 2)).astype(np.float32)
    noise = numpy_stream(1, "tuned").random(120) < 0.3
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    for y in (((X[:, 0] > 0) ^ noise).astype(int), (np.floor(4 * X[:, 0]) % 2).astype(int)):
        means = {
            (depth, leaf): cross_val_score(
                DecisionTreeClassifier(max_depth=depth, min_samples_leaf=leaf, random_state=0), X, y, cv=folds
            ).mean()
            for depth in (6, 12, None)
            for leaf in (20, 5, 1)
        }
        found = tuned("tree", X, y, 0, False, 3)
        assert (found["max_depth"], found["min_samples_leaf"]) == max(means, key=means.__getitem__)


def test_networks_are_ranked_by_all_that_they_allow(X):
    with seeded(0, "init"):
        dense, san = nn.Sequential(nn.Linear(8, 2)), SelfAttentionNetwork(8, 2)
    with torch.no_grad():
        gap = san.eval()(torch.tensor(X, dtype=torch.float32)).diff(dim=1).median()
        san.fc2.bias.copy_(san.fc2.bias + torch.stack([gap, gap * 0]))  # both classes are predicted
    for network, names in ((dense, {"permutation", "sensitivity"}), (san, {"permutation", "sensitivity", "attention"})):
        found = SurrogateExplainer(network, k=2, n_repeats=1, random_state=0).fit(X)
        assert set(found.importances_) == names
    with torch.no_grad():
        dense[0].weight.copy_(torch.tensor([[0.0] * 8, [0, 0, 0, 0, 0, 5, 0, -3]]))
    assert SurrogateExplainer(dense, k=2, random_state=0).fit(X).columns_.tolist() == [5, 7]


def test_networks_without_an_affine_first_layer_are_screened_by_their_gradient(X):
    with seeded(0, "init"):
        net = nn.Sequential(nn.Tanh(), nn.Linear(8, 2))
    from netwright.explain.tabular.scoring import rank_features

    scores, ranks = rank_features(net, _table(X), ["permutation"], 1, 0, wanted=lambda ranks: 3)
    assert (scores["permutation"] == scores["permutation"].min()).sum() == 5
    kept = np.argsort(ranks)[:3]
    from netwright.explain.tabular import sensitivity_importance

    assert set(kept) == set(np.argsort(-sensitivity_importance(net, X))[:3])


def test_a_convolutional_black_box_is_screened_where_k_is_not_given(monkeypatch):
    """Permuting a pixel takes convolutions anew, so only ten times what the gradient's order needs are permuted."""
    from netwright.explain.tabular import scoring, sensitivity_importance

    with seeded(0, "init"):
        net = nn.Sequential(
            nn.Unflatten(1, (1, 12, 12)), nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(200, 2)
        )
    rows = numpy_stream(0, "pixels").normal(size=(60, 144)).astype(np.float32)
    permuted: list[int] = []

    def counted(*args, columns=None, **options):
        permuted.append(144 if columns is None else len(columns))
        return permutation(*args, columns=columns, **options)

    permutation = scoring.permutation_importance
    monkeypatch.setattr(scoring, "permutation_importance", counted)
    options = {"k_grid": (2, 4), "importances": ["permutation"], "n_repeats": 1, "cv": 2, "random_state": 0}
    found = SurrogateExplainer(net, **options).fit(rows)
    by_gradient = SurrogateExplainer(net, **(options | {"importances": ["sensitivity"]})).fit(rows)
    assert permuted == [10 * by_gradient.k_]
    assert permuted[0] < 144
    slopes = sensitivity_importance(net, rows)
    assert slopes[found.columns_].min() > np.sort(slopes)[40]


def test_classes_that_are_rare_or_never_predicted(X):
    f = lambda X: np.stack([X[:, 0] <= 1.5, np.zeros(len(X)), X[:, 0] > 1.5], 1).astype(float)  # noqa: E731
    found = SurrogateExplainer(f, k=1, random_state=0).fit(X)
    assert found.missing_classes_.tolist() == [1]
    assert found.balanced_
    assert found.predict_proba(X).shape == (400, 3)
    assert (found.predict_proba(X)[:, 1] == 0).all()
    assert found.fidelity(X)["agreement"] == 1
    assert found.counterfactual(X[0], 1) is None
    assert found.counterfactual(X[0], 2).target == 2


@pytest.mark.parametrize("names", [("no", "yes"), (1, 2), (2.0, 1.0)])
def test_labels_are_those_of_the_black_box(X, names):
    y = np.array(names)[(X[:, 0] + X[:, 1] > 0).astype(int)]
    model = LogisticRegression().fit(X, y)
    found = SurrogateExplainer(model, k=2, n_repeats=1, random_state=0).fit(X)
    for given in (y, pd.Series(y), y.tolist()):
        told = found.fidelity(X, given)
        assert told["black_box_accuracy"] == model.score(X, y)
        assert told["accuracy"] == pytest.approx((model.classes_[found.predict(X)] == y).mean())
    assert {rule.text(classes=found.rules().classes).split("THEN ")[1] for rule in found.rules()} == set(
        map(str, names)
    )
    assert found.counterfactual(X[0], str(names[0])) is not None
    with pytest.raises(ValueError, match="y must hold classes of the black box"):
        found.fidelity(X, np.full(400, 7))
    with pytest.raises(ValueError, match=r"classes of the black box, 0\.\.1, got"):
        SurrogateExplainer(model.predict_proba, k=2, n_repeats=1, random_state=0).fit(X).fidelity(X, y)


@pytest.mark.parametrize(
    ("kind", "classes", "each", "validation"),
    [("tree", 2, 2, 0.25), ("tree", 8, 3, 0.25), ("tree", 8, 3, 0.7), ("forest", 6, 3, 0.1), ("boosting", 2, 2, 0.25)],
)
def test_few_rows_of_each_class_are_enough(kind, classes, each, validation):
    rows = np.repeat(np.arange(classes), each)[:, None] + np.zeros((1, 2))
    f = lambda X: np.eye(classes)[X[:, 0].astype(int)]  # noqa: E731
    found = SurrogateExplainer(f, kind, k=1, ranks=[0, 1], validation=validation, random_state=0).fit(rows)
    assert not len(found.missing_classes_)
    assert found.predict_proba(rows).shape == (len(rows), classes)
    if kind != "boosting":
        assert len(found.rules(simplify=True))


def test_boosting_has_fidelity_alone(X, tree):
    found = SurrogateExplainer(tree, "boosting", k=3, n_repeats=1, random_state=0).fit(X)
    assert found.fidelity(X)["agreement"] > 0.95
    for call in (found.rules, lambda: found.explain(X[0]), lambda: found.counterfactual(X[0], 1)):
        with pytest.raises(ValueError, match="must be 'tree' or 'forest'"):
            call()


@pytest.mark.parametrize("kind", ["frame", "csr", "tensor"])
def test_tables_of_every_form(X, kind):
    few = np.where(np.abs(X) < 0.7, 0, X)
    model = RandomForestClassifier(10, random_state=0).fit(few, few[:, 0] > 0)
    names = list("abcdefgh")
    given = {"frame": lambda v: pd.DataFrame(v, columns=names), "csr": sparse.csr_matrix, "tensor": torch.from_numpy}
    f = {"frame": lambda T: model.predict_proba(T[names].to_numpy()), "csr": model,
         "tensor": lambda T: model.predict_proba(T.numpy())}[kind]  # fmt: skip
    found = SurrogateExplainer(f, k=2, n_repeats=1, random_state=0).fit(given[kind](few))
    plain = SurrogateExplainer(model, k=2, n_repeats=1, random_state=0).fit(few)
    np.testing.assert_array_equal(found.columns_, plain.columns_)
    np.testing.assert_array_equal(found.predict(given[kind](few)), plain.predict(few))
    if kind == "frame":
        assert found.feature_names_in_.tolist() == names
        assert "a" in str(found.rules())
        frame = given[kind](few)
        assert found.explain(frame.iloc[0]).names == tuple(names)
        assert found.counterfactual(frame.iloc[[0]], 1, immutable=["b"]) is not None
        with pytest.raises(ValueError, match="known by name"):
            found.counterfactual(frame.iloc[[0]], 1, immutable=["z"])


def test_frames_keep_the_columns_of_fit_and_mix_types():
    random = numpy_stream(0, "frame")
    frame = pd.DataFrame({"x": random.normal(size=80), "on": random.random(80) < 0.5, "n": random.integers(0, 9, 80)})
    f = lambda T: np.stack([T["x"] > 0, T["x"] <= 0], 1).astype(float)  # noqa: E731
    found = SurrogateExplainer(f, k=2, n_repeats=1, random_state=0).fit(frame)
    turned, other = frame[["on", "x", "n"]], frame.rename(columns={"n": "m"})
    for call in (found.predict, found.predict_proba, found.fidelity, lambda T: found.explain(T.iloc[0]),
                 lambda T: found.counterfactual(T.iloc[[0]], 1)):  # fmt: skip
        for given in (turned, other):
            with pytest.raises(ValueError, match=r"must have the columns of fit in their order, got '(on|m)'"):
                call(given)
    assert frame.iloc[0].dtype == object
    why = found.explain(frame.iloc[0])
    np.testing.assert_array_equal(why.probabilities, found.explain(frame.iloc[[0]]).probabilities)
    assert found.counterfactual(frame.iloc[0], 1 - why.prediction).valid_black_box
    assert not hasattr(found.set_params(black_box=lambda X: f({"x": X[:, 0]})).fit(frame.to_numpy(float)),
                       "feature_names_in_")  # fmt: skip


def test_conventions_of_scikit_learn(X, tree):
    one = SurrogateExplainer(tree.predict_proba, k=3, n_repeats=1, random_state=4)
    two = clone(one)
    assert two.get_params()["k"] == 3
    assert set(one.get_params()) >= {"black_box", "kind", "k", "random_state"}
    np.testing.assert_array_equal(one.fit(X).predict(X), two.fit(X).predict(X))
    for call in (one.rules, lambda: one.predict(X)):
        call()
    fresh = clone(one)
    for call in (fresh.rules, lambda: fresh.predict(X), lambda: fresh.fidelity(X), lambda: fresh.explain(X[0])):
        with pytest.raises(NotFittedError):
            call()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 0}, "k must be 'auto' or lie in 1..8"),
        ({"k": 9}, "k must be 'auto' or lie in 1..8"),
        ({"kind": "svm"}, "kind must be one of"),
        ({"validation": 1.0}, "validation must lie"),
        ({"cv": 1}, "cv must be >= 2"),
        ({"k": "auto", "k_grid": ()}, "k_grid must hold"),
        ({"ranks": [1.0]}, "ranks must be 8"),
        ({"importances": ["guess"]}, "importances must be"),
        ({"groups": "near"}, "groups must be"),
        ({"class_names": ["a"]}, "class_names must be 3"),
        ({"black_box": lambda X: np.ones((len(X), 2)) / 2}, "at least 2 classes"),
        ({"black_box": lambda X: X[:, 0]}, "black_box must give"),
        ({"black_box": lambda X: np.full((len(X), 2), np.nan)}, "finite"),
    ],
)
def test_bad_input(X, tree, change, told):
    with pytest.raises(ValueError, match=told):
        SurrogateExplainer(**{"black_box": tree, "k": 2, "random_state": 0} | change).fit(X)


def test_bad_input_afterwards(X, explainer):
    with pytest.raises(ValueError, match="finite"):
        explainer.fidelity(np.where(np.arange(8) == 1, np.nan, X))
    with pytest.raises(ValueError, match="8 features, got 7"):
        explainer.predict(X[:, :7])
    with pytest.raises(ValueError, match="x must be one row"):
        explainer.explain(X[:2])
    with pytest.raises(ValueError, match="max_rules must be >= 1"):
        explainer.rules(max_rules=0)
    with pytest.raises(ValueError, match="target must lie"):
        explainer.counterfactual(X[0], 3)
    with pytest.raises(ValueError, match="method must be"):
        explainer.explain(X[0], "lime")
    with pytest.raises(ValueError, match="low <= high"):
        explainer.counterfactual(X[0], 1, ranges={0: (2, 1)})
    with pytest.raises(TypeError, match="black_box must be a module"):
        SurrogateExplainer(None).fit(X)


def test_r_squared_and_agreement():
    f = np.array([0.0, 1, 2, 3])
    assert r_squared(f, f) == 1
    assert r_squared(f, np.full(4, 1.5)) == 0
    assert r_squared(f, np.array([0.0, 1, 2, 2])) == pytest.approx(0.8)
    assert r_squared(f, -f) < 0
    assert np.isnan(r_squared(np.ones(3), np.zeros(3)))
    with pytest.raises(ValueError, match="one shape"):
        r_squared(f, f[:2])
    with pytest.raises(ValueError, match="equally many"):
        agreement(f, f[:2])


def test_comprehensiveness_and_sufficiency(X):
    net = nn.Linear(8, 3).double()
    all_of_them, none = np.arange(8), np.array([], int)
    assert (sufficiency(net, X, all_of_them) == 0).all()
    assert (comprehensiveness(net, X, none) == 0).all()
    np.testing.assert_allclose(comprehensiveness(net, X, all_of_them), sufficiency(net, X, none))
    top = np.argsort(numpy_stream(0, "top").random((400, 8)), axis=1)[:, :3]
    with torch.no_grad():
        p = net(torch.from_numpy(X)).softmax(1).numpy()
        without = X.copy()
        np.put_along_axis(without, top, np.take_along_axis(np.tile(X.mean(0), (400, 1)), top, 1), 1)
        q = net(torch.from_numpy(without)).softmax(1).numpy()
    best = p.argmax(1)[:, None]
    expected = (np.take_along_axis(p, best, 1) - np.take_along_axis(q, best, 1))[:, 0]
    np.testing.assert_allclose(comprehensiveness(net, X, top), expected, atol=1e-12)
    drawn = [comprehensiveness(net, X, top, "permutation", background=X[:50], random_state=1) for _ in range(2)]
    np.testing.assert_array_equal(*drawn)
    assert not np.allclose(drawn[0], expected)
    as_sparse = comprehensiveness(net, sparse.csr_array(X), top)
    np.testing.assert_allclose(as_sparse, expected, atol=1e-12)
    for bad, told in (((np.array([8]),), "top must be numbers"), ((top[:3],), "top must have shape"),
                      ((top, "zero"), "baseline must be"), ((top, np.zeros(3)), "8 finite values")):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            comprehensiveness(net, X, *bad)
