"""Strips: the schedule against a simulation, networks against themselves without strips, gates, and what is chosen."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import eager, random_rows
from strips_everywhere import force
from torch import nn

from netwright.deploy.graph import capture, optimise
from netwright.deploy.native.build import COMPILERS
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


def check(monkeypatch, seed: int, unit: int, rows: int, threads: int) -> None:
    """The same bits, on an arena of NaN, and close to float64."""
    module, x = random_rows(seed)
    graph = optimise(capture(module, x))
    # a small cache: expansions run with their depthwise convolutions, copies are made in several bands
    machine = dataclasses.replace(this_machine(), unit=unit, l2_bytes=(4096, 1 << 20)[seed % 2])
    wanted = call(Network(graph, machine=machine, strips=False), x)
    force(monkeypatch, rows)
    network = Network(graph, threads, machine=machine)
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
