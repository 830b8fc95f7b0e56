"""Parts of different methods together: gate x step x objective x selector x space; what makes no sense says why.

Superkernels have no gates: they are a column of their own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.support.searches import images

from netwright.data.tensors import Batches
from netwright.nn.batchnorm import recalibrate
from netwright.search import (
    DARTS,
    DASS,
    RARTS,
    SDDARTS,
    Alternating,
    ArgmaxSelector,
    BinaryGate,
    CostPenalty,
    DASSStages,
    FBNet,
    FirstOrder,
    GumbelSoftmaxGate,
    Limit,
    Limits,
    NetworkCost,
    Objective,
    PerturbationSelector,
    Phased,
    PricedSearch,
    ProxylessNAS,
    RelaxedSplit,
    SampleSelector,
    Searcher,
    SecondOrder,
    SelfDistillation,
    SharpnessAware,
    SingleLevel,
    SinglePathNAS,
    SnapshotTeachers,
    SoftmaxGate,
    Stage,
    SuperKernelSupernet,
    TaskLoss,
    ThresholdSelector,
    WithinLimits,
    alpha_hessian_eig,
    discretisation_gap,
    inherited_accuracy,
    loss_and_accuracy,
    multiply_adds,
    rho_sharpness,
    sample_genotypes,
    spaces,
)
from netwright.search.brief import Brief
from netwright.search.priced import Watched
from netwright.search.pricing import FULL
from netwright.search.proxyless import GateGradient, Reinforce
from netwright.seeding import seeded, stream

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
        return "second order must have derivatives of the loss in the architecture, got BinaryGate on .* use FirstOrder"
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


# Self-distillation inside methods that make their own loss ------------------------------------------------------------


class Half(Objective):
    def term(self, total, seen):
        return total / 2


def latency(supernet):
    return dict.fromkeys(supernet.operations(SHAPE), 2.0) | {"constant": 3.0}


PRICED: dict[str, Callable[..., Any]] = {
    "FBNet": lambda **options: FBNet(
        (net := spaces.get("micro-chain").supernet(1, 3, channels=4, seed=0)), latency(net), warmup_epochs=1, epochs=4,
        samples=1, lr=0.05, **options,
    ),
    "PricedSearch": lambda **options: PricedSearch(
        (net := spaces.get("micro-chain").supernet(1, 3, channels=4, seed=0)), latency(net), epochs=4, warmup=0.25,
        lr=0.01, **options,
    ),
    "SinglePathNAS": lambda **options: SinglePathNAS(
        (net := superkernels()), latency(net), epochs=4, warmup=0.25, lr=0.01, **options
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRICED)
def test_an_objective_is_the_task_part_and_the_price_comes_after_it(name):
    """The price multiplies FBNet's objective and is added to that of the others."""
    batch = next(iter(halves()[0]))
    losses = {}
    for label, options in (
        ("default", {}),
        ("task", {"objective": TaskLoss(0.0 if name == "FBNet" else 0.1)}),
        ("half", {"objective": TaskLoss(0.0 if name == "FBNet" else 0.1) + Half()}),
    ):
        made = PRICED[name](**options)
        made.begin_stage(made.stages[1])
        with seeded(0, "draws"):
            losses[label] = made.objective(made.supernet, batch, "both")
    assert torch.equal(losses["task"], losses["default"])
    free = 0.0 if name == "FBNet" else 20.0 * float(made.latency(made.supernet).log())
    assert losses["half"].item() == pytest.approx(free + (losses["task"].item() - free) / 2, rel=1e-5)


@pytest.mark.parametrize("name", PRICED)
def test_self_distillation_goes_into_methods_that_make_their_own_loss(name):
    found = {}
    for lam in (0.0, 5.0):
        term = SelfDistillation(lam=lam, ramp=0.0, teachers=SnapshotTeachers(k=1))
        made = PRICED[name](objective=TaskLoss() + term)
        result = made.search(*halves(), seed=0)
        spaces.get("micro-chain").validate(result.genotype)
        assert result.config["objective"] == ["TaskLoss", "SelfDistillation", "CostPenalty"]
        found[lam] = result.alpha_history
    early, late = (
        [torch.equal(found[0.0][epoch][key], found[5.0][epoch][key]) for key in found[0.0][0]] for epoch in (2, 4)
    )
    assert all(early)  # the stage has had no teacher yet
    assert not all(late)


# Superkernels ---------------------------------------------------------------------------------------------------------


def superkernels() -> SuperKernelSupernet:
    return SuperKernelSupernet(spaces.get("micro-chain"), 1, 3, channels=4, seed=0)


KERNEL_STEPS = STEPS | {"watched": Watched}
KERNEL_SELECTORS = SELECTORS | {
    "threshold": lambda space: ThresholdSelector(),
    "argmax": lambda space: ArgmaxSelector(),
}
KERNEL_REFUSALS = {
    "second order": r"second order must have derivatives .* got SuperKernelMBConv on network.* use FirstOrder",
    "gate gradient": "a gate's gradient needs choices with gates, .* got a SuperKernelMBConv for 'layer_0', which has",
    "reinforce": "REINFORCE needs choices with gates, .* got a SuperKernelMBConv",
    "perturbation": r"choices (with gates|among candidates)",
    "sample": "a draw of genotypes needs choices with gates, whose weights are probabilities, got a SuperKernelMBConv",
}


