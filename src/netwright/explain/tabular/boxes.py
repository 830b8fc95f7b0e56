"""The nodes of decision trees as boxes: low < x <= high in every feature."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int


def parents(tree: Any) -> Int[np.ndarray, " nodes"]:
    """The parent of each node of a fitted ``tree_``; -1 for the root."""
    found = np.full(tree.node_count, -1)
    for children in (tree.children_left, tree.children_right):
        inner = children >= 0
        found[children[inner]] = np.flatnonzero(inner)
    return found


def leaves(tree: Any) -> Int[np.ndarray, " leaves"]:
    """The nodes without children."""
    return np.flatnonzero(tree.children_left < 0)


def node_boxes(tree: Any) -> tuple[Float[np.ndarray, "nodes features"], Float[np.ndarray, "nodes features"]]:
    """Lower (open) and upper (closed) bounds of every node.

    Example:
        >>> from sklearn.tree import DecisionTreeClassifier
        >>> tree = DecisionTreeClassifier().fit([[0.0], [1.0]], [0, 1]).tree_
        >>> low, high = node_boxes(tree)
        >>> low[leaves(tree)].ravel().tolist(), high[leaves(tree)].ravel().tolist()
        ([-inf, 0.5], [0.5, inf])
    """
    low = np.full((tree.node_count, tree.n_features), -np.inf)
    high = np.full((tree.node_count, tree.n_features), np.inf)
    # scikit-learn numbers a child after its parent.
    for node in np.flatnonzero(tree.children_left >= 0):
        left, right, column = tree.children_left[node], tree.children_right[node], tree.feature[node]
        for child in (left, right):
            low[child], high[child] = low[node], high[node]
        high[left, column] = min(high[left, column], tree.threshold[node])
        low[right, column] = max(low[right, column], tree.threshold[node])
    return low, high


def path_bounds(tree: Any, node: int, above: Int[np.ndarray, " nodes"]) -> dict[int, tuple[float, float]]:
    """The bounds of one node, of the features that are asked about on the way to it.

    Args:
        tree: A fitted ``tree_``.
        node: Which node.
        above: :func:`parents` of the tree.
    """
    found: dict[int, tuple[float, float]] = {}
    while above[node] >= 0:
        parent = int(above[node])
        column, threshold = int(tree.feature[parent]), float(tree.threshold[parent])
        low, high = found.get(column, (-np.inf, np.inf))
        left = tree.children_left[parent] == node
        found[column] = (low, min(high, threshold)) if left else (max(low, threshold), high)
        node = parent
    return found


def shares(tree: Any) -> Float[np.ndarray, "nodes classes"]:
    """The share of each class in each node, as ``predict_proba`` has it."""
    counts = tree.value[:, 0, :]
    return counts / counts.sum(1, keepdims=True)
