"""Whether a graph is sound: every size follows from the sizes, weights and settings before it.

A graph that comes from a file is checked before a backend forms an address from it.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from netwright.deploy.graph.ir import (
    OPS,
    Activation,
    AdaptivePool,
    Add,
    Affine,
    Array,
    Borders,
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
    Node,
    Op,
    Pad,
    Pair,
    Pool,
    Reshape,
    Shape,
)

LARGEST_SIZE = 2**20
LARGEST_VALUE = 2**31 - 1


def check(graph: Graph) -> None:
    """Refuses a graph that is not sound.

    Raises:
        ValueError: It names the node and the fault: a size that is not positive or does not follow from the inputs, a
            rank other than 2 and 4, weights of the wrong shape, an index outside its channels, a value that is read
            before it is written or written twice.

    Example:
        >>> check(Graph({0: (1, 4), 1: (1, 2)}, [Node(Channels(np.array([0, 4])), [0], 1)], [0], [1]))
        Traceback (most recent call last):
        ValueError: node 0 (channels): index must lie in [0, 4), got 4
    """
    for value, shape in graph.shapes.items():
        _require(len(shape) in {2, 4}, f"value {value}: rank must be 2 or 4, got {len(shape)}")
        _require(all(1 <= n <= LARGEST_SIZE for n in shape), f"value {value}: sizes must lie in [1, 2^20], got {shape}")
        _require(math.prod(shape) <= LARGEST_VALUE, f"value {value}: must hold fewer than 2^31 numbers, got {shape}")
    for value in (*graph.inputs, *graph.outputs):
        _require(value in graph.shapes, f"value {value}: an input or output without a shape")
    _require(len(set(graph.inputs)) == len(graph.inputs), f"inputs must differ, got {graph.inputs}")
    _require(bool(graph.outputs), "outputs must hold at least 1 value, got 0")
    written = set(graph.inputs)
    for number, node in enumerate(graph.nodes):
        try:
            _check_node(graph, node, written)
        except ValueError as error:
            where = f"node {number} ({node.op.name}{f' of {node.path}' if node.path else ''})"
            raise ValueError(f"{where}: {error}") from None
        written.add(node.output)
    missing = [value for value in graph.outputs if value not in written]
    _require(not missing, f"outputs must be written, got {missing}, which no node writes")
    for value, view in graph.views.items():
        ends = value in graph.inputs or value in graph.outputs
        _require(ends, f"value {value}: only inputs and outputs have a view")
        fits = all(n >= 1 for n in view) and math.prod(view) == math.prod(graph.shapes[value])
        _require(fits, f"value {value}: view must hold as many numbers as {graph.shapes[value]}, got {view}")


def _require(condition: bool | np.bool_, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _check_node(graph: Graph, node: Node, written: set[int]) -> None:
    for value in node.inputs:
        _require(value in written, f"reads value {value}, which is not written before")
    _require(node.output in graph.shapes, f"writes value {node.output}, which has no shape")
    _require(node.output not in written, f"writes value {node.output}, which is written already")
    rule = RULES.get(type(node.op))
    if rule is None:
        raise ValueError(f"op must be an operation of a graph, got {type(node.op).__name__}")
    _check_kinds(node.op)
    shapes, output = [graph.shapes[value] for value in node.inputs], graph.shapes[node.output]
    for shape in shapes:
        _require(shape[0] == output[0], f"the batch must stay {shape[0]}, got {output[0]}")
    act = getattr(node.op, "act", None)
    if isinstance(act, Activation):
        _require(not (math.isnan(act.low) or math.isnan(act.high)), "bounds of an activation must be numbers, got nan")
    rule(node.op, shapes, output)


def _inputs(shapes: Sequence[Shape], least: int, most: int | None = None, rank: int | None = None) -> None:
    most = least if most is None else most
    _require(least <= len(shapes) <= most, f"must read {least} to {most} values, got {len(shapes)}")
    for shape in shapes:
        _require(rank in {None, len(shape)}, f"must read values of rank {rank}, got {shape}")


def _is(output: Shape, expected: Shape) -> None:
    _require(output == expected, f"the output must have shape {expected}, got {output}")


def _check_kinds(op: Op) -> None:
    """Refuses settings of another type than the operation declares; what comes from a file may be anything."""
    hints = typing.get_type_hints(type(op))
    for part in dataclasses.fields(op):
        hint, value = hints[part.name], getattr(op, part.name)
        if isinstance(op, Channels):
            _require(_indices(value), f"index must be an array of int64, not empty, got {_told(value)}")
            continue
        if hint in EXPECTED:
            expected, test = EXPECTED[hint]
            _require(test(value), f"{part.name} must be {expected}, got {_told(value)}")
        elif typing.get_origin(hint) is typing.Literal:
            choices = typing.get_args(hint)
            _require(value in choices, f"{part.name} must be one of {', '.join(choices)}, got {_told(value)}")


def _told(value: object) -> str:
    return f"an array of {value.dtype}" if isinstance(value, np.ndarray) else repr(value)


def _integers(count: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, tuple) and len(value) == count and all(map(_integer, value))


def _integer(value: object) -> bool:
    return type(value) is int and abs(value) <= LARGEST_SIZE


def _floats(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype in FLOATS and value.size > 0


def _indices(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.dtype(np.int64) and value.size > 0


FLOATS = (np.dtype(np.float32), np.dtype(np.float64))
EXPECTED: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    Pair: ("a pair of integers", _integers(2)),
    Borders: ("4 integers", _integers(4)),
    int: ("an integer", _integer),
    int | None: ("an integer or None", lambda value: value is None or _integer(value)),
    float: ("a finite number", lambda value: type(value) in {int, float} and math.isfinite(value)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    Array: ("an array of floats, not empty", _floats),
    Array | None: ("an array of floats, not empty, or None", lambda value: value is None or _floats(value)),
    Activation: ("an activation", lambda value: isinstance(value, Activation)),
}


def _array(name: str, array: Array | None, shape: Sequence[int]) -> None:
    fits = array is None or array.shape == tuple(shape)
    _require(fits, f"{name} must have shape {tuple(shape)}, got {array.shape if array is not None else None}")


def _rank(name: str, array: Array, rank: int) -> None:
    _require(array.ndim == rank, f"{name} must have rank {rank}, got {array.ndim}")


def _least(name: str, numbers: Sequence[int], bound: int) -> None:
    _require(min(numbers) >= bound, f"{name} must be >= {bound}, got {tuple(numbers)}")


def _residual(shapes: Sequence[Shape], output: Shape) -> None:
    for shape in shapes[1:]:
        _require(shape == output, f"a residual must have the output's shape {output}, got {shape}")


def _window(padded: int, kernel: int, stride: int, dilation: int) -> int:
    """How many windows lie within a padded length."""
    return (padded - dilation * (kernel - 1) - 1) // stride + 1


def _steps(op: Conv | ConvTranspose | Pool) -> None:
    _least("stride", op.stride, 1)
    _least("dilation", op.dilation, 1)


def _conv(op: Conv, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, 2, rank=4)
    _rank("weight", op.weight, 4)
    _steps(op)
    _least("groups", [op.groups], 1)
    n, c, h, w = shapes[0]
    outputs, inputs = op.weight.shape[:2]
    _require(outputs % op.groups == 0, f"groups must divide {outputs} outputs, got {op.groups}")
    _require(inputs * op.groups == c, f"weight must read {c} channels, got {op.groups} groups of {inputs}")
    _array("bias", op.bias, (outputs,))
    top, left, below, right = op.padding
    size = [
        _window(length + around, k, s, d)
        for length, around, k, s, d in zip(
            (h, w), (top + below, left + right), op.weight.shape[2:], op.stride, op.dilation, strict=True
        )
    ]
    _is(output, (n, outputs, *(int(length) for length in size)))
    _residual(shapes, output)


def _conv_transpose(op: ConvTranspose, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, 2, rank=4)
    _rank("weight", op.weight, 4)
    _steps(op)
    _least("padding", op.padding, 0)
    _least("groups", [op.groups], 1)
    n, c, *lengths = shapes[0]
    _require(op.weight.shape[0] == c, f"weight must read {c} channels, got {op.weight.shape[0]}")
    _require(c % op.groups == 0, f"groups must divide {c} channels, got {op.groups}")
    outputs = op.weight.shape[1] * op.groups
    _array("bias", op.bias, (outputs,))
    _require(output[:2] == (n, outputs) and len(output) == 4, f"the output must have {outputs} maps, got {output}")
    for i, length in enumerate(lengths):
        most = (length - 1) * op.stride[i] + op.dilation[i] * (op.weight.shape[2 + i] - 1) + 1 - op.padding[i]
        most += max(op.stride[i], op.dilation[i]) - 1
        _require(output[2 + i] <= most, f"axis {2 + i} of the output must be at most {most}, got {output[2 + i]}")
    _residual(shapes, output)


def _linear(op: Linear, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, 2, rank=2)
    _rank("weight", op.weight, 2)
    outputs, inputs = op.weight.shape
    _require(inputs == shapes[0][1], f"weight must read {shapes[0][1]} features, got {inputs}")
    _array("bias", op.bias, (outputs,))
    _is(output, (shapes[0][0], outputs))
    _residual(shapes, output)


def _pool(op: Pool, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, rank=4)
    _steps(op)
    _least("kernel", op.kernel, 1)
    _least("padding", op.padding, 0)
    _require(op.kind == "max" or op.dilation == (1, 1), f"dilation of an average must be 1, got {op.dilation}")
    _require(op.divisor != 0, "divisor must not be 0, got 0")
    _require(
        len(output) == 4 and output[:2] == shapes[0][:2], f"the output must have {shapes[0][1]} maps, got {output}"
    )
    for i in (0, 1):
        length, before = shapes[0][2 + i], op.padding[i]
        least = _window(length + before + op.padding[2 + i], op.kernel[i], op.stride[i], op.dilation[i])
        # one more in ceil_mode, which begins in the input or in the padding before it
        fits = output[2 + i] == least or (output[2 + i] == least + 1 and least * op.stride[i] < length + before)
        _require(fits, f"axis {2 + i} of the output must be {least}, or one more in ceil_mode, got {output[2 + i]}")


def _adaptive_pool(op: AdaptivePool, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, rank=4)
    _require(
        len(output) == 4 and output[:2] == shapes[0][:2], f"the output must have {shapes[0][1]} maps, got {output}"
    )


def _affine(op: Affine, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1)
    _array("scale", op.scale, shapes[0][1:2])
    _array("shift", op.shift, shapes[0][1:2])
    _is(output, shapes[0])


def _layer_norm(op: LayerNorm, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1)
    _norm(op, shapes[0], output)


def _group_norm(op: GroupNorm, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, rank=4)
    _least("groups", [op.groups], 1)
    _require(shapes[0][1] % op.groups == 0, f"groups must divide {shapes[0][1]} channels, got {op.groups}")
    _norm(op, shapes[0], output)


def _norm(op: LayerNorm | GroupNorm, shape: Shape, output: Shape) -> None:
    _array("weight", op.weight, shape[1:2])
    _array("bias", op.bias, shape[1:2])
    _require(op.eps >= 0, f"eps must be >= 0, got {op.eps}")
    _is(output, shape)


def _same(op: Op, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1)
    _is(output, shapes[0])


def _binary(op: Op, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 2)
    a, b = shapes
    gate = len(a) == 4 and b == (*a[:2], 1, 1)
    _require(a == b or gate, f"the second input must have shape {a}, or height and width 1, got {b}")
    _is(output, a)


def _concat(op: Concat, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, len(shapes))
    for shape in shapes:
        fits = len(shape) == len(shapes[0]) and shape[2:] == shapes[0][2:]
        _require(fits, f"inputs must agree but for their channels, got {shapes[0]} and {shape}")
    _is(output, (shapes[0][0], sum(shape[1] for shape in shapes), *shapes[0][2:]))


def _channels(op: Channels, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1)
    _rank("index", op.index, 1)
    outside = op.index[(op.index < 0) | (op.index >= shapes[0][1])]
    _require(not outside.size, f"index must lie in [0, {shapes[0][1]}), got {outside[:1].sum()}")
    _is(output, (shapes[0][0], len(op.index), *shapes[0][2:]))


def _pad(op: Pad, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, rank=4)
    n, c, h, w = shapes[0]
    top, left, below, right = op.padding
    _is(output, (n, c, h + top + below, w + left + right))


def _reshape(op: Reshape, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1)
    fits = math.prod(shapes[0]) == math.prod(output)
    _require(fits, f"the output must hold {math.prod(shapes[0])} numbers, got {output}")


def _constant(op: Constant, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 0)
    _array("value", op.value, output)


RULES: dict[type[Op], Callable[..., None]] = {
    Conv: _conv,
    ConvTranspose: _conv_transpose,
    Linear: _linear,
    Pool: _pool,
    AdaptivePool: _adaptive_pool,
    Affine: _affine,
    LayerNorm: _layer_norm,
    GroupNorm: _group_norm,
    Concat: _concat,
    Channels: _channels,
    Pad: _pad,
    Reshape: _reshape,
    Constant: _constant,
    Add: _binary,
    Mul: _binary,
}
RULES |= {kind: _same for kind in OPS.values() if kind not in RULES}
