import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.search import spaces
from netwright.search.genotype import DARTS_V1, DARTS_V2, DASS_99, CellGenotype, CellsGenotype
from netwright.search.spaces.network import AuxiliaryHead, drop_path
from netwright.seeding import seeded, stream


def _parameters(module):
    return sum(p.numel() for p in module.parameters())


def _operations(module, shape):
    """Multiply-adds of the convolutions in millions, and everything else fvcore counts, on the meta device."""
    convolutions = other = 0

    def count(layer, inputs, output):
        nonlocal convolutions, other
        if isinstance(layer, nn.Conv2d):
            convolutions += output[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.BatchNorm2d):
            other += 2 * output[0].numel()
        else:
            other += layer.weight.numel()

    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear)):
            layer.register_forward_hook(count)
    last = []
    module.cells[-1].register_forward_hook(lambda cell, inputs, output: last.append(output[0].numel()))
    module.to("meta").eval()(torch.empty(1, *shape, device="meta"))
    return convolutions / 1e6, (other + last[0]) / 1e6


@pytest.mark.parametrize(
    ("genotype", "parameters", "macs"),
    [(DARTS_V1, 3_169_414, 500.98), (DARTS_V2, 3_349_342, 528.35)],
    ids=["v1", "v2"],
)
def test_published_cifar_networks(genotype, parameters, macs):
    network = genotype.build(channels=36, cells=20)
    assert _parameters(network) == parameters
    assert _operations(network, (3, 32, 32))[0] == pytest.approx(macs, abs=0.006)


@pytest.mark.parametrize(
    ("channels", "cells", "parameters", "flops"),
    [
        (30, 16, 988_510, 160.37),
        (36, 20, 1_713_790, 278.40),
        (86, 12, 5_379_052, 975.61),
        (108, 14, 10_568_782, 1746.87),
    ],
    ids=["tiny", "small", "medium", "large"],
)
def test_published_dass_networks(channels, cells, parameters, flops):
    """The published figures are fvcore's totals: batch norms (two each value), linear layer and last pooling too."""
    network = DASS_99.build(channels=channels, cells=cells)
    assert _parameters(network) == parameters
    assert sum(_operations(network, (3, 32, 32))) == pytest.approx(flops, abs=0.006)


@pytest.mark.parametrize(
    ("genotype", "parameters", "macs"), [(DARTS_V1, 4_510_432, 505.1), (DARTS_V2, 4_718_752, 529.1)], ids=["v1", "v2"]
)
def test_published_imagenet_networks(genotype, parameters, macs):
    network = genotype.build(num_classes=1000, channels=48, cells=14, stem="imagenet")
    assert _parameters(network) == parameters
    assert _operations(network, (3, 224, 224))[0] == pytest.approx(macs, abs=0.06)


def test_imagenet_counts_agree_with_an_independent_package():
    models = pytest.importorskip("pytorchcv.models.darts")
    network = DARTS_V2.build(num_classes=1000, channels=48, cells=14, stem="imagenet")
    assert _parameters(models.darts()) == _parameters(network)


def test_the_auxiliary_head_adds_the_published_parameters():
    plain, with_head = (DARTS_V2.build(channels=36, cells=20, auxiliary=flag) for flag in (False, True))
    head = 576 * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10
    assert _parameters(with_head) - _parameters(plain) == head
    assert with_head.auxiliary_cell == 13


@pytest.mark.parametrize(("size", "stride"), [(8, 3), (7, 2)])
def test_the_auxiliary_head_pools_as_published(size, stride):
    head = AuxiliaryHead(3, 4).eval()
    x = torch.randn(2, 3, size, size, generator=stream(0, "x"))
    pooled = functional.avg_pool2d(functional.relu(x), 5, stride, count_include_pad=False)
    assert pooled.shape[-2:] == (2, 2)
    torch.testing.assert_close(head(x), head.classifier(head.features(pooled)))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (2, 2), (3, 1), (5, 7), (14, 14), (33, 4)])
def test_the_auxiliary_head_sees_every_pixel_at_any_size(size):
    head = AuxiliaryHead(2, 3).eval()
    x = torch.rand(1, 2, *size, generator=stream(0, "x")).add(0.5).requires_grad_()
    seen = []
    head.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert head(x).shape == (1, 3)
    assert seen[0].shape == (1, 2, 2, 2)
    (gradient,) = torch.autograd.grad(seen[0].sum(), x)
    assert (gradient > 0).all()


def test_logits_are_returned_in_training_and_evaluation_alike():
    network = spaces.get("micro-darts").random(stream(0, "g")).build(1, 4, auxiliary=True)
    x = torch.randn(2, 1, 9, 9, generator=stream(0, "x"))
    assert network(x).shape == (2, 4)
    logits, auxiliary = network.eval().forward_with_auxiliary(x)
    torch.testing.assert_close(logits, network(x))
    assert auxiliary.shape == (2, 4)
    assert not torch.allclose(logits, auxiliary)
    torch.testing.assert_close(network.classifier(network.features(x)), logits)
    with pytest.raises(ValueError, match="auxiliary=True"):
        DARTS_V1.build(channels=2, cells=1).forward_with_auxiliary(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 1, 1), (1, 7, 9), (1, 28, 28)])
