"""How each operation of a graph transforms what is known of its inputs: an affine form, a range, a rounding error.

For y = W x + b over lower <= x <= upper, with centre c and radius r,

    W c + b - |W| r  <=  y  <=  W c + b + |W| r

(Gowal et al., "On the Effectiveness of Interval Bound Propagation", 2018, arXiv:1810.12715), rounded outwards. Beside
the range of the exact value stands how far the network's own arithmetic may be off: a sum of n products in unit
roundoff u is within (n + 4) u (|W| |x| + |b|) of the exact one, in any order of summation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from netwright.deploy.graph.ir import (
    IDENTITY,
    Activate,
    Activation,
    AdaptivePool,
    Add,
    Affine,
    Channels,
    Concat,
    Constant,
    Conv,
    ConvTranspose,
    Linear,
    Mul,
    Node,
    Op,
    Pad,
    Pool,
    Reshape,
)
from netwright.deploy.graph.reference import activation, kernel_of
from netwright.verify.basis import WIDEN, Basis, Units

# Batch norms were folded, which float32 did not do: four times its unit roundoff.
UNIT = 4 * 2.0**-24
LIMIT = 2**26  # numbers in the forms of one value: 512 MB
PIECE = 2**18  # of those, how many are computed between two looks at the clock

# a z + b + sum_i w_i relu(z - k_i): what a piecewise-linear activation is.
Pieces = tuple[float, float, tuple[tuple[float, float], ...]]
SIGMOIDAL = {"sigmoid", "tanh", "elu"}
# Where functions that fall and then rise have their minimum, and a number just below it.
DIPS = {"silu": (-1.2784645, -0.2784646), "gelu": (-0.7517916, -0.1699713), "gelu_tanh": (-0.752461, -0.1700408)}
DIPS |= {"hardswish": (-1.5, -0.375)}


class TooLargeError(Exception):
    """The forms of a network would not fit into memory."""


@dataclasses.dataclass
class Form:
    """What is known of a value of the graph, batch axis 1.

    Attributes:
        low, high: Range of each number in exact arithmetic.
        error: How far the network's arithmetic may be off.
        rows: (1 + variables, \\*shape): constants, then the factor of each variable; None where only ranges are kept.
    """

    low: Tensor
    high: Tensor
    error: Tensor
    rows: Tensor | None = None

    @property
    def largest(self) -> Tensor:
        """Of the absolute value."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def matrix(self, basis: Basis) -> Tensor:
        """The rows as (numbers, 1 + variables)."""
        assert self.rows is not None
        flat = self.rows.flatten(1).T
        return functional.pad(flat, (0, len(basis) - flat.shape[1]))


