import collections
import copy
import dataclasses
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright import search
from netwright.search import fbnet_space, single_path_space, spaces
from netwright.search.genotype import DARTS_V1, Genotype
from netwright.search.spaces import chain
from netwright.search.spaces.operations import OPERATIONS, FactorizedReduce, operation
from netwright.seeding import stream


def test_every_public_name_and_method_resolves():
    for name in search.__all__:
        assert getattr(search, name) is not None
    for name in search.METHODS:
        kind = search.method(name)
        assert isinstance(kind, type)
        assert kind.__name__ in search.__all__
    with pytest.raises(ValueError, match=f"search must be one of {', '.join(search.METHODS)}, got 'rl'"):
        search.method("rl")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = search.nothing


def test_spaces_by_name():
    assert set(spaces.SPACES) >= {"darts", "micro-darts", "micro-darts-2", "micro-darts-shared", "micro-darts-2-shared"}
    with pytest.raises(ValueError, match="did you mean darts"):
        spaces.get("dart")
    darts = spaces.get("darts")
    assert spaces.register(darts) is darts
    with pytest.raises(ValueError, match="another space"):
        spaces.register(dataclasses.replace(darts, nodes=3))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nodes", 0),
        ("channels", 0),
        ("cells", 0),
        ("primitives", ("none",)),
        ("primitives", ("noise", "noise")),
        ("primitives", ("skip_connect", "foo")),
    ],
)
def test_impossible_spaces_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(spaces.get("darts"), **{field: value})


def test_random_genotypes_are_uniform():
    """Chi-squared over all 768 genotypes of the table's space; five standard deviations."""
    space = spaces.get("micro-darts-2-shared")
    assert space.size == 4**2 * 3 * 4**2 == 768
    generator, draws = stream(0, "uniform"), 768 * 12
    counts = collections.Counter(space.random(generator) for _ in range(draws))
    assert len(counts) == space.size
    chi2 = sum((n - 12) ** 2 / 12 for n in counts.values())
    assert abs(chi2 - 767) < 5 * math.sqrt(2 * 767)


def test_random_genotypes_belong_to_their_space():
    for space in spaces.SPACES.values():
        genotype = space.random(stream(1, "random"))
        assert genotype.validate().space == space.name
        if isinstance(space, spaces.Space):
            assert (genotype.normal == genotype.reduce) == space.shared
        assert space.genotype(space.decisions(genotype)) == genotype


def test_size_of_the_darts_space():
    cell = 7**8 * math.comb(2, 2) * math.comb(3, 2) * math.comb(4, 2) * math.comb(5, 2)
    assert spaces.get("darts").size == cell**2


def test_decisions_make_a_genotype():
    space = spaces.get("micro-darts-2-shared")
    decisions = {"normal_1_2": "skip_connect", "normal_0_2": "sep_conv_3x3"}
    decisions |= {"normal_0_3": "dil_conv_3x3", "normal_2_3": "max_pool_3x3"}
    genotype = space.genotype(decisions)
    assert genotype.normal.ops == (
        ("sep_conv_3x3", 0),
        ("skip_connect", 1),
        ("dil_conv_3x3", 0),
        ("max_pool_3x3", 2),
    )
    with pytest.raises(ValueError, match="normal node 1 must keep 2 edges, got 3"):
        space.genotype(decisions | {"normal_1_3": "skip_connect"})
    with pytest.raises(ValueError, match="reduce_0_2"):
        space.genotype(decisions | {"reduce_0_2": "skip_connect"})
    with pytest.raises(ValueError, match="must be one of"):
        space.genotype(decisions | {"normal_0_2": "none"})


def test_reduction_cells():
    darts, micro = spaces.get("darts"), spaces.get("micro-darts")
    assert [sorted(darts.reduction_cells(n)) for n in (1, 3, 8, 20)] == [[0], [1, 2], [2, 5], [6, 13]]
    assert [sorted(micro.reduction_cells(n)) for n in (1, 3, 4)] == [[0], [1], [2]]
    with pytest.raises(ValueError, match="cells must be >= 1, got 0"):
        darts.reduction_cells(0)


