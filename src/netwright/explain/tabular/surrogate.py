"""A tree, a forest or boosted trees that answer as a black box does, on the few features that it goes by.

Karim, Shajalal, Graß, Döhmen, Chala, Boden, Beecks and Decker, "Interpreting Black-box Machine Learning Models for High
Dimensional Datasets", IEEE DSAA 2023, arXiv:2208.13405. Of features ranked by attention, permutation and sensitivity
the first k train a surrogate g on the black box's own predictions,

    S_k = the k features of the lowest mean rank,    g = fit(X[:, S_k], argmax f(X))

and rules, effects of features and counterfactuals are read from g. The paper has no code for these steps and states no
details; the definitions here are the usual ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state

from netwright.checks import one_of
from netwright.explain.tabular.contributions import saabas, tree_shap
from netwright.explain.tabular.counterfactuals import Counterfactual, deviations, limits_of, nearest
from netwright.explain.tabular.explanation import Explanation
from netwright.explain.tabular.faithfulness import agreement, r_squared
from netwright.explain.tabular.inputs import Table, answers, as_table, class_labels, coded
from netwright.explain.tabular.models import Kind, fewest, make_model, tuned
from netwright.explain.tabular.ranks import first
from netwright.explain.tabular.rules import RuleList, forest_rules, tree_rules
from netwright.explain.tabular.scoring import Importance, rank_features

GRID = (10, 20, 50, 100, 200, 500)
PRESCREENED = 10  # features a feature taken, of those that the gradient ranks first, where permuting is dear
SKEWED = 5.0  # most frequent predicted class over the rarest one, above which classes are weighed


class SurrogateExplainer(BaseEstimator):
    """Explains a black box by a simpler model of it.

    Args:
        black_box: A module that gives logits (batch, classes); an estimator with ``predict_proba``; or a function that
            returns probabilities (rows, classes), given rows in the form in which X comes. ``clone`` makes an estimator
            forget what it learned unless it is inside :class:`sklearn.frozen.FrozenEstimator`.
        kind: ``"tree"``, ``"forest"`` (200 trees) or ``"boosting"`` (fidelity and TreeSHAP only).
        k: Features, in 1..d; or ``"auto"``: of ``k_grid`` the smallest whose agreement on held-out rows is within 0.01
            of the best, with settings that are not tuned.
            A module that does not begin with an affine layer computes every altered row anew, so only the 10 k features
            that it is most sensitive to are permuted; for ``"auto"`` that k is the one that fits their order.
        importances: Which scores are combined by mean rank, of ``"attention"``, ``"permutation"`` and
            ``"sensitivity"``; or ``"auto"``: all that the black box allows, permutation alone where it is no module.
        ranks: A rank for each feature in place of all these, the lowest first.
        groups: A number for each feature: those of equal number are permuted together, as zeros and ones that stand for
            one word must be; ``"correlated"`` groups features with Spearman correlations above 0.9.
        k_grid: What ``"auto"`` tries, up to d.
        n_repeats: Permutations of each feature.
        importance_rows: Rows at most, drawn from the training rows, that importances are measured on.
        validation: Share of the rows that are held out, for k and for simplified rules, in (0, 1).
        cv: Folds in which depth and leaf size are chosen by agreement with the black box, >= 2.
        class_names: Of the black box's classes, in order; by default its ``classes_``, where these are not 0, 1, ...
        random_state: An integer, or None.

    Attributes:
        columns_: (k,) the features, the most important first.
        ranks_: (d,) mean ranks.
        importances_: Score of each feature, by name.
        ranked_on_: Numbers of the rows that these were measured on.
        surrogate_: The fitted scikit-learn model, on ``columns_``; its classes are numbers of the black box's.
        settings_: The depth and leaf size that were chosen.
        k_agreements_: What ``"auto"`` found, k to agreement on the held-out rows.
        missing_classes_: Classes that the black box predicts for no row, which the surrogate therefore lacks.
        balanced_: Whether the classes were weighed, since one is predicted more than five times as often as another.

    Raises:
        ValueError: In ``fit``: if an argument is out of its range, X is not finite, the black box gives another shape,
            or predicts one class for all rows. Afterwards: if a frame has other columns than that of ``fit``, or in
            another order.
        NotFittedError: In all other methods before ``fit``.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.linear_model import LogisticRegression
        >>> X, y = load_iris(return_X_y=True)
        >>> black_box = LogisticRegression(max_iter=1000).fit(X, y)
        >>> surrogate = SurrogateExplainer(black_box, k=2, random_state=0).fit(X)
        >>> surrogate.columns_.tolist(), surrogate.fidelity(X)["agreement"] > 0.9
        ([2, 3], True)
        >>> print(surrogate.rules()[0].text())
        IF x2 <= 2.45 THEN 0
    """

    def __init__(
        self,
        black_box: Any = None,
        kind: Kind = "tree",
        k: int | Literal["auto"] = "auto",
        *,
        importances: Sequence[Importance] | Literal["auto"] = "auto",
        ranks: Float[np.ndarray, " features"] | None = None,
        groups: Int[np.ndarray, " features"] | Literal["correlated"] | None = None,
        k_grid: Sequence[int] = GRID,
        n_repeats: int = 5,
        importance_rows: int = 2000,
        validation: float = 0.25,
        cv: int = 3,
        class_names: Sequence[str] | None = None,
        random_state: int | None = None,
    ):
        self.black_box, self.kind, self.k = black_box, kind, k
        self.importances, self.ranks, self.groups, self.k_grid = importances, ranks, groups, k_grid
        self.n_repeats, self.importance_rows = n_repeats, importance_rows
        self.validation, self.cv, self.class_names, self.random_state = validation, cv, class_names, random_state

    def fit(self, X: Any, y: Any = None) -> SurrogateExplainer:
        """Ranks the features, chooses k, and trains the surrogate on the black box's predictions.

        Args:
            X: (rows, features) of the black box's training or validation part; labels are not needed.
            y: Ignored.
        """
        table = as_table(X)
        self._check(table)
        probabilities = answers(self.black_box, table)
        predicted = probabilities.argmax(1)
        counts = np.bincount(predicted, minlength=probabilities.shape[1])
        self._labels = class_labels(self.black_box, len(counts))
        if (counts > 0).sum() < 2:
            only = self._class_name(int(counts.argmax()))
            raise ValueError(
                f"black_box must predict at least 2 classes for X, got {only} for all {len(predicted)} rows"
            )
        if self.class_names is not None and len(self.class_names) != len(counts):
            raise ValueError(f"class_names must be {len(counts)}, one a class, got {len(self.class_names)}")
        self.n_features_in_ = table.shape[1]
        if table.names is not None:
            self.feature_names_in_ = np.array(table.names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        self.classes_ = np.arange(len(counts))
        self.missing_classes_ = np.flatnonzero(counts == 0)
        self.balanced_ = bool(counts.max() > SKEWED * counts[counts > 0].min())
        random = check_random_state(self.random_state)
        seed = int(random.randint(2**31 - 1))
        held_rows = math.ceil(self.validation * len(predicted))
        both = min(held_rows, len(predicted) - held_rows) >= (counts > 0).sum()  # parts hold a row of each class
        rows, held = train_test_split(
            np.arange(len(predicted)),
            test_size=self.validation,
            stratify=predicted if both and counts[counts > 0].min() >= 2 else None,
            random_state=seed,
        )
        train, test = (table.rows(rows), predicted[rows]), (table.rows(held), predicted[held])

        def enough(ranks: np.ndarray) -> tuple[int, dict[int, float]]:
            return fewest(self.kind, ranks, self._grid(), train, test, seed, self.balanced_)

        self.ranked_on_ = np.empty(0, np.intp) if self.ranks is not None else rows[: self.importance_rows]
        if self.ranks is None:
            used = table.rows(self.ranked_on_)

            def wanted(ranks: np.ndarray) -> int:
                return PRESCREENED * (enough(ranks)[0] if self.k == "auto" else int(self.k))

            self.importances_, self.ranks_ = rank_features(
                self.black_box, used, self.importances, self.n_repeats, seed, wanted, self.groups
            )
        else:
            self.importances_, self.ranks_ = {}, np.asarray(self.ranks, dtype=np.float64)
        if self.k == "auto":
            self.k_, self.k_agreements_ = enough(self.ranks_)
        else:
            self.k_agreements_, self.k_ = {}, int(self.k)
        self.columns_ = first(self.ranks_, self.k_)
        self.settings_ = tuned(self.kind, train[0].single(self.columns_), train[1], seed, self.balanced_, self.cv)
        self._values, self._predicted = table.single(self.columns_), predicted
        self._train, self._held = rows, (table.rows(held), held)
        self.surrogate_ = make_model(self.kind, seed, self.balanced_, self.settings_).fit(self._values, predicted)
        return self

    def _check(self, table: Table) -> None:
        one_of("kind", self.kind, get_args(Kind))
        if self.k != "auto" and not (isinstance(self.k, (int, np.integer)) and 1 <= self.k <= table.shape[1]):
            raise ValueError(f"k must be 'auto' or lie in 1..{table.shape[1]}, the number of features, got {self.k!r}")
        if self.k == "auto" and (not len(self.k_grid) or min(self.k_grid) < 1):
            raise ValueError(f"k_grid must hold at least 1 number >= 1, got {tuple(self.k_grid)}")
        for name, value, least in (("cv", self.cv, 2), ("importance_rows", self.importance_rows, 2)):
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if not 0 < self.validation < 1:
            raise ValueError(f"validation must lie in (0, 1), got {self.validation}")
        if self.ranks is not None:
            given = np.asarray(self.ranks)
            if given.shape != table.shape[1:] or not np.isfinite(given).all():
                raise ValueError(f"ranks must be {table.shape[1]} finite numbers, got shape {given.shape}")
        if table.shape[0] < 4:
            raise ValueError(f"X must have at least 4 rows, got {table.shape[0]}")

    def _grid(self) -> list[int]:
        found = sorted({k for k in self.k_grid if k <= self.n_features_in_})
        return found or [self.n_features_in_]

    def predict_proba(self, X: Any) -> Float[np.ndarray, "rows classes"]:
        """What the surrogate gives for all classes of the black box, 0 for those that it lacks."""
        return self._probabilities(self._table(X))

    def predict(self, X: Any) -> Int[np.ndarray, " rows"]:
        """The surrogate's classes."""
        table = self._table(X)
        return self.surrogate_.predict(table.single(self.columns_))

    def _probabilities(self, table: Table) -> np.ndarray:
        found = np.zeros((table.shape[0], len(self.classes_)))
        found[:, self.surrogate_.classes_] = self.surrogate_.predict_proba(table.single(self.columns_))
        return found

    def fidelity(self, X: Any, y: Int[np.ndarray, " rows"] | None = None) -> dict[str, float]:
        """How well the surrogate answers as the black box does, on rows that neither has seen.

        Args:
            X: (rows, features).
            y: (rows,) labels, for the accuracies of both models: of the black box's ``classes_``, else 0, 1, ...

        Returns:
            ``agreement`` of the classes, in [0, 1]; ``r2`` of the probabilities, at most 1, which may be negative; and
            with labels ``accuracy`` and ``black_box_accuracy``.

        Raises:
            ValueError: If y is not one label a row, or holds one that is no class of the black box.
        """
        table = self._table(X)
        ours, theirs = self._probabilities(table), answers(self.black_box, table)
        predicted = self.surrogate_.predict(table.single(self.columns_))
        found = {"agreement": agreement(predicted, theirs.argmax(1)), "r2": r_squared(theirs, ours)}
        if y is not None:
            labels = coded(y, table.shape[0], self._labels)
            found |= {
                "accuracy": agreement(predicted, labels),
                "black_box_accuracy": agreement(theirs.argmax(1), labels),
            }
        return found

    def rules(self, max_rules: int | None = None, *, simplify: bool = False) -> RuleList:
        """The surrogate as rules, with support and confidence of the rows that it was fitted on.

        Args:
            max_rules: At most so many; all leaves of a tree by default, 50 paths of a forest.
            simplify: Whether conditions that do not raise the confidence on the held-out rows are dropped; support and
                confidence are then of these. For held-out rows to judge them, the rules are those of a model of the
                surrogate's settings that is fitted on the others alone. The rules of a tree then overlap, and the first
                that holds decides.

        Raises:
            ValueError: If ``max_rules`` is below 1, or the surrogate is neither tree nor forest.
        """
        self._fitted("rules")
        if max_rules is not None and max_rules < 1:
            raise ValueError(f"max_rules must be >= 1, got {max_rules}")
        kind = tree_rules if self.kind == "tree" else forest_rules
        more: Any = {} if self.kind == "tree" or max_rules is None else {"max_rules": max_rules}
        model, values, predicted = self.surrogate_, self._values, self._predicted
        if simplify:
            values, predicted = values[self._train], predicted[self._train]
            model = clone(model).fit(values, predicted)
        found = kind(model, self.columns_, values, predicted, **more)
        common = int(np.bincount(self._predicted).argmax())
        listed = RuleList(found, self.n_features_in_, common, self._names, self._class_names)
        if simplify:
            table, rows = self._held
            listed = listed.simplified(table.values, self._predicted[rows])
        return listed if max_rules is None else listed.first(max_rules)

    def explain(self, x: Any, method: Literal["saabas", "shap"] = "saabas") -> Explanation:
        """Why one row is answered as it is: the path, or the rule, and what each feature adds.

        Args:
            x: (features,), or one row of a table.
            method: ``"saabas"`` for trees and forests, which adds up to the surrogate's probabilities; ``"shap"``:
                TreeSHAP by the package ``shap``, which does so too, and for boosted trees adds up to their margins.

        Raises:
            ValueError: If x is not one row, ``method`` is unknown, or a boosting's contributions are asked of Saabas.
            ModuleNotFoundError: If ``shap`` is asked for and not installed.
        """
        if method not in ("saabas", "shap"):
            raise ValueError(f"method must be 'saabas' or 'shap', got {method!r}")
        if method == "saabas":
            self._fitted("contributions by Saabas")
        table = self._row(x)
        base, parts = (saabas if method == "saabas" else tree_shap)(self.surrogate_, table.single(self.columns_))
        rules = None if self.kind == "boosting" else self.rules()
        place = -1 if rules is None else int(rules.matches(table.values)[0])
        values = table.dense(self.columns_)[0]
        return Explanation(
            columns=tuple(int(c) for c in self.columns_),
            values=values,
            base=base,
            contributions=parts[0],
            classes=tuple(int(c) for c in self.surrogate_.classes_),
            probabilities=self._probabilities(table)[0],
            black_box=answers(self.black_box, table)[0],
            rule=rules[place] if rules is not None and place >= 0 else None,
            names=self._names,
            class_names=self._class_names,
            units="margin" if self.kind == "boosting" else "probability",
        )

    def counterfactual(
        self,
        x: Any,
        target: int | str,
        immutable: Sequence[int | str] = (),
        ranges: Mapping[int | str, tuple[float, float]] | None = None,
    ) -> Counterfactual | None:
        """The nearest row that the surrogate puts into another class.

        Exact for a tree: each leaf is a box. For a forest the nearest among the boxes of all its trees that the
        forest as a whole agrees with.

        Args:
            x: (features,), or one row of a table.
            target: The class, by number or by name.
            immutable: Features that must stay, by number or by name.
            ranges: Least and largest value of a feature that changes.

        Returns:
            None if no such row keeps to the conditions.

        Raises:
            ValueError: If a class or a feature is unknown, or the surrogate is neither tree nor forest.
        """
        self._fitted("counterfactuals")
        table = self._row(x)
        wanted = self._class(target)
        inside = table.dense(self.columns_)[0].astype(np.float64)
        fixed = np.isin(self.columns_, [self._column(i) for i in immutable])
        low, high = limits_of({self._column(i): pair for i, pair in (ranges or {}).items()}, self.n_features_in_)
        scale = deviations(self._values.astype(np.float64))
        limits = (low[self.columns_], high[self.columns_])
        found = nearest(self.surrogate_, inside, wanted, scale, fixed, limits)
        if found is None:
            return None
        point, distance = found
        whole = table.dense()[0].astype(np.float64)
        changed = whole.copy()
        changed[self.columns_] = point
        agrees = answers(self.black_box, Table(changed[None], table.names, table.give)).argmax(1)[0] == wanted
        return Counterfactual(
            x=whole,
            changed=changed,
            columns=tuple(int(i) for i in self.columns_[point != inside]),
            target=wanted,
            distance=distance,
            valid_black_box=bool(agrees),
            names=self._names,
            classes=self._class_names,
        )

    @property
    def _names(self) -> tuple[str, ...] | None:
        return tuple(self.feature_names_in_) if hasattr(self, "feature_names_in_") else None

    @property
    def _class_names(self) -> tuple[str, ...] | None:
        if self.class_names is not None:
            return tuple(map(str, self.class_names))
        numbered = np.array_equal(self._labels, np.arange(len(self._labels)))
        return None if numbered else tuple(map(str, self._labels))

    def _class_name(self, number: int) -> str:
        names = self._class_names
        return f"class {number}" if names is None or number >= len(names) else repr(names[number])

    def _table(self, X: Any) -> Table:
        self._is_fitted()
        return self._ordered(as_table(X, n_features=self.n_features_in_), "X")

    def _ordered(self, table: Table, name: str) -> Table:
        """Refuses a frame whose columns are not those of fit, or in another order, as scikit-learn does."""
        if table.names is not None and self._names is not None and table.names != self._names:
            wrong, right = next(pair for pair in zip(table.names, self._names, strict=True) if pair[0] != pair[1])
            raise ValueError(f"{name} must have the columns of fit in their order, got {wrong!r} in place of {right!r}")
        return table

    def _row(self, x: Any) -> Table:
        self._is_fitted()
        one = x[None] if getattr(x, "ndim", 0) == 1 and not hasattr(x, "iloc") else x
        if hasattr(x, "to_frame"):
            one = x.to_frame().T.infer_objects()  # a row of columns of several types is of objects
        table = as_table([one] if isinstance(one, (list, tuple)) else one, "x", self.n_features_in_)
        if table.shape[0] != 1:
            raise ValueError(f"x must be one row, got {table.shape[0]}")
        return self._ordered(table, "x")

    def _is_fitted(self) -> None:
        if not hasattr(self, "surrogate_"):
            raise NotFittedError("call fit before anything else")

    def _fitted(self, what: str) -> None:
        self._is_fitted()
        if self.kind == "boosting":
            raise ValueError(f"kind must be 'tree' or 'forest' for {what}, got 'boosting'")

    def _class(self, target: int | str) -> int:
        known = self._class_names
        if isinstance(target, str):
            if known is None or target not in known:
                raise ValueError(f"target must be one of {known or self.classes_.tolist()}, got {target!r}")
            return known.index(target)
        if not 0 <= target < len(self.classes_):
            raise ValueError(f"target must lie in 0..{len(self.classes_) - 1}, got {target}")
        return int(target)

    def _column(self, feature: int | str) -> int:
        names = self._names
        if isinstance(feature, str):
            if names is None or feature not in names:
                raise ValueError(f"features must be known by name, got {feature!r}")
            return names.index(feature)
        if not 0 <= feature < self.n_features_in_:
            raise ValueError(f"features must lie in 0..{self.n_features_in_ - 1}, got {feature}")
        return int(feature)
