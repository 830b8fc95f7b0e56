"""Lightning's side of compression: sparsity that grows while a network trains, zeros that stay, weights that are
rounded meanwhile, and a module that learns from a teacher.

Zhu & Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
arXiv:1710.01878.

    every ``every`` steps from ``begin`` to ``end``: prune to s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 -
    t_0))^3
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning

from netwright.compress.exact import Scope, check_sparsity
from netwright.compress.prune import (
    cubic_sparsity,
    hold,
    place_masks,
    prunable,
    sparsity,
    update,
)
from netwright.console import warn


class GradualPruning(lightning.Callback):
    """Raises the sparsity of a network in training along a cubic curve, exactly to its final ratio.

    Masks are placed before the checkpoint is read, so an interrupted run goes on where it was. Steps are
    those of the optimisers (``trainer.global_step``).

    Args:
        final_sparsity: Share of zeros at the end, in [0, 1).
        begin: Step of the first pruning, >= 0.
        end: Step from which the final sparsity holds, > ``begin``.
        every: Steps from one pruning to the next, >= 1.
        initial_sparsity: Share of zeros at ``begin``, in [0, final_sparsity].
        scope: ``"layer"``, ``"global"`` or ``"lamp"``, as for :func:`netwright.compress.prune.magnitude`.
        skip: Names of layers to leave alone, as the LightningModule's ``named_modules`` gives them.
        keep_at_least: Weights that every layer keeps.
        regrow: Let a masked weight return when it is among the largest again, as in the paper.

    Raises:
        ValueError: If an argument is out of bounds; at the start of training if the network has no such
            layer.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[GradualPruning(0.9, begin=100, end=1000, every=50)],
        ...     logger=False, enable_checkpointing=False, accelerator="cpu",
        ... )
    """

    def __init__(
        self,
        final_sparsity: float,
        begin: int,
        end: int,
        every: int,
        *,
        initial_sparsity: float = 0.0,
        scope: Scope = "layer",
        skip: Sequence[str] = (),
        keep_at_least: int = 1,
        regrow: bool = True,
    ):
        check_sparsity(final_sparsity, "final_sparsity")
        if not 0 <= check_sparsity(initial_sparsity, "initial_sparsity") <= final_sparsity:
            raise ValueError(f"initial_sparsity must be <= final_sparsity = {final_sparsity}, got {initial_sparsity}")
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        cubic_sparsity(0, begin, end, initial_sparsity, final_sparsity)
        self.final_sparsity, self.initial_sparsity = final_sparsity, initial_sparsity
        self.begin, self.end, self.every = begin, end, every
        self.scope, self.skip, self.keep_at_least, self.regrow = scope, tuple(skip), keep_at_least, regrow
        self.pruned_at: int | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Places masks that keep everything, before a checkpoint is read and the optimisers are made."""
        if stage == "fit":
            self.pruned_at = None
            place_masks(pl_module, self.skip)

    def state_dict(self) -> dict[str, Any]:
        """The step of the last pruning."""
        return {"pruned_at": self.pruned_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores it."""
        self.pruned_at = state_dict["pruned_at"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Prunes before the first step when that is where the schedule begins."""
        self._prune(trainer.global_step, pl_module)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Prunes when the schedule says so."""
        self._prune(trainer.global_step, pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Logs ``sparsity``."""
        pl_module.log("sparsity", sparsity(pl_module).sparsity)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Warns when training ended before the final sparsity was reached."""
        if self.pruned_at is None or self.pruned_at < self.end:
            warn(
                f"gradual pruning did not reach sparsity {self.final_sparsity:.4g}: training ended at step "
                f"{trainer.global_step}, the schedule ends at {self.end}"
            )

    def _prune(self, step: int, module: lightning.LightningModule) -> None:
        if not self._due(step):
            return
        target = cubic_sparsity(step, self.begin, self.end, self.initial_sparsity, self.final_sparsity)
        update(module, target, self.scope, self.skip, keep_at_least=self.keep_at_least, regrow=self.regrow)
        self.pruned_at = step

    def _due(self, step: int) -> bool:
        # Not a test for equality: with several optimisers the step grows by more than one.
        if self.pruned_at is None or step < self.begin:
            return step >= self.begin
        if step >= self.end:
            return self.pruned_at < self.end
        return (step - self.begin) // self.every > (self.pruned_at - self.begin) // self.every


class KeepSparse(lightning.Callback):
    """Trains a sparse network without filling its zeros, and makes sure of it after every epoch.

    For networks whose zeros were baked in (:func:`netwright.compress.prune.remove`, a file): zeros are masked
    by :func:`netwright.compress.prune.hold` before training. Layers that are masked already stay as they are.

    Args:
        skip: Names of layers to leave free, as the LightningModule's ``named_modules`` gives them.

    Raises:
        RuntimeError: After an epoch that left more weights than there were at the start.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[KeepSparse()], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(self, skip: Sequence[str] = ()):
        self.skip = tuple(skip)
        self.kept = 0

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Masks the zeros."""
        if stage == "fit":
            hold(pl_module, self.skip)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Counts the weights that are left."""
        self.kept = self._count(pl_module)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Counts again, and logs ``sparsity``."""
        kept = self._count(pl_module)
        if kept > self.kept:
            raise RuntimeError(
                f"training must keep at most {self.kept} weights, got {kept} after epoch {trainer.current_epoch}"
            )
        pl_module.log("sparsity", sparsity(pl_module).sparsity)

    def _count(self, module: lightning.LightningModule) -> int:
        report = sparsity(module).layers
        return sum(report[name].kept for name in prunable(module, self.skip))