def test_restricted_primitives_give_a_space_of_ones_own():
    space = dataclasses.replace(
        spaces.get("micro-darts"), name="test-s2", primitives=("skip_connect", "sep_conv_3x3"), shared=True
    )
    spaces.register(space)
    try:
        supernet = space.supernet(1, 3, channels=2)
        assert {len(alpha) for alpha in supernet.arch_parameters()} == {2}
        assert supernet.derive().build(1, 3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    finally:
        del spaces.SPACES["test-s2"]


S1 = {
    "normal_0_2": ("skip_connect", "sep_conv_3x3"),
    "normal_1_2": ("none", "skip_connect", "max_pool_3x3"),
    "normal_0_3": ("dil_conv_3x3",),
    "normal_1_3": ("none", "noise"),
    "normal_2_3": ("avg_pool_3x3", "sep_conv_5x5", "skip_connect"),
}


@pytest.fixture
def own():
    """A space of two nodes whose edges have one to three operations besides none."""
    space = spaces.register(spaces.Space("test-s1", S1, nodes=2, channels=2, cells=3, reductions="middle", shared=True))
    yield space
    del spaces.SPACES["test-s1"]


def test_edges_may_have_operations_of_their_own(own):
    supernet = own.supernet(1, 3, seed=0)
    assert {key: choice.names for key, choice in supernet.keyed_choices().items()} == S1
    assert {key: len(alpha) for key, alpha in supernet.arch.items()} == {key: len(names) for key, names in S1.items()}
    assert set(own.choosable) == {name for names in S1.values() for name in names} - {"none"}
    genotype = supernet.derive()
    assert genotype.build(1, 3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)
    assert Genotype.from_json(genotype.to_json()) == genotype
    assert supernet.space is own
    assert copy.deepcopy(supernet).space == own
    assert hash(own) == hash(dataclasses.replace(own))


def test_random_genotypes_are_uniform_where_edges_differ(own):
    """Chi-squared over all genotypes, enumerated from the mapping; five standard deviations."""
    node = {(a, b): 1 for a in S1["normal_0_2"] for b in S1["normal_1_2"][1:]}
    last = [
        ((a, i), (b, j))
        for i, j in itertools.combinations(range(3), 2)
        for a in S1[f"normal_{i}_3"]
        for b in S1[f"normal_{j}_3"]
        if "none" not in (a, b)
    ]
    assert own.size == len(node) * len(last) == 4 * (1 + 3 + 3)
    generator, draws = stream(0, "uniform"), own.size * 200
    counts = collections.Counter(own.random(generator) for _ in range(draws))
    assert {genotype.normal.ops[2:] for genotype in counts} == set(last)
    chi2 = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert len(counts) == own.size
    assert abs(chi2 - (own.size - 1)) < 5 * math.sqrt(2 * (own.size - 1))


def test_random_genotypes_of_equal_edges_are_drawn_as_ever():
    """Two spaces, one of which says the same for every edge, draw the same."""
    space = spaces.get("micro-darts-2-shared")
    same = {key: space.primitives for keys in space.incoming().values() for key in keys}
    told = dataclasses.replace(space, primitives=same)
    assert told.size == space.size
    draws = [[each.random(stream(0, "random", n)) for n in range(20)] for each in (space, told)]
    assert draws[0] == draws[1]


def test_operations_of_another_edge_are_refused(own):
    decisions = {"normal_0_2": "sep_conv_3x3", "normal_1_2": "skip_connect"}
    decisions |= {"normal_0_3": "dil_conv_3x3", "normal_2_3": "skip_connect"}
    assert own.decisions(own.genotype(decisions)) == decisions
    with pytest.raises(ValueError, match=r"edge \(sep_conv_3x3, 0\) into state 3 in normal must be one of dil"):
        own.genotype(decisions | {"normal_0_3": "sep_conv_3x3"})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"normal_0_2": ("none",)}, "primitives of edge 'normal_0_2' must be different names, one besides 'none'"),
        ({"normal_0_2": ("skip", "noise")}, "primitives of edge 'normal_0_2' must be of .* got 'skip'"),
        ({"reduce_0_2": ("noise",)}, "primitives must name edges of the space, got 'reduce_0_2'"),
        ({"normal_0_2": None}, "primitives must hold every edge of the space, missing normal_0_2"),
    ],
)
def test_impossible_mappings_are_refused(changes, told):
    mapping = {key: names for key, names in (S1 | changes).items() if names is not None}
    with pytest.raises(ValueError, match=told):
        spaces.Space("test-s1", mapping, nodes=2, channels=2, cells=3, shared=True)


