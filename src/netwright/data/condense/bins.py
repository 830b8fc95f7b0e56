"""Bins by repeated greedy selection, and equal shares of every bin.

Zhou et al., "Dataset Quantization", ICCV 2023, arXiv:2308.10524.

    B_n = greedy maximiser of  gain(x | S) = lam sum_{p in D_n} s(p, x) - 2 sum_{p in S} s(p, x),   D_{n+1} = D_n \\ B_n
    s(p, x) = (1 + cos(f_p, f_x)) / 2

Early bins hold the most representative examples, late ones the most diverse leftovers. The gain is that of the authors'
code; ``"euclidean"`` is the paper's own, sum_{p in S} |f_p - f_x|^2 - sum_{p in D_n without S} |f_p - f_x|^2, which
orders unit vectors alike. No matrix of similarities is built: a sum of similarities is the product with a sum of
features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from torch.utils.data import Dataset, Subset

from netwright.checks import one_of
from netwright.data.condense.rounding import controlled_rounding
from netwright.seeding import numpy_stream

Gain = Literal["graphcut", "euclidean"]
IntArray = Int[np.ndarray, "chosen"]
Features = Any
"""(examples, numbers), as an array or a tensor; or the pair of :func:`last_layer_gradient_features`."""
TIE = 1e-10  # gains of n examples that differ by less than n times this are equal


class _Rows:
    """Feature vectors in float64, or the outer products of the rows of two arrays, which are never built."""

    def __init__(self, left: Float[np.ndarray, "n a"], right: Float[np.ndarray, "n b"] | None = None):
        self.left, self.right = left, right

    def __len__(self) -> int:
        return len(self.left)

    def take(self, chosen: np.ndarray) -> _Rows:
        return _Rows(self.left[chosen], None if self.right is None else self.right[chosen])

    def total(self) -> np.ndarray:
        return self.left.sum(0) if self.right is None else self.left.T @ self.right

    def dots(self, total: np.ndarray) -> np.ndarray:
        """Products of every row with a sum of rows."""
        return self.left @ total if self.right is None else ((self.right @ total.T) * self.left).sum(1)

    def dots_with(self, other: _Rows, row: int) -> np.ndarray:
        """Products of every row with one row of another."""
        found = self.left @ other.left[row]
        if self.right is None or other.right is None:
            return found
        return found * (self.right @ other.right[row])

    def squares(self) -> np.ndarray:
        found = np.einsum("na,na->n", self.left, self.left)
        return found if self.right is None else found * np.einsum("nb,nb->n", self.right, self.right)


def _rows(features: Features) -> _Rows:
    parts = features if isinstance(features, tuple) else (features,)
    arrays = [np.asarray(p.detach().cpu() if isinstance(p, torch.Tensor) else p, dtype=np.float64) for p in parts]
    for array in arrays:
        if array.ndim != 2:
            raise ValueError(f"features must have shape (examples, numbers), got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"features must be finite, got {int((~np.isfinite(array)).sum())} numbers that are not")
    if len(arrays) > 2 or len({len(array) for array in arrays}) > 1:
        raise ValueError(f"features must be one array or a pair of equal length, got {[a.shape for a in arrays]}")
    if len(arrays) == 1:
        return _Rows(arrays[0])
    # The pair (g, h) stands for g and g h^T side by side: the outer product of g and (1, h).
    return _Rows(arrays[0], np.hstack([np.ones((len(arrays[1]), 1)), arrays[1]]))


def _unit(rows: _Rows) -> _Rows:
    norm = np.sqrt(rows.squares())
    scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)  # cos with a zero vector is 0
    return _Rows(rows.left * scale[:, None], rows.right)


def _greedy(rows: _Rows, k: int, lam: float, gain: Gain, block: int) -> np.ndarray:
    """The first ``k`` picks, in order, among all rows (unit vectors, for graph cut).

    Graph cut: no gain ever rises, since similarities are not negative. So the best of a block of promising rows, kept
    up to date, is the best of all as long as it beats what the best row outside was worth when the block was made.
    """
    n, squares = len(rows), rows.squares()
    total = rows.total()
    if gain == "graphcut":
        first = lam * (n + rows.dots(total)) / 2
    else:
        first = 2 * rows.dots(total) - n * squares - squares.sum()
        block = n  # these gains rise
    tie = TIE * n * max(1.0, float(squares.max(initial=0.0)))
    picks: list[int] = []
    free = np.ones(n, dtype=bool)
    while len(picks) < k:
        now = _gains(rows, rows.take(np.array(picks, np.int64)), first, squares, gain)
        now[~free] = -np.inf
        best = int(np.flatnonzero(now >= now.max() - tie)[0])
        inside = np.arange(n) if block >= n else np.sort(np.argpartition(-now, block)[:block])
        if best not in inside:
            inside = np.sort(np.append(inside, best))
        outside = np.ones(n, dtype=bool)
        outside[inside] = False
        bound = float(now[outside].max(initial=-np.inf)) + tie
        near, value, reach = rows.take(inside), now[inside], squares[inside]
        step = int(np.searchsorted(inside, best))
        while True:
            picks.append(int(inside[step]))
            free[inside[step]] = False
            dots = near.dots_with(near, step)
            value += 2 * (reach + reach[step] - 2 * dots) if gain == "euclidean" else -(1 + dots)
            value[step] = -np.inf
            top = float(value.max())
            if len(picks) == k or top <= bound:
                break
            step = int(np.flatnonzero(value >= top - tie)[0])
    return np.array(picks, np.int64)


def _gains(rows: _Rows, chosen: _Rows, first: np.ndarray, squares: np.ndarray, gain: Gain) -> np.ndarray:
    """The gain of every row after ``chosen``, afresh, so that no rounding errors gather."""
    if not len(chosen):
        return first.copy()
    dots = rows.dots(chosen.total())
    if gain == "graphcut":
        return first - len(chosen) - dots
    return first + 2 * (len(chosen) * squares + chosen.squares().sum() - 2 * dots)


def _checked_gain(gain: str, lam: float) -> None:
    one_of("gain", gain, get_args(Gain))
    if not np.isfinite(lam):
        raise ValueError(f"lam must be finite, got {lam}")


def _block(n: int, block_size: int | None) -> int:
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size}")
    return min(n, block_size or max(512, n // 16))


def graphcut_order(
    features: Features, k: int, *, lam: float = 1.0, gain: Gain = "graphcut", block_size: int | None = None
) -> IntArray:
    """The greedy selection of ``k`` examples, in the order of picking; equal gains go to the lower index.

    Time O(k b d + n d k / (picks a block lasts)) for n vectors of d numbers, memory O(n d).

    Args:
        features: (n, d), finite; or a pair (g, h), as of :func:`last_layer_gradient_features`.
        k: How many to pick, 1..n. It goes on when gains are negative.
        lam: Weight of how central an example is (graph cut only).
        gain: ``"graphcut"``, by cosines, or ``"euclidean"``.
        block_size: Examples whose gains are kept up to date after every pick; has no influence on the result.

    Raises:
        ValueError: If ``features`` are not finite or no matrix, or another argument is out of its range.

    Example:
        >>> angle = np.deg2rad([0, 25, 80, 150])
        >>> graphcut_order(np.stack([np.cos(angle), np.sin(angle)], 1), 4).tolist()
        [2, 0, 3, 1]
    """
    _checked_gain(gain, lam)
    rows = _rows(features)
    if not 1 <= k <= len(rows):
        raise ValueError(f"k must lie in 1..{len(rows)}, got {k}")
    rows = _unit(rows) if gain == "graphcut" else rows
    return _greedy(rows, k, lam, gain, _block(len(rows), block_size))


def dataset_bins(
    features: Features,
    labels: Any = None,
    n_bins: int = 10,
    *,
    balanced: bool = True,
    gain: Gain = "graphcut",
    lam: float = 1.0,
    seed: int | None = None,
) -> list[IntArray]:
    """Splits the examples into bins, the most representative first; every example is in exactly one.

    A bin takes round(m / (bins left)) of the m examples that are left, of each class by itself when ``balanced``; so
    sizes differ by at most one a class, and a class smaller than ``n_bins`` is missing from some bins.

    Args:
        features: As for :func:`graphcut_order`.
        labels: One class for each example, or None.
        n_bins: Number of bins, 1 to the number of examples.
        balanced: Whether each class is split by itself; needs ``labels``.
        gain: As for :func:`graphcut_order`.
        lam: Likewise.
        seed: Decides among equal gains; by default the lowest index does.

    Returns:
        The indices of each bin, ascending.

    Raises:
        ValueError: If an argument is out of its range, or features and labels differ in number.

    Example:
        >>> bins = dataset_bins(np.random.default_rng(0).normal(size=(25, 3)), n_bins=4)
        >>> [len(b) for b in bins], sorted(np.concatenate(bins).tolist()) == list(range(25))
        ([6, 6, 6, 7], True)
    """
    _checked_gain(gain, lam)
    rows = _rows(features)
    if not 1 <= n_bins <= len(rows):
        raise ValueError(f"n_bins must lie in 1..{len(rows)}, got {n_bins}")
    rows = _unit(rows) if gain == "graphcut" else rows
    groups = _classes(labels, len(rows)) if balanced else np.zeros(len(rows), np.int64)
    number = np.empty(len(rows), np.int64)
    order = np.arange(len(rows)) if seed is None else numpy_stream(seed, "ties").permutation(len(rows))
    for label in np.unique(groups):
        left = order[groups[order] == label]
        for i in range(n_bins - 1):
            size = round(len(left) / (n_bins - i))
            picks = _greedy(rows.take(left), size, lam, gain, _block(len(left), None))
            number[left[picks]] = i
            left = np.delete(left, picks)
        number[left] = n_bins - 1
    return [np.flatnonzero(number == i) for i in range(n_bins)]


def _classes(labels: Any, count: int) -> np.ndarray:
    if labels is None:
        return np.zeros(count, np.int64)
    values = np.asarray(labels.cpu() if isinstance(labels, torch.Tensor) else labels)
    if values.shape != (count,):
        raise ValueError(f"labels must be {count} classes, one for each row of features, got shape {values.shape}")
    return np.unique(values, return_inverse=True)[1]


def sample_bins(
    bins: Sequence[IntArray],
    ratio: float,
    labels: Any = None,
    *,
    balanced: bool = True,
    seed: int = 0,
    allow_empty: bool = False,
) -> IntArray:
    """Draws the same share of every bin at random, round(ratio N) examples in all.

    Every bin gives its share, rounded up or down, so does every class, and so does every class of every bin. Chance
    decides which are rounded up, so that every example is as likely to be drawn
    (:func:`~netwright.data.condense.rounding.controlled_rounding`). With one seed the examples of a class in a bin are
    always drawn in the same order: a smaller subset is part of a larger one, as soon as the larger takes one more of
    each of these.

    Args:
        bins: Those of :func:`dataset_bins`: together all numbers 0..N - 1.
        ratio: Share that is kept, in (0, 1].
        labels: One class for each example, or None.
        balanced: Whether each class gets its share; needs ``labels``.
        seed: Of the drawing.
        allow_empty: Accept that a class, or everything, is left out.

    Returns:
        The chosen indices, ascending.

    Raises:
        ValueError: If ``ratio`` is outside (0, 1], the bins are no partition, or a class would vanish.

    Example:
        >>> bins = [np.arange(0, 50), np.arange(50, 100)]
        >>> chosen = sample_bins(bins, 0.1)
        >>> len(chosen), int((chosen < 50).sum())
        (10, 5)
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must lie in (0, 1], got {ratio}")
    members = np.concatenate(list(bins)) if len(bins) else np.empty(0, np.int64)
    if not len(members) or not np.array_equal(np.sort(members), np.arange(len(members))):
        raise ValueError(f"bins must hold every number from 0 on exactly once, got {len(members)} in {len(bins)} bins")
    cell = np.empty(len(members), np.int64)
    for number, chosen in enumerate(bins):
        cell[chosen] = number
    groups = _classes(labels, len(members)) if balanced else np.zeros(len(members), np.int64)
    random = numpy_stream(seed, "condense")
    tie = random.permutation(len(members))
    cells = groups * len(bins) + cell
    counts = np.bincount(cells, minlength=(int(groups.max()) + 1) * len(bins)).reshape(-1, len(bins))
    shares = controlled_rounding(counts, round(ratio * len(members)), random)
    keep = np.flatnonzero(_rank(cells, tie) < shares.flatten()[cells])
    missing = np.setdiff1d(groups, groups[keep])
    if len(missing) and not allow_empty:
        raise ValueError(
            f"ratio must leave an example of every class, got {ratio} for {len(members)} examples, which leaves "
            f"none of {len(missing)}; allow_empty accepts it"
        )
    return keep


