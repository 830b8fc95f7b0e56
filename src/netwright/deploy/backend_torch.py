"""Runs a graph with PyTorch: sparse matrices where they pay, PyTorch's dense operators for everything else.

It needs no compiler and is what the native backend falls back to. Matrix products with sparse weights go to MKL as
compressed rows (CSR); only 1x1 convolutions of stride 1 and linear layers are such products.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from netwright.deploy.graph.ir import Activation, Array, Conv, ConvTranspose, Graph, Linear, Op, Shape
from netwright.deploy.graph.reference import Kernel, activation, arranged, kernel_of, tensor_of

# One core of an AVX-512 server, seven shapes, 1 to 50 % kept: a kept weight costs 4 dense ones, a row 8 kept ones more.
COST_OF_KEPT = 4.0
COST_OF_ROW = 8.0
LEAST_PRODUCTS = 2**17

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "hardswish": lambda x: functional.hardswish(x, inplace=True),
    "hardsigmoid": lambda x: functional.hardsigmoid(x, inplace=True),
    "silu": lambda x: functional.silu(x, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
}


@dataclass
class Step:
    """One operation: what to call, on which values, where the result goes, and which values nobody reads later."""

    kernel: Kernel
    inputs: list[int]
    output: int
    finished: list[int]


class TorchBackend:
    """A graph as a callable on torch tensors.

    Args:
        graph: An optimised graph; its weights are converted once.
        threads: How many threads torch may use during a call; its own setting by default.

    Raises:
        ValueError: If ``threads`` is below 1.

    Example:
        >>> from netwright.deploy.graph import capture, optimise
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> x = torch.rand(1, 3, 6, 5)
        >>> torch.allclose(TorchBackend(optimise(capture(net, x)))([x])[0], net(x), atol=1e-6)
        True
    """

    def __init__(self, graph: Graph, threads: int | None = None):
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be >= 1, got {threads}")
        self.threads = threads
        self._graph = Graph(dict(graph.shapes), [], list(graph.inputs), list(graph.outputs), dict(graph.views))
        last = {value: place for place, node in enumerate(graph) for value in (*node.inputs, node.output)}
        kept = set(graph.outputs)
        self._steps = [
            Step(
                _fast_kernel(node.op, graph.shapes[node.output]),
                list(node.inputs),
                node.output,
                [v for v in {*node.inputs, node.output} if last[v] == place and v not in kept],
            )
            for place, node in enumerate(graph)
        ]

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs for float32 inputs of the graph's shapes.

        Raises:
            ValueError: If the number, a shape or a type of the inputs is another than the graph's.
        """
        for i, x in enumerate(inputs):
            if x.dtype != torch.float32 or x.device.type != "cpu":
                raise ValueError(f"input {i} must be float32 on the cpu, got {x.dtype} on {x.device}")
        graph = self._graph
        values = dict(zip(graph.inputs, arranged(graph, inputs), strict=True))
        with torch.no_grad(), _thread_count(self.threads):
            for step in self._steps:
                values[step.output] = step.kernel(*[values[v] for v in step.inputs])
                for value in step.finished:
                    del values[value]
            # an output may be an input, a constant of ours, or one value twice
            own = [values[v].clone().reshape(graph.views.get(v, graph.shapes[v])) for v in graph.outputs]
        return own


