"""Each pass on the smallest network that needs it: what is left, and that it computes the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from networks import Call, assert_captured, eager, fill, networks
from torch import Tensor, nn
from torch.nn import functional

from netwright.deploy.graph import Graph, Node, capture, check, optimise, run
from netwright.deploy.graph.ir import Activation, Channels, Conv, Linear, Reshape
from netwright.deploy.graph.passes.activations import fuse_activations, name_products
from netwright.deploy.graph.passes.affine import fold_affine, fold_affine_forward
from netwright.deploy.graph.passes.channels import fold_channels
from netwright.deploy.graph.passes.cleaning import merge_equal, remove_no_ops, remove_unused
from netwright.deploy.graph.passes.dead import fold_constant_channels, remove_dead_channels
from netwright.deploy.graph.passes.padding import fold_padding
from netwright.deploy.graph.passes.residual import fuse_residuals

X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(0))


def after(module: nn.Module, *passes: Callable[[Graph], None]) -> Graph:
    """The graph of a module on X after passes, which must not change what it computes."""
    graph = capture(module.eval(), X)
    for rewrite in passes:
        rewrite(graph)
    check(graph)
    torch.testing.assert_close(run(graph, [X]), eager(module, X), rtol=1e-10, atol=1e-10)
    return graph


def names(graph: Graph) -> list[str]:
    return [node.op.name for node in graph]


def conv(seed: int = 0, **settings: int) -> nn.Conv2d:
    layer = nn.Conv2d(6, 6, 3, **settings)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(seed)))
    return layer


def norm(seed: int = 1) -> nn.Module:
    return fill(nn.BatchNorm2d(6), seed)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(networks())
def test_any_network_computes_the_same(network: tuple[nn.Module, Tensor]) -> None:
    module, x = network
    graph = capture(module, x)
    small = optimise(graph, precision=np.float64)
    check(small)
    (expected,), scale = eager(module, x), eager(module, x)[0].abs().max()
    assert (run(small, [x])[0] - expected).abs().max() <= 1e-10 * scale
    assert len(small.nodes) <= len(graph.nodes)


def test_optimise_leaves_its_argument_alone() -> None:
    graph = capture(nn.Sequential(conv(padding=1), norm(), nn.ReLU()).eval(), X)
    before = [(node.op.name, list(node.inputs), node.output) for node in graph]
    weight = graph.nodes[0].op.weight.copy()  # type: ignore[attr-defined]
    optimise(graph)
    assert before == [(node.op.name, list(node.inputs), node.output) for node in graph]
    assert np.array_equal(weight, graph.nodes[0].op.weight)  # type: ignore[attr-defined]


def test_everything_is_rounded_to_float32_once() -> None:
    layer, statistics = conv(), norm()
    small = optimise(capture(nn.Sequential(layer, statistics).eval(), X))
    op = small.nodes[0].op
    assert isinstance(op, Conv)
    scale = statistics.weight.double() / torch.sqrt(statistics.running_var.double() + statistics.eps)
    expected = layer.weight.double() * scale[:, None, None, None]
    assert op.weight.dtype == np.float32
    assert np.array_equal(op.weight, expected.float().detach().numpy())


def test_no_ops_vanish() -> None:
    graph = after(Call(lambda x: functional.pad(x.flatten(1).view(x.shape), (0, 0)).flip(1).flip(1)), remove_no_ops)
    assert names(graph) == []
    assert graph.outputs == graph.inputs


def test_selections_and_reshapes_skip_over_their_kind() -> None:
    graph = Graph({0: (1, 4), 1: (1, 4), 2: (1, 2), 3: (1, 2, 1, 1), 4: (1, 1, 2, 1)}, [], [0], [4])
    graph.nodes += [
        Node(Channels(np.array([3, 2, 1, 0])), [0], 1), Node(Channels(np.array([0, 2])), [1], 2),
        Node(Reshape(), [2], 3), Node(Reshape(), [3], 4),
    ]  # fmt: skip
    remove_no_ops(graph)
    assert names(graph) == ["channels", "reshape"]
    assert run(graph, [torch.tensor([[0.0, 1, 2, 3]])])[0].flatten().tolist() == [3, 1]


def test_one_value_twice_among_the_outputs() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = x.relu()
            return y, y + 0, y.flatten(1), y.flatten(2), x

    graph = assert_captured(Twice(), X)
    assert names(graph).count("activate") == 1


def test_equal_operations_are_computed_once() -> None:
    graph = after(Call(lambda x: torch.cat([x.relu(), x.relu() * 2, x.relu()], 1)), merge_equal)
    assert names(graph) == ["activate", "affine", "concat"]


def test_what_nobody_reads_goes() -> None:
    def function(x: Tensor) -> Tensor:
        _, second = x.relu().chunk(2, 1)
        return second

    assert names(after(Call(function), remove_unused)) == ["activate", "channels"]


@pytest.mark.parametrize(
    "layer",
    [
        conv(padding=1),
        conv(groups=3, bias=False),
        conv(groups=6),
        nn.ConvTranspose2d(6, 6, 3, groups=2),
        nn.ConvTranspose2d(6, 6, 3, stride=2, bias=False),
        nn.GroupNorm(2, 6),
        nn.GroupNorm(3, 6, affine=False),
        nn.BatchNorm2d(6),
    ],
)
def test_a_batch_norm_joins_what_is_before(layer: nn.Module) -> None:
    graph = after(nn.Sequential(fill(layer, 3), norm(), norm(2)), fold_affine)
    assert len(graph.nodes) == 1


def test_a_batch_norm_joins_linear_layers_and_layer_norms() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(432, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.BatchNorm1d(4))
    assert names(after(fill(layers, 2), fold_affine)) == ["reshape", "linear", "layer_norm"]


def test_a_batch_norm_goes_through_a_concatenation() -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 2, 1), norm()

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([self.a(x), self.b(x)], 1))

    torch.manual_seed(0)
    assert names(after(Halving(), fold_affine)) == ["conv", "conv", "concat"]


def test_a_batch_norm_stays_behind_a_value_that_others_read() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv(padding=1), norm()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) * y

    assert names(after(Two(), fold_affine)) == ["conv", "affine", "mul"]


def test_zero_weights_stay_plus_zero_and_denormals_stay() -> None:
    layer, statistics = conv(), norm()
    with torch.no_grad():
        layer.weight[:, ::2] = 0
        layer.weight[0, 1, 0, 0] = 1e-38
        statistics.weight.fill_(-0.01)
    op = optimise(capture(nn.Sequential(layer, statistics).eval(), X)).nodes[0].op
    assert isinstance(op, Conv)
    assert (op.weight[:, ::2] == 0).all()
    assert not np.signbit(op.weight[:, ::2]).any()
    assert 0 < abs(op.weight[0, 1, 0, 0]) < np.finfo(np.float32).tiny


def test_a_batch_norm_before_a_convolution_joins_it_only_without_padding() -> None:
    scale_only = nn.BatchNorm2d(6, affine=False)
    for layer, expected in (
        (conv(), ["conv"]),
        (conv(groups=3), ["conv"]),
        (nn.Conv2d(6, 12, 3, groups=6, stride=2), ["conv"]),
        (conv(padding=1), ["affine", "conv"]),
        (nn.ConvTranspose2d(6, 4, 3), ["affine", "conv_transpose"]),
    ):
        assert names(after(nn.Sequential(norm(), layer), fold_affine_forward)) == expected
    for layer in (conv(padding=1), nn.ConvTranspose2d(6, 4, 3)):
        assert len(after(nn.Sequential(scale_only, layer), fold_affine_forward).nodes) == 1


def test_a_batch_norm_sinks_into_the_classifier() -> None:
    pooled = nn.Sequential(norm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    assert names(after(pooled, fold_affine_forward)) == ["adaptive_pool", "reshape", "linear"]
    assert names(after(nn.Sequential(norm(), nn.Flatten(), nn.Linear(432, 3)), fold_affine_forward)) == [
        "reshape",
        "linear",
    ]


def test_activations_join_what_is_before() -> None:
    graph = after(
        nn.Sequential(conv(), nn.ReLU6(), norm(), nn.SiLU(), nn.GroupNorm(2, 6), nn.ELU(0.5)), fuse_activations
    )
    acts = [node.op.act for node in graph]  # type: ignore[attr-defined]
    assert acts == [Activation("clamp", 0, 6), Activation("silu"), Activation("elu", 0.5)]


def test_a_second_activation_stays() -> None:
    assert names(after(nn.Sequential(conv(), nn.Tanh(), nn.Tanh()), fuse_activations)) == ["conv", "activate"]


def test_products_get_their_names() -> None:
    graph = after(
        Call(lambda x: (x * x.sigmoid()) * functional.hardsigmoid(x * x.sigmoid())), merge_equal, name_products
    )
    assert [node.op.act.kind for node in graph] == ["silu", "hardswish"]  # type: ignore[attr-defined]


class Block(nn.Module):
    """Two convolutions whose results are added, with a layer between the first and the sum."""

    def __init__(self, first: nn.Module, second: nn.Module, act: nn.Module):
        super().__init__()
        self.first, self.second, self.act = first, second, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.first(x) + self.second(x))


def test_a_sum_joins_the_later_convolution() -> None:
    graph = after(Block(conv(0, padding=1), conv(1, padding=1), nn.ReLU()), fuse_activations, fuse_residuals)
    assert names(graph) == ["conv", "conv"]
    assert graph.nodes[1].inputs[1] == graph.nodes[0].output
    assert graph.nodes[1].op.act == Activation("relu")  # type: ignore[attr-defined]


def test_a_convolution_moves_down_to_a_sum() -> None:
    graph = after(Block(conv(padding=1), nn.MaxPool2d(3, 1, 1), nn.Identity()), fuse_residuals)
    assert names(graph) == ["pool", "conv"]
    assert names(after(Block(nn.Identity(), conv(padding=1), nn.Identity()), fuse_residuals)) == ["conv"]


def test_a_sum_stays_where_it_cannot_join() -> None:
    activated = nn.Sequential(conv(padding=1), nn.ReLU())
    assert "add" in names(after(Block(nn.Identity(), activated, nn.ReLU()), fuse_activations, fuse_residuals))
    assert "add" in names(after(Call(lambda x: x + x.mean((2, 3), keepdim=True)), fuse_residuals))
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1))
    assert "add" in names(after(Block(nn.Identity(), pooled, nn.ReLU()), fuse_residuals))


def test_padding_joins_convolutions_and_poolings() -> None:
    for function, expected in (
        (lambda x: functional.conv2d(functional.pad(x, (1, 2, 0, 3)), x.new_ones(2, 6, 3, 3), padding=1), ["conv"]),
        (lambda x: functional.conv2d(functional.pad(x, (-1, 0, 0, -2)), x.new_ones(2, 6, 3, 3)), ["conv"]),
        (lambda x: functional.conv2d(x[:, :, 1:], x.new_ones(2, 6, 3, 3), padding=1), ["pad", "conv"]),
        (lambda x: functional.pad(functional.pad(x, (2, 1)), (-1, 3, 1, 0)), ["pad"]),
        (lambda x: functional.pad(functional.pad(x, (-2, 1)), (1, 3)), ["pad", "pad"]),
        (lambda x: functional.avg_pool2d(functional.pad(x, (1, 2)), 3, 2), ["pool"]),
        (lambda x: functional.avg_pool2d(functional.pad(x, (1, 2)), 3, 2, count_include_pad=False), ["pool"]),
        (lambda x: functional.avg_pool2d(functional.pad(x, (1, 2)), 3, 2, 1, True, True), ["pool"]),
        (lambda x: functional.avg_pool2d(functional.pad(x, (1, 2)), 3, 2, 1, True, False), ["pad", "pool"]),
        (lambda x: functional.max_pool2d(functional.pad(x, (1, 2)), 3, 2), ["pad", "pool"]),
        (lambda x: functional.max_pool2d(functional.pad(x, (1, 2), value=-torch.inf), 3, 2, 1), ["pool"]),
    ):
        assert names(after(Call(function), fold_padding)) == expected


def test_every_reader_pads_itself() -> None:
    def function(x: Tensor) -> Tensor:
        y = functional.pad(x, (1, 1, 1, 1))
        return torch.cat(
            [functional.conv2d(y, x.new_ones(2, 6, 3, 3)), functional.conv2d(y, -x.new_ones(1, 6, 3, 3))], 1
        )

    assert names(after(Call(function), fold_padding)) == ["conv", "conv", "concat"]


def test_skipped_pixels_become_a_stride() -> None:
    graph = after(Call(lambda x: functional.conv2d(x[:, :, 1::2, ::3], x.new_ones(2, 6, 1, 1))), fold_padding)
    op = graph.nodes[0].op
    assert isinstance(op, Conv)
    assert (len(graph.nodes), op.stride, op.padding) == (1, (2, 3), (-1, 0, -1, -1))


@pytest.mark.parametrize("index", [[5, 4, 3, 2, 1, 0], [1, 3], [2, 2, 2, 0]])
def test_a_selection_joins_the_columns(index: list[int]) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(len(index), 4, 3)
    graph = after(nn.Sequential(Call(lambda x: x[:, torch.tensor(index)]), layer), fold_channels)
    assert names(graph) == ["conv"]
    op = graph.nodes[0].op
    assert isinstance(op, Conv)
    assert not op.weight[:, sorted(set(range(6)) - set(index))].any()


def test_a_selection_joins_linear_layers_but_no_grouped_convolution() -> None:
    torch.manual_seed(0)
    flat = nn.Sequential(Call(lambda x: x.permute(0, 2, 3, 1).flatten(1)), Call(lambda x: x.flip(1)), nn.Linear(432, 2))
    assert names(after(flat, remove_no_ops, fold_channels)) == ["reshape", "linear"]
    grouped = nn.Sequential(Call(lambda x: x.flip(1)), nn.Conv2d(6, 6, 1, groups=2))
    assert names(after(grouped, fold_channels)) == ["channels", "conv"]


def with_zero_rows(layer: nn.Module, rows: list[int]) -> nn.Module:
    with torch.no_grad():
        layer.weight[rows] = 0
    return layer


def test_constant_channels_join_the_bias_of_an_unpadded_reader() -> None:
    torch.manual_seed(0)
    first = with_zero_rows(conv(), [1, 4])
    network = nn.Sequential(first, nn.Sigmoid(), nn.Conv2d(6, 3, 2))
    graph = after(network, fuse_activations, fold_constant_channels, remove_dead_channels)
    assert graph.shapes[graph.nodes[0].output][1] == 4


def test_a_constant_channel_beside_padding_stays_unless_it_is_zero() -> None:
    torch.manual_seed(0)
    first = with_zero_rows(conv(), [0, 1, 4])
    with torch.no_grad():
        first.bias.copy_(torch.tensor([-1.0, 2.0, 1.0, 1.0, -3.0, 1.0]))
    network = nn.Sequential(first, nn.ReLU(), nn.Conv2d(6, 3, 3, padding=1))
    graph = after(network, fuse_activations, fold_constant_channels, remove_dead_channels)
    assert graph.shapes[graph.nodes[0].output][1] == 4


def test_dead_channels_go_through_depthwise_convolutions_and_residuals_keep_theirs() -> None:
    class Inverted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = with_zero_rows(nn.Conv2d(6, 12, 1), [2, 3, 9])
            self.mid = nn.Conv2d(12, 12, 3, padding=1, groups=12)
            self.down = nn.Conv2d(12, 6, 1)
            with torch.no_grad():
                self.up.bias[[2, 3]] = -1.0
                self.up.bias[9] = 1.0
                self.down.weight[:, [5, 7]] = 0

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.mid(self.up(x).relu()).relu())

    torch.manual_seed(0)
    graph = after(Inverted(), fuse_activations, fuse_residuals, fold_constant_channels, remove_dead_channels)
    # channels 2 and 3 are zero, 5 and 7 are not read; 9 is one beside the padding of the depthwise convolution
    assert [graph.shapes[node.output][1] for node in graph] == [8, 8, 6]


def test_a_layer_without_weights_leaves_one_channel() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(with_zero_rows(conv(), list(range(6))), nn.ReLU(), nn.Conv2d(6, 3, 1))
    graph = after(network, fuse_activations, fold_constant_channels, remove_dead_channels)
    assert graph.shapes[graph.nodes[0].output] == (2, 1, 7, 6)


def test_constants_pass_poolings_concatenations_and_flattenings() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = with_zero_rows(conv(), [0, 5]), nn.Linear(12 * 3 * 3, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).tanh()
            parts = [functional.max_pool2d(y, 2), functional.avg_pool2d(y, 2)]
            return self.head(torch.cat(parts, 1)[:, torch.arange(11, -1, -1)].flatten(1))

    torch.manual_seed(0)
    graph = after(Pooled(), fuse_activations, fold_constant_channels, remove_dead_channels)
    assert graph.shapes[graph.nodes[0].output][1] == 4
    assert isinstance(graph.nodes[-1].op, Linear)
    assert graph.nodes[-1].op.weight.shape == (4, 8 * 9)


def test_a_constant_beside_minus_infinity_is_none() -> None:
    class Surrounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = with_zero_rows(conv(), [0]), nn.Conv2d(6, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(functional.pad(self.conv(x), (1, 1), value=-torch.inf).sigmoid())

    torch.manual_seed(0)
    graph = after(Surrounded(), fold_constant_channels, remove_dead_channels)
    assert graph.shapes[graph.nodes[0].output][1] == 6


def test_a_gate_keeps_the_channels_of_what_it_multiplies() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.gate, self.out = conv(), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1)
            with torch.no_grad():
                self.out.weight[:, :2] = 0
                self.gate.weight[:, 0] = 0

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.out(y * self.gate(y.mean((2, 3), keepdim=True)).sigmoid())

    torch.manual_seed(0)
    graph = after(Gated(), fuse_activations, fold_constant_channels, remove_dead_channels)
    # channel 0 is read by nobody, channel 1 by the gate only
    assert [graph.shapes[node.output][1] for node in graph] == [5, 5, 5, 5, 2]
