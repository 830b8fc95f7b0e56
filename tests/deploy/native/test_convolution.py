"""Every kernel of a convolution against torch in double precision: many layers at a time, compiled as one program."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch

from netwright.deploy.graph import capture, optimise
from netwright.deploy.graph.ir import Activation, Conv, Graph, Node
from netwright.deploy.graph.reference import run
from netwright.deploy.native.build import COMPILERS
from netwright.deploy.native.choose import Choice, candidates, choose, largest, shared
from netwright.deploy.native.layout import geometry, is_direct
from netwright.deploy.native.machine import Machine, this_machine
from netwright.deploy.native.runtime import Network

pytestmark = pytest.mark.skipif(not any(shutil.which(name) for name in COMPILERS), reason="no C compiler is installed")
UNITS = [4, 8, 16] if this_machine().unit == 16 else [4, 8]


class Layers:
    """Convolutions side by side in one graph, each with inputs and an output of its own, and a choice for each."""

    def __init__(self) -> None:
        self.graph, self.inputs, self.choices = Graph(), [], {}

    def add(
        self,
        op: Conv,
        shape: tuple[int, ...],
        out: tuple[int, int],
        choice: Choice | None,
        *,
        residual: bool,
        seed: int,
    ) -> None:
        rng = np.random.default_rng(seed)
        target = (shape[0], len(op.weight), *out)
        values = [self.graph.new_value(shape)] + ([self.graph.new_value(target)] if residual else [])
        output = self.graph.new_value(target)
        self.graph.nodes.append(Node(op, values, output, f"layer {len(self.graph.nodes)}"))
        self.graph.inputs += values
        self.graph.outputs.append(output)
        self.inputs += [rng.standard_normal(self.graph.shapes[v]).astype(np.float32) for v in values]
        self.choices[id(op)] = choice

    def chooser(self, op: Conv, x, y, machine) -> Choice:
        choice = self.choices.get(id(op))
        return choose(op, x, y, machine) if choice is None else choice

    def run(self, unit: int, threads: int = 1) -> list[np.ndarray]:
        machine = dataclasses.replace(this_machine(), unit=unit)
        network = Network(self.graph, threads, machine=machine, chooser=self.chooser)
        outputs = [np.full(self.graph.shapes[v], np.nan, np.float32) for v in self.graph.outputs]
        network([a.ctypes.data for a in self.inputs], [a.ctypes.data for a in outputs])
        return outputs

    def expected(self) -> list[np.ndarray]:
        return [t.numpy() for t in run(self.graph, [torch.tensor(a).double() for a in self.inputs])]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], layers: Layers) -> None:
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        op = layers.graph.nodes[number].op
        scale = np.abs(theirs).max() or 1.0
        assert np.abs(ours - theirs).max() / scale <= 1e-6, (
            number,
            dataclasses.replace(op, weight=None),
            layers.choices[id(op)],
        )


def conv(
    rng: np.random.Generator, shape: tuple[int, ...], rows: int, kernel: int, density: float, **settings
) -> tuple[Conv, tuple[int, int]]:
    """A random convolution of an input's shape, and height and width of its output."""
    groups = settings.get("groups", 1)
    weight = rng.standard_normal((rows, shape[1] // groups, kernel, kernel)).astype(np.float32)
    weight *= rng.random(weight.shape) < density
    op = Conv(weight, rng.standard_normal(rows).astype(np.float32), **settings)
    out = [
        (size + 2 * pad - d * (kernel - 1) - 1) // s + 1
        for size, pad, d, s in zip(shape[2:], op.padding[:2], op.dilation, op.stride, strict=True)
    ]
    return op, (out[0], out[1])


@pytest.mark.parametrize("unit", UNITS)
def test_register_blocks_residuals_activations_and_chunks(unit):
    """Every number of blocks, with and without residual and activation, 1 to 4 chunks, short and odd rows."""
    layers, rng = Layers(), np.random.default_rng(unit)
    machine = dataclasses.replace(this_machine(), unit=unit)
    acts = [Activation(), Activation("relu"), Activation("clamp", 0.0, 6.0), Activation("hardswish")]
    for most, (act, residual) in itertools.product(
        range(1, largest(machine) + 1), zip(acts, [True, False, True, False], strict=True)
    ):
        chunks = 1 + (most + residual) % 4
        shape = (1, 9, 3, unit * most // 3 + 1)
        op, out = conv(rng, shape, 7, 1, 0.4, act=act)
        op.weight[0], op.weight[1, 1:], op.weight[2, 2:] = 0.0, 0.0, 0.0
        layers.add(op, shape, out, Choice(False, "direct", most, chunks, None), residual=residual, seed=most)
    assert_close(layers.run(unit), layers.expected(), layers)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["taps", "shifted", "phased"])
def test_copies(unit, kind):
    """Strides, dilations, padding, groups, odd sizes, batches, bands of one row: every way to copy gives the same."""
    layers, rng = Layers(), np.random.default_rng(0)
    shapes = [(1, 4, 1, 1), (1, 4, 5, 7), (3, 6, 9, 4), (1, 4, 33, 17), (2, 4, 16, 33), (1, 6, 8, 8)]
    for number, (shape, kernel, stride) in enumerate(itertools.product(shapes, (1, 3, 5), (1, 2, 3))):
        dilation, groups, pad = 1 + number % 2, (1, 2)[number % 3 == 0], (kernel // 2, 0, kernel)[number % 3]
        if min(shape[2:]) + 2 * pad < dilation * (kernel - 1) + 1:
            continue
        settings = {
            "stride": (stride, stride),
            "padding": (pad,) * 4,
            "dilation": (dilation, dilation),
            "groups": groups,
        }
        op, out = conv(rng, shape, 6, kernel, (0.0, 0.1, 0.6)[number % 3], act=Activation("relu"), **settings)
        band = (None, 1, 2, 3)[number % 4]
        choice = Choice(False, kind, 1 + number % 6, 1 + number % 3, band)
        layers.add(op, shape, out, choice, residual=number % 2 == 0, seed=number)
    assert_close(layers.run(unit), layers.expected(), layers)


@pytest.mark.parametrize("unit", UNITS)
def test_dense(unit):
    layers, rng = Layers(), np.random.default_rng(1)
    for number, (rows, kernel, stride) in enumerate(itertools.product((1, 7, 8, 19), (1, 3), (1, 2))):
        shape = (1 + number % 2, 3, 13, 21)
        op, out = conv(rng, shape, rows, kernel, 1.0, stride=(stride, stride), padding=(kernel // 2,) * 4)
        direct = is_direct(op, geometry(shape), geometry((shape[0], rows, *out)))
        kind = "direct" if direct else ("taps", "shifted")[number % 2]
        layers.add(
            op, shape, out, Choice(True, kind, 3, 1, (None, 4)[number % 2]), residual=number % 3 == 0, seed=number
        )
    assert_close(layers.run(unit), layers.expected(), layers)


@pytest.mark.parametrize("unit", UNITS)
def test_depthwise(unit):
    """Windows over the input itself, over a copy, and lists of taps; channel multipliers, sizes from 1 on."""
    layers, rng = Layers(), np.random.default_rng(2)
    sides = [(1, 1), (2, 3), (7, 7), (14, 15), (17, 33), (40, 70)]
    for number, ((height, width), kernel, stride) in enumerate(itertools.product(sides, (3, 5, 7), (1, 2))):
        channels, multiplier, density = 3, 1 + number % 2, (1.0, 1.0, 0.3)[number % 3]
        shape = (1 + number % 3 // 2, channels, height, width)
        pad = (kernel // 2, kernel // 2, kernel // 2 + 1)[number % 3]
        settings = {"stride": (stride, stride), "padding": (pad,) * 4, "groups": channels}
        op, out = conv(
            rng, shape, channels * multiplier, kernel, density, act=Activation("clamp", 0.0, 6.0), **settings
        )
        layers.add(op, shape, out, None, residual=number % 2 == 0, seed=number)
    assert_close(layers.run(unit), layers.expected(), layers)


def test_expansion_is_fused_behind_a_depthwise_convolution_and_gives_the_same():
    rng = np.random.default_rng(3)
    for size, stride in ((57, 1), (58, 2)):
        graph = Graph()
        x, z = graph.new_value((1, 6, size, size)), graph.new_value((1, 200, size, size))
        first, _ = conv(rng, (1, 6, size, size), 200, 1, 0.3, act=Activation("clamp", 0.0, 6.0))
        second, out = conv(
            rng,
            (1, 200, size, size),
            200,
            3,
            1.0,
            stride=(stride, stride),
            padding=(1,) * 4,
            groups=200,
            act=Activation("relu"),
        )
        y = graph.new_value((1, 200, *out))
        graph.nodes = [Node(first, [x], z, "expand"), Node(second, [z], y, "depthwise")]
        graph.inputs, graph.outputs = [x], [y]
        network = Network(graph, machine=Machine(this_machine().unit, l2_bytes=2**20))
        assert [path for path, _, _ in network.steps] == ["expand + depthwise"]
        image, found = rng.standard_normal((1, 6, size, size)).astype(np.float32), np.empty((1, 200, *out), np.float32)
        network([image.ctypes.data], [found.ctypes.data])
        expected = run(graph, [torch.tensor(image).double()])[0].numpy()
        assert np.abs(found - expected).max() / np.abs(expected).max() <= 1e-6


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    layers, rng = Layers(), np.random.default_rng(4)
    for number, (shape, kernel, stride) in enumerate(
        itertools.product([(1, 12, 5, 7), (2, 12, 12, 4), (1, 12, 30, 35)], (1, 3), (1, 2))
    ):
        for density in (0.1, 1.0):
            op, out = conv(rng, shape, 17, kernel, density, stride=(stride, stride), padding=(kernel // 2,) * 4)
            layers.add(op, shape, out, None, residual=number % 2 == 0, seed=number)
    once = layers.run(this_machine().unit)
    for _ in range(3):
        for ours, theirs in zip(layers.run(this_machine().unit, threads), once, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("unit", UNITS)
def test_threads_share_the_rows_of_a_depthwise_convolution(unit):
    layers, rng = Layers(), np.random.default_rng(6)
    shapes = [(1, 5, 7, 7), (2, 5, 9, 6), (3, 4, 14, 14), (1, 3, 5, 40), (2, 3, 1, 9), (1, 2, 28, 33)]
    for number, (shape, kernel, stride) in enumerate(itertools.product(shapes, (3, 5, 7), (1, 2))):
        dilation = 2 if number % 5 == 4 else 1
        more = {"stride": (stride, stride), "dilation": (dilation, dilation), "groups": shape[1]}
        for density, padding in ((1.0, dilation * (kernel // 2)), (1.0, dilation * (kernel - 1)), (0.4, kernel // 2)):
            span = dilation * (kernel - 1) + 1
            if min(shape[2:]) + 2 * padding < span:
                continue
            op, out = conv(rng, shape, shape[1] * (1 + number % 2), kernel, density, padding=(padding,) * 4, **more)
            layers.add(op, shape, out, None, residual=number % 3 == 0, seed=number)
    once = layers.run(unit)
    assert_close(once, layers.expected(), layers)
    for threads in (2, 3):
        for ours, theirs in zip(layers.run(unit, threads), once, strict=True):
            assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("kernel", "stride", "images"), [(3, 1, 1), (3, 2, 2), (5, 1, 2), (5, 2, 1)])
def test_threads_compute_the_rows_of_an_expansion_that_they_read(kernel, stride, images):
    source = torch.Generator().manual_seed(7)
    layers = [
        torch.nn.Conv2d(6, 24, 1),
        torch.nn.ReLU6(),
        torch.nn.Conv2d(24, 24, kernel, stride, kernel // 2, groups=24),
        torch.nn.Conv2d(24, 8, 1),
    ]
    module = torch.nn.Sequential(*layers).eval()
    with torch.no_grad():
        for layer in (module[0], module[3]):
            layer.weight *= torch.rand(layer.weight.shape, generator=source) < 0.5
    x = torch.randn(images, 6, 18, 21, generator=source)
    graph, found = optimise(capture(module, x)), []
    for threads in (1, 2, 3):
        network = Network(graph, threads, machine=dataclasses.replace(this_machine(), l2_bytes=4096))
        assert any("sparse rows" in kernel for _, kernel, _ in network.steps)
        y = np.empty(network.outputs[0], np.float32)
        network([x.numpy().ctypes.data], [y.ctypes.data])
        found.append(y)
    with torch.no_grad():
        wanted = module.double()(x.double()).numpy()
    assert np.abs(found[0] - wanted).max() <= 1e-6 * np.abs(wanted).max()
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_step_is_shared_where_that_pays(monkeypatch):
    monkeypatch.undo()  # the thresholds of conftest.py
    small, large = geometry((1, 64, 14, 14)), geometry((1, 64, 56, 56))
    assert not shared(4e4, 10**9, large, large, copied=True)  # too little work for a barrier
    assert shared(6e4, 1, small, small, copied=True)
    assert shared(6e4, 1, large, small, copied=False)
    moved = 2 * 64 * 14 * 14
    assert shared(6e4, 25 * moved, small, small, copied=False)
    assert not shared(6e4, 25 * moved - 1, small, small, copied=False)


def test_a_kept_weight_spreads_nan_and_inf_and_a_dropped_one_does_not_exist():
    layers, rng = Layers(), np.random.default_rng(5)
    shape = (1, 8, 9, 9)
    op, out = conv(rng, shape, 6, 3, 0.2, padding=(1,) * 4)
    op.weight[0] = 0.0
    layers.add(op, shape, out, None, residual=False, seed=0)
    layers.inputs[0][0, 3, 4, 4], layers.inputs[0][0, 5, 0, 0] = np.nan, np.inf
    (found,) = layers.run(this_machine().unit)
    expected = run(layers.graph, [torch.tensor(layers.inputs[0]).double()], kept_only=True)[0].numpy()
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.array_equal(np.isposinf(found), np.isposinf(expected))
    assert np.isfinite(found[0, 0]).all()
    assert not np.isfinite(found[0, 1:]).all()


@pytest.mark.parametrize("unit", UNITS)
def test_all_candidates_of_a_layer_agree(unit):
    rng = np.random.default_rng(6)
    machine = dataclasses.replace(this_machine(), unit=unit)
    shape = (1, 24, 15, 15)
    op, out = conv(rng, shape, 20, 3, 0.15, padding=(1,) * 4)
    x, y = geometry(shape), geometry((1, 20, *out))
    found = [c for dense in (False, True) for c in candidates(op, x, y, machine, dense=dense)]
    assert {c.kind for c in found} == {"taps", "shifted", "phased"}
    layers = Layers()
    for choice in found:
        layers.add(dataclasses.replace(op, weight=op.weight.copy()), shape, out, choice, residual=False, seed=1)
    assert_close(layers.run(unit), layers.expected(), layers)
