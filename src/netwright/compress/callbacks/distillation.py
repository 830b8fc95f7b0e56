"""Lightning's side of distillation: a module that learns from a teacher, and weights that are rounded while they train.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn

from netwright.compress.distill import DistillationLoss
from netwright.compress.quantize.placing import Which, kept_weights, quantizers, targets
from netwright.compress.quantize.quantizers import Gradient, LearnedPoints, UniformQuantizer
from netwright.data.tensors import Batches
from netwright.nn import shared
from netwright.nn.sparse import clone
from netwright.train import Classifier, Loader, channels_last


class Distiller(Classifier):
    """Trains a network on what a teacher answers; see :func:`netwright.compress.distill.distill`.

    Args:
        network: The student.
        teacher: The trained network; a copy of it is used.
        loss: Of student's logits, teacher's logits and labels.
        lr: Learning rate at the start.
        weight_decay: As for ``Classifier``.

    Raises:
        ValueError: As ``Classifier``; in training, if student and teacher have different numbers of classes.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module,
        loss: DistillationLoss,
        *,
        lr: float = 0.05,
        weight_decay: float = 5e-4,
    ):
        super().__init__(network, lr=lr, weight_decay=weight_decay)
        # In a tuple, so that it is no part of this module: not trained, not saved.
        self._teacher = (clone(teacher).eval().requires_grad_(False),)
        self.distillation = loss
        self._answers: Tensor | None = None

    def prepared(self, data: Loader) -> Loader:
        """The same batches, with the teacher's answers kept where they do not change from epoch to epoch."""
        if not isinstance(data, Batches) or data.augment is not None:
            return data
        whole = Batches(data.dataset, 500, shuffle=False, drop_last=False, normalise=data.normalise)
        with torch.inference_mode():
            answers = torch.cat([self._teacher[0](channels_last(batch[0])) for batch in whole])
        self._answers = answers.clone()
        indexed = copy.copy(data)
        indexed.indexed = True
        return indexed

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """The loss of a batch (x, labels), or (x, labels, indices) when the answers are kept."""
        x, labels, *indices = batch
        x = channels_last(x)
        if self._answers is not None:
            taught = self._answers[indices[0].cpu()].to(x.device)
        else:
            with torch.no_grad():
                taught = self._teacher[0].to(x.device)(x)
        loss = self.distillation(self(x), taught, labels)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(labels))
        return loss


class QuantizedDistillationCallback(lightning.Callback):
    """Trains any network with weights that are rounded in every pass, while the optimiser moves those behind them.

    With :class:`Distiller` this is quantised distillation, with any other module quantised training. The rounding is a
    parametrization and stays when training ends: :func:`netwright.compress.quantize.baked` puts the rounded weights in
    place. It comes after parametrizations that are there already, a mask or Weight Compander's. A network that is
    quantised already stays as it is.

    Args:
        bits: 1..16.
        bucket_size: Weights that share a scale, >= 1; None for one scale a tensor.
        quantize: ``"weights"`` of convolutions and linear layers, or ``"all"`` parameters.
        quantize_first_last: Whether the first and the last of these layers take part.
        grad: As for :class:`~netwright.compress.quantize.quantizers.UniformQuantizer`.

    Raises:
        ValueError: If an argument is out of its range; at the start of training if the network has no such layer.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[QuantizedDistillationCallback(bits=2)],
        ...     logger=False, enable_checkpointing=False, accelerator="cpu",
        ... )
    """

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int | None = 256,
        *,
        quantize: Which = "weights",
        quantize_first_last: bool = True,
        grad: Gradient = "ste",
    ):
        UniformQuantizer(bits, bucket_size, grad=grad)
        self.bits, self.bucket_size, self.grad = bits, bucket_size, grad
        self.quantize, self.quantize_first_last = quantize, quantize_first_last

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Places the rounding, before a checkpoint is read and the optimisers are made."""
        if stage != "fit" or any(True for _ in quantizers(pl_module)):
            return
        made = [
            (layer, name, UniformQuantizer(self.bits, self.bucket_size, grad=self.grad, kept=kept_weights(parameter)))
            for layer, name, parameter in targets(pl_module, self.quantize, self.quantize_first_last)
        ]
        shared.register(pl_module, made)


class SortedPoints(lightning.Callback):
    """Keeps the learned points of a differentiably quantised network in order after every step."""

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Sorts them."""
        for *_, quantizer in quantizers(pl_module):
            cast(LearnedPoints, quantizer).sort_()


class AlternatingEpochs(lightning.Callback):
    """Trains some parameters in every other epoch and the rest in those between, the rest in the last.

    What does not train has no gradient, so that an optimiser of both leaves it as it is.

    Args:
        first: ``id`` of each parameter that is not trained in the last epoch.
    """

    def __init__(self, first: Collection[int]):
        self.first = frozenset(first)
        self._trained: list[nn.Parameter] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Remembers what is trained at all."""
        self._trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Chooses what is trained in this epoch."""
        rest = (int(trainer.max_epochs or 1) - trainer.current_epoch) % 2 == 1
        for parameter in self._trained:
            parameter.requires_grad_((id(parameter) in self.first) != rest)

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Makes all of them trainable again."""
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._trained = []
