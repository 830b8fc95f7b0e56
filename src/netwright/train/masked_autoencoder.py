"""Training of a masked autoencoder: patches are dropped at random, and what is drawn for them is compared with them.

He, Chen, Xie, Li, Dollar and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from netwright.nn.masked_autoencoder import MaskedAutoencoder
from netwright.nn.modes import in_mode
from netwright.results import History
from netwright.train.fitting import Loader, fit
from netwright.train.schedules import CosineProgress

BETAS = (0.9, 0.95)
WARMUP = 0.05


class PatchDrawing(lightning.LightningModule):
    """Trains a masked autoencoder on images alone; labels are not looked at.

    Args:
        network: It.
        drop_ratio: Share of patches that are dropped, in (0, 1).
        lr: Learning rate of AdamW, > 0.
        weight_decay: >= 0.

    Raises:
        ValueError: If an argument is out of its range.
    """

    def __init__(
        self, network: MaskedAutoencoder, drop_ratio: float = 0.75, *, lr: float = 1e-3, weight_decay: float = 0.05
    ):
        super().__init__()
        if not 0 < drop_ratio < 1:
            raise ValueError(f"drop_ratio must lie in (0, 1), got {drop_ratio}")
        if not lr > 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        if not weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {weight_decay}")
        self.network, self.drop_ratio, self.lr, self.weight_decay = network, drop_ratio, lr, weight_decay

    def drawn_mask(self, count: int) -> Bool[Tensor, "batch patches"]:
        """Which patches are kept of ``count`` images, at random, as many of each."""
        number = self.network.grid[0] * self.network.grid[1]
        keep = min(number - 1, max(1, int(number * (1 - self.drop_ratio) + 1e-9)))
        order = torch.rand(count, number, device=self.device).argsort(1)
        return order < keep  # the inverse of a random order is as random

    def loss(self, images: Float[Tensor, "batch channels height width"], kept: Tensor) -> Float[Tensor, ""]:
        """The mean squared error on what is not kept, of images in [0, 1] after standardisation."""
        standard = self.network.standardised(images)
        error = (self.network.predict(standard, kept) - self.network.patches(standard)).square().mean(2)
        return error[~kept].mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch of images in [0, 1], or of a tuple that begins with them."""
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        loss = self.loss(images, self.drawn_mask(len(images)))
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; weight decay on matrices only."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2 and len(p) > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2 or len(p) == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=BETAS)


def fit_masked_autoencoder(
    model: MaskedAutoencoder,
    data: Loader,
    *,
    epochs: int,
    drop_ratio: float = 0.75,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains a masked autoencoder in place, with AdamW along a cosine after a short warm-up.

    Args:
        model: It.
        data: Batches of images in [0, 1], or of tuples that begin with them: ``Batches`` without ``normalise``.
        epochs: At least 1. The paper trains for 1,600 on ImageNet.
        drop_ratio: Share of patches that are dropped in training, in (0, 1); the paper's 0.75 asks more of the decoder
            than the few gaps that it is to fill.
        lr: Learning rate, > 0.
        weight_decay: >= 0.
        seed: Of everything random.
        checkpoint: As for :func:`netwright.train.fit`.

    Returns:
        What each epoch recorded.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> from netwright.data import Batches, TensorImages
        >>> images = torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8)
        >>> filler = MaskedAutoencoder((1, 8, 8), 4, dim=16, depth=1, heads=2, decoder_dim=16)
        >>> data = Batches(TensorImages(images, torch.zeros(32, dtype=torch.long)), 16)
        >>> len(fit_masked_autoencoder(filler, data, epochs=1).epochs)
        1
    """
    module = PatchDrawing(model, drop_ratio, lr=lr, weight_decay=weight_decay)
    with in_mode(model, training=True):
        return fit(
            module,
            data,
            epochs=epochs,
            callbacks=[CosineProgress(warmup=WARMUP)],
            seed=seed,
            checkpoint=checkpoint,
            description="masked autoencoder",
        )
