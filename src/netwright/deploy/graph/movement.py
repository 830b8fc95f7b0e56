"""How operators that order, reshape and select axes enter a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netwright.deploy.graph import axes as layout
from netwright.deploy.graph.axes import CHANNEL, REPEATED, ROW, Atom, Axis, View
from netwright.deploy.graph.builder import SPATIAL, Builder, restride
from netwright.deploy.graph.ir import (
    Conv,
    Pad,
)
from netwright.deploy.graph.table import Handler, RefusedError, handles

Part = View | Tensor


def as_view(b: Builder, part: Part) -> View:
    """A tensor that is written into the graph if it is a constant."""
    return part if isinstance(part, View) else b.constant(part)


def dims_of(dims: int | Sequence[int] | None, rank: int) -> list[int]:
    """Axis numbers from 0 on, ascending; all of them for None."""
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return list(range(rank))
    return sorted(d % rank for d in ([dims] if isinstance(dims, int) else dims))


@handles("alias.default", "clone.default", "contiguous.default", "detach.default", "lift_fresh_copy.default")
def _same(b: Builder, x: View, *, memory_format: torch.memory_format | None = None) -> View:
    return x


@handles("dropout.default", "feature_dropout.default", "alpha_dropout.default", "feature_alpha_dropout.default")
def _dropout(b: Builder, x: View, p: float, train: bool) -> View:
    if train and p:
        raise RefusedError("it draws random numbers")
    return x


@handles("native_dropout.default")
def _native_dropout(b: Builder, x: View, p: float, train: bool | None) -> tuple[View, None]:
    return _dropout(b, x, p, train is not False), None


@handles("_to_copy.default", "to.dtype", "to.dtype_layout", "type_as.default")
def _to_copy(b: Builder, x: View, *place: Any, dtype: torch.dtype | None = None, **more: Any) -> View:
    wanted = next((a for a in (*place, dtype) if isinstance(a, torch.dtype)), torch.float32)
    if wanted != torch.float32:
        raise RefusedError(f"it converts to {wanted}")
    return x


@handles("view.default", "reshape.default", "_unsafe_view.default")
def reshape(b: Builder, x: View, shape: Sequence[int]) -> View:
    """The same numbers in the same order under another shape, one size of which may be -1."""
    known = math.prod(n for n in shape if n != -1)
    shape = [math.prod(x.shape) // known if n == -1 else n for n in shape]
    found = x.reshape(shape)
    return b.plain(x, shape) if found is None else found


@handles("flatten.using_ints")
def _flatten(b: Builder, x: View, start_dim: int = 0, end_dim: int = -1) -> View:
    start, end = start_dim % len(x.axes), end_dim % len(x.axes)
    return reshape(b, x, [*x.shape[:start], -1, *x.shape[end + 1 :]])


@handles("unflatten.int")
def _unflatten(b: Builder, x: View, dim: int, sizes: Sequence[int]) -> View:
    dim %= len(x.axes)
    known = math.prod(n for n in sizes if n != -1)
    sizes = [x.shape[dim] // known if n == -1 else n for n in sizes]
    return reshape(b, x, [*x.shape[:dim], *sizes, *x.shape[dim + 1 :]])


@handles("permute.default")
def _permute(b: Builder, x: View, dims: Sequence[int]) -> View:
    return x.permute([d % len(x.axes) for d in dims])


@handles("transpose.int")
def _transpose(b: Builder, x: View, dim0: int, dim1: int) -> View:
    order = list(range(len(x.axes)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return x.permute(order)


@handles("t.default")
def _t(b: Builder, x: View) -> View:
    return x.permute(list(reversed(range(len(x.axes)))))


@handles("squeeze.default", "squeeze.dim", "squeeze.dims")
def squeeze(b: Builder, x: View, dim: int | Sequence[int] | None = None) -> View:
    """Drops axes of size 1."""
    gone = {d for d in dims_of(dim, len(x.axes)) if x.shape[d] == 1}
    return View(x.value, tuple(axis for i, axis in enumerate(x.axes) if i not in gone))


@handles("unsqueeze.default")
def _unsqueeze(b: Builder, x: View, dim: int) -> View:
    return x.insert(dim % (len(x.axes) + 1))


@handles("expand.default")
def _expand(b: Builder, x: View, size: Sequence[int], *, implicit: bool = False) -> View:
    shape = (1,) * (len(size) - len(x.axes)) + x.shape
    return x.expand([had if n == -1 else n for n, had in zip(size, shape, strict=True)])


@handles("repeat.default")
def _repeat(b: Builder, x: View, repeats: Sequence[int]) -> View:
    axes: list[Axis] = [*[()] * (len(repeats) - len(x.axes)), *x.axes]
    return View(x.value, tuple(layout.merge([Atom(REPEATED, n), *axis]) for n, axis in zip(repeats, axes, strict=True)))


@handles("channel_shuffle.default")
def _channel_shuffle(b: Builder, x: View, groups: int) -> View:
    n, c, *rest = x.shape
    split = reshape(b, x, [n, groups, c // groups, *rest])
    return reshape(b, split.permute([0, 2, 1, *range(3, len(rest) + 3)]), [n, c, *rest])


def take(b: Builder, x: View, dim: int, index: np.ndarray) -> View:
    """Entries ``index`` of an axis."""
    if len(index) == x.shape[dim] and np.array_equal(index, np.arange(len(index))):
        return x
    steps = np.diff(index)
    atom = x.axes[dim][0] if len(x.axes[dim]) == 1 else None
    if atom and atom.axis in SPATIAL and atom.size == b.shape(x.value)[atom.axis] and len(index):
        step = int(steps[0]) if len(steps) else 1
        if step >= 1 and (steps == step).all():
            return _window(b, x, dim, atom, int(index[0]), step, len(index))
    x = b.solid(x)
    if not all(a.axis == CHANNEL for a in x.axes[dim]) or not x.axes[dim]:
        x = b.restored(x, channels=[dim])
    inside = [math.prod(a.size for a in axis if a.axis == CHANNEL) for axis in x.axes]
    order = layout.positions(x.on(CHANNEL)).reshape(inside).take(index, axis=dim)
    value = b.select_channels(x.value, order.ravel())
    axes = list(x.axes)
    axes[dim] = layout.merge([Atom(CHANNEL, len(index))])
    return View(value, restride(axes, CHANNEL))


def _window(b: Builder, x: View, dim: int, atom: Atom, start: int, step: int, count: int) -> View:
    """Rows or columns ``start``, ``start + step``, ...: a crop, then a depthwise convolution of ones with a stride."""
    n, c, h, w = b.shape(x.value)
    end = atom.size - start - (count - 1) * step - 1
    down = atom.axis == ROW
    value = x.value
    if start or end:
        h, w = (h - start - end, w) if down else (h, w - start - end)
        value = b.emit(Pad((-start, 0, -end, 0) if down else (0, -start, 0, -end)), [value], (n, c, h, w))
    if step > 1:
        h, w = (count, w) if down else (h, count)
        ones = np.ones((c, 1, 1, 1), np.float32)
        value = b.emit(Conv(ones, stride=(step, 1) if down else (1, step), groups=c), [value], (n, c, h, w))
    axes = list(x.axes)
    axes[dim] = layout.merge([Atom(atom.axis, count)])
    return View(value, tuple(axes))


@handles("slice.Tensor")
def _slice(b: Builder, x: View, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> View:
    dim %= len(x.axes)
    return take(b, x, dim, np.arange(x.shape[dim])[start:end:step])


@handles("narrow.default")
def _narrow(b: Builder, x: View, dim: int, start: int, length: int) -> View:
    return _slice(b, x, dim, start, start + length)


@handles("select.int")
def _select(b: Builder, x: View, dim: int, index: int) -> View:
    dim %= len(x.axes)
    return squeeze(b, take(b, x, dim, np.arange(x.shape[dim])[[index]]), dim)


@handles("split_with_sizes.default")
def _split_with_sizes(b: Builder, x: View, split_sizes: Sequence[int], dim: int = 0) -> list[View]:
    ends = np.cumsum(split_sizes).tolist()
    return [_slice(b, x, dim, end - size, end) for size, end in zip(split_sizes, ends, strict=True)]


@handles("split.Tensor")
def _split(b: Builder, x: View, split_size: int, dim: int = 0) -> list[View]:
    total = x.shape[dim]
    return _split_with_sizes(b, x, [min(split_size, total - i) for i in range(0, total, split_size)], dim)


@handles("chunk.default")
def _chunk(b: Builder, x: View, chunks: int, dim: int = 0) -> list[View]:
    return _split(b, x, -(-x.shape[dim] // chunks), dim)


@handles("unbind.int")
def _unbind(b: Builder, x: View, dim: int = 0) -> list[View]:
    return [_select(b, x, dim, i) for i in range(x.shape[dim])]


@handles("index_select.default")
def _index_select(b: Builder, x: View, dim: int, index: Part) -> View:
    if not isinstance(index, Tensor):
        raise RefusedError("its index is computed from the input")
    return take(b, x, dim % len(x.axes), index.numpy())


@handles("index.Tensor")
def _index(b: Builder, x: View, indices: Sequence[Tensor | None]) -> View:
    given = [i for i, index in enumerate(indices) if index is not None]
    index = indices[given[0]] if len(given) == 1 else None
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.int64:
        raise RefusedError("only one constant list of positions can index")
    return take(b, x, given[0], np.arange(x.shape[given[0]])[index.numpy()])


@handles("flip.default")
def _flip(b: Builder, x: View, dims: Sequence[int]) -> View:
    for dim in dims_of(dims, len(x.axes)):
        x = take(b, x, dim, np.arange(x.shape[dim])[::-1])
    return x


def _filled(value: float) -> Handler:
    return lambda b, x, **kind: torch.full(x.shape, value)


handles("zeros_like.default")(_filled(0.0))
handles("ones_like.default")(_filled(1.0))


@handles("full_like.default")
def _full_like(b: Builder, x: View, fill: float, **kind: Any) -> Tensor:
    return torch.full(x.shape, float(fill))


@handles("new_zeros.default")
def _new_zeros(b: Builder, x: View, size: Sequence[int], **kind: Any) -> Tensor:
    return torch.zeros(tuple(size))


@handles("new_ones.default")
def _new_ones(b: Builder, x: View, size: Sequence[int], **kind: Any) -> Tensor:
    return torch.ones(tuple(size))


@handles("new_full.default")
def _new_full(b: Builder, x: View, size: Sequence[int], fill: float, **kind: Any) -> Tensor:
    return torch.full(tuple(size), float(fill))


@handles("_assert_tensor_metadata.default")
def _assert_tensor_metadata(b: Builder, x: View, *facts: Any, **more: Any) -> None:
    return None