@functools.singledispatch
def transform(op: Op, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    """What is known of an operation's output.

    Args:
        op: The operation.
        node: Where it stands.
        shape: Of its output.
        inputs: What is known of its inputs.
        basis: The variables of the forms, to which units are appended; None for ranges only.

    Raises:
        TypeError: If the operation has no known range, or, with a basis, is not piecewise linear.
        TooLargeError: If the forms do not fit into memory.
        TimeoutError: If the basis has a deadline and it is over.
    """
    raise TypeError(f"the verifier does not know {op.name} in {node.path or 'the network'}")


def _kernel(op: Op, shape: tuple[int, ...]) -> Callable[..., Tensor]:
    return kernel_of(op, shape, dtype=torch.float64)


def _aligned(forms: list[Form]) -> list[Tensor]:
    """Rows with the same number of variables."""
    rows = [form.rows for form in forms if form.rows is not None]
    most = max(len(part) for part in rows)
    return [torch.cat([part, part.new_zeros(most - len(part), *part.shape[1:])]) for part in rows]


def _check_size(rows: int, numbers: int) -> None:
    if rows * numbers > LIMIT:
        raise TooLargeError(f"{rows} variables for {numbers} activations")


def _weighted(
    signed: Callable[[Tensor], Tensor],
    absolute: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    terms: int,
    x: Form,
    basis: Basis | None,
) -> Form:
    centre, radius = (x.high + x.low) / 2, (x.high - x.low) / 2
    shift = torch.zeros(1, dtype=torch.float64) if bias is None else bias
    size = absolute(x.largest) + shift.abs()
    # The radius, as computed, may be a rounding short; a value that does not move has none.
    y, r = signed(centre) + shift, absolute(radius)
    r = torch.where(r > 0, r + WIDEN * size, r)
    error = absolute(x.error) * (1 + UNIT * (terms + 4)) + UNIT * (terms + 4) * size
    rows = None
    if x.rows is not None:
        assert basis is not None
        _check_size(len(x.rows), y.numel())
        rows = y.new_empty(len(x.rows), *y.shape[1:])
        piece = max(1, PIECE // max(x.low.numel(), y.numel()))
        for given, out in zip(x.rows.split(piece), rows.split(piece), strict=True):
            basis.check_time()
            out.copy_(signed(given))
        rows[:1] += shift
    return Form(y - r, y + r, error, rows)


def _strip(op: Conv | ConvTranspose | Linear | Affine, **changes: Any) -> Op:
    return dataclasses.replace(op, act=IDENTITY, **changes)


def bare(op: Op) -> tuple[Op, Activation]:
    """An operation without its activation, and the activation.

    Example:
        >>> bare(Activate(Activation("relu")))[1].kind
        'relu'
    """
    act: Activation = getattr(op, "act", IDENTITY)
    return (op, act) if isinstance(op, Activate) or not act else (dataclasses.replace(op, act=IDENTITY), act)  # type: ignore[call-arg]


def magnitude(op: Op, shape: tuple[int, ...], inputs: list[Form]) -> Tensor:
    """|W| |x| + |b| of an affine operation without activation: what its rounding errors are proportional to."""
    fields = {name: getattr(op, name, None) for name in ("weight", "bias", "scale", "shift", "value")}
    absolute = dataclasses.replace(op, **{name: abs(array) for name, array in fields.items() if array is not None})
    found: Tensor = _kernel(absolute, shape)(*(x.largest for x in inputs))
    return found


@transform.register(Conv)
@transform.register(ConvTranspose)
@transform.register(Linear)
def _product(
    op: Conv | ConvTranspose | Linear, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None
) -> Form:
    signed = _kernel(_strip(op, bias=None), shape)
    absolute = _kernel(_strip(op, bias=None, weight=abs(op.weight)), shape)
    bias = None if op.bias is None else torch.from_numpy(op.bias).double().reshape(1, -1, *[1] * (len(shape) - 2))
    terms = op.weight[:, 0] if isinstance(op, ConvTranspose) else op.weight[0]
    found = _weighted(signed, absolute, bias, int(terms.size), inputs[0], basis)
    return _bent(op.act, node, found, basis)


@transform.register
def _affine(op: Affine, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    signed = _kernel(_strip(op, shift=0 * op.shift), shape)
    absolute = _kernel(_strip(op, shift=0 * op.shift, scale=abs(op.scale)), shape)
    bias = torch.from_numpy(op.shift).double().reshape(1, -1, *[1] * (len(shape) - 2))
    return _bent(op.act, node, _weighted(signed, absolute, bias, 2, inputs[0], basis), basis)


@transform.register(Channels)
@transform.register(Pad)
@transform.register(Reshape)
@transform.register(Concat)
def _moved(op: Op, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    """Numbers that only change their places."""

    def move(*parts: Tensor) -> Tensor:
        return kernel_of(op, (len(parts[0]), *shape[1:]), dtype=torch.float64)(*parts)

    rows = move(*_aligned(inputs)) if basis is not None else None
    low, high, error = (move(*(getattr(x, name) for x in inputs)) for name in ("low", "high", "error"))
    return Form(low, high, error, rows)


@transform.register
def _constant(op: Constant, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    value = torch.from_numpy(op.value).double().reshape(shape)
    return Form(value, value, UNIT * value.abs(), value if basis is not None else None)


@transform.register
def _add(op: Add, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    a, b = inputs
    low, high = a.low + b.low, a.high + b.high
    slack = torch.where(low < high, WIDEN * (a.largest + b.largest), 0)
    error = (a.error + b.error) * (1 + UNIT) + UNIT * (a.largest + b.largest)
    rows = None
    if basis is not None:
        first, second = _aligned(inputs)
        _check_size(len(first), low.numel())
        rows = first + second
    return _bent(op.act, node, Form(low - slack, high + slack, error, rows), basis)


@transform.register
def _mul(op: Mul, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    if basis is not None:
        raise TypeError(f"the exact engine does not know products, as in {node.path or 'the network'}")
    a, b = inputs
    corners = torch.stack([a.low * b.low, a.low * b.high, a.high * b.low, a.high * b.high])
    size = a.largest * b.largest
    error = a.largest * b.error + b.largest * a.error + a.error * b.error + UNIT * size
    return _bent(op.act, node, Form(corners.amin(0) - WIDEN * size, corners.amax(0) + WIDEN * size, error), basis)


@transform.register
def _adaptive(op: AdaptivePool, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    (x,) = inputs
    kernel = _kernel(op, shape)
    if op.kind == "avg":
        return _weighted(kernel, kernel, None, x.low[0, 0].numel(), x, basis)
    height, width = x.low.shape[2:]
    if basis is not None and not (height % shape[2] == 0 and width % shape[3] == 0):
        raise TypeError(f"the exact engine does not know uneven adaptive max pooling, as in {node.path}")
    if basis is None:
        return Form(kernel(x.low), kernel(x.high), kernel(x.error), None)
    return _pool(_as_windows(x.low.shape, shape), node, shape, inputs, basis)


def _as_windows(before: torch.Size, after: tuple[int, ...]) -> Pool:
    """An even adaptive max pooling as one with windows."""
    size = before[2] // after[2], before[3] // after[3]
    return Pool("max", size, size)


@transform.register
def _pool(op: Pool, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    (x,) = inputs
    kernel = _kernel(op, shape)
    if op.kind == "avg":
        return _weighted(kernel, kernel, None, math.prod(op.kernel), x, basis)
    low, high, error = kernel(x.low), kernel(x.high), kernel(x.error)
    if basis is None:
        return Form(low, high, error)
    return _maximum(_windows(op, x.low.shape, shape), Form(low, high, error), x, basis)


def _windows(op: Pool, before: torch.Size, after: tuple[int, ...]) -> Tensor:
    """Which numbers each output is the maximum of, (outputs, window); -1 beyond the picture."""
    _, channels, height, width = before
    top, left, *_ = op.padding
    places = torch.arange(channels * height * width).reshape(1, channels, height, width)
    rows = (after[2] - 1) * op.stride[0] + op.dilation[0] * (op.kernel[0] - 1) + 1
    columns = (after[3] - 1) * op.stride[1] + op.dilation[1] * (op.kernel[1] - 1) + 1
    places = functional.pad(places, (left, columns - left - width, top, rows - top - height), value=-1)
    i = torch.arange(after[2])[:, None] * op.stride[0] + torch.arange(op.kernel[0]) * op.dilation[0]
    j = torch.arange(after[3])[:, None] * op.stride[1] + torch.arange(op.kernel[1]) * op.dilation[1]
    found = places[0][:, i[:, None, :, None], j[None, :, None, :]]
    return found.reshape(channels * after[2] * after[3], -1)


def _candidates(windows: Tensor, x: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Of each window, where the one with the largest lower bound stands in it, which may win, and upper bounds."""
    low, high = (
        torch.where(windows < 0, -math.inf, bound.flatten()[windows.clamp(min=0)]) for bound in (x.low, x.high)
    )
    best = low.max(1)
    rival = high > best.values[:, None]
    return best.indices, rival.scatter_(1, best.indices[:, None], True), high


def selected(op: Pool | AdaptivePool, shape: tuple[int, ...], x: Form) -> tuple[Tensor, Tensor] | None:
    """Which number each maximum is at least, and whether it is that one for certain.

    Args:
        op: A max pooling.
        shape: Of its output.
        x: What is known of its input.

    Returns:
        Places in the flat input, (outputs,), and truth values of the output's shape; None where windows are uneven.
    """
    if isinstance(op, AdaptivePool):
        if x.low.shape[2] % shape[2] or x.low.shape[3] % shape[3]:
            return None
        op = _as_windows(x.low.shape, shape)
    windows = _windows(op, x.low.shape, shape)
    best, rival, _ = _candidates(windows, x)
    return windows.gather(1, best[:, None])[:, 0], (rival.sum(1) == 1).reshape(shape)


def _maximum(windows: Tensor, result: Form, x: Form, basis: Basis) -> Form:
    assert x.rows is not None
    rows = functional.pad(x.rows.flatten(1).T, (0, len(basis) - len(x.rows)))
    best, rival, high = _candidates(windows, x)
    chosen = windows.gather(1, best[:, None])[:, 0]
    out = rows[chosen].clone()
    open_ = (rival.sum(1) > 1).nonzero().flatten()
    if len(open_):
        start = len(basis)
        _check_size(start + len(open_), len(out))
        # The candidate with the largest lower bound first, then those that may win, then the others.
        key = torch.where(rival, high, -math.inf).scatter(1, best[:, None], math.inf)
        order = key.argsort(1, descending=True)[open_][:, : int(rival[open_].sum(1).max())]
        alive, places = rival[open_].gather(1, order), windows[open_].gather(1, order).clamp(min=0)
        _check_size(start * places.shape[1], len(open_))
        candidates = rows[places] * alive[:, :, None]
        bounds = result.low.flatten()[open_], result.high.flatten()[open_]
        basis.append(Units(start, "max", candidates, *bounds, alive))
        out = functional.pad(out, (0, len(open_)))
        out[open_] = 0
        out[open_, start + torch.arange(len(open_))] = 1
    return Form(result.low, result.high, result.error, out.T.reshape(-1, *result.low.shape[1:]))


@transform.register
def _activate(op: Activate, node: Node, shape: tuple[int, ...], inputs: list[Form], basis: Basis | None) -> Form:
    return _bent(op.act, node, inputs[0], basis)


def pieces(act: Activation) -> Pieces | None:
    """A piecewise-linear activation as a sum of ReLUs; None for any other.

    Example:
        >>> pieces(Activation("clamp", 0.0, 6.0))  # ReLU6
        (0.0, 0.0, ((1.0, 0.0), (-1.0, 6.0)))
    """
    if act.kind == "relu":
        return 0.0, 0.0, ((1.0, 0.0),)
    if act.kind == "leaky_relu":
        return act.low, 0.0, ((1.0 - act.low, 0.0),)
    if act.kind == "hardsigmoid":
        return 0.0, 0.0, ((1 / 6, -3.0), (-1 / 6, 3.0))
    if act.kind == "clamp":
        above = () if math.isinf(act.high) else ((-1.0, act.high),)
        if math.isinf(act.low):
            return 1.0, 0.0, above
        return 0.0, act.low, ((1.0, act.low), *above)
    return None


def _bent(act: Activation, node: Node, z: Form, basis: Basis | None) -> Form:
    """An activation of a form."""
    if not act:
        return z
    broken = pieces(act)
    if basis is not None and broken is None:
        raise TypeError(
            f"the exact engine knows piecewise-linear layers, got {act.kind} in {node.path or 'the network'}: "
            'use engine="grid"'
        )
    if basis is not None and broken is not None:
        z = _narrowed(z, broken, basis)
    function = activation(act)
    low, high = function(z.low), function(z.high)
    if act.kind in DIPS:
        place, least = DIPS[act.kind]
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        low = torch.where((z.low < place) & (place < z.high), torch.full_like(low, least), low)
    elif broken is None and act.kind not in SIGMOIDAL:
        raise TypeError(f"the verifier does not know {act.kind} in {node.path or 'the network'}")
    elif act.kind == "leaky_relu" and act.low < 0:
        low, high = torch.minimum(low, high), torch.maximum(low, high)
        low = torch.where((z.low < 0) & (z.high > 0), 0, low)
    exact = act.kind in {"relu", "clamp"}
    if not exact:
        slack = WIDEN * torch.maximum(low.abs(), high.abs())
        low, high = low - slack, high + slack
    steepest = {"leaky_relu": max(1.0, abs(act.low)), "elu": max(1.0, abs(act.low))}.get(act.kind, 1.2)
    error = z.error if exact else steepest * z.error + 4 * UNIT * torch.maximum(low.abs(), high.abs())
    result = Form(low, high, error)
    if basis is not None:
        assert broken is not None
        result.rows = _rectified(z, broken, basis)
    return result


def _rectified(z: Form, broken: Pieces, basis: Basis) -> Tensor:
    """The forms behind a piecewise-linear activation; ReLUs whose sign is open become units."""
    slope, shift, terms = broken
    forms = z.matrix(basis)
    out = slope * forms
    out[:, 0] += shift
    for weight, knee in terms:
        part = forms.clone()
        part[:, 0] -= knee
        low, high = z.low.flatten() - knee, z.high.flatten() - knee
        open_ = ((low < 0) & (high > 0)).nonzero().flatten()
        arguments = part[open_]
        part *= (low >= 0)[:, None]
        if len(open_):
            start = len(basis)
            _check_size(start + len(open_), len(out))
            basis.append(Units(start, "relu", arguments, low[open_], high[open_]))
            forms, out, part = (functional.pad(each, (0, len(open_))) for each in (forms, out, part))
            part[open_, start + torch.arange(len(open_))] = 1
        out = out + weight * part
    return out.T.reshape(-1, *z.low.shape[1:])


def _narrowed(z: Form, broken: Pieces, basis: Basis) -> Form:
    """The same with a narrower range wherever the side of a knee is open."""
    low, high = z.low.flatten().clone(), z.high.flatten().clone()
    open_ = torch.zeros(len(low), dtype=torch.bool)
    for _, knee in broken[2]:
        open_ |= (low < knee) & (high > knee)
    if not bool(open_.any()):
        return z
    below, above = basis.tight_range(z.matrix(basis)[open_])
    low[open_], high[open_] = torch.maximum(low[open_], below), torch.minimum(high[open_], above)
    return Form(low.view_as(z.low), high.view_as(z.high), z.error, z.rows)
