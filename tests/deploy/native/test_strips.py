"""Strips: the schedule against a simulation, networks against themselves without strips, gates, and what is chosen."""

from __future__ import annotations

import dataclasses
import shutil
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import eager, random_rows
from strips_everywhere import force
from torch import nn

from netwright import storage
from netwright.deploy.graph import capture, optimise
from netwright.deploy.native import fuse, tune
from netwright.deploy.native.build import COMPILERS
from netwright.deploy.native.choose import choose
from netwright.deploy.native.emit import compile_graph
from netwright.deploy.native.layout import geometry
from netwright.deploy.native.machine import Machine, this_machine
from netwright.deploy.native.runtime import Network
from netwright.deploy.native.strips import Layer, Reach, Strips

compiled = pytest.mark.skipif(not any(shutil.which(n) for n in COMPILERS), reason="no C compiler is installed")
UNITS = sorted({4, 8, this_machine().unit})


@st.composite
def chains(draw) -> Strips:
    """Windows of every kind one behind the other, some of them with residuals; value 0 is the input."""
    images, width = draw(st.integers(1, 3)), draw(st.sampled_from([8, 13, 16, 24]))
    shapes = {0: geometry((images, 2, draw(st.integers(8, 40)), width))}
    layers = []
    for value in range(1, draw(st.integers(2, 6))):
        height, stride, dilation = shapes[value - 1].h, draw(st.integers(1, 3)), draw(st.integers(1, 2))
        span, top = (draw(st.integers(1, 5)) - 1) * dilation + 1, draw(st.integers(-1, 3))
        out = (height + 2 * max(0, top) - span) // stride + 1
        if out < 1:
            stride, span, top, out = 1, 1, 0, height
        shapes[value] = geometry((images, 2, out, width))
        addends = [v for v in range(value - 1) if shapes[v].h == out and draw(st.booleans())]
        layers.append(Layer(value, (Reach(value - 1, stride, top, span), *(Reach(v) for v in addends))))
    return Strips(tuple(layers), shapes, draw(st.integers(1, 9)), draw(st.integers(1, 3)))


@settings(max_examples=300, deadline=None)
@given(chains())
def test_rows_are_there_when_they_are_read_and_every_row_is_computed_once(strips):
    rooms, done = strips.rooms(), set()
    for share in strips.shares():
        for image, begin, end in share:
            memory = {value: {} for value in rooms}  # place in the room -> row
            computed: dict[int, list[int]] = {layer.output: [] for layer in strips.chain}
            for part in strips.parts(begin, end):
                layer, most = strips.chain[part.layer], strips.most()[part.layer]
                assert part.last - part.first <= most
                for slide in part.slides:
                    room = memory[slide.value]
                    memory[slide.value] = {place: room[place + slide.skip] for place in range(slide.rows)}
                for reach in layer.reads:
                    if reach.value in rooms:
                        first, last = part.held[reach.value]
                        for row in range(*reach.rows(part.first, part.last, strips.shapes[reach.value].h)):
                            assert first <= row < last
                            assert memory[reach.value][row - first] == row
                for row in range(part.first, part.last):
                    if layer.output in rooms:
                        place = row - part.held[layer.output][0]
                        assert 0 <= place < rooms[layer.output]
                        memory[layer.output][place] = row
                    else:
                        assert (image, row) not in done
                        done.add((image, row))
                computed[layer.output] += range(part.first, part.last)
            assert all(rows == sorted(set(rows)) for rows in computed.values())
    geo = strips.shapes[strips.output]
    assert done == {(image, row) for image in range(geo.n) for row in range(geo.h)}


def call(network: Network, x: torch.Tensor) -> list[np.ndarray]:
    outputs = [np.full(shape, np.nan, np.float32) for shape in network.outputs]
    network([x.data_ptr()], [y.ctypes.data for y in outputs])
    return outputs


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x.view(np.int32), y.view(np.int32)) for x, y in zip(a, b, strict=True))


def in_strips(network: Network) -> int:
    return sum("strips" in what for _, what, _ in network.steps)


# The only possible chain ends with an elementwise operation, which of several threads none may run in strips.
UNSHARED = {139}


