"""Training of a contrastive host: SGD with momentum along a cosine or in steps, on two views of each image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import torch
from torch import Tensor

from netwright.checks import one_of
from netwright.nn.modes import in_mode
from netwright.results import History
from netwright.train.classifier import channels_last
from netwright.train.contrastive.hosts import Host
from netwright.train.fitting import Loader, fit
from netwright.train.schedules import CosineProgress, RateProgress, StepProgress

Schedule = Literal["cosine", "step"]
MILESTONES = (0.6, 0.8)  # of version 1 of MoCo, which divides the rate by ten after 120 and 160 of 200 epochs


class ContrastiveModule(lightning.LightningModule):
    """Trains SimCLR, MoCo or SimSiam; labels are not looked at.

    A batch begins with both views: a tensor (batch, 2, channels, height, width), as
    :class:`netwright.train.contrastive.TwoViews` makes it, or a pair of tensors. The learning rate follows a cosine or
    falls in steps, that of SimSiam's predictor stays.

    Args:
        host: It.
        lr: Learning rate at the start, > 0. The paper: 0.5 for CIFAR in batches of 512, 0.03 for ImageNet in 256.
        momentum: In [0, 1).
        weight_decay: On all parameters, >= 0.
        warmup: Share of the run over which the learning rate rises from 0, in [0, 1); with a cosine alone.
        schedule: ``"cosine"``, or ``"step"``: a tenth after 60 and again after 80 % of the run, as version 1 of MoCo.

    Raises:
        ValueError: If a number is out of its range, the schedule is unknown, or a batch holds no two views.

    Example:
        >>> from torch import nn
        >>> from netwright.train.contrastive import SimCLR
        >>> module = ContrastiveModule(SimCLR(lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), dim=4))
        >>> trainer = lightning.Trainer(max_epochs=1, logger=False)  # trainer.fit(module, your_loader)
    """

    def __init__(
        self,
        host: Host,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        warmup: float = 0.0,
        schedule: Schedule = "cosine",
    ):
        super().__init__()
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be >= 0 and finite, got {weight_decay}")
        self.host = host.to(memory_format=torch.channels_last)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        one_of("schedule", schedule, get_args(Schedule))
        if schedule == "step" and warmup:
            raise ValueError(f"warmup must be 0 with schedule 'step', got {warmup}")
        self.schedule: RateProgress = (
            CosineProgress(warmup=warmup) if schedule == "cosine" else StepProgress(MILESTONES)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x1, x2 = views_of(batch)
        loss = self.host(channels_last(x1), channels_last(x2))
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(x1))
        return loss

    def configure_callbacks(self) -> list[lightning.Callback]:
        """The schedule."""
        return [self.schedule]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD over the groups of the host."""
        return torch.optim.SGD(
            self.host.parameter_groups(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )


def views_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Both views of a batch.

    Raises:
        ValueError: If it does not begin with two.

    Example:
        >>> [view.shape for view in views_of((torch.zeros(4, 2, 1, 8, 8), torch.zeros(4)))]
        [torch.Size([4, 1, 8, 8]), torch.Size([4, 1, 8, 8])]
    """
    first = batch[0] if isinstance(batch, (tuple, list)) else batch
    if isinstance(first, Tensor) and first.ndim == 5 and first.shape[1] == 2:
        return first[:, 0], first[:, 1]
    if isinstance(first, (tuple, list)) and len(first) == 2 and all(isinstance(view, Tensor) for view in first):
        return first[0], first[1]
    shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
    raise ValueError(f"a batch must begin with two views, (batch, 2, channels, height, width) or a pair, got {shape}")


def fit_contrastive(
    host: Host,
    data: Loader,
    *,
    epochs: int,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup: float = 0.0,
    schedule: Schedule = "cosine",
    callbacks: Sequence[lightning.Callback] = (),
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains a host in place.

    Args:
        host: It.
        data: Batches of two views, such as ``Batches(part, 256, augment=policy(shape), normalise=...)``.
        epochs: At least 1.
        lr: As for :class:`ContrastiveModule`.
        momentum: Likewise.
        weight_decay: Likewise.
        warmup: Likewise.
        schedule: Likewise.
        callbacks: As for :func:`netwright.train.fit`; the schedule is there already.
        seed: Of everything random.
        checkpoint: As for :func:`netwright.train.fit`.

    Returns:
        What each epoch recorded.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from torch import nn
        >>> from netwright.data import Batches, TensorImages
        >>> from netwright.train.contrastive import SimCLR, policy
        >>> images = TensorImages(torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8), torch.zeros(32).long())
        >>> host = SimCLR(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8)), dim=4)
        >>> len(fit_contrastive(host, Batches(images, 16, augment=policy((1, 8, 8))), epochs=2).epochs)
        2
    """
    module = ContrastiveModule(
        host, lr=lr, momentum=momentum, weight_decay=weight_decay, warmup=warmup, schedule=schedule
    )
    with in_mode(host, training=True):
        return fit(
            module, data, epochs=epochs, callbacks=callbacks, seed=seed, checkpoint=checkpoint,
            description="contrastive pre-training",
        )  # fmt: skip
