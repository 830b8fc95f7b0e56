"""Every operation of a graph in plain torch: the oracle of the fast backends, and what they fall back to.

A weight that is zero may be understood as absent, which matters where an input is not finite: 0 * inf is NaN, a dropped
weight gives nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from netwright.deploy.graph.ir import (
    Activate,
    Activation,
    AdaptivePool,
    Add,
    Affine,
    Array,
    Channels,
    Concat,
    Constant,
    Conv,
    ConvTranspose,
    Graph,
    GroupNorm,
    LayerNorm,
    Linear,
    Mul,
    Op,
    Pad,
    Pool,
    Reshape,
    Shape,
    Softmax,
)

Kernel = Callable[..., Tensor]
LinearMap = Callable[[Tensor, Tensor], Tensor]


def run(
    graph: Graph, inputs: Sequence[Tensor], *, dtype: torch.dtype = torch.float64, kept_only: bool = False
) -> list[Tensor]:
    """The outputs of a graph, computed one operation after another.

    Args:
        graph: What to run.
        inputs: One tensor for each input, of the shape under which the caller knows it.
        dtype: Of all arithmetic.
        kept_only: Whether weights that are zero do not exist, so that what is not finite only spreads along kept ones.

    Returns:
        The outputs in this precision.

    Raises:
        ValueError: If the inputs are not those of the graph.

    Example:
        >>> from netwright.deploy.graph.ir import Node
        >>> graph = Graph({0: (1, 2), 1: (1, 2)}, inputs=[0], outputs=[1])
        >>> graph.nodes.append(Node(Activate(Activation("relu")), [0], 1))
        >>> run(graph, [torch.tensor([[-1.0, 2.0]])])
        [tensor([[0., 2.]], dtype=torch.float64)]
    """
    values = {v: x.to(dtype) for v, x in zip(graph.inputs, arranged(graph, inputs), strict=True)}
    with torch.no_grad():
        for node in graph:
            kernel = kernel_of(node.op, graph.shapes[node.output], dtype=dtype, kept_only=kept_only)
            values[node.output] = kernel(*(values[v] for v in node.inputs))
    return [values[v].reshape(graph.views.get(v, graph.shapes[v])) for v in graph.outputs]


def arranged(graph: Graph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs in the shapes in which the graph holds them.

    Raises:
        ValueError: If their number or a shape is another than the graph's.
    """
    if len(inputs) != len(graph.inputs):
        raise ValueError(f"inputs must be {len(graph.inputs)} tensors, got {len(inputs)}")
    found = []
    for i, (value, x) in enumerate(zip(graph.inputs, inputs, strict=True)):
        shape = graph.views.get(value, graph.shapes[value])
        if tuple(x.shape) != shape:
            raise ValueError(f"input {i} must have shape {shape}, got {tuple(x.shape)}")
        found.append(x.reshape(graph.shapes[value]))
    return found


