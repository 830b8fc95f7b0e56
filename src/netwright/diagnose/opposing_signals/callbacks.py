"""Opposing signals in anybody's training, as a Lightning callback.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.
"""

from __future__ import annotations

import math
from typing import Any

import lightning
import torch
from torch.utils.data import Dataset

from netwright.diagnose.callbacks import CROSS_ENTROPY
from netwright.diagnose.gradients import Batched
from netwright.diagnose.losses import LossFunction
from netwright.diagnose.opposing_signals.scores import group_size, largest_changes, oscillation_score, outsized_share
from netwright.diagnose.opposing_signals.tracker import OpposingSignalTracker

# Examples trained on for each one looked at. A look is a forward pass, a third of what training on an example costs.
SPARED = 5


class OpposingSignalCallback(lightning.Callback):
    """Records the losses of a fixed set of examples in bursts of successive steps, and logs how far groups oppose.

    After each burst it logs, of the step in it with the largest rise of the mean loss, ``opposing/oscillation`` (rho of
    the groups whose losses rose and fell most, over the burst) and ``opposing/share`` (their share of all loss
    changes). Training is not changed by it: nothing random is drawn, and ``.grad`` and running statistics stay.

    Args:
        data: The examples: a pair of tensors (inputs, targets) as the module takes them, a data set of such pairs, or a
            list of batches.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        every: Steps from the start of a burst to the next, at least ``burst``; by default as many as train on five
            times the examples that a burst looks at, which costs less than 15 % of the training time.
        burst: Successive steps before which losses are recorded, at least 3.
        k: Share of the examples in a group, at least 5 of them; in (0, 0.5].
        capacity: Most records to keep, the last ones, at least ``burst``; all when None.
        snapshots: As for :class:`OpposingSignalTracker`.
        name: Under which it is logged; several callbacks in one training need different ones.

    Attributes:
        tracker: The record of the last training, an :class:`OpposingSignalTracker`, once it has begun.

    Raises:
        ValueError: If a number is out of its range; in training if a loss is not finite.

    Example:
        >>> probe = torch.rand(100, 1, 28, 28), torch.arange(100) % 10
        >>> trainer = lightning.Trainer(
        ...     callbacks=[OpposingSignalCallback(probe)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        data: Batched | Dataset[Any],
        loss_fn: LossFunction = CROSS_ENTROPY,
        every: int | None = None,
        burst: int = 11,
        *,
        k: float = 0.01,
        capacity: int | None = None,
        snapshots: int = 1,
        name: str = "opposing",
    ):
        if burst < 3:
            raise ValueError(f"burst must be >= 3, got {burst}")
        if every is not None and every < burst:
            raise ValueError(f"every must be >= burst, {burst}, got {every}")
        if capacity is not None and capacity < burst:
            raise ValueError(f"capacity must be >= burst, {burst}, got {capacity}")
        if iter(data) is data:
            raise ValueError("data must be such that it can be read many times, got an iterator")
        self.data, self.loss_fn, self.every, self.burst, self.k, self.name = data, loss_fn, every, burst, k, name
        self.capacity, self.snapshots = capacity, snapshots
        self.tracker: OpposingSignalTracker | None = None
        self._loaded: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Tells its state in a checkpoint from that of others."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuses examples that are too few before anything is trained, and takes up the record of a checkpoint.

        A training whose steps are counted from the beginning again has a record of its own.
        """
        tracker = self.tracker
        again = tracker is not None and bool(tracker.steps) and trainer.global_step < tracker.steps[-1]
        if tracker is None or tracker.model is not pl_module or again:
            tracker = self.tracker = OpposingSignalTracker(
                pl_module, self.loss_fn, self.data, capacity=self.capacity, snapshots=self.snapshots
            )
        group_size(len(tracker), self.k)
        if self._loaded is not None:
            tracker.load_state_dict(self._loaded)
            self._loaded = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Records the losses where it is time to."""
        assert self.tracker is not None
        if self.every is None:
            looked = self.burst * len(self.tracker)
            self.every = max(self.burst, math.ceil(SPARED * looked / len(batch[0])))
        step = trainer.global_step
        if self._record(self.tracker, step) and step % self.every == self.burst - 1:
            self._log(self.tracker, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Records the other side of the last step, where a burst is under way."""
        if self.tracker is not None and self.every is not None:
            self._record(self.tracker, trainer.global_step)

    def _record(self, tracker: OpposingSignalTracker, step: int) -> bool:
        assert self.every is not None
        new = not tracker.steps or step > tracker.steps[-1]
        return new and step % self.every < self.burst and tracker.record(step)

    def _log(self, tracker: OpposingSignalTracker, pl_module: lightning.LightningModule) -> None:
        deltas = tracker.losses()[-self.burst :].diff(dim=0)
        if len(deltas) < 2:
            return
        row = int(deltas.mean(1).argmax())
        up, down = largest_changes(deltas[row], group_size(len(tracker), self.k))
        found = {
            "oscillation": oscillation_score(deltas, up, down),
            "share": outsized_share(deltas[row], torch.cat([up, down])),
        }
        for key, value in found.items():
            if math.isfinite(value):
                pl_module.log(f"{self.name}/{key}", value, on_step=False, on_epoch=True, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """The record so far, without the parameters that were kept."""
        return {"every": self.every, **({} if self.tracker is None else self.tracker.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when training begins."""
        self.every = state_dict["every"]
        self._loaded = {name: value for name, value in state_dict.items() if name != "every"} or None
