"""Training on modular arithmetic in a plain loop, with the settings of each of the paper's phases.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061. Mean squared error to the one-hot label under AdamW, whose decay is
decoupled: a weight loses the share lr lambda a step, so that lambda = 15 is usual here.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.diagnose.grokking.arithmetic import Corrupt, ModularArithmetic, Op, PairBatches, Split
from netwright.diagnose.grokking.network import Norm, QuadraticMLP
from netwright.diagnose.grokking.phases import SHOWN, Phase, accuracies, classify_phase, draw_accuracies
from netwright.nn.modes import in_mode
from netwright.results import History
from netwright.seeding import seeded, stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class ModularConfig:
    """Everything that a training run depends on.

    Attributes:
        p: The modulus.
        width: Neurons N.
        op: ``"add"`` or ``"mul"``.
        train_frac: Share alpha of the pairs that is for training.
        corruption: Share xi of the training labels that is replaced.
        corrupt: How labels are replaced.
        weight_decay: Lambda of AdamW, >= 0.
        dropout: Rate before the activation.
        norm: ``"bn"``, ``"ln"`` or None.
        steps: Updates, >= 1.
        batch_size: Examples an update; None takes all.
        lr: Learning rate, > 0; the authors use 0.01 sqrt(batch_size / 256) for batches below 256.
        seed: Of data, weights, dropout and the order of batches.

    Raises:
        ValueError: If ``steps``, ``lr`` or ``weight_decay`` is out of its range; the others are checked where they are
            used.

    Example:
        >>> config = ModularConfig(p=11, width=32, corruption=0.2)
        >>> config.data("test"), config.model().U.shape
        (ModularArithmetic(p=11, add, test: 61 pairs, 0 corrupted), torch.Size([32, 11]))
    """

    p: int = 97
    width: int = 500
    op: Op = "add"
    train_frac: float = 0.5
    corruption: float = 0.0
    corrupt: Corrupt = "derangement"
    weight_decay: float = 0.0
    dropout: float = 0.0
    norm: Norm | None = None
    steps: int = 1000
    batch_size: int | None = None
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be > 0 and finite, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be >= 0 and finite, got {self.weight_decay}")

    def data(self, split: Split = "all") -> ModularArithmetic:
        """The pairs, as numbers."""
        return ModularArithmetic(
            self.p, self.op, self.train_frac, self.corruption, self.seed, self.corrupt, split=split
        )  # fmt: skip

    def model(self) -> QuadraticMLP:
        """The network with its first weights."""
        return QuadraticMLP(self.p, self.width, self.dropout, self.norm, stream(self.seed, "init"))

    def optimizer(self, params: Iterable[nn.Parameter]) -> torch.optim.AdamW:
        """The paper's AdamW."""
        return torch.optim.AdamW(params, lr=self.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=self.weight_decay)


def _batched(size: int, norm: Norm | None = None) -> ModularConfig:
    """A setting with small batches: the authors' learning rate, and as many examples as 2,000 batches of 256."""
    lr, steps = 1e-2 * math.sqrt(size / 256), 2000 * 256 // size
    return ModularConfig(train_frac=0.65, corruption=0.2, batch_size=size, lr=lr, steps=steps, norm=norm)


SETTINGS: dict[str, ModularConfig] = {
    "grokking": ModularConfig(weight_decay=5, steps=100),
    "coexistence": ModularConfig(corruption=0.35),
    "partial inversion": ModularConfig(corruption=0.35, weight_decay=5, steps=500),
    "full inversion": ModularConfig(corruption=0.35, weight_decay=15, steps=500),
    "forgetting": ModularConfig(corruption=0.35, weight_decay=20, steps=5000),
    "batch norm": _batched(64, norm="bn"),
    "mini-batch": _batched(8),
}
"""The paper's settings with p = 97, by the phase they end in or by what regularises them."""


