"""The models that stand in for a black box, and the choice of their depth and leaf size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.tree import DecisionTreeClassifier

from netwright.explain.tabular.faithfulness import agreement
from netwright.explain.tabular.inputs import Table
from netwright.explain.tabular.ranks import first

Kind = Literal["tree", "forest", "boosting"]
GRIDS: dict[str, dict[str, list[Any]]] = {
    "tree": {"max_depth": [6, 12, None], "min_samples_leaf": [20, 5, 1]},
    "forest": {"max_depth": [12, None], "min_samples_leaf": [3, 1]},
    "boosting": {"max_depth": [3, None], "min_samples_leaf": [20, 5]},
}
"""What is tried, simple settings first, so that of equally good ones the simplest is taken."""
TREES, TREES_FOR_TUNING = 200, 50
CLOSE = 0.01  # of the best agreement: the fewest features that come so close are taken


def make_model(
    kind: Kind, seed: int, balanced: bool, settings: Mapping[str, Any] | None = None, *, small: bool = False
) -> Any:
    """A model, not fitted.

    Args:
        kind: ``"tree"``, ``"forest"`` (200 trees) or ``"boosting"``.
        seed: Of its random numbers.
        balanced: Whether rare classes weigh more.
        settings: Depth and leaf size.
        small: Whether a forest has 50 trees, which is enough to compare settings.

    Example:
        >>> make_model("forest", 0, False, {"max_depth": 3}, small=True).n_estimators
        50
    """
    options: dict[str, Any] = {"random_state": seed, "class_weight": "balanced" if balanced else None}
    options |= settings or {}
    if kind == "tree":
        return DecisionTreeClassifier(**options)
    if kind == "forest":
        return RandomForestClassifier(n_estimators=TREES_FOR_TUNING if small else TREES, **options)
    return HistGradientBoostingClassifier(**options)


def tuned(
    kind: Kind,
    values: Float[np.ndarray, "rows k"],
    labels: Int[np.ndarray, " rows"],
    seed: int,
    balanced: bool,
    folds: int,
) -> dict[str, Any]:
    """The depth and leaf size with the highest accuracy over folds; of equals the simplest.

    The labels are a black box's predictions, or true ones where a tree is trained on the data themselves.
    """
    counts = np.bincount(labels)
    folds = min(folds, len(labels))
    splitter = StratifiedKFold if counts[counts > 0].min() >= folds else KFold
    search = GridSearchCV(
        make_model(kind, seed, balanced, small=True),
        GRIDS[kind],
        scoring="accuracy",
        cv=splitter(folds, shuffle=True, random_state=seed),
        refit=False,
    ).fit(values, labels)
    return dict(search.best_params_)


def fewest(
    kind: Kind,
    ranks: Float[np.ndarray, " features"],
    grid: Sequence[int],
    train: tuple[Table, Int[np.ndarray, " rows"]],
    held: tuple[Table, Int[np.ndarray, " more"]],
    seed: int,
    balanced: bool,
) -> tuple[int, dict[int, float]]:
    """The fewest features, the first of a ranking, whose agreement on held-out rows is within 0.01 of the best.

    Depth and leaf size are not tuned.

    Args:
        kind: As for :func:`make_model`.
        ranks: Of all features, the lowest first.
        grid: What is tried.
        train: Rows and their classes.
        held: Rows that are held out, and theirs.
        seed: As for :func:`make_model`.
        balanced: Likewise.

    Returns:
        That number, and the agreement of each in the grid.
    """
    found: dict[int, float] = {}
    for k in grid:
        columns = first(ranks, k)
        model = make_model(kind, seed, balanced, small=True).fit(train[0].single(columns), train[1])
        found[k] = agreement(model.predict(held[0].single(columns)), held[1])
    best = max(found.values())
    return min(k for k, value in found.items() if value >= best - CLOSE), found
