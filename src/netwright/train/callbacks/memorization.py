"""What a network makes of wrong labels while it trains: the true class, the given one, or another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import lightning
from jaxtyping import Int
from torch import Tensor

from netwright.results import Result, new_axes
from netwright.train.classifier import evaluate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Memorization(Result):
    """Shares of the examples with a wrong label, and of those with the right one; NaN where there are none.

    Attributes:
        false_correct: Predicted as their true class.
        false_memorised: Predicted as their wrong label says.
        false_other: Predicted as a third class.
        clean_correct: Of the rightly labelled, predicted as their class.
    """

    false_correct: float
    false_memorised: float
    false_other: float
    clean_correct: float


def memorization(
    predicted: Int[Tensor, "examples"], labels: Int[Tensor, "examples"], true_labels: Int[Tensor, "examples"]
) -> Memorization:
    """What was made of right and wrong labels.

    Args:
        predicted: The classes that a network answers.
        labels: As it was trained on.
        true_labels: As they should be.

    Raises:
        ValueError: If the three differ in shape.

    Example:
        >>> import torch
        >>> labels, true = torch.tensor([1, 1, 1, 1]), torch.tensor([0, 0, 0, 1])
        >>> found = memorization(torch.tensor([0, 1, 1, 1]), labels, true)
        >>> round(found.false_correct, 3), round(found.false_memorised, 3), found.false_other, found.clean_correct
        (0.333, 0.667, 0.0, 1.0)
    """
    if not predicted.shape == labels.shape == true_labels.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (predicted, labels, true_labels))
        raise ValueError(f"predicted, labels and true_labels must have the same shape, got {shapes}")
    false = labels != true_labels
    right, given = predicted == true_labels, predicted == labels

    def share(chosen: Tensor) -> float:
        return float(chosen.double().mean())  # NaN of none

    return Memorization(
        share(right[false]), share(given[false]), share(~right[false] & ~given[false]), share(right[~false])
    )


class MemorizationTracker(lightning.Callback):
    """Measures after each epoch what the network makes of right and wrong labels, in evaluation mode.

    Logs ``false_correct``, ``false_memorised``, ``false_other`` and ``clean_correct``.

    Args:
        data: Batches (x, labels, ...) of the training set in a fixed order, with the labels that are trained on and
            without augmentation: ``Batches(..., shuffle=False, drop_last=False)``.
        true_labels: In the same order.

    Attributes:
        epochs: One :class:`Memorization` an epoch.

    Raises:
        ValueError: After the first epoch, if there is not one true label an example.

    Example:
        >>> from netwright.data.tensors import Batches, TensorImages
        >>> from netwright.train import fit
        >>> import torch
        >>> images = TensorImages(torch.zeros(8, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1] * 4))
        >>> tracker = MemorizationTracker(Batches(images, 8, shuffle=False), torch.zeros(8, dtype=torch.int64))
        >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
        >>> _ = fit(net, Batches(images, 4), epochs=2, callbacks=[tracker])
        >>> len(tracker.epochs), tracker.epochs[0].false_other
        (2, 0.0)
    """

    def __init__(self, data: Iterable[tuple[Tensor, ...]], true_labels: Int[Tensor, "examples"]):
        self.data, self.true_labels = data, true_labels
        self.epochs: list[Memorization] = []

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures."""
        probs, labels = evaluate(pl_module, self.data)
        self.epochs.append(memorization(probs.argmax(1), labels, self.true_labels))
        pl_module.log_dict(self.epochs[-1].to_dict())

    def plot(self, ax: Axes | None = None) -> Axes:
        """The three shares of the wrongly labelled over the epochs."""
        ax = new_axes(ax)
        places = range(1, len(self.epochs) + 1)
        for name, told in _SHOWN.items():
            ax.plot(places, _column(self.epochs, name), label=told)
        ax.set_xlabel("epoch")
        ax.set_ylabel("share of the wrongly labelled")
        ax.legend()
        return ax

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        return {"epochs": [epoch.to_dict() for epoch in self.epochs]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what was measured before."""
        self.epochs = [Memorization(**epoch) for epoch in state_dict["epochs"]]


_SHOWN = {"false_correct": "true class", "false_memorised": "wrong label", "false_other": "another class"}


def _column(epochs: Sequence[Memorization], name: str) -> list[float]:
    return [getattr(epoch, name) for epoch in epochs]
