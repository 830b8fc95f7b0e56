"""A sound graph passes; every way to break one is refused with the node and the fault."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import random_network

from netwright.deploy.graph import Graph, Node, capture, check, optimise, run
from netwright.deploy.graph.ir import (
    Activation,
    AdaptivePool,
    Add,
    Affine,
    Channels,
    Concat,
    Constant,
    Conv,
    ConvTranspose,
    GroupNorm,
    LayerNorm,
    Linear,
    Op,
    Pad,
    Pool,
    Reshape,
    Shape,
    Softmax,
)


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def single(op: Op, output: Shape, *inputs: Shape) -> Graph:
    shapes = dict(enumerate((*inputs, output)))
    values = list(range(len(inputs)))
    return Graph(shapes, [Node(op, [*values], len(inputs), "here")], values, [len(inputs)])


MAPS = (1, 4, 8, 6)
SOUND: dict[str, Graph] = {
    "conv": single(Conv(ones(6, 4, 3, 2), ones(6), (2, 1), (1, 0, -1, 1), (1, 2)), (1, 6, 3, 5), MAPS),
    "grouped": single(Conv(ones(6, 2, 1, 1), groups=2), (1, 6, 8, 6), MAPS),
    "residual": single(Conv(ones(4, 4, 1, 1)), MAPS, MAPS, MAPS),
    "transposed": single(ConvTranspose(ones(4, 3, 3, 3), ones(3), (2, 2), (1, 1)), (1, 3, 16, 11), MAPS),
    "linear": single(Linear(ones(3, 5), ones(3)), (2, 3), (2, 5)),
    "pool": single(Pool("avg", (3, 2), (2, 2), (1, 0, 1, 0)), (1, 4, 4, 3), MAPS),
    "ceil": single(Pool("max", (3, 2), (3, 4)), (1, 4, 3, 2), MAPS),
    "adaptive": single(AdaptivePool("avg"), (1, 4, 3, 9), MAPS),
    "affine": single(Affine(ones(4), ones(4)), MAPS, MAPS),
    "layer_norm": single(LayerNorm(ones(4), None), MAPS, MAPS),
    "group_norm": single(GroupNorm(2, ones(4), ones(4)), MAPS, MAPS),
    "add": single(Add(), MAPS, MAPS, (1, 4, 1, 1)),
    "concat": single(Concat(), (1, 7, 8, 6), MAPS, (1, 3, 8, 6)),
    "channels": single(Channels(np.array([3, 0, 0])), (1, 3, 8, 6), MAPS),
    "pad": single(Pad((1, -2, 0, 3)), (1, 4, 9, 7), MAPS),
    "reshape": single(Reshape(), (1, 192), MAPS),
    "softmax": single(Softmax(), MAPS, MAPS),
    "constant": single(Constant(ones(1, 2)), (1, 2)),
}

Change = Callable[[Graph], Any]


def op_of(graph: Graph) -> Any:
    return graph.nodes[0].op


def setting(name: str, value: Any) -> Change:
    return lambda graph: setattr(op_of(graph), name, value)


def shape(value: int, sizes: Shape) -> Change:
    return lambda graph: graph.shapes.__setitem__(value, sizes)


@pytest.mark.parametrize("name", SOUND)
def test_sound(name: str) -> None:
    check(SOUND[name])


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("conv", shape(1, (1, 6, 4, 5)), r"node 0 \(conv of here\): the output must have shape \(1, 6, 3, 5\)"),
        ("conv", shape(1, (1, 7, 3, 5)), "the output must have shape"),
        ("conv", shape(1, (2, 6, 3, 5)), "the batch must stay 1, got 2"),
        ("conv", shape(0, (1, 5, 8, 6)), "must read 5 channels"),
        ("conv", shape(0, (1, 0, 8, 6)), "sizes must lie in"),
        ("conv", shape(0, (1, 4, -8, 6)), "sizes must lie in"),
        ("conv", shape(0, (1, 4, 8)), "rank must be 2 or 4, got 3"),
        ("conv", shape(0, (1, 4, 2**20, 2**20)), r"fewer than 2\^31 numbers"),
        ("conv", shape(0, (1, 4, 2**40, 1)), "sizes must lie in"),
        ("conv", setting("stride", (0, 1)), "stride must be >= 1"),
        ("conv", setting("stride", (1.5, 1)), "stride must be a pair of integers"),
        ("conv", setting("dilation", (1,)), "dilation must be a pair of integers"),
        ("conv", setting("padding", (1, 1)), "padding must be 4 integers"),
        ("conv", setting("padding", None), "padding must be 4 integers, got None"),
        ("conv", setting("padding", (-9, 0, -1, 1)), "the output must have shape"),
        ("conv", setting("groups", 3), "must read 4 channels, got 3 groups of 4"),
        ("conv", setting("groups", 0), "groups must be"),
        ("conv", setting("bias", ones(5)), "bias must have shape"),
        ("conv", setting("weight", ones(6, 4, 3)), "weight must have rank 4"),
        ("conv", setting("weight", ones(6, 4, 3, 0)), "weight must be an array of floats, not empty"),
        ("conv", setting("weight", np.ones((6, 4, 3, 2), np.int64)), "weight must be an array of floats"),
        ("conv", setting("weight", None), "weight must be an array"),
        ("conv", setting("act", Activation("clamp", math.nan)), "bounds of an activation must be numbers"),
        ("conv", lambda g: g.nodes[0].inputs.append(0), "a residual must have the output's shape"),
        ("conv", lambda g: g.nodes[0].inputs.clear(), "must read 1 to 2 values, got 0"),
        ("residual", shape(1, (1, 4, 8, 5)), "a residual must have"),
        ("grouped", setting("groups", 4), "must divide 6 outputs"),
        ("transposed", shape(1, (1, 3, 18, 11)), "must be at most 17, got 18"),
        ("transposed", shape(1, (1, 6, 16, 11)), "must have 3 maps"),
        ("transposed", shape(1, (1, 528)), "must have 3 maps"),
        ("transposed", setting("padding", (-1, 0)), "padding must be"),
        ("transposed", setting("groups", 3), "groups must divide 4"),
        ("linear", shape(0, (2, 4)), "must read 4 features, got 5"),
        ("linear", shape(0, (2, 5, 1, 1)), "must read values of rank 2"),
        ("linear", shape(1, (2, 4)), "the output must have shape"),
        ("pool", shape(1, (1, 4, 6, 3)), "must be 4, or one more in ceil_mode, got 6"),
        ("pool", shape(1, (1, 4, 4, 4)), "must be 3"),
        ("pool", shape(1, (1, 4, 3, 3)), "must be 4"),
        ("pool", setting("padding", (-1, 0, 0, 0)), "padding must be"),
        ("pool", setting("kind", "median"), "kind must be one of max, avg, got 'median'"),
        ("pool", setting("dilation", (2, 1)), "dilation of an average"),
        ("pool", setting("divisor", 0), "divisor must not be 0"),
        ("ceil", shape(1, (1, 4, 4, 2)), "must be 2, or one more"),
        ("adaptive", shape(1, (1, 5, 3, 9)), "must have 4 maps"),
        ("affine", setting("scale", ones(5)), "scale must have shape"),
        ("affine", setting("shift", None), "shift must be an array"),
        ("layer_norm", setting("weight", ones(6)), "weight must have shape"),
        ("layer_norm", setting("eps", -1.0), "eps must be >= 0"),
        ("group_norm", setting("groups", 3), "groups must divide 4"),
        ("add", shape(1, (1, 4, 8, 1)), "the second input must have shape"),
        ("add", shape(0, (1, 4, 1, 1)), "the output must have shape"),
        ("concat", shape(1, (1, 3, 8, 5)), "inputs must agree"),
        ("concat", shape(2, (1, 8, 8, 6)), "the output must have shape"),
        ("channels", setting("index", np.array([0, 4, 0])), r"index must lie in \[0, 4\), got 4"),
        ("channels", setting("index", np.array([0, -1, 0])), r"index must lie in \[0, 4\), got -1"),
        ("channels", setting("index", np.array([0.0, 1.0, 0.0])), "index must be an array of int64"),
        ("channels", setting("index", np.array([0, 1])), "the output must have shape"),
        ("pad", shape(1, (1, 4, 9, 8)), "the output must have shape"),
        ("reshape", shape(1, (1, 191)), "must hold 192 numbers"),
        ("softmax", shape(1, (1, 4, 6, 8)), "the output must have shape"),
        ("constant", shape(0, (1, 3)), "value must have shape"),
        ("conv", lambda g: g.nodes[0].inputs.__setitem__(0, 1), "reads value 1, which is not written before"),
        ("conv", lambda g: g.nodes[0].inputs.__setitem__(0, 7), "reads value 7"),
        ("conv", lambda g: setattr(g.nodes[0], "output", 0), "writes value 0, which is written already"),
        ("conv", lambda g: setattr(g.nodes[0], "output", 9), "writes value 9, which has no shape"),
        ("conv", lambda g: g.nodes.append(g.nodes[0]), r"node 1 .* written already"),
        ("conv", lambda g: g.nodes.clear(), "outputs must be written"),
        ("conv", lambda g: g.outputs.clear(), "at least 1 value"),
        ("conv", lambda g: g.outputs.append(5), "value 5: an input or output without a shape"),
        ("residual", lambda g: setattr(g, "inputs", [0, 0]), "inputs must differ"),
        ("conv", lambda g: g.views.__setitem__(1, (90, 2)), "view must hold as many numbers"),
        ("conv", lambda g: g.views.__setitem__(1, (-90, -1)), "view must hold as many numbers"),
        ("conv", lambda g: setattr(g.nodes[0], "op", Op()), "must be an operation of a graph"),
    ],
)
def test_refused(name: str, change: Change, fault: str) -> None:
    graph = copy.deepcopy(SOUND[name])
    change(graph)
    with pytest.raises(ValueError, match=fault):
        check(graph)


NUMBERS = st.integers(-3, 70)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_a_graph_that_was_tampered_with_is_refused_or_sound(data: st.DataObject) -> None:
    """Whatever number of the file is changed, nothing but ValueError comes out, and what passes can be run."""
    content, arrays = SAMPLE.to_plain()
    content = copy.deepcopy(content)
    places = list(_places(content))
    holder, key = places[data.draw(st.integers(0, len(places) - 1))]
    holder[key] = data.draw(st.one_of(NUMBERS, st.none(), st.just("x"), st.just(2**70), st.just([1])))
    try:
        graph = Graph.from_plain(content, arrays)
        check(graph)
    except ValueError:
        return
    inputs = [torch.zeros(graph.views.get(v, graph.shapes[v])) for v in graph.inputs]
    shapes = [tuple(y.shape) for y in run(graph, inputs)]
    assert shapes == [graph.views.get(v, graph.shapes[v]) for v in graph.outputs]


def _places(content: Any) -> Any:
    entries = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in entries:
        if isinstance(value, (dict, list)):
            yield from _places(value)
        else:
            yield content, key


SAMPLE = optimise(capture(*random_network(11)))
