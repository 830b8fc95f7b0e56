"""Graphs without their zeros: whole again when unpacked, in few bytes, as multiples of a scale when asked."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_network

from netwright.deploy.graph import capture, optimise
from netwright.deploy.graph.ir import Channels, Constant, Conv, ConvTranspose, Graph, Linear, Node
from netwright.deploy.stored import ArtifactError, Stored, pack, unpack


def linear(weight, bias=None):
    weight = np.asarray(weight, np.float32)
    return Graph({0: (1, weight.shape[1]), 1: (1, len(weight))}, [Node(Linear(weight, bias), [0], 1)], [0], [1])


def arrays(graph):
    return graph.to_plain()[1]


def assert_same(a, b):
    """The same structure, and the same bits but for the sign of zeros."""
    assert a.to_plain()[0] == b.to_plain()[0]
    left, right = arrays(a), arrays(b)
    assert list(left) == list(right)
    for name, array in left.items():
        assert right[name].dtype == array.dtype
        np.testing.assert_array_equal(right[name], array)
        assert right[name].flags.aligned
        assert right[name].flags.writeable


@pytest.mark.parametrize("seed", range(6))
def test_a_network_is_whole_again(seed):
    graph = optimise(capture(*random_network(seed)))
    assert_same(unpack(pack(graph)), graph)


FLOATS = st.floats(-1, 1, width=32).map(lambda x: 0.0 if abs(x) < 0.7 else x)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.data())
def test_any_pattern_is_whole_again(rows, columns, data):
    weight = data.draw(st.lists(FLOATS, min_size=rows * columns, max_size=rows * columns))
    graph = linear(np.reshape(weight, (rows, columns)))
    assert_same(unpack(pack(graph)), graph)


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 65533, 65534, 65535, 65536, 131071])
@pytest.mark.parametrize("behind", [0, 300])
def test_long_gaps_are_whole_again(gap, behind):
    weight = np.zeros((1, gap + 2 + behind), np.float32)
    weight[0, [gap, gap + 1]] = 3, 4
    assert_same(unpack(pack(linear(weight))), linear(weight))


def test_what_is_not_finite_and_what_is_tiny_is_kept():
    weight = np.zeros((4, 50), np.float32)
    weight[:, 7] = np.nan, np.inf, -np.inf, 1e-45
    assert_same(unpack(pack(linear(weight))), linear(weight))


@pytest.mark.parametrize(
    ("kept", "bytes_each"), [(0.05, 5.0), (0.2, 5.0), (0.002, 6.01)], ids=["one byte", "few zeros", "two bytes"]
)
def test_a_kept_weight_takes_its_four_bytes_and_a_gap(kept, bytes_each):
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((400, 1000)).astype(np.float32) * (rng.random((400, 1000)) < kept)
    assert pack(linear(weight)).nbytes <= 1.001 * bytes_each * np.count_nonzero(weight)


def test_what_is_dense_is_kept_as_it_is():
    stored = pack(linear(np.ones((3, 4))))
    assert stored.arrays["0.weight"]["encoding"] == "dense"
    assert stored.nbytes == 48


def test_weights_in_double_precision_are_rounded_once():
    graph = Graph({0: (1, 1), 1: (1, 1)}, [Node(Linear(np.array([[1 / 3]])), [0], 1)], [0], [1])
    assert unpack(pack(graph)).nodes[0].op.weight == np.float32(1 / 3)


def test_paths_are_made_printable():
    graph = linear(np.eye(2))
    graph.nodes[0].path = "a.b*/\n\\c"
    assert unpack(pack(graph)).nodes[0].path == "a.b____c"


def conv(kind, groups, rng):
    """A convolution of four channels with a graph around it, and its weights by output channel."""
    weight = rng.standard_normal((4, 2, 3, 3) if groups == 1 or kind is Conv else (4, 3, 3, 3))
    weight = (weight * rng.uniform(0.1, 10, (4, 1, 1, 1)) * (rng.random(weight.shape) < 0.6)).astype(np.float32)
    if kind is Conv:
        op = Conv(weight, groups=groups)
        shapes = {0: (1, 2 * groups, 5, 5), 1: (1, 4, 3, 3)}
    else:
        op = ConvTranspose(weight, groups=groups)
        shapes = {0: (1, 4, 3, 3), 1: (1, groups * weight.shape[1], 5, 5)}
    return Graph(shapes, [Node(op, [0], 1)], [0], [1])


def output_channels(op):
    """For each output channel, the weights that belong to it, by definition of the operation."""
    if isinstance(op, ConvTranspose):
        inputs = len(op.weight) // op.groups
        for group in range(op.groups):
            for inner in range(op.weight.shape[1]):
                yield op.weight[group * inputs : (group + 1) * inputs, inner]
    else:
        yield from op.weight


@pytest.mark.parametrize(("kind", "groups"), [(Conv, 1), (Conv, 2), (ConvTranspose, 1), (ConvTranspose, 2)])
def test_each_output_channel_has_its_own_scale(kind, groups):
    graph = conv(kind, groups, np.random.default_rng(0))
    found = unpack(pack(graph, quantize="int8")).nodes[0].op
    assert found.weight.shape == graph.nodes[0].op.weight.shape
    for exact, rounded in zip(output_channels(graph.nodes[0].op), output_channels(found), strict=True):
        scale = np.abs(exact).max() / 127
        integers = rounded / scale
        np.testing.assert_allclose(integers, np.rint(integers), atol=1e-4)
        assert np.abs(rounded - exact).max() <= scale / 2 * (1 + 1e-5)
        assert np.abs(integers).max() == pytest.approx(127)
        assert not rounded[exact == 0].any()


def test_weights_below_half_a_scale_are_dropped():
    weight = np.zeros((2, 100), np.float32)
    weight[0, :3] = 127, 0.49, 0.51
    weight[1, :2] = 1e-3, -127e-3
    stored = pack(linear(weight), quantize="int8")
    assert stored.tensors["0.weight.kept"].tolist() == [127, 1, 1, -127]
    np.testing.assert_allclose(unpack(stored).nodes[0].op.weight[:, :3], [[127, 0, 1], [1e-3, -127e-3, 0]], rtol=1e-6)


def test_a_kept_weight_takes_one_byte_and_a_gap_when_quantised():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((400, 1000)).astype(np.float32) * (rng.random((400, 1000)) < 0.05)
    assert pack(linear(weight), quantize="int8").nbytes <= 2.1 * np.count_nonzero(weight)


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 3e38])
def test_extreme_scales_stay_finite(scale):
    weight = np.full((1, 3), scale, np.float32)
    found = unpack(pack(linear(weight), quantize="int8")).nodes[0].op.weight
    np.testing.assert_allclose(found, weight, rtol=0.01, atol=1e-43)


def test_biases_and_constants_are_not_quantised():
    bias = np.random.default_rng(0).standard_normal(3).astype(np.float32)
    graph = linear(np.ones((3, 2)), bias)
    graph.shapes[2] = (1, 3)
    graph.nodes.append(Node(Constant(bias[None]), [], 2))
    graph.outputs = [1, 2]
    found = unpack(pack(graph, quantize="int8"))
    np.testing.assert_array_equal(found.nodes[0].op.bias, bias)
    np.testing.assert_array_equal(found.nodes[1].op.value, bias[None])


def test_what_is_not_finite_cannot_be_quantised():
    with pytest.raises(ValueError, match=r"must be finite.*0\.weight"):
        pack(linear([[np.inf]]), quantize="int8")


def test_other_quantisations_are_refused():
    with pytest.raises(ValueError, match="must be None or 'int8', got 'int4'"):
        pack(linear([[1.0]]), quantize="int4")


def stored():
    weight = np.zeros((2, 40), np.float32)
    weight[:, 3] = 1, 2
    graph = linear(weight)
    graph.shapes[2] = (1, 2)
    graph.nodes.append(Node(Channels(np.array([1, 0])), [1], 2))
    graph.outputs = [2]
    return pack(graph)


def changed(**tensors):
    whole = stored()
    return dataclasses.replace(whole, tensors=whole.tensors | {k.replace("_", "."): v for k, v in tensors.items()})


GAPS = np.array([3, 39], np.uint8)

FAULTS = {
    "a weight behind the end": changed(**{"0.weight.gaps": np.array([3, 77], np.uint8)}),
    "far behind the end": changed(**{"0.weight.gaps": np.array([255] * 90 + [3, 1], np.uint8)}),
    "more gaps than weights": changed(**{"0.weight.gaps": np.array([3, 3, 3], np.uint8)}),
    "more weights than gaps": changed(**{"0.weight.kept": np.ones(3, np.float32)}),
    "gaps of another type": changed(**{"0.weight.gaps": GAPS.astype(np.int16)}),
    "gaps with two axes": changed(**{"0.weight.gaps": GAPS[None]}),
    "weights of another type": changed(**{"0.weight.kept": np.ones(2)}),
    "an index outside": changed(**{"1.index.all": np.array([0, 2])}),
    "an index below": changed(**{"1.index.all": np.array([0, -1])}),
    "an index of another type": changed(**{"1.index.all": np.array([0, 1], np.int32)}),
    "too short an index": changed(**{"1.index.all": np.array([0])}),
    "a tensor too many": changed(**{"more": GAPS}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tensors_that_do_not_fit_are_refused(name):
    with pytest.raises(ArtifactError):
        unpack(FAULTS[name])


def test_the_tensors_of_the_faults_fit_if_nothing_is_changed():
    assert_same(unpack(changed(**{"0.weight.gaps": GAPS})), unpack(stored()))


@pytest.mark.parametrize(
    ("shape", "told"),
    [([2**20, 2**20], "at most 1073741824 numbers"), ([2, 41], "weight must read 40"), ([80], "rank")],
)
def test_sizes_are_refused_before_memory_is_taken(shape, told):
    whole = stored()
    whole.arrays["0.weight"]["shape"] = shape
    with pytest.raises(ArtifactError, match=told):
        unpack(whole)


def test_values_that_no_machine_holds_are_refused():
    graph = Graph({0: (2**15, 2**15, 1, 1), 1: (2**15, 2**15, 1, 2)}, [], [0], [0])
    with pytest.raises(ArtifactError, match="values must hold at most"):
        unpack(pack(graph))


def test_a_node_may_not_use_the_array_of_another():
    whole = stored()
    whole.structure["nodes"][0]["bias"] = {"array": "0.weight"}
    with pytest.raises(ArtifactError, match="called by their node"):
        unpack(whole)


def test_a_missing_tensor_is_named_by_its_kind():
    whole = stored()
    with pytest.raises(ArtifactError, match="must be those of the arrays"):
        unpack(Stored(whole.structure, whole.arrays, {}))


def test_scales_of_another_number_are_refused():
    whole = pack(linear(np.eye(3)), quantize="int8")
    with pytest.raises(ArtifactError, match="must have 3 scales"):
        unpack(dataclasses.replace(whole, tensors=whole.tensors | {"0.weight.scale": np.ones(2, np.float32)}))


def test_only_weights_have_scales():
    whole = pack(linear(np.eye(3), np.ones(3, np.float32)))
    whole.arrays["0.bias"]["encoding"] = "dense int8"
    tensors = whole.tensors | {"0.bias.all": np.ones(3, np.int8), "0.bias.scale": np.ones(3, np.float32)}
    with pytest.raises(ArtifactError, match="must be a weight to have a scale"):
        unpack(dataclasses.replace(whole, tensors=tensors))
