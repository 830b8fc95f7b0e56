"""FBNet: a distribution over architectures, learned through Gumbel-softmax masks under a latency table.

Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search", CVPR 2019,
arXiv:1812.03443. Choice l takes candidate i with probability P_l,i = softmax(theta_l)_i, relaxed to a mask,

    m_l,i = softmax_i((theta_l,i + g_l,i) / tau),    g = -log(-log U),    U ~ Uniform(0, 1)
    y_l   = sum_i m_l,i o_l,i(x),                    LAT = const + sum_l sum_i m_l,i T_l,i
    min over theta, w of    CE(w, theta) alpha (log LAT)^beta

with tau falling by exp(-0.045) an epoch. In every epoch weights are trained on 80 % of the data, then theta on the
other 20 %. In the end architectures are drawn from P and the best of them is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from netwright.checks import number, whole
from netwright.search.latency import ExpectedLatency
from netwright.search.objective import CostPenalty, Objective, TaskLoss
from netwright.search.phased import Phased
from netwright.search.pricing import ExpectedCost
from netwright.search.protocol import need_gates
from netwright.search.sampling import SampleSelector
from netwright.search.searcher import Searcher
from netwright.search.stages import Stage
from netwright.search.supernet import Choice, Gate

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.genotype import Genotype
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet

WARMUP, SEARCH = "warmup", "search"
# -log U for U in [1e-20, 1 - 1e-7]: keeps the noise finite.
_LEAST, _MOST = 1e-7, -math.log(1e-20)


class GumbelSoftmaxGate(Gate):
    """m = softmax((theta + g) / tau) with fresh Gumbel noise g for every pass; softmax(theta) outside of training.

    The noise of all choices is drawn at once. One draw serves the whole batch, and the expected cost sees the same one.

    Args:
        tau: Temperature, > 0: near 0 a mask is a one-hot sample of P, at infinity it is uniform; may be set anew.
        per_sample: Whether every input of a batch has a draw of its own.
        hard: Whether masks are one-hot in the forward pass; gradients are those of the soft mask.
        skip_below: Candidates whose soft weight is below this (for every input) do not run; outputs and gradients are
            then wrong by no more than so much of theirs. 0 runs all.

    Raises:
        ValueError: If ``tau`` is not positive and finite, or ``skip_below`` is outside [0, 1).

    Example:
        >>> gate, theta = GumbelSoftmaxGate(tau=0.01), torch.zeros(3)
        >>> _ = torch.manual_seed(0)
        >>> mask = gate.weights(theta, True, gate.draw(theta, "weights", 8))
        >>> round(mask.max().item(), 3), gate.weights(theta, training=False)
        (1.0, tensor([0.3333, 0.3333, 0.3333]))
    """

    def __init__(self, tau: float = 5.0, per_sample: bool = False, hard: bool = False, skip_below: float = 0.0):
        number("skip_below", skip_below, "[0, 1)")
        self.tau, self.per_sample, self.hard, self.skip_below = tau, per_sample, hard, skip_below
        self.second_order = not hard

    @property
    def tau(self) -> float:
        """The temperature."""
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        number("tau", value, "> 0")
        self._tau = value

    def draw(self, alpha: Tensor, part: str, batch: int) -> Tensor:
        """Gumbel noise, shape (candidates) or (batch, candidates)."""
        return self.draw_all([alpha], part, batch)[0]

    def draw_all(self, alphas: Sequence[Tensor], part: str, batch: int) -> list[Any]:
        """The noise of several choices, drawn in one piece."""
        size = (batch, max(map(len, alphas))) if self.per_sample else (max(map(len, alphas)),)
        noise = alphas[0].new_empty(len(alphas), *size).exponential_().clamp_(_LEAST, _MOST).log_().neg_()
        return [row[..., : len(alpha)] for row, alpha in zip(noise, alphas, strict=True)]

    def weights(self, alpha: Tensor, training: bool, drawn: Tensor | None = None) -> Tensor:
        """The mask; softmax(theta) before the first draw and outside of training."""
        if not training or drawn is None:
            return alpha.softmax(-1)
        soft = self._soft(alpha, drawn)
        if not self.hard:
            return soft
        sample = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
        return sample - soft.detach() + soft

    def expectation(self, alpha: Tensor, drawn: Tensor | None = None) -> Float[Tensor, " candidates"]:
        """The mask, averaged over the batch if every input has its own; P without a draw."""
        mask = self.weights(alpha, drawn is not None, drawn)
        return mask.mean(0) if mask.ndim == 2 else mask

    def forward(self, choice: Choice, x: Tensor, alpha: Tensor) -> Tensor:
        """The candidates weighted by the mask.

        Raises:
            ValueError: If the noise was drawn for a batch of another size.
        """
        drawn = choice.drawn if choice.training else None
        if drawn is not None and drawn.ndim == 2 and len(drawn) != len(x):
            raise ValueError(f"the batch must be of {len(drawn)} inputs, for which masks were drawn, got {len(x)}")
        running = None
        if drawn is not None and self.skip_below:
            soft = self._soft(alpha.detach(), drawn)
            running = ((soft.amax(0) if soft.ndim == 2 else soft) >= self.skip_below).tolist()
        return choice.mix(x, self.weights(alpha, choice.training, drawn), running)

    def _soft(self, alpha: Tensor, drawn: Tensor) -> Tensor:
        return ((alpha + drawn) / self.tau).softmax(-1)


@dataclass(frozen=True)
class TemperatureSchedule:
    """tau after a number of epochs of the architecture: init exp(-rate epochs).

    Attributes:
        init: Temperature of the first epoch in which theta is trained, > 0.
        rate: Rate, >= 0; the paper's 0.045 is for 80 such epochs.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> [round(TemperatureSchedule()(epoch), 3) for epoch in (0, 1, 80)]
        [5.0, 4.78, 0.137]
    """

    init: float = 5.0
    rate: float = 0.045

    @classmethod
    def within(cls, epochs: int) -> Self:
        """The schedule that is as cold after so many epochs as the paper's after its 80.

        Example:
            >>> round(TemperatureSchedule.within(4)(4), 3)
            0.137
        """
        return cls(rate=0.045 * 80 / epochs)

    def __post_init__(self) -> None:
        number("init", self.init, "> 0")
        number("rate", self.rate, ">= 0")

    def __call__(self, epochs: int) -> float:
        """The temperature."""
        return self.init * math.exp(-self.rate * epochs)


class _Watched:
    """LAT of the masks in the unit of the loss, and what an epoch records of it in the unit of the table."""

    def __init__(self, cost: ExpectedCost):
        self.cost = cost
        self._seen: list[float] = []

    def __call__(self, supernet: Any) -> Tensor:
        latency = self.cost(supernet)
        self._seen.append(float(latency.detach()) * self.cost.unit)
        return latency

    def figures(self, supernet: Supernet, genotype: Genotype) -> dict[str, float]:
        """Latencies under P, of a genotype, and of the masks since the last call."""
        seen, self._seen = self._seen, []
        return {
            **self.cost.figures(supernet, genotype),
            **({"relaxed_latency": sum(seen) / len(seen)} if seen else {}),
        }


class FBNet(Searcher):
    """Searches a distribution over architectures; the defaults are those of the paper.

    The supernet's choices get a :class:`GumbelSoftmaxGate` and its architecture parameters are set to zero, so that all
    candidates are equally probable. Besides the losses an epoch has these figures: ``tau``; ``entropy`` of P, the mean
    over choices in nats, which says how far the search has converged (at a low temperature masks are one-hot even
    where P is uniform); and latencies in the table's unit: ``relaxed_latency`` of the masks, ``expected_latency`` under
    P and ``argmax_latency`` of the most probable architecture.

    Args:
        supernet: The network with the choices.
        latency: Milliseconds of every candidate by its key, as :func:`netwright.search.latency.measure` gives them; an
            entry ``"constant"`` is what no choice changes. Or any other cost (:mod:`netwright.search.pricing`), in
            units of which the loss takes logarithms. None leaves latency out of the loss.
        alpha, beta: Factor and power of the latency term.
        w_split: Share of the training data for the weights in :meth:`Searcher.split`, in (0, 1).
        warmup_epochs: First epochs, in which only weights are trained; below ``epochs``.
        samples: Architectures drawn in the end, see :class:`~netwright.search.sampling.SampleSelector`.
        objective: The CE of the formulas, what latency scales or is added to; cross-entropy by default.
        form: ``"fbnet"`` is the paper's loss CE alpha (log LAT)^beta; ``"add_power"`` the widely copied
            CE + alpha LAT^beta.
        unit: Milliseconds in a unit of LAT in the loss: 1e-3 makes it the paper's microseconds, 1.0 milliseconds. In
            that unit LAT must exceed 1, where its logarithm is zero and (log LAT)^beta infinitely steep.
        epochs: Epochs, warm-up included.
        temperature: tau by epoch of the architecture; it does not fall in the warm-up.
        per_sample, hard, skip_below: Of the gate.
        lr, lr_min: Learning rate of the weights at the start and at the end of a cosine over all epochs.
        weight_decay: Of the weights.
        selector: Another rule that reads off the genotype.
        alpha_lr, alpha_betas, alpha_weight_decay: Adam of theta.
        clip: Largest gradient norm of the weights; None clips nothing.
        momentum: Of the weights' SGD.

    Raises:
        ValueError: If a value is out of range or a latency is negative; in a step, if LAT is not above 1.
        KeyError: In a step, if the table misses an operation.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-chain").supernet(1, 3, seed=0)
        >>> table = dict.fromkeys(supernet.operations((1, 8, 8)), 0.5)
        >>> batch = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> result = FBNet(supernet, table, warmup_epochs=1, epochs=2, samples=2).search([batch], [batch], seed=0)
        >>> [round(epoch["tau"], 2) for epoch in result.epochs], result.genotype.space
        ([5.0, 5.0], 'micro-chain')
    """

    shares = (1 / 9, 8 / 9)

    def __init__(
        self,
        supernet: Supernet,
        latency: Mapping[Any, float] | ExpectedCost | None = None,
        alpha: float = 0.2,
        beta: float = 0.6,
        w_split: float = 0.8,
        warmup_epochs: int = 10,
        samples: int = 6,
        *,
        objective: Objective | None = None,
        form: Literal["fbnet", "add_power"] = "fbnet",
        unit: float = 1e-3,
        epochs: int = 90,
        temperature: TemperatureSchedule | None = None,
        per_sample: bool = False,
        hard: bool = False,
        skip_below: float = 0.0,
        lr: float = 0.1,
        lr_min: float = 0.0,
        weight_decay: float = 1e-4,
        selector: Selector | None = None,
        alpha_lr: float = 0.01,
        alpha_betas: tuple[float, float] = (0.9, 0.999),
        alpha_weight_decay: float = 5e-4,
        clip: float | None = None,
        momentum: float = 0.9,
    ):
        need_gates("FBNet", supernet, "which it makes Gumbel-softmax ones")
        number("w_split", w_split, "(0, 1)")
        whole("epochs", epochs, ">= 1")
        whole("warmup_epochs", warmup_epochs, ">= 0")
        if warmup_epochs >= epochs:
            raise ValueError(f"warmup_epochs must lie in [0, {epochs}), the epochs of the search, got {warmup_epochs}")
        if form not in ("fbnet", "add_power"):
            raise ValueError(f"form must be 'fbnet' or 'add_power', got {form!r}")
        self.temperature = temperature or TemperatureSchedule()
        self.gate = GumbelSoftmaxGate(self.temperature(0), per_sample, hard, skip_below)
        self.latency: _Watched | None = None
        if latency is not None:
            priced = latency if isinstance(latency, ExpectedCost) else ExpectedLatency(latency, unit)
            self.latency = _Watched(priced)
        objective = TaskLoss() if objective is None else objective.complete()
        if self.latency is not None:
            objective += CostPenalty(form, self.latency, alpha=alpha, beta=beta, apply_to="both")
        turn = Stage(SEARCH, epochs, lr, lr_min, weight_decay).lr_at(warmup_epochs / epochs)
        super().__init__(
            supernet,
            objective=objective,
            selector=selector or SampleSelector(samples),
            method=Phased(),
            stages=[
                Stage(WARMUP, warmup_epochs, lr, turn, weight_decay, alpha_step=False),
                Stage(SEARCH, epochs - warmup_epochs, turn, lr_min, weight_decay),
            ],
            momentum=momentum,
            clip=clip,
            alpha_lr=alpha_lr,
            alpha_betas=alpha_betas,
            alpha_weight_decay=alpha_weight_decay,
        )
        self.w_split, self.architecture_share = w_split, round(1 - w_split, 12)
        self._settings = {"form": form, "alpha": alpha, "beta": beta, "unit": unit, "w_split": w_split}
        supernet.set_gate(self.gate)
        with torch.no_grad():
            for theta in supernet.arch_parameters():
                theta.zero_()

    @property
    def tau(self) -> float:
        """The temperature now; it depends on the epochs that theta has had, so a resumed search has the same one."""
        return self.temperature(self._stage_epoch if self.stage.name == SEARCH else 0)

    @classmethod
    def short(cls, supernet: Supernet, brief: Brief) -> Self:
        """As cold in the end, and theta as far from where it began, as after the paper's 80 epochs."""
        warmup, search = brief.epochs
        return cls(
            supernet, brief.limits, warmup_epochs=warmup, epochs=warmup + search,
            temperature=TemperatureSchedule.within(search), lr=brief.lr, alpha_lr=0.1,
            selector=brief.chosen or SampleSelector(limits=brief.limits),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        gate = {name: getattr(self.gate, name) for name in ("per_sample", "hard", "skip_below")}
        return {**super().config(), **self._settings, **gate, "temperature": asdict(self.temperature)}

    def step(
        self,
        train_batch: Any,
        val_batch: Any,
        *,
        optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
    ) -> dict[str, float]:
        """One step of the present phase at the present temperature; see :meth:`Searcher.step`."""
        self.gate.tau = self.tau
        return super().step(train_batch, val_batch, optimizers=optimizers)

    def epoch_figures(self, genotype: Genotype) -> dict[str, float]:
        """Temperature, entropy and latencies; see the class."""
        with torch.no_grad():
            entropies = [torch.special.entr(p).sum() for p in self.supernet.mixing_weights().values()]
        figures = {"tau": self.gate.tau, "entropy": float(torch.stack(entropies).mean())}
        if self.latency is not None:
            figures |= self.latency.figures(self.supernet, genotype)
        return figures
