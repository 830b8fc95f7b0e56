"""Which of the five phases a network is in, from its accuracies on right, replaced and unseen labels.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061. The names are the paper's, the thresholds ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor

from netwright.diagnose.grokking.arithmetic import ModularArithmetic
from netwright.results import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Phase = Literal[
    "memorization",
    "coexistence",
    "partial inversion",
    "full inversion",
    "forgetting",
    "generalization",
    "confusion",
]
PHASES: tuple[Phase, ...] = get_args(Phase)
HIGH, LOW, HALF = 0.9, 0.1, 0.5
SHOWN = {"train": "training labels", "test": "test", "corrupted": "corrupted labels"}


def classify_phase(train_acc: float, test_acc: float, corrupted_acc: float = math.nan) -> Phase:
    """The phase of a network.

    Args:
        train_acc: Accuracy on the training pairs against the labels given, in [0, 1].
        test_acc: On the test pairs.
        corrupted_acc: On the training pairs whose label was replaced, against that label; NaN where there are none.

    Returns:
        With replaced labels ``"memorization"`` (train >= 0.9, test < 0.5); with test >= 0.9 ``"coexistence"``
        (corrupted >= 0.9), ``"full inversion"`` (corrupted <= 0.1) or ``"partial inversion"``; else ``"forgetting"``.
        Without, ``"generalization"`` (test >= 0.9), ``"memorization"`` or ``"confusion"``.

    Raises:
        ValueError: If an accuracy is outside [0, 1].

    Example:
        >>> classify_phase(0.98, 0.98, 0.94), classify_phase(0.65, 1.0, 0.0), classify_phase(1.0, 0.01)
        ('coexistence', 'full inversion', 'memorization')
    """
    for name, value in (("train_acc", train_acc), ("test_acc", test_acc), ("corrupted_acc", corrupted_acc)):
        if not 0 <= value <= 1 and not (name == "corrupted_acc" and math.isnan(value)):
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    if train_acc >= HIGH and test_acc < HALF:
        return "memorization"
    if math.isnan(corrupted_acc):
        return "generalization" if test_acc >= HIGH else "confusion"
    if test_acc < HIGH:
        return "forgetting"
    if corrupted_acc >= HIGH:
        return "coexistence"
    return "full inversion" if corrupted_acc <= LOW else "partial inversion"


def accuracies(
    predicted: Int[Tensor, "*networks examples"], data: ModularArithmetic
) -> dict[str, Float[Tensor, "*networks"]]:
    """Accuracies by group, of one network's predictions or of several.

    Args:
        predicted: Classes of all examples of ``data``, in order.
        data: The pairs; with ``split="all"`` no group is missing.

    Returns:
        ``train``, ``corrupted`` and ``uncorrupted`` against the labels given, ``corrupted_true`` and ``test`` against
        the right ones; float64, NaN for a group without examples.

    Raises:
        ValueError: If there is not one prediction for each example.

    Example:
        >>> data = ModularArithmetic(p=7, corruption=0.25, split="all")
        >>> {name: float(value) for name, value in accuracies(data.clean_targets, data).items()}
        {'train': 0.75, 'test': 1.0, 'corrupted': 0.0, 'corrupted_true': 1.0, 'uncorrupted': 1.0}
    """
    if predicted.ndim < 1 or predicted.shape[-1] != len(data):
        raise ValueError(f"predicted must be {len(data)} classes, got shape {tuple(predicted.shape)}")
    given, right = predicted == data.targets, predicted == data.clean_targets
    groups = {
        "train": (given, data.is_train),
        "test": (right, ~data.is_train),
        "corrupted": (given, data.is_corrupted),
        "corrupted_true": (right, data.is_corrupted),
        "uncorrupted": (given, data.is_train & ~data.is_corrupted),
    }
    return {name: hits[..., among].double().mean(-1) for name, (hits, among) in groups.items()}


def draw_accuracies(
    x: Sequence[float], accuracy: Mapping[str, Sequence[float]], xlabel: str, ax: Axes | None = None
) -> Axes:
    """Lines of the accuracies that tell phases apart, without the groups that have no examples."""
    ax = new_axes(ax)
    for name, label in SHOWN.items():
        if not all(math.isnan(value) for value in accuracy[name]):
            ax.plot(x, accuracy[name], label=label)
    ax.set_xlabel(xlabel)
    ax.set_ylabel("accuracy")
    ax.set_ylim(-0.02, 1.02)
    ax.legend()
    return ax
