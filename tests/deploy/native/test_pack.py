"""Tables of sparse layers, executed by a few lines of Python, against torch in double precision."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.deploy.graph.ir import Conv
from netwright.deploy.native import pack
from netwright.deploy.native.layout import geometry, is_direct, lower


def interpret(table: bytes, x: np.ndarray, bias: np.ndarray, pixels: int, unit: int, *, wide: bool) -> np.ndarray:
    """What the kernel does, one non-zero at a time: (rows, pixels)."""
    chunks, at_chunks, at_groups, at_order, at_offsets, at_weights = np.frombuffer(table, np.int32, 6)
    heads = np.frombuffer(table, np.int32, 5 * chunks, at_chunks).reshape(-1, 5)
    offsets = np.frombuffer(table[at_offsets:], np.int32 if wide else np.uint16)
    weights = np.frombuffer(table[at_weights:], np.float32)
    order, groups = np.frombuffer(table[at_order:], np.int32), np.frombuffer(table[at_groups:], np.int32)
    y = np.full((len(bias), pixels), np.nan)
    for number, (base, count, first_group, row, entry) in enumerate(heads):
        for nonzeros, rows in groups[2 * first_group : 2 * (first_group + count)].reshape(-1, 2):
            for o in order[row : row + rows]:
                total = np.full(pixels, bias[o], np.float64) if number == 0 else y[o]
                for at, weight in zip(
                    offsets[entry : entry + nonzeros], weights[entry : entry + nonzeros], strict=True
                ):
                    start = (int(base) + int(at)) * (1 if wide else unit)
                    total = total + float(weight) * x[start : start + pixels]
                y[o] = total
                entry += nonzeros
            row += rows
    return y


def lowered(x: np.ndarray, op: Conv, plan, target) -> np.ndarray:
    """The scratch memory of a band that holds the whole output of one image; NaN where nothing is copied."""
    channels, height, width = x.shape
    scratch = np.full(plan.scratch(channels), np.nan)
    for c in range(channels):
        for k, (dy, dx) in enumerate(plan.copies):
            for q in range(plan.rows):
                for j in range(plan.width):
                    row, column = q * plan.stride[0] + dy, j * plan.stride[1] + dx
                    inside = 0 <= row < height and 0 <= column < width
                    place = (c * len(plan.copies) + k) * plan.plane + q * plan.pitch + j
                    scratch[place] = x[c, row, column] if inside else 0.0
    return np.append(scratch, np.full(64, np.nan))


def random_conv(rng: np.random.Generator, groups: int, kernel: int, density: float, **settings: object) -> Conv:
    per_group, out = int(rng.integers(1, 5)), int(rng.integers(1, 4))
    weight = rng.standard_normal((groups * out, per_group, kernel, kernel)).astype(np.float32)
    weight *= rng.random(weight.shape) < density
    return Conv(weight, groups=groups, **settings)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.sampled_from([1, 2, 3]),
    dilation=st.sampled_from([1, 2]),
    groups=st.sampled_from([1, 1, 3]),
    kind=st.sampled_from(["taps", "shifted", "phased"]),
    chunks=st.integers(1, 4),
    unit=st.sampled_from([4, 8, 16]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_table_and_copies_make_a_convolution(seed, kernel, stride, dilation, groups, kind, chunks, unit, density):
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(dilation * (kernel - 1) + 1, 14, 2))
    pad = int(rng.integers(0, kernel + 1))
    op = random_conv(
        rng, groups, kernel, density, stride=(stride, stride), padding=(pad,) * 4, dilation=(dilation, dilation)
    )
    channels = op.weight.shape[1] * groups
    x = rng.standard_normal((channels, height, width)).astype(np.float32)
    bias = rng.standard_normal(len(op.weight)).astype(np.float32)
    expected = torch.nn.functional.conv2d(
        torch.tensor(x[None]).double(),
        torch.tensor(op.weight).double(),
        torch.tensor(bias).double(),
        stride,
        pad,
        dilation,
        groups,
    ).numpy()[0]
    source, target = geometry((1, channels, height, width)), geometry((1, *expected.shape))
    plan = lower(op, source, target, kind=kind, unit=unit)
    found = pack.entries(
        op.weight, groups, lambda ky, kx: np.array([plan.offset(c, ky, kx, source.plane) for c in range(channels)])
    )
    assert found.count == np.count_nonzero(op.weight)
    chunks = min(chunks, channels)
    wide = not pack.fits_16_bits(found, channels, chunks, unit)
    assert wide or not np.any(found.offset % unit)
    table = pack.sparse_table(found, channels, chunks, unit, wide=wide)
    rows = target.h if plan.per_row else 1
    length = plan.pitch if plan.per_row else target.h * target.w
    scratch = lowered(x, op, plan, target)
    assert not found.count or found.offset.min() >= 0
    y = np.stack([interpret(table, scratch[r * length :], bias, length, unit, wide=wide) for r in range(rows)], 1)
    y = y[:, :, : target.w] if plan.per_row else y.reshape(len(bias), target.h, target.w)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_each_weight_appears_once_and_rows_are_sorted_by_count():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 24, 1, 1)).astype(np.float32) * (rng.random((32, 24, 1, 1)) < 0.3)
    found = pack.entries(weight, 1, lambda ky, kx: np.arange(24) * 64)
    table = pack.sparse_table(found, 24, 3, 16, wide=False)
    chunks, at_chunks, at_groups, at_order, _, at_weights = np.frombuffer(table, np.int32, 6)
    assert chunks == 3
    weights = np.frombuffer(table[at_weights:], np.float32)[: found.count]
    assert sorted(weights.tolist()) == sorted(weight[weight != 0].tolist())
    order = np.frombuffer(table[at_order:], np.int32)
    for base, groups, first_group, first_row, _ in np.frombuffer(table, np.int32, 15, at_chunks).reshape(3, 5):
        pairs = np.frombuffer(table[at_groups:], np.int32)[2 * first_group : 2 * (first_group + groups)].reshape(-1, 2)
        assert (np.diff(pairs[:, 0]) > 0).all()
        rows = order[first_row : first_row + pairs[:, 1].sum()]
        assert len(set(rows.tolist())) == len(rows)
        assert base % 1 == 0


def test_first_and_last_chunk_hold_every_row():
    weight = np.zeros((5, 6, 1, 1), np.float32)
    weight[2, 3] = 1.0
    found = pack.entries(weight, 1, lambda ky, kx: np.arange(6) * 16)
    table = pack.sparse_table(found, 6, 3, 16, wide=False)
    heads = np.frombuffer(table, np.int32, 15, np.frombuffer(table, np.int32, 2)[1]).reshape(3, 5)
    rows = np.diff([*heads[:, 3], heads[2, 3] + 5])
    assert rows.tolist() == [5, 1, 5]


def test_offsets_are_refused_when_they_do_not_fit():
    far = pack.Entries(np.array([0, 0]), np.array([0, 1]), np.array([0, 16 * 70000]), np.ones(2, np.float32), 1)
    assert not pack.fits_16_bits(far, 2, 1, 16)
    assert pack.fits_16_bits(far, 2, 2, 16)
    with pytest.raises(ValueError, match="16 bits"):
        pack.sparse_table(far, 2, 1, 16, wide=False)
    odd = pack.Entries(np.array([0, 0]), np.array([0, 1]), np.array([0, 17]), np.ones(2, np.float32), 1)
    assert not pack.fits_16_bits(odd, 2, 1, 16)
    with pytest.raises(ValueError, match="whole blocks"):
        pack.sparse_table(odd, 2, 1, 16, wide=False)
    with pytest.raises(ValueError, match="2 GiB"):
        pack.entries(np.ones((1, 1, 1, 1), np.float32), 1, lambda ky, kx: np.array([2**29]))


def test_equal_shares_have_nearly_equal_work():
    counts = np.random.default_rng(1).integers(0, 50, 200)
    bounds = pack.equal_shares(counts, 4, 2.0)
    work = [float((counts[a:b] + 2.0).sum()) for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0
    assert bounds[-1] == 200
    assert max(work) - min(work) <= 2 * 52


def test_dense_rows_keep_every_weight():
    weight = np.arange(5 * 3, dtype=np.float32).reshape(5, 3)
    packed = pack.dense_rows(weight, 2)
    assert packed[:6].reshape(3, 2).T.tolist() == weight[:2].tolist()
    assert packed[12:].tolist() == weight[4].tolist()


@pytest.mark.parametrize(("kernel", "stride", "pad", "direct"), [(1, 1, 0, True), (1, 2, 0, False), (3, 1, 1, False)])
def test_direct(kernel, stride, pad, direct):
    op = Conv(np.ones((2, 2, kernel, kernel), np.float32), stride=(stride, stride), padding=(pad,) * 4)
    x, y = geometry((1, 2, 8, 8)), geometry((1, 2, 8 // stride, 8 // stride))
    assert is_direct(op, x, y) == direct
    if not direct:
        with pytest.raises(ValueError, match="direct"):
            lower(op, x, y, kind="direct", unit=16)