def check(monkeypatch, seed: int, unit: int, rows: int, threads: int) -> None:
    """The same bits, on an arena of NaN, and close to float64."""
    module, x = random_rows(seed)
    graph = optimise(capture(module, x))
    # a small cache: expansions run with their depthwise convolutions, copies are made in several bands
    machine = dataclasses.replace(this_machine(), unit=unit, l2_bytes=(4096, 1 << 20)[seed % 2])
    wanted = call(Network(graph, machine=machine, strips=False), x)
    force(monkeypatch, rows)
    network = Network(graph, threads, machine=machine)
    if seed in UNSHARED:
        assert threads > 1
        assert not in_strips(network)
        assert in_strips(Network(graph, machine=machine))
    else:
        assert in_strips(network)
    network._arena[:] = np.nan
    for _ in range(1 + threads):
        assert same(call(network, x), wanted)
    for found, exact in zip(wanted, eager(module, x), strict=True):
        assert np.abs(found - exact.numpy()).max() <= 1e-5 * exact.abs().max()


@compiled
@pytest.mark.parametrize("seed", range(6))
def test_strips_give_the_same_bits(seed, monkeypatch):
    check(monkeypatch, seed, UNITS[seed % len(UNITS)], (2, 3, 4, 7)[seed % 4], 1 + seed % 3)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_more_strips_give_the_same_bits(seed, monkeypatch):
    check(monkeypatch, seed, UNITS[seed % len(UNITS)], (1, 2, 3, 4, 5, 8)[seed % 6], 1 + seed % 3)


def small_network() -> tuple[nn.Module, torch.Tensor]:
    """A stem, a pool, an inverted residual block and a strided convolution, one weight of four kept."""
    source = torch.Generator().manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 48, 1), nn.ReLU6(),
        nn.Conv2d(48, 48, 3, 1, 1, groups=48), nn.ReLU6(), nn.Conv2d(48, 16, 1), nn.Conv2d(16, 24, 3, 2, 1),
    ]  # fmt: skip
    module = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            kept = torch.rand(parameter.shape, generator=source) < (0.25 if parameter.ndim == 4 else 1)
            parameter.copy_(torch.randn(parameter.shape, generator=source) * kept)
    return module, torch.randn(2, 3, 96, 112, generator=source)


@compiled
def test_a_small_cache_means_strips_and_a_smaller_arena_and_a_large_one_none():
    module, x = small_network()
    graph = optimise(capture(module, x))
    small, large = (dataclasses.replace(this_machine(), l2_bytes=size) for size in (1 << 18, 1 << 28))
    network, peer = Network(graph, machine=small), Network(graph, machine=small, strips=False)
    assert in_strips(network)
    assert not in_strips(peer)
    assert network.arena_bytes < 0.75 * peer.arena_bytes
    assert same(call(network, x), call(peer, x))
    assert not in_strips(Network(graph, machine=large))


def test_rows_of_a_chain_fit_half_of_the_cache():
    module, x = small_network()
    graph = optimise(capture(module, x))
    sizes = {}
    for kilobytes in (128, 256, 512):
        made = compile_graph(graph, Machine(16, l2_bytes=kilobytes * 1024))
        sizes[kilobytes] = [int(what.split()[-2]) for _, what, _ in made.steps if "strips" in what]
    assert all(sizes.values())
    assert max(sizes[128]) <= max(sizes[256]) <= max(sizes[512])


def test_a_value_that_is_read_elsewhere_or_is_an_output_ends_a_chain(monkeypatch):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            first = self.b(self.a(x))
            return self.c(first), first

    force(monkeypatch, 2)
    made = compile_graph(optimise(capture(Twice().eval(), torch.zeros(1, 4, 16, 16))), Machine(8))
    assert [path for path, what, _ in made.steps if "strips" in what] == ["a to b"]


GATED = {
    "sigmoid": (nn.Sigmoid, 1, (1, 12, 9, 11)),
    "batch": (nn.Hardsigmoid, 1, (3, 12, 9, 11)),
    "grouped": (nn.Sigmoid, 2, (2, 12, 17, 16)),
    "large": (nn.Sigmoid, 1, (1, 12, 40, 40)),
}


