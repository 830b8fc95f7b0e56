"""A network that is trained on the cross-entropy of its logits, and what a trained one answers."""

from __future__ import annotations

from collections.abc import Iterable

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netwright.nn.modes import in_mode
from netwright.train.weight_compander import scale_rates_


class Classifier(lightning.LightningModule):
    """Trains a network by stochastic gradient descent on the cross-entropy of its logits.

    The network's convolutions are laid out channels last.

    Args:
        network: Maps (batch, channels, height, width) to logits (batch, classes).
        lr: Learning rate at the start; schedules multiply it.
        momentum: Nesterov momentum, in [0, 1).
        weight_decay: L2 penalty on every parameter of two or more dimensions; biases and norms have none.
        label_smoothing: Share of the target spread evenly over the classes, in [0, 1).
        auxiliary_weight: Weight of the loss of an auxiliary head, for a network with ``forward_with_auxiliary``.
        drop_path: Largest drop-path rate, reached linearly over the run, for a network with a ``drop_path`` attribute.
        clip: Largest norm of the whole gradient; None leaves it as it is.

    Raises:
        ValueError: If ``lr`` is not positive or ``momentum`` or ``label_smoothing`` is out of its range.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
        auxiliary_weight: float = 0.0,
        drop_path: float = 0.0,
        clip: float | None = 5.0,
    ):
        super().__init__()
        if not lr > 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {momentum}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.network = network.to(memory_format=torch.channels_last)
        self.lr, self.momentum, self.weight_decay, self.clip = lr, momentum, weight_decay, clip
        self.label_smoothing, self.auxiliary_weight, self.drop_path = (
            label_smoothing,
            auxiliary_weight,
            drop_path,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.network(x)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats, with label smoothing."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def on_train_epoch_start(self) -> None:
        """Raises the drop-path rate with the epochs."""
        if self.drop_path and hasattr(self.network, "drop_path"):
            share = self.current_epoch / max(1, int(self.trainer.max_epochs or 1))
            self.network.drop_path = self.drop_path * share  # type: ignore[assignment]  # a plain number of the network's

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, labels = channels_last(batch[0]), batch[1]
        if self.auxiliary_weight:
            logits, auxiliary = self.network.forward_with_auxiliary(x)  # type: ignore[operator]
            loss = self.loss(logits, labels) + self.auxiliary_weight * self.loss(auxiliary, labels)
        else:
            loss = self.loss(self(x), labels)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy of a validation batch."""
        x, labels = channels_last(batch[0]), batch[1]
        logits = self(x)
        size = len(labels)
        self.log("val_loss", F.cross_entropy(logits, labels), on_epoch=True, batch_size=size, sync_dist=True)
        accuracy = (logits.argmax(1) == labels).float().mean()
        self.log("val_accuracy", accuracy, on_epoch=True, batch_size=size, sync_dist=True)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips by the norm of the whole gradient; a gradient that overflowed makes no update.

        Under heavy masks a chain of batch norms over nearly dead channels can overflow in the backward pass while the
        loss is sound.
        """
        limit = gradient_clip_val if gradient_clip_val is not None else self.clip
        if limit is None:
            return
        parameters = [p for p in self.parameters() if p.grad is not None]
        if torch.isfinite(nn.utils.clip_grad_norm_(parameters, limit)):
            return
        for parameter in parameters:
            parameter.grad = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum; weight decay on weights only, what companders learn at their own rate."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.SGD(
            [g for g in groups if g["params"]], lr=self.lr, momentum=self.momentum, nesterov=self.momentum > 0
        )
        scale_rates_(optimizer, self)
        return optimizer


def channels_last(x: Tensor) -> Tensor:
    """Images with channels innermost in memory, which convolutions on a CPU take up to twice as fast.

    Example:
        >>> channels_last(torch.zeros(2, 1, 3, 4)).stride()
        (12, 1, 4, 1)
    """
    # A clone: contiguous() takes images of one channel for channels last already and leaves strides from which
    # convolutions conclude the other layout, unless their weights are in this one - and masked weights are not.
    return x.clone(memory_format=torch.channels_last) if x.ndim == 4 else x


@torch.inference_mode()
def evaluate(network: nn.Module, data: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """Class probabilities and labels of a whole data set, in order.

    Args:
        network: Maps a batch to logits; in evaluation mode meanwhile; each of its parts is left in the mode it was in.
        data: Batches (x, labels, ...); real inputs are converted to the precision of the network.

    Returns:
        Probabilities (examples, classes) float32 and labels (examples,) int64, on the CPU.

    Example:
        >>> probs, labels = evaluate(nn.Identity(), [(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))])
        >>> probs.tolist(), labels.tolist()
        ([[0.5, 0.5]], [1])
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    probs, labels = [], []
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), None)
    with in_mode(network, training=False):
        for x, y, *_ in data:
            inputs = x.to(device, dtype if x.is_floating_point() else x.dtype)
            probs.append(network(channels_last(inputs)).float().softmax(1).cpu())
            labels.append(y.cpu())
    return torch.cat(probs), torch.cat(labels)
