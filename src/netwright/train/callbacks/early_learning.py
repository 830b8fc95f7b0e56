"""Callback of early-learning regularisation (arXiv:2007.00151), and what it shares with that of ELR+."""

from __future__ import annotations

from typing import Any

import lightning
from jaxtyping import Float, Int
from torch import Tensor

from netwright.train.callbacks.terms import TermCallback
from netwright.train.early_learning import ELRLoss, LabelDoubts, check_strength, label_doubts


class PullCallback(TermCallback):
    """Holds predictions to averages by a term of the loss, which is logged as ``elr_term``."""

    logged = "elr_term"

    def __init__(self, logits: str | None, num_examples: int | None, device: str | None):
        super().__init__(logits, num_examples, device)
        self._count = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Finds out how many examples there are."""
        self._count = self._examples(trainer)

    @property
    def target(self) -> Float[Tensor, "examples classes"]:
        """The averages of predictions by index; zeros for an example that was never seen."""
        raise NotImplementedError

    def doubts(self, labels: Int[Tensor, "examples"]) -> LabelDoubts:
        """The examples whose label the averages disagree with; see :func:`netwright.train.label_doubts`."""
        return label_doubts(self.target, labels)


class ELRCallback(PullCallback):
    """Holds each prediction to the running average of its example, so that wrong labels are not memorised (ELR).

    Batches must be (x, labels, indices), as those of ``Batches(..., indexed=True)`` and
    :class:`netwright.data.indexed.IndexedDataset` are; ``training_step`` is given (x, labels), and its loss gets the
    second term of :class:`netwright.train.early_learning.ELRLoss`. Afterwards :meth:`doubts` lists the labels that
    deserve a look.

    Args:
        lam: Weight of the term, >= 0; to be tuned.
        beta: Share of the average that a step keeps, in [0, 1).
        clamp: Probabilities are kept this far from 0 and 1.
        logits: Name of the submodule whose output are the logits; None is the module itself, ``self(x)``.
        num_examples: Rows of the memory; None takes the length of the training data set.
        device: Of the memory; None is the module's, ``"cpu"`` keeps it off an accelerator that is too small.

    Attributes:
        loss: With the memory, once a batch was seen.

    Raises:
        ValueError: If a number is out of its range; in training if a batch has no indices or logits are not finite.
        RuntimeError: In training if the step gave no logits that could be seen.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[ELRCallback(lam=3.0)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    method = "ELR"

    def __init__(
        self,
        lam: float = 3.0,
        beta: float = 0.7,
        clamp: float = 1e-4,
        logits: str | None = None,
        num_examples: int | None = None,
        device: str | None = None,
    ):
        super().__init__(logits, num_examples, device)
        check_strength(lam, beta, clamp)
        self.lam, self.beta, self.clamp = lam, beta, clamp
        self.loss: ELRLoss | None = None

    @property
    def target(self) -> Float[Tensor, "examples classes"]:
        """The averages of predictions by index; zeros for an example that was never seen.

        Raises:
            RuntimeError: Before the first batch.
        """
        if self.loss is None:
            raise RuntimeError("there are no averages before the first batch of training")
        return self.loss.target

    def _pull(self, pl_module: lightning.LightningModule, ids: Tensor, logits: Tensor) -> Tensor:
        if self.loss is None:
            self.loss = self._made(self._count, logits.shape[1])
        return self.loss.to(self.device or pl_module.device).pull(logits, ids)

    def _made(self, rows: int, classes: int) -> ELRLoss:
        return ELRLoss(rows, classes, self.lam, self.beta, self.clamp)

    def state_dict(self) -> dict[str, Any]:
        """The averages."""
        return {"memory": {} if self.loss is None else dict(self.loss.memory.state_dict())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the averages of a checkpoint."""
        if state_dict["memory"]:
            self.loss = self._made(*state_dict["memory"]["predictions"].shape)
            self.loss.memory.load_state_dict(state_dict["memory"])
