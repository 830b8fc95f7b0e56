"""The torch backend against float64 eager, in float32, with sparse products where they pay and where they do not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from networks import Call, eager, fill, networks
from torch import Tensor, nn
from torch.nn import functional

from netwright.deploy import backend_torch
from netwright.deploy.backend_torch import TorchBackend, pays
from netwright.deploy.graph import Graph, Node, capture, optimise, run
from netwright.deploy.graph.ir import ACTIVATIONS, Activation, Constant, Conv, ConvTranspose, Linear


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(networks())
def test_any_network(network: tuple[nn.Module, Tensor]) -> None:
    module, x = network
    backend = TorchBackend(optimise(capture(module, x)))
    assert_close(backend([x])[0], eager(module, x)[0])
    assert torch.equal(backend([x])[0], backend([x])[0])


def sparse_network(density: float, seed: int = 0) -> nn.Module:
    network = nn.Sequential(
        nn.Conv2d(8, 96, 1), nn.BatchNorm2d(96), nn.ReLU6(), nn.Conv2d(96, 96, 1), nn.Hardswish(),
        nn.Conv2d(96, 64, 3, 2), nn.Flatten(), nn.Linear(64 * 9, 512), nn.ELU(), nn.Linear(512, 512),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    fill(network, seed)
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                values = torch.randn(layer.weight.shape, generator=draw) * layer.weight[0].numel() ** -0.5
                layer.weight.copy_(values * (torch.rand(layer.weight.shape, generator=draw) < density))
    return network.eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_sparse_and_dense_products(batch: int, density: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sparse_network(density)
    x = torch.randn(batch, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    graph = optimise(capture(module, x))
    expected = eager(module, x)[0]
    assert_close(TorchBackend(graph)([x])[0], expected)
    for forced in (False, True):
        monkeypatch.setattr(backend_torch, "pays", lambda weight, products, forced=forced: forced)
        assert_close(TorchBackend(graph)([x])[0], expected)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_epilogues(kind: str) -> None:
    """Bias, residual and activation behind every kind of product, against float64."""
    draw = np.random.default_rng(0)
    act = Activation(kind, 0.2, 1.5)
    weight = draw.normal(size=(128, 128)) * (draw.random((128, 128)) < 0.05)
    bias = draw.normal(size=128)
    ops = [
        (Conv(weight[:, :, None, None], bias, act=act), (2, 128, 7, 6)),
        (Conv(weight.reshape(128, 128, 1, 1)[:, :, :, [0, 0, 0]], bias, padding=(0, 1, 0, 1), act=act), (2, 128, 7, 6)),
        (Conv(weight.reshape(128, 128, 1, 1)[:, :, :, [0, 0]], None, padding=(1, 0, -1, 1), act=act), (2, 128, 7, 6)),
        (ConvTranspose(weight.reshape(128, 128, 1, 1), bias, act=act), (2, 128, 7, 6)),
        (Linear(weight, bias, act), (1, 128)),
        (Linear(weight, None, act), (9, 128)),
    ]
    for op, shape in ops:
        graph = Graph({0: shape, 1: shape, 2: shape}, [Node(op, [0, 1], 2)], [0, 1], [2])
        inputs = [torch.from_numpy(draw.normal(size=shape)).float() for _ in range(2)]
        before = [x.clone() for x in inputs]
        assert_close(TorchBackend(graph)(inputs)[0], run(graph, inputs)[0])
        assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


def test_results_belong_to_the_caller() -> None:
    """Changing an output changes neither inputs, nor constants, nor another output."""

    class Ends(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = functional.relu(x)
            return x, y, y.flatten(1), torch.ones(2, 3)

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    kept = x.clone()
    backend = TorchBackend(optimise(capture(Ends().eval(), x)))
    for output in backend([x]):
        output.fill_(7.0)
    found = backend([x])
    assert torch.equal(x, kept)
    assert torch.equal(found[1].flatten(1), found[2])
    assert torch.equal(found[3], torch.ones(2, 3))


def test_a_dropped_weight_does_not_spread_what_is_not_finite() -> None:
    module = sparse_network(0.02)[3:4]
    x = torch.randn(1, 96, 8, 8, generator=torch.Generator().manual_seed(1))
    x[0, 5, 2, 3], x[0, 7, 0, 0] = torch.nan, torch.inf
    graph = optimise(capture(module, x))
    assert pays(graph.nodes[0].op.weight, 96 * 96 * 64)  # type: ignore[attr-defined]
    expected = run(graph, [x], kept_only=True)[0]
    torch.testing.assert_close(TorchBackend(graph)([x])[0].double(), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_a_slice_that_became_part_of_a_convolution_is_read_alone() -> None:
    module = nn.Sequential(Call(lambda x: x[:, 2:5]), nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()).eval()
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    x[:, 0], x[:, 5] = torch.inf, torch.nan
    graph = optimise(capture(module, x))
    assert len(graph.nodes) == 1
    torch.testing.assert_close(TorchBackend(graph)([x])[0], module(x).detach())


def test_the_rule() -> None:
    weight = np.zeros((64, 256))
    weight[:, :10] = 1
    assert pays(weight, 64 * 256 * 49)
    assert not pays(weight, 64 * 256)
    assert not pays(np.ones((64, 256)), 64 * 256 * 49)
    assert not pays(np.zeros((64, 16)), 64 * 16 * 10000)  # writing the output costs more than the product


def test_the_number_of_threads_is_set_for_the_call_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    before = torch.get_num_threads()
    graph = Graph({0: (1, 1)}, [Node(Constant(np.ones((1, 1), np.float32)), [], 0)], [], [0])
    backend = TorchBackend(graph, threads=before + 1)
    step = backend._steps[0]
    step.kernel = lambda: seen.append(torch.get_num_threads()) or torch.ones(1, 1)
    backend([])
    assert seen == [before + 1]
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        TorchBackend(graph, threads=0)


def test_inputs_are_checked() -> None:
    module = nn.Conv1d(3, 2, 3).eval()
    x = torch.randn(2, 3, 9)
    backend = TorchBackend(optimise(capture(module, x)))
    assert backend([x])[0].shape == (2, 2, 7)
    with pytest.raises(ValueError, match=r"input 0 must be float32 on the cpu, got torch\.float64"):
        backend([x.double()])
    with pytest.raises(ValueError, match=r"input 0 must have shape \(2, 3, 9\), got \(2, 3, 8\)"):
        backend([x[..., :8]])
    with pytest.raises(ValueError, match="inputs must be 1 tensors, got 2"):
        backend([x, x])
    strided = torch.randn(2, 9, 3).transpose(1, 2)
    torch.testing.assert_close(backend([strided])[0], module(strided).detach())


def test_the_graph_may_change_afterwards() -> None:
    module, x = sparse_network(0.1), torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    graph = optimise(capture(module, x))
    kept = copy.deepcopy(graph)
    backend = TorchBackend(graph)
    graph.nodes.clear()
    graph.outputs.clear()
    assert_close(backend([x])[0], run(kept, [x])[0])
