"""Storing views: whatever order the axes were brought into, the stored numbers are those of torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from netwright.deploy.graph import check, run
from netwright.deploy.graph.axes import View
from netwright.deploy.graph.builder import Builder, stored_shape
from netwright.deploy.graph.ir import Add, Affine, Mul
from netwright.deploy.graph.table import RefusedError


def source(*shape: int) -> tuple[Builder, View, Tensor]:
    builder = Builder()
    view = builder.input(shape)
    return builder, view, torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def result(builder: Builder, view: View, *inputs: Tensor) -> Tensor:
    builder.output(view)
    check(builder.graph)
    return run(builder.graph, inputs)[0]


def moved(data: st.DataObject, view: View, x: Tensor) -> tuple[View, Tensor]:
    """A chain of movements that leaves the batch in front."""
    for _ in range(data.draw(st.integers(0, 5))):
        rank, sizes = x.ndim, list(x.shape)
        kind = data.draw(st.sampled_from(["permute", "split", "join", "insert", "expand"]))
        place = data.draw(st.integers(1, rank - 1)) if rank > 1 else 0
        if kind == "permute":
            order = [0, *data.draw(st.permutations(range(1, rank)))]
            view, x = view.permute(order), x.permute(order)
        elif kind == "insert" and place:
            view, x = view.insert(place), x.unsqueeze(place)
        elif kind == "expand" and x.numel() < 2000:
            sizes = [n if n > 1 or i == 0 else data.draw(st.sampled_from([1, 2, 3])) for i, n in enumerate(sizes)]
            view, x = view.expand(sizes), x.expand(sizes)
        elif kind in {"split", "join"} and place:
            if kind == "split":
                factor = data.draw(st.sampled_from([f for f in (1, 2, 3) if sizes[place] % f == 0]))
                sizes[place : place + 1] = [factor, sizes[place] // factor]
            else:
                sizes[place : place + 2] = [math.prod(sizes[place : place + 2])]
            changed = view.reshape(sizes)
            view, x = (view, x) if changed is None else (changed, x.reshape(sizes))
    return view, x


SIZES = st.tuples(st.integers(1, 3), *[st.sampled_from([1, 2, 3, 4, 6])] * 3)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data(), SIZES)
def test_any_order_can_be_stored(data: st.DataObject, sizes: tuple[int, ...]) -> None:
    builder, view, x = source(*sizes)
    view, expected = moved(data, view, x)
    assert torch.equal(result(builder, view, x), expected)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data(), SIZES)
def test_two_orders_of_one_value_meet(data: st.DataObject, sizes: tuple[int, ...]) -> None:
    builder, view, x = source(*sizes)
    (a, left), (b, right) = moved(data, view, x), moved(data, view, x)
    try:
        shape = torch.broadcast_shapes(left.shape, right.shape)
    except RuntimeError:
        return
    if shape[0] != sizes[0] or math.prod(shape) > 20000 or len(left.shape) != len(right.shape):
        return
    found = result(
        builder, builder.combine(Add(), a, builder.map(Affine(*[torch.full((sizes[1],), 2.0).numpy()] * 2), b)), x
    )
    torch.testing.assert_close(found, left + 2 * right + 2, rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data(), SIZES)
def test_constants_meet_any_order(data: st.DataObject, sizes: tuple[int, ...]) -> None:
    builder, view, x = source(*sizes)
    view, expected = moved(data, view, x)
    draw = torch.Generator().manual_seed(1)
    scale, shift = (
        torch.randn([n if data.draw(st.booleans()) else 1 for n in expected.shape], generator=draw) for _ in range(2)
    )
    found = result(builder, builder.scale_shift(view, scale, shift), x)
    torch.testing.assert_close(found, expected * scale.double() + shift.double(), rtol=1e-12, atol=1e-12)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data(), SIZES)
def test_chosen_axes_become_the_channels(data: st.DataObject, sizes: tuple[int, ...]) -> None:
    builder, view, x = source(*sizes)
    view, expected = moved(data, view, x)
    chosen = data.draw(st.sets(st.integers(1, expected.ndim - 1), min_size=1)) if expected.ndim > 1 else set()
    found = builder.on_channels(view, sorted(chosen))
    count = math.prod(expected.shape[i] for i in chosen)
    assert builder.shape(found.value)[1] == count
    assert found.shape == tuple(expected.shape)
    assert torch.equal(result(builder, found, x), expected)


def test_a_gate_is_not_written_out() -> None:
    builder, view, x = source(2, 3, 4, 5)
    gate = builder.input((2, 3))
    scaled = builder.combine(Mul(), gate.insert(2).insert(3), view)
    values = torch.randn(2, 3, dtype=torch.float64)
    assert torch.equal(result(builder, scaled, x, values), x * values[:, :, None, None])
    assert [node.op.name for node in builder.graph] == ["reshape", "mul"]


def test_pixels_are_repeated_by_a_transposed_convolution() -> None:
    builder, view, x = source(2, 3, 2, 3)
    tall = view.insert(3).expand((2, 3, 2, 2, 3)).reshape((2, 3, 4, 3))
    assert tall is not None
    assert torch.equal(result(builder, tall, x), x.repeat_interleave(2, 2))
    assert [node.op.name for node in builder.graph] == ["conv_transpose"]


def test_the_batch_cannot_be_moved() -> None:
    builder, view, _ = source(2, 3, 4, 5)
    with pytest.raises(RefusedError, match="the batch does not stay the first axis"):
        builder.output(view.permute([1, 0, 2, 3]))
    with pytest.raises(RefusedError, match="the batch of 2 becomes an axis of 6"):
        builder.stored(view, (6, 1, 4, 5))
    with pytest.raises(RefusedError, match="along the batch"):
        builder.restored(view, channels=[0])
    with pytest.raises(RefusedError, match="rank 3 where rank 4 is expected"):
        builder.maps(View(view.value, view.axes[:3]))


@pytest.mark.parametrize(
    ("shape", "stored"),
    [((2, 3), (2, 3)), ((2, 3, 4), (2, 3, 1, 4)), ((2, 3, 4, 5), (2, 3, 4, 5)), ((2, 3, 4, 5, 6), (2, 12, 5, 6))],
)
def test_ranks(shape: tuple[int, ...], stored: tuple[int, ...]) -> None:
    assert stored_shape(shape) == stored
    assert (stored_shape((7,)), stored_shape(())) == ((7, 1), (1, 1))
