import itertools

import pytest
import torch
from torch import nn

from netwright.compress.low_rank import (
    LowRankLinear,
    decompose,
    hierarchical_group_lasso,
    low_rank_layers,
    ordered_rank_sampler,
    progressive_shrink,
    recalibrate_batchnorm,
    truncated,
)
from netwright.seeding import seeded


def network():
    with seeded(0, "init"):
        return decompose(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))


def test_one_cycle_holds_every_pair_once():
    draws = [next(iter(d.items())) for d in itertools.islice(ordered_rank_sampler(network()), 14)]
    pairs = {("0", k) for k in (1, 2, 3, 4)} | {("2", k) for k in (1, 2, 3)}
    assert set(draws[:7]) == set(draws[7:]) == pairs
    assert draws[:7] != draws[7:]
    assert draws == [next(iter(d.items())) for d in itertools.islice(ordered_rank_sampler(network()), 14)]


def test_the_sampler_follows_shrinking():
    low = network()
    sampler = ordered_rank_sampler(low)
    next(sampler)
    low[0].rank = 3
    draws = list(itertools.islice(sampler, 12))
    assert {d["0"] for d in draws[:6] if "0" in d} == {1, 2, 3}
    low[0].rank, low[2].rank = 0, 1
    assert list(itertools.islice(sampler, 3)) == [{"2": 1}] * 3
    low[2].rank = 0
    assert next(sampler) == {}


def test_other_modes():
    draws = list(itertools.islice(ordered_rank_sampler(network(), "across_layers"), 300))
    counts = torch.tensor([d["0"] for d in draws]).bincount(minlength=5)[1:]
    assert counts.min() > 50
    assert {d["2"] for d in draws} == {1, 2, 3}
    assert next(ordered_rank_sampler(network(), "fixed")) == {"0": 1, "2": 1}


def test_truncation_of_several_layers():
    low, x = network(), torch.rand(2, 5)
    with truncated(low, {"0": 2, "2": None}):
        assert (low[0].used, low[2].used) == (2, 3)
        inside = low(x)
    low[0].rank = 2
    assert torch.equal(low(x), inside)


def test_the_penalty_by_hand():
    layer = LowRankLinear(2, 2)
    layer.U.data.zero_()
    layer.V.data = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert layer.tail_norms(layer.V).tolist() == pytest.approx([26**0.5, 1.0])
    assert hierarchical_group_lasso(layer).item() == pytest.approx(6.0990195, abs=1e-5)
    assert hierarchical_group_lasso(layer, hierarchical=False).item() == pytest.approx(6.0, abs=1e-5)
    layer.rank = 1
    assert hierarchical_group_lasso(layer).item() == pytest.approx(5.0, abs=1e-5)


@pytest.mark.parametrize("hierarchical", [True, False])
def test_the_gradient_of_the_penalty(hierarchical):
    low = network().double()
    low[0].rank = 3

    hierarchical_group_lasso(low, hierarchical).backward()
    for layer in low_rank_layers(low).values():
        for factor in (layer.U, layer.V):
            flat, gradient = factor.data.view(-1), factor.grad.view(-1)
            for i in range(len(flat)):
                before, values = float(flat[i]), []
                for step in (1e-6, -1e-6):
                    flat[i] = before + step
                    values.append(hierarchical_group_lasso(low, hierarchical).item())
                flat[i] = before
                assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(gradient[i]), abs=1e-6)


def test_a_column_of_zeros_has_a_finite_gradient():
    low = network()
    low[0].U.data[2:] = 0
    hierarchical_group_lasso(low).backward()
    assert torch.isfinite(low[0].U.grad).all()
    assert not low[0].U.grad[2:].any()


def test_progressive_shrinking():
    low = network()
    assert progressive_shrink(low, 0.0) == {"0": 4, "2": 3}
    low[0].U.data[2:] = 0
    assert progressive_shrink(low) == {"0": 2, "2": 3}
    assert progressive_shrink(low, float("inf")) == {"0": 0, "2": 0}


def test_batch_norms_are_measured_with_the_whole_network():
    net = decompose(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    recalibrate_batchnorm(net, [(x, None), (x * 100, None)], batches=1)
    assert torch.allclose(net[1].running_mean, net[0](x).mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: ordered_rank_sampler(network(), "random"), "mode must be one of"),
        (lambda: ordered_rank_sampler(nn.Linear(2, 2)), "decompose it first"),
        (lambda: progressive_shrink(network(), -1), "eps must be >= 0"),
        (lambda: truncated(network(), {"1": 1}).__enter__(), "ranks must name low-rank layers, got '1'"),
        (lambda: truncated(network(), {"0": 9}).__enter__(), "k must lie in 1..4"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
