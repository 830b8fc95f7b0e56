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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from netwright.console import nearest, task
from netwright.nn.batchnorm import frozen_statistics
from netwright.nn.modes import in_mode
from netwright.search.pairs import Pairs, to_device
from netwright.search.protocol import need_gates
from netwright.search.searcher import Searcher
from netwright.search.spaces import edge_key
from netwright.search.stages import Stage
from netwright.search.supernet import Choice, FixedGate, Gate
from netwright.seeding import seeded, stream

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.objective import Objective
    from netwright.search.supernet import Supernet

Edge = str | tuple[int, int]
LR, LR_MIN = 0.025, 0.001  # of DARTS's weights, at the start and at the end


@runtime_checkable
class Resumable(Protocol):
    """A supernet that can share what does not depend on some choices."""

    def prefix(self, x: Tensor, keys: Collection[str]) -> Any:
        """The state before the first choice of one of these keys."""
        ...

    def resume(self, state: Any) -> Tensor:
        """The logits from there on."""
        ...


@dataclass(frozen=True)
class Decision:
    """One decision of a selection.

    Attributes:
        key: The edge, or for the topology the edges of a node among which one was given up.
        taken: The operation that was kept, or the edge that was given up.
        strengths: Lost accuracy (a share, in [-1, 1]) by what was taken away.
    """

    key: str
    taken: str
    strengths: dict[str, float]


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


class _Scaled(Gate):
    """The weights that another gate expects, times factors; what has no weight does not run."""

    def __init__(self, inner: Gate, factors: Tensor, renormalise: bool = False) -> None:
        self.inner, self.factors, self.renormalise = inner, factors, renormalise
        kept = inner.mask or (True,) * len(factors)
        self.mask = tuple(runs and bool(factor) for runs, factor in zip(kept, factors.tolist(), strict=True))

    def weights(self, alpha: Tensor, training: bool, drawn: Tensor | None = None) -> Tensor:
        scaled = self.inner.expectation(alpha) * self.factors
        return (
            scaled / scaled.sum(-1, keepdim=True).clamp_min(torch.finfo(scaled.dtype).tiny)
            if self.renormalise
            else scaled
        )


def _measure(
    supernet: Supernet,
    validation: Iterable[Any] | None,
    variants: Mapping[str, Float[Tensor, "variants candidates"]],
    *,
    max_batches: int | None = None,
    renormalise: bool = False,
) -> tuple[Float[Tensor, " variants"], Float[Tensor, " variants"]]:
    """Accuracy (a share) and loss (nats) of the supernet with the mixing weights of some keys scaled in several ways.

    All variants see the same batches, in training mode: batch norms use the batch and change nothing. A gate that draws
    mixes by what it expects. What lies before the first scaled choice is computed once where the supernet has
    ``prefix`` and ``resume``.
    """
    if validation is None:
        raise ValueError("validation must be batches (inputs, labels), got None")
    before = {choice: choice.gate for _, choice in supernet.named_choices()}
    chosen = [choice for choice in before if choice.key in variants]
    device = next(supernet.parameters()).device
    number = len(next(iter(variants.values()))) if variants else 1
    right = torch.zeros(number, dtype=torch.float64)
    loss = torch.zeros(number, dtype=torch.float64)
    seen = 0

    rest = {c: _Scaled(gate, torch.ones(len(c), device=device)) for c, gate in before.items()}
    scales = {key: factors.to(device) for key, factors in variants.items()}
    gates = [{c: _Scaled(before[c], scales[c.key][row], renormalise) for c in chosen} for row in range(number)]
    shared: Any = supernet if isinstance(supernet, Resumable) else None
    with ExitStack() as stack:
        stack.callback(_set_gates, before)
        stack.enter_context(in_mode(supernet, training=True))
        stack.enter_context(frozen_statistics(supernet))
        stack.enter_context(torch.no_grad())
        _set_gates(rest)
        for place, batch in enumerate(itertools.islice(validation, max_batches)):
            x, labels = to_device(batch, device)[:2]
            with seeded(0, "perturbation", place):
                state = x if shared is None else shared.prefix(x, variants)
            for variant, chosen_gates in enumerate(gates):
                _set_gates(chosen_gates)
                with seeded(0, "perturbation", place, "rest"):  # the same draws for all
                    logits = supernet(state) if shared is None else shared.resume(state)
                right[variant] += int((logits.argmax(-1) == labels).sum())
                loss[variant] += float(functional.cross_entropy(logits, labels, reduction="sum"))
            seen += len(labels)
    if not seen:
        raise RuntimeError("validation must hold at least 1 batch, got 0")
    if not loss.isfinite().all():
        raise FloatingPointError(f"the loss must be finite, got {(loss / seen).tolist()}")
    return right / seen, loss / seen


def _set_gates(gates: Mapping[Choice, Gate]) -> None:
    for choice, gate in gates.items():
        choice.gate = gate


