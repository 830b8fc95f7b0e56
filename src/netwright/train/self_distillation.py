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
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.data.indexed import IndexedDataset
from netwright.metrics import aurc, eaurc, expected_calibration_error, nll

if TYPE_CHECKING:
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


class PSKDTargets(nn.Module):
    """The memory of predictions, and the softened targets made from it.

    A row that was never written counts as the example's own label, so that a target always sums to 1.

    Args:
        num_examples: Rows; indices are 0..num_examples - 1.
        num_classes: At least 2.
        alpha_T: Weight of the prediction in the last epoch, in [0, 1].
        max_epochs: Epochs of the whole run.
        dtype: Of the memory; float16 halves it, at an error below 5e-4 in a target.
        topk: Keep only this many largest probabilities of each row, and spread the rest evenly over the others; None
            keeps all. For many classes: a row then takes ``topk * (2 + itemsize)`` bytes.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> memory = PSKDTargets(3, 2, alpha_T=0.5, max_epochs=2)
        >>> memory.update(torch.tensor([2]), torch.tensor([[0.0, 0.0]]))
        >>> memory.soften(torch.tensor([2, 0]), torch.tensor([1, 1]), epoch=1)
        tensor([[0.2500, 0.7500],
                [0.0000, 1.0000]])
    """

    predictions: Tensor
    seen: Tensor

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
        super().__init__()
        pskd_alpha(0, max_epochs, alpha_T)
        if num_examples < 1 or num_classes < 2:
            raise ValueError(f"num_examples must be >= 1 and num_classes >= 2, got {num_examples} and {num_classes}")
        if topk is not None and not 1 <= topk < num_classes < 2**15:
            raise ValueError(f"topk must lie in 1..num_classes - 1 (of at most 32767), got {topk} of {num_classes}")
        self.num_examples, self.num_classes = num_examples, num_classes
        self.alpha_T, self.max_epochs, self.topk = alpha_T, max_epochs, topk
        width = num_classes if topk is None else topk
        self.register_buffer("predictions", torch.zeros(num_examples, width, dtype=dtype))
        self.register_buffer("seen", torch.zeros(num_examples, dtype=torch.bool))
        self._complete = False  # whether every row was seen, once that is known
        self.register_load_state_dict_post_hook(lambda module, keys: setattr(module, "_complete", False))
        if topk is not None:
            self.register_buffer("classes", torch.zeros(num_examples, width, dtype=torch.int16))

    def alpha(self, epoch: int) -> float:
        """The weight of the remembered predictions in ``epoch``, counted from 0."""
        return pskd_alpha(epoch, self.max_epochs, self.alpha_T)

    def _ids(self, ids: Tensor) -> Tensor:
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(f"ids must be whole numbers of shape (batch,), got {ids.dtype} of {tuple(ids.shape)}")
        ids = ids.to(self.seen.device)
        # On a processor the kernel that reads or writes the rows finds what is out of range, at no cost.
        if ids.is_cuda:
            self._check_range(ids)
        return ids

    def _check_range(self, ids: Tensor) -> None:
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.num_examples):
            raise ValueError(f"ids must lie in 0..{self.num_examples - 1}, got {int(ids.min())}..{int(ids.max())}")

    def _rows(self, ids: Tensor) -> Tensor:
        """A copy of the remembered rows, float32."""
        try:
            rows = self.predictions.index_select(0, ids).float()
        except (IndexError, RuntimeError):
            self._check_range(ids)
            raise
        if self.topk is None:
            return rows
        rest = (1 - rows.sum(1, keepdim=True)).clamp_min(0) / (self.num_classes - self.topk)
        chosen = self.get_buffer("classes").index_select(0, ids).long()
        return rest.expand(-1, self.num_classes).scatter(1, chosen, rows)

    def recall(self, ids: Int[Tensor, "batch"]) -> tuple[Float[Tensor, "batch classes"], Bool[Tensor, "batch"]]:
        """What was last predicted for these examples in float32, and for which of them anything was."""
        ids = self._ids(ids)
        return self._rows(ids), self.seen.index_select(0, ids)

    def soften(self, ids: Int[Tensor, "batch"], labels: Tensor, epoch: int) -> Float[Tensor, "batch classes"]:
        """The targets of a batch; in epoch 0 the labels themselves.

        Args:
            ids: Indices of the examples.
            labels: Classes (batch,), or rows of probabilities (batch, classes), of mixed examples say.
            epoch: Counted from 0.

        Returns:
            Rows of probabilities on the device of ``labels``, without gradient.

        Raises:
            ValueError: If an index, a label or the epoch is out of its range.
        """
        alpha = self.alpha(epoch)
        return self.mixed(ids, labels, alpha if epoch else 0.0)

    @torch.no_grad()
    def mixed(self, ids: Int[Tensor, "batch"], labels: Tensor, alpha: float) -> Float[Tensor, "batch classes"]:
        """(1 - alpha) label + alpha prediction, for a weight in [0, 1] of one's own."""
        ids = self._ids(ids)
        rows = self._rows(ids)
        if not self._complete:
            self._complete = bool(self.seen.all())
        if self._complete:
            own = rows.new_full((len(ids), 1), 1 - alpha)
            rows.mul_(alpha)
        else:
            own = 1 - alpha * self.seen.index_select(0, ids)[:, None].to(rows.dtype)
            rows.mul_(1 - own)
        rows, own = rows.to(labels.device), own.to(labels.device)
        if labels.is_floating_point() or labels.is_cuda:
            return rows.addcmul_(one_hot(labels, self.num_classes).to(rows.dtype), own)
        try:
            return rows.scatter_add_(1, labels[:, None].long(), own)
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

    @torch.no_grad()
    def remember(self, ids: Int[Tensor, "batch"], probs: Float[Tensor, "batch classes"]) -> None:
        """Writes rows of probabilities."""
        ids, probs = self._ids(ids), probs.to(self.predictions.device)
        self._check_range(ids)
        if len(ids.unique()) < len(ids):
            raise ValueError("ids must be different within a batch, got one twice")
        if self.topk is not None:
            probs, chosen = probs.topk(self.topk)
            self.get_buffer("classes").index_copy_(0, ids, chosen.to(torch.int16))
        self.predictions.index_copy_(0, ids, probs.to(self.predictions.dtype))
        self.seen.index_fill_(0, ids, True)