@contextmanager
def _thread_count(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pays(weight: Array, products: int) -> bool:
    """Whether a sparse matrix product beats the dense one.

    Args:
        weight: (outputs, inputs, ...).
        products: Multiply-adds of the dense one.

    Example:
        >>> weight = np.zeros((512, 512))
        >>> weight[:, :25] = 1
        >>> pays(weight, products=512 * 512 * 49), pays(np.ones((512, 512)), products=512 * 512 * 49)
        (True, False)
    """
    cost = COST_OF_KEPT * (np.count_nonzero(weight) + COST_OF_ROW * len(weight))
    return products >= LEAST_PRODUCTS and bool(cost < weight.size)


def _fast_kernel(op: Op, shape: Shape) -> Kernel:
    if isinstance(op, Linear):
        return _linear(op, shape)
    if isinstance(op, Conv):
        pointwise = op.weight.shape[2:] == (1, 1) == op.stride and op.groups == 1 and not any(op.padding)
        products = op.weight.size * shape[0] * shape[2] * shape[3]
        return _pointwise(op) if pointwise and pays(op.weight, products) else _conv(op)
    if isinstance(op, ConvTranspose):
        return _conv_transpose(op, shape)
    return kernel_of(op, shape, dtype=torch.float32)


def _finish(act: Activation, bias: Tensor | None = None) -> Kernel:
    """Bias, residual and activation in the memory of a fresh result."""
    function = IN_PLACE.get(act.kind) or (
        (lambda y: y.clamp_(act.low, act.high)) if act.kind == "clamp" else activation(act)
    )

    def finish(y: Tensor, *residual: Tensor) -> Tensor:
        y = y if bias is None else y.add_(bias)
        return function(y.add_(residual[0]) if residual else y)

    return finish


def _csr(weight: Array) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.from_numpy(weight.reshape(len(weight), -1).astype(np.float32)).to_sparse_csr()


def _linear(op: Linear, shape: Shape) -> Kernel:
    bias, finish = tensor_of(op.bias, torch.float32), _finish(op.act)
    if not pays(op.weight, op.weight.size * shape[0]):
        dense = torch.from_numpy(op.weight.astype(np.float32))
        return lambda x, *residual: finish(functional.linear(x, dense, bias), *residual)
    matrix, ending = _csr(op.weight), _finish(op.act, bias)
    if shape[0] == 1:
        return lambda x, *residual: ending((matrix @ x[0])[None], *residual)
    return lambda x, *residual: ending((matrix @ x.t()).t().contiguous(), *residual)


def _pointwise(op: Conv) -> Kernel:
    matrix = _csr(op.weight)
    bias = tensor_of(op.bias, torch.float32)
    ending = _finish(op.act, None if bias is None else bias[:, None, None])

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        n, _, h, w = x.shape
        planes = x.flatten(2)
        parts = [matrix @ planes[i] for i in range(n)]
        return ending(torch.stack(parts).view(n, -1, h, w) if n > 1 else parts[0].view(1, -1, h, w), *residual)

    return run


def _conv(op: Conv) -> Kernel:
    used = np.flatnonzero(op.weight.any((0, 2, 3)))
    count = int(used[-1] - used[0]) + 1 if len(used) else 0
    if op.groups == 1 and 0 < count < op.weight.shape[1]:
        return _narrow(op, int(used[0]), count)
    weight = torch.from_numpy(op.weight.astype(np.float32))
    bias, ending = tensor_of(op.bias, torch.float32), _finish(op.act)
    top, left, below, right = op.padding
    if (top, left) == (below, right) and min(op.padding) >= 0:
        around = (top, left)
        return lambda x, *residual: ending(
            functional.conv2d(x, weight, bias, op.stride, around, op.dilation, op.groups), *residual
        )

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        padded = functional.pad(x, (left, right, top, below))
        return ending(functional.conv2d(padded, weight, bias, op.stride, 0, op.dilation, op.groups), *residual)

    return run


def _narrow(op: Conv, first: int, count: int) -> Kernel:
    """A convolution of a slice of the channels, which :func:`netwright.deploy.graph.optimise` made one of all."""
    kernel = _conv(dataclasses.replace(op, weight=np.ascontiguousarray(op.weight[:, first : first + count])))
    return lambda x, *residual: kernel(x.narrow(1, first, count), *residual)


def _conv_transpose(op: ConvTranspose, shape: Shape) -> Kernel:
    weight, bias = torch.from_numpy(op.weight.astype(np.float32)), tensor_of(op.bias, torch.float32)
    ending = _finish(op.act, None if bias is None else bias[:, None, None])
    top, left = op.padding

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        y = functional.conv_transpose2d(x, weight, None, op.stride, 0, 0, op.groups, op.dilation)
        end = (shape[2] + top - y.shape[2], shape[3] + left - y.shape[3])
        # also copies where nothing is cut, so that the result may be changed in place
        return ending(functional.pad(y, (-left, end[1], -top, end[0])), *residual)

    return run
