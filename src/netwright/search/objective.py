"""What a search minimises: a task loss, and terms that add to it or scale it.

Cost penalties after Cai et al., "ProxylessNAS", ICLR 2019, arXiv:1812.00332 (``mul_log``, ``add_linear``), Wu et al.,
"FBNet", CVPR 2019, arXiv:1812.03443 (``fbnet``) and Stamoulis et al., "Single-Path NAS", 2019, arXiv:1904.02877
(``log``); with E the expected cost of the architecture, L the loss before the penalty and log the natural one:

    fbnet       L alpha (log E)^beta             add_linear  L + alpha (E - ref) / ref
    mul_log     L alpha (log E / log ref)^beta   add_power   L + alpha E^beta
    log         L + alpha log E

Terms are joined with ``+`` and are taken from left to right: each receives the sum of those before it, which a
multiplying penalty scales: ``TaskLoss() + CostPenalty("mul_log", table, ref=20.0)``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import number, one_of
from netwright.search.protocol import need

Part = Literal["weights", "alpha", "both"]
Form = Literal["fbnet", "mul_log", "add_linear", "add_power", "log"]


class _Formula(NamedTuple):
    alpha: float  # the paper's
    beta: float
    least_cost: float  # the cost has to be above
    least_ref: float  # and so has ref, where the formula has one
    scales: bool
    value: Callable[[Tensor, Tensor, float, float, float], Tensor]  # loss, cost, alpha, beta, ref


_NONE = -math.inf
_FORMS: dict[str, _Formula] = {
    "fbnet": _Formula(0.2, 0.6, 1.0, _NONE, True, lambda loss, e, a, b, ref: loss * a * e.log() ** b),
    "mul_log": _Formula(0.2, 0.3, 1.0, 1.0, True, lambda loss, e, a, b, ref: loss * a * (e.log() / math.log(ref)) ** b),
    "add_linear": _Formula(0.1, 1.0, _NONE, 0.0, False, lambda loss, e, a, b, ref: loss + a * (e - ref) / ref),
    "add_power": _Formula(0.2, 0.6, 0.0, _NONE, False, lambda loss, e, a, b, ref: loss + a * e**b),
    "log": _Formula(0.02, 1.0, 0.0, _NONE, False, lambda loss, e, a, b, ref: loss + a * e.log()),
}


@dataclass(frozen=True)
class Evaluation:
    """What a term may look at.

    Attributes:
        supernet: The network.
        batch: ``(inputs, labels, ...)`` as the loader gave it.
        logits: Output for the batch, shape (batch, classes).
        part: ``"weights"`` for the training loss, ``"alpha"`` for the validation loss of the architecture, ``"both"``
            where one loss trains both.
    """

    supernet: nn.Module
    batch: Any
    logits: Tensor
    part: Part

    @property
    def labels(self) -> Tensor:
        """The second entry of the batch."""
        return self.batch[1]

    def concerns(self, apply_to: Part) -> bool:
        """Whether a term that applies to one part, or to both, has a say here; in one loss for both, each has.

        Example:
            >>> import torch
            >>> seen = Evaluation(nn.Identity(), None, torch.zeros(1, 2), part="weights")
            >>> seen.concerns("weights"), seen.concerns("both"), seen.concerns("alpha")
            (True, True, False)
        """
        return "both" in (apply_to, self.part) or apply_to == self.part


class Objective:
    """A sum of terms over one forward pass; a term overrides :meth:`term`.

    An objective with memory (teachers, a schedule) also overrides what it needs of :meth:`on_stage`, :meth:`on_step`
    and :meth:`on_epoch`, and the two ``state_dict`` methods; whatever it keeps must be plain values and tensors.

    Example:
        >>> class Half(Objective):
        ...     def term(self, total, seen):
        ...         return total / 2
        >>> import torch
        >>> network = nn.Linear(2, 2)
        >>> batch = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
        >>> whole, half = TaskLoss()(network, batch), (TaskLoss() + Half())(network, batch)
        >>> bool(torch.isclose(half, whole / 2))
        True
    """

    @property
    def terms(self) -> tuple[Objective, ...]:
        """The terms, in the order in which they are taken."""
        return (self,)

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        return _Sum((*self.terms, *other.terms))

    def complete(self) -> Objective:
        """The sum for which the term stands when it is used alone, to which others can be added; itself, for most."""
        return self

    def __call__(self, supernet: nn.Module, batch: Any, part: Part = "weights") -> Float[Tensor, ""]:
        """The loss of one batch ``(inputs, labels, ...)``: one forward pass, for which gates draw anew, then all terms.

        Raises:
            ValueError: If ``part`` is not one of "weights", "alpha", "both".
        """
        one_of("part", part, get_args(Part))
        if callable(redraw := getattr(supernet, "redraw", None)):
            redraw(part, len(batch[0]))
        seen = Evaluation(supernet, batch, supernet(batch[0]), part)
        total = seen.logits.new_zeros(())
        for term in self.terms:
            total = term.term(total, seen)
        return total

    def priced(self, cost: Callable[[nn.Module], Tensor]) -> Objective:
        """The same objective with a cost in every penalty that has none; itself, where there is no such penalty."""
        return self

    def term(self, total: Float[Tensor, ""], seen: Evaluation) -> Float[Tensor, ""]:
        """The loss after this term, given that of the terms before it."""
        raise NotImplementedError(f"{type(self).__name__} must define term(total, seen)")

    def check(self, supernet: Any) -> None:
        """Refuses, before a search, a supernet that cannot tell what the term will ask; most terms ask nothing.

        Raises:
            ValueError: If it cannot.
        """

    def on_stage(self, supernet: nn.Module) -> None:
        """Called when a stage begins, before its first step: the same parameters may mean another function now."""

    def on_step(self, supernet: nn.Module, progress: float) -> None:
        """Called before every search step with the share of the search that is done, in [0, 1)."""

    def on_epoch(self, supernet: nn.Module) -> None:
        """Called after the last step of every epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Memory as plain values and tensors; most terms have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what :meth:`state_dict` gave."""


class _Sum(Objective):
    def __init__(self, terms: tuple[Objective, ...]):
        self._terms = terms

    @property
    def terms(self) -> tuple[Objective, ...]:
        return self._terms

    def priced(self, cost: Callable[[nn.Module], Tensor]) -> Objective:
        return _Sum(tuple(term.priced(cost) for term in self._terms))

    def on_stage(self, supernet: nn.Module) -> None:
        for term in self._terms:
            term.on_stage(supernet)

    def on_step(self, supernet: nn.Module, progress: float) -> None:
        for term in self._terms:
            term.on_step(supernet, progress)

    def on_epoch(self, supernet: nn.Module) -> None:
        for term in self._terms:
            term.on_epoch(supernet)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): state for i, term in enumerate(self._terms) if (state := term.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, term in enumerate(self._terms):
            term.load_state_dict(state.get(str(i), {}))


class TaskLoss(Objective):
    """Cross-entropy between logits and labels, averaged over the batch, in nats.

    Args:
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1).

    Raises:
        ValueError: If ``label_smoothing`` is outside [0, 1).

    Example:
        >>> import torch
        >>> batch = torch.tensor([[0.0, 0.0]]), torch.tensor([1])
        >>> round(TaskLoss()(nn.Identity(), batch).item(), 4)
        0.6931
    """

    def __init__(self, label_smoothing: float = 0.0):
        number("label_smoothing", label_smoothing, "[0, 1)")
        self.label_smoothing = label_smoothing

    def term(self, total: Tensor, seen: Evaluation) -> Tensor:
        """Adds the cross-entropy of the batch."""
        loss = nn.functional.cross_entropy(seen.logits, seen.labels, label_smoothing=self.label_smoothing)
        return total + loss


class CostPenalty(Objective):
    """Expected cost (latency, multiply-adds, parameters) of the architecture as part of the loss.

    Used alone it stands for ``TaskLoss() + CostPenalty(...)``.

    Args:
        form: One of the five formulas of the module's docstring.
        cost: A table that ``supernet.expected_cost`` takes, or a function of the supernet that gives the expected
            cost, a differentiable scalar, in the unit of ``ref``. None leaves it to a searcher that knows a latency,
            as :class:`~netwright.search.proxyless.ProxylessNAS` does.
        alpha, beta: Factor and power; by default the paper's for that form. The ``alpha`` of ``log`` is the full
            multiplier (the published Single-Path code writes its 20 as 0.020 times 1000).
        ref: Cost to aim at, which ``mul_log`` and ``add_linear`` need.
        apply_to: ``"alpha"`` penalises the architecture's loss alone, ``"weights"`` the training loss alone, ``"both"``
            each. By default ``"both"`` for ``fbnet``, whose loss is one for both, else ``"alpha"``. A loss of part
            ``"both"`` is always penalised.

    Raises:
        ValueError: If the form is unknown, ``ref`` is missing or out of range, ``alpha`` is negative, or (when the loss
            is computed) a cost is not above the bound that its logarithm needs.

    Example:
        >>> import torch
        >>> penalty = CostPenalty("fbnet", lambda supernet: torch.tensor(4.0).exp())
        >>> round(penalty.penalised(torch.tensor(2.0), torch.tensor(4.0).exp()).item(), 5)
        0.91896
    """

    def __init__(
        self,
        form: Form,
        cost: Mapping[Any, float] | Callable[[nn.Module], Tensor] | None = None,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        ref: float | None = None,
        apply_to: Part | None = None,
    ):
        one_of("form", form, _FORMS)
        if apply_to is not None:
            one_of("apply_to", apply_to, get_args(Part))
        formula = _FORMS[form]
        if formula.least_ref > _NONE:
            if ref is None:
                raise ValueError(f"ref must be > {formula.least_ref:g} for {form!r}, got None")
            number("ref", ref, f"> {formula.least_ref:g}")
        self.form, self.cost, self.ref = form, cost, ref
        self.alpha = formula.alpha if alpha is None else alpha
        self.beta = formula.beta if beta is None else beta
        number("alpha", self.alpha, ">= 0")
        number("beta", self.beta, "(-inf, inf)")
        self.apply_to: Part = apply_to or ("both" if form == "fbnet" else "alpha")

    def __add__(self, other: Objective) -> Objective:
        if _FORMS[self.form].scales and isinstance(other, Objective):
            raise ValueError(f"the terms that {self.form!r} scales must stand before it, got it first in the sum")
        return super().__add__(other)

    def __call__(self, supernet: nn.Module, batch: Any, part: Part = "weights") -> Tensor:
        """The loss of one batch, with plain cross-entropy as the task."""
        return self.complete()(supernet, batch, part)

    def complete(self) -> Objective:
        """The penalty after plain cross-entropy."""
        return TaskLoss() + self

    def term(self, total: Tensor, seen: Evaluation) -> Tensor:
        """The loss with the penalty of the supernet's expected cost."""
        if not seen.concerns(self.apply_to):
            return total
        supernet: Any = seen.supernet
        self.check(supernet)
        return self.penalised(total, self.cost(supernet) if callable(self.cost) else supernet.expected_cost(self.cost))

    def check(self, supernet: Any) -> None:
        """Refuses a penalty without a cost, and a table where the supernet prices none."""
        if self.cost is None:
            raise ValueError(
                f"the cost of CostPenalty({self.form!r}) must be a table or a function of the supernet, got None; "
                "ProxylessNAS alone, given a latency beside its objective, fills it in"
            )
        if not callable(self.cost):
            need("a CostPenalty with a table", supernet, "expected_cost")
        elif callable(check := getattr(self.cost, "check", None)):
            check(supernet)

    def priced(self, cost: Callable[[nn.Module], Tensor]) -> CostPenalty:
        """The same penalty of a cost, if it has none."""
        made = copy.copy(self)
        made.cost = cost if self.cost is None else self.cost
        return made

    def penalised(self, loss: Float[Tensor, ""], cost: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The formula itself."""
        formula = _FORMS[self.form]
        value = float(cost.detach())
        if not value > formula.least_cost:
            raise ValueError(f"cost must be > {formula.least_cost:g} for {self.form!r} in its unit, got {value:g}")
        return formula.value(loss, cost, self.alpha, self.beta, self.ref or 0.0)
