"""A search on one level whose architecture has a price: the latency of the network counts after a warm-up.

The training of Stamoulis et al., "Single-Path NAS", ECML-PKDD 2019, arXiv:1904.02877, for any supernet: weights w and
architecture a descend together,

    min over w, a of  CE(w, a) + lam ln R(a) + L2,

by one kind of optimiser, on one set of data, with lam = 0 at first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from netwright.checks import number, whole
from netwright.nn.batchnorm import frozen_statistics
from netwright.search.bilevel import Step, finite
from netwright.search.latency import ExpectedLatency
from netwright.search.objective import CostPenalty, Objective, TaskLoss
from netwright.search.pricing import ExpectedCost, MultiplyAdds
from netwright.search.protocol import weights_of
from netwright.search.searcher import Searcher
from netwright.search.single_level import SingleLevel
from netwright.search.stages import Stage
from netwright.train.rmsprop import RMSpropTF

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet

WARMUP, SEARCH = "warmup", "search"
Optimize = Callable[[Iterable[Any]], torch.optim.Optimizer]


class Watched:
    """A step on the training batch alone, and now and then a look at the loss of the validation batch.

    Nothing learns from the validation batch, and running statistics do not follow it.

    Args:
        inner: The step; single-level by default.
        every: Steps from one look to the next, at least 1.

    Raises:
        ValueError: If ``every`` is below 1, or the step learns from validation batches.

    Example:
        >>> w = nn.Parameter(torch.tensor(1.0))
        >>> def objective(supernet, batch, part):
        ...     return (w - batch) ** 2
        >>> watched, opt = Watched(every=2), torch.optim.SGD([w], lr=0.5)
        >>> first, second = (watched.step(nn.Module(), objective, opt, None, 3.0, 5.0) for _ in range(2))
        >>> first["train_loss"], first["gap"], w.item(), "gap" in second
        (4.0, 0.0, 3.0, False)
    """

    def __init__(self, inner: Step | None = None, every: int = 10) -> None:
        whole("every", every, ">= 1")
        self.inner: Step = inner or SingleLevel()
        if getattr(self.inner, "needs_val", False):
            raise ValueError(
                f"inner must be a step that learns all from the training batch, such as SingleLevel, got "
                f"{type(self.inner).__name__}, which needs a validation batch too"
            )
        self.every = every
        self._seen = 0

    def step(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        a_opt: torch.optim.Optimizer | None,
        train_batch: Any,
        val_batch: Any,
        *,
        clip: float | None = 5.0,
    ) -> dict[str, float]:
        """The inner step and its figures; where it looks, ``val_loss`` after it and ``gap``, that minus the training
        loss before it."""
        figures = self.inner.step(supernet, objective, w_opt, a_opt, train_batch, None, clip=clip)
        if val_batch is not None and self._seen % self.every == 0:
            with torch.no_grad(), frozen_statistics(supernet):
                figures["val_loss"] = finite(float(objective(supernet, val_batch, part="both")), "validation loss")
            figures["gap"] = figures["val_loss"] - figures["train_loss"]
        self._seen += 1
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self._seen = state["seen"]


class PricedSearch(Searcher):
    """Two stages, ``warmup`` and ``search``, of one training; the defaults are Single-Path NAS's, for batches of 1024.

    Both optimisers, of weights and of architecture, are RMSProp in TensorFlow's form
    (:class:`~netwright.train.rmsprop.RMSpropTF`) with one learning rate, multiplied by ``decay`` every ``decay_epochs``
    epochs; weight decay acts on all but batch norms, the architecture too. Nothing learns from the validation batches;
    every tenth step their loss is noted, and ``gap``, by how much it exceeds the training loss.

    Args:
        supernet: The network with the choices.
        latency: Milliseconds by operation (:func:`netwright.search.latency.measure`); an entry ``"constant"`` is what
            no choice changes. Or any other cost (:mod:`netwright.search.pricing`). None leaves it out of the loss.
        lam: lambda, the factor of ln R in the second stage, >= 0.
        warmup: Share of the epochs before latency counts, in [0, 1).
        objective: The CE of the formula; by default cross-entropy.
        epochs: Epochs, warm-up included.
        lr: Learning rate at the start; the paper's 0.064 is for batches of 1024 and proportional to them.
        decay, decay_epochs: Of the learning rate.
        weight_decay: Of weights and architecture, batch norms excepted.
        label_smoothing: Of the cross-entropy, where no ``objective`` is given.
        ema: Decay of the moving average of the supernet's weights, in [0, 1), None for no average; see
            :attr:`averaged`.
        optimizer: Makes both optimisers from groups of parameters; the schedule then sets ``lr`` and ``weight_decay``.
        selector: Another rule that reads off the genotype.
        clip: Largest gradient norm of the weights; None clips nothing.

    Attributes:
        averaged: The averaged supernet is ``averaged.module``; None before the first step. It plays no part in the
            search.

    Raises:
        ValueError: If a value is out of range; in the first step, if a latency does not suit the supernet.
        KeyError: In the first step, if the table misses an operation.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-chain").supernet(1, 3, seed=0)
        >>> table = dict.fromkeys(supernet.operations((1, 8, 8)), 0.5)
        >>> batch = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> result = PricedSearch(supernet, table, epochs=2, warmup=0.5, lr=1e-3).search([batch], [batch], seed=0)
        >>> [epoch["stage"] for epoch in result.epochs], result.genotype.space
        ([0.0, 1.0], 'micro-chain')
    """

    restarts = False  # both stages are one training
    shares = (5 / 8, 3 / 8)

    def __init__(
        self,
        supernet: Supernet,
        latency: Mapping[Any, float] | ExpectedCost | None = None,
        lam: float = 20.0,
        warmup: float = 0.625,
        *,
        objective: Objective | None = None,
        epochs: int = 8,
        lr: float = 0.064,
        decay: float = 0.97,
        decay_epochs: float = 2.4,
        weight_decay: float = 1e-5,
        label_smoothing: float = 0.1,
        ema: float | None = 0.9999,
        optimizer: Optimize = RMSpropTF,
        selector: Selector | None = None,
        clip: float | None = None,
    ):
        number("lam", lam, ">= 0")
        number("warmup", warmup, "[0, 1)")
        number("ema", 0.0 if ema is None else ema, "[0, 1)")
        number("decay", decay, "(0, 1]")
        number("decay_epochs", decay_epochs, "> 0")
        whole("epochs", epochs, ">= 1")
        self.latency: ExpectedCost | None = None
        if latency is not None:
            self.latency = latency if isinstance(latency, ExpectedCost) else ExpectedLatency(latency)
        objective = TaskLoss(label_smoothing) if objective is None else objective.complete()
        self._penalty: CostPenalty | None = None
        if self.latency is not None:
            self._penalty = CostPenalty("log", self.latency, alpha=lam, apply_to="both")
            objective += self._penalty
        before = min(round(warmup * epochs), epochs - 1)
        super().__init__(
            supernet,
            objective=objective,
            selector=selector,
            method=Watched(),
            stages=[
                Stage(WARMUP, before, lr, lr, weight_decay),
                Stage(SEARCH, epochs - before, lr, lr, weight_decay),
            ],
            clip=clip,
        )
        kind = nn.modules.batchnorm._BatchNorm
        norms = {id(p) for module in supernet.modules() if isinstance(module, kind) for p in module.parameters()}
        weights = weights_of(supernet)
        groups = [[p for p in weights if id(p) not in norms], [p for p in weights if id(p) in norms]]
        self.w_opt = optimizer([{"params": group} for group in groups if group])
        self.a_opt = optimizer([{"params": supernet.arch_parameters()}])
        self._normal = norms
        self.lam, self.ema = lam, ema
        self.decay, self.decay_epochs = decay, decay_epochs
        self.averaged: AveragedModel | None = None

    @classmethod
    def short(cls, supernet: Supernet, brief: Brief) -> Self:
        """With a rate for batches of 64 or 128; the price is multiply-adds where there are no limits.

        Half as many multiply-adds are then worth as much as a third of a nat of the loss. Under the published factor,
        which is for networks of twenty layers, a short search removes every layer that may go.
        """
        warmup, search = brief.epochs
        epochs, price = warmup + search, MultiplyAdds() if brief.limits is None else brief.limits
        return cls(
            supernet, price, lam=0.5, warmup=warmup / epochs, epochs=epochs, ema=None,
            lr=0.08 * brief.lr, decay_epochs=0.3 * epochs, selector=brief.selector,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        own = {name: getattr(self, name) for name in ("lam", "decay", "decay_epochs", "ema")}
        return {**super().config(), **own, "optimizer": type(self.w_opt).__name__}

    def schedule(self) -> None:
        """Gives both optimisers learning rate and weight decay; batch norms have none of the latter."""
        epochs = self.epoch + self._step / max(1, self._steps_per_epoch)
        # A little more, so that a step at the very end of 2.4 epochs belongs to the next ones.
        lr = self.stage.lr * self.decay ** math.floor(epochs / self.decay_epochs + 1e-9)
        for group in (*self.w_opt.param_groups, *self.a_opt.param_groups):
            normal = id(group["params"][0]) in self._normal
            group["lr"], group["weight_decay"] = lr, 0.0 if normal else self.stage.weight_decay

    def begin_stage(self, stage: Stage) -> None:
        """Lets latency count after the warm-up."""
        if self._penalty is not None:
            self._penalty.alpha = 0.0 if stage.name == WARMUP else self.lam

    def restore_stage(self, stage: Stage) -> None:
        """The same."""
        self.begin_stage(stage)

    def step(
        self,
        train_batch: Any,
        val_batch: Any,
        *,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
    ) -> dict[str, float]:
        """One step of weights and architecture, and of the moving average; see :meth:`Searcher.step`."""
        figures = super().step(train_batch, val_batch, optimizers=optimizers)
        if self.ema is not None:
            self._average().update_parameters(self.supernet)
        return figures

    def _average(self) -> AveragedModel:
        if self.averaged is None:  # made late, on the device that the supernet is on by now
            average: Any = get_ema_multi_avg_fn(self.ema or 0.0)
            self.averaged = AveragedModel(self.supernet, multi_avg_fn=average, use_buffers=True)
        return self.averaged

    def state_dict(self, *, tensors: bool = True) -> dict[str, Any]:
        """As :meth:`Searcher.state_dict`, with the moving average."""
        average = None if self.averaged is None else dict(self.averaged.state_dict())
        return super().state_dict(tensors=tensors) | {"averaged": copy.deepcopy(average)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As :meth:`Searcher.load_state_dict`."""
        super().load_state_dict(state)
        self.averaged = None
        if state["averaged"] is not None:
            self._average().load_state_dict(state["averaged"])
