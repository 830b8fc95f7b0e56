"""Callback that fits the keys of a discrete key-value bottleneck before training (arXiv:2207.11240)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning
from torch import nn

from netwright.nn.kv_bottleneck import DKVBClassifier, fit_keys
from netwright.results import History
from netwright.seeding import stream


class KeyInitCallback(lightning.Callback):
    """Phase 0 of a :class:`netwright.nn.kv_bottleneck.DKVBClassifier`: fits its keys, then freezes them.

    Keys that are frozen already, as those of a resumed run are, stay as they are. Under several processes the keys are
    those of the first one, fitted to its share of the data. The values want SGD without momentum and weight decay.

    Args:
        loader: Unlabelled batches, as for :func:`netwright.nn.kv_bottleneck.fit_keys`; the training data by default,
            in the order of the first epoch.
        epochs: Passes over them, >= 1.
        classifier: Name of the classifier inside the module, where there are several.
        seed: Of all that is random in it.

    Attributes:
        history: What each epoch recorded, when the keys have been fitted.

    Raises:
        ValueError: If ``epochs`` is below 1; when training starts, or the validation before it, if there is not exactly
            one classifier.

    Example:
        >>> import torch
        >>> from netwright.data import Batches, TensorImages
        >>> from netwright.nn.kv_bottleneck import KeyValueBottleneck
        >>> from netwright.train import Classifier, fit
        >>> images = TensorImages(torch.rand(64, 1, 4, 4), torch.arange(64) % 2)
        >>> bottleneck = KeyValueBottleneck(16, num_pairs=8, num_codebooks=4, value_dim=2)
        >>> module = Classifier(DKVBClassifier(nn.Flatten(), bottleneck), lr=1.0, momentum=0.0, weight_decay=0.0)
        >>> callback = KeyInitCallback(epochs=2)
        >>> _ = fit(module, Batches(images, 16), epochs=1, callbacks=[callback])
        >>> bottleneck.keys_frozen, len(callback.history.epochs)
        (True, 2)
    """

    def __init__(
        self, loader: Iterable[Any] | None = None, epochs: int = 10, classifier: str | None = None, seed: int = 0
    ):
        if epochs < 1:
            raise ValueError(f"epochs must be >= 1, got {epochs}")
        self.loader, self.epochs, self.classifier, self.seed = loader, epochs, classifier, seed
        self.history = History()

    def _found(self, module: nn.Module) -> DKVBClassifier:
        if self.classifier is not None:
            named = dict(module.named_modules()).get(self.classifier)
            if not isinstance(named, DKVBClassifier):
                raise ValueError(f"classifier must name a DKVBClassifier of the module, got {self.classifier!r}")
            return named
        found = [part for part in module.modules() if isinstance(part, DKVBClassifier)]
        if len(found) != 1:
            raise ValueError(f"module must hold exactly 1 DKVBClassifier, got {len(found)}: name it with classifier")
        return found[0]

    def on_sanity_check_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Fits and freezes, where a Trainer validates before it trains."""
        if self.loader is None:
            trainer.fit_loop.setup_data()
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Fits and freezes, before the first batch."""
        model = self._found(pl_module)
        bottleneck = model.bottleneck
        if bottleneck.keys_frozen:
            return
        loader: Any = trainer.train_dataloader if self.loader is None else self.loader
        generator = stream(self.seed, "keys")
        self.history = fit_keys(bottleneck, model.encoder, loader, self.epochs, layer=model.layer, generator=generator)
        if trainer.world_size > 1:
            for buffer in (bottleneck.keys, bottleneck.key_counts, bottleneck.key_sums):
                buffer.copy_(trainer.strategy.broadcast(buffer))
        bottleneck.freeze_keys()
