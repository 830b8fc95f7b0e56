"""Selection by perturbation: what is worth most is what hurts most when it is taken away (DARTS-PT).

Wang, Cheng, Chen, Tang and Hsieh, "Rethinking Architecture Selection in Differentiable NAS", ICLR 2021,
arXiv:2108.04392.

    strength of operation o on edge e:   ACC(supernet) - ACC(supernet without o on e)

The mixing weights say little about that: of an edge that mixes x and o(x) with uncorrelated errors of variance v_x and
v_o, the weight of o that makes the sum best is v_x / (v_x + v_o), so the better the convolutions, the larger the weight
of the skip connection. Here operations are fixed edge by edge to the strongest, then every node keeps its two strongest
edges; the supernet is trained for a few epochs after each decision.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from netwright.checks import one_of
from netwright.console import task
from netwright.search.pairs import Pairs
from netwright.search.protocol import need_gates
from netwright.search.scoring import Scores, measure, removals, without
from netwright.search.searcher import Searcher
from netwright.search.stages import Stage
from netwright.search.strengths import (
    choices_of,
    discretisation_accuracy,
    edge_strengths,
    incoming,
    op_strengths,
    supernet_accuracy,
)
from netwright.search.supernet import FixedGate
from netwright.seeding import stream

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.objective import Objective
    from netwright.search.supernet import Supernet

__all__ = [
    "Decision",
    "Discretised",
    "PerturbationSelector",
    "discretisation_accuracy",
    "edge_strengths",
    "op_strengths",
    "supernet_accuracy",
]

LR, LR_MIN = 0.025, 0.001  # of DARTS's weights, at the start and at the end


@dataclass(frozen=True)
class Decision:
    """One decision of a selection.

    Attributes:
        key: The edge, or for the topology the edges of a node among which one was given up.
        taken: The operation that was kept, or the edge that was given up.
        accuracies: Accuracy (a share) without each operation that could be taken, or without each edge that was left.
    """

    key: str
    taken: str
    accuracies: dict[str, float]


@dataclass
class Discretised:
    """What a selection leaves.

    Attributes:
        supernet: A copy of the supernet in which every choice is made.
        genotype: The genotype.
        decisions: In the order in which they were made.
        evaluations: Supernets with something taken away that were measured.
    """

    supernet: Supernet
    genotype: Genotype
    decisions: list[Decision] = field(default_factory=list)
    evaluations: int = 0


class PerturbationSelector:
    """The rule of DARTS-PT; works on any supernet, whatever trained it, and leaves it as it was.

    In the tuning, optimiser and learning rate of the weights are new, and the architecture's optimiser goes on as the
    search left it: a :class:`~netwright.search.searcher.Searcher` hands its own over, for a supernet alone it is
    ``a_opt`` or that of DARTS.

    Args:
        criterion: What a removal is judged by: ``"accuracy"``, ties by loss, or ``"loss"``.
        tune_epochs: Epochs of training (weights and, with ``alpha_step``, alphas) from one decision to the next.
        topology: How a node's edges are chosen: ``"greedy"`` gives up the edge that is missed least until two are left
            (the official code), ``"single"`` keeps the two that are missed most (the paper's text).
        order: In which order edges and nodes come: ``"random"`` or ``"fixed"``.
        lr_scale: Learning rate of the tuning over 0.025, that of the published search.
        max_val_batches: Batches that judge a removal; all by default.
        renormalise: Whether the weights that are left sum to one again.
        alpha_step: Whether the tuning trains alphas; False for a supernet whose alphas never were. After a search that
            left them alone (``DARTS(..., fixed_alpha=True)``) they are left alone in any case.
        objective: Loss of the tuning; cross-entropy by default.

    Raises:
        ValueError: If a value is out of range; in :meth:`select` if there are no choices or batches are missing.
        RuntimeError: If ``val`` is empty.
        FloatingPointError: If a loss is not finite.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> genotype = PerturbationSelector(tune_epochs=0).select(supernet, None, [batch])
        >>> len(genotype.normal.ops)
        4
    """

    def __init__(
        self,
        criterion: Literal["accuracy", "loss"] = "accuracy",
        tune_epochs: int = 5,
        topology: Literal["greedy", "single"] = "greedy",
        order: Literal["random", "fixed"] = "random",
        lr_scale: float = 0.1,
        max_val_batches: int | None = None,
        renormalise: bool = False,
        *,
        alpha_step: bool = True,
        objective: Objective | None = None,
    ) -> None:
        for name, value, allowed in (
            ("criterion", criterion, ("accuracy", "loss")),
            ("topology", topology, ("greedy", "single")),
            ("order", order, ("random", "fixed")),
        ):
            one_of(name, value, allowed)
        if tune_epochs < 0:
            raise ValueError(f"tune_epochs must be >= 0, got {tune_epochs}")
        if not lr_scale > 0:
            raise ValueError(f"lr_scale must be > 0, got {lr_scale}")
        if max_val_batches is not None and max_val_batches < 1:
            raise ValueError(f"max_val_batches must be >= 1 or None, got {max_val_batches}")
        self.criterion, self.tune_epochs, self.topology, self.order = criterion, tune_epochs, topology, order
        self.lr_scale, self.max_val_batches, self.renormalise = lr_scale, max_val_batches, renormalise
        self.alpha_step, self.objective = alpha_step, objective

    def select(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        *,
        seed: int = 0,
        a_opt: torch.optim.Optimizer | None = None,
    ) -> Genotype:
        """The genotype; ``train`` tunes, ``val`` judges. Supernet and optimiser stay as they are.

        Args:
            supernet: A trained supernet.
            train, val: Batches ``(inputs, labels)``; ``train`` is not needed without tuning.
            seed: Of the order of the decisions and of the tuning.
            a_opt: Optimiser of the architecture, with which the tuning goes on; that of DARTS by default.
        """
        return self.discretise(supernet, train, val, seed=seed, a_opt=a_opt).genotype

    def select_after(self, searcher: Searcher, train: Iterable[Any] | None, val: Iterable[Any] | None) -> Genotype:
        """The genotype at the end of a search, with whose optimiser of the architecture the tuning goes on."""
        selector = copy.copy(self)
        selector.alpha_step = self.alpha_step and any(stage.alpha_step for stage in searcher.stages)
        return selector.select(searcher.supernet, train, val, seed=searcher.seed or 0, a_opt=searcher.a_opt)

    def discretise(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        *,
        seed: int = 0,
        a_opt: torch.optim.Optimizer | None = None,
    ) -> Discretised:
        """The same, with the tuned supernet in which every choice is made, and how it was made."""
        if val is None:
            raise ValueError("val must be batches (inputs, labels), got None")
        if self.tune_epochs and train is None:
            raise ValueError("train must be batches (inputs, labels) when tune_epochs > 0, got None")
        need_gates("PerturbationSelector", supernet, "which leave one candidate out")
        choices_of(supernet)
        if a_opt is not None:
            _check_optimizer(a_opt, supernet)
        made, a_opt = copy.deepcopy((supernet, a_opt))  # together, so that the copy optimises the copy
        result = Discretised(made, None)  # type: ignore[arg-type]
        steps = self._steps(made, seed)
        tuner = self._tuner(made, train, val, len(steps), seed, a_opt)
        with task("select", total=len(steps)) as bar:
            for number, decisions in enumerate(steps):
                for decide, what in decisions:
                    decide(result, what, val)
                if tuner is not None:
                    tuner.train(self.tune_epochs if number + 1 < len(steps) else 1)
                bar.update(number + 1)
        kept = {}
        for key, choice in made.keyed_choices().items():
            gate = choice.gate
            assert isinstance(gate, FixedGate)
            if gate.index is not None:
                kept[key] = choice.names[gate.index]
        result.genotype = made.space.genotype(kept)
        return result

    def _steps(self, supernet: Supernet, seed: int) -> list[list[tuple[Callable[..., None], Any]]]:
        """What is decided before each tuning: an edge of every cell type, in the end a node of each."""
        nodes = incoming(supernet)
        source = stream(seed, "perturbation", "order")

        def ordered(items: Sequence[Any]) -> list[Any]:
            places = (
                torch.randperm(len(items), generator=source).tolist() if self.order == "random" else range(len(items))
            )
            return [items[place] for place in places]

        groups: dict[str, list[str]] = {}
        for key in supernet.keyed_choices():
            cell = next((cell for (cell, _), keys in nodes.items() if key in keys), "")
            groups.setdefault(cell, []).append(key)
        edges = [[(self._operation, key) for key in ordered(keys)] for keys in groups.values()]
        topology = [
            [
                (self._edges, keys)
                for keys in ordered([keys for (c, _), keys in nodes.items() if c == cell and len(keys) > 2])
            ]
            for cell in groups
        ]
        return [
            [decision for decision in together if decision is not None]
            for phase in (edges, topology)
            for together in itertools.zip_longest(*phase)
        ]

    def _operation(self, result: Discretised, key: str, val: Iterable[Any]) -> None:
        """Fixes an edge to the operation that is missed most; ``none`` is no choice."""
        choice = result.supernet.keyed_choices()[key]
        allowed = [number for number, name in enumerate(choice.names) if name != "none"]
        accuracy, loss = self._judge(result, val, {key: removals(len(choice), allowed)})
        worst = min(range(len(allowed)), key=lambda n: (*self._quality(accuracy, loss, n), n))
        found = {choice.names[number]: float(accuracy[n]) for n, number in enumerate(allowed)}
        result.supernet.set_gate(FixedGate(allowed[worst], len(choice)), key)
        result.decisions.append(Decision(key, choice.names[allowed[worst]], found))

    def _edges(self, result: Discretised, keys: tuple[str, ...], val: Iterable[Any]) -> None:
        """Leaves a node two edges."""
        left, supernet = list(keys), result.supernet
        sizes = {key: len(choice) for key, choice in supernet.keyed_choices().items()}
        while len(left) > 2:
            accuracy, loss = self._judge(result, val, without({key: sizes[key] for key in left}))
            # Missed least: removal leaves the best network; of equals the last edge goes.
            ranked = sorted(range(len(left)), key=lambda n: (*self._quality(accuracy, loss, n), n), reverse=True)
            gone = ranked[:1] if self.topology == "greedy" else ranked[: len(left) - 2]
            found = {key: float(accuracy[n]) for n, key in enumerate(left)}
            for key in [left[n] for n in gone]:
                supernet.set_gate(FixedGate(None, sizes[key]), key)
                result.decisions.append(Decision(", ".join(left), key, found))
            left = [key for n, key in enumerate(left) if n not in gone]

    def _judge(self, result: Discretised, val: Iterable[Any], factors: Mapping[str, Tensor]) -> Scores:
        result.evaluations += len(next(iter(factors.values())))
        return measure(result.supernet, val, factors, max_batches=self.max_val_batches, renormalise=self.renormalise)

    def _quality(self, accuracy: Tensor, loss: Tensor, number: int) -> tuple[float, ...]:
        """Smaller for a worse network."""
        if self.criterion == "loss":
            return (-float(loss[number]),)
        return float(accuracy[number]), -float(loss[number])

    def _tuner(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None,
        val: Iterable[Any],
        steps: int,
        seed: int,
        a_opt: torch.optim.Optimizer | None,
    ) -> _Tuner | None:
        if not self.tune_epochs:
            return None
        lr, epochs = LR * self.lr_scale, self.tune_epochs * (steps - 1) + 1
        stage = Stage("tune", epochs, lr, min(lr, LR_MIN), alpha_step=self.alpha_step)
        searcher = Searcher(supernet, objective=self.objective, stages=[stage])
        searcher.a_opt = a_opt or searcher.a_opt
        return _Tuner(searcher, train, val, seed)


def _check_optimizer(a_opt: torch.optim.Optimizer, supernet: Supernet) -> None:
    """Refuses an optimiser of anything but architecture parameters of the supernet."""
    own = {id(alpha) for alpha in supernet.arch_parameters()}
    held = [id(parameter) for group in a_opt.param_groups for parameter in group["params"]]
    if strange := sum(parameter not in own for parameter in held):
        raise ValueError(f"a_opt must hold architecture parameters of the supernet alone, got {strange} others")


class _Tuner:
    """Steps of a search between decisions, with one cosine over all of them."""

    def __init__(self, searcher: Searcher, train: Any, val: Any, seed: int) -> None:
        self.searcher, self.pairs = searcher, Pairs(train, val, searcher)
        searcher.prepare(seed=seed, steps_per_epoch=len(self.pairs))

    def train(self, epochs: int) -> None:
        """Trains for some epochs; alphas as long as a choice is open."""
        searcher = self.searcher
        if all(isinstance(choice.gate, FixedGate) for _, choice in searcher.supernet.named_choices()):
            searcher.stages = [replace(searcher.stage, alpha_step=False)]
        for _ in range(epochs):
            for train_batch, val_batch in self.pairs:
                searcher.step(train_batch, val_batch)
            searcher.end_epoch()
