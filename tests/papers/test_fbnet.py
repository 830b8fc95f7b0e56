"""FBNet's experiment: verdicts from made-up figures, and what its search is told."""

from __future__ import annotations

import pytest

from netwright.cost import LatencyTable
from netwright.data.sources import DEBIAN_FASHION_MNIST
from netwright.papers import chains, fbnet
from netwright.search.fbnet import FBNet
from netwright.search.genotype import Genotype
from netwright.search.latency import CONSTANT

SEEDS = 5


def around(value, spread=0.001):
    return [value + spread * i for i in range(SEEDS)]


def arms(*, pearson=0.98, error=0.1, ours=0.8, front=0.78, plain=0.805, ms=2.0, plain_ms=3.0, proxy_ms=2.5, **change):
    falls = {"latency": (3.0, 2.0), "entropy": (1.5, 0.8), "probable": 0.8, "draws": 0.78, "device": -0.1} | change
    search = {
        f"{name}, {when}": around(value)
        for name, key in (("expected latency, ms", "latency"), ("entropy", "entropy"))
        for when, value in zip(("start", "end"), falls[key], strict=True)
    }
    return {
        "latency tables": {"batch 32: Pearson": [pearson], "batch 32: median relative error": [error]},
        fbnet.OURS: {"accuracy": around(ours), "latency, ms": around(ms), "accuracy of random ones": around(front)},
        fbnet.PLAIN: {"accuracy": around(plain), "latency, ms": around(plain_ms)},
        fbnet.PROXY: {"latency, ms": around(proxy_ms)},
        fbnet.PROBABLE: {"accuracy": around(falls["probable"]), "accuracy of random ones": around(front)},
        fbnet.BEST_RANDOM: {"accuracy": around(falls["draws"]), "accuracy of random ones": around(front)},
        "devices": {"log ratio": around(falls["device"])},
        f"search: {fbnet.OURS}": search,
    }


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "table", "supported"),
        ({"pearson": 0.94}, "table", "not supported"),
        ({"error": 0.16}, "table", "not supported"),
        ({}, "accuracy", "supported"),
        ({"front": 0.82}, "accuracy", "not supported"),
        ({}, "latency", "supported"),
        ({"plain_ms": 2.2}, "latency", "not supported"),
        ({"plain": 0.82}, "latency", "not supported"),
        ({"plain": 0.814}, "latency", "supported"),
        ({}, "converges", "supported"),
        ({"entropy": (1.5, 1.6)}, "converges", "not supported"),
        ({"latency": (2.0, 3.0)}, "converges", "not supported"),
        ({}, "probable", "supported"),
        ({"probable": 0.7}, "probable", "not supported"),
        ({}, "draws", "supported"),
        ({"draws": 0.81}, "draws", "not supported"),
        ({}, "proxy", "supported"),
        ({"proxy_ms": 1.5}, "proxy", "not supported"),
        ({}, "devices", "supported"),
        ({"device": 0.1}, "devices", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert fbnet.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(fbnet.judge(arms())) == {claim.key for claim in fbnet.CARD.claims}


def test_the_space_is_that_of_the_specification():
    space = fbnet.space()
    choices = space.choices()
    assert len(choices) == 6
    assert set(choices["layer_1"]) == {"k3_e1", "k3_e3", "k5_e1", "k5_e3", "skip"}
    widths = {key[2] for key in space.supernet(1, 10).operations(chains.SHAPE)}
    assert widths == {12, 16, 24}


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("proxy", [False, True])
def test_the_loss_begins_as_cross_entropy_whatever_the_table(monkeypatch, proxy):
    supernet = fbnet.space().supernet(1, 10)
    times = {key: 0.1 + 0.01 * number for number, key in enumerate(supernet.operations(chains.SHAPE))}
    table = LatencyTable(times | {CONSTANT: 0.4}, "a processor", 1, 1, "float32", "2").to_dict()
    seen = []

    def search(self, *_, **__):
        penalty = self.objective.terms[-1]
        cost = penalty.cost.cost
        whole = chains.undecided(self.supernet, cost.table)
        seen.append((penalty.alpha, penalty.beta, cost.unit, whole, dict(cost.table)))
        raise KeyboardInterrupt

    monkeypatch.setattr(FBNet, "search", search)
    with pytest.raises(KeyboardInterrupt):
        fbnet._search(0, table, 3.0, proxy, [64, 32], [16, 1, 1, 1])
    alpha, beta, unit, whole, priced = seen[0]
    assert whole / unit == pytest.approx(1000)
    import torch

    penalty = FBNet(supernet, priced, alpha, beta, unit=unit, warmup_epochs=0, epochs=1).objective.terms[-1]
    loss = torch.tensor(2.0)
    assert penalty.penalised(loss, torch.tensor(1000.0)).item() == pytest.approx(2.0)
    assert whole == pytest.approx(chains.undecided(supernet, times | {CONSTANT: 0.4}))
    assert (priced == times | {CONSTANT: 0.4}) != proxy


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_a_small_search_gives_the_most_probable_architecture_and_samples():
    supernet = fbnet.space().supernet(1, 10)
    table = LatencyTable(
        {**dict.fromkeys(supernet.operations(chains.SHAPE), 0.2), CONSTANT: 0.4}, "a processor", 1, 1, "float32", "2"
    )
    found = fbnet._search(0, table.to_dict(), 1.0, False, [32, 32], [16, 1, 1, 2])
    assert len(found["genotypes"]) == 3
    assert all(Genotype.from_dict(genotype).space == "fbnet-small" for genotype in found["genotypes"])
    assert found["entropy, end"] < found["entropy, start"] == pytest.approx(1.4979, abs=1e-3)
    assert found["expected latency, ms, start"] == pytest.approx(chains.undecided(supernet, table))
