"""What callbacks share that add a term to a module's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from netwright.train.callbacks.examples import Around, ExampleCallback
from netwright.train.classifier import channels_last


class TermCallback(ExampleCallback):
    """Adds a term of the logits to the loss: to what ``training_step`` returns, or before ``manual_backward``.

    With manual optimisation the first ``self.manual_backward(loss)`` of a step has it.

    Attributes:
        logged: Name under which the term is logged.
    """

    logged = "term"

    def __init__(self, logits: str | None = None, num_examples: int | None = None, device: str | None = None):
        super().__init__(logits, num_examples, device)
        self._pending = False

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and around the backward pass where the module calls it itself."""
        super().on_fit_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            self._arounds.append(Around(pl_module, "manual_backward", lambda own: self._adding(own, pl_module)))

    def _pull(self, pl_module: lightning.LightningModule, ids: Tensor, logits: Tensor) -> Tensor:
        """The term."""
        raise NotImplementedError

    def _before(self, pl_module: lightning.LightningModule, x: Any, labels: Tensor) -> tuple[Any, Tensor]:
        self._pending = True
        return x, labels

    def _term(self, pl_module: lightning.LightningModule) -> Tensor:
        ids, logits = self._looked()
        term = self._pull(pl_module, ids, logits)
        self._pending, self._seen = False, None
        pl_module.log(self.logged, term.detach(), on_step=False, on_epoch=True, batch_size=len(ids))
        return term

    def _after(self, pl_module: lightning.LightningModule, outputs: Any) -> Any:
        if not pl_module.automatic_optimization:
            if self._pending:
                raise RuntimeError(f"{self.method} needs a step that calls self.manual_backward(loss)")
            return outputs
        if outputs is None:  # the step asks to be left out
            return None
        if isinstance(outputs, Mapping):
            return {**outputs, "loss": outputs["loss"] + self._term(pl_module)}
        return outputs + self._term(pl_module)

    def _adding(self, backward: Callable[..., Any], pl_module: lightning.LightningModule) -> Callable[..., Any]:
        def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            return backward(loss + self._term(pl_module) if self._pending else loss, *args, **kwargs)

        return manual_backward


class JoiningCallback(TermCallback):
    """Sends further images through the module in the same pass; the step sees the logits of its own images alone.

    So batch norms take their statistics from both, and any loss or metric of the step works as without.
    :meth:`_join` tells which images; hooks of others see inputs and outputs of the step's own images.
    """

    def __init__(self, logits: str | None = None, num_examples: int | None = None, device: str | None = None):
        super().__init__(logits, num_examples, device)
        self._own, self._joined = 0, 0
        self._extra: Tensor | None = None
        self._others: Tensor | None = None
        self._extending: RemovableHandle | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stands around the training step, and between the module and its callers."""
        # Before others look at the module's inputs and outputs, so that they see those of the step's images alone.
        self._extending = self._source(pl_module).register_forward_pre_hook(self._extend)
        super().on_fit_start(trainer, pl_module)

    def _join(self, extra: Tensor | None, own: int) -> None:
        """What is to pass beside the ``own`` images that the step is given, as the module takes them; None: nothing."""
        self._extra, self._own, self._joined, self._others = extra, own, 0, None

    def _logits_of_joined(self) -> Tensor:
        """What the module made of the further images.

        Raises:
            RuntimeError: If they did not pass through it.
        """
        if self._others is None:
            raise RuntimeError(
                f"{self.method} saw no logits: training_step must call self(x), or the argument logits must name the "
                "submodule that gives them"
            )
        return self._others

    def _extend(self, module: nn.Module, args: Any) -> Any:
        if not self._watching or self._joined or self._extra is None or not args or not isinstance(args[0], Tensor):
            return None
        x, expected = args[0], (self._own, *self._extra.shape[1:])
        if x.shape != expected:
            raise ValueError(f"{self.method} needs self(x) with {expected}, got {tuple(x.shape)}")
        self._joined = len(self._extra)
        both = torch.cat([x, self._extra.to(x)])
        return (channels_last(both) if x.ndim == 4 and x.stride(1) == 1 else both, *args[1:])

    def _see(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._extra is None:
            return super()._see(module, args, output)
        if not self._watching or not self._joined or self._others is not None:
            return None
        total = self._own + self._joined
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != total:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"{self.method} needs logits of {total} images, got {shape}")
        self._seen, self._others = output[: self._own], output[self._own :]
        return self._seen

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        super().teardown(trainer, pl_module, stage)
        if self._extending is not None:
            self._extending.remove()
        self._extending = self._extra = self._others = None
