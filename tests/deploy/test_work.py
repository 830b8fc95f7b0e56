"""Multiply-adds and weights of graphs, against counts over the module itself."""

import numpy as np
import pytest
import torch
from torch import nn

from netwright.cost import count
from netwright.deploy.graph import capture, optimise
from netwright.deploy.graph.ir import ConvTranspose, Graph, Node
from netwright.deploy.work import layer_macs, macs, weight_bytes, weights


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
def test_dense_work_is_that_of_the_cost_model(batch):
    graph = optimise(capture(network(), torch.zeros(batch, 3, 17, 13)))
    assert macs(graph).dense == batch * count(network(), (3, 17, 13)).macs


def test_kept_work_is_that_of_the_weights_that_are_not_zero():
    net = network()
    net[0].weight.data[:4] = 0
    graph = capture(net, torch.zeros(1, 3, 17, 13))
    assert macs(graph).dense - macs(graph).kept == 4 * 27 * 8 * 6
    assert weights(graph) == (sum(p.numel() for p in net.parameters() if p.ndim > 1), 4 * 27)


def test_a_transposed_convolution_meets_every_pixel_of_its_input():
    op = ConvTranspose(np.ones((2, 3, 4, 5), np.float32))
    graph = Graph({0: (2, 2, 6, 7), 1: (2, 3, 9, 11)}, [Node(op, [0], 1)], [0], [1])
    assert layer_macs(graph.nodes[0], graph) == (2 * 42 * 120, 2 * 42 * 120)


def test_graphs_add_up():
    graph = capture(network(), torch.zeros(1, 3, 17, 13))
    assert macs(graph, graph) == tuple(2 * each for each in macs(graph))
    assert weights(graph, graph) == tuple(2 * each for each in weights(graph))
    assert macs() == weights() == (0, 0)


def test_bytes_count_every_array():
    graph = optimise(capture(network(), torch.zeros(1, 3, 17, 13)))
    assert weight_bytes(graph) == 4 * sum(p.numel() for p in network().parameters())
