"""Training of the black boxes of :mod:`netwright.explain.tabular.embedding`: first the autoencoder, then the head.

The settings are those of the published notebooks of Karim et al., arXiv:2208.13405: Adam at 1e-3, batches of 128, ten
epochs of mean squared error, 32 of cross-entropy, and a stop after ten epochs without a lower training loss. Embeddings
stay floats; the notebooks make them integers.
"""

from __future__ import annotations

from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.data import Batches, TensorImages
from netwright.explain.tabular.embedding import EmbeddingClassifier
from netwright.explain.tabular.inputs import as_table
from netwright.nn.modes import in_mode
from netwright.results import History
from netwright.train import Classifier, fit


class _Autoencoder(lightning.LightningModule):
    """Mean squared error between a row and what the decoder makes of its embedding."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module, lr: float):
        super().__init__()
        self.encoder, self.decoder, self.lr = encoder, decoder, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = batch[0].flatten(1)
        loss = functional.mse_loss(self.decoder(self.encoder(x)), x)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(x))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def fit_tabular(
    model: nn.Module,
    X: Any,
    y: Any,
    *,
    epochs: int = 32,
    autoencoder_epochs: int = 10,
    patience: int | None = 10,
    batch: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    end_to_end: bool = False,
    seed: int = 0,
) -> tuple[History | None, History]:
    """Trains a classifier of rows in place, by Adam.

    Args:
        model: An :class:`EmbeddingClassifier`, whose autoencoder is trained first and whose head then learns on its
            embeddings; or any module (batch, features) to logits, which is trained as a whole.
        X: (rows, features), as an encoder takes them: in [0, 1].
        y: (rows,) classes, whole numbers >= 0.
        epochs: Of the classifier, >= 1.
        autoencoder_epochs: Of the autoencoder, >= 1; where there is no decoder it does not matter.
        patience: Epochs without a lower training loss after which the classifier stops; None never stops.
        batch: Rows of a batch.
        lr: Of Adam, > 0.
        weight_decay: Of the classifier's Adam.
        end_to_end: Whether the classifier's training goes on through the encoder, as it does where there is no
            decoder.
        seed: Of order and dropout.

    Returns:
        What the epochs of the autoencoder recorded, or None, and what those of the classifier did.

    Raises:
        ValueError: If a number is out of its range, X is not finite, or y does not belong to it.
        FloatingPointError: If the loss is no longer finite.

    Example:
        >>> from netwright.explain.tabular import tabular_classifier
        >>> X = np.random.default_rng(0).random((64, 5))
        >>> model = tabular_classifier(5, 2, encoder="dense", embedding=3)
        >>> histories = fit_tabular(model, X, X[:, 0] > 0.5, epochs=2, autoencoder_epochs=1)
        >>> [len(history.epochs) for history in histories]
        [1, 2]
    """
    for name, value in (("epochs", epochs), ("autoencoder_epochs", autoencoder_epochs), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not lr > 0:
        raise ValueError(f"lr must be > 0, got {lr}")
    rows = torch.as_tensor(as_table(X).dense(), dtype=torch.float32)
    labels = torch.as_tensor(np.array(y)).to(torch.int64)
    if labels.shape != (len(rows),):
        raise ValueError(f"y must be {len(rows)} classes, got shape {tuple(labels.shape)}")
    before = None
    split = isinstance(model, EmbeddingClassifier) and model.decoder is not None
    if isinstance(model, EmbeddingClassifier) and model.decoder is not None:
        coder = _Autoencoder(model.encoder, model.decoder, lr)
        before = fit(coder, _batches(rows, labels, batch, seed), epochs=autoencoder_epochs, seed=seed)
    trained: nn.Module = model
    if isinstance(model, EmbeddingClassifier) and split and not end_to_end:
        trained = model.head
        with in_mode(model.encoder, training=False), torch.inference_mode():
            rows = torch.cat([model.encoder(part) for part in rows.split(1024)]).clone()
    stop = [] if patience is None else [_stop(patience)]
    history = fit(
        Classifier(nn.Sequential(nn.Flatten(), trained), clip=None),
        _batches(rows, labels, batch, seed),
        epochs=epochs,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr, weight_decay=weight_decay),
        callbacks=stop,
        seed=seed,
    )
    return before, history


def _batches(rows: Tensor, labels: Tensor, batch: int, seed: int) -> Batches:
    return Batches(TensorImages(rows[:, None, None], labels), batch, seed=seed)


def _stop(patience: int) -> lightning.Callback:
    from lightning.pytorch.callbacks import EarlyStopping

    return EarlyStopping("train_loss", patience=patience, mode="min", check_on_train_epoch_end=True)