def _key(supernet: Supernet, edge: Edge, cell: str | None) -> str:
    """The key of an edge, given as such or as (predecessor, state) of a cell."""
    key = edge if isinstance(edge, str) else edge_key(cell or supernet.space.cell_types[0], *edge)
    choices = supernet.keyed_choices()
    if not choices:
        raise ValueError("supernet must have choices, got none")
    if key not in choices:
        raise ValueError(f"edge must be one of {', '.join(choices)}, got {key!r}; {nearest(key, tuple(choices))}")
    return key


def _open_choice(supernet: Supernet, edge: Edge, cell: str | None) -> tuple[str, Choice]:
    key = _key(supernet, edge, cell)
    choice = supernet.keyed_choices()[key]
    if isinstance(choice.gate, FixedGate):
        raise ValueError(f"edge must be open, got {key!r}, which is fixed already")
    return key, choice


def op_strengths(
    supernet: Supernet,
    val: Iterable[Any],
    edge: Edge,
    cell: str | None = None,
    *,
    max_val_batches: int | None = None,
    renormalise: bool = False,
) -> Float[Tensor, " candidates"]:
    """How much accuracy is lost without each candidate of an edge: acc_full - acc_without, in [-1, 1].

    Weights, alphas and buffers stay as they are.

    Args:
        supernet: A trained supernet.
        val: Batches ``(inputs, labels)``; all candidates are measured on the same ones.
        edge: A key of ``supernet.arch``, or (predecessor, state) of a cell.
        cell: The cell type of a pair; the space's first by default.
        max_val_batches: Batches to use; all by default.
        renormalise: Whether the other weights then sum to one again; the paper leaves them as they are.

    Raises:
        ValueError: If the edge is unknown or fixed already.
        RuntimeError: If there is no batch.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> op_strengths(supernet, [batch], (0, 2))[0].item()     # nothing is lost without `none`
        0.0
    """
    key, choice = _open_choice(supernet, edge, cell)
    factors = _removals(len(choice), range(len(choice)))
    accuracy, _ = _measure(supernet, val, {key: factors}, max_batches=max_val_batches, renormalise=renormalise)
    return accuracy[0] - accuracy[1:]


def edge_strengths(
    supernet: Supernet,
    val: Iterable[Any],
    node: int,
    cell: str | None = None,
    *,
    max_val_batches: int | None = None,
) -> Float[Tensor, " edges"]:
    """How much accuracy is lost without each edge into a node, by predecessor: acc_full - acc_without.

    Args:
        supernet: A trained supernet of a cell space.
        val: Batches ``(inputs, labels)``.
        node: Number of the intermediate node, from 0.
        cell: The cell type; the space's first by default.
        max_val_batches: Batches to use; all by default.

    Raises:
        ValueError: If there is no such node.
        RuntimeError: If there is no batch.
    """
    keys = [_key(supernet, (predecessor, node + 2), cell) for predecessor in range(node + 2)]
    accuracy, _ = _measure(supernet, val, _without(supernet, keys), max_batches=max_val_batches)
    return accuracy[0] - accuracy[1:]


def discretisation_accuracy(
    supernet: Supernet,
    val: Iterable[Any],
    edge: Edge,
    op: str,
    *,
    cell: str | None = None,
    max_val_batches: int | None = None,
) -> float:
    """Accuracy right after an edge is fixed to one operation, without tuning: what the paper holds alphas against.

    Raises:
        ValueError: If the edge is unknown or fixed already, or ``op`` is none of its candidates.
        RuntimeError: If there is no batch.
    """
    key, choice = _open_choice(supernet, edge, cell)
    if op not in choice.names:
        raise ValueError(f"op must be one of {', '.join(choice.names)}, got {op!r}; {nearest(op, choice.names)}")
    fixed = [each for _, each in supernet.named_choices() if each.key == key]
    before = {each: each.gate for each in fixed}
    try:
        supernet.set_gate(FixedGate(choice.names.index(op), len(choice)), key)
        return supernet_accuracy(supernet, val, max_val_batches=max_val_batches)
    finally:
        _set_gates(before)


def supernet_accuracy(supernet: Supernet, val: Iterable[Any], *, max_val_batches: int | None = None) -> float:
    """Accuracy of a supernet as it is, measured as removals are: in training mode, and nothing is changed.

    Raises:
        ValueError: If ``val`` is missing.
        RuntimeError: If there is no batch.
    """
    accuracy, _ = _measure(supernet, val, {}, max_batches=max_val_batches)
    return accuracy.item()


def _removals(candidates: int, gone: Sequence[int]) -> Tensor:
    """Factors of one edge: with all candidates, then without each of ``gone``."""
    return torch.cat([torch.ones(1, candidates), 1 - torch.eye(candidates)[list(gone)]])


def _without(supernet: Supernet, keys: Sequence[str]) -> dict[str, Tensor]:
    """Factors of several edges: with all of them, then without each."""
    choices = supernet.keyed_choices()
    found = {}
    for number, key in enumerate(keys, start=1):
        found[key] = torch.ones(1 + len(keys), len(choices[key]))
        found[key][number] = 0.0
    return found