def kernel_pairs() -> Iterator[tuple[str, str, str]]:
    """Every step with every objective, and with every selector."""
    steps = [name for name in KERNEL_STEPS if name not in KERNEL_REFUSALS]
    selectors = [name for name in KERNEL_SELECTORS if name not in KERNEL_REFUSALS]
    for (i, step), (j, objective) in itertools.product(enumerate(steps), enumerate(OBJECTIVES)):
        yield step, objective, selectors[(i + j) % len(selectors)]


def kernel_searcher(step: str, objective: str = "task", selector: str = "rule") -> Searcher:
    return Searcher(
        superkernels(), objective=OBJECTIVES[objective]("micro-chain"), method=KERNEL_STEPS[step](),
        selector=KERNEL_SELECTORS[selector]("micro-chain"), stages=[Stage(epochs=1, lr=0.05)], alpha_lr=0.05,
    )  # fmt: skip


@pytest.mark.parametrize("parts", list(kernel_pairs()), ids=", ".join)
def test_superkernels_work_with_parts_of_other_methods(parts):
    search = kernel_searcher(*parts)
    result = search.search(*halves(), seed=0)
    spaces.get("micro-chain").validate(result.genotype)
    assert any(alpha.any() for alpha in search.supernet.arch_parameters())  # they began at zero
    assert all(torch.isfinite(alpha).all() for alpha in search.supernet.arch_parameters())
    if parts[2] == "limits":
        assert limits_of("micro-chain", 0.6).over(search.supernet, result.genotype) == []


@pytest.mark.parametrize("part", KERNEL_REFUSALS)
def test_what_makes_no_sense_with_superkernels_says_why(part):
    parts = {"step": part} if part in KERNEL_STEPS else {"step": "first order", "selector": part}
    with pytest.raises(ValueError, match=KERNEL_REFUSALS[part]):
        kernel_searcher(**parts).search(*halves(), seed=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda net: DARTS(net, epochs=1),
        lambda net: RARTS(net, epochs=1),
        lambda net: SDDARTS(net, SelfDistillation(ramp=0.0), epochs=2),
        lambda net: DASS(net, 0.5, DASSStages(1, 1, 1), unrolled=False),
        lambda net: PricedSearch(net, latency(net), epochs=2, warmup=0.5, lr=0.01),
    ],
    ids=["DARTS", "RARTS", "SD-DARTS", "DASS", "PricedSearch"],
)
def test_searchers_that_take_superkernels(make):
    result = make(superkernels()).search(*halves(), seed=0)
    spaces.get("micro-chain").validate(result.genotype)
    first, last = result.alpha_history[0], result.alpha_history[-1]
    assert any(not torch.equal(first[key], last[key]) for key in first)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: DARTS(net, order=2, epochs=1), "second order must have derivatives"),
        (lambda net: DASS(net, 0.5, DASSStages(1, 1, 1)), "second order must have derivatives"),
        (lambda net: FBNet(net, epochs=2, warmup_epochs=1), "FBNet needs choices with gates, which it makes Gumbel"),
        (ProxylessNAS, "ProxylessNAS needs choices with gates, which it makes binary"),
        (lambda net: ProxylessNAS.short(net, Brief([1, 1])), "ProxylessNAS needs choices with gates"),
    ],
    ids=["second order", "DASS unrolled", "FBNet", "ProxylessNAS", "ProxylessNAS.short"],
)
def test_searchers_that_cannot_take_superkernels(make, message):
    with pytest.raises(ValueError, match=message):
        make(superkernels()).search(*halves(), seed=0)


def test_an_architecture_is_measured_by_the_thresholds_under_which_superkernels_are_it():
    net, (train, val) = superkernels(), halves()
    genotype = spaces.get("micro-chain").random(stream(0, "genotype"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gap = discretisation_gap(net, genotype, list(val))
    accuracy = inherited_accuracy(net, genotype, list(train), list(val))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert gap["loss gap"] != 0.0
    net.adopt(genotype)
    assert net.derive() == genotype
    assert loss_and_accuracy(net, list(val)) == pytest.approx((gap["discrete loss"], gap["discrete accuracy"]))
    recalibrate(net, list(train)).eval()
    with torch.no_grad():
        right = [net(x).argmax(1) == labels for x, labels in val]
    assert accuracy == pytest.approx(torch.cat(right).float().mean().item())


def test_where_the_loss_goes_in_steps_of_the_architecture_it_has_no_sharpness():
    gates = (BinaryGate(), GumbelSoftmaxGate(hard=True))
    kernels, batches = superkernels(), list(halves()[1])
    gated = [(spaces.get("micro-chain").supernet(1, 3, channels=4, gate=gate), type(gate).__name__) for gate in gates]
    for net, name in ((kernels, "SuperKernelMBConv"), *gated):
        for wrt in ("alpha", "both"):
            with pytest.raises(ValueError, match=f"rho_sharpness with wrt='{wrt}' must have derivatives .* got {name}"):
                rho_sharpness(net, batches, wrt=wrt)
        with pytest.raises(ValueError, match=f"alpha_hessian_eig must have derivatives .* got {name}"):
            alpha_hessian_eig(net, batches)
        assert rho_sharpness(net, batches, wrt="weights") > 0
    with pytest.raises(ValueError, match="a draw of genotypes needs choices with gates"):
        sample_genotypes(kernels, 1, generator=stream(0, "draws"))
