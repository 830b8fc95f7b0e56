"""Supernets of superkernels: against the largest network, against derived networks, costs and the protocol."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.cost import count
from netwright.nn.batchnorm import synchronise
from netwright.search import spaces
from netwright.search.latency import CONSTANT, ExpectedLatency, operations_of, predict
from netwright.search.objective import TaskLoss
from netwright.search.selection import ArgmaxSelector, ThresholdSelector
from netwright.search.spaces.chain import SKIP, Block, mbconv_space
from netwright.search.spaces.choices import ChoiceSpace
from netwright.search.spaces.fbnet import fbnet_space
from netwright.search.spaces.single_path import MNASNET_MACRO, SINGLE_PATH, SINGLE_PATH_NET, single_path_space
from netwright.search.superkernel_supernet import SuperKernelSupernet
from netwright.seeding import seeded, stream

CHAIN = spaces.get("micro-chain")
SHAPE = (1, 8, 8)
OFF = 99.0


def images(number=6, shape=SHAPE):
    draw = stream(0, "images")
    return torch.rand(number, *shape, generator=draw), torch.randint(3, (number,), generator=draw)


def supernet(space=CHAIN, seed=0, **options):
    return SuperKernelSupernet(space, 1, 3, seed=seed, channels=4, **options)


def table(net):
    return {key: 0.5 + 0.1 * number for number, key in enumerate(net.operations(SHAPE))} | {CONSTANT: 0.25}


def perturbed(net):
    """With shifts in the norms that are not zero, as after training."""
    draw = stream(0, "beta")
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.normal_(generator=draw)
    return net


def sliced(net, genotype):
    """The derived network with the supernet's weights where it has them."""
    with seeded(0, "derived"):
        small = genotype.build(1, 3, channels=4)
    for ours, theirs in zip(net.network, small, strict=True):
        if not hasattr(ours, "superkernel"):
            theirs.load_state_dict(ours.state_dict())
        elif not isinstance(theirs, nn.Identity):
            *before, depthwise, norm, _, project, last = theirs.conv
            c, k = depthwise.weight.shape[0], depthwise.weight.shape[-1]
            margin = (5 - k) // 2
            for part, source in zip(before, ours.before, strict=True):
                part.load_state_dict({name: v[:c] if v.ndim else v for name, v in source.state_dict().items()})
            depthwise.weight.data.copy_(ours.superkernel.weight[:c, :, margin : 5 - margin, margin : 5 - margin])
            norm.load_state_dict({name: v[:c] if v.ndim else v for name, v in ours.norm.state_dict().items()})
            project.weight.data.copy_(ours.project.weight[:, :c])
            last.load_state_dict(ours.last.state_dict())
    return small


# The largest network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [CHAIN, SINGLE_PATH], ids=lambda space: space.name)
def test_it_is_the_largest_network_and_three_thresholds_a_layer(space):
    net = SuperKernelSupernet(space, 1, 3, seed=4)
    names = {key: max(n for n in each if n != SKIP) for key, each in space.choices().items()}
    largest = space.build(space.genotype(names), 1, 3, seed=4)
    layers = len(space.choices())
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in largest.parameters()) + 3 * layers
    assert net.derive() == space.genotype(names)
    x = images(2, (1, 64, 64))[0].double()
    for training in (True, False):
        both = (network.double().train(training)(x) for network in (net, largest))
        torch.testing.assert_close(*both, atol=1e-9, rtol=1e-9)
    assert [p.shape for p in net.arch_parameters()] == [(3,)] * layers
    assert len(net.weight_parameters()) == len(list(largest.parameters()))


