"""Early-learning regularisation: predictions are held to their own running average, against learning wrong labels.

Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
NeurIPS 2020, arXiv:2007.00151.

    L = CE(z, y) + lam mean_i log(1 - <p_i, t_i>),    t_i <- beta t_i + (1 - beta) p_i    (one row an example, from 0)

A network fits the right labels first and memorises the wrong ones later. The second term falls as the prediction agrees
with its average t. Its gradient, lam p_c (<p, t> - t_c) / (1 - <p, t>) for the logit of class c, keeps up the push of
right labels as cross-entropy fades, and cancels the push of wrong ones. No noise rate and no clean examples are needed.
Where the average disagrees with the label in the end, the label deserves a look: :func:`label_doubts`.

ELR+ (:class:`netwright.train.callbacks.ELRPlusCallback`, :class:`netwright.train.ELRPlus`) mixes examples, averages
weights, and lets two networks give each other's averages.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import number, whole
from netwright.data.augment import mixup
from netwright.data.indexed import IndexedDataset
from netwright.data.label_noise import asymmetric_noise, symmetric_noise
from netwright.lazy import exports
from netwright.results import Result, new_axes
from netwright.train.early_learning_step import KnownGradient, agreement, elr_step, through_softmax
from netwright.train.memory import PredictionMemory, gather_rows, one_hot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.train.callbacks import MemorizationTracker
    from netwright.train.early_learning_plus import ELRPlus

__all__ = [
    "ELRLoss",
    "ELRPlus",
    "IndexedDataset",
    "LabelDoubts",
    "MemorizationTracker",
    "agreement_loss",
    "asymmetric_noise",
    "check_strength",
    "ema_decay",
    "label_doubts",
    "mixup",
    "sigmoid_ramp",
    "symmetric_noise",
]

NO_LABEL = -(2**62)  # which no label is: -100, that torch leaves out of a loss, is refused

# Late, since they are built on this module and on lightning.
__getattr__, __dir__ = exports(
    "netwright.train", {"ELRPlus": "early_learning_plus", "MemorizationTracker": "callbacks"}, __all__
)


def sigmoid_ramp(step: int, length: int) -> float:
    """exp(-5 (1 - step / length)^2), which rises from 0.0067 to 1; 1 from ``length`` on, and for length 0.

    Raises:
        ValueError: If ``step`` or ``length`` is negative.

    Example:
        >>> round(sigmoid_ramp(50, 100), 8), sigmoid_ramp(100, 100), sigmoid_ramp(0, 0)
        (0.2865048, 1.0, 1.0)
    """
    if step < 0 or length < 0:
        raise ValueError(f"step and length must be >= 0, got {step} and {length}")
    return math.exp(-5 * (1 - min(step, length) / length) ** 2) if length else 1.0


def ema_decay(step: int, decay: float = 0.997, ramp: int = 40_000) -> float:
    """Share of the averaged weights that is kept at update ``step``: decay times the ramp.

    Args:
        step: Updates made before, >= 0.
        decay: Largest share, in [0, 1].
        ramp: Updates until it is reached; 0 takes min(1 - 1 / (step + 1), decay) instead.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> ema_decay(0, 0.9, 0), ema_decay(1, 0.9, 0), ema_decay(99, 0.9, 0), ema_decay(99, 0.9, 100)
        (0.0, 0.5, 0.9, 0.9)
    """
    whole("step", step, ">= 0")
    whole("ramp", ramp, ">= 0")
    number("decay", decay, "[0, 1]")
    if not ramp:
        return min(1 - 1 / (step + 1), decay)
    return decay * sigmoid_ramp(step + 1, ramp)


def check_strength(lam: float, beta: float, clamp: float) -> None:
    """Refuses what no form of the method can take.

    Raises:
        ValueError: If ``lam`` is negative or infinite, ``beta`` outside [0, 1) or ``clamp`` outside (0, 0.5).
    """
    number("lam", lam, ">= 0")
    number("beta", beta, "[0, 1)")
    number("clamp", clamp, "(0, 0.5)")


def agreement_loss(
    logits: Float[Tensor, "batch classes"], target: Float[Tensor, "batch classes"], clamp: float = 1e-4
) -> Float[Tensor, ""]:
    """mean_i log(1 - <t_i, p_i>) with p = softmax(z), at most 0; the lower, the more prediction and target agree.

    Differentiable once.

    Args:
        logits: z, which carry the gradient. Probabilities are kept within [clamp, 1 - clamp] and not normalised again.
        target: Rows that sum to 1 at most; no gradient flows into them.
        clamp: Keeps the logarithm finite where both are the same one-hot row.

    Example:
        >>> target = torch.tensor([[0.15, 0.09, 0.06]])
        >>> round(agreement_loss(torch.tensor([[0.5, 0.3, 0.2]]).log(), target).item(), 6)
        -0.121038
    """
    z = precise(logits)
    with torch.no_grad():
        log_probs = z.log_softmax(1)
        probs = log_probs.exp()
        value, slope = agreement(probs, probs.clamp(clamp, 1 - clamp), target, clamp, 1.0)
        gradient = through_softmax(slope(), log_probs) if z.requires_grad else None
    return value if gradient is None else KnownGradient.apply(z, (value, gradient))


def precise(logits: Tensor) -> Tensor:
    """Logits in which 1 - 1e-4 can be told from 1: float32, or float64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


