"""Lightning's side of low-rank training: ordered dropout in every step, ranks that shrink after every epoch.

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929.

    L(f_{l,k}(x), y) + lam R,    or    L(f(x), y) + L(f_{l,k}(x), softmax(f(x))) + lam R
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from netwright.compress.low_rank.decomposing import low_rank_layers
from netwright.compress.low_rank.ordered import (
    Mode,
    hierarchical_group_lasso,
    ordered_rank_sampler,
    progressive_shrink,
    recalibrate_batchnorm,
    truncated,
)
from netwright.console import warn
from netwright.nn import shared
from netwright.seeding import derive
from netwright.train import Classifier, channels_last


class MaestroCallback(lightning.Callback):
    """Trains any module with low-rank layers by ordered dropout, with the penalty and progressive shrinking.

    The step of the module runs with one layer truncated. Before each step of an optimiser the penalty's gradient is
    added to that of its loss, once, however many batches were accumulated, and before gradients are clipped. After an
    epoch, terms of no importance are let go. Batch-norm statistics, which truncated passes spoil, are measured anew
    before each validation and at the end.

    Args:
        lam: Weight of the penalty, >= 0.
        eps: Importance below which trailing terms are let go, >= 0.
        mode: Of :func:`~netwright.compress.low_rank.ordered.ordered_rank_sampler`.
        hierarchical: Whether penalty and importance of a term include those behind it.
        calibration: Batches for the batch norms; by default those of the training, for which the module must have a
            ``forward`` that takes the inputs.
        calibration_batches: How many of these at most; None for all.
        seed: Of the order of truncations.

    Raises:
        ValueError: If ``lam`` or ``eps`` is negative; at the start of training if there is no low-rank layer.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[MaestroCallback(lam=1e-4)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        lam: float,
        eps: float = 1e-5,
        *,
        mode: Mode = "per_layer",
        hierarchical: bool = True,
        calibration: Iterable[Any] | None = None,
        calibration_batches: int | None = 50,
        seed: int = 0,
    ):
        if not lam >= 0:
            raise ValueError(f"lam must be >= 0, got {lam}")
        if not eps >= 0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        self.lam, self.eps, self.mode, self.hierarchical, self.seed = lam, eps, mode, hierarchical, seed
        self.calibration, self.calibration_batches = calibration, calibration_batches
        self._stack = ExitStack()
        self._sampler: Iterator[dict[str, int]] | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins a new order of truncations, a function of seed and epoch alone."""
        seed = derive(self.seed, "maestro", trainer.current_epoch)
        self._sampler = ordered_rank_sampler(pl_module, self.mode, seed)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Truncates for this step."""
        assert self._sampler is not None
        self._stack.enter_context(truncated(pl_module, next(self._sampler)))

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Adds the penalty's gradient to that of the factors which this optimiser moves."""
        if self.lam == 0:
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        layers = low_rank_layers(pl_module).values()
        # What an optimiser moves lies behind the factors where these are rounded.
        behind = [f for layer in layers for name in ("U", "V") for f in shared.originals(layer, name)]
        factors = [f for f in behind if f.requires_grad and id(f) in own]
        if not factors:
            return
        # Gradients are in plain units by now, unless the optimiser takes the scale of mixed precision out by itself.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scale = scaler.get_scale()
        with torch.enable_grad():
            penalty = self.lam * hierarchical_group_lasso(pl_module, self.hierarchical)
        for factor, gradient in zip(factors, torch.autograd.grad(penalty, factors), strict=True):
            scaled = scale * gradient
            factor.grad = scaled if factor.grad is None else factor.grad + scaled

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Uses all terms again."""
        self._stack.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Uses all terms again."""
        self._stack.close()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Lets go of terms, and logs the sum of the ranks."""
        ranks = progressive_shrink(pl_module, self.eps, self.hierarchical)
        pl_module.log("ranks", float(sum(ranks.values())))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Warns if batch norms cannot be measured."""
        norms = any(isinstance(part, _BatchNorm) and part.track_running_stats for part in pl_module.modules())
        if norms and self._batches(trainer, pl_module) is None:
            told = f"{type(pl_module).__name__} has no forward that takes inputs"
            if _has_forward(pl_module):
                told = "there are several loaders, give calibration"
            warn(f"MaestroCallback leaves batch norms with the statistics of truncated passes: {told}")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures batch norms anew."""
        self._calibrate(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures batch norms anew."""
        self._calibrate(trainer, pl_module)

    def _batches(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> Iterable[Any] | None:
        """What batch norms are measured on; None where nothing serves, and before training."""
        if not _has_forward(module):
            return None
        if self.calibration is not None:
            return self.calibration
        found = trainer.train_dataloader
        return None if isinstance(found, (list, tuple, dict)) else found

    def _calibrate(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        batches = self._batches(trainer, module)
        if batches is None:
            return
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles must not change what training draws next
            recalibrate_batchnorm(module, batches, self.calibration_batches)


def _has_forward(module: lightning.LightningModule) -> bool:
    return type(module).forward is not lightning.LightningModule.forward


class FullPassClassifier(Classifier):
    """Trains the whole network on the labels, and the truncated one on what the whole one answers.

    For use with :class:`MaestroCallback`, which truncates.
    """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The sum of both losses."""
        x, labels = channels_last(batch[0]), batch[1]
        with truncated(self, dict.fromkeys(low_rank_layers(self))):
            whole = self(x)
        loss = self.loss(whole, labels) + F.cross_entropy(self(x), whole.detach().softmax(1))
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(labels))
        return loss
