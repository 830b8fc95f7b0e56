"""PS-KD: a network is its own teacher, by what it predicted for the same example an epoch ago.

Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021,
arXiv:2006.12000.

    target_t = (1 - alpha_t) y + alpha_t p_{t-1},    alpha_t = alpha_T t / T    (epochs t = 1..T)

The loss is the cross-entropy of the softened target, dL/dz = (p_t - y) + alpha_t (y - p_{t-1}). Where p_i >= alpha_t
p_{t-1,i} for all wrong classes, the L1 norm of that gradient is 1 - alpha_t (1 - p_{t-1,g}) / (1 - p_g) of plain
cross-entropy's: examples that have not improved since the last epoch count more. Predictions are those of training
(with its augmentation and dropout), taken from the forward pass that is made anyway. The first epoch has hard targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from netwright.data.indexed import IndexedDataset
from netwright.metrics import aurc, eaurc, expected_calibration_error, nll
from netwright.train.memory import PredictionMemory, one_hot

if TYPE_CHECKING:
    import lightning

    from netwright.results import History

__all__ = [
    "IndexedDataset",
    "PSKDLoss",
    "PSKDTargets",
    "aurc",
    "eaurc",
    "expected_calibration_error",
    "fit_pskd",
    "nll",
    "pskd_alpha",
]

Reduction = Literal["mean", "sum", "none"]


def pskd_alpha(epoch: int, max_epochs: int, alpha_T: float = 0.8) -> float:
    """The weight of the remembered prediction in an epoch, alpha_T (epoch + 1) / max_epochs.

    Args:
        epoch: Counted from 0, < ``max_epochs``.
        max_epochs: Epochs of the whole run, resumed parts included.
        alpha_T: Weight in the last epoch, in [0, 1].

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> pskd_alpha(149, 300)
        0.4
    """
    if not 0 <= alpha_T <= 1:
        raise ValueError(f"alpha_T must lie in [0, 1], got {alpha_T}")
    if not 0 <= epoch < max_epochs:
        raise ValueError(f"epoch must lie in 0..max_epochs - 1 = {max_epochs - 1}, got {epoch}")
    return alpha_T * (epoch + 1) / max_epochs


class PSKDTargets(PredictionMemory):
    """The memory of predictions, and the softened targets made from it.

    A row that was never written counts as the example's own label, so that a target always sums to 1.

    Args:
        num_examples: Rows; indices are 0..num_examples - 1.
        num_classes: At least 2.
        alpha_T: Weight of the prediction in the last epoch, in [0, 1].
        max_epochs: Epochs of the whole run.
        dtype: Of the memory, as for :class:`netwright.train.memory.PredictionMemory`.
        topk: Likewise.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> memory = PSKDTargets(3, 2, alpha_T=0.5, max_epochs=2)
        >>> memory.update(torch.tensor([2]), torch.tensor([[0.0, 0.0]]))
        >>> memory.soften(torch.tensor([2, 0]), torch.tensor([1, 1]), epoch=1)
        tensor([[0.2500, 0.7500],
                [0.0000, 1.0000]])
    """

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        alpha_T: float = 0.8,
        max_epochs: int = 300,
        dtype: torch.dtype = torch.float32,
        *,
        topk: int | None = None,
    ):
        pskd_alpha(0, max_epochs, alpha_T)
        super().__init__(num_examples, num_classes, dtype, topk=topk)
        self.alpha_T, self.max_epochs = alpha_T, max_epochs
        self._complete = False  # whether every row was seen, once that is known
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "_complete", False))

    def alpha(self, epoch: int) -> float:
        """The weight of the remembered predictions in ``epoch``, counted from 0."""
        return pskd_alpha(epoch, self.max_epochs, self.alpha_T)

    def soften(self, ids: Int[Tensor, "batch"], labels: Tensor, epoch: int) -> Float[Tensor, "batch classes"]:
        """The targets of a batch; in epoch 0 the labels themselves.

        Args:
            ids: Indices of the examples.
            labels: Classes (batch,), or rows of probabilities (batch, classes), of mixed examples say.
            epoch: Counted from 0.

        Returns:
            Rows of probabilities on the device of ``labels``, without gradient.

        Raises:
            ValueError: If an index, a label or the epoch is out of its range, an index comes twice, or there are not as
                many labels as indices.
        """
        alpha = self.alpha(epoch)
        return self.mixed(ids, labels, alpha if epoch else 0.0)

    def mixed(self, ids: Int[Tensor, "batch"], labels: Tensor, alpha: float) -> Float[Tensor, "batch classes"]:
        """(1 - alpha) label + alpha prediction, for a weight in [0, 1] of one's own."""
        ids = self._ids(ids)
        if len(labels) != len(ids):
            raise ValueError(f"labels must be as many as ids, got {len(labels)} for {len(ids)}")
        self._distinct(ids)
        rows = self._rows(ids)
        if not self._complete:
            self._complete = bool(self.seen.all())
        soft = labels.is_floating_point()
        if self._complete and not soft and not labels.is_cuda:
            return self._added(rows.mul_(alpha).to(labels.device), labels, 1 - alpha)
        own = 1 - alpha * self.seen.index_select(0, ids)[:, None].to(rows.dtype)
        rows, own = rows.mul_(1 - own).to(labels.device), own.to(labels.device)
        if soft or labels.is_cuda:
            return rows.addcmul_(one_hot(labels, self.num_classes).to(rows.dtype), own)
        return self._added(rows, labels, own)

    def _added(self, rows: Tensor, labels: Tensor, own: Tensor | float) -> Tensor:
        """Adds to each row its share of the label."""
        try:
            index = labels.unsqueeze(1).long()
            if isinstance(own, Tensor):
                return rows.scatter_add_(1, index, own)
            return rows.scatter_(1, index, own, reduce="add")
        except (IndexError, RuntimeError):
            one_hot(labels, self.num_classes)
            raise

    @torch.no_grad()
    def update(self, ids: Int[Tensor, "batch"], logits: Float[Tensor, "batch classes"]) -> None:
        """Remembers softmax(logits) for these examples.

        Raises:
            ValueError: If an index is out of range or comes twice, the logits have other columns than classes, or are
                not finite: nothing is written then.
        """
        if logits.ndim != 2 or logits.shape != (len(ids), self.num_classes):
            raise ValueError(f"logits must have shape ({len(ids)}, {self.num_classes}), got {tuple(logits.shape)}")
        if not bool(logits.isfinite().all()):
            raise ValueError("logits must be finite, got NaN or infinity: the memory would be poisoned")
        self.remember(ids, logits.detach().float().softmax(1))


