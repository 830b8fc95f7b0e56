"""ProxylessNAS: search on the task itself, with the memory of one path and the latency of the device in the loss.

Cai, Zhu and Han, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", ICLR 2019,
arXiv:1812.00332.

    weights:       w <- w - lr grad L_train(w, g),     g ~ p = softmax(alpha), one candidate a choice
    architecture:  alpha by the gradient through the gates (:mod:`netwright.search.binary_gate`) of
                   L_val alpha0 (log E[LAT] / log ref)^beta,   E[LAT] = c + sum_l sum_j p_lj F(o_lj),
                   or by grad J ~ 1/M sum_m (R_m - b) grad log p(g_m),   R = accuracy (ref / LAT)^0.1   (REINFORCE)

The architecture moves once in several steps of the weights (:mod:`netwright.search.alternating`), after a warm-up in
which it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import number, whole
from netwright.nn.batchnorm import frozen_statistics
from netwright.nn.modes import in_mode
from netwright.search.alternating import Alternating
from netwright.search.bilevel import FirstOrder, Gradients, average
from netwright.search.binary_gate import BinaryGate
from netwright.search.latency import ExpectedLatency
from netwright.search.objective import CostPenalty, Evaluation, TaskLoss
from netwright.search.pairs import to_device
from netwright.search.pricing import FULL, ExpectedCost
from netwright.search.protocol import need_gates
from netwright.search.searcher import Searcher
from netwright.search.stages import Stage

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.genotype import Genotype
    from netwright.search.objective import Objective
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet

WARMUP, SEARCH = "warmup", "search"
Cost = Callable[[Any], Tensor]


class GateGradient(FirstOrder):
    """A step of the architecture through binary gates, and one of the weights on one path.

    After the architecture's update each pair of alphas that was drawn gets its joint probability back. The optimiser of
    the architecture must leave alone what has a gradient of zero: Adam with a first beta of 0 and no weight decay.
    """

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
        """As :meth:`FirstOrder.step`."""
        figures: dict[str, float] = {}
        if a_opt is not None:
            need_gates("a gate's gradient", supernet, "through which the architecture learns")
            known = cast("Supernet", supernet)
            before = {key: alpha.detach().clone() for key, alpha in known.arch.items()}
            figures = super().step(supernet, objective, None, a_opt, None, val_batch)
            for key, choice in known.keyed_choices().items():
                if isinstance(choice.gate, BinaryGate):
                    choice.gate.rescale(known.arch[key], before[key], choice.drawn)
        return figures | super().step(supernet, objective, w_opt, None, train_batch, None, clip=clip)

    def _gradient(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        alphas: Sequence[nn.Parameter],
        train_batch: Any,
        val_batch: Any,
    ) -> tuple[Gradients, float]:
        grads, loss = super()._gradient(supernet, objective, w_opt, alphas, train_batch, val_batch)
        known = cast("Supernet", supernet)
        # A gate that leaves out its gradient leaves out that of the cost too, as in the published code.
        silent = {
            id(known.arch[key])
            for key, choice in known.keyed_choices().items()
            if isinstance(choice.gate, BinaryGate) and choice.gate.leaves_out(choice)
        }
        return [
            torch.zeros_like(alpha) if id(alpha) in silent else grad for alpha, grad in zip(alphas, grads, strict=True)
        ], loss


class Reinforce(FirstOrder):
    """A step of the architecture by the rewards of sampled paths, and one of the weights on one path.

    The reward of a path is its accuracy on the validation batch, times (ref / LAT)^power where there is a cost. The
    baseline b starts at the first mean reward and then moves by ``decay`` towards each new one.

    Args:
        samples: Paths M, all measured on one validation batch.
        decay: Share in (0, 1] of the way that the baseline goes to the present mean reward; the published name is
            "decay weight", and 0.99 means that it is nearly that mean.
        cost: The cost of the path that was drawn, a function of the supernet.
        ref: Cost to aim at, in the unit of ``cost``.
        power: Of the cost's part in the reward, >= 0.

    Raises:
        ValueError: If a value is out of range, or there is a cost without ``ref``; in :meth:`step` if a cost is not
            positive or the supernet has no binary gate.
    """

    def __init__(
        self,
        samples: int = 10,
        decay: float = 0.99,
        cost: Cost | None = None,
        ref: float | None = None,
        power: float = 0.1,
    ) -> None:
        whole("samples", samples, ">= 1")
        number("decay", decay, "(0, 1]")
        if cost is not None and ref is None:
            raise ValueError("ref must be > 0 where there is a cost, got None")
        if ref is not None:
            number("ref", ref, "> 0")
        number("power", power, ">= 0")
        self.samples, self.decay, self.ref, self.power = samples, decay, ref, power
        self._cost, self._baseline = cost, cast(float | None, None)

    def reward(self, supernet: Supernet, batch: Any) -> Tensor:
        """The reward of the path that was drawn, a scalar."""
        accuracy = (supernet(batch[0]).argmax(-1) == batch[1]).float().mean()
        if self._cost is None:
            return accuracy
        cost = float(self._cost(supernet).detach())
        if not cost > 0:
            raise ValueError(f"the cost of a path must be > 0, got {cost:g}")
        return accuracy * (cast(float, self.ref) / cost) ** self.power

    def _gradient(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        alphas: Sequence[nn.Parameter],
        train_batch: Any,
        val_batch: Any,
    ) -> tuple[Gradients, float]:
        known = cast("Supernet", supernet)
        need_gates("REINFORCE", supernet, "all or some of them binary")
        choices = {k: c for k, c in known.keyed_choices().items() if isinstance(c.gate, BinaryGate)}
        if not choices:
            raise ValueError("REINFORCE must have a supernet with binary gates, got none")
        rewards, paths = [], []
        with torch.no_grad():
            for _ in range(self.samples):
                known.redraw("weights", len(val_batch[0]))
                paths.append({key: cast(Tensor, choice.drawn)[0] for key, choice in choices.items()})
                rewards.append(self.reward(known, val_batch))
            local = torch.stack(rewards)
            (shared,), _ = average([local], like=[local])  # all processes drew the same paths
            reward = cast(Tensor, shared)
            mean = float(reward.mean())
            self._baseline = mean if self._baseline is None else self._baseline + self.decay * (mean - self._baseline)
            advantage = (reward - self._baseline) / self.samples
            grads: dict[int, Tensor] = {}
            for key in choices:
                alpha = known.arch[key]
                drawn = torch.stack([path[key] for path in paths])
                # The gradient of log p(g) is onehot(g) - p.
                towards = torch.zeros_like(alpha).index_add(0, drawn, advantage.to(alpha))
                grads[id(alpha)] = advantage.sum() * alpha.softmax(-1) - towards
        return [grads.get(id(alpha)) for alpha in alphas], -mean

    def state_dict(self) -> dict[str, Any]:
        """The baseline."""
        return {"baseline": self._baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""
        self._baseline = state["baseline"]


class ProxylessNAS(Searcher):
    """Two stages, ``warmup`` and ``search``; the defaults are those of the paper.

    Every choice of the supernet is given a binary gate. The weights take steps of SGD with Nesterov's momentum on one
    path, the alphas of Adam with betas (0, 0.999) and no decay, which leaves what was not drawn as it is.

    Besides the losses an epoch has these figures: ``argmax_loss`` and ``argmax_accuracy`` of the most probable path on
    the batches of the architecture, with batch norms in training mode whose running statistics stay; and where there is
    a latency ``expected_latency`` under softmax(alpha) and ``argmax_latency`` of that path, in the table's unit.

    Args:
        supernet: The network with the choices.
        objective: Loss of both parts; cross-entropy with a label smoothing of 0.1 by default.
        latency: Milliseconds by operation (:func:`netwright.search.latency.measure`), or a function of the supernet
            that gives the expected cost. For gradients it is what a penalty in the objective that has no cost of its
            own costs, ``TaskLoss() + CostPenalty("mul_log", ref=20.0)``; without one, the objective is multiplied for
            the architecture by it (form ``mul_log`` with ``ref``). For REINFORCE it is part of the reward.
        algo: How the architecture learns: ``"grad"`` through the gates, or ``"reinforce"``.
        arch_every: Steps of the weights to one of the architecture.
        arch_updates: Updates of the architecture in an epoch instead, evenly spread over its steps, of which there must
            be as many: the paper's REINFORCE makes 300.
        warmup_epochs: Epochs in which the weights alone are trained, on paths drawn nearly uniformly.
        ref: Latency to aim at, in the unit of ``latency``; above 1 for ``"grad"``, whose penalty takes logarithms. A
            penalty of the objective has its own.
        gate: The gate; by default ``BinaryGate("two")``, or those that the supernet has if all are binary.
        selector: How the genotype is read off at the end; the space's own rule by default.
        epochs: Epochs of the search after the warm-up.
        settle_epochs: How many of these pass before the architecture moves.
        lr, warmup_lr: Learning rate of the weights at the start of the search and of the warm-up; a cosine brings each
            to 0.
        weight_decay: Weight decay of the weights.
        samples: Paths that REINFORCE compares.
        momentum, clip, alpha_lr: As for :class:`Searcher`.

    Raises:
        ValueError: If a value is out of range, ``latency`` comes without a ``ref`` that it needs or beside a penalty
            that has a cost, or a choice has fewer than two candidates in mode ``"two"``; in the first :meth:`step` if
            the expected latency is not above 1 where a logarithm is taken of it.
        KeyError: In the first :meth:`step`, if the table misses an operation.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-chain").supernet(1, 3, seed=0)
        >>> batch = torch.rand(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> search = ProxylessNAS(supernet, warmup_epochs=1, epochs=1, settle_epochs=0, arch_every=1)
        >>> result = search.search([batch], [batch], seed=0)
        >>> len(result.genotype.decisions), supernet.keyed_choices()["layer_0"].gate.mode
        (6, 'two')
    """

    shares = (1 / 4, 3 / 4)

    def __init__(
        self,
        supernet: Supernet,
        objective: Objective | None = None,
        latency: Mapping[Any, float] | Cost | None = None,
        algo: Literal["grad", "reinforce"] = "grad",
        arch_every: int = 5,
        warmup_epochs: int = 40,
        *,
        ref: float | None = None,
        gate: BinaryGate | None = None,
        selector: Selector | None = None,
        epochs: int = 120,
        settle_epochs: int = 1,
        lr: float = 0.025,
        warmup_lr: float = 0.05,
        weight_decay: float = 4e-5,
        samples: int = 10,
        momentum: float = 0.9,
        clip: float | None = None,
        alpha_lr: float = 1e-3,
        arch_updates: int | None = None,
    ):
        if arch_updates is not None:
            whole("arch_updates", arch_updates, ">= 1")
        if algo not in ("grad", "reinforce"):
            raise ValueError(f"algo must be 'grad' or 'reinforce', got {algo!r}")
        need_gates("ProxylessNAS", supernet, "which it makes binary")
        whole("epochs", epochs, ">= 1")
        whole("settle_epochs", settle_epochs, ">= 0")
        whole("warmup_epochs", warmup_epochs, ">= 0")
        whole("arch_every", arch_every, ">= 1")
        if settle_epochs >= epochs:
            raise ValueError(f"settle_epochs must lie in [0, {epochs}), the epochs of the search, got {settle_epochs}")
        cost: Cost | None = latency if callable(latency) or latency is None else ExpectedLatency(latency)
        objective = TaskLoss(label_smoothing=0.1) if objective is None else objective
        if cost is not None and algo == "grad":
            objective = _with_cost(objective, cost, ref)
        elif cost is not None and ref is None:
            raise ValueError("ref must be given with latency, got None")
        inner = GateGradient() if algo == "grad" else Reinforce(samples, cost=cost, ref=ref)
        super().__init__(
            supernet,
            objective=objective,
            selector=selector,
            method=Alternating(inner, arch_every),
            stages=[
                Stage(WARMUP, warmup_epochs, warmup_lr, 0.0, weight_decay, alpha_step=False),
                Stage(SEARCH, epochs, lr, 0.0, weight_decay),
            ],
            momentum=momentum,
            clip=clip,
            alpha_lr=alpha_lr,
            alpha_betas=(0.0, 0.999),
            alpha_weight_decay=0.0,
        )
        for group in self.w_opt.param_groups:
            group["nesterov"] = momentum > 0
        choices = supernet.keyed_choices()
        if gate is not None or not all(isinstance(choice.gate, BinaryGate) for choice in choices.values()):
            supernet.set_gate(gate or BinaryGate())
        for key, choice in choices.items():
            if cast(BinaryGate, choice.gate).mode == "two" and len(choice) < 2:
                raise ValueError(f"choice {key!r} must have at least 2 candidates in mode 'two', got {len(choice)}")
        self.algo, self.settle_epochs, self.arch_updates = algo, settle_epochs, arch_updates
        self._latency = cost
        self._reward_cost, self._priced = cost if algo == "reinforce" else None, False

    @classmethod
    def short(cls, supernet: Supernet, brief: Brief) -> Self:
        """No pause between warm-up and search."""
        warmup, search = brief.epochs
        return cls(
            supernet, latency=brief.limits, ref=None if brief.limits is None else FULL, selector=brief.selector,
            warmup_epochs=warmup, epochs=search, settle_epochs=0,
            lr=brief.lr, warmup_lr=brief.lr, alpha_lr=brief.alpha_lr,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        gates = {cast(BinaryGate, choice.gate) for choice in self.supernet.keyed_choices().values()}
        return {
            **super().config(),
            "algo": self.algo,
            "settle_epochs": self.settle_epochs,
            "arch_updates": self.arch_updates,
            "gate": sorted({gate.mode for gate in gates}),
            "skip_zero_grad": any(gate.skip_zero_grad for gate in gates),
        }

    def begin_stage(self, stage: Stage) -> None:
        """Lets the architecture wait at the beginning of the search, and spreads its updates over an epoch."""
        steps, alternating = self._steps_per_epoch, cast(Alternating, self.method)
        if self.arch_updates is not None:
            if self.arch_updates > steps:
                raise ValueError(f"arch_updates must be <= {steps}, the steps of an epoch, got {self.arch_updates}")
            alternating.every, alternating.times = steps, self.arch_updates
        if stage.name == SEARCH:
            alternating.wait = self.settle_epochs * steps

    def step(
        self,
        train_batch: Any,
        val_batch: Any,
        *,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
    ) -> dict[str, float]:
        """As :meth:`Searcher.step`; before the first one the costs are computed once, so that a gap in a table is told
        before the warm-up and not after it.
        """
        if not self._priced:
            self._price(train_batch)
        return super().step(train_batch, val_batch, optimizers=optimizers)

    @torch.no_grad()
    def _price(self, batch: Any) -> None:
        self.supernet.input_shape = tuple(batch[0].shape[1:])
        one = torch.ones(())
        for term in self.objective.terms:
            if isinstance(term, CostPenalty):
                term.term(one, Evaluation(self.supernet, batch, one, "both"))
        if self._reward_cost is not None:
            self._reward_cost(self.supernet)
        self._priced = True

    def epoch_figures(self, genotype: Genotype) -> dict[str, float]:
        """Latencies; see the class."""
        known = isinstance(self._latency, ExpectedCost) and self.supernet.input_shape is not None
        return cast(ExpectedCost, self._latency).figures(self.supernet, genotype) if known else {}

    @torch.no_grad()
    def validate(self, validation: Any) -> dict[str, float]:
        """Loss and accuracy of the most probable path; see the class."""
        choices = [choice for _, choice in self.supernet.named_choices()]
        drawn = [choice.drawn for choice in choices]
        device, sums = next(self.supernet.parameters()).device, torch.zeros(3, dtype=torch.float64)
        try:
            for choice in choices:
                choice.drawn = self.supernet.arch[choice.key].argmax(keepdim=True)
            with in_mode(self.supernet, training=True), frozen_statistics(self.supernet):
                for batch in validation:
                    x, labels = to_device(batch, device)[:2]
                    logits = self.supernet(x)
                    loss = functional.cross_entropy(logits, labels, reduction="sum")
                    sums += torch.tensor([float(loss), float((logits.argmax(-1) == labels).sum()), len(labels)])
        finally:
            for choice, before in zip(choices, drawn, strict=True):
                choice.drawn = before
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        loss, right, seen = sums.tolist()
        return {"argmax_loss": loss / seen, "argmax_accuracy": right / seen} if seen else {}


def _with_cost(objective: Objective, cost: Cost, ref: float | None) -> Objective:
    """The objective with a cost in each of its penalties; with one of the paper's form where it has none."""
    penalties = [term for term in objective.terms if isinstance(term, CostPenalty)]
    if any(term.cost is not None for term in penalties):
        raise ValueError(
            "latency must be None where a penalty of the objective has a cost, got both; leave one of them out: "
            f"CostPenalty({penalties[0].form!r}, ref=...) takes the latency of the searcher"
        )
    if not penalties:
        if ref is None:
            raise ValueError("ref must be given with latency, got None")
        return objective.complete() + CostPenalty("mul_log", cost, ref=ref)
    if ref is not None:
        raise ValueError(f"ref must be None where the penalty of the objective has one, got {ref}")
    return objective.priced(cost)
