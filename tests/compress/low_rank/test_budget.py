import pytest
import torch
from torch import nn

from netwright.compress.low_rank import (
    decompose,
    finalize,
    low_rank_cost,
    low_rank_layers,
    prune_to_budget,
    svd_truncate,
)
from netwright.cost import count
from netwright.seeding import seeded, stream

X = torch.randn(3, 2, 8, 8, generator=stream(0, "x"))


def network():
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(2, 6, 3),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3),
            nn.Flatten(),
            nn.Linear(128, 30),
            nn.ReLU(),
            nn.Linear(30, 4),
        )


def parameters(net):
    return sum(p.numel() for p in net.parameters())


def ranks(net):
    return [layer.rank for layer in low_rank_layers(net).values()]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_costs_are_those_of_the_finalised_network(rank):
    low = decompose(network())
    for layer in low_rank_layers(low).values():
        layer.rank = min(rank, layer.rank)
    cost, plain = low_rank_cost(low, X), finalize(low)
    assert cost.params == parameters(plain)
    assert cost.macs == count(plain, (2, 8, 8)).macs


def test_the_budget_is_met_within_a_term():
    low = decompose(network())
    for budget in range(parameters(network()), 500, -311):
        cut = prune_to_budget(low, params=budget)
        assert budget - (128 + 30) < parameters(finalize(cut)) <= budget or ranks(cut) == ranks(low)
    assert ranks(low) == [6, 8, 30, 4]


def test_the_budget_of_multiply_adds():
    low = decompose(network())
    full = count(network(), (2, 8, 8)).macs
    for share in (0.9, 0.6, 0.4):
        cut = prune_to_budget(low, macs=round(share * full), example=X)
        found = count(finalize(cut), (2, 8, 8)).macs
        assert 0.75 * share * full < found <= share * full


def test_a_budget_of_what_there_is_changes_nothing():
    low = decompose(network())
    assert ranks(prune_to_budget(low, params=low_rank_cost(low).params)) == ranks(low)


@pytest.mark.parametrize("per_parameter", [False, True])
@pytest.mark.parametrize("hierarchical", [False, True])
def test_the_least_important_terms_go_first(per_parameter, hierarchical):
    low = decompose(network())
    cut = prune_to_budget(low, params=2000, per_parameter=per_parameter, hierarchical=hierarchical)
    kept, gone = [], []
    for name, layer in low_rank_layers(low).items():
        share = layer.U.shape[1] + layer.V.shape[1] if per_parameter else 1
        sizes = (layer.importance(hierarchical) / share).tolist()
        rank = cut.get_submodule(name).rank
        kept += sizes[1:rank]
        gone += sizes[max(1, rank) :]
    assert gone
    assert max(gone) <= min(kept)


def test_singular_values_of_all_layers_in_one_order():
    net = network()
    for budget in (1500, 2500, 4000):
        small = svd_truncate(net, budget)
        assert parameters(small) <= budget
    size = [torch.linalg.svdvals(net[i].weight.flatten(1)) for i in (0, 2, 4, 6)]
    low = decompose(net)
    expected = torch.cat(size).sort(descending=True).values
    for layer, own in zip(low_rank_layers(low).values(), size, strict=True):
        layer.rank = max(1, int((own >= expected[15]).sum()))
    assert parameters(svd_truncate(net, low_rank_cost(low).params)) <= low_rank_cost(low).params
    assert torch.allclose(svd_truncate(net, 10**6)(X), net(X), atol=1e-5)


def test_a_term_goes_after_those_behind_it():
    low = decompose(nn.Sequential(nn.Linear(6, 6, bias=False)))
    low[0].U.data[0] *= 1e-6  # the first term is now the least
    assert low[0].importance(hierarchical=False).argmin() == 0
    cut = prune_to_budget(low, params=25, hierarchical=False, keep_at_least=0)
    assert cut[0].rank == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "exactly one of params and macs"),
        ({"params": 9, "macs": 9}, "exactly one"),
        ({"macs": 10**6}, "macs needs an example"),
        ({"params": 100}, "params must be >= "),
        ({"macs": 100, "example": X}, "macs must be >= "),
    ],
)
def test_bad_input(options, told):
    with pytest.raises(ValueError, match=told):
        prune_to_budget(decompose(network()), **options)


def test_a_plain_network_is_refused():
    with pytest.raises(RuntimeError, match="needs low-rank layers"):
        prune_to_budget(network(), params=100)
    with pytest.raises(ValueError, match="params must be >="):
        svd_truncate(network(), 50)
