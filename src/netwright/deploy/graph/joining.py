"""How operators that join, pad, reduce and enlarge tensors enter a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from netwright.deploy.graph import axes as layout
from netwright.deploy.graph.axes import BATCH, CHANNEL, ROW, Atom, View
from netwright.deploy.graph.builder import SPATIAL, Builder, restride
from netwright.deploy.graph.ir import AdaptivePool, Borders, Concat, Conv, ConvTranspose, Linear, Pad, Pool
from netwright.deploy.graph.movement import Part, as_view, dims_of, squeeze, take
from netwright.deploy.graph.table import RefusedError, handles


@handles("cat.default")
def _cat(b: Builder, tensors: Sequence[Part], dim: int = 0) -> View:
    views = [b.solid(as_view(b, part)) for part in tensors if math.prod(part.shape)]
    dim %= len(views[0].axes)
    if any(atom.axis == BATCH for view in views for atom in view.axes[dim]):
        raise RefusedError("it works along the batch")
    if len({_frame(b, view, dim) for view in views}) > 1:
        views = [b.restored(view, channels=[dim]) for view in views]
    axes = list(views[0].axes)
    values = []
    for view in views:
        rest = [a for i, axis in enumerate(view.axes) if i != dim for a in axis if a.axis == CHANNEL]
        values.append(b.select_channels(view.value, layout.positions([*view.axes[dim], *rest])))
    shapes = [b.shape(value) for value in values]
    value = b.emit(Concat(), values, (shapes[0][0], sum(s[1] for s in shapes), *shapes[0][2:]))
    inner = math.prod(a.size for a in rest)
    joined = (Atom(CHANNEL, sum(view.shape[dim] for view in views), inner),)
    others = restride([() if i == dim else axis for i, axis in enumerate(axes)], CHANNEL)
    return View(value, tuple(joined if i == dim else axis for i, axis in enumerate(others)))


def _frame(b: Builder, view: View, dim: int) -> object:
    """What two tensors must share for their channels to be joined along an axis."""
    if any(atom.axis != CHANNEL for atom in view.axes[dim]):
        return object()
    axes = [
        () if i == dim else tuple(Atom(CHANNEL, a.size, 0) if a.axis == CHANNEL else a for a in axis)
        for i, axis in enumerate(view.axes)
    ]
    return tuple(axes), b.shape(view.value)[2:]


@handles("stack.default")
def _stack(b: Builder, tensors: Sequence[Part], dim: int = 0) -> View:
    views = [as_view(b, part) for part in tensors]
    dim %= len(views[0].axes) + 1
    return _cat(b, [view.insert(dim) for view in views], dim)


@handles("constant_pad_nd.default")
def _constant_pad_nd(b: Builder, x: View, pad: Sequence[int], value: float = 0) -> View:
    rank = len(x.axes)
    ends = {rank - 1 - i: (pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2) if any(pad[2 * i : 2 * i + 2])}
    if rank == 3 and set(ends) == {2}:
        return squeeze(b, _constant_pad_nd(b, x.insert(2), pad, value), 2)
    if rank == 4 and set(ends) <= {2, 3}:
        (top, below), (left, right) = ends.get(2, (0, 0)), ends.get(3, (0, 0))
        return _pad_pixels(b, x, (top, left, below, right), value)
    for dim, (before, after) in ends.items():
        x = take(b, x, dim, np.arange(max(0, -before), x.shape[dim] - max(0, -after)))
        sizes = [[n if i == dim else size for i, size in enumerate(x.shape)] for n in (before, after)]
        fillers = [[torch.full(size, float(value))] if size[dim] > 0 else [] for size in sizes]
        x = _cat(b, [*fillers[0], x, *fillers[1]], dim)
    return x


def _pad_pixels(b: Builder, x: View, borders: Borders, value: float) -> View:
    n, c, h, w = x.shape
    top, left, below, right = borders
    shape = (n, c, h + top + below, w + left + right)
    if value == -math.inf and min(borders) >= 0:
        return View.of(b.emit(Pool("max", (1, 1), (1, 1), borders), [b.maps(x)], shape), shape)
    if value != 0 and max(borders) > 0:
        raise RefusedError(f"it pads with {value}")
    return View.of(b.emit(Pad(borders), [b.maps(x)], shape), shape)


@handles("pad.default")
def _pad(b: Builder, x: View, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> View:
    if mode != "constant":
        raise RefusedError(f"padding mode {mode}")
    return _constant_pad_nd(b, x, pad, value or 0)


@handles("pixel_shuffle.default")
def _pixel_shuffle(b: Builder, x: View, upscale_factor: int) -> View:
    n, c, h, w = x.shape
    r = upscale_factor
    op = ConvTranspose(_one_hot(c, r), stride=(r, r), groups=c // r**2)
    shape = (n, c // r**2, h * r, w * r)
    return View.of(b.emit(op, [b.maps(x)], shape), shape)


@handles("pixel_unshuffle.default")
def _pixel_unshuffle(b: Builder, x: View, downscale_factor: int) -> View:
    n, c, h, w = x.shape
    r = downscale_factor
    op = Conv(_one_hot(c * r**2, r), stride=(r, r), groups=c)
    shape = (n, c * r**2, h // r, w // r)
    return View.of(b.emit(op, [b.maps(x)], shape), shape)


def _one_hot(channels: int, r: int) -> np.ndarray:
    """Kernels (channels, 1, r, r): channel k reads or writes pixel k mod r^2 of a cell."""
    return np.tile(np.eye(r**2, dtype=np.float32).reshape(-1, 1, r, r), (channels // r**2, 1, 1, 1))


@handles("upsample_nearest2d.default", "upsample_nearest2d.vec", "upsample_nearest1d.default", "upsample_nearest1d.vec")
def _upsample_nearest(b: Builder, x: View, output_size: Sequence[int] | None, *scales: Any) -> View:
    size = x.shape[2:]
    if output_size is None:
        factors = [float(s) for s in scales[0]]
    else:
        factors = [out / n for out, n in zip(output_size, size, strict=True)]
    if any(f != int(f) for f in factors):
        raise RefusedError(f"it enlarges by {' x '.join(f'{f:g}' for f in factors)}, not by whole factors")
    flat = x.insert(2) if len(size) == 1 else x
    value = b.enlarge(b.maps(flat), *([1] if len(size) == 1 else []), *[int(f) for f in factors])
    view = View.of(value, b.shape(value))
    return squeeze(b, view, 2) if len(size) == 1 else view


def _reduce(b: Builder, x: View, dims: Sequence[int], keepdim: bool, kind: str) -> View:
    x = b.solid(x)
    atoms = [atom for dim in dims for atom in x.axes[dim]]
    touched = {atom.axis for atom in atoms}
    if touched == {CHANNEL} and kind == "avg":
        x = _mean_of_channels(b, x, dims)
    elif atoms:
        stored = b.shape(x.value)
        whole = touched <= set(SPATIAL) and all(
            math.prod(a.size for a in atoms if a.axis == axis) == stored[axis] for axis in touched
        )
        if not whole:
            x = b.restored(x, rows=dims)
            stored = b.shape(x.value)
            touched = {ROW}
        shape = tuple(1 if axis in touched else size for axis, size in enumerate(stored))
        value = b.emit(AdaptivePool("max" if kind == "max" else "avg"), [x.value], shape)
        x = View(value, tuple(() if i in dims else axis for i, axis in enumerate(x.axes)))
    return x if keepdim else View(x.value, tuple(axis for i, axis in enumerate(x.axes) if i not in dims))


def _mean_of_channels(b: Builder, x: View, dims: Sequence[int]) -> View:
    """A 1x1 convolution: each output is the mean of the channels that differ in the given axes only."""
    shape = b.shape(x.value)
    left = tuple(() if i in dims else axis for i, axis in enumerate(x.axes))
    kept = [a for axis in left for a in axis if a.axis == CHANNEL]
    gone = [a for i in dims for a in x.axes[i]]
    index = layout.positions([*kept, *gone]).reshape(-1, math.prod(a.size for a in gone))
    weight = np.zeros((len(index), shape[1]))
    np.put_along_axis(weight, index, 1 / index.shape[1], axis=1)
    op = Conv(weight[:, :, None, None]) if len(shape) == 4 else Linear(weight)
    value = b.emit(op, [x.value], (shape[0], len(index), *shape[2:]))
    return View(value, restride(left, CHANNEL))


@handles("mean.dim", "mean.default")
def _mean(b: Builder, x: View, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> View:
    return _reduce(b, x, dims_of(dim, len(x.axes)), keepdim, "avg")


@handles("sum.dim_IntList", "sum.default")
def _sum(b: Builder, x: View, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> View:
    dims = dims_of(dim, len(x.axes))
    return b.scale_shift(_reduce(b, x, dims, keepdim, "avg"), math.prod(x.shape[d] for d in dims), 0.0)


@handles("amax.default")
def _amax(b: Builder, x: View, dim: Sequence[int] = (), keepdim: bool = False) -> View:
    return _reduce(b, x, dims_of(dim, len(x.axes)), keepdim, "max")


@handles("max.dim")
def _max(b: Builder, x: View, dim: int, keepdim: bool = False) -> tuple[View, None]:
    return _amax(b, x, [dim], keepdim), None
