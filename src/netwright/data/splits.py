"""Stratified subsets and splits that never put two copies of one image on both sides.

Example r of the n examples of a class (in random order) has the key (r + 1/2) / n, and the examples with the
smallest keys are taken. That is Webster's method of apportionment: the total is exact, each class gets its
share up to rounding, and a smaller subset of the same seed is part of every larger one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from netwright.seeding import numpy_stream

TEST_SHARE = 0.2
VALIDATION_SHARE = 0.1


def _labels(labels: Any) -> np.ndarray:
    values = np.asarray(getattr(labels, "labels", labels))
    if values.ndim != 1 or values.dtype.kind not in "iub":
        raise ValueError(f"labels must be one whole number for each example, got {values.dtype} of {values.shape}")
    return values.astype(np.int64)


def _webster_order(labels: np.ndarray, sizes: np.ndarray, seed: int, name: str) -> np.ndarray:
    """The groups in the order of taking; group g holds ``sizes[g]`` examples of class ``labels[g]``."""
    shuffled = numpy_stream(seed, name).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    weight, label = sizes[by_class].astype(np.float64), labels[by_class]
    before = np.cumsum(weight) - weight
    starts = np.flatnonzero(np.r_[True, label[1:] != label[:-1]])
    per_class = np.add.reduceat(weight, starts)
    member = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(label)]))
    keys = (before - before[starts][member] + weight / 2) / per_class[member]
    ties = np.argsort(shuffled)[by_class]  # equal keys go by chance, not by the number of the class
    return by_class[np.lexsort((ties, keys))]


def _filling(candidates: np.ndarray, sizes: np.ndarray, wanted: int) -> np.ndarray:
    """The first candidates that fit into ``wanted`` examples, passing over groups that are too large."""
    if len(candidates) == 0:
        return candidates
    if (sizes[candidates] == 1).all():
        return candidates[:wanted]
    taken, room = [], wanted
    for candidate, size in zip(candidates.tolist(), sizes[candidates].tolist(), strict=True):
        if size <= room:
            taken.append(candidate)
            room -= size
    return np.array(taken or [candidates[sizes[candidates].argmin()]], np.int64)


def subset(labels: Int[Tensor, "examples"] | Any, n: int, seed: int) -> Int[Tensor, "n"]:
    """Indices of a stratified random subset of exactly ``n`` examples, ascending.

    With the same seed a smaller subset is part of a larger one.

    Args:
        labels: One class for each example, or a data set that has ``labels``.
        n: Size of the subset, 1 to the number of examples.
        seed: Seed of the choice.

    Raises:
        ValueError: If ``n`` is out of range or the labels are no integers.

    Example:
        >>> labels = torch.tensor([0] * 60 + [1] * 30)
        >>> labels[subset(labels, 9, seed=0)].bincount().tolist()
        [6, 3]
    """
    values = _labels(labels)
    if not 1 <= n <= len(values):
        raise ValueError(f"n must lie in 1..{len(values)}, got {n}")
    order = _webster_order(values, np.ones(len(values)), seed, "subset")
    return torch.from_numpy(np.sort(order[:n]))


def split_train(
    labels: Int[Tensor, "examples"] | Any,
    fraction: float,
    seed: int,
    *,
    groups: Any = None,
    name: str = "split",
) -> tuple[Int[Tensor, "rest"], Int[Tensor, "held_out"]]:
    """Splits a training part in two, stratified: the larger rest to train on and ``fraction`` of it held out.

    Every class keeps at least one group in the rest; a class so small that its share rounds to nothing is not
    held out.

    Args:
        labels: One class for each example, or a data set that has ``labels``.
        fraction: Share to hold out, in (0, 1).
        seed: Seed of the choice.
        groups: One number for each example; examples of one group (copies of one image) stay together.
        name: Name of the random stream.

    Returns:
        Indices of the rest and of the held-out part, each ascending; together they are all examples.

    Raises:
        ValueError: If ``fraction`` is not inside (0, 1), or nothing could be held out.

    Example:
        >>> rest, held = split_train(torch.tensor([0, 1] * 50), 0.2, seed=0)
        >>> len(rest), len(held), set(rest.tolist()) & set(held.tolist())
        (80, 20, set())
    """
    values = _labels(labels)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    if groups is None:
        member = np.arange(len(values))
        first, sizes = member, np.ones(len(values), np.int64)
    else:
        _, first, member, sizes = np.unique(
            np.asarray(groups), return_index=True, return_inverse=True, return_counts=True
        )
        # Groups are numbered as they first appear, so the split depends on who is whose copy, not on the keys.
        appearance = np.argsort(first)
        first, sizes, member = first[appearance], sizes[appearance], np.argsort(appearance)[member]
        if len(member) != len(values):
            raise ValueError(f"groups must be {len(values)} numbers, got {len(member)}")
    label = values[first]
    order = _webster_order(label, sizes, seed, name) if len(values) else np.empty(0, np.int64)
    last_of_class = np.zeros(len(first), bool)
    _, reverse_first = np.unique(label[order][::-1], return_index=True)
    last_of_class[order[::-1][reverse_first]] = True
    candidates = order[~last_of_class[order]]
    wanted = max(1, round(fraction * len(values)))
    held_group = np.zeros(len(first), bool)
    held_group[_filling(candidates, sizes, wanted)] = True
    held = held_group[member]
    if not held.any():
        raise ValueError(f"labels must have a class with 2 different examples to split, got {len(values)} examples")
    return torch.from_numpy(np.flatnonzero(~held)), torch.from_numpy(np.flatnonzero(held))
