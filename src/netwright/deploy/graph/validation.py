"""Whether a graph is sound: every size follows from the sizes, weights and settings before it.

A graph that comes from a file is checked before a backend forms an address from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from netwright.deploy.graph.ir import (
    OPS,
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
    Node,
    Op,
    Pad,
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


def _array(name: str, array: Array | None, shape: Sequence[int] | None = None, rank: int | None = None) -> None:
    if array is None:
        return
    kind = getattr(array, "dtype", None)
    _require(kind in {np.dtype(np.float32), np.dtype(np.float64)}, f"{name} must be an array of floats, got {kind}")
    _require(shape is None or array.shape == tuple(shape), f"{name} must have shape {shape}, got {array.shape}")
    _require(rank is None or array.ndim == rank, f"{name} must have rank {rank}, got {array.ndim}")
    _require(array.size > 0, f"{name} must not be empty, got shape {array.shape}")


def _numbers(name: str, numbers: Sequence[int], count: int, least: int) -> None:
    whole = len(numbers) == count and all(type(n) is int and least <= n <= LARGEST_SIZE for n in numbers)
    _require(whole, f"{name} must be {count} integers in [{least}, 2^20], got {tuple(numbers)}")


def _residual(shapes: Sequence[Shape], output: Shape) -> None:
    for shape in shapes[1:]:
        _require(shape == output, f"a residual must have the output's shape {output}, got {shape}")


def _window(padded: int, kernel: int, stride: int, dilation: int) -> int:
    """How many windows lie within a padded length."""
    return (padded - dilation * (kernel - 1) - 1) // stride + 1


def _settings(op: Conv | ConvTranspose | Pool, kernel: Sequence[int]) -> None:
    _numbers("stride", op.stride, 2, 1)
    _numbers("dilation", op.dilation, 2, 1)
    _numbers("kernel", kernel, 2, 1)


def _conv(op: Conv, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, 2, rank=4)
    _array("weight", op.weight, rank=4)
    _settings(op, [int(n) for n in op.weight.shape[2:]])
    _numbers("padding", op.padding, 4, -LARGEST_SIZE)
    _numbers("groups", [op.groups], 1, 1)
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
    _array("weight", op.weight, rank=4)
    _settings(op, [int(n) for n in op.weight.shape[2:]])
    _numbers("padding", op.padding, 2, 0)
    _numbers("groups", [op.groups], 1, 1)
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
    _array("weight", op.weight, rank=2)
    outputs, inputs = op.weight.shape
    _require(inputs == shapes[0][1], f"weight must read {shapes[0][1]} features, got {inputs}")
    _array("bias", op.bias, (outputs,))
    _is(output, (shapes[0][0], outputs))
    _residual(shapes, output)


def _pool(op: Pool, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, rank=4)
    _require(op.kind in {"max", "avg"}, f"kind must be max or avg, got {op.kind!r}")
    _settings(op, op.kernel)
    _numbers("padding", op.padding, 4, 0)
    _require(op.kind == "max" or op.dilation == (1, 1), f"dilation of an average must be 1, got {op.dilation}")
    if op.divisor is not None:
        _require(type(op.divisor) is int and op.divisor != 0, f"divisor must be an integer but 0, got {op.divisor!r}")
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
    _require(op.kind in {"max", "avg"}, f"kind must be max or avg, got {op.kind!r}")
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
    _numbers("groups", [op.groups], 1, 1)
    _require(shapes[0][1] % op.groups == 0, f"groups must divide {shapes[0][1]} channels, got {op.groups}")
    _norm(op, shapes[0], output)


def _norm(op: LayerNorm | GroupNorm, shape: Shape, output: Shape) -> None:
    _array("weight", op.weight, shape[1:2])
    _array("bias", op.bias, shape[1:2])
    _require(math.isfinite(op.eps) and op.eps >= 0, f"eps must be >= 0, got {op.eps}")
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
    kind = getattr(op.index, "dtype", None)
    _require(kind == np.dtype(np.int64) and op.index.ndim == 1, f"index must be a list of int64, got {kind}")
    _require(op.index.size > 0, "index must not be empty, got 0 entries")
    outside = op.index[(op.index < 0) | (op.index >= shapes[0][1])]
    _require(not outside.size, f"index must lie in [0, {shapes[0][1]}), got {outside[:1].sum()}")
    _is(output, (shapes[0][0], len(op.index), *shapes[0][2:]))


def _pad(op: Pad, shapes: Sequence[Shape], output: Shape) -> None:
    _inputs(shapes, 1, rank=4)
    _numbers("padding", op.padding, 4, -LARGEST_SIZE)
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
