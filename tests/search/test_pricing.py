"""Prices and limits against counting, enumeration and the exact set of architectures that no other one beats."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from netwright.cost import count
from netwright.search import Brief, ExpectedLatency, Limit, Limits, NetworkCost, WithinLimits, multiply_adds, spaces
from netwright.search.brief import make_selector
from netwright.search.pricing import FULL, cheapest
from netwright.search.selection import mixing
from netwright.seeding import stream

SHAPE = (1, 16, 16)


def cost_of(name: str, **options) -> NetworkCost:
    space = spaces.get(name)
    return NetworkCost(space, multiply_adds(space, SHAPE, **options), SHAPE, **options)


def with_alphas(name: str, scale: float = 1.0):
    supernet = spaces.get(name).supernet(1, 10, channels=4)
    for key, alpha in supernet.arch.items():
        alpha.data.copy_(scale * torch.randn(alpha.shape, generator=stream(3, key)))
    return supernet


@pytest.mark.parametrize("name", ["micro-chain", "micro-darts"])
def test_the_price_of_a_genotype_is_what_counting_its_network_gives(name):
    space, cost = spaces.get(name), cost_of(name, channels=16)
    supernet = space.supernet(1, 10, channels=4)
    for seed in range(4):
        genotype = space.random(stream(seed, "genotype"))
        assert cost.of(supernet, genotype) == count(space.build(genotype, 1, 10, channels=16), SHAPE).macs


def test_the_expectation_over_a_chain_is_the_mean_over_all_its_architectures():
    supernet, cost = with_alphas("micro-chain"), cost_of("micro-chain")
    space, weights = supernet.space, mixing(supernet)
    total = 0.0
    for names in itertools.product(*(names for names, _ in weights.values())):
        decisions = dict(zip(weights, names, strict=True))
        share = math.prod(float(weights[key][1][weights[key][0].index(name)]) for key, name in decisions.items())
        costs = cost.candidates(supernet)
        total += share * sum(costs[key][weights[key][0].index(name)] for key, name in decisions.items())
    assert cost(supernet.eval()).item() == pytest.approx(total + cost.constant, rel=1e-5)
    assert space.size == math.prod(len(names) for names, _ in weights.values())


def test_the_expectation_over_cells_takes_each_edge_for_its_share_of_two():
    supernet, cost = with_alphas("micro-darts"), cost_of("micro-darts")
    space, costs = supernet.space, cost.candidates(supernet)
    weights = mixing(supernet)
    total = cost.constant
    for keys in space.incoming().values():
        pairs = list(itertools.combinations(keys, 2))
        for pair in pairs:
            total += sum(float(weights[key][1] @ torch.tensor(costs[key])) for key in pair) / len(pairs)
    assert cost(supernet).item() == pytest.approx(total, rel=1e-5)
    cost(supernet).backward()
    assert all(alpha.grad.abs().sum() > 0 for alpha in supernet.arch.values())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_no_cheaper_architecture_is_more_probable_than_the_one_within_a_limit(share):
    supernet, cost = with_alphas("micro-chain"), cost_of("micro-chain")
    weights, costs = mixing(supernet), cost.candidates(supernet)
    dearest = cost.constant + sum(map(max, costs.values()))
    least = cost.of(supernet, cheapest(Limits(Limit(cost, 1.0)), supernet))
    limit = least + share * (dearest - least)
    found = WithinLimits(Limits(Limit(cost, limit))).select(supernet)
    spent = cost.of(supernet, found)
    assert spent <= limit

    def score(decisions) -> float:
        return sum(
            float(weights[key][1].double()[weights[key][0].index(name)].log()) for key, name in decisions.items()
        )

    reached = score(supernet.space.decisions(found))
    for names in itertools.product(*(names for names, _ in weights.values())):
        decisions = dict(zip(weights, names, strict=True))
        paid = cost.constant + sum(costs[key][weights[key][0].index(name)] for key, name in decisions.items())
        assert paid > spent or score(decisions) <= reached + 1e-5


def test_a_limit_that_leaves_everything_open_changes_nothing():
    for name in ("micro-chain", "micro-darts"):
        supernet = with_alphas(name)
        assert WithinLimits(Limits(Limit(cost_of(name), 1e12))).select(supernet) == supernet.derive()


def test_two_limits_are_both_kept():
    supernet, cost = with_alphas("micro-chain"), cost_of("micro-chain")
    operations = supernet.space.supernet(1, 10).operations(SHAPE)
    parameters = {key: float(sum(p.numel() for p in op.parameters())) for key, (op, _) in operations.items()}
    size = NetworkCost(supernet.space, parameters, SHAPE)
    both = Limits(Limit(cost, 1.0e6, "multiply-adds"), Limit(size, 4000, "parameters"))
    found = WithinLimits(both).select(supernet)
    assert both.over(supernet, found) == []
    assert both.over(supernet, supernet.space.genotype(dict.fromkeys(supernet.space.choices(), "k5_e4")))
    halves = [limit.cost(supernet).item() / limit.most for limit in both.limits]
    assert both(supernet).item() == pytest.approx(FULL * sum(halves) / 2, rel=1e-5)


def test_a_limit_below_the_cheapest_architecture_is_refused_with_its_price():
    supernet, cost = with_alphas("micro-chain"), cost_of("micro-chain")
    with pytest.raises(ValueError, match=r"no architecture of space 'micro-chain' is within .* of 10 allowed"):
        WithinLimits(Limits(Limit(cost, 10.0))).select(supernet)


def test_an_expected_latency_prices_genotypes_like_its_table():
    supernet = with_alphas("micro-chain")
    table = dict.fromkeys(supernet.operations(SHAPE), 0.5) | {"constant": 1.0}
    supernet.input_shape = SHAPE
    genotype = supernet.space.genotype(dict.fromkeys(supernet.space.choices(), "k3_e2") | {"layer_1": "skip"})
    assert ExpectedLatency(table).of(supernet, genotype) == pytest.approx(1.0 + 5 * 0.5)


def test_bad_values_are_named():
    cost = cost_of("micro-chain")
    with pytest.raises(ValueError, match="ms must be > 0 and finite, got 0"):
        Limit(cost, 0, "ms")
    with pytest.raises(ValueError, match="limits must be at least 1, got 0"):
        Limits()
    with pytest.raises(ValueError, match="unit must be > 0 and finite, got 0"):
        NetworkCost(spaces.get("micro-chain"), {}, SHAPE, unit=0)
    with pytest.raises(ValueError, match="select must be one of magnitude, argmax, sample, perturbation, got 'best'"):
        make_selector("best", spaces.get("micro-chain"))
    with pytest.raises(ValueError, match="select 'magnitude' does not fit the space 'micro-chain'"):
        make_selector("magnitude", spaces.get("micro-chain"))
    with pytest.raises(ValueError, match="select 'perturbation' looks at the accuracy alone"):
        make_selector("perturbation", spaces.get("micro-chain"), Limits(Limit(cost, 1e9)))


def test_a_brief_selects_within_its_limits():
    limits = Limits(Limit(cost_of("micro-chain"), 1e6))
    assert Brief([1]).selector is None
    assert Brief([1]).objective is None
    selector = Brief([1], limits=limits).selector
    assert isinstance(selector, WithinLimits)
    assert selector.limits is limits
