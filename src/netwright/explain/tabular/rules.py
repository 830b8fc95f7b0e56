"""Decision trees and forests as rules: IF bounds on some features THEN a class.

Karim et al., IEEE DSAA 2023, arXiv:2208.13405. The leaves of one tree are rules that divide the space. Those of many
trees overlap: a short list of nodes is chosen greedily that covers the most rows with the fewest mistakes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from netwright.explain.tabular.boxes import leaves, parents, path_bounds
from netwright.explain.tabular.inputs import Table, as_table
from netwright.results import Result

NAMES_OF_SIDES = (">", "<=")


@dataclasses.dataclass(frozen=True)
class Rule:
    """IF low < x <= high in each of some features THEN a class.

    Attributes:
        bounds: Feature to (low, high]; an infinite side is no condition.
        prediction: The class.
        support: Share of the rows it was measured on for which the bounds hold, in [0, 1].
        confidence: Share of those that have the class, in [0, 1].
    """

    bounds: dict[int, tuple[float, float]]
    prediction: int
    support: float
    confidence: float

    @property
    def conditions(self) -> list[tuple[int, int, float]]:
        """(feature, side, threshold) of every finite side: 0 for ``>``, 1 for ``<=``."""
        return [
            (column, side, pair[side])
            for column, pair in sorted(self.bounds.items())
            for side in (0, 1)
            if np.isfinite(pair[side])
        ]

    def holds(self, table: Table) -> Bool[np.ndarray, " rows"]:
        """For which rows the bounds hold; like scikit-learn's trees, it sees values as float32."""
        found = np.ones(table.shape[0], bool)
        for column, (low, high) in self.bounds.items():
            x = table.dense([column])[:, 0].astype(np.float32)
            found &= (x > low) & (x <= high)
        return found

    def within(self, other: Rule) -> bool:
        """Whether the other rule holds wherever this one does.

        Example:
            >>> narrow, wide = Rule({0: (2.0, 5.0)}, 1, 0.25, 1.0), Rule({0: (-np.inf, 5.0)}, 0, 0.5, 1.0)
            >>> narrow.within(wide), wide.within(narrow)
            (True, False)
        """
        everything = (-np.inf, np.inf)
        own = ((self.bounds.get(column, everything), pair) for column, pair in other.bounds.items())
        return all(low >= least and high <= most for (low, high), (least, most) in own)

    def text(self, names: Sequence[str] | None = None, classes: Sequence[str] | None = None) -> str:
        """The rule in words.

        Example:
            >>> Rule({0: (2.0, 5.0), 3: (-np.inf, 1.0)}, 1, 0.25, 1.0).text()
            'IF 2 < x0 <= 5 AND x3 <= 1 THEN 1'
        """
        parts = []
        for column, (low, high) in sorted(self.bounds.items()):
            name = f"x{column}" if names is None else names[column]
            if np.isfinite(low) and np.isfinite(high):
                parts.append(f"{low:.4g} < {name} <= {high:.4g}")
            elif np.isfinite(low) or np.isfinite(high):
                parts.append(f"{name} > {low:.4g}" if np.isfinite(low) else f"{name} <= {high:.4g}")
        told = str(self.prediction) if classes is None else classes[self.prediction]
        return f"IF {' AND '.join(parts) or 'anything'} THEN {told}"


