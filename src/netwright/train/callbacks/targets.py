"""Callback of the method that changes what the loss is asked for: PS-KD (arXiv:2006.12000)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

from netwright.nn.modes import in_mode
from netwright.train.self_distillation import PSKDTargets, gather_rows, one_hot, pskd_alpha


class Around:
    """A function in place of a method of one object, until it is undone.

    Args:
        owner: The object.
        name: The method.
        make: Given the method, returns what is called instead.
    """

    def __init__(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self.owner, self.name = owner, name
        self._own = owner.__dict__.get(name)  # torch.compile under Lightning puts one there too
        method = getattr(owner, name)
        setattr(owner, name, functools.wraps(method)(make(method)))

    def undo(self) -> None:
        """Puts back what was there."""
        if self._own is None:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self._own)


class PSKDCallback(lightning.Callback):
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
        dtype: Of the memory.
        device: Of the memory; None is the module's, ``"cpu"`` keeps it off an accelerator that is too small.

    Attributes:
        indexed: Whether batches must hold indices.

    Raises:
        ValueError: If ``alpha_T`` or ``teacher`` is out of its range; in training if a batch has no indices.
        RuntimeError: In training if the step gave no logits that could be seen.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[PSKDCallback(alpha_T=0.8)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        alpha_T: float = 0.8,
        teacher: Literal["memory", "snapshot"] = "memory",
        logits: str | None = None,
        num_examples: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | None = None,
    ):
        pskd_alpha(0, 1, alpha_T)
        if teacher not in ("memory", "snapshot"):
            raise ValueError(f"teacher must be 'memory' or 'snapshot', got {teacher!r}")
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples must be >= 1, got {num_examples}")
        self.alpha_T, self.teacher, self.logits = alpha_T, teacher, logits
        self.num_examples, self.dtype, self.device = num_examples, dtype, device
        self.targets: PSKDTargets | None = None
        self.snapshot: dict[str, Tensor] = {}
        self.indexed = teacher == "memory"
        self._alpha = 0.0
        self._ids: Tensor | None = None
        self._seen: Tensor | None = None
        self._watching = False
        self._around: Around | None = None
        self._hook: RemovableHandle | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and watches the logits."""
        if int(trainer.max_epochs or 0) < 1:
            raise ValueError(f"the Trainer's max_epochs must be set for PS-KD, got {trainer.max_epochs}")
        source = self._source(pl_module)
        self._hook = source.register_forward_hook(self._see)
        self._around = Around(pl_module, "training_step", lambda step: self._softened(step, pl_module))
        if self.targets is not None:
            self.targets.to(self.device or pl_module.device)

    def _source(self, module: nn.Module) -> nn.Module:
        return module if self.logits is None else module.get_submodule(self.logits)

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        # With several processes the module's own call passes through here too, with the loss as its output.
        if self._watching and self._seen is None and isinstance(output, Tensor) and output.ndim == 2:
            self._seen = output.detach()

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The weight of this epoch."""
        total = int(trainer.max_epochs or 1)
        self._alpha = pskd_alpha(trainer.current_epoch, total, self.alpha_T) if trainer.current_epoch else 0.0

    def _softened(self, step: Callable[..., Any], pl_module: lightning.LightningModule) -> Callable[..., Any]:
        def training_step(batch: Any, *rest: Any) -> Any:
            if not isinstance(batch, (tuple, list)) or len(batch) < 2 + self.indexed:
                raise ValueError(
                    "PS-KD needs batches (x, labels, indices): wrap the data set in netwright.data.indexed."
                    "IndexedDataset, or make Batches(..., indexed=True)"
                )
            x, labels = batch[:2]
            self._ids, self._seen = (batch[2] if self.indexed else None), None
            targets = self._target(pl_module, x, labels) if self._alpha else labels
            self._watching = True
            try:
                return step((x, targets), *rest)
            finally:
                self._watching = False

        return training_step

    def _target(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> Tensor:
        if self.teacher == "snapshot":
            if not self.snapshot:
                return labels
            source = self._source(pl_module)
            with in_mode(source, False), torch.no_grad():
                probs = functional_call(source, self.snapshot, (x,)).float().softmax(1)
            return torch.lerp(one_hot(labels, probs.shape[1]), probs, self._alpha)
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
        if self._seen is None or self._ids is None:
            raise RuntimeError(
                "PS-KD saw no logits: training_step must call self(x), or the argument logits must name the submodule "
                "that gives them"
            )
        ids, logits = gather_rows(self._ids.to(self._seen.device), self._seen.float())
        if self.targets is None:
            rows = self.num_examples or _examples(trainer)
            self.targets = PSKDTargets(rows, logits.shape[1], self.alpha_T, dtype=self.dtype)
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
        if self._around is not None:
            self._around.undo()
        if self._hook is not None:
            self._hook.remove()
        self._around = self._hook = None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the module as it was; after an exception the Trainer calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def state_dict(self) -> dict[str, Any]:
        """The predictions, or the snapshot."""
        memory = {} if self.targets is None else dict(self.targets.state_dict())
        return {"memory": memory, "snapshot": self.snapshot}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the memory of a checkpoint."""
        self.snapshot = state_dict["snapshot"]
        memory = state_dict["memory"]
        if memory:
            rows, classes = memory["predictions"].shape
            self.targets = PSKDTargets(rows, classes, self.alpha_T, dtype=self.dtype)
            self.targets.load_state_dict(memory)


def _examples(trainer: lightning.Trainer) -> int:
    dataset = getattr(trainer.train_dataloader, "dataset", None)
    if dataset is None:
        raise ValueError("num_examples must be given: the training data loader does not tell its data set")
    return len(dataset)