def test_operations_may_be_added(monkeypatch):
    monkeypatch.setitem(OPERATIONS, "mean", lambda c, stride, search: nn.AvgPool2d(stride, stride))
    space = spaces.Space("test-own", ("mean", "skip_connect"), nodes=1, channels=2, cells=1)
    assert space.supernet(1, 3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (1, 40), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("name", spaces.DARTS_PRIMITIVES)
def test_every_operation_keeps_channels_and_divides_the_size(name, search, stride, size):
    y = operation(name, 4, stride, search=search)(torch.randn(2, 4, *size))
    assert y.shape == (2, 4, *(math.ceil(n / stride) for n in size))


def test_operations_are_the_papers():
    def convolutions(name, **options):
        return [
            (c.kernel_size[0], c.stride[0], c.padding[0], c.dilation[0], c.groups, c.bias is None)
            for c in operation(name, 6, 2, **options).modules()
            if isinstance(c, nn.Conv2d)
        ]

    point = (1, 1, 0, 1, 1, True)
    assert convolutions("sep_conv_5x5") == [(5, 2, 2, 1, 6, True), point, (5, 1, 2, 1, 6, True), point]
    assert convolutions("dil_conv_3x3") == [(3, 2, 2, 2, 6, True), point]
    assert convolutions("dil_conv_5x5") == [(5, 2, 4, 2, 6, True), point]
    pool = operation("avg_pool_3x3", 1)
    assert pool(torch.ones(1, 1, 3, 3)).eq(1).all()
    assert [type(m) for m in operation("max_pool_3x3", 1, search=True)] == [nn.MaxPool2d, nn.BatchNorm2d]
    assert isinstance(operation("skip_connect", 2), nn.Identity)
    assert operation("none", 2, 2)(torch.ones(1, 2, 5, 5)).eq(0).all()


def test_factorized_reduce_by_hand():
    """On even sizes the published form; on odd sizes the shifted branch ends in zeros."""
    module = FactorizedReduce(1, 2).eval()
    halving = module.body[0]
    with torch.no_grad():
        halving.even.weight.fill_(1.0)
        halving.odd.weight.fill_(1.0)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert torch.equal(halving(x)[0, 0], x[0, 0, ::2, ::2])
    assert torch.equal(halving(x)[0, 1], x[0, 0, 1::2, 1::2])
    odd = halving(torch.arange(1.0, 10.0).reshape(1, 1, 3, 3))[0]
    assert torch.equal(odd[0], torch.tensor([[1.0, 3.0], [7.0, 9.0]]))
    assert torch.equal(odd[1], torch.tensor([[5.0, 0.0], [0.0, 0.0]]))
    mixed = halving(torch.arange(1.0, 13.0).reshape(1, 1, 3, 4))[0]
    assert torch.equal(mixed[1], torch.tensor([[6.0, 8.0], [0.0, 0.0]]))
    assert FactorizedReduce(3, 5)(torch.ones(2, 3, 4, 4)).shape == (2, 5, 2, 2)


@pytest.mark.parametrize("size", [(8, 8), (8, 7), (7, 8), (7, 7)])
def test_gradients_over_few_channels_are_those_of_many(size):
    """Fewer channels than a vector holds take another way; zeros in further channels change nothing."""
    few, many = FactorizedReduce(6, 4, affine=False), FactorizedReduce(8, 4, affine=False)
    for name, weight in few.named_parameters():
        many.get_parameter(name).data[:, :6] = weight.data
    x = torch.randn(3, 6, *size, generator=stream(0, "x")).to(memory_format=torch.channels_last).requires_grad_()
    wide = functional.pad(x.detach(), (0, 0, 0, 0, 0, 2)).requires_grad_()
    for module, inputs in ((few, x), (many, wide)):
        (module(inputs) ** 3).sum().backward()
    torch.testing.assert_close(x.grad, wide.grad[:, :6], rtol=1e-4, atol=1e-4)
    for name, weight in few.named_parameters():
        torch.testing.assert_close(weight.grad, many.get_parameter(name).grad[:, :6], rtol=1e-4, atol=1e-3)


def test_gradients_over_few_channels_stay_in_their_memory():
    """Those of torch 2.14 do not on a processor with AVX2 alone; the C library's checks end the process then."""
    code = """
import torch
from netwright.search.spaces.operations import FactorizedReduce
for channels in range(1, 8):
    module = FactorizedReduce(channels, 4).to(memory_format=torch.channels_last)
    for _ in range(5):
        x = torch.ones(16, channels, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
        module(x).sum().backward()
"""
    checks = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **checks}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sep_conv_7x7", 4), "operation must be one of"),
        (("none", 0), "channels must be >= 1, got 0"),
        (("none", 4, 3), "stride must be 1 or 2, got 3"),
    ],
)
def test_unknown_operations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        operation(*arguments)


