"""Width search: the proximal step by hand, dead channels, resumption, and the network that is left."""

import copy
import json

import pytest
import torch
from searches import images
from torch import nn

from netwright.compress.channels import gates, prune_channels, soft_threshold
from netwright.data.tensors import Batches
from netwright.nn.convnet import SmallConvNet
from netwright.search import CostPenalty, ExpectedLatency, PerturbationSelector, TaskLoss
from netwright.search.width import GatedNetwork, WidthSearch
from netwright.seeding import seeded, stream


def network():
    with seeded(0, "net"):
        return SmallConvNet((4, 6), hidden=0, num_classes=3, in_channels=1)


def loaders(steps=4):
    return Batches(images(32, 0), 8, seed=0, steps=steps), Batches(images(32, 1), 8, seed=0, name="validation")


def test_the_first_step_by_hand():
    search, net = WidthSearch(network(), lam=0.5, l1=2.0, alpha_lr=0.1, epochs=1), GatedNetwork(network())
    train, val = next(iter(loaders()[0])), next(iter(loaders()[1]))
    alphas = net.train().arch_parameters()
    loss = 0.5 * nn.functional.cross_entropy(net(train[0]), train[1]) + nn.functional.cross_entropy(net(val[0]), val[1])
    grads = torch.autograd.grad(loss, alphas)
    search.prepare(seed=0, steps_per_epoch=1)
    search.step(train, val)
    for found, alpha, grad in zip(search.supernet.arch_parameters(), alphas, grads, strict=True):
        assert torch.allclose(found, soft_threshold(alpha - 0.1 * grad, 0.2), atol=1e-6)


def test_a_channel_that_says_nothing_dies_and_one_that_speaks_lives():
    net = network()
    net.features[0].weight.data[1:].zero_()
    net.features[0].weight.requires_grad_(False)
    net.features[1].bias.requires_grad_(False)  # a channel of zeros stays one of zeros
    search = WidthSearch(net, l1=0.5, alpha_lr=0.1, epochs=6)
    genotype = search.search(*loaders(), seed=0).genotype
    assert genotype.channels["features.1.gate"] == 1
    assert search.supernet.arch["features.1.gate"].tolist()[1:] == [0.0, 0.0, 0.0]
    assert genotype.total == {"features.1.gate": 4, "features.5.gate": 6}


def test_without_penalty_no_channel_dies():
    genotype = WidthSearch(network(), l1=0.0, epochs=2).search(*loaders(), seed=0).genotype
    assert genotype.channels == genotype.total


def test_what_is_left_is_the_network_without_its_dead_channels():
    search = WidthSearch(network(), l1=0.9, alpha_lr=0.1, epochs=3)
    result = search.search(*loaders(), seed=0)
    net = search.supernet.network.eval()
    pruned = prune_channels(net)
    x = torch.rand(5, 1, 8, 8, generator=stream(0, "x"))
    assert torch.allclose(pruned(x), net(x), atol=1e-5)
    widths = result.genotype.channels
    assert widths["features.1.gate"] < 4 or widths["features.5.gate"] < 6
    assert pruned.features[0].out_channels == max(1, widths["features.1.gate"])
    assert not gates(pruned)


def test_a_search_resumed_is_bit_equal():
    states, whole = [], WidthSearch(network(), epochs=3)
    result = whole.search(*loaders(), seed=0, on_epoch=lambda end: states.append(end.searcher.state_dict()))
    resumed = WidthSearch(network(), epochs=3)
    resumed.load_state_dict(states[0])
    again = resumed.search(*loaders(), seed=0)
    for key, value in whole.supernet.state_dict().items():
        assert torch.equal(value, resumed.supernet.state_dict()[key]), key
    assert result.epochs == again.epochs


def test_gates_are_the_architecture_and_the_rest_are_weights():
    net = GatedNetwork(network())
    alphas, weights = ({id(p) for p in some} for some in (net.arch_parameters(), net.weight_parameters()))
    assert len(alphas) == 2
    assert not alphas & weights
    assert alphas | weights == {id(p) for p in net.parameters()}
    assert gates(GatedNetwork(copy.deepcopy(net.network)).network).keys() == gates(net.network).keys()


def test_the_record_is_plain_data():
    result = WidthSearch(network(), l1=0.3, epochs=1).search(*loaders(), seed=0)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["config"]["l1"] == 0.3
    assert data["config"]["method"]["name"] == "RelaxedSplit"
    assert data["genotype"]["total"] == {"features.1.gate": 4, "features.5.gate": 6}
    assert "features.1.gate" in str(result.genotype)
    assert len(result.genotype.plot().patches) == 2


def test_refusals():
    with pytest.raises(ValueError, match="must hold a BatchNorm2d"):
        WidthSearch(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="l1 must be >= 0"):
        WidthSearch(network(), l1=-1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"selector": PerturbationSelector()}, TypeError, "no argument 'selector'; widths are read off the gates"),
        ({"alpha_betas": (0.5, 0.9)}, TypeError, "no argument 'alpha_betas'; gates move by proximal steps"),
        ({"alpha_weight_decay": 1e-3}, TypeError, "no argument 'alpha_weight_decay'; gates are penalised by l1"),
        ({"penalty": 1.0}, TypeError, "WidthSearch has no argument 'penalty'; choose one of alpha_lr, beta, clip"),
        (
            {"objective": TaskLoss() + CostPenalty("log", {("conv", 1): 2.0})},
            ValueError,
            "a CostPenalty with a table needs a supernet with expected_cost, which GatedNetwork has not",
        ),
        (
            {"objective": TaskLoss() + CostPenalty("log", ExpectedLatency({}))},
            ValueError,
            "ExpectedLatency needs a supernet with priced, which GatedNetwork has not",
        ),
    ],
)
def test_what_has_no_meaning_for_widths_says_why(options, error, message):
    with pytest.raises(error, match=message):
        WidthSearch(network(), **options)


def test_a_penalty_may_be_a_function_of_the_gated_network():
    def kept(net):
        return sum(alpha.abs().sum() for alpha in net.arch_parameters())

    search = WidthSearch(
        network(), objective=TaskLoss() + CostPenalty("add_power", kept, alpha=3.0, beta=1.0), epochs=1
    )
    free = WidthSearch(network(), epochs=1)
    sums = [float(kept(made.supernet)) for made in (search, free) if made.search(*loaders(), seed=0)]
    assert sums[0] < sums[1]
