"""The same training under Lightning's Trainer, and a callback that watches neurons become periodic.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from netwright.diagnose.grokking.arithmetic import ModularArithmetic
from netwright.diagnose.grokking.periodicity import neuron_ipr
from netwright.diagnose.grokking.phases import PHASES, Phase, classify_phase
from netwright.diagnose.grokking.training import ModularConfig, measure, one_hot_mse

LOOK = 1000  # examples whose training takes about as long as the IPR of all neurons
SPARED = 8  # times the examples that a look is worth are trained on before the next


class ModularRegressor(lightning.LightningModule):
    """Trains a network by the mean squared error of its outputs to the one-hot label.

    Args:
        config: Learning rate and weight decay.
        network: Trained in place; ``config.model()`` when None.

    Example:
        >>> from netwright.diagnose.grokking import PairBatches
        >>> from netwright.train import fit
        >>> config = ModularConfig(p=7, width=16, steps=3)
        >>> history = fit(ModularRegressor(config), PairBatches(config.data("train")), epochs=config.steps)
        >>> len(history.column("train_loss"))
        3
    """

    def __init__(self, config: ModularConfig, network: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.network = config.model() if network is None else network

    def forward(self, x: Tensor) -> Tensor:
        """The network's outputs."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = one_hot_mse(self(batch[0]), batch[1])
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(batch[1]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW as the config says."""
        return self.config.optimizer(p for p in self.network.parameters() if p.requires_grad)


class IPRCallback(lightning.Callback):
    """Logs how periodic the hidden neurons are, and the phase of the network.

    ``ipr/mean`` and ``ipr/q10``, ``ipr/q50``, ``ipr/q90``; with data also the accuracies and ``phase``, the place of
    the phase in ``PHASES``.

    Args:
        data: The pairs for the accuracies, with ``split="all"`` and encoded as the module takes them.
        every: Epochs between two looks, >= 1; by default as many as keep looking below 10 % of the training: the first
            epoch is looked at, then each in which training has seen 8 times the examples that a look is worth.
        quantiles: Shares, in [0, 1].
        r: Exponent of the IPR, >= 2.

    Attributes:
        phase: The phase at the last look, once there was one.

    Raises:
        ValueError: If an argument is out of its range, and when training starts if the module does not hold two linear
            layers.

    Example:
        >>> watch = IPRCallback(ModularArithmetic(p=7, split="all"), every=10)
        >>> trainer = lightning.Trainer(callbacks=[watch], logger=False, enable_checkpointing=False, accelerator="cpu")
    """

    def __init__(
        self,
        data: ModularArithmetic | None = None,
        every: int | None = None,
        quantiles: Sequence[float] = (0.1, 0.5, 0.9),
        r: int = 2,
    ):
        if every is not None and every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        if not all(0 <= share <= 1 for share in quantiles):
            raise ValueError(f"quantiles must lie in [0, 1], got {tuple(quantiles)}")
        if not r >= 2:
            raise ValueError(f"r must be >= 2, got {r}")
        self.data, self.every, self.quantiles, self.r = data, every, tuple(quantiles), r
        self.phase: Phase | None = None
        self._cadence, self._examples = every, 0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Refuses a module whose neurons have no IPR before anything is trained."""
        self._ipr(pl_module)
        self._cadence = self.every

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to count the epoch's examples."""
        self._examples = 0

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts the batch's examples."""
        self._examples += len(batch[0])

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Looks at the neurons."""
        if self._cadence is None:
            worth = LOOK + (0 if self.data is None else len(self.data))
            self._cadence = max(1, math.ceil(SPARED * worth / max(1, self._examples)))
        elif (trainer.current_epoch + 1) % self._cadence:
            return
        ipr = self._ipr(pl_module)
        pl_module.log("ipr/mean", ipr.mean())
        if self.quantiles:
            shares = torch.tensor(self.quantiles, dtype=ipr.dtype, device=ipr.device)
            for share, value in zip(self.quantiles, ipr.quantile(shares), strict=True):
                pl_module.log(f"ipr/q{100 * share:02.0f}", value)
        if self.data is not None:
            found = measure(pl_module, self.data)
            self.phase = classify_phase(
                found["train_accuracy"], found["test_accuracy"], found["corrupted_accuracy"]
            )  # fmt: skip
            pl_module.log_dict({**found, "phase": float(PHASES.index(self.phase))})

    def _ipr(self, pl_module: lightning.LightningModule) -> Tensor:
        return neuron_ipr(pl_module, self.r, op="add" if self.data is None else self.data.op)
