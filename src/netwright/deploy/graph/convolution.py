"""How convolutions and linear layers enter a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from netwright.deploy.graph import axes as layout
from netwright.deploy.graph.axes import View
from netwright.deploy.graph.builder import Builder
from netwright.deploy.graph.ir import (
    Array,
    Conv,
    ConvTranspose,
    Linear,
    Pair,
)
from netwright.deploy.graph.movement import Part, squeeze
from netwright.deploy.graph.table import RefusedError, handles


def array(constant: Part | None, what: str = "weight") -> Array | None:
    """A constant argument as an array.

    Raises:
        RefusedError: If it is no constant.
    """
    if isinstance(constant, View):
        raise RefusedError(f"its {what} is computed from the input")
    return None if constant is None else constant.detach().numpy()


def weight_of(constant: Part) -> Array:
    """A weight as an array; see :func:`array`."""
    found = array(constant)
    assert found is not None
    return found


def pair(values: int | Sequence[int], fill: int) -> Pair:
    """Vertical and horizontal; ``fill`` is the vertical one of an operator that works along one axis."""
    if isinstance(values, int):
        return (values, values)
    return (fill, values[0]) if len(values) == 1 else (values[0], values[1])


def as_maps(b: Builder, x: View, rank: int) -> tuple[int, Callable[[int], View]]:
    """The input of an operator over pixels, and how its output is seen again: without batch, or along one axis."""
    unbatched = len(x.axes) == rank + 1
    flat = x.insert(0) if unbatched else x
    flat = flat.insert(2) if rank == 1 else flat

    def back(value: int) -> View:
        view = View.of(value, b.shape(value))
        view = squeeze(b, view, 2) if rank == 1 else view
        return squeeze(b, view, 0) if unbatched else view

    return b.maps(flat), back


@handles("conv1d.default", "conv2d.default", "conv1d.padding", "conv2d.padding")
def _conv(
    b: Builder,
    x: View,
    weight: Part,
    bias: Part | None = None,
    stride: int | Sequence[int] = (1,),
    padding: int | Sequence[int] | str = (0,),
    dilation: int | Sequence[int] = (1,),
    groups: int = 1,
) -> View:
    kernel = weight_of(weight)
    rank = kernel.ndim - 2
    value, back = as_maps(b, x, rank)
    kernel = kernel[:, :, None] if rank == 1 else kernel
    stride, dilation = (all_axes(v, rank) for v in (stride, dilation))
    steps, gaps = pair(stride, 1), pair(dilation, 1)
    reach = [gap * (k - 1) for gap, k in zip(gaps, kernel.shape[2:], strict=True)]
    if padding == "same":
        before = (reach[0] // 2, reach[1] // 2)
        after = (reach[0] - before[0], reach[1] - before[1])
    else:
        before = after = pair(all_axes(0 if isinstance(padding, str) else padding, rank), 0)
    n, _, h, w = b.shape(value)
    size = [
        (length + p + q - r - 1) // s + 1
        for length, p, q, r, s in zip((h, w), before, after, reach, steps, strict=True)
    ]
    op = Conv(kernel, array(bias, "bias"), steps, (*before, *after), gaps, groups)
    return back(b.emit(op, [value], (n, len(kernel), *size)))


def all_axes(values: int | Sequence[int], rank: int) -> list[int]:
    """One number for each axis, of which a single one stands for all."""
    values = [values] if isinstance(values, int) else list(values)
    return values * rank if len(values) == 1 else values


@handles("conv_transpose1d.default", "conv_transpose2d.input")
def _conv_transpose(
    b: Builder,
    x: View,
    weight: Part,
    bias: Part | None = None,
    stride: int | Sequence[int] = (1,),
    padding: int | Sequence[int] = (0,),
    output_padding: int | Sequence[int] = (0,),
    groups: int = 1,
    dilation: int | Sequence[int] = (1,),
) -> View:
    kernel = weight_of(weight)
    rank = kernel.ndim - 2
    value, back = as_maps(b, x, rank)
    kernel = kernel[:, :, None] if rank == 1 else kernel
    steps, cut, more, gaps = (
        pair(all_axes(v, rank), fill) for v, fill in ((stride, 1), (padding, 0), (output_padding, 0), (dilation, 1))
    )
    n, _, h, w = b.shape(value)
    size = [
        (length - 1) * s - 2 * p + d * (k - 1) + q + 1
        for length, s, p, d, k, q in zip((h, w), steps, cut, gaps, kernel.shape[2:], more, strict=True)
    ]
    op = ConvTranspose(kernel, array(bias, "bias"), steps, cut, gaps, groups)
    return back(b.emit(op, [value], (n, kernel.shape[1] * groups, *size)))


@handles("convolution.default")
def _convolution(
    b: Builder,
    x: View,
    weight: Part,
    bias: Part | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> View:
    if transposed:
        return _conv_transpose(b, x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(b, x, weight, bias, stride, padding, dilation, groups)


@handles("linear.default")
def linear(b: Builder, x: View, weight: Part, bias: Part | None = None) -> View:
    """x W^T + b over the last axis: a linear layer where nothing but the batch is left, else a 1x1 convolution."""
    matrix, shift = weight_of(weight), array(bias, "bias")
    outputs, last = len(matrix), len(x.axes) - 1
    x = b.solid(x)
    batch = b.shape(x.value)[0]
    if math.prod(x.shape[:-1]) == batch and all(a.axis == 0 for axis in x.axes[:-1] for a in axis):
        value = b.emit(Linear(matrix, shift), [b.stored(x, (batch, matrix.shape[1]))], (batch, outputs))
        return View(value, (*x.axes[:-1], View.of(value, (1, outputs)).axes[1]))
    x = b.on_channels(x, [last])
    order = layout.positions(x.axes[last])
    kernel = np.empty_like(matrix)
    kernel[:, order] = matrix
    n, _, h, w = b.shape(x.value)
    value = b.emit(Conv(kernel[:, :, None, None], shift), [x.value], (n, outputs, h, w))
    return View(value, (*x.axes[:-1], View.of(value, (1, outputs)).axes[1]))


@handles("addmm.default", mixed=True)
def _addmm(b: Builder, bias: Part, x: Part, weight: Part, *, beta: float = 1, alpha: float = 1) -> View:
    if not (isinstance(x, View) and isinstance(weight, Tensor) and isinstance(bias, Tensor) and bias.ndim == 1):
        raise RefusedError("its weight or bias is computed from the input")
    return linear(b, x, alpha * weight.t(), beta * bias)


@handles("mm.default", "matmul.default", mixed=True)
def _matmul(b: Builder, x: Part, y: Part) -> View:
    if isinstance(x, View) and isinstance(y, Tensor) and y.ndim == 2:
        return linear(b, x, y.t())
    if isinstance(x, Tensor) and isinstance(y, View) and x.ndim == 2 and len(y.axes) >= 2:
        order = [*range(len(y.axes) - 2), len(y.axes) - 1, len(y.axes) - 2]
        return linear(b, y.permute(order), x).permute(order)
    raise RefusedError("it multiplies two tensors that both depend on the input")