def _rank(groups: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The place of each example in its group, counted from 0 by ascending key."""
    order = np.lexsort((key, groups))
    size = np.bincount(groups)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - np.repeat(np.cumsum(size) - size, size)
    return rank


class DatasetQuantizer(BaseEstimator):
    """Dataset quantization as an estimator: bins once, subsets of any size from them.

    Args:
        n_bins: Number of bins; the paper uses 10.
        ratio: Share that is kept, in (0, 1], unless another is asked for.
        gain: ``"graphcut"`` or ``"euclidean"``.
        balanced: Whether each class is selected from by itself, when there are labels.
        features: What makes features of the ``X`` given to :meth:`fit`; None takes ``X`` as they are.
        random_state: Seed of the drawing.

    Attributes:
        bins_: Indices of each bin, ascending.
        labels_: The labels, or None.

    Raises:
        ValueError: In :meth:`fit` and :meth:`indices`, as :func:`dataset_bins` and :func:`sample_bins`.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> x, y = load_digits(return_X_y=True)
        >>> small = DatasetQuantizer(ratio=0.1).fit(x, y)
        >>> len(small.indices()), len(small.indices(0.5))
        (180, 898)
    """

    def __init__(
        self,
        n_bins: int = 10,
        ratio: float = 0.1,
        gain: Gain = "graphcut",
        balanced: bool = True,
        features: Callable[[Any], Features] | None = None,
        random_state: int = 0,
    ):
        self.n_bins, self.ratio, self.gain, self.balanced = n_bins, ratio, gain, balanced
        self.features, self.random_state = features, random_state

    def fit(self, X: Any, y: Iterable[int] | None = None) -> Self:
        """Makes the bins."""
        found = X if self.features is None else self.features(X)
        self.bins_ = dataset_bins(found, y, self.n_bins, balanced=self.balanced, gain=self.gain)
        self.labels_ = y
        return self

    def indices(self, ratio: float | None = None, *, allow_empty: bool = False) -> IntArray:
        """The examples to keep, ascending."""
        wanted = self.ratio if ratio is None else ratio
        return sample_bins(
            self.bins_, wanted, self.labels_, balanced=self.balanced, seed=self.random_state, allow_empty=allow_empty
        )

    def subset(self, dataset: Dataset[Any], ratio: float | None = None) -> Subset[Any]:
        """That part of a data set, for any loader.

        Raises:
            ValueError: If the data set has another length than what was fitted.
        """
        count = sum(map(len, self.bins_))
        if len(dataset) != count:  # type: ignore[arg-type]  # a map-style data set has a length
            raise ValueError(f"dataset must hold the {count} examples that were fitted, got {len(dataset)}")  # type: ignore[arg-type]
        return Subset(dataset, self.indices(ratio).tolist())
