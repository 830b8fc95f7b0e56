"""Learning-rate schedules over *progress*, so that a run whose length changes on the way still anneals to its end.

Progress p runs from 0 to 1. Each step adds (1 - p) / (steps left), which is 1 / steps for a run of fixed length; when a
deadline takes epochs away, the steps that are left simply become larger. The learning rate is a function of p alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import torch


class Progress(lightning.Callback):
    """A callback that knows which share of the run is done, whatever happens to the number of epochs.

    Attributes:
        progress: In [0, 1]; checkpointed.
    """

    def __init__(self) -> None:
        self.progress = 0.0

    def step_size(self, trainer: lightning.Trainer, batch_idx: int) -> float:
        """What this step adds to the progress."""
        return (1 - self.progress) / max(1, steps_left(trainer, batch_idx))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: the progress made."""
        return {"progress": self.progress}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the progress of a checkpoint."""
        self.progress = state_dict["progress"]


class RateProgress(Progress):
    """Sets the learning rate of every parameter group to its own at the start times a factor of the progress.

    A group of which ``constant_lr`` is true keeps its own.
    """

    def factor(self, progress: float) -> float:
        """The share of the learning rate that holds at ``progress`` in [0, 1]."""
        raise NotImplementedError

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sets the learning rate of this step."""
        step = self.step_size(trainer, batch_idx)
        factor = self.factor(self.progress + step / 2)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if group.get("constant_lr"):
                    continue
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        self.progress += step


class CosineProgress(RateProgress):
    """Cosine annealing of every parameter group from its own learning rate, after a linear warm-up.

        lr(p) = lr * (floor + (1 - floor) (1 + cos(pi p)) / 2)

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, arXiv:1608.03983, without the
    restarts.

    Args:
        floor: Share of the learning rate that is left at the end, in [0, 1].
        warmup: Share of the run over which the learning rate rises linearly from 0, in [0, 1).

    Raises:
        ValueError: If ``floor`` or ``warmup`` is out of its range.

    Example:
        >>> round(CosineProgress(floor=0.0).factor(0.5), 3), CosineProgress(warmup=0.1).factor(0.05)
        (0.5, 0.5)
    """

    def __init__(self, floor: float = 0.0, warmup: float = 0.0):
        if not 0 <= floor <= 1:
            raise ValueError(f"floor must lie in [0, 1], got {floor}")
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup must lie in [0, 1), got {warmup}")
        super().__init__()
        self.floor, self.warmup = floor, warmup

    def factor(self, progress: float) -> float:
        """The share of the learning rate that holds at ``progress`` in [0, 1]."""
        if progress < self.warmup:
            return progress / self.warmup
        annealed = (progress - self.warmup) / (1 - self.warmup)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * min(1.0, annealed))) / 2


class StepProgress(RateProgress):
    """A learning rate that is multiplied by ``gamma`` at each milestone.

    Args:
        milestones: Shares of the run, in (0, 1), ascending.
        gamma: Factor of each, in (0, 1].

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> steps = StepProgress((0.5, 0.75))
        >>> [round(steps.factor(p), 3) for p in (0.49, 0.5, 0.8)]
        [1.0, 0.1, 0.01]
    """

    def __init__(self, milestones: Sequence[float], gamma: float = 0.1):
        if list(milestones) != sorted(milestones) or not all(0 < share < 1 for share in milestones):
            raise ValueError(f"milestones must lie in (0, 1) and ascend, got {tuple(milestones)}")
        if not 0 < gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
        super().__init__()
        self.milestones, self.gamma = tuple(milestones), gamma

    def factor(self, progress: float) -> float:
        """The share of the learning rate that holds at ``progress`` in [0, 1]."""
        return self.gamma ** sum(progress >= share for share in self.milestones)


def steps_left(trainer: lightning.Trainer, batch_idx: int) -> int:
    """Steps that are left in the run, that of ``batch_idx`` included."""
    epochs = max(1, int(trainer.max_epochs or 1) - trainer.current_epoch)
    return epochs * int(trainer.num_training_batches) - batch_idx


class Deadline(lightning.Callback):
    """Keeps a training run inside its seconds by changing the number of epochs that are left.

    After each epoch the time of the slowest of the last two tells how many more fit. The learning rate follows, since
    :class:`CosineProgress` anneals over the steps that are left. Under several processes the first one decides.

    Args:
        seconds: Wall time the run may take, over all its sittings.
        most: Epochs it never exceeds; the planned number when None.
        amended: Called with (epochs so far, epochs in all) whenever the plan changes.

    Raises:
        ValueError: If ``seconds`` is not positive.
    """

    def __init__(self, seconds: float, *, most: int | None = None, amended: Callable[[int, int], None] | None = None):
        if not seconds > 0:
            raise ValueError(f"seconds must be > 0, got {seconds}")
        self.seconds, self.most, self.amended = seconds, most, amended
        self.spent, self._since, self.total = 0.0, 0.0, 0
        self._recent: list[float] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes up the plan of an earlier sitting, and starts the clock."""
        self._since = time.monotonic()
        if self.total:
            trainer.fit_loop.max_epochs = self.total

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Counts the epochs that still fit."""
        now = time.monotonic()
        # From the end of the last epoch on, so that what lies between two epochs, a checkpoint mostly, counts as well.
        took, self._since = now - self._since, now
        self.spent += took
        self._recent = [*self._recent[-1:], took]
        planned = int(trainer.max_epochs or 1)
        done = trainer.current_epoch + 1
        room = math.floor((self.seconds - self.spent) / max(*self._recent, 1e-9))
        total = min(done + max(0, room), self.most if self.most is not None else planned)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            agreed = torch.tensor([total], device=pl_module.device)
            torch.distributed.broadcast(agreed, src=0)
            total = int(agreed)
        self.total = total = max(done, total)
        if total != planned:
            trainer.fit_loop.max_epochs = total
            if self.amended is not None:
                self.amended(done, total)

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent, seconds of the last epochs, and the planned number of epochs."""
        return {"spent": self.spent, "recent": list(self._recent), "total": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the clock of a checkpoint."""
        self.spent, self._recent, self.total = (
            state_dict["spent"],
            list(state_dict["recent"]),
            state_dict["total"],
        )


class Timetable(lightning.Callback):
    """Repeats the changes of plan that a :class:`Deadline` made in an earlier run, at the same epochs.

    Args:
        changes: Pairs (epochs so far, epochs in all), as ``Deadline`` reported them.
    """

    def __init__(self, changes: Sequence[tuple[int, int]]):
        self.changes = {int(done): int(total) for done, total in changes}

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Applies what had changed before the epoch that a resumed run starts with, which is known only now."""
        for done in sorted(self.changes):
            if done <= trainer.current_epoch:
                trainer.fit_loop.max_epochs = self.changes[done]

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Applies the change that was made after this epoch."""
        total = self.changes.get(trainer.current_epoch + 1)
        if total is not None:
            trainer.fit_loop.max_epochs = total