class ELRLoss(nn.Module):
    """Cross-entropy and the pull of each prediction to the running average of its example, in nats.

    Each step first moves the averages to the current predictions (clamped and normalised), then takes the loss with
    them as constants. In evaluation mode the averages stay. With several processes each has the averages of all.

    Args:
        num_examples: Examples of the training set.
        num_classes: At least 2.
        lam: Weight of the pull, >= 0: to be tuned; it grows with classes and noise. The paper: 3 (CIFAR-10), 7
            (CIFAR-100), 1 where labels are confused pairwise.
        beta: Share of the average that a step keeps, in [0, 1); 0.7 to 0.99 make little difference.
        clamp: Probabilities are kept this far from 0 and 1, in (0, 0.5).

    Attributes:
        memory: The averages by index, a buffer that takes examples x classes x 4 bytes.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> loss = ELRLoss(num_examples=4, num_classes=3)
        >>> logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> round(loss(logits, torch.tensor([0]), torch.tensor([2])).item(), 6)
        0.330032
        >>> loss.target[2]
        tensor([0.1500, 0.0900, 0.0600])
    """

    def __init__(self, num_examples: int, num_classes: int, lam: float = 3.0, beta: float = 0.7, clamp: float = 1e-4):
        super().__init__()
        check_strength(lam, beta, clamp)
        self.memory = PredictionMemory(num_examples, num_classes, index_name="index")
        self.lam, self.beta, self.clamp = lam, beta, clamp

    @property
    def target(self) -> Float[Tensor, "examples classes"]:
        """The averages; zeros for an example that was never seen."""
        return self.memory.predictions

    def forward(
        self, logits: Float[Tensor, "batch classes"], labels: Tensor, index: Int[Tensor, "batch"]
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            logits: Of a network.
            labels: Classes (batch,), or rows of probabilities (batch, classes).
            index: Of the examples in the data set, not in the batch.

        Raises:
            ValueError: If a shape is wrong, logits are not finite, a label is outside 0..classes - 1, or an index is
                out of range or comes twice: the averages stay as they were then.
        """
        z = self._checked(logits, index)
        if labels.is_floating_point():
            rows = one_hot(labels, self.memory.num_classes).to(z.dtype)
            if len(rows) != len(z):
                raise ValueError(f"labels must have {len(z)} rows, got {len(rows)}")
            return functional.cross_entropy(z, rows) + self._loss(z, index)
        if labels.shape != z.shape[:1]:
            raise ValueError(f"labels must have shape ({len(z)},), got {tuple(labels.shape)}")
        # A kernel on a processor finds by itself what is no class, before anything is written.
        if labels.device.type != "cpu":
            self._check_range(labels)
        labels = labels.long()
        if not self.lam:  # cross-entropy bit for bit
            return self._cross_entropy(z.log_softmax(1), labels) + self._loss(z, index)
        return self._loss(z, index, labels)

    def pull(self, logits: Float[Tensor, "batch classes"], index: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
        """The second term alone, ``lam`` included: for a loss of one's own in place of cross-entropy.

        Raises:
            ValueError: As for :meth:`forward`.
        """
        return self._loss(self._checked(logits, index), index)

    def _checked(self, logits: Tensor, index: Tensor) -> Tensor:
        if logits.ndim != 2 or logits.shape != (len(index), self.memory.num_classes):
            expected = f"({len(index)}, {self.memory.num_classes})"
            raise ValueError(f"logits must have shape {expected}, got {tuple(logits.shape)}")
        return precise(logits)

    def _check_range(self, labels: Tensor) -> None:
        classes = self.memory.num_classes
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
            raise ValueError(f"labels must lie in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")

    def _cross_entropy(self, log_probs: Tensor, labels: Tensor) -> Tensor:
        try:
            return functional.nll_loss(log_probs, labels, ignore_index=NO_LABEL)
        except (IndexError, RuntimeError):
            self._check_range(labels)
            raise

    def _loss(self, z: Tensor, index: Tensor, labels: Tensor | None = None) -> Tensor:
        """The pull, with the cross-entropy of labels if they are given, and the gradient of both made at once."""
        if self.training and (known := self._at_once(z, index, labels)) is not None:
            return KnownGradient.apply(z, known) if z.requires_grad else known[0]
        with torch.no_grad():
            # A sum is finite only if all are; one that overflows asks for a second look.
            if not math.isfinite(z.sum().item()) and not bool(z.isfinite().all()):
                raise ValueError("logits must be finite, got NaN or infinity: the averages would be poisoned")
            log_probs = z.log_softmax(1)
            entropy = None if labels is None else self._cross_entropy(log_probs, labels)
            probs = log_probs.exp()
            clamped = probs.clamp(self.clamp, 1 - self.clamp)
            rows = (
                self._moved(index, clamped / clamped.sum(1, keepdim=True)) if self.training else self._recalled(index)
            )
            rows = rows.to(probs.device, probs.dtype)
            value, slope = agreement(probs, clamped, rows, self.clamp, self.lam)
            if entropy is not None:
                value += entropy
            if not z.requires_grad:
                return value
            gradient = slope()
            if labels is not None:
                gradient.scatter_(1, labels[:, None], -1 / len(z), reduce="add")
            gradient = through_softmax(gradient, log_probs)
        return KnownGradient.apply(z, (value, gradient))

    def _at_once(self, z: Tensor, index: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Loss and gradient from the compiled step; None where it does not serve."""
        if torch.compiler.is_compiling() or (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return None
        memory = self.memory
        return elr_step(z.detach(), labels, index, memory.predictions, memory.seen, self.beta, self.lam, self.clamp)

    def _moved(self, index: Tensor, current: Tensor) -> Tensor:
        ids, rows = gather_rows(index.to(current.device), current)
        moved = self.memory.average(ids, rows, self.beta)
        return moved if rows is current else self._recalled(index)

    def _recalled(self, index: Tensor) -> Tensor:
        return self.memory.recall(index)[0]

    def suspicious(self, labels: Int[Tensor, "examples"]) -> Bool[Tensor, "examples"]:
        """Which examples have an average whose largest entry is not their label; never those that were not seen.

        Raises:
            ValueError: If there is not one label an example, within 0..classes - 1.
        """
        return suspicious(self.target, labels)

    def score(self, labels: Int[Tensor, "examples"]) -> Float[Tensor, "examples"]:
        """1 - t[label] of each example, in [0, 1]: how little the average holds of the label.

        Raises:
            ValueError: As for :meth:`suspicious`.
        """
        _check_labels(self.target, labels)
        return 1 - self.target.gather(1, labels[:, None].to(self.target.device))[:, 0]


def _check_labels(target: Tensor, labels: Tensor) -> None:
    if labels.is_floating_point() or labels.shape != target.shape[:1]:
        raise ValueError(f"labels must be {len(target)} whole numbers, got {labels.dtype} of {tuple(labels.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < target.shape[1]):
        raise ValueError(f"labels must lie in 0..{target.shape[1] - 1}, got {int(labels.min())}..{int(labels.max())}")


def suspicious(target: Float[Tensor, "examples classes"], labels: Int[Tensor, "examples"]) -> Bool[Tensor, "examples"]:
    """Which rows have their largest entry in another column than the label's; never rows of zeros.

    Example:
        >>> suspicious(torch.tensor([[0.2, 0.7], [0.2, 0.7], [0.0, 0.0]]), torch.tensor([0, 1, 1]))
        tensor([ True, False, False])
    """
    _check_labels(target, labels)
    return (target.argmax(1) != labels.to(target.device)) & (target.amax(1) > 0)


@dataclasses.dataclass(frozen=True)
class LabelDoubts(Result):
    """The examples whose label a trained network doubts, the most doubtful first.

    Attributes:
        examples: How many were looked at.
        index: Of each doubtful example in the data set.
        given: Its label.
        suggested: The class that its average of predictions holds most of.
        score: 1 - t[given], in [0, 1].
        support: t[suggested], in [0, 1].
    """

    examples: int
    index: tuple[int, ...]
    given: tuple[int, ...]
    suggested: tuple[int, ...]
    score: tuple[float, ...]
    support: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.index)

    def __str__(self) -> str:
        share = len(self) / self.examples if self.examples else 0.0
        return f"{len(self)} of {self.examples} labels are doubtful ({100 * share:.1f} %)"

    def plot(self, ax: Axes | None = None) -> Axes:
        """The scores in their order."""
        ax = new_axes(ax)
        ax.plot(range(1, len(self) + 1), self.score)
        ax.set_xlabel("rank")
        ax.set_ylabel("1 - average prediction of the label")
        return ax


def label_doubts(target: Float[Tensor, "examples classes"], labels: Int[Tensor, "examples"]) -> LabelDoubts:
    """The suspicious examples by score; of equal ones the best supported suggestion first.

    Args:
        target: Averages of predictions, as ``ELRLoss.target``; rows of zeros were never seen and are not looked at.
        labels: As they were trained on.

    Raises:
        ValueError: If there is not one label an example, within 0..classes - 1.

    Example:
        >>> found = label_doubts(torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.1, 0.8]]), torch.tensor([0, 0, 0]))
        >>> print(found, found.index, found.suggested)
        2 of 3 labels are doubtful (66.7 %) (2, 1) (1, 1)
    """
    target, labels = target.detach().float().cpu(), labels.cpu()
    chosen = suspicious(target, labels).nonzero()[:, 0]
    support, suggested = target[chosen].max(1)
    score = 1 - target[chosen].gather(1, labels[chosen][:, None].long())[:, 0]
    order = support.argsort(descending=True, stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    return LabelDoubts(
        examples=int((target.amax(1) > 0).sum()),
        index=tuple(chosen[order].tolist()),
        given=tuple(labels[chosen][order].tolist()),
        suggested=tuple(suggested[order].tolist()),
        score=tuple(round(value, 6) for value in score[order].tolist()),
        support=tuple(round(value, 6) for value in support[order].tolist()),
    )
