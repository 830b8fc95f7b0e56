"""Class-incremental streams: classes come one after the other and never again, and what is kept of each is measured.

Forgetting is that of Chaudhry et al., "Riemannian Walk for Incremental Learning: Understanding Forgetting and
Intransigence", ECCV 2018, arXiv:1801.10112: with the accuracy a_tk on the classes of step k after step t, of T,

    forgetting = mean over k < T of (max_t a_tk - a_Tk)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from netwright.checks import whole
from netwright.data.tensors import Batches, Images


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """The part of a stream in which the same few classes are shown.

    Attributes:
        number: 0 for the first.
        classes: Those that are shown.
        indices: Their examples in the data set, ascending.
        batches: One pass of their batches after the other, for a loop of one's own or ``netwright.train.fit``.
        epochs: Passes.
    """

    number: int
    classes: tuple[int, ...]
    indices: Int[Tensor, "examples"]
    batches: Batches
    epochs: int

    def __len__(self) -> int:
        return self.epochs * len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for epoch in range(self.epochs):
            self.batches.set_epoch(epoch)
            yield from self.batches

    def index_batches(self) -> Iterator[Int[Tensor, "batch"]]:
        """The same batches as indices of the whole data set, for whatever was made of its examples beforehand."""
        for number in range(len(self)):
            yield self.indices[self.batches.indices(number)]


def class_incremental_stream(
    dataset: Images,
    class_order: Sequence[int],
    classes_per_step: int = 1,
    epochs_per_step: int = 1,
    batch_size: int = 32,
    generator: Generator | None = None,
) -> Iterator[StreamStep]:
    """A data set as a stream of classes, without replay; its batches tell nothing of where a step begins.

    Args:
        dataset: With ``labels`` and ``subset``, such as :class:`netwright.data.TensorImages`.
        class_order: The classes in the order in which they come; those left out are never shown.
        classes_per_step: How many come at a time; it divides the number of classes.
        epochs_per_step: Passes over the examples of a step, >= 1.
        batch_size: >= 1; the last batch of a pass may be smaller.
        generator: Of the order within a step; the global one by default.

    Raises:
        ValueError: If a number is out of its range, or a class is named twice or has no example.

    Example:
        >>> from netwright.data import TensorImages
        >>> data = TensorImages(torch.zeros(6, 1, 1, 1), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> for step in class_incremental_stream(data, [2, 0], batch_size=2):
        ...     print(step.classes, step.indices.tolist(), [y.tolist() for x, y in step])
        (2,) [2, 5] [[2, 2]]
        (0,) [0, 3] [[0, 0]]
    """
    order = [int(c) for c in class_order]
    counts = {"classes_per_step": classes_per_step, "epochs_per_step": epochs_per_step, "batch_size": batch_size}
    for name, value in counts.items():
        whole(name, value, ">= 1")
    if not order or len(order) % classes_per_step:
        raise ValueError(f"class_order must hold a multiple of {classes_per_step} classes, got {len(order)}")
    if len(set(order)) < len(order):
        raise ValueError(f"class_order must name each class once, got {order}")
    missing = sorted(set(order) - set(dataset.labels.unique().tolist()))
    if missing:
        raise ValueError(f"class_order must name classes of the data set, got {missing} without an example")
    seeds = torch.randint(2**62, (len(order) // classes_per_step,), generator=generator).tolist()
    return _steps(dataset, order, classes_per_step, epochs_per_step, batch_size, seeds)


def _steps(
    dataset: Images, order: list[int], each: int, epochs: int, batch_size: int, seeds: list[int]
) -> Iterator[StreamStep]:
    for number, seed in enumerate(seeds):
        classes = tuple(order[number * each : (number + 1) * each])
        chosen = torch.isin(dataset.labels, torch.tensor(classes)).nonzero().flatten()
        batches = Batches(dataset.subset(chosen), batch_size, seed=seed, drop_last=False)
        yield StreamStep(number, classes, chosen, batches, epochs)


def continual_metrics(acc_matrix: Any) -> dict[str, float]:
    """What a stream left behind.

    Args:
        acc_matrix: (steps, steps); row t, column k: accuracy on the classes of step k after step t. What is above the
            diagonal, the classes that have not come yet, is not looked at.

    Returns:
        ``final_accuracy``, the mean of the last row; ``forgetting``, how far each step but the last fell from its best,
        on average, 0 where there is one step; ``learning_accuracy``, the mean of the diagonal.

    Raises:
        ValueError: If the matrix is not square, is empty, or holds anything but numbers on and below its diagonal.

    Example:
        >>> continual_metrics([[1.0, 0.0], [0.5, 0.75]])
        {'final_accuracy': 0.625, 'forgetting': 0.5, 'learning_accuracy': 0.875}
    """
    matrix = torch.as_tensor(acc_matrix, dtype=torch.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise ValueError(f"acc_matrix must be square, of at least 1 step, got {tuple(matrix.shape)}")
    seen = torch.ones_like(matrix, dtype=torch.bool).tril()
    if not torch.isfinite(matrix[seen]).all():
        raise ValueError("acc_matrix must hold finite numbers on and below its diagonal, got others")
    best = matrix.where(seen, -torch.inf).amax(0)
    fallen = (best - matrix[-1])[:-1]
    return {
        "final_accuracy": float(matrix[-1].mean()),
        "forgetting": float(fallen.mean()) if len(fallen) else 0.0,
        "learning_accuracy": float(matrix.diagonal().mean()),
    }