def test_derived_networks_compute_what_the_supernet_does():
    net = perturbed(supernet())
    x = images()[0]
    for number in range(4):
        genotype = CHAIN.random(stream(number, "genotype"))
        net.adopt(genotype)
        assert net.derive() == genotype
        small = sliced(net, genotype)
        for training in (True, False):
            torch.testing.assert_close(net.train(training)(x), small.train(training)(x), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("option", ["exact_skip", "exact_mask"])
def test_the_published_layers_leak_what_is_off(option):
    """d50 = 0 leaves project(relu(beta)) + beta', channels that are off leave relu(beta): both are told by hand."""
    genotype = CHAIN.genotype(dict.fromkeys(CHAIN.choices(), "k5_e2") | {"layer_1": SKIP})
    net = perturbed(supernet(exact_mask=False, exact_skip=option == "exact_mask")).eval()
    net.adopt(genotype)
    layer = net.keyed_choices()["layer_1" if option == "exact_skip" else "layer_0"]
    layer.decided = net.decide().at(list(net.arch).index(layer.key))
    c = layer.superkernel.weight.shape[0]
    x = torch.rand(1, layer.before[0].in_channels, 6, 6, generator=stream(1, "x"))
    beta, kernel = layer.norm.bias, layer.superkernel.masked(layer.decided)
    inside = functional.conv2d(layer.before(x), kernel, None, layer.stride, 2, 1, c)
    inside = inside / (1 + layer.norm.eps) ** 0.5 + beta[:, None, None]
    y = layer.last(functional.conv2d(inside.relu(), layer.project.weight))
    found = layer(x)
    torch.testing.assert_close(found, y if layer.shortcut is None else x + y, atol=1e-5, rtol=1e-5)
    layer.exact_skip = layer.exact_mask = True
    assert (layer(x) - found).abs().max() > 1e-2
    if option == "exact_skip":
        assert torch.equal(layer(x), x)


def test_without_the_mask_a_norm_hides_the_factor_of_a_ratio_from_the_task():
    slopes = {}
    for exact in (True, False):
        net = perturbed(supernet(exact_mask=exact).double()).train()
        x, y = images()
        decided = net.decide()
        layer = net.keyed_choices()["layer_0"]
        factor = torch.ones((), dtype=torch.float64, requires_grad=True)
        masks = torch.stack([factor.new_ones(()), factor])
        layer.decided = decided.at(0)._replace(channels=masks, masks=masks)
        loss = functional.cross_entropy(net.network(x.double()), y)
        slopes[exact] = abs(torch.autograd.grad(loss, factor)[0].item())
    assert slopes[False] < 0.05 * slopes[True]


def test_indicators_dropped_in_a_pass_are_seen_by_that_pass_alone():
    net = supernet().train()
    net.indicator_dropout = 0.4
    x = images()[0]
    with seeded(1, "draws"):
        net.redraw("both", 6)
    drawn = net.decide(drawn=True).indicators
    free = torch.tensor([layer.skippable for layer in net.keyed_choices().values()])
    assert (drawn[~free, 1] == 1).all()
    assert sorted({*drawn[free].flatten().tolist()}) == pytest.approx([0.0, 1 / 0.6])
    assert not torch.allclose(net(x), supernet().train()(x), atol=1e-3)
    assert torch.equal(net(x), net(x))
    evaluated = net.eval()(x)
    assert all(torch.equal(d, torch.ones(3)) for d in net.indicators().values())
    assert net.expected_cost(table(net), SHAPE).item() == pytest.approx(
        supernet().expected_cost(table(net), SHAPE).item()
    )
    net.indicator_dropout = 0.0
    net.redraw("both", 6)
    assert torch.equal(net(x), evaluated)
    net.train()
    torch.testing.assert_close(net(x), supernet().train()(x), atol=0, rtol=0)


# Costs ----------------------------------------------------------------------------------------------------------------


def test_it_prices_what_the_supernet_of_several_paths_does():
    net, paths = supernet(), CHAIN.supernet(1, 3, channels=4)
    ours, theirs = net.operations(SHAPE), paths.operations(SHAPE)
    assert list(ours) == list(theirs)
    for key, (module, shape) in ours.items():
        other, size = theirs[key]
        assert shape == size
        assert count(module, shape).macs == count(other, size).macs


def test_costs_of_decisions_are_those_of_the_table_and_of_the_model():
    net = supernet()
    costs = table(net)
    for number in range(5):
        genotype = CHAIN.random(stream(number, "genotype"))
        net.adopt(genotype)
        small = genotype.build(1, 3, channels=4)
        expected = predict(CHAIN, genotype, costs, SHAPE, channels=4)
        latency = ExpectedLatency(costs)
        assert latency.of(_after_a_pass(net), net.derive()) == pytest.approx(expected, rel=1e-6)
        modelled = 0.25
        for key in operations_of(small, SHAPE).values():
            if key is not None:
                block, rest = Block.of(key[0]), key[1:]
                rows = {(k, e): costs[(Block(k, e).name, *rest)] for k in (3, 5) for e in (2, 4)}
                modelled += rows[5, block.expansion] * rows[block.kernel, 4] / rows[5, 4]
        assert latency(net).item() == pytest.approx(modelled, rel=1e-6)


def _after_a_pass(net):
    net(images(2)[0])
    return net


def test_the_gradient_of_the_cost_falls_with_larger_thresholds():
    net = supernet()
    grads = torch.autograd.grad(net.expected_cost(table(net), SHAPE), net.arch_parameters())
    skippable = [layer.skippable for layer in net.keyed_choices().values()]
    assert skippable == [False, True] * 3
    for grad, may in zip(grads, skippable, strict=True):
        assert (grad[[0, 2]] < 0).all()
        assert (grad[1] < 0) == may


def test_gaps_in_tables_are_told():
    net = supernet()
    costs = table(net)
    key = next(k for k in costs if k[0] == "k3_e4")
    with pytest.raises(KeyError, match=r"the table has no cost for .*k3_e4"):
        net.expected_cost({k: v for k, v in costs.items() if k != key}, SHAPE)
    with pytest.raises(ValueError, match=r"times must be > 0 and finite, got 0.0, layer 'layer_0'"):
        net.expected_cost(costs | {key: 0.0}, SHAPE)
    with pytest.raises(ValueError, match="shape must be given before the first forward pass"):
        net.expected_cost(costs)


# Protocol -------------------------------------------------------------------------------------------------------------


def test_mixing_weights_are_one_for_the_decision():
    net = supernet()
    for number in range(3):
        genotype = CHAIN.random(stream(number, "genotype"))
        net.adopt(genotype)
        for key, weights in net.mixing_weights().items():
            names = net.keyed_choices()[key].names
            assert dict(zip(names, weights.tolist(), strict=True)) == {
                name: float(name == dict(genotype.decisions)[key]) for name in names
            }
        assert ArgmaxSelector().select(net) == ThresholdSelector().select(net) == genotype


def test_selectors_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="ThresholdSelector must have a supernet of superkernels"):
        ThresholdSelector().select(CHAIN.supernet(1, 3, channels=4))
    net = supernet()
    net.arch["layer_2"].data[0] = float("nan")
    with pytest.raises(FloatingPointError, match="thresholds and weights must be finite"):
        net.derive()
    with pytest.raises(ValueError, match="superkernels has no gates"):
        net.set_gate(None)


