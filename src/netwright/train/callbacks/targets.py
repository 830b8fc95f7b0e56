"""Callback of the method that changes what the loss is asked for: PS-KD (arXiv:2006.12000)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import lightning
import torch
from torch import Tensor
from torch.func import functional_call

from netwright.nn.modes import in_mode
from netwright.train.callbacks.examples import ExampleCallback
from netwright.train.memory import floating, gather_rows, one_hot
from netwright.train.self_distillation import PSKDTargets, pskd_alpha

if TYPE_CHECKING:
    from netwright.data import Data


class PSKDCallback(ExampleCallback):
    """Softens the labels that ``training_step`` sees by what the network predicted an epoch ago.

    Batches must be (x, labels, indices), as those of ``Batches(..., indexed=True)`` and
    :class:`netwright.data.indexed.IndexedDataset` are; ``training_step`` is given (x, targets). Its loss must take rows
    of probabilities, as ``torch.nn.CrossEntropyLoss`` does. The targets are the labels themselves as long as they are
    hard: in the first epoch, and with ``alpha_T`` 0. The weight follows the Trainer's ``max_epochs``, also when a run
    is resumed. With several processes each remembers the predictions of all.

    Args:
        alpha_T: Weight of the prediction in the last epoch, in [0, 1].
        teacher: ``"memory"`` keeps the predictions made in training; ``"snapshot"`` keeps the network as it was after
            the last epoch instead and applies it to the same batch, in evaluation mode: one more forward pass, no
            indices needed, right for images that are mixed with others.
        logits: Name of the submodule whose output are the logits; None is the module itself, ``self(x)``.
        num_examples: Rows of the memory; None takes the length of the training data set.
        dtype: Of the memory, or its name, ``"float16"`` say.
        device: Of the memory; None is the module's, ``"cpu"`` keeps it off an accelerator that is too small.
        topk: Remember only this many largest probabilities of each example, for many classes; None remembers all.

    Attributes:
        indexed: Whether batches must hold indices.

    Raises:
        ValueError: If an argument is out of its range; in training if a batch has no indices, or if a run is resumed
            with another ``alpha_T``, ``topk`` or number of epochs than it was begun with.
        RuntimeError: In training if the step gave no logits that could be seen.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[PSKDCallback(alpha_T=0.8)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    method = "PS-KD"

    def __init__(
        self,
        alpha_T: float = 0.8,
        teacher: Literal["memory", "snapshot"] = "memory",
        logits: str | None = None,
        num_examples: int | None = None,
        dtype: torch.dtype | str = torch.float32,
        device: str | None = None,
        topk: int | None = None,
    ):
        super().__init__(logits, num_examples, device)
        pskd_alpha(0, 1, alpha_T)
        if topk is not None and topk < 1:
            raise ValueError(f"topk must be >= 1, got {topk}")
        if teacher not in ("memory", "snapshot"):
            raise ValueError(f"teacher must be 'memory' or 'snapshot', got {teacher!r}")
        self.alpha_T, self.teacher, self.dtype, self.topk = alpha_T, teacher, floating(dtype), topk
        self.targets: PSKDTargets | None = None
        self.snapshot: dict[str, Tensor] = {}
        self.indexed = teacher == "memory"
        self._alpha = 0.0
        self._trainer: lightning.Trainer | None = None
        self._epochs = 0
        self._resumed = 0  # epochs of the run as the checkpoint knew them, until they are compared

    def check_data(self, data: Data) -> None:
        """Makes sure that there is room for the data in the memory.

        Raises:
            ValueError: If there are fewer classes than ``topk`` leaves out, or more examples than ``num_examples``.
        """
        classes, examples = len(data.classes), len(data.train)
        if self.topk is not None and self.topk >= classes:
            raise ValueError(f"topk must lie in 1..{classes - 1} for {classes} classes, got {self.topk}")
        if self.num_examples is not None and self.num_examples < examples:
            raise ValueError(f"num_examples must be >= {examples}, the training examples, got {self.num_examples}")

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and watches the logits."""
        if int(trainer.max_epochs or 0) < 1:
            raise ValueError(f"the Trainer's max_epochs must be set for PS-KD, got {trainer.max_epochs}")
        super().on_fit_start(trainer, pl_module)
        if self.targets is not None:
            self.targets.to(self.device or pl_module.device)
        self._trainer = trainer

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The weight of this epoch."""
        total = self._total()
        if self._resumed not in (0, total):
            raise ValueError(
                f"a run with PS-KD must be resumed with the max_epochs it has, since the weight of the predictions "
                f"grows with them, got {total} instead of {self._resumed}"
            )
        self._resumed = 0
        self._alpha = pskd_alpha(trainer.current_epoch, total, self.alpha_T) if trainer.current_epoch else 0.0

    def _total(self) -> int:
        """Epochs of the whole run, as they are planned now."""
        if self._trainer is not None:
            self._epochs = int(self._trainer.max_epochs or 1)
        return self._epochs

    def _before(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        if not self._alpha:
            return x, labels
        target = self._target(pl_module, x, labels)
        # In training in double precision, or half, logits are of the module's type; under autocast they fit anyway.
        return x, target.to(pl_module.dtype) if target.is_floating_point() else target

    def _target(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> Tensor:
        if self.teacher == "snapshot":
            if not self.snapshot:
                return labels
            source = self._source(pl_module)
            with in_mode(source, False), torch.no_grad():
                probs = functional_call(source, self.snapshot, (x,)).float().softmax(1)
            return torch.lerp(one_hot(labels, probs.shape[1]).to(probs.dtype), probs, self._alpha)
        if self.targets is None or self._ids is None:
            return labels
        return self.targets.mixed(self._ids, labels, self._alpha)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Remembers what was predicted before the step."""
        if self.teacher == "snapshot":
            return
        ids, seen = self._looked()
        ids, logits = gather_rows(ids, seen.detach().float())
        if self.targets is None:
            self.targets = self._made(self._examples(trainer), logits.shape[1])
            self.targets.to(self.device or pl_module.device)
        self.targets.update(ids, logits)
        self._seen = self._ids = None

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes the snapshot."""
        if self.teacher == "snapshot":
            state = self._source(pl_module).state_dict()
            self.snapshot = {name: value.detach().clone() for name, value in state.items() if isinstance(value, Tensor)}

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        super().teardown(trainer, pl_module, stage)
        self._total()
        self._trainer = None

    def _made(self, rows: int, classes: int) -> PSKDTargets:
        return PSKDTargets(rows, classes, self.alpha_T, dtype=self.dtype, topk=self.topk)

    def state_dict(self) -> dict[str, Any]:
        """The predictions, or the snapshot, and what the weight of an epoch follows from."""
        memory = {} if self.targets is None else dict(self.targets.state_dict())
        return {
            "memory": memory,
            "num_classes": 0 if self.targets is None else self.targets.num_classes,
            "snapshot": self.snapshot,
            "alpha_T": self.alpha_T,
            "topk": self.topk,
            "max_epochs": self._total(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the memory of a checkpoint.

        Raises:
            ValueError: If it was made with another ``alpha_T`` or ``topk``.
        """
        for name in ("alpha_T", "topk"):
            if state_dict[name] != getattr(self, name):
                raise ValueError(
                    f"a run with PS-KD must be resumed with the {name} it was begun with, got {getattr(self, name)} "
                    f"instead of {state_dict[name]}"
                )
        self.snapshot, self._resumed = state_dict["snapshot"], state_dict["max_epochs"]
        memory = state_dict["memory"]
        if memory:
            self.targets = self._made(len(memory["predictions"]), state_dict["num_classes"])
            self.targets.load_state_dict(memory)