class PSKDLoss(nn.Module):
    """Cross-entropy in nats with rows of probabilities as targets: -sum_c target log softmax(z).

    Args:
        reduction: ``"mean"`` over the batch (not over the classes), ``"sum"`` or ``"none"``.

    Raises:
        ValueError: If the reduction is unknown, or targets do not have the shape of the logits.

    Example:
        >>> loss = PSKDLoss()(torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.84, 0.12, 0.04]]))
        >>> round(loss.item(), 5)
        0.52985
    """

    def __init__(self, reduction: Reduction = "mean"):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        self.reduction: Reduction = reduction

    def forward(
        self, logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, "..."]:
        """The loss; a scalar unless ``reduction`` is ``"none"``."""
        if logits.ndim != 2 or targets.shape != logits.shape:
            raise ValueError(f"targets must have shape {tuple(logits.shape)}, got {tuple(targets.shape)}")
        return functional.cross_entropy(logits, targets, reduction=self.reduction)


def fit_pskd(
    model: nn.Module,
    train_set: Any,
    *,
    epochs: int,
    alpha_T: float = 0.8,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | Optimizer | None = None,
    scheduler: lightning.Callback | LRScheduler | Callable[[Optimizer], LRScheduler] | None = None,
    batch_size: int = 128,
    seed: int = 0,
    teacher: Literal["memory", "snapshot"] = "memory",
    dtype: torch.dtype | str = torch.float32,
    topk: int | None = None,
    validation: Iterable[Any] | None = None,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains a network with PS-KD, in place; :func:`netwright.train.fit` with the callback has every option.

    Args:
        model: A network that gives logits, or a ``LightningModule`` whose loss takes rows of probabilities.
        train_set: A map-style data set of (x, label), without an index.
        epochs: At least 1.
        alpha_T: Weight of the remembered prediction in the last epoch, in [0, 1].
        optimizer: Of the model's parameters, or what makes one from them; None takes the module's own, or that of
            ``Classifier``.
        scheduler: One of torch, or what makes it from the optimiser, to make a step after each epoch; or a Lightning
            callback that sets the learning rate, such as ``CosineProgress()``.
        batch_size: Examples in a step.
        seed: Of everything random.
        teacher, dtype, topk: As for :class:`netwright.train.callbacks.PSKDCallback`.
        validation: Batches for the module's ``validation_step`` after each epoch.
        checkpoint: Written after every epoch; when the file is there, training goes on from it, bit for bit.

    Returns:
        The history of the epochs.

    Raises:
        TypeError: For an iterable data set, which has no stable indices.
        ValueError: If a number is out of its range, or a scheduler is not that of the optimiser.

    Example:
        >>> from netwright.data.tensors import TensorImages
        >>> images = TensorImages(torch.randint(0, 256, (32, 1, 4, 4), dtype=torch.uint8), torch.arange(32) % 2)
        >>> history = fit_pskd(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), images, epochs=2, batch_size=8)
        >>> len(history.epochs)
        2
    """
    import lightning

    from netwright.data.tensors import Batches
    from netwright.train import Classifier, fit
    from netwright.train.callbacks import PSKDCallback

    IndexedDataset(train_set)
    callbacks: list[lightning.Callback] = [PSKDCallback(alpha_T, teacher=teacher, dtype=dtype, topk=topk)]
    module = model if isinstance(model, lightning.LightningModule) else Classifier(model)
    if isinstance(scheduler, lightning.Callback):
        callbacks.append(scheduler)
        scheduler = None
    return fit(
        module,
        Batches(train_set, batch_size, seed=seed, indexed=True),
        epochs=epochs,
        optimizer=_scheduled(module.configure_optimizers, optimizer, scheduler),
        validation=validation,
        callbacks=callbacks,
        seed=seed,
        checkpoint=checkpoint,
    )


def _scheduled(
    own: Callable[[], Any],
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | Optimizer | None,
    scheduler: LRScheduler | Callable[[Optimizer], LRScheduler] | None,
) -> Callable[[Iterable[nn.Parameter]], Any] | None:
    """What makes optimiser and scheduler as Lightning takes them; ``own`` makes those of the module itself."""
    if isinstance(scheduler, LRScheduler):
        held: Optimizer = scheduler.optimizer
        if optimizer is not None and optimizer is not held:
            raise ValueError(
                "scheduler must be that of the optimizer; give what makes it from one if there is none yet"
            )
        optimizer = held
    if optimizer is None and scheduler is None:
        return None

    def made(params: Iterable[nn.Parameter]) -> Any:
        found = optimizer if isinstance(optimizer, Optimizer) else own() if optimizer is None else optimizer(params)
        if scheduler is None:
            return found
        if not isinstance(found, Optimizer):
            raise ValueError(f"scheduler needs a module with one optimizer, got {type(found).__name__}")
        return {
            "optimizer": found,
            "lr_scheduler": scheduler if isinstance(scheduler, LRScheduler) else scheduler(found),
        }

    return made