def test_states_and_copies():
    net, other = supernet(), supernet(seed=1)
    net.adopt(CHAIN.random(stream(5, "genotype")))
    assert {name for name in net.state_dict() if "threshold" in name or name.startswith("arch")} == {
        f"arch.layer_{i}" for i in range(6)
    }
    other.load_state_dict(net.state_dict())
    twin = copy.deepcopy(net)
    x = images()[0]
    for same in (other, twin):
        assert same.derive() == net.derive()
        torch.testing.assert_close(same.eval()(x), net.eval()(x), atol=0, rtol=0)
    net.arch["layer_0"].data.fill_(OFF)
    assert twin.derive() != net.derive()
    assert net.double().derive().operations[0] == "k3_e2"
    assert synchronise(twin)(x).shape == (6, 3)


def test_every_parameter_but_dead_thresholds_gets_a_gradient():
    net = supernet().train()
    net.redraw("both", 6)
    loss = TaskLoss()(net, images(), "both") + net.expected_cost(table(net)).log()
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    assert all(grad is not None for grad in grads)
    by_name = dict(zip([name for name, _ in net.named_parameters()], grads, strict=True))
    assert by_name["arch.layer_0"][1] == 0
    assert all(by_name[f"arch.layer_{i}"].count_nonzero() == (2 if i % 2 == 0 else 3) for i in range(6))


