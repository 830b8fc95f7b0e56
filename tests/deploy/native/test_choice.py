"""Geometry, memory, the choice of kernels and its measurement, transposed convolutions taken apart."""

from __future__ import annotations

import dataclasses
import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright import storage
from netwright.deploy.graph.ir import Activation, Conv, ConvTranspose, Graph, Node
from netwright.deploy.graph.reference import run
from netwright.deploy.native import tune
from netwright.deploy.native.build import COMPILERS
from netwright.deploy.native.choose import Choice, candidates, choose
from netwright.deploy.native.emit import layers
from netwright.deploy.native.layout import LINE, blocks, cuts, geometry, lower
from netwright.deploy.native.machine import Machine, this_machine
from netwright.deploy.native.memory import Life, plan
from netwright.deploy.native.runtime import Network

compiled = pytest.mark.skipif(not any(shutil.which(n) for n in COMPILERS), reason="no C compiler is installed")


@given(st.integers(1, 4), st.integers(1, 99), st.integers(1, 60), st.integers(1, 60))
def test_planes_have_room_for_a_vector_and_large_ones_are_an_odd_number_of_lines_apart(n, c, h, w):
    geo = geometry((n, c, h, w))
    if n * h * w == 1:
        assert geo.flat
        return
    assert geo.plane % LINE == 0
    assert geo.plane >= n * h * w + LINE - 1
    assert geo.plane // LINE <= 24 or geo.plane // LINE % 2 == 1
    assert geo.size >= (c - 1) * geo.plane + n * h * w + LINE


@given(st.integers(1, 500), st.integers(1, 20))
def test_blocks_are_nearly_equal(vectors, most):
    sizes = blocks(vectors, most)
    assert sum(sizes) == vectors
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("kind", ["taps", "shifted", "phased"])
@pytest.mark.parametrize("most", [1, 3, 8, 16])
def test_cuts_cover_a_band_once(kind, most):
    op = Conv(np.ones((4, 4, 3, 3), np.float32), padding=(1,) * 4)
    geo = geometry((1, 4, 20, 40))
    bands = lower(op, geo, geo, kind=kind, unit=8, band=7)
    pieces = cuts(bands, bands.vectors, most)
    covered = [v for first, size in pieces for v in range(first, first + size)]
    assert covered == list(range(bands.vectors))
    assert max(size for _, size in pieces) <= most
    if kind == "phased":  # whole rows, or parts of one
        assert all(size % bands.per_row == 0 or first % bands.per_row + size <= bands.per_row for first, size in pieces)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=25))
def test_lives_that_meet_never_share_memory(drawn):
    lives = {str(i): Life(size, first, first + length) for i, (size, first, length) in enumerate(drawn)}
    offsets, total = plan(lives)
    for a, b in itertools.combinations(lives, 2):
        meet = lives[a].first <= lives[b].last and lives[b].first <= lives[a].last
        apart = offsets[a] + lives[a].size <= offsets[b] or offsets[b] + lives[b].size <= offsets[a]
        assert apart or not meet
    assert all(offset % LINE == 0 for offset in offsets.values())
    assert total >= max(offsets[n] + life.size for n, life in lives.items())


def test_memory_is_used_again():
    lives = {str(i): Life(1000, i, i + 1) for i in range(10)}
    assert plan(lives)[1] < 3 * 1000 + 200


