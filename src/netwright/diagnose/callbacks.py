"""Coherence while a network trains, and training that suppresses weak directions, as Lightning callbacks.

Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv:2203.10036.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import lightning
import torch
from torch.nn import functional

from netwright.checks import one_of
from netwright.diagnose.coherence import CoherenceResult, Sums
from netwright.diagnose.gradients import Batched, ExampleGradients, LossFunction
from netwright.diagnose.suppression import MedianOfMeans, RunningMedian, WinsorizedGradients, check_share

CROSS_ENTROPY: LossFunction = partial(functional.cross_entropy, reduction="none")
# A measurement costs up to twice what training on its examples does, so that this keeps it below a tenth.
SPARED = 24

Method = Literal["winsorized", "m3", "rm3"]


class CoherenceCallback(lightning.Callback):
    """Measures the coherence of a fixed set of examples before training and every few steps.

    Logs the mean of m-coherence over an epoch's measurements. Training is not changed by it: nothing random is drawn,
    and ``.grad`` and running statistics stay as they are. Each training is measured anew; one that is resumed goes on.

    Args:
        data: The examples: a pair of tensors (inputs, targets) as the module takes them, or a list of batches.
        every: Steps between measurements, or a function of the step that tells whether to measure; by default as many
            steps as train on 24 times the examples, which costs less than 15 % of the training time.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        per_layer: Also measure each layer.
        name: Under which it is logged; several callbacks in one training need different ones.

    Attributes:
        steps: The step before which each measurement was made.
        results: The :class:`~netwright.diagnose.CoherenceResult` of each.

    Raises:
        ValueError: If ``every`` is below 1.

    Example:
        >>> probe = torch.rand(100, 1, 28, 28), torch.arange(100) % 10
        >>> trainer = lightning.Trainer(
        ...     callbacks=[CoherenceCallback(probe)], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        data: Batched,
        every: int | Callable[[int], bool] | None = None,
        loss_fn: LossFunction = CROSS_ENTROPY,
        *,
        per_layer: bool = False,
        name: str = "m_coherence",
    ):
        if isinstance(every, int) and every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if iter(data) is data:
            raise ValueError("data must be such that it can be read many times, got an iterator")
        self.data, self.every, self.loss_fn, self.per_layer, self.name = data, every, loss_fn, per_layer, name
        self.steps: list[int] = []
        self.results: list[CoherenceResult] = []
        self._gradients: ExampleGradients | None = None
        self._cadence = every
        self._loaded = False

    @property
    def state_key(self) -> str:
        """Tells its state in a checkpoint from that of others."""
        return self._generate_state_key(name=self.name)

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forgets an earlier training, unless a state of this one was taken up."""
        if not self._loaded:
            self.steps, self.results = [], []
        self._cadence, self._loaded = self.every, False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measures where it is time to."""
        step = trainer.global_step
        if self._cadence is None and self.results:
            self._cadence = max(1, math.ceil(SPARED * self.results[0].m / len(batch[0])))
        due = self._cadence(step) if callable(self._cadence) else self._cadence is None or step % self._cadence == 0
        if not due or step in self.steps:
            return
        if self._gradients is None or self._gradients.model is not pl_module:
            self._gradients = ExampleGradients(pl_module, self.loss_fn, bn="eval")
        found = Sums().add(self._gradients, self.data).result(per_layer=self.per_layer)
        self.steps.append(step)
        self.results.append(found)
        if trainer.training:
            pl_module.log(self.name, found.m_coherence, on_step=False, on_epoch=True, batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far."""
        return {"steps": self.steps, "results": [found.to_dict() for found in self.results]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state."""
        self.steps = list(state_dict["steps"])
        self.results = [_result(found) for found in state_dict["results"]]
        self._loaded = True


def _result(found: dict[str, Any]) -> CoherenceResult:
    numbers = {name: math.nan if found[name] is None else found[name] for name in ("alpha", "m_coherence")}
    layers = {name: _result(each) for name, each in found["per_layer"].items()}
    return CoherenceResult(**{**found, **numbers, "per_layer": layers})


class SuppressionCallback(lightning.Callback):
    """Puts a gradient in which weak directions are suppressed in place of the mean, in any module's training.

    The module trains by automatic optimisation with one optimiser; clipping comes afterwards. Winsorising costs the
    gradients of all single examples, M3 a second step, RM3 next to nothing.

    Args:
        method: ``"winsorized"``, ``"m3"`` or ``"rm3"``.
        c: Percent of the batch that winsorising pulls in on either side, in [0, 50).
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        seed: Of M3's dealing.

    Raises:
        ValueError: If ``method`` is unknown or ``c`` out of its range; at the start of training if there are several
            optimisers, batches are accumulated, or the module normalises by the batch, which winsorising cannot take
            apart.

    Example:
        >>> trainer = lightning.Trainer(
        ...     callbacks=[SuppressionCallback("rm3")], logger=False, enable_checkpointing=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self, method: Method = "winsorized", c: float = 4.0, loss_fn: LossFunction = CROSS_ENTROPY, seed: int = 0
    ):
        one_of("method", method, get_args(Method))
        self.method, self.c, self.loss_fn, self.seed = method, check_share(c), loss_fn, seed
        self._wrapper: WinsorizedGradients | MedianOfMeans | RunningMedian | None = None
        self._batch: Any = None
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wraps the optimiser."""
        if len(trainer.optimizers) != 1 or trainer.accumulate_grad_batches != 1:
            raise ValueError(
                f"{self.method} needs one optimiser and one batch a step, got {len(trainer.optimizers)} and "
                f"{trainer.accumulate_grad_batches}"
            )
        optimizer = trainer.optimizers[0]
        make: dict[str, Callable[[], WinsorizedGradients | MedianOfMeans | RunningMedian]] = {
            "winsorized": lambda: WinsorizedGradients(optimizer, pl_module, self.loss_fn, self.c),
            "m3": lambda: MedianOfMeans(optimizer, pl_module, self.loss_fn, self.seed),
            "rm3": lambda: RunningMedian(optimizer),
        }
        self._wrapper = make[self.method]()
        if self._loaded is not None:
            self._wrapper.remember(self._loaded)
            self._loaded = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch."""
        self._batch = batch

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Writes the gradient."""
        if isinstance(self._wrapper, RunningMedian):
            self._wrapper.write()
        elif self._wrapper is not None:
            self._wrapper.write(self._batch)

    def state_dict(self) -> dict[str, Any]:
        """What the method remembers; the optimiser is the Trainer's."""
        return {} if self._wrapper is None else self._wrapper.memory()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Taken up when the optimiser is there."""
        self._loaded = state_dict or None