def test_numbers_out_of_range_are_refused():
    darts = spaces.get("darts")
    for name, value in (("in_channels", 0), ("num_classes", 0), ("cells", -1), ("channels", 1)):
        with pytest.raises(ValueError, match=f"{name} must be >= ., got {value}"):
            darts.build(DARTS_V1, **{name: value})
        with pytest.raises(ValueError, match=f"{name} must be >= ., got {value}"):
            darts.supernet(**{name: value})
    with pytest.raises(ValueError, match="stem must be one of"):
        darts.build(DARTS_V1, stem="mnist")
    with pytest.raises(ValueError, match="must be of space 'micro-darts'"):
        spaces.get("micro-darts").build(DARTS_V1)


@pytest.mark.parametrize(
    ("make", "own", "published"), [(fbnet_space, "fbnet", "fbnet"), (single_path_space, "single-path", "single-path")]
)
def test_spaces_of_the_papers_take_their_stages_first(make, own, published):
    assert make() == spaces.get(published)
    few = (chain.Stage(8, 2, 1), chain.Stage(16, 1, 2))
    made = make(few, shape=(8, 8))
    assert (made.name, len(made.choices())) == (f"{own}-own", 3)
    assert make(few, name="few", shape=(8, 8)).name == "few"
    with pytest.raises(ValueError, match=r"stages must be of Stage\(channels, layers, stride\), got 'm'"):
        make("mine")
    for name in ("", 3, few):
        with pytest.raises(ValueError, match="name must be a string that is not empty, got"):
            make(few, name=name)


def test_names_of_other_packages_are_at_hand_in_search():
    from netwright import compress, cost, train

    assert search.LatencyTable is cost.LatencyTable
    assert search.prune_channels is compress.prune_channels
    assert search.distillation_loss is train.distillation_loss
    assert spaces.get("fbnet").network.stages == search.FBNET_MACRO
    assert spaces.get("fbnet").network.blocks == search.FBNET_BLOCKS
    assert spaces.get("single-path").network.stages == search.MNASNET_MACRO
    assert {"ChannelGate", "soft_threshold"} <= set(dir(search))
