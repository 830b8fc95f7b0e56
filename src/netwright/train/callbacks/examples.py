"""What callbacks share that remember something of each example: indices in, logits seen, a step stood around."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright.console import nearest


def check_device(device: str) -> None:
    """Refuses what is no device."""
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda or the like, got {device!r}") from error


class Around:
    """A function in place of a method of one object, until it is undone; several may stand around each other.

    Args:
        owner: The object.
        name: The method.
        make: Given the method, returns what is called instead.
        indexed: Whether that reads the indices of its batch.
    """

    def __init__(
        self,
        owner: Any,
        name: str,
        make: Callable[[Callable[..., Any]], Callable[..., Any]],
        *,
        indexed: bool = False,
    ):
        self.owner, self.name, self.indexed = owner, name, indexed
        self._own = owner.__dict__.get(name)  # torch.compile under Lightning puts one there too
        self.inner = getattr(owner, name)
        self.outer = functools.wraps(self.inner)(make(self._call))
        self.outer.around = self  # type: ignore[attr-defined]
        setattr(owner, name, self.outer)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)  # which may have changed since

    def undo(self) -> None:
        """Takes this one out, whatever has been put around it since."""
        found = self.owner.__dict__.get(self.name)
        if found is self.outer:
            if self._own is None:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, self._own)
            return
        for around in _around(found):
            if around.inner is self.outer:
                around.inner, around._own = self.inner, self._own


def _around(method: Any) -> Iterator[Around]:
    """What stands around a method, from outside."""
    around = getattr(method, "around", None)
    while isinstance(around, Around):
        yield around
        around = getattr(around.inner, "around", None)


def indexed_within(module: lightning.LightningModule) -> bool:
    """Whether anything that stands around a module's training step reads the indices of its batch."""
    return any(around.indexed for around in _around(module.training_step))


def indexed_around(module: lightning.LightningModule, callback: ExampleCallback) -> bool:
    """Whether anything but ``callback`` that stands around a module's training step reads the indices of its batch."""
    own = {id(around) for around in callback._arounds}
    return any(around.indexed for around in _around(module.training_step) if id(around) not in own)


class ExampleCallback(lightning.Callback):
    """Stands around ``training_step`` with batches (x, labels, indices), and sees the logits of ``self(x)``.

    The innermost of several gives the step (x, labels); the others hand the indices on to the next.

    Args:
        logits: Name of the submodule whose output are the logits; None is the module itself, ``self(x)``.
        num_examples: Rows of the memory; None takes the length of the training data set.
        device: Of the memory; None is the module's.

    Attributes:
        method: Name of the method, for messages.
        indexed: Whether batches must hold indices.

    Raises:
        ValueError: If ``num_examples`` is below 1; in training if a batch has no indices.
    """

    method = "this method"

    def __init__(self, logits: str | None = None, num_examples: int | None = None, device: str | None = None):
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples must be >= 1, got {num_examples}")
        if device is not None:
            check_device(device)
        if logits is not None and not isinstance(logits, str):
            raise ValueError(f"logits must be the name of a submodule, got {logits!r}")
        self.logits, self.num_examples, self.device = logits, num_examples, device
        self.indexed = True
        self._ids: Tensor | None = None
        self._seen: Tensor | None = None
        self._watching = False
        self._arounds: list[Around] = []
        self._hook: RemovableHandle | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and watches the logits."""
        self._hook = self._source(pl_module).register_forward_hook(self._see)
        self._arounds = [
            Around(pl_module, "training_step", lambda step: self._stepping(step, pl_module), indexed=self.indexed)
        ]

    def check_network(self, network: nn.Module, example: Tensor | None = None) -> None:
        """Makes sure that a network has what ``logits`` names.

        Args:
            network: That is to be trained, in the LightningModule in which it will be.
            example: Not looked at.

        Raises:
            ValueError: If it has not.
        """
        names = dict(network.named_modules())
        if self.logits is not None and self.logits not in names:
            raise ValueError(f"logits must name a submodule, got {self.logits!r}: {nearest(self.logits, names)}")

    def _source(self, module: nn.Module) -> nn.Module:
        return module if self.logits is None else module.get_submodule(self.logits)

    def _see(self, module: nn.Module, args: Any, output: Any) -> Any:
        # With several processes the module's own call passes through here too, with the loss as its output.
        if self._watching and self._seen is None and isinstance(output, Tensor) and output.ndim == 2:
            self._seen = output
        return None

    def _stepping(self, step: Callable[..., Any], pl_module: lightning.LightningModule) -> Callable[..., Any]:
        hands_on = indexed_within(pl_module)

        def training_step(batch: Any, *rest: Any) -> Any:
            self._check_batch(batch)
            self._ids, self._seen = (batch[2] if self.indexed else None), None
            x, labels = self._before(pl_module, batch[0], batch[1])
            self._watching = True
            try:
                outputs = step((x, labels, *batch[2:]) if hands_on else (x, labels), *rest)
            finally:
                self._watching = False
            return self._after(pl_module, outputs)

        return training_step

    def _check_batch(self, batch: Any) -> None:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 + self.indexed:
            raise ValueError(
                f"{self.method} needs batches (x, labels, indices): wrap the data set in netwright.data.indexed."
                "IndexedDataset, or make Batches(..., indexed=True)"
            )

    def _before(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        """What the step sees in place of a batch."""
        return x, labels

    def _after(self, pl_module: lightning.LightningModule, outputs: Any) -> Any:
        """What the Trainer sees in place of what the step returned."""
        return outputs

    def _looked(self) -> tuple[Tensor, Tensor]:
        """Indices and logits of the step.

        Raises:
            RuntimeError: If there were no logits to be seen.
        """
        if self._seen is None or self._ids is None:
            raise RuntimeError(
                f"{self.method} saw no logits: training_step must call self(x), or the argument logits must name the "
                "submodule that gives them"
            )
        return self._ids.to(self._seen.device), self._seen

    def _examples(self, trainer: lightning.Trainer) -> int:
        dataset = getattr(trainer.train_dataloader, "dataset", None)
        if self.num_examples is None and dataset is None:
            raise ValueError("num_examples must be given: the training data loader does not tell its data set")
        return self.num_examples or len(dataset)  # type: ignore[arg-type]

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        for around in self._arounds:
            around.undo()
        if self._hook is not None:
            self._hook.remove()
        self._arounds, self._hook = [], None

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the module as it was; after an exception the Trainer calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")
