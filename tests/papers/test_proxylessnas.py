"""ProxylessNAS' experiment: verdicts from made-up figures, its arms and its count of memory."""

from __future__ import annotations

import pytest

from netwright.papers import chains, proxylessnas
from netwright.search.alternating import Alternating
from netwright.search.binary_gate import BinaryGate
from netwright.search.latency import ExpectedLatency
from netwright.search.objective import CostPenalty
from netwright.search.proxyless import ProxylessNAS, Reinforce
from netwright.search.supernet import SoftmaxGate

SEEDS = 5
KINDS = (proxylessnas.TWO, proxylessnas.FULL, proxylessnas.REINFORCE, proxylessnas.MIXTURE)


def around(value, spread=0.001):
    return [value + spread * i for i in range(SEEDS)]


def arms(*, path=1.1, mixture=0.2, pearson=0.95, two=0.8, full=0.8, reinforce=0.8, soft=0.8, random=0.77, **change):
    values = {"ms": 2.0, "free_ms": 3.0, "free": 0.805, "front": 0.78, "device": -0.1} | change
    found = {
        name: {"accuracy": around(accuracy)} for name, accuracy in zip(KINDS, (two, full, reinforce, soft), strict=True)
    }
    found[proxylessnas.TWO] |= {
        "latency, ms": around(values["ms"]),
        "accuracy of random ones": around(values["front"]),
    }
    found[proxylessnas.FREE] = {"accuracy": around(values["free"]), "latency, ms": around(values["free_ms"])}
    memory = {"gates of two / one path, largest": [path], "gates of two / mixture, largest": [mixture]}
    return found | {
        "memory": memory,
        "latency tables": {"batch 1: Pearson": [pearson]},
        "random": {"median accuracy": around(random)},
        "devices": {"log ratio": around(values["device"])},
    }


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "memory", "supported"),
        ({"path": 1.31}, "memory", "not supported"),
        ({"mixture": 0.51}, "memory", "not supported"),
        ({}, "accuracy", "supported"),
        ({"soft": 0.809}, "accuracy", "supported"),
        ({"soft": 0.812}, "accuracy", "not supported"),
        ({}, "latency", "supported"),
        ({"free_ms": 2.3}, "latency", "not supported"),
        ({"free": 0.816}, "latency", "not supported"),
        ({}, "table", "supported"),
        ({"pearson": 0.89}, "table", "not supported"),
        ({}, "random", "supported"),
        ({"random": 0.81}, "random", "not supported"),
        ({}, "front", "supported"),
        ({"front": 0.81}, "front", "not supported"),
        ({}, "full", "supported"),
        ({"full": 0.82}, "full", "not supported"),
        ({}, "reinforce", "supported"),
        ({"reinforce": 0.78}, "reinforce", "not supported"),
        ({"device": 0.1}, "devices", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert proxylessnas.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(proxylessnas.judge(arms())) == {claim.key for claim in proxylessnas.CARD.claims}


def test_the_space_is_that_of_the_specification():
    choices = proxylessnas.space().choices()
    assert len(choices) == 5
    assert [("skip" in names, len(names)) for names in choices.values()] == [
        (False, 4),
        (True, 5),
        (False, 4),
        (True, 5),
        (False, 4),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_arms_differ_in_how_the_architecture_learns_and_in_nothing_else(kind):
    supernet = proxylessnas.space().supernet(1, 10)
    searcher = proxylessnas._searcher(supernet, kind, ExpectedLatency({}, unit=1.0), 2.0, [2, 3])
    assert isinstance(searcher, ProxylessNAS) == (kind != proxylessnas.MIXTURE)
    gates = {choice.gate for choice in supernet.keyed_choices().values()}
    if kind == proxylessnas.MIXTURE:
        assert all(isinstance(gate, SoftmaxGate) for gate in gates)
    else:
        assert {gate.mode for gate in gates} == {"full" if kind == proxylessnas.FULL else "two"}
        assert all(isinstance(gate, BinaryGate) for gate in gates)
    assert isinstance(searcher.method, Alternating)
    assert searcher.method.every == proxylessnas.ARCH_EVERY
    assert isinstance(searcher.method.inner, Reinforce) == (kind == proxylessnas.REINFORCE)
    assert any(isinstance(term, CostPenalty) for term in searcher.objective.terms) == (kind != proxylessnas.REINFORCE)
    group = searcher.w_opt.param_groups[0]
    assert (group["momentum"], group["nesterov"], searcher.clip) == (0.9, True, None)
    assert [(stage.epochs, stage.lr, stage.lr_min, stage.weight_decay) for stage in searcher.stages] == [
        (2, proxylessnas.LR, 0.0, 4e-5),
        (3, proxylessnas.LR, 0.0, 4e-5),
    ]


def test_memory_is_that_of_one_path_and_less_than_the_mixtures():
    found = proxylessnas._memory(0, 3, 4)
    two, full, again = (
        f"{name} / one path" for name in (proxylessnas.TWO, proxylessnas.FULL, "gates of all, recomputed")
    )
    assert 1.0 < found[two] <= found[f"{two}, largest"] < found[f"{full}, largest"]
    assert 1.0 <= found[again] < 1.02
    assert found["gates of two / mixture, largest"] < 0.5


def test_the_experiment_counts_latency_in_thousandths():
    supernet = proxylessnas.space().supernet(1, 10)
    for alpha in supernet.arch_parameters():
        alpha.data.zero_()
    table = dict.fromkeys(supernet.operations(chains.SHAPE), 0.3)
    supernet.input_shape = chains.SHAPE
    cost = ExpectedLatency(table, unit=chains.undecided(supernet, table) / proxylessnas.UNDECIDED)
    assert cost(supernet.eval()).item() == pytest.approx(1000)
