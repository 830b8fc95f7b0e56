"""How norms and poolings enter a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from netwright.deploy.graph import axes as layout
from netwright.deploy.graph.axes import View
from netwright.deploy.graph.builder import Builder
from netwright.deploy.graph.convolution import all_axes, array, as_maps, pair
from netwright.deploy.graph.ir import (
    AdaptivePool,
    Affine,
    GroupNorm,
    LayerNorm,
    Pair,
    Pool,
    Softmax,
)
from netwright.deploy.graph.movement import Part
from netwright.deploy.graph.table import RefusedError, handles


@handles("_native_batch_norm_legit_no_training.default")
def _batch_norm(
    b: Builder,
    x: View,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[View, None, None]:
    if any(isinstance(part, View) for part in (weight, bias, mean, var)):
        raise RefusedError("its weight is computed from the input")
    scale = 1 / torch.sqrt(var.double() + eps)
    scale = scale if weight is None else scale * weight.double()
    shift = -mean.double() * scale
    shift = shift if bias is None else shift + bias.double()
    shape = (-1, *[1] * (len(x.axes) - 2))
    numbers = [b.per_channel(x, tensor.reshape(shape)) for tensor in (scale, shift)]
    if numbers[0] is None or numbers[1] is None:
        x = b.restored(x, channels=[1])
        numbers = [b.per_channel(x, tensor.reshape(shape)) for tensor in (scale, shift)]
    return b.map(Affine(*numbers), x), None, None  # type: ignore[arg-type]


@handles("batch_norm.default")
def _batch_norm_of(
    b: Builder,
    x: View,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> View:
    if training or running_mean is None or running_var is None:
        raise RefusedError("it normalises by the statistics of the batch")
    return _batch_norm(b, x, weight, bias, running_mean, running_var, momentum, eps)[0]


@handles("_native_batch_norm_legit.no_stats")
def _batch_norm_of_batch(b: Builder, *unused: Any) -> View:
    raise RefusedError("it normalises by the statistics of the batch")


@handles("layer_norm.default")
def _layer_norm(
    b: Builder,
    x: View,
    normalized_shape: Sequence[int],
    weight: Part | None = None,
    bias: Part | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = False,
) -> View:
    scale, shift = array(weight), array(bias, "bias")
    over = list(range(len(x.axes) - len(normalized_shape), len(x.axes)))
    x = b.on_channels(x, over)
    order = layout.positions([atom for i in over for atom in x.axes[i]])
    back = np.argsort(order)
    scale, shift = (None if constant is None else constant.ravel()[back] for constant in (scale, shift))
    return b.map(LayerNorm(scale, shift, eps), x)


@handles("group_norm.default")
def _group_norm(
    b: Builder,
    x: View,
    num_groups: int,
    weight: Part | None = None,
    bias: Part | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = False,
) -> View:
    n, c, *size = x.shape
    shape = (n, c, *size) if len(size) == 2 else (n, c, math.prod(size), 1)
    value = b.stored(x, shape)
    op = GroupNorm(num_groups, array(weight), array(bias, "bias"), eps)
    found = View.of(b.emit(op, [value], shape), shape).reshape(x.shape)
    assert found is not None
    return found


@handles("instance_norm.default")
def _instance_norm(
    b: Builder,
    x: View,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> View:
    if use_input_stats:
        return _group_norm(b, x, x.shape[1], weight, bias, eps)
    assert running_mean is not None
    assert running_var is not None
    return _batch_norm(b, x, weight, bias, running_mean, running_var, momentum, eps)[0]


def _windows(length: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    reach = length + 2 * padding - dilation * (kernel - 1) - 1
    count = (reach + stride - 1 if ceil_mode else reach) // stride + 1
    # a window must begin in the input or in the padding before it
    return count - 1 if ceil_mode and (count - 1) * stride >= length + padding else count


def _pool(b: Builder, x: View, op: Pool, rank: int, ceil_mode: bool) -> View:
    value, back = as_maps(b, x, rank)
    n, c, *length = b.shape(value)
    size = [_windows(length[i], op.kernel[i], op.stride[i], op.padding[i], op.dilation[i], ceil_mode) for i in (0, 1)]
    return back(b.emit(op, [value], (n, c, *size)))


def _borders(padding: Pair) -> tuple[int, int, int, int]:
    return (*padding, *padding)


@handles("max_pool2d.default")
def _max_pool2d(
    b: Builder,
    x: View,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> View:
    kernel, pad, gaps = (pair(all_axes(v, 2), 0) for v in (kernel_size, padding, dilation))
    steps = pair(all_axes(stride, 2), 0) if stride else kernel
    return _pool(b, x, Pool("max", kernel, steps, _borders(pad), gaps), 2, ceil_mode)


@handles("max_pool1d.default")
def _max_pool1d(
    b: Builder,
    x: View,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> View:
    op = Pool(
        "max", (1, kernel_size[0]), (1, (stride or kernel_size)[0]), (0, padding[0], 0, padding[0]), (1, dilation[0])
    )
    return _pool(b, x, op, 1, ceil_mode)


@handles("max_pool2d_with_indices.default")
def _max_pool2d_with_indices(b: Builder, x: View, *settings: Any) -> tuple[View, None]:
    return _max_pool2d(b, x, *settings), None


@handles("avg_pool2d.default")
def _avg_pool2d(
    b: Builder,
    x: View,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> View:
    kernel, pad = (pair(all_axes(v, 2), 0) for v in (kernel_size, padding))
    steps = pair(all_axes(stride, 2), 0) if stride else kernel
    op = Pool("avg", kernel, steps, _borders(pad), include_pad=count_include_pad, divisor=divisor_override)
    return _pool(b, x, op, 2, ceil_mode)


@handles("avg_pool1d.default")
def _avg_pool1d(
    b: Builder,
    x: View,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> View:
    borders = (0, padding[0], 0, padding[0])
    op = Pool("avg", (1, kernel_size[0]), (1, (stride or kernel_size)[0]), borders, include_pad=count_include_pad)
    return _pool(b, x, op, 1, ceil_mode)


def _adaptive_pool(b: Builder, x: View, output_size: Sequence[int], op: AdaptivePool) -> View:
    rank = len(output_size)
    value, back = as_maps(b, x, rank)
    shape = b.shape(value)
    wanted = (*shape[:2], *([1] if rank == 1 else []), *output_size)
    return back(value if wanted == shape else b.emit(op, [value], wanted))


@handles("adaptive_avg_pool2d.default", "_adaptive_avg_pool2d.default", "adaptive_avg_pool1d.default")
def _adaptive_avg_pool(b: Builder, x: View, output_size: Sequence[int]) -> View:
    return _adaptive_pool(b, x, output_size, AdaptivePool("avg"))


@handles("adaptive_max_pool2d.default", "adaptive_max_pool1d.default")
def _adaptive_max_pool(b: Builder, x: View, output_size: Sequence[int]) -> tuple[View, None]:
    return _adaptive_pool(b, x, output_size, AdaptivePool("max")), None


@handles("softmax.int", "_softmax.default")
def _softmax(b: Builder, x: View, dim: int, unused: Any = None, *, log: bool = False) -> View:
    return b.map(Softmax(log), b.on_channels(x, [dim % len(x.axes)]))


@handles("log_softmax.int", "_log_softmax.default")
def _log_softmax(b: Builder, x: View, dim: int, unused: Any = None) -> View:
    return _softmax(b, x, dim, log=True)