@functools.singledispatch
def kernel_of(op: Op, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    """A function from the inputs of an operation to its output of the given shape, with its weights converted once."""
    raise TypeError(f"op must be an operation of a graph, got {type(op).__name__}")


def activation(act: Activation) -> Callable[[Tensor], Tensor]:
    """The elementwise function.

    Example:
        >>> activation(Activation("clamp", 0, 6))(torch.tensor([-1.0, 7.0]))
        tensor([0., 6.])
    """
    simple = {
        "none": lambda x: x,
        "relu": functional.relu,
        "hardswish": functional.hardswish,
        "hardsigmoid": functional.hardsigmoid,
        "sigmoid": torch.sigmoid,
        "silu": functional.silu,
        "gelu": functional.gelu,
        "tanh": torch.tanh,
    }
    if act.kind in simple:
        return simple[act.kind]
    if act.kind == "clamp":
        return lambda x: x.clamp(act.low, act.high)
    if act.kind == "leaky_relu":
        return lambda x: functional.leaky_relu(x, act.low)
    if act.kind == "elu":
        return lambda x: functional.elu(x, act.low)
    return lambda x: functional.gelu(x, approximate="tanh")


def tensor_of(array: Array | None, dtype: torch.dtype) -> Tensor | None:
    """An array of weights in the given precision."""
    return None if array is None else torch.from_numpy(array).to(dtype)


def epilogue(bias: Tensor | None, act: Activation, rank: int = 4) -> Kernel:
    """What follows a sum of products: bias, residual if there is one, activation."""
    function = activation(act)
    bias = bias if bias is None or rank == 2 else bias[:, None, None]

    def finish(y: Tensor, *residual: Tensor) -> Tensor:
        y = y if bias is None else y + bias
        return function(y + residual[0] if residual else y)

    return finish


def _over_kept(linear: LinearMap, x: Tensor, weight: Tensor) -> Tensor:
    """A sum of products over the weights that are not zero, whatever they meet."""
    if bool(x.isfinite().all()):
        return linear(x, weight)
    finite = linear(torch.where(x.isfinite(), x, 0), weight)
    above, below = (weight > 0).to(x.dtype), (weight < 0).to(x.dtype)
    up, down, nan = ((mask).to(x.dtype) for mask in (x == torch.inf, x == -torch.inf, x.isnan()))
    plus = (linear(up, above) + linear(down, below)) > 0
    minus = (linear(up, below) + linear(down, above)) > 0
    broken = (linear(nan, above + below) > 0) | (plus & minus)
    y = torch.where(minus, -torch.inf, torch.where(plus, torch.inf, finite))
    return torch.where(broken, torch.nan, y)


def _weighted(linear: LinearMap, weight: Array, dtype: torch.dtype, kept_only: bool) -> Kernel:
    tensor = torch.from_numpy(weight).to(dtype)
    return lambda x: _over_kept(linear, x, tensor) if kept_only else linear(x, tensor)


@kernel_of.register
def _conv(op: Conv, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    top, left, below, right = op.padding
    even = (top, left) == (below, right) and min(op.padding) >= 0

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        if even:
            return functional.conv2d(x, weight, None, op.stride, (top, left), op.dilation, op.groups)
        padded = functional.pad(x, (left, right, top, below))
        return functional.conv2d(padded, weight, None, op.stride, 0, op.dilation, op.groups)

    product, finish = _weighted(linear, op.weight, dtype, kept_only), epilogue(tensor_of(op.bias, dtype), op.act)
    return lambda x, *residual: finish(product(x), *residual)


@kernel_of.register
def _conv_transpose(op: ConvTranspose, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    top, left = op.padding

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        y = functional.conv_transpose2d(x, weight, None, op.stride, 0, 0, op.groups, op.dilation)
        return functional.pad(y, (-left, shape[3] + left - y.shape[3], -top, shape[2] + top - y.shape[2]))

    product, finish = _weighted(linear, op.weight, dtype, kept_only), epilogue(tensor_of(op.bias, dtype), op.act)
    return lambda x, *residual: finish(product(x), *residual)


@kernel_of.register
def _linear(op: Linear, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    product = _weighted(functional.linear, op.weight, dtype, kept_only)
    finish = epilogue(tensor_of(op.bias, dtype), op.act, rank=2)
    return lambda x, *residual: finish(product(x), *residual)


def _reach(op: Pool, shape: Shape) -> tuple[int, int]:
    """Rows and columns of the padded input that the windows cover."""
    reach = [
        (out - 1) * s + d * (k - 1) + 1
        for out, s, d, k in zip(shape[2:], op.stride, op.dilation, op.kernel, strict=True)
    ]
    return reach[0], reach[1]


@kernel_of.register
def _pool(op: Pool, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    top, left, below, right = op.padding
    rows, columns = _reach(op, shape)

    def extend(x: Tensor, fill: float) -> Tensor:
        h, w = x.shape[2:]
        return functional.pad(x, (left, columns - left - w, top, rows - top - h), value=fill)

    def largest(x: Tensor) -> Tensor:
        return functional.max_pool2d(extend(x, -torch.inf), op.kernel, op.stride, 0, op.dilation)

    def total(x: Tensor) -> Tensor:
        return functional.avg_pool2d(extend(x, 0.0), op.kernel, op.stride, divisor_override=1)

    def mean(x: Tensor) -> Tensor:
        if op.divisor is not None:
            return total(x) / op.divisor
        h, w = x.shape[2:]
        covered = torch.ones(1, 1, h, w, dtype=x.dtype)
        if op.include_pad:
            # clipped to the padding, beyond which a window may reach in ceil_mode
            around = [min(below, rows - top - h), min(right, columns - left - w)]
            covered = functional.pad(covered, (left, max(0, around[1]), top, max(0, around[0])), value=1.0)
            count = functional.avg_pool2d(
                functional.pad(covered, (0, columns - covered.shape[3], 0, rows - covered.shape[2])),
                op.kernel,
                op.stride,
                divisor_override=1,
            )
        else:
            count = total(covered)
        return total(x) / count.clamp(min=1)

    return largest if op.kind == "max" else mean


@kernel_of.register
def _adaptive_pool(op: AdaptivePool, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    size = shape[2:]
    if op.kind == "max":
        return lambda x: functional.adaptive_max_pool2d(x, size)
    if size == (1, 1):
        return lambda x: x.mean((2, 3), keepdim=True)
    return lambda x: functional.adaptive_avg_pool2d(x, (size[0], size[1]))


def _column(numbers: Tensor | None, rank: int) -> Tensor | None:
    return numbers if numbers is None or rank == 2 else numbers[:, None, None]


@kernel_of.register
def _affine(op: Affine, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    scale, shift = (_column(torch.from_numpy(a).to(dtype), len(shape)) for a in (op.scale, op.shift))
    function = activation(op.act)
    return lambda x: function(x * scale + shift)


@kernel_of.register
def _layer_norm(op: LayerNorm, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    weight, bias = tensor_of(op.weight, dtype), tensor_of(op.bias, dtype)
    if len(shape) == 2:
        return lambda x: functional.layer_norm(x, shape[1:], weight, bias, op.eps)
    return lambda x: functional.layer_norm(x.permute(0, 2, 3, 1), shape[1:2], weight, bias, op.eps).permute(0, 3, 1, 2)


@kernel_of.register
def _group_norm(op: GroupNorm, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    weight, bias = (_column(tensor_of(a, dtype), len(shape)) for a in (op.weight, op.bias))
    function = activation(op.act)

    def run(x: Tensor) -> Tensor:
        # torch's own computes x / std - mean / std, which loses what differs where the mean is large; the second
        # subtraction takes out what rounding left in the first mean
        groups = x.reshape(x.shape[0], op.groups, -1)
        centred = groups - groups.mean(2, keepdim=True)
        centred = centred - centred.mean(2, keepdim=True)
        y = (centred * torch.rsqrt(centred.square().mean(2, keepdim=True) + op.eps)).reshape(x.shape)
        y = y if weight is None else y * weight
        return function(y if bias is None else y + bias)

    return run


@kernel_of.register
def _activate(op: Activate, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    return activation(op.act)


@kernel_of.register
def _add(op: Add, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    function = activation(op.act)
    return lambda a, b: function(a + b)


@kernel_of.register
def _mul(op: Mul, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    function = activation(op.act)
    return lambda a, b: function(a * b)


@kernel_of.register
def _concat(op: Concat, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    return lambda *parts: torch.cat(parts, dim=1)


@kernel_of.register
def _channels(op: Channels, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    index = torch.from_numpy(op.index)
    return lambda x: x.index_select(1, index)


@kernel_of.register
def _pad(op: Pad, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    top, left, below, right = op.padding
    return lambda x: functional.pad(x, (left, right, top, below))


@kernel_of.register
def _reshape(op: Reshape, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    return lambda x: x.reshape(shape)


@kernel_of.register
def _softmax(op: Softmax, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    if op.log:
        return lambda x: functional.log_softmax(x, dim=1)
    return lambda x: functional.softmax(x, dim=1)


@kernel_of.register
def _constant(op: Constant, shape: Shape, *, dtype: torch.dtype, kept_only: bool = False) -> Kernel:
    value = torch.from_numpy(op.value).to(dtype)
    return lambda: value
