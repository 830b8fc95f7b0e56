"""Learning from failure (LfF): a network that is made to learn the bias tells which examples go against it.

Nam, Cha, Ahn, Lee and Shin, "Learning from Failure: Training Debiased Classifier from Biased Classifier", NeurIPS 2020,
arXiv:2007.02561; the loss is that of Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural
Networks with Noisy Labels", NeurIPS 2018, arXiv:1805.07836.

    GCE(p, y) = (1 - p_y^q) / q,        W(x) = CE(f_B(x), y) / (CE(f_B(x), y) + CE(f_D(x), y))

Its gradient is that of cross-entropy times p_y^q, so that f_B learns what is easy ever more. What f_B fails at counts
more for f_D. Where no example goes against the bias there is nothing to learn from: that is what CDvG is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import lightning
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.modes import in_mode
from netwright.train.classifier import Classifier

OptimizerFn = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def generalized_cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, "batch"],
    q: float = 0.7,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """(1 - p_y^q) / q: cross-entropy for q to 0, one minus the probability for q = 1.

    Args:
        logits: Of any size.
        labels: Classes.
        q: In (0, 1].
        reduction: ``"mean"``, or ``"none"`` for one number an example.

    Raises:
        ValueError: If ``q`` or ``reduction`` is out of its range.

    Example:
        >>> generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), q=1.0).item()
        0.5
    """
    if not 0 < q <= 1:
        raise ValueError(f"q must lie in (0, 1], got {q}")
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction must be 'mean' or 'none', got {reduction!r}")
    log_prob = functional.log_softmax(logits, 1).gather(1, labels[:, None]).squeeze(1)
    losses = -torch.expm1(q * log_prob) / q
    return losses.mean() if reduction == "mean" else losses


def relative_difficulty(biased: Float[Tensor, "batch"], debiased: Float[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """W: the share of the biased network's loss in the loss of both, in [0, 1]; 1/2 where both are 0.

    Args:
        biased: Losses of the biased network, >= 0.
        debiased: Those of the other one.

    Example:
        >>> relative_difficulty(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])).tolist()
        [0.75, 0.5]
    """
    total = biased + debiased
    return torch.where(total > 0, biased / torch.where(total > 0, total, 1.0), 0.5)


class LfF(lightning.LightningModule):
    """Trains two networks at once: one with GCE, which learns the bias, the other on what the first one fails at.

    Batches are (x, labels), or (x, labels, indices) where losses are averaged. The module answers with the debiased
    network.

    Args:
        network: To be debiased; gives logits.
        biased: Another one of its kind, with weights of its own.
        q: Of the generalised cross-entropy, in (0, 1].
        num_examples: Examples of the training set, whose losses are then averaged over the epochs and divided by the
            largest of their class, as published; None compares the losses of the batch as they are.
        beta: Share of an average that a step keeps, in [0, 1).
        lr: Of Adam, > 0.
        optimizer_fn: Makes the optimiser from the parameters of both, in place of Adam.

    Raises:
        ValueError: If a number is out of its range; in training if indices are missing.

    Example:
        >>> from netwright.data.tensors import Batches, TensorImages
        >>> from netwright.train import fit
        >>> images = TensorImages(torch.randint(0, 256, (32, 1, 4, 4), dtype=torch.uint8), torch.arange(32) % 2)
        >>> module = LfF(*(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)) for _ in range(2)))
        >>> "train_loss" in fit(module, Batches(images, 8), epochs=1).last
        True
    """

    def __init__(
        self,
        network: nn.Module,
        biased: nn.Module,
        q: float = 0.7,
        num_examples: int | None = None,
        beta: float = 0.7,
        lr: float = 1e-3,
        optimizer_fn: OptimizerFn | None = None,
    ):
        super().__init__()
        if not 0 < q <= 1:
            raise ValueError(f"q must lie in (0, 1], got {q}")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples must be >= 1, got {num_examples}")
        if not 0 <= beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {beta}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite, got {lr}")
        self.network, self.biased = network, biased
        self.q, self.beta, self.lr, self.optimizer_fn = q, beta, lr, optimizer_fn
        rows = num_examples or 0
        self.register_buffer("averages", torch.full((2, rows), math.nan))  # of both networks' losses
        self.register_buffer("of_class", torch.full((rows,), -1, dtype=torch.int64))
        self.averages: Tensor
        self.of_class: Tensor

    def forward(self, x: Tensor) -> Float[Tensor, "batch classes"]:
        """Logits of the debiased network."""
        return self.network(x)

    @torch.no_grad()
    def weights(self, x: Tensor, y: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
        """W by both networks as they are, in evaluation mode: what CDvG takes as ``sample_weight``."""
        with in_mode(self, training=False):
            losses = [functional.cross_entropy(net(x), y, reduction="none") for net in (self.biased, self.network)]
        return relative_difficulty(*losses)

    def _compared(self, losses: Sequence[Tensor], batch: Sequence[Tensor]) -> Tensor:
        """W by the averaged losses, each over the largest of its class; by the losses themselves without averages."""
        both = torch.stack([loss.detach() for loss in losses])
        if self.averages.shape[1] == 0:
            return relative_difficulty(both[0], both[1])
        if len(batch) < 3:
            raise ValueError("LfF averages losses by (x, labels, indices): make Batches(..., indexed=True)")
        y, index = batch[1], batch[2].to(both.device)
        before = self.averages[:, index]
        self.averages[:, index] = torch.where(before.isnan(), both, self.beta * before + (1 - self.beta) * both)
        self.of_class[index] = y
        known = self.of_class >= 0
        classes = int(self.of_class.max()) + 1
        largest = both.new_zeros(2, classes).scatter_reduce(
            1, self.of_class[known].expand(2, -1), self.averages[:, known], "amax"
        )
        scaled = self.averages[:, index] / largest[:, y].clamp_min(1e-12)
        return relative_difficulty(scaled[0], scaled[1])

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """GCE of the biased network, plus the weighted cross-entropy of the debiased one."""
        x, y = batch[0], batch[1]
        biased, logits = self.biased(x), self.network(x)
        losses = [functional.cross_entropy(each, y, reduction="none") for each in (biased, logits)]
        weight = self._compared(losses, batch)
        loss = (weight * losses[1]).mean() + generalized_cross_entropy(biased, y, self.q)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Accuracy of a validation batch."""
        accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val_accuracy", accuracy, on_epoch=True, batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, or what ``optimizer_fn`` makes; the losses share no parameter, so one serves both networks."""
        params = [param for param in self.parameters() if param.requires_grad]
        return torch.optim.Adam(params, lr=self.lr) if self.optimizer_fn is None else self.optimizer_fn(params)


class BiasedClassifier(Classifier):
    """Trains a network with generalised cross-entropy, so that it goes by what is easy: a reader of biases.

    Args:
        network: Gives logits.
        q: In (0, 1].
        lr: As for :class:`netwright.train.Classifier`.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> BiasedClassifier(nn.Linear(2, 2)).loss(torch.zeros(1, 2), torch.tensor([0])).item() < 0.7
        True
    """

    def __init__(self, network: nn.Module, q: float = 0.7, lr: float = 0.05):
        super().__init__(network, lr=lr)
        generalized_cross_entropy(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), q)
        self.q = q

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Generalised cross-entropy."""
        return generalized_cross_entropy(logits, labels, self.q)