def test_three_kernels_in_one_supernet():
    net = SuperKernelSupernet(mbconv_space("seven", stem=8, width=(8, 8), depth=(1, 1), stride=(1, 1)), 1, 3)
    net.arch["layer_0"].data.copy_(torch.tensor([0.0, OFF, 0.0, OFF]))
    assert net.derive().operations == ("k5_e3", "k7_e6")
    assert net(images()[0]).shape == (6, 3)


def ragged(choose, in_channels, num_classes):
    from netwright.nn.mbconv import MBConv

    blocks = {f"k{k}_e2": lambda k=k: MBConv(in_channels, 4, kernel_size=k, expansion=2) for k in (3, 5)}
    more = {f"k{k}_e2": lambda k=k: MBConv(4, 4, kernel_size=k, expansion=2) for k in (3, 5, 7)}
    return nn.Sequential(
        choose("a", blocks), choose("b", more), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
    )


def plain(choose, in_channels, num_classes):
    blocks = {f"k{k}_e1": lambda k=k: nn.Conv2d(in_channels, 4, k, padding=k // 2) for k in (3, 5)}
    return nn.Sequential(choose("a", blocks), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (ChoiceSpace("ragged", ragged), "all layers must choose among the same kernels and ratios"),
        (ChoiceSpace("plain", plain), "choice 'a' must be among inverted residual blocks, got Conv2d"),
        (fbnet_space(name="grouped"), "must offer all pairs of kernels and expansions, got k3_e1, k3_e1_g2"),
        (
            fbnet_space(blocks=("k3_e1", "k3_e3"), name="projected", skip_projection=True),
            "must be skipped by the identity, got another module",
        ),
    ],
)
def test_spaces_without_superkernels_are_refused(space, message):
    with pytest.raises(ValueError, match=message):
        SuperKernelSupernet(space, 1, 3)


# The published network ------------------------------------------------------------------------------------------------


def test_the_published_network():
    network = SINGLE_PATH_NET.build(3, 1000)
    assert sum(p.numel() for p in network.parameters()) == 4_421_616
    report = count(network, (3, 224, 224))
    assert (report.macs - 1280 * 1000) / 1e6 == pytest.approx(332.19, abs=0.005)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


def test_the_published_network_is_that_of_other_packages():
    timm, pytorchcv = pytest.importorskip("timm"), pytest.importorskip("pytorchcv.model_provider")
    ours = SINGLE_PATH_NET.build(3, 1000).eval()

    def shapes(network):
        return [tuple(m.weight.shape) for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]

    theirs = timm.create_model("spnasnet_100").eval()
    assert shapes(theirs) == shapes(ours)
    assert sorted(shapes(pytorchcv.get_model("spnasnet"))) == sorted(shapes(ours))
    own = [v for name, v in theirs.state_dict().items() if "num_batches" not in name]
    values = iter(own)
    ours.load_state_dict({n: v if "num_batches" in n else next(values) for n, v in ours.state_dict().items()})
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    x = torch.rand(1, 3, 64, 64, generator=stream(0, "x"))
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_the_published_space():
    choices = SINGLE_PATH.choices()
    assert len(choices) == 20
    assert [len(names) for names in choices.values()] == [4, 5, 5, 5] * 5
    assert spaces.get("single-path") == SINGLE_PATH
    assert sum(stage.layers for stage in MNASNET_MACRO) == 22
    assert single_path_space(expansions=(2, 4, 6)).choices()["layer_1"][:3] == ("k3_e2", "k3_e4", "k3_e6")