@dataclasses.dataclass(frozen=True)
class RuleList(Result):
    """Rules in order: by confidence, then support, then fewer conditions; the first that holds decides.

    Attributes:
        rules: The rules.
        n_features: Of the rows they are about.
        default: The class where no rule holds.
        names: Of the features, or None.
        classes: Names of the classes, or None.

    Example:
        >>> low, high = Rule({0: (-np.inf, 5.0)}, 0, 0.5, 1.0), Rule({0: (5.0, np.inf)}, 1, 0.5, 1.0)
        >>> rules = RuleList((low, high), 1, 0, ("age",), ("young", "old"))
        >>> print(rules)
        IF age <= 5 THEN young  (support 0.500, confidence 1.000)
        IF age > 5 THEN old  (support 0.500, confidence 1.000)
        >>> rules.predict([[3.0], [7.0]]).tolist(), rules.coverage([[3.0], [7.0]])
        ([0, 1], 1.0)
    """

    rules: tuple[Rule, ...]
    n_features: int
    default: int
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.rules)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def __getitem__(self, place: int) -> Rule:
        return self.rules[place]

    def __str__(self) -> str:
        return "\n".join(
            f"{rule.text(self.names, self.classes)}  (support {rule.support:.3f}, confidence {rule.confidence:.3f})"
            for rule in self.rules
        )

    def to_dict(self) -> dict[str, Any]:
        """The rules as plain values."""
        return {
            "rules": [
                {
                    "text": rule.text(self.names, self.classes),
                    "conditions": [[column, NAMES_OF_SIDES[side], bound] for column, side, bound in rule.conditions],
                    "prediction": rule.prediction,
                    "support": rule.support,
                    "confidence": rule.confidence,
                }
                for rule in self.rules
            ],
            "default": self.default,
        }

    def matches(self, X: Any) -> Int[np.ndarray, " rows"]:
        """The place of the first rule that holds for each row; -1 where none does.

        Raises:
            ValueError: If X has another number of features.
        """
        table = as_table(X, n_features=self.n_features)
        found = np.full(table.shape[0], -1)
        for place, rule in enumerate(self.rules):
            left = np.flatnonzero(found < 0)
            if not len(left):
                break
            found[left[rule.holds(table.rows(left))]] = place
        return found

    def predict(self, X: Any) -> Int[np.ndarray, " rows"]:
        """The class of each row.

        Raises:
            ValueError: If X has another number of features.
        """
        predictions = np.array([*(rule.prediction for rule in self.rules), self.default])
        return predictions[self.matches(X)]

    def coverage(self, X: Any) -> float:
        """The share of rows for which some rule holds.

        Raises:
            ValueError: If X has another number of features.
        """
        return float((self.matches(X) >= 0).mean())

    def first(self, count: int) -> RuleList:
        """Only so many rules, the first.

        Raises:
            ValueError: If ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"max_rules must be >= 1, got {count}")
        return dataclasses.replace(self, rules=self.rules[:count])

    def simplified(self, X: Any, y: Int[np.ndarray, " rows"]) -> RuleList:
        """The rules without the conditions that do not raise their confidence on held-out rows, dropped greedily.

        Rules may overlap afterwards. Those that hold for none of the rows are left out, since nothing is known of them,
        and so are those that can never decide, since wherever they hold an earlier one does.

        Args:
            X: Rows that what the rules come from was not fitted on.
            y: What the black box predicts for them.

        Returns:
            With support and confidence of these rows. They choose the conditions too, so that confidences on few of
            them are too high.

        Raises:
            ValueError: If X has another number of features, or y is not one class a row.
        """
        table, labels = as_table(X, n_features=self.n_features), np.asarray(y)
        if labels.shape != (table.shape[0],):
            raise ValueError(f"y must be {table.shape[0]} classes, got shape {labels.shape}")
        found = (_simplified(rule, table, labels) for rule in self.rules)
        kept: list[Rule] = []
        for rule in ordered(rule for rule in found if rule.support > 0):
            if not any(rule.within(earlier) for earlier in kept):
                kept.append(rule)
        return dataclasses.replace(self, rules=tuple(kept))


def ordered(rules: Any) -> tuple[Rule, ...]:
    """Rules by confidence, then support, then fewer conditions."""
    return tuple(sorted(rules, key=lambda rule: (-rule.confidence, -rule.support, len(rule.conditions))))


def _simplified(rule: Rule, table: Table, labels: np.ndarray) -> Rule:
    conditions = rule.conditions
    right = labels == rule.prediction
    if not conditions:
        return dataclasses.replace(rule, support=1.0, confidence=float(right.mean()))
    values = table.dense([column for column, _, _ in conditions]).T.astype(np.float32)
    thresholds = np.array([bound for _, _, bound in conditions])[:, None]
    above = np.array([side == 0 for _, side, _ in conditions])[:, None]
    broken = np.where(above, ~(values > thresholds), ~(values <= thresholds))
    alive = np.ones(len(conditions), bool)
    while True:
        faults = broken[alive].sum(0)
        held = faults == 0
        if not held.any():
            return dataclasses.replace(rule, support=0.0)
        confidence = right[held].mean()
        # Without one condition the rule also holds where this is the only one that is broken.
        places = np.flatnonzero(alive)
        wider = held | ((faults == 1) & broken[places])
        each = (wider & right).sum(1) / wider.sum(1) if len(places) else np.empty(0)
        if not len(places) or each.max() < confidence:
            break
        alive[places[each.argmax()]] = False
    bounds: dict[int, tuple[float, float]] = {}
    for place in np.flatnonzero(alive):
        column, side, bound = conditions[place]
        low, high = bounds.get(column, (-np.inf, np.inf))
        bounds[column] = (bound, high) if side == 0 else (low, bound)
    return Rule(bounds, rule.prediction, float(held.mean()), float(confidence))


def tree_rules(
    tree: Any, columns: Int[np.ndarray, " k"], X: Float[np.ndarray, "rows k"], y: Int[np.ndarray, " rows"]
) -> tuple[Rule, ...]:
    """A rule for each leaf of a fitted decision tree.

    Args:
        tree: A fitted ``DecisionTreeClassifier``.
        columns: Which features of the whole table its features are.
        X: Rows to measure support and confidence on.
        y: Their classes, as the black box predicts them.
    """
    inner, above = tree.tree_, parents(tree.tree_)
    where = tree.apply(X)
    predicted = tree.classes_[inner.value[:, 0, :].argmax(1)]
    count = np.bincount(where, minlength=inner.node_count)
    hits = np.bincount(where, weights=predicted[where] == y, minlength=inner.node_count)
    return ordered(
        Rule(
            _renamed(path_bounds(inner, leaf, above), columns),
            int(predicted[leaf]),
            float(count[leaf] / len(y)),
            float(hits[leaf] / count[leaf]) if count[leaf] else 0.0,
        )
        for leaf in leaves(inner)
    )


def _renamed(bounds: dict[int, tuple[float, float]], columns: Int[np.ndarray, " k"]) -> dict[int, tuple[float, float]]:
    return {int(columns[column]): pair for column, pair in bounds.items()}


def forest_rules(
    forest: Any,
    columns: Int[np.ndarray, " k"],
    X: Float[np.ndarray, "rows k"],
    y: Int[np.ndarray, " rows"],
    max_rules: int = 50,
    least_confidence: float = 0.8,
) -> tuple[Rule, ...]:
    """Paths of all trees of a forest, chosen one after another by how many new rows they get right.

    Every path from a root to a node is a candidate, with the most frequent class of its rows. What counts is the number
    of rows that no rule chosen before covers and that have the class, less the number of those that have another.

    Args:
        forest: A fitted ``RandomForestClassifier``.
        columns: Which features of the whole table its features are.
        X: Rows to choose and measure by.
        y: Their classes, as the black box predicts them.
        max_rules: At most so many; fewer where no candidate covers more right than wrong.
        least_confidence: Of a candidate, in [0, 1].
    """
    paths, starts = forest.decision_path(X)
    paths = sparse.csc_array(paths)
    classes, coded = np.unique(y, return_inverse=True)
    counts = np.asarray((paths.T @ sparse.csr_array(np.eye(len(classes))[coded])).todense())
    size, best = counts.sum(1), counts.argmax(1)
    confidence = np.divide(counts.max(1), size, out=np.zeros(len(size)), where=size > 0)
    candidates = np.flatnonzero((confidence >= least_confidence) & (size > 0))
    chosen = sparse.csr_array(paths[:, candidates].T.astype(np.float64))
    sign = np.where(best[candidates][_row_numbers(chosen)] == coded[chosen.indices], 1.0, -1.0)
    signed = sparse.csr_array((sign, chosen.indices, chosen.indptr), shape=chosen.shape)
    uncovered = np.ones(len(y))
    rules: list[Rule] = []
    while len(rules) < max_rules and len(candidates):
        gain = signed @ uncovered
        place = int(np.lexsort((size[candidates], -confidence[candidates], -gain))[0])
        if gain[place] <= 0:
            break
        node = int(candidates[place])
        number = int(np.searchsorted(starts, node, side="right") - 1)
        inner = forest.estimators_[number].tree_
        bounds = _renamed(path_bounds(inner, node - int(starts[number]), parents(inner)), columns)
        rules.append(Rule(bounds, int(classes[best[node]]), float(size[node] / len(y)), float(confidence[node])))
        uncovered[chosen.indices[chosen.indptr[place] : chosen.indptr[place + 1]]] = 0
    return ordered(rules)


def _row_numbers(matrix: Any) -> np.ndarray:
    return np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
