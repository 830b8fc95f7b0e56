"""What would have to be otherwise: the nearest row that a tree puts into another class.

The leaves of a tree are boxes, so that the nearest point of class c is the nearest of the nearest points of the boxes
that predict c, which is exact:

    x'_i = clip(x_i, lo_i, hi_i),    d(x, x') = sum_i |x_i - x'_i| / MAD_i

Distances are in units of the median absolute deviation (Wachter, Mittelstadt and Russell, 2017, arXiv:1711.00399), in
that of the mean absolute deviation where the median is 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from netwright.console import table
from netwright.explain.tabular.boxes import leaves, node_boxes
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN = 1e-6  # beyond the open side of a box
CHECKED = 2000  # candidates that a forest is asked about


@dataclasses.dataclass(frozen=True)
class Counterfactual(Result):
    """A row near another one, in another class.

    Attributes:
        x: The row.
        changed: The row as it would have to be.
        columns: The features that differ.
        target: The class it was to have.
        distance: Sum of the changes, each in units of its feature's deviation.
        valid_black_box: Whether the black box puts the changed row into the class as well.
        names: Of all features, or None.
        classes: Names of the classes, or None.
    """

    x: np.ndarray
    changed: np.ndarray
    columns: tuple[int, ...]
    target: int
    distance: float
    valid_black_box: bool
    names: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None

    def __str__(self) -> str:
        told = str(self.target) if self.classes is None else self.classes[self.target]
        rows = [[self._name(i), f"{self.x[i]:.4g}", f"{self.changed[i]:.4g}"] for i in self.columns]
        black_box = "too" if self.valid_black_box else "does not agree"
        return f"{table(rows, ['feature', 'is', f'for {told}'])}\ndistance {self.distance:.4g}; black box: {black_box}"

    def plot(self, ax: Axes | None = None) -> Axes:
        """What changes, from where to where."""
        ax = new_axes(ax, size=(5.0, 0.9 + 0.3 * max(1, len(self.columns))))
        for place, i in enumerate(reversed(self.columns)):
            ax.annotate("", (self.changed[i], place), (self.x[i], place), arrowprops={"arrowstyle": "->"})
            ax.plot([self.x[i], self.changed[i]], [place, place], ".", color="C0")
        ax.set_yticks(range(len(self.columns)), [self._name(i) for i in reversed(self.columns)])
        ax.set_xlabel("value")
        return ax

    def _name(self, column: int) -> str:
        return f"x{column}" if self.names is None else self.names[column]


def deviations(X: Float[np.ndarray, "rows features"]) -> Float[np.ndarray, " features"]:
    """The median absolute deviation of each feature; the mean one where that is 0, and 1 for a constant.

    Example:
        >>> deviations(np.array([[1.0, 0, 5], [2, 0, 5], [3, 0, 5], [5, 4, 5]])).tolist()
        [1.0, 1.0, 1.0]
    """
    gaps = np.abs(X - np.median(X, axis=0))
    median, mean = np.median(gaps, axis=0), gaps.mean(0)
    return np.where(median > 0, median, np.where(mean > 0, mean, 1.0))


def above(bound: np.ndarray) -> np.ndarray:
    """The least value to move to beyond an open bound, which is still beyond it as float32, as trees see it."""
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.asarray(bound + MARGIN)
        single = np.asarray(bound, dtype=np.float32)
        following = np.where(single > bound, single, np.nextafter(single, np.float32(np.inf))).astype(np.float64)
    return np.where(near.astype(np.float32) > bound, near, following)


def up_to(bound: np.ndarray) -> np.ndarray:
    """The largest value up to a closed bound, which does not exceed it as float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        single = np.asarray(bound, dtype=np.float32)
        before = np.nextafter(single, np.float32(-np.inf)).astype(np.float64)
    return np.where(single <= bound, bound, before)


def nearest_points(
    tree: Any,
    x: Float[np.ndarray, " features"],
    target: int,
    scale: Float[np.ndarray, " features"],
    fixed: Bool[np.ndarray, " features"],
    limits: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]],
) -> tuple[Float[np.ndarray, "boxes features"], Float[np.ndarray, " boxes"]]:
    """The nearest point of every leaf that predicts a class, and how far each is, nearest first.

    Args:
        tree: A fitted ``DecisionTreeClassifier``.
        x: The row.
        target: The class, one of ``tree.classes_`` (else nothing is found).
        scale: Unit of each feature's change, > 0.
        fixed: Features that may not change.
        limits: Least and largest value that a changed feature may take.
    """
    inner = tree.tree_
    ends = leaves(inner)
    wanted = ends[tree.classes_[inner.value[ends, 0, :].argmax(1)] == target]
    low, high = (bound[wanted] for bound in node_boxes(inner))
    single = x.astype(np.float32)
    inside = (single > low) & (single <= high) & (fixed | ((x >= limits[0]) & (x <= limits[1])))
    least, most = np.maximum(above(low), limits[0]), np.minimum(up_to(high), limits[1])
    points = np.where(inside, x, np.clip(x, least, np.maximum(least, most)))
    possible = (inside | (~fixed & (least <= most))).all(1)
    distances = (np.abs(points - x) / scale).sum(1)
    order = np.flatnonzero(possible)[np.argsort(distances[possible], kind="stable")]
    return points[order], distances[order]


def nearest(
    model: Any,
    x: Float[np.ndarray, " features"],
    target: int,
    scale: Float[np.ndarray, " features"],
    fixed: Bool[np.ndarray, " features"],
    limits: tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]],
) -> tuple[Float[np.ndarray, " features"], float] | None:
    """The nearest point that a model puts into a class, and how far it is; None if there is none.

    Exact for a tree. For a forest the points come from the leaves of its trees, one tree at a time, and the nearest one
    that the whole forest puts into the class is taken: there may be a nearer one.

    Args:
        model: A fitted ``DecisionTreeClassifier`` or ``RandomForestClassifier``.
        x: As for :func:`nearest_points`, and so are the others.
        target: Likewise.
        scale: Likewise.
        fixed: Likewise.
        limits: Likewise.
    """
    trees: Sequence[Any] = getattr(model, "estimators_", None) or [model]
    place = np.flatnonzero(model.classes_ == target)
    if not len(place):
        return None
    forest = trees[0] is not model
    # The trees of a forest call the classes by their places.
    inner = int(place[0]) if forest else target
    found = [nearest_points(tree, x, inner, scale, fixed, limits) for tree in trees]
    points, distances = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(distances, kind="stable")[: CHECKED if forest else 1]
    right = order[model.predict(points[order]) == target] if len(order) else order
    return (points[right[0]], float(distances[right[0]])) if len(right) else None


def limits_of(
    ranges: Mapping[int, tuple[float, float]], features: int
) -> tuple[Float[np.ndarray, " features"], Float[np.ndarray, " features"]]:
    """Least and largest values from a mapping of features.

    Raises:
        ValueError: If a range is upside down or not a pair of numbers.
    """
    low, high = np.full(features, -np.inf), np.full(features, np.inf)
    for column, (least, most) in ranges.items():
        if not least <= most:
            raise ValueError(f"ranges must be (low, high) with low <= high, got ({least}, {most})")
        low[column], high[column] = least, most
    return low, high
