"""What is counted of a network, against figures by hand and the cost of the same network."""

from __future__ import annotations

import numpy as np
import pytest
import stand_in
import torch
from torch import nn

from netwright.cost import count
from netwright.deploy.bench import describe


@pytest.fixture(scope="module")
def found():
    return describe(stand_in.network(), np.zeros((2, 3, 8, 8), np.float32), ["2", "5"])


def test_layers_by_hand(found):
    # 3x3 stem, pruned 1x1, depthwise 3x3, pruned linear layer; two images
    assert [layer.name for layer in found.layers] == ["0", "2", "3", "5"]
    assert [layer.kind for layer in found.layers] == ["dense", "sparse", "depthwise", "sparse"]
    assert [layer.weights for layer in found.layers] == [216, 64, 72, 640]
    assert [layer.nonzeros for layer in found.layers] == [216, 16, 72, 160]
    assert [layer.macs for layer in found.layers] == [2 * 216 * 36, 2 * 64 * 36, 2 * 72 * 16, 2 * 640]
    assert [layer.sparse_macs for layer in found.layers][1::2] == [2 * 16 * 36, 2 * 160]
    assert [layer.in_bytes for layer in found.layers] == [4 * 2 * n for n in (3 * 64, 8 * 36, 8 * 36, 128)]
    assert [layer.out_bytes for layer in found.layers] == [4 * 2 * n for n in (8 * 36, 8 * 36, 8 * 16, 5)]


def test_sums(found):
    cost = count(stand_in.network(), (3, 8, 8))
    assert (found.macs, found.sparse_macs) == (2 * cost.macs, 2 * cost.sparse_macs)
    assert found.dense_bytes == 4 * cost.parameters
    assert (found.weights, found.pruned_weights) == (992, 704)
    assert found.pruned_sparsity == 0.75
    assert found.sparsity == pytest.approx(0.75 * 704 / 992)
    assert sum(layer.macs for layer in found.layers) == found.macs


def test_nothing_pruned_and_no_hooks_left():
    net = stand_in.network()
    found = describe(net, np.zeros((1, 3, 8, 8), np.float32), [])
    assert (found.pruned_weights, found.pruned_sparsity) == (0, 0.0)
    assert not any(part._forward_hooks for part in net.modules())


def test_channels_that_do_not_see_the_input():
    """Row 1 of the first layer is empty: what reads its channel is constant, in groups and behind a flattening too."""
    net = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1, groups=4), nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for layer in net:
            if hasattr(layer, "weight"):
                layer.weight.fill_(0.5)
        net[0].weight[1] = 0
        net[0].bias.fill_(1.0)
        net[2].weight[0, 0] = 0  # output 0 of the first group reads channel 1 only: constant
        net[5].weight[:, 2] = 0
    x = torch.rand(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    found = describe(net, x.numpy(), [])
    stem, grouped, depthwise, linear = found.layers
    assert (stem.sparse_macs, stem.live_macs) == (2 * 6 * 9, 2 * 6 * 9)
    # non-zero weights: output 0 reads channel 1; output 1 channels 0 and 1; outputs 2 and 3 channels 2 and 3
    assert (grouped.sparse_macs, grouped.live_macs) == (2 * 7 * 9, 2 * 5 * 9)
    assert (depthwise.sparse_macs, depthwise.live_macs) == (2 * 4, 2 * 3)
    assert (linear.sparse_macs, linear.live_macs) == (2 * 9, 2 * 6)
    assert found.live_macs == sum(layer.live_macs for layer in found.layers)
    assert not found.constant
    with torch.no_grad():
        net[3].weight.zero_()
    assert describe(net, x.numpy(), []).constant


def test_a_layer_that_runs_twice_moves_twice_as_much():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.layer(self.layer(x))

    (layer,) = describe(Twice().eval(), np.zeros((1, 4, 5, 5), np.float32), []).layers
    assert (layer.macs, layer.in_bytes, layer.out_bytes) == (2 * 16 * 25, 2 * 400, 2 * 400)


def test_products_of_activations_are_counted_with_the_whole():
    net = nn.MultiheadAttention(8, 2, batch_first=True).eval()

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = net

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    found = describe(Attention().eval(), torch.zeros(1, 6, 8).numpy(), [])
    assert found.macs > sum(layer.macs for layer in found.layers)
