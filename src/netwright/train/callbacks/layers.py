"""Callbacks of the methods that change layers: TrAct (arXiv:2410.23970) and Weight Compander (arXiv:2306.16993)."""

from __future__ import annotations

from collections.abc import Sequence

import lightning
import torch
from torch import Tensor

from netwright.train.tract import apply_tract, traced
from netwright.train.weight_compander import (
    Start,
    add_effective_decay_,
    apply_weight_compander,
    companded,
    latents,
)


class TrActCallback(lightning.Callback):
    """Gives the first layer the gradient of TrAct, as if its pre-activations were what is trained.

    See :func:`netwright.train.tract.apply_tract`, which is called before training. A module that has such a layer
    already stays as it is. ``example_input_array`` of the module, where it is a tensor, tells which layer is computed
    first; else the order of definition does.

    Args:
        lambda_: Strength of the ridge, > 0.
        layer: Name of the layer, as the LightningModule's ``named_modules`` gives it.
        sync_gram: Whether ranks solve with the Gram matrix of the whole batch.

    Raises:
        ValueError: If ``lambda_`` is not positive; at the start of training if there is no such layer.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[TrActCallback()], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(self, lambda_: float = 0.1, layer: str | None = None, sync_gram: bool = False):
        if not 0 < lambda_ < float("inf"):
            raise ValueError(f"lambda_ must be > 0 and finite, got {lambda_}")
        self.lambda_, self.layer, self.sync_gram = lambda_, layer, sync_gram

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Changes the layer."""
        if stage == "fit" and not traced(pl_module):
            example = pl_module.example_input_array
            found = example if isinstance(example, Tensor) else None
            apply_tract(pl_module, self.lambda_, self.layer, example_input=found, sync_gram=self.sync_gram)


class WeightCompanderCallback(lightning.Callback):
    """Trains every linear and convolution layer through a compander.

    See :func:`netwright.train.weight_compander.apply_weight_compander`. After training
    :func:`~netwright.train.weight_compander.remove_weight_compander` bakes the weights in. A module that is companded
    already stays as it is.

    Args:
        a: Height, > 0; None is 1.2 b.
        b: Width, > 0; None is twice the standard deviation of each layer's weights.
        learnable: Whether each layer learns its own two.
        init: ``"latent"``, or ``"match"`` for a trained network.
        function: As for ``WeightCompander``.
        exclude: Names of layers to leave alone, as the LightningModule's ``named_modules`` gives them.
        lr_scale: As for ``WeightCompander``.
        effective_decay: L2 penalty on the effective weights, >= 0, in place of the optimiser's on the latent ones.

    Raises:
        ValueError: If ``effective_decay`` is negative; at the start of training for the other arguments, and if
            ``effective_decay`` is positive while an optimiser decays latent weights.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[WeightCompanderCallback()], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        a: float | None = None,
        b: float | None = None,
        learnable: bool = False,
        init: Start = "latent",
        function: str = "arctan",
        exclude: Sequence[str] = (),
        lr_scale: float = 0.01,
        effective_decay: float = 0.0,
    ):
        if not 0 <= effective_decay < float("inf"):
            raise ValueError(f"effective_decay must be >= 0 and finite, got {effective_decay}")
        self.a, self.b, self.learnable, self.init, self.function = a, b, learnable, init, function
        self.exclude, self.lr_scale, self.effective_decay = tuple(exclude), lr_scale, effective_decay

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Places the companders."""
        if stage == "fit" and not companded(pl_module):
            apply_weight_compander(
                pl_module,
                self.a,
                self.b,
                learnable=self.learnable,
                init=self.init,
                function=self.function,
                exclude=self.exclude,
                lr_scale=self.lr_scale,
            )

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Makes sure that no weight is decayed twice."""
        if not self.effective_decay:
            return
        hidden = {id(latent) for latent, _ in latents(pl_module)}
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            if group.get("weight_decay") and any(id(param) in hidden for param in group["params"]):
                raise ValueError(
                    "the optimiser's weight_decay of companded layers must be 0 when effective_decay is > 0, "
                    f"got {group['weight_decay']}"
                )

    def on_before_optimizer_step(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Adds the gradient of the penalty, before clipping."""
        if self.effective_decay:
            own = {id(param) for group in optimizer.param_groups for param in group["params"]}
            add_effective_decay_(pl_module, self.effective_decay, only=own)
