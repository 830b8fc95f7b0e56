"""A graph survives being taken apart into JSON and arrays."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from networks import random_network

from netwright.deploy.graph import Graph, Node, capture, check, optimise, run
from netwright.deploy.graph.ir import OPS, Activate, Activation, Conv


@pytest.mark.parametrize("seed", range(8))
def test_plain_and_back(seed: int) -> None:
    module, x = random_network(seed)
    graph = optimise(capture(module, x))
    content, arrays = graph.to_plain()
    text = json.dumps(content, allow_nan=False)
    again = Graph.from_plain(json.loads(text), arrays)
    check(again)
    assert json.dumps(again.to_plain()[0]) == text
    assert torch.equal(run(again, [x])[0], run(graph, [x])[0])


def test_bounds_of_activations_and_views() -> None:
    graph = Graph({0: (1, 2, 1, 3), 1: (1, 2, 1, 3)}, [], [0], [1], {0: (1, 2, 3)})
    for act in (Activation("clamp", -math.inf, 1.0), Activation("clamp", 0.0), Activation("leaky_relu", 0.1)):
        graph.nodes = [Node(Activate(act), [0], 1)]
        content, arrays = graph.to_plain()
        again = Graph.from_plain(json.loads(json.dumps(content, allow_nan=False)), arrays)
        assert again.nodes[0].op == Activate(act)
        assert again.views == {0: (1, 2, 3)}


def test_settings_keep_their_types() -> None:
    graph = Graph({0: (1, 2, 4, 4), 1: (1, 4, 4, 4)}, [], [0], [1])
    op = Conv(np.ones((4, 1, 3, 3), np.float32), None, (1, 1), (1, 1, 1, 1), groups=2)
    graph.nodes = [Node(op, [0], 1, "a.b")]
    content, arrays = graph.to_plain()
    again = Graph.from_plain(content, arrays)
    for part in dataclasses.fields(op):
        assert type(getattr(again.nodes[0].op, part.name)) is type(getattr(op, part.name))
    assert again.nodes[0].path == "a.b"
    assert op.depthwise


@pytest.mark.parametrize("content", [{}, {"shapes": {"a": [1]}}, {"shapes": 3}, [], {"shapes": {"0": [None]}}])
def test_what_is_no_graph(content: object) -> None:
    with pytest.raises(ValueError, match=r"not a graph|invalid literal"):
        Graph.from_plain(content, {})  # type: ignore[arg-type]


def test_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="kind must be one of none, relu"):
        Activation("swish")


def test_the_table_of_operations_is_complete() -> None:
    assert all(name == kind.name for name, kind in OPS.items())
    assert len(OPS) == 17