class Gated(nn.Module):
    """A squeeze-and-excitation block before a 1x1 convolution with a residual."""

    def __init__(self, gate: type[nn.Module], groups: int, channels: int, *, read_twice: bool = False) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1), gate()
        self.project, self.read_twice = nn.Conv2d(channels, channels, 1, groups=groups), read_twice

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * self.gate(self.up(torch.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return torch.relu(self.project(scaled) + (scaled if self.read_twice else x))


@compiled
@pytest.mark.parametrize("name", GATED)
def test_a_gate_scales_the_input_of_the_convolution_behind_it(name, monkeypatch):
    gate, groups, shape = GATED[name]
    module, x = Gated(gate, groups, shape[1]).eval(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module.project.weight *= torch.rand(module.project.weight.shape) < 0.4
    graph = optimise(capture(module, x))
    machine = dataclasses.replace(this_machine(), l2_bytes=1 << 14)  # a large map is copied in several bands
    fused = [Network(graph, threads, machine=machine) for threads in (1, 2, 3)]
    monkeypatch.setattr(fuse, "_gates", lambda *_: {})
    peer = Network(graph, machine=machine)
    assert len(fused[0].steps) == len(peer.steps) - 1
    wanted = call(peer, x)
    assert all(same(call(network, x), wanted) for network in fused)
    (exact,) = eager(module, x)
    assert np.abs(wanted[0] - exact.numpy()).max() <= 1e-6 * exact.abs().max()


def test_a_product_that_something_else_reads_is_written():
    x = torch.zeros(1, 12, 9, 11)
    once, twice = (Gated(nn.Sigmoid, 1, 12, read_twice=twice).eval() for twice in (False, True))
    kernels = [[what for _, what, _ in compile_graph(optimise(capture(m, x)), Machine(8)).steps] for m in (once, twice)]
    assert "mul" not in kernels[0]
    assert "mul" in kernels[1]


@compiled
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_gated_networks(name, monkeypatch):
    import torchvision

    module = torchvision.models.get_model(name, weights=None).eval()
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                kept = 0.1 if layer.weight.shape[1] > 1 else 1.0
                values = torch.randn(layer.weight.shape, generator=source)
                values *= torch.rand(values.shape, generator=source) < kept
                layer.weight.copy_(values * max(1, (values != 0).sum() / len(values)) ** -0.5)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.bias.copy_(0.1 * torch.randn(layer.bias.shape, generator=source))
    x = torch.randn(1, 3, 64, 64, generator=source)
    graph = optimise(capture(module, x))
    network = Network(graph)
    monkeypatch.setattr(fuse, "_gates", lambda *_: {})
    peer = Network(graph)
    assert len(network.steps) < len(peer.steps)
    (found,) = call(network, x)
    assert same([found], call(peer, x))
    (exact,) = eager(module, x)
    assert np.abs(found - exact.numpy()).max() <= 1e-5 * exact.abs().max()


@compiled
def test_the_tuner_can_turn_strips_off_and_keeps_what_it_found(monkeypatch, tmp_path):
    monkeypatch.setenv("NETWRIGHT_CACHE", str(tmp_path))
    monkeypatch.setattr(storage, "_cache", [])
    module, x = small_network()
    graph = optimise(capture(module, x))
    machine = dataclasses.replace(this_machine(), l2_bytes=1 << 18)
    clock = iter([0, 1, 0, 3] * tune.REPEATS)  # strips take one second, the layers one by one three
    monkeypatch.setattr(tune, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert tune.strips_pay(graph, 1, machine, choose)
    assert tune.strips_pay(graph, 1, machine, choose)  # the clock has stopped: it was not measured again
    (kept,) = (tmp_path / "tuning").iterdir()
    kept.unlink()
    clock = iter([0, 3, 0, 1] * tune.REPEATS)
    assert not tune.strips_pay(graph, 1, machine, choose)
    assert not tune.strips_pay(graph, 1, machine, choose)
    assert tune.strips_pay(graph, 1, dataclasses.replace(machine, l2_bytes=1 << 28), choose)  # there are none
