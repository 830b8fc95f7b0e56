"""Callback of the method that changes gradients: annealed Gaussian noise (arXiv:1511.06807)."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch.utils.hooks import RemovableHandle

from netwright.console import warn
from netwright.seeding import derive
from netwright.train.gradient_noise import GradientNoise, Order, attach, check_order, noise_variance


class GradientNoiseCallback(lightning.Callback):
    """Adds annealed Gaussian noise to every gradient at the optimiser's step.

    After clipping, whoever clips: the Trainer's ``gradient_clip_val``, the module's own hook, or a manual step. One
    draw an update, however many batches are accumulated for it. Each optimiser has its own noise and its own count, and
    every process adds the same. Logs ``grad_noise/sigma``.

    Args:
        eta: Variance at step 0, >= 0; the paper uses 0.01, 0.3 or 1.0.
        gamma: Exponent of its decay, >= 0.
        seed: Of the noise.
        order: ``"clip_then_noise"``, or ``"noise_then_clip"``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[GradientNoiseCallback(eta=0.3)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(self, eta: float = 0.01, gamma: float = 0.55, seed: int = 0, order: Order = "clip_then_noise"):
        noise_variance(0, eta, gamma)
        derive(seed)
        check_order(order)
        self.eta, self.gamma, self.seed, self.order = eta, gamma, seed, order
        self.noises: list[GradientNoise] = []
        self._handles: list[RemovableHandle] = []
        self._loaded: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Attaches the noise to each optimiser."""
        self.noises = [
            GradientNoise(
                [param for group in optimizer.param_groups for param in group["params"]],
                self.eta,
                self.gamma,
                derive(self.seed, "optimizer", number),
            )
            for number, optimizer in enumerate(trainer.optimizers)
        ]
        for noise, state in zip(self.noises, self._loaded, strict=False):
            noise.load_state_dict(state)
        self._loaded = []
        if self.order == "clip_then_noise":
            pairs = zip(trainer.optimizers, self.noises, strict=True)
            self._handles = [attach(optimizer, noise) for optimizer, noise in pairs]
        elif not pl_module.automatic_optimization:
            warn("with manual optimisation the module clips before its step: the noise comes after the clipping")

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Adds the noise where it is to be clipped; gradients that overflowed under a scaler are no update."""
        if self.order == "noise_then_clip":
            noise = self.noises[[one is optimizer for one in trainer.optimizers].index(True)]
            grads = [param.grad for param in noise.params if param.grad is not None]
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            if not scaled or all(bool(grad.isfinite().all()) for grad in grads):
                noise.step()

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs the standard deviation of the last noise."""
        pl_module.log("grad_noise/sigma", self.noises[0].sigma)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the optimisers as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the optimisers as they were; after an exception the Trainer calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """Number of the update and state of the generator, of each optimiser."""
        return {"noises": [noise.state_dict() for noise in self.noises]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when the optimisers are there."""
        self._loaded = state_dict["noises"]