class PerturbationSelector:
    """The rule of DARTS-PT; works on any supernet, whatever trained it, and leaves it as it was.

    Args:
        criterion: What a removal is judged by: ``"accuracy"``, ties by loss, or ``"loss"``.
        tune_epochs: Epochs of training (weights and, with ``alpha_step``, alphas) from one decision to the next.
        topology: How a node's edges are chosen: ``"greedy"`` gives up the edge that is missed least until two are left
            (the official code), ``"single"`` keeps the two that are missed most (the paper's text).
        order: In which order edges and nodes come: ``"random"`` or ``"fixed"``.
        lr_scale: Learning rate of the tuning over that of the search, 0.025.
        max_val_batches: Batches that judge a removal; all by default.
        renormalise: Whether the weights that are left sum to one again.
        alpha_step: Whether the tuning trains alphas; False for a supernet whose alphas never were.
        objective: Loss of the tuning; cross-entropy by default.

    Raises:
        ValueError: If a value is out of range; in :meth:`select` if there are no choices or batches are missing.
        RuntimeError: If ``validation`` is empty.
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
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
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
        validation: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Genotype:
        """The genotype; ``train`` tunes, ``validation`` judges. The supernet stays as it is."""
        return self.discretise(supernet, train, validation, seed=seed).genotype

    def discretise(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Discretised:
        """The same, with the tuned supernet in which every choice is made, and how it was made."""
        if validation is None:
            raise ValueError("validation must be batches (inputs, labels), got None")
        if self.tune_epochs and train is None:
            raise ValueError("train must be batches (inputs, labels) when tune_epochs > 0, got None")
        need_gates("PerturbationSelector", supernet, "which leave one candidate out")
        made = copy.deepcopy(supernet)
        if not made.keyed_choices():
            raise ValueError("supernet must have choices, got none")
        result = Discretised(made, None)  # type: ignore[arg-type]
        steps = self._steps(made, seed)
        tuner = self._tuner(made, train, validation, len(steps), seed)
        with task("select", total=len(steps)) as bar:
            for number, decisions in enumerate(steps):
                for decide, what in decisions:
                    decide(result, what, validation)
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
        nodes = supernet.space.incoming() if hasattr(supernet.space, "incoming") else {}
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

    def _operation(self, result: Discretised, key: str, validation: Iterable[Any]) -> None:
        """Fixes an edge to the operation that is missed most; ``none`` is no choice."""
        choice = result.supernet.keyed_choices()[key]
        allowed = [number for number, name in enumerate(choice.names) if name != "none"]
        factors = _removals(len(choice), allowed)
        accuracy, loss = self._judge(result, validation, {key: factors})
        worst = min(range(1, len(allowed) + 1), key=lambda n: (*self._quality(accuracy, loss, n), n))
        index = allowed[worst - 1]
        strengths = {choice.names[number]: float(accuracy[0] - accuracy[n]) for n, number in enumerate(allowed, 1)}
        result.supernet.set_gate(FixedGate(index, len(choice)), key)
        result.decisions.append(Decision(key, choice.names[index], strengths))

    def _edges(self, result: Discretised, keys: tuple[str, ...], validation: Iterable[Any]) -> None:
        """Leaves a node two edges."""
        left, supernet = list(keys), result.supernet
        while len(left) > 2:
            accuracy, loss = self._judge(result, validation, _without(supernet, left))
            # Missed least: removal leaves the best network; of equals the last edge goes.
            ranked = sorted(range(len(left)), key=lambda n: (*self._quality(accuracy, loss, n + 1), n), reverse=True)
            gone = ranked[:1] if self.topology == "greedy" else ranked[: len(left) - 2]
            strengths = {key: float(accuracy[0] - accuracy[n]) for n, key in enumerate(left, 1)}
            for key in [left[n] for n in gone]:
                supernet.set_gate(FixedGate(None, len(supernet.keyed_choices()[key])), key)
                result.decisions.append(Decision(", ".join(left), key, strengths))
            left = [key for n, key in enumerate(left) if n not in gone]

    def _judge(
        self, result: Discretised, validation: Iterable[Any], variants: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        result.evaluations += len(next(iter(variants.values()))) - 1
        return _measure(
            result.supernet, validation, variants, max_batches=self.max_val_batches, renormalise=self.renormalise
        )

    def _quality(self, accuracy: Tensor, loss: Tensor, number: int) -> tuple[float, ...]:
        """Smaller for a worse network."""
        if self.criterion == "loss":
            return (-float(loss[number]),)
        return float(accuracy[number]), -float(loss[number])

    def _tuner(
        self, supernet: Supernet, train: Iterable[Any] | None, validation: Iterable[Any], steps: int, seed: int
    ) -> _Tuner | None:
        if not self.tune_epochs:
            return None
        lr, epochs = LR * self.lr_scale, self.tune_epochs * (steps - 1) + 1
        stage = Stage("tune", epochs, lr, min(lr, LR_MIN), alpha_step=self.alpha_step)
        return _Tuner(Searcher(supernet, objective=self.objective, stages=[stage]), train, validation, seed)


class _Tuner:
    """Steps of a search between decisions, with fresh optimisers and one cosine over all of them."""

    def __init__(self, searcher: Searcher, train: Any, validation: Any, seed: int) -> None:
        self.searcher, self.pairs = searcher, Pairs(train, validation, searcher)
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
