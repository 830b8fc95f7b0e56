"""The bound: against sums by hand, and the small C program against NumPy. Rates themselves are nobody's oracle."""

from __future__ import annotations

import ctypes
import math

import numpy as np
import pytest

from netwright.deploy.bench import Facts, Layer, Peaks, measure_peaks
from netwright.deploy.bench.peers import Native
from netwright.deploy.bench.roofline import _library, roofline
from netwright.deploy.native.machine import this_machine

PEAKS = Peaks(fma=100.0, rows_l1=50.0, rows_l2=40.0, rows_far=10.0, copy_l2=80.0, copy_far=20.0, l2_bytes=1000)
M = 10**6


def net(*layers, more=0):
    macs = sum(layer.macs for layer in layers) + more
    kept = sum(layer.sparse_macs for layer in layers) + more
    return Facts(1, 0.9, 1, 0.9, macs, kept, kept, False, 4, layers)


def layer(kind, macs, kept, moved=10, live=None):
    return Layer(kind, kind, 1, 1, macs, kept, kept if live is None else live, moved, moved)


def test_each_kind_at_its_rate():
    found = roofline(net(layer("sparse", 400 * M, 25 * M), layer("dense", 50 * M, 50 * M)), PEAKS, 8.0)
    assert found.parts == {"sparse": 1.0, "dense": 1.0, "depthwise": 0.0, "traffic": 0.0}
    assert (found.bound_ms, found.ratio, found.layered_ms, found.layered_ratio) == (2.0, 4.0, 2.0, 4.0)
    found = roofline(net(layer("depthwise", 100 * M, 50 * M)), PEAKS, None)
    assert (found.bound_ms, found.ratio, found.binds) == (2.0, None, "depthwise")


def test_zeros_are_multiplied_where_that_is_cheaper():
    assert roofline(net(layer("sparse", 40 * M, 30 * M)), PEAKS, 1.0).parts["sparse"] == 0.8


def test_channels_that_are_constant_cost_nothing():
    for kind in ("sparse", "depthwise"):
        assert roofline(net(layer(kind, 400 * M, 50 * M, live=25 * M)), PEAKS, 1.0).parts[kind] == 1.0


def test_traffic_counts_beyond_the_second_level_and_stands_apart():
    assert roofline(net(layer("sparse", 0, 0, moved=500)), PEAKS, 1.0).parts["traffic"] == 0
    found = roofline(net(layer("sparse", 400 * M, 25 * M, moved=20 * M)), PEAKS, 6.0)
    assert found.parts["traffic"] == 2.0  # 40 MB at 20 GB/s
    assert (found.bound_ms, found.ratio, found.layered_ms, found.layered_ratio) == (1.0, 6.0, 3.0, 2.0)
    assert found.binds == "traffic"


def test_threads_share_the_work_and_products_of_activations_are_dense():
    found = roofline(net(layer("sparse", 400 * M, 25 * M, moved=20 * M), more=50 * M), PEAKS, 6.0, threads=2)
    assert found.parts == {"sparse": 0.5, "dense": 0.5, "depthwise": 0.0, "traffic": 1.0}


def test_text_names_what_binds():
    text = str(roofline(net(layer("sparse", 400 * M, 25 * M)), PEAKS, 8.0))
    assert "bound: 1.000 ms, 8.0 times the fastest dense runtime" in text
    assert text.endswith("what binds: sparse")


needs_compiler = pytest.mark.skipif(Native().absent() is not None, reason="no C compiler")


@needs_compiler
def test_the_program_multiplies_adds_and_copies():
    library, row = _library(this_machine()), 0
    row = library.nw_peak_row_bytes() // 4
    assert row >= 16
    draw = np.random.default_rng(0)
    data = draw.integers(-8, 8, 5 * row).astype(np.float32)
    table = np.zeros(5, [("offset", np.int32), ("weight", np.float32)])
    table["offset"], table["weight"] = 4 * row * draw.permutation(5), draw.integers(-4, 4, 5)
    # Lane 0 of each vector of a row, summed over vectors and rows: whole numbers, exact in float32.
    unit = this_machine().unit
    rows = data.reshape(5, row)[table["offset"] // (4 * row)]
    expected = 3 * float((table["weight"][:, None] * rows)[:, ::unit].sum())
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (table, data)]
    found = library.nw_peak_rows(pointers[0], ctypes.c_int64(5), pointers[1], ctypes.c_int64(3))
    assert found == expected
    copy = np.zeros_like(data)
    library.nw_peak_copy(
        pointers[1], copy.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(len(data)), ctypes.c_int64(1)
    )
    assert np.array_equal(copy, data)
    # a -> 0.999 a + 0.001 from ten starts 0.0 .. 0.9: the distances to 1 shrink by 0.999 each time
    assert library.nw_peak_fma(ctypes.c_int64(100)) == pytest.approx(10 - 5.5 * 0.999**100, rel=1e-4)


@needs_compiler
def test_peaks_are_numbers():
    found = measure_peaks(0.06).to_dict()
    assert set(found) == {"fma", "rows_l1", "rows_l2", "rows_far", "copy_l2", "copy_far", "l2_bytes"}
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    with pytest.raises(ValueError, match="seconds must be > 0, got 0"):
        measure_peaks(0)
