"""Parts of different methods together: gate x step x objective x selector x space; what makes no sense says why."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.support.searches import images

from netwright.data.tensors import Batches
from netwright.search import (
    DASS,
    Alternating,
    BinaryGate,
    CostPenalty,
    DASSStages,
    FBNet,
    FirstOrder,
    GumbelSoftmaxGate,
    Limit,
    Limits,
    NetworkCost,
    PerturbationSelector,
    Phased,
    ProxylessNAS,
    RelaxedSplit,
    SampleSelector,
    Searcher,
    SecondOrder,
    SelfDistillation,
    SharpnessAware,
    SingleLevel,
    SoftmaxGate,
    Stage,
    TaskLoss,
    WithinLimits,
    multiply_adds,
    spaces,
)
from netwright.search.pricing import FULL
from netwright.search.proxyless import GateGradient, Reinforce

SHAPE = (1, 8, 8)
SPACES = ("micro-darts-2-shared", "micro-chain")


def limits_of(space: str, share: float = 1.0) -> Limits:
    """A part of what the dearest architecture costs at width 4."""
    known = spaces.get(space)
    cost = NetworkCost(known, multiply_adds(known, SHAPE, 3, channels=4), SHAPE, 3, channels=4)
    rows = cost.candidates(known.supernet(1, 3, channels=4)).values()
    return Limits(Limit(cost, share * (cost.constant + sum(map(max, rows)))))


def penalty(form: str) -> Callable[[str], Any]:
    return lambda space: TaskLoss() + CostPenalty(form, limits_of(space), ref=FULL)  # type: ignore[arg-type]


GATES: dict[str, Callable[[], Any]] = {
    "softmax": SoftmaxGate,
    "gumbel": lambda: GumbelSoftmaxGate(2.0),
    "gumbel per sample": lambda: GumbelSoftmaxGate(2.0, per_sample=True),
    "binary two": lambda: BinaryGate("two"),
    "binary full": lambda: BinaryGate("full_recompute"),
}
STEPS: dict[str, Callable[[], Any]] = {
    "first order": FirstOrder,
    "second order": SecondOrder,
    "relaxed split": RelaxedSplit,
    "single level": SingleLevel,
    "sharpness-aware": lambda: SharpnessAware(0.05),
    "phased": Phased,
    "gate gradient": lambda: Alternating(GateGradient(), 1),
    "reinforce": lambda: Alternating(Reinforce(2), 1),
}
OBJECTIVES: dict[str, Callable[[str], Any]] = {
    "task": lambda space: None,
    "linear penalty": penalty("add_linear"),
    "multiplied penalty": penalty("mul_log"),
    "distillation": lambda space: TaskLoss() + SelfDistillation(),
}
SELECTORS: dict[str, Callable[[str], Any]] = {
    "rule": lambda space: None,
    "perturbation": lambda space: PerturbationSelector(tune_epochs=0),
    "sample": lambda space: SampleSelector(2),
    "limits": lambda space: WithinLimits(limits_of(space, 0.6)),
}
AXES = (tuple(GATES), tuple(STEPS), tuple(OBJECTIVES), tuple(SELECTORS), SPACES)


def refused(gate: str, step: str) -> str | None:
    """What the error says of a pair that makes no sense."""
    if step == "second order" and gate.startswith("binary"):
        return "second order must compare losses of the same operations, got BinaryGate"
    if step == "reinforce" and not gate.startswith("binary"):
        return "REINFORCE must have a supernet with binary gates"
    return None


def pairwise() -> Iterator[tuple[str, ...]]:
    """Few combinations in which every two values of any two axes meet; those that are refused stay out."""
    every = [row for row in itertools.product(*AXES) if refused(row[0], row[1]) is None]
    places = list(itertools.combinations(range(len(AXES)), 2))
    left = {(a, b, row[a], row[b]) for row in every for a, b in places}
    while left:
        best = max(every, key=lambda row: len({(a, b, row[a], row[b]) for a, b in places} & left))
        left -= {(a, b, best[a], best[b]) for a, b in places}
        yield best


def searcher(gate: str, step: str, objective: str, selector: str, space: str) -> Searcher:
    supernet = spaces.get(space).supernet(1, 3, channels=4, seed=0, gate=GATES[gate]())
    return Searcher(
        supernet, objective=OBJECTIVES[objective](space), method=STEPS[step](), selector=SELECTORS[selector](space),
        stages=[Stage(epochs=1, lr=0.05)], alpha_lr=0.05,
    )  # fmt: skip


def halves() -> tuple[Batches, Batches]:
    return Batches(images(8, 0), 4, seed=0), Batches(images(8, 1), 4, seed=1)


@pytest.mark.parametrize("parts", list(pairwise()), ids=", ".join)
def test_parts_of_different_methods_work_together(parts):
    search = searcher(*parts)
    before = {key: alpha.detach().clone() for key, alpha in search.supernet.arch.items()}
    result = search.search(*halves(), seed=0)
    spaces.get(parts[-1]).validate(result.genotype)
    moved = [key for key, alpha in search.supernet.arch.items() if not torch.equal(alpha, before[key])]
    assert moved
    assert all(torch.isfinite(alpha).all() for alpha in search.supernet.arch.values())
    if parts[3] == "limits":
        assert limits_of(parts[-1], 0.6).over(search.supernet, result.genotype) == []


@pytest.mark.parametrize(
    ("gate", "step"), [(g, s) for g, s in itertools.product(GATES, STEPS) if refused(g, s)], ids=lambda value: value
)
def test_what_makes_no_sense_says_why(gate, step):
    with pytest.raises(ValueError, match=refused(gate, step)):
        searcher(gate, step, "task", "rule", "micro-chain").search(*halves(), seed=0)


def test_dass_takes_penalty_distillation_and_perturbation_together():
    space = "micro-darts-2-shared"
    supernet = spaces.get(space).supernet(1, 3, channels=4, seed=0)
    objective = TaskLoss() + SelfDistillation() + CostPenalty("add_linear", limits_of(space), ref=FULL)
    dass = DASS(
        supernet, 0.5, DASSStages(1, 1, 2), unrolled=False, objective=objective,
        selector=PerturbationSelector(tune_epochs=0),
    )  # fmt: skip
    result = dass.search(*halves(), seed=0)
    assert [epoch["stage"] for epoch in result.epochs] == [0, 1, 2, 2]


def test_the_gates_of_chains_search_cells_too():
    space = spaces.get("micro-darts-2-shared")
    for method, options in ((FBNet, {"epochs": 2}), (ProxylessNAS, {"epochs": 1, "settle_epochs": 0})):
        made = method(space.supernet(1, 3, channels=4, seed=0), warmup_epochs=1, **options)
        space.validate(made.search(*halves(), seed=0).genotype)
