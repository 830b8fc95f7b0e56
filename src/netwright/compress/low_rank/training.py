"""Maestro from end to end: decompose, train with ordered dropout, shrink.

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from netwright.compress.low_rank.ordered import Mode
from netwright.nn.modes import in_mode

if TYPE_CHECKING:
    import lightning

    from netwright.results import History
    from netwright.train import Loader


def fit_maestro(
    model: nn.Module,
    loader: Loader,
    *,
    lam: float,
    eps: float = 1e-5,
    full_pass: bool = False,
    epochs: int = 15,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    mode: Mode = "per_layer",
    hierarchical: bool = True,
    validation: Iterable[Any] | None = None,
    callbacks: Sequence[lightning.Callback] = (),
    calibration_batches: int | None = 50,
    seed: int = 0,
) -> History:
    """Trains a decomposed network in place; its ranks shrink meanwhile.

    Args:
        model: From :func:`~netwright.compress.low_rank.layers.decompose`.
        loader: Batches (x, labels).
        lam: Weight of the penalty, >= 0: the knob between accuracy and size.
        eps: Importance below which trailing terms are let go after an epoch, >= 0.
        full_pass: Train the whole network on the labels and the truncated one on its answers, at twice the price.
        epochs: At least 1.
        lr: Learning rate of SGD with Nesterov momentum, along a cosine.
        momentum: In [0, 1).
        weight_decay: Of the factors; it acts as a penalty on singular values, beside ``lam``.
        optimizer: Makes another optimiser.
        mode: Of :func:`~netwright.compress.low_rank.ordered.ordered_rank_sampler`.
        hierarchical: Whether penalty and importance of a term include those behind it.
        validation: Batches to watch.
        callbacks: More of Lightning's.
        calibration_batches: Batches of ``loader`` from which batch norms are measured anew; None for all.
        seed: Of everything random.

    Returns:
        What each epoch recorded, with the sum of the ranks as ``ranks``.

    Raises:
        ValueError: If an argument is out of its range, or there is no low-rank layer.
    """
    from netwright.compress.callbacks import FullPassClassifier, MaestroCallback
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    kind = FullPassClassifier if full_pass else Classifier
    module = kind(model, lr=lr, momentum=momentum, weight_decay=weight_decay)
    maestro = MaestroCallback(
        lam,
        eps,
        mode=mode,
        hierarchical=hierarchical,
        calibration=loader,
        calibration_batches=calibration_batches,
        seed=seed,
    )
    with in_mode(model, training=True):
        return fit(
            module,
            loader,
            epochs=epochs,
            optimizer=optimizer,
            validation=validation,
            callbacks=[maestro, *callbacks, CosineProgress()],
            seed=seed,
            description="low rank",
        )
