"""What each feature adds to the answer of a tree or a forest for a row.

Saabas's contributions: on the path of a row, what a split changes in the shares of the classes is the split feature's.
They add up exactly: base + sum of contributions = ``predict_proba``. TreeSHAP (Lundberg et al., 2020) is fairer to
features deep in a tree, and comes from the package ``shap``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import sparse

from netwright.explain.tabular.boxes import parents, shares

Contributions = tuple[Float[np.ndarray, " classes"], Float[np.ndarray, "rows features classes"]]


def saabas(model: Any, X: Float[np.ndarray, "rows features"]) -> Contributions:
    """Base value of each class, and what each feature adds to it.

    Args:
        model: A fitted ``DecisionTreeClassifier`` or ``RandomForestClassifier``.
        X: Rows.

    Raises:
        TypeError: If the model is neither.

    Example:
        >>> from sklearn.tree import DecisionTreeClassifier
        >>> tree = DecisionTreeClassifier().fit([[0.0, 7.0], [1.0, 7.0]], [0, 1])
        >>> base, parts = saabas(tree, np.array([[1.0, 7.0]]))
        >>> base.tolist(), parts[0].tolist()
        ([0.5, 0.5], [[-0.5, 0.5], [0.0, 0.0]])
    """
    trees = getattr(model, "estimators_", [model])
    if not all(hasattr(tree, "tree_") and hasattr(tree, "classes_") for tree in np.ravel(trees)):
        raise TypeError(f"model must be a decision tree or a random forest, got {type(model).__name__}")
    found = [_one(tree, X) for tree in trees]
    return np.mean([base for base, _ in found], axis=0), np.mean([parts for _, parts in found], axis=0)


def _one(model: Any, X: np.ndarray) -> Contributions:
    tree, above = model.tree_, parents(model.tree_)
    share = shares(tree)
    features, classes = tree.n_features, share.shape[1]
    inner = np.flatnonzero(above >= 0)
    change = share[inner] - share[above[inner]]
    columns = tree.feature[above[inner]][:, None] * classes + np.arange(classes)
    steps = sparse.csr_array(
        (change.ravel(), (np.repeat(inner, classes), columns.ravel())), shape=(tree.node_count, features * classes)
    )
    added = (sparse.csr_array(model.decision_path(X)) @ steps).toarray()
    return share[0], added.reshape(len(X), features, classes)


def tree_shap(model: Any, X: Float[np.ndarray, "rows features"]) -> Contributions:
    """The same by TreeSHAP, which takes the package ``shap``.

    Args:
        model: A fitted tree, forest or gradient boosting of scikit-learn; for the last base + sum of contributions =
            ``decision_function``, of two classes for the second, and its negative for the first.
        X: Rows.

    Raises:
        ModuleNotFoundError: If ``shap`` is not installed.
    """
    import shap

    explainer = shap.TreeExplainer(model)
    parts = np.asarray(explainer.shap_values(X))
    base = np.atleast_1d(explainer.expected_value)
    if parts.ndim == 2:  # boosting with two classes has one margin
        parts = np.stack([-parts, parts], -1)
        base = np.array([-base[-1], base[-1]])
    if parts.shape[0] != len(X):  # releases before 0.45 put the classes first
        parts = np.moveaxis(parts, 0, -1)
    return base, parts
