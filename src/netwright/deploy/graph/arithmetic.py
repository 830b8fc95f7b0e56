"""How activations and arithmetic enter a graph."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from netwright.deploy.graph.axes import View
from netwright.deploy.graph.builder import Builder
from netwright.deploy.graph.convolution import weight_of
from netwright.deploy.graph.ir import (
    Activate,
    Activation,
    Add,
    Mul,
    Op,
)
from netwright.deploy.graph.movement import Part
from netwright.deploy.graph.table import RefusedError, handles

SELU = (1.6732632423543772, 1.0507009873554805)


for _name in ("relu", "hardswish", "hardsigmoid", "sigmoid", "silu", "tanh"):

    def _plain(b: Builder, x: View, _kind: str = _name) -> View:
        return b.map(Activate(Activation(_kind)), x)

    handles(f"{_name}.default")(_plain)


@handles("relu6.default")
def _relu6(b: Builder, x: View) -> View:
    return _clamp(b, x, 0.0, 6.0)


@handles("clamp.default", "hardtanh.default")
def _clamp(b: Builder, x: View, low: float | None = None, high: float | None = None) -> View:
    lower, upper = (-math.inf if low is None else float(low)), (math.inf if high is None else float(high))
    kind = Activation("relu") if (lower, upper) == (0, math.inf) else Activation("clamp", lower, upper)
    return b.map(Activate(kind), x)


@handles("clamp_min.default")
def _clamp_min(b: Builder, x: View, low: float) -> View:
    return _clamp(b, x, low)


@handles("clamp_max.default")
def _clamp_max(b: Builder, x: View, high: float) -> View:
    return _clamp(b, x, None, high)


@handles("leaky_relu.default")
def _leaky_relu(b: Builder, x: View, negative_slope: float = 0.01) -> View:
    return b.map(Activate(Activation("leaky_relu", negative_slope)), x)


@handles("gelu.default")
def _gelu(b: Builder, x: View, *, approximate: str = "none") -> View:
    return b.map(Activate(Activation("gelu_tanh" if approximate == "tanh" else "gelu")), x)


@handles("elu.default")
def _elu(b: Builder, x: View, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> View:
    # positive: scale x; negative: scale alpha (exp(input_scale x) - 1)
    inner = b.map(Activate(Activation("elu", alpha * input_scale)), b.scale_shift(x, input_scale, 0.0))
    return b.scale_shift(inner, scale / input_scale, 0.0)


@handles("selu.default")
def _selu(b: Builder, x: View) -> View:
    return _elu(b, x, *SELU)


@handles("celu.default")
def _celu(b: Builder, x: View, alpha: float = 1) -> View:
    return _elu(b, x, alpha, 1, 1 / alpha)


@handles("prelu.default", "_prelu_kernel.default")
def _prelu(b: Builder, x: View, weight: Part) -> View:
    """max(x, 0) + slope min(x, 0)."""
    slope = torch.from_numpy(weight_of(weight))
    if slope.numel() == 1:
        return _leaky_relu(b, x, slope.item())
    if slope.ndim == 1:
        slope = slope.reshape(-1, *[1] * (len(x.axes) - 2))
    relu, negative = Activate(Activation("relu")), Activate(Activation("clamp", -math.inf, 0.0))
    return b.combine(Add(), b.map(relu, x), b.scale_shift(b.map(negative, x), slope, 0.0))


def _combine(b: Builder, op: Op, x: Part | float, y: Part | float) -> View:
    if isinstance(x, View) and isinstance(y, View):
        return b.combine(op, x, y)
    view, constant = (x, y) if isinstance(x, View) else (y, x)
    assert isinstance(view, View)
    assert not isinstance(constant, View)
    return b.scale_shift(view, constant, 0.0) if isinstance(op, Mul) else b.scale_shift(view, 1.0, constant)


def _times(b: Builder, x: Part | float, factor: float) -> Part | float:
    return b.scale_shift(x, factor, 0.0) if isinstance(x, View) else x * factor


@handles("add.Tensor", "add.Scalar", mixed=True)
def _add(b: Builder, x: Part | float, y: Part | float, *, alpha: float = 1) -> View:
    return _combine(b, Add(), x, _times(b, y, alpha))


@handles("sub.Tensor", "sub.Scalar", mixed=True)
def _sub(b: Builder, x: Part | float, y: Part | float, *, alpha: float = 1) -> View:
    return _combine(b, Add(), x, _times(b, y, -alpha))


@handles("rsub.Tensor", "rsub.Scalar", mixed=True)
def _rsub(b: Builder, x: Part | float, y: Part | float, alpha: float = 1) -> View:
    return _sub(b, y, x, alpha=alpha)


@handles("mul.Tensor", "mul.Scalar", mixed=True)
def _mul(b: Builder, x: Part | float, y: Part | float) -> View:
    return _combine(b, Mul(), x, y)


@handles("div.Tensor", "div.Scalar", mixed=True)
def _div(b: Builder, x: Part | float, y: Part | float) -> View:
    if isinstance(y, View):
        raise RefusedError("its divisor is computed from the input")
    return _mul(b, x, 1 / (y.double() if isinstance(y, Tensor) else y))


@handles("neg.default")
def _neg(b: Builder, x: View) -> View:
    return b.scale_shift(x, -1.0, 0.0)


@handles("pow.Tensor_Scalar")
def _pow(b: Builder, x: View, exponent: float) -> View:
    if exponent not in {1, 2, 3, 4}:
        raise RefusedError(f"its exponent is {exponent:g}")
    powers = [x]
    for _ in range(int(exponent) - 1):
        powers.append(b.combine(Mul(), powers[-1], x))
    return powers[-1]


@handles("square.default")
def _square(b: Builder, x: View) -> View:
    return _pow(b, x, 2)