def one_hot(labels: Tensor, num_classes: int) -> Float[Tensor, "batch classes"]:
    """Classes (batch,) as rows of probabilities; rows of probabilities stay as they are.

    Raises:
        ValueError: If a label is outside 0..num_classes - 1, or the rows have another width.

    Example:
        >>> one_hot(torch.tensor([1]), 3)
        tensor([[0., 1., 0.]])
    """
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(f"labels must be rows of {num_classes} probabilities, got {tuple(labels.shape)}")
        return labels.detach()
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (batch,), got {tuple(labels.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    rows = torch.zeros(len(labels), num_classes, device=labels.device)
    return rows.scatter_(1, labels[:, None].long(), 1.0)


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
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    scheduler: Any = None,
    batch_size: int = 128,
    seed: int = 0,
    teacher: Literal["memory", "snapshot"] = "memory",
    validation: Iterable[Any] | None = None,
    checkpoint: str | Path | None = None,
) -> History:
    """Trains a network with PS-KD, in place; :func:`netwright.train.fit` with the callback has every option.

    Args:
        model: A network that gives logits, or a ``LightningModule`` whose loss takes rows of probabilities.
        train_set: A map-style data set of (x, label), without an index.
        epochs: At least 1.
        alpha_T: Weight of the remembered prediction in the last epoch, in [0, 1].
        optimizer: Makes the optimiser from the parameters; None takes the module's own, or that of ``Classifier``.
        scheduler: A Lightning callback that sets the learning rate, such as ``CosineProgress()``.
        batch_size: Examples in a step.
        seed: Of everything random.
        teacher: ``"memory"`` or ``"snapshot"``, as for :class:`netwright.train.callbacks.PSKDCallback`.
        validation: Batches for the module's ``validation_step`` after each epoch.
        checkpoint: Written after every epoch; when the file is there, training goes on from it, bit for bit.

    Returns:
        The history of the epochs.

    Raises:
        TypeError: For an iterable data set, which has no stable indices.
        ValueError: If a number is out of its range.

    Example:
        >>> from netwright.data.tensors import TensorImages
        >>> images = TensorImages(torch.randint(0, 256, (32, 1, 4, 4), dtype=torch.uint8), torch.arange(32) % 2)
        >>> history = fit_pskd(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), images, epochs=2, batch_size=8)
        >>> len(history.epochs)
        2
    """
    from netwright.data.tensors import Batches
    from netwright.train import fit
    from netwright.train.callbacks import PSKDCallback

    IndexedDataset(train_set)
    return fit(
        model,
        Batches(train_set, batch_size, seed=seed, indexed=True),
        epochs=epochs,
        optimizer=optimizer,
        validation=validation,
        callbacks=[PSKDCallback(alpha_T, teacher=teacher), *([scheduler] if scheduler is not None else [])],
        seed=seed,
        checkpoint=checkpoint,
    )


def gather_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes by index, the same on each and each index once; those given in a single process.

    Ranks may have different numbers of rows. An index that a sampler has handed out twice keeps its first row.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ids, rows
    world = torch.distributed.get_world_size()
    count = torch.tensor([len(ids)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    torch.distributed.all_gather(counts, count)
    most = int(max(counts))
    padded = [torch.cat([value, value.new_zeros(most - len(value), *value.shape[1:])]) for value in (ids, rows)]
    found = []
    for value in padded:
        pieces = [torch.empty_like(value) for _ in range(world)]
        torch.distributed.all_gather(pieces, value.contiguous())
        found.append(torch.cat([piece[: int(n)] for piece, n in zip(pieces, counts, strict=True)]))
    order = torch.argsort(found[0], stable=True)
    new = torch.ones(len(order), dtype=torch.bool, device=order.device)
    new[1:] = found[0][order][1:] != found[0][order][:-1]
    return found[0][order][new], found[1][order][new]