def random_conv(density: float, shape: tuple[int, ...] = (64, 64, 3, 3), seed: int = 0) -> Conv:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape).astype(np.float32) * (rng.random(shape) < density)
    return Conv(weight, padding=(shape[2] // 2,) * 4)


def test_dense_layers_get_the_dense_kernel_and_sparse_ones_the_sparse():
    machine, geo = Machine(8), geometry((1, 64, 28, 28))
    assert choose(random_conv(0.9), geo, geo, machine).dense
    assert not choose(random_conv(0.1), geo, geo, machine).dense
    grouped = Conv(np.ones((64, 8, 3, 3), np.float32), padding=(1,) * 4, groups=8)
    assert not choose(grouped, geo, geo, machine).dense


def test_the_denser_a_layer_the_more_it_pays_to_align_its_operands():
    machine, geo = Machine(16, 48 * 1024, 2 * 1024**2), geometry((1, 128, 28, 28))
    kinds = [choose(random_conv(d, (128, 128, 3, 3)), geo, geo, machine).kind for d in (0.005, 0.2)]
    assert kinds == ["phased", "shifted"]
    small = geometry((1, 128, 5, 5))
    assert choose(random_conv(0.1, (128, 128, 3, 3)), small, small, machine).kind == "taps"


def test_chunks_leave_enough_weights_in_a_row():
    op, geo = random_conv(0.02, (32, 256, 1, 1)), geometry((1, 256, 40, 40))
    chunks = {c.chunks for c in candidates(op, geo, geo, Machine(8), dense=False)}
    assert chunks == {1}


def in_folder(monkeypatch, folder):
    monkeypatch.setenv("NETWRIGHT_CACHE", str(folder))
    monkeypatch.setattr(storage, "_cache", [])


@compiled
def test_measured_choices_are_kept_and_used(monkeypatch, tmp_path):
    in_folder(monkeypatch, tmp_path)
    graph = Graph()
    x, y = graph.new_value((1, 16, 12, 12)), graph.new_value((1, 16, 12, 12))
    graph.nodes, graph.inputs, graph.outputs = [Node(random_conv(0.2, (16, 16, 3, 3)), [x], y, "c")], [x], [y]
    found = layers(graph)
    machine = this_machine()
    choice = tune.tuned(found, machine)(*found[0], machine)
    assert choice in list(candidates(*found[0], machine, dense=False))
    (kept,) = (tmp_path / "tuning").iterdir()

    def never(*_args):
        raise AssertionError("measured again")

    monkeypatch.setattr(tune, "_measure", never)
    again = dataclasses.replace(found[0][0], weight=found[0][0].weight * 2)
    assert tune.tuned([(again, *found[0][1:])], machine)(again, *found[0][1:], machine) == choice
    kept.write_text("{")
    with pytest.raises(AssertionError, match="measured again"):
        tune.tuned(found, machine)


def test_a_layer_that_was_not_measured_is_chosen_by_the_model(tmp_path, monkeypatch):
    in_folder(monkeypatch, tmp_path)
    geo, machine = geometry((1, 64, 28, 28)), Machine(8)
    op = random_conv(0.1)
    chosen = tune.tuned([], machine)(op, geo, geo, machine)
    assert chosen == choose(op, geo, geo, machine)
    assert isinstance(chosen, Choice)


@compiled
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    kernel=st.sampled_from([1, 2, 3, 4]),
    stride=st.sampled_from([1, 2, 3]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 2, 4]),
    residual=st.booleans(),
)
def test_transposed_convolution(seed, kernel, stride, dilation, groups, residual):
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(2, 9, 2))
    padding = int(rng.integers(0, max(1, dilation * (kernel - 1) // 2 + 1)))
    extra = int(rng.integers(0, stride)) if stride > 1 else 0
    weight = rng.standard_normal((4, 2, kernel, kernel)).astype(np.float32)
    weight *= rng.random(weight.shape) < 0.7
    out = [(n - 1) * stride - 2 * padding + dilation * (kernel - 1) + extra + 1 for n in (height, width)]
    if min(out) < 1:
        return
    bias = rng.standard_normal(2 * groups).astype(np.float32)
    op = ConvTranspose(
        weight, bias, (stride, stride), (padding, padding), (dilation, dilation),
        groups, Activation("relu"),
    )  # fmt: skip
    graph = Graph()
    values = [graph.new_value((2, 4, height, width))]
    values += [graph.new_value((2, 2 * groups, *out))] if residual else []
    y = graph.new_value((2, 2 * groups, *out))
    graph.nodes, graph.inputs, graph.outputs = [Node(op, values, y, "up")], values, [y]
    inputs = [rng.standard_normal(graph.shapes[v]).astype(np.float32) for v in values]
    found = np.full(graph.shapes[y], np.nan, np.float32)
    Network(graph)([a.ctypes.data for a in inputs], [found.ctypes.data])
    expected = run(graph, [torch.tensor(a).double() for a in inputs])[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