@dataclasses.dataclass(frozen=True)
class ModularHistory(History):
    """The record of a run: ``step``, ``train_loss`` and the accuracies of each group at the steps that were looked at.

    Example:
        >>> history = train_modular(ModularConfig(p=7, width=16, steps=20), log_every=5)
        >>> history.column("step"), history.phase
        ([5.0, 10.0, 15.0, 20.0], 'confusion')
    """

    @property
    def phase(self) -> Phase:
        """The phase at the end."""
        last = self.last
        return classify_phase(last["train_accuracy"], last["test_accuracy"], last["corrupted_accuracy"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Accuracy on training, test and corrupted pairs over the steps."""
        accuracy = {name: self.column(f"{name}_accuracy") for name in SHOWN}
        return draw_accuracies(self.column("step"), accuracy, "step", ax)


def one_hot_mse(output: Float[Tensor, "examples classes"], target: Int[Tensor, " examples"]) -> Float[Tensor, ""]:
    """Mean squared error to the one-hot target over all entries, without making the target.

    Raises:
        ValueError: If there is not one label for each row.

    Example:
        >>> one_hot_mse(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1]))
        tensor(0.1250)
    """
    if target.shape != output.shape[:1]:
        raise ValueError(f"target must be {len(output)} labels, got shape {tuple(target.shape)}")
    ones = output.new_full((1, 1), -1.0).expand(len(target), 1)
    return output.scatter_add(1, target[:, None], ones).square().mean()


def train_modular(config: ModularConfig, model: nn.Module | None = None, *, log_every: int = 10) -> ModularHistory:
    """Trains a network as ``fit`` trains a :class:`ModularRegressor`, step for step, without what surrounds a Trainer.

    Args:
        config: The run.
        model: Trained in place; ``config.model()`` when None. Any module that takes pairs of numbers will do.
        log_every: Steps between two looks at all pairs, >= 1; the last step is looked at in any case.

    Raises:
        ValueError: If ``log_every`` is below 1, or a field of ``config`` is out of its range.
        FloatingPointError: When the loss is no longer finite.

    Example:
        >>> config = ModularConfig(p=11, width=64, train_frac=0.8, weight_decay=5, steps=200)
        >>> train_modular(config).phase
        'generalization'
    """
    if log_every < 1:
        raise ValueError(f"log_every must be >= 1, got {log_every}")
    net = config.model() if model is None else model
    everything = config.data()
    batches = PairBatches(config.data("train"), config.batch_size, config.seed)
    optimizer = config.optimizer(p for p in net.parameters() if p.requires_grad)
    record: list[dict[str, float]] = []
    start, step = time.monotonic(), 0
    with in_mode(net, training=True):
        for epoch in range(math.ceil(config.steps / len(batches))):
            batches.set_epoch(epoch)
            with seeded(config.seed, "noise", epoch, 0):  # the stream of dropout in `fit`
                for inputs, targets in itertools.islice(batches, config.steps - step):
                    optimizer.zero_grad()
                    loss = one_hot_mse(net(inputs), targets)
                    loss.backward()
                    optimizer.step()
                    step += 1
                    if step % log_every == 0 or step == config.steps:
                        seen = {"step": float(step), "train_loss": _finite(loss, step)}
                        record.append(seen | measure(net, everything))
    return ModularHistory(tuple(record), time.monotonic() - start)


def _finite(loss: Tensor, step: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss became {value} at step {step}; a smaller learning rate is the usual cure")
    return value


def measure(model: nn.Module, data: ModularArithmetic) -> dict[str, float]:
    """The accuracy of each group, named ``train_accuracy`` and so on; in evaluation mode meanwhile.

    Example:
        >>> found = measure(QuadraticMLP.analytic(11, 400, stream(0, "phases")), ModularArithmetic(p=11, split="all"))
        >>> found["train_accuracy"], found["test_accuracy"]
        (1.0, 1.0)
    """
    with in_mode(model, training=False), torch.inference_mode():
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        predicted = torch.cat([model(part.to(device)).argmax(1).cpu() for part in data.inputs.split(4096)])
    return {f"{name}_accuracy": float(value) for name, value in accuracies(predicted, data).items()}
