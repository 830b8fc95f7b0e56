"""What callbacks share that add a term to a module's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning
from torch import Tensor

from netwright.train.callbacks.examples import Around, ExampleCallback


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