@pytest.mark.parametrize("stem", ["cifar", "strided", "imagenet"])
@pytest.mark.parametrize("cells", [1, 3, 4])
def test_any_size_goes_through(cells, stem, shape):
    network = DASS_99.build(1, 3, channels=4, cells=cells, stem=stem, auxiliary=True, drop_path=0.2)
    logits, auxiliary = network.forward_with_auxiliary(torch.randn(2, *shape, generator=stream(0, "x")))
    assert logits.isfinite().all()
    (logits + auxiliary).sum().backward()


@pytest.mark.parametrize(("stem", "side"), [("cifar", 32), ("strided", 16), ("imagenet", 4)])
def test_stems_divide_the_resolution(stem, side):
    network = DARTS_V1.build(channels=4, cells=1, stem=stem)
    s0, s1 = network.stem(torch.zeros(2, 3, 32, 32))
    assert s1.shape[-2:] == (side, side)
    assert s0.shape[-1] == (2 * side if stem == "imagenet" else side)
    supernet = spaces.get("darts").supernet(channels=4, cells=2, stem=stem)
    assert supernet(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_a_cell_by_hand():
    """Reduction cell of one node: the max pool of state 0 plus the skip (FactorizedReduce) of state 1."""
    cell = CellGenotype((("max_pool_3x3", 0), ("skip_connect", 1)))
    genotype = CellsGenotype(cell, cell, space="one-node")
    space = spaces.Space("one-node", spaces.MICRO_PRIMITIVES, nodes=1, channels=4, cells=1, shared=True)
    network = space.build(genotype, 2, 3, seed=0).eval()
    x = torch.randn(2, 2, 5, 6, generator=stream(0, "x"))
    built = network.cells[0]
    s = network.stem.layers(x)
    a, b = built.inputs.before(s), built.inputs.previous(s)
    y = functional.max_pool2d(a, 3, 2, 1) + built.operations[1](b)
    torch.testing.assert_close(network(x), network.classifier(y.mean((2, 3))))
    assert y.shape == (2, 8, 3, 3)


def test_concat_may_leave_nodes_out():
    ops = (("sep_conv_3x3", 0), ("skip_connect", 1), ("skip_connect", 0), ("skip_connect", 2))
    genotype = CellsGenotype(CellGenotype(ops, (3,)), CellGenotype(ops, (3,)), space="micro-darts-2-shared")
    assert genotype.build(1, 3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert genotype.build(1, 3).classifier.in_features == 16


def test_drop_path_keeps_the_mean_and_drops_whole_samples():
    with seeded(0, "drop"):
        y = drop_path(torch.ones(20_000, 2, 1, 3), 0.3)
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert torch.equal(y, y[:, :1, :, :1].expand_as(y))
    assert y.mean() == pytest.approx(1.0, abs=5 * (0.3 / 0.7 / 20_000) ** 0.5)


def test_drop_path_acts_in_training_only_and_follows_the_attribute():
    ops = (("sep_conv_3x3", 0), ("dil_conv_3x3", 1), ("max_pool_3x3", 0), ("sep_conv_3x3", 2))
    genotype = CellsGenotype(CellGenotype(ops), CellGenotype(ops), space="micro-darts-2-shared")
    network = genotype.build(1, 3, seed=0, drop_path=0.5)
    x = torch.randn(8, 1, 8, 8, generator=stream(0, "x"))
    outputs = []
    for p in (0.5, 0.5, 0.0, 0.0):
        network.drop_path = p
        outputs.append(network(x))
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], outputs[3])
    assert not torch.allclose(outputs[1], outputs[2])
    network.drop_path = 0.5
    network.eval()
    torch.testing.assert_close(network(x), network(x))
    for p in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"drop_path must lie in \[0, 1\)"):
            network.drop_path = p


def test_identity_edges_are_never_dropped_but_strided_skips_are():
    ops = (("skip_connect", 0), ("skip_connect", 1), ("skip_connect", 0), ("skip_connect", 2))
    genotype = CellsGenotype(CellGenotype(ops), CellGenotype(ops), space="micro-darts-2-shared")
    normal = genotype.build(1, 3, seed=0, drop_path=0.9).cells[0]
    s = torch.randn(8, 24, 8, 8, generator=stream(0, "x"))
    torch.testing.assert_close(normal(s, s, 0.9), normal(s, s, 0.0))
    reduction = genotype.build(1, 3, seed=0).cells[1]
    s1 = torch.randn(8, 16, 8, 8, generator=stream(0, "y"))
    assert not torch.allclose(reduction(s, s1, 0.9), reduction(s, s1, 0.0))


def test_seeds():
    first, again, other = (DARTS_V1.build(channels=4, cells=2, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


def test_processing_order_in_memory_does_not_change_results():
    network = DARTS_V2.build(channels=4, cells=3, seed=0).eval()
    x = torch.randn(2, 3, 9, 8, generator=stream(0, "x"))
    torch.testing.assert_close(network(x), network(x.contiguous(memory_format=torch.channels_last)))
    both = torch.func.vmap(network)(torch.stack([x, x + 1]))
    torch.testing.assert_close(both[1], network(x + 1), atol=1e-5, rtol=1e-4)
