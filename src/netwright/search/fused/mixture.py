"""A sum of operations on one input as one step of autograd.

    y = sum_i m_i o_i(x),    o_i one of: a pooling, the identity, one or two units relu - depthwise - pointwise - norm

In PyTorch's eager mode a separable convolution writes and reads every activation some ten times in the forward pass
alone, and its depthwise convolutions take most of the time of the backward pass. Here an image goes through all
operations while it is in the cache: the padded, rectified input is made once for all of them, the norms become one
factor and one shift a channel, and the weighted sum is one pass. Chan, Golub and LeVeque, "Updating Formulae and a
Pairwise Algorithm for Computing Sample Variances", 1979, gives the batch's variance from those of its images.

The kernels serve float32 on a processor, channels in multiples of 8. Anything else (other types and devices, autocast,
:mod:`torch.func`, tracing and export, modules with hooks) takes the plain path, and so does a second derivative.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as torch_module

from netwright.search.fused.branches import HALVING, MAX_POOL, MEAN_POOL, PROJECTION, SEPARABLE, Branch, weight
from netwright.search.fused.library import LANES, Kernels, kernels, parallel

MOST_BRANCHES = 16
_UNIT = "10q2d"
_NO_UNIT = (-1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0.0, 0.0)
_enabled: ContextVar[bool] = ContextVar("fused", default=True)


@contextmanager
def plain() -> Iterator[None]:
    """Every operation runs by itself inside the block, as modules of torch; for comparisons.

    Example:
        >>> with plain():
        ...     serves(torch.zeros(1, 8, 4, 4)) is None
        True
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def serves(x: Tensor, weights: Tensor | None = None, out: int = 0) -> Kernels | None:
    """The kernels for an input, its mixing weights and the channels out (0: those in), None where they do not serve."""
    if type(x) is not Tensor or (weights is not None and type(weights) not in (Tensor, nn.Parameter)):
        return None
    floats = x.dtype == torch.float32 and (weights is None or weights.dtype == torch.float32)
    here = x.device.type == "cpu" and x.layout == torch.strided and x.dim() == 4 and x.numel() > 0
    if not (_enabled.get() and floats and here) or x.shape[1] % LANES or _watched():
        return None
    return kernels(math.gcd(x.shape[1], out)) if torch.get_num_threads() == 1 or parallel() else None


def _watched() -> bool:
    """Whether somebody wants to see or replace the single operations: autocast, tracing, a transform, a hook."""
    return bool(
        torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch_module._has_any_global_hook()
    )


def mix(
    library: Kernels,
    x: Tensor,
    branches: Sequence[Branch],
    stride: int,
    weights: Tensor | None,
    candidates: Sequence[int],
    out: int = 0,
) -> Tensor:
    """sum_i weights[candidates_i] branches_i(x), or the plain sum without weights; running statistics follow the batch.

    Args:
        library: What :func:`serves` gave.
        x: (B, C, H, W).
        branches: What :func:`netwright.search.fused.branches.read` gave, at most 16.
        stride: That of the branches.
        weights: Mixing weights.
        candidates: Position of each branch in ``weights``.
        out: Channels out, where a single branch changes their number.
    """
    call = _Call(library, branches, stride, candidates, out or x.shape[1])
    return _Mixture.apply(x, weights, call.pack(), call)


class _Norm(NamedTuple):
    """A batch norm of a call: whether the batch's statistics served, and where those that did lie in its memory."""

    of_batch: bool
    eps: float
    tensor: int
    start: int


class _Call:
    """One forward pass, and what its backward pass needs besides tensors."""

    def __init__(
        self, library: Kernels, branches: Sequence[Branch], stride: int, candidates: Sequence[int], channels: int
    ) -> None:
        self.channels = channels
        self.library, self.branches, self.stride, self.candidates = library, branches, stride, candidates
        self.offsets: list[tuple[int, int, int, int]] = []
        self.norms: list[_Norm | None] = []
        self.plan: list[Any] = []

    def pack(self) -> Tensor | None:
        """All weights one after another. As the result of a function the vector tells, in the backward pass, whether
        the gradient of any weight is asked for: :func:`torch.autograd.grad` for the architecture asks for none."""
        parts: list[Tensor] = []
        end = 0
        for branch in self.branches:
            for unit in branch.units:
                place = []
                convolutions = (unit.depthwise, unit.pointwise)
                tensors: list[Tensor | None] = [None if layer is None else weight(layer) for layer in convolutions]
                norm = unit.norm
                tensors += [None, None] if norm is None else [norm.weight, norm.bias]
                for tensor in tensors:
                    place.append(-1 if tensor is None else end)
                    if tensor is not None:
                        parts.append(tensor.flatten())
                        end += tensor.numel()
                self.offsets.append((place[0], place[1], place[2], place[3]))
        return torch.cat(parts) if parts else None

    def lay_out(self, x: Tensor, rows: int, columns: int) -> list[Tensor]:
        """Memory for what lies between input and output, and the numbers that describe the branches."""
        batch, channels = x.shape[0], self.channels
        size = batch * channels * rows * columns
        memory: list[Tensor] = []
        offsets = iter(self.offsets)
        tracked: list[Tensor] = []
        counters: list[Tensor] = []
        plan: list[Any] = []
        for branch, candidate in zip(self.branches, self.candidates, strict=True):
            tensors = len(branch.units) * (2 if branch.kind == SEPARABLE else 1)
            floats = torch.empty(tensors * size + 4 * channels * len(branch.units))
            place, peak = len(memory), 0
            memory.append(floats)
            if branch.kind == MAX_POOL:
                memory.append(torch.empty(size, dtype=torch.int8))
                peak = memory[-1].data_ptr()
            plan += [branch.kind, branch.kernel, branch.dilation, candidate, len(branch.units), peak]
            at = floats.data_ptr()
            for number in range(2):
                if number >= len(branch.units):
                    plan += _NO_UNIT
                    continue
                norm = branch.units[number].norm
                spatial = z = at
                if branch.kind == SEPARABLE:
                    z += 4 * size
                at = z + 4 * size
                plan += [*next(offsets), spatial, z]
                if norm is None:
                    plan += [0, 0, 0, 0, 0.0, 0.0]
                    self.norms.append(None)
                    continue
                mean, variance = norm.running_mean, norm.running_var
                of_batch = norm.training or mean is None
                if of_batch and not (norm.training and norm.track_running_stats):
                    mean = variance = None
                momentum = 0.0
                if of_batch and mean is not None and variance is not None:
                    assert norm.num_batches_tracked is not None
                    counters.append(norm.num_batches_tracked)
                    momentum = 1 / (1 + int(counters[-1])) if norm.momentum is None else norm.momentum
                    tracked += [mean, variance]
                pointers = [0 if buffer is None else buffer.data_ptr() for buffer in (mean, variance)]
                plan += [at, *pointers, int(of_batch), norm.eps, momentum]
                self.norms.append(_Norm(of_batch, norm.eps, place, (at - floats.data_ptr()) // 4))
                at += 16 * channels
        if counters:
            torch._foreach_add_(counters, 1)
        torch.autograd.graph.increment_version([buffer for buffer in tracked if not buffer.is_inference()])
        self.plan = plan
        return memory

    def run(
        self, function: Any, x: Tensor, packed: Tensor | None, mixing: Tensor | None, *pointers: Tensor | None
    ) -> None:
        """Calls a kernel; ``pointers`` are y, gy, gx and the gradients of ``packed`` and ``mixing``."""
        batch, height, width, channels = x.shape
        size = 0 if packed is None else packed.numel()
        numbers = [batch, height, width, channels, self.channels, self.stride, torch.get_num_threads()]
        numbers += [len(self.branches), size]
        places = [0 if tensor is None else tensor.data_ptr() for tensor in (x, packed, mixing, *pointers)]
        text = struct.pack("18q" + ("6q" + _UNIT * 2) * len(self.branches), *numbers, parallel(), *places, *self.plan)
        if function(text):
            raise MemoryError("no memory for the scratch of a mixed operation")

    def replay(self, x: Tensor, mixing: Tensor | None, packed: Tensor | None, memory: Sequence[Tensor]) -> Tensor:
        """The same with operations of torch, for second derivatives."""
        inputs, channels = x.shape[1], self.channels
        rectified = functional.relu(x)
        norms, offsets = iter(self.norms), iter(self.offsets)
        total: Tensor | None = None

        def part(start: int, *shape: int) -> Any:
            return None if packed is None or start < 0 else packed[start : start + math.prod(shape)].view(shape)

        for branch, candidate in zip(self.branches, self.candidates, strict=True):
            y, stride = rectified if branch.convolutions else x, self.stride
            if branch.kind == MAX_POOL:
                y = functional.max_pool2d(y, 3, stride, 1)
            elif branch.kind == MEAN_POOL:
                y = functional.avg_pool2d(y, 3, stride, 1, count_include_pad=False)
            for number in range(len(branch.units)):
                depthwise, pointwise, gamma, beta = next(offsets)
                if branch.kind == SEPARABLE:
                    k, dilation = branch.kernel, branch.dilation
                    y = y if number == 0 else functional.relu(y)
                    taps = part(depthwise, channels, 1, k, k)
                    y = functional.conv2d(y, taps, None, stride, dilation * (k // 2), dilation, channels)
                    y, stride = functional.conv2d(y, part(pointwise, channels, channels, 1, 1)), 1
                elif branch.kind == PROJECTION:
                    y = functional.conv2d(y, part(pointwise, channels, inputs, 1, 1))
                elif branch.kind == HALVING:
                    height, width = y.shape[-2:]
                    shifted = functional.pad(y, (0, width % 2, 0, height % 2))[..., 1:, 1:]
                    halves = [part(start, channels // 2, inputs, 1, 1) for start in (depthwise, pointwise)]
                    y = torch.cat(
                        [functional.conv2d(y, halves[0], None, 2), functional.conv2d(shifted, halves[1], None, 2)], 1
                    )
                place = next(norms)
                if place is None:
                    continue
                scale, shift = part(gamma, channels), part(beta, channels)
                if place.of_batch:
                    y = functional.batch_norm(y, None, None, scale, shift, True, 0.0, place.eps)
                else:
                    mean, inverse = memory[place.tensor][place.start :][: 2 * channels].view(2, channels, 1, 1)
                    y = (y - mean) * inverse
                    y = y if scale is None else y * scale.view(-1, 1, 1)
                    y = y if shift is None else y + shift.view(-1, 1, 1)
            y = y if mixing is None else mixing[candidate] * y
            total = y if total is None else total + y
        assert total is not None
        return total


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mixing: Tensor | None, packed: Tensor | None, call: _Call) -> Tensor:
        batch, _, height, width = x.shape
        rows, columns = -(-height // call.stride), -(-width // call.stride)
        inner = x.permute(0, 2, 3, 1).contiguous()
        flat = None if mixing is None else mixing.contiguous()
        memory = call.lay_out(x, rows, columns)
        y = torch.empty((batch, call.channels, rows, columns), memory_format=torch.channels_last)
        call.run(call.library.forward, inner, packed, flat, y, None, None, None, None)
        ctx.save_for_backward(x, mixing, packed, *memory)
        ctx.call = call
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, mixing, packed, *memory = ctx.saved_tensors
        call = ctx.call
        if torch.is_grad_enabled():
            return (*_differentiable(call, gy, (x, mixing, packed), ctx.needs_input_grad, memory), None)
        inner = x.permute(0, 2, 3, 1).contiguous()
        flat = None if mixing is None else mixing.contiguous()
        wanted = list(ctx.needs_input_grad[:3])
        # the last tensor among the inputs; those that are None have no place there
        wanted[2] = wanted[2] and torch._C._will_engine_execute_node(ctx.next_functions[-1][0])
        gx = torch.empty_like(inner) if wanted[0] else None
        gmixing = torch.zeros_like(flat) if wanted[1] and flat is not None else None
        gpacked = torch.empty_like(packed) if wanted[2] and packed is not None else None
        gy = gy.permute(0, 2, 3, 1).contiguous()
        call.run(call.library.backward, inner, packed, flat, None, gy, gx, gpacked, gmixing)
        return None if gx is None else gx.permute(0, 3, 1, 2), gmixing, gpacked, None


def _differentiable(
    call: _Call, gy: Tensor, inputs: tuple[Tensor | None, ...], needed: Sequence[bool], memory: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again."""
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=False) if need and tensor is not None]
    x, mixing, packed = inputs
    assert x is not None
    grads = iter(torch.autograd.grad(call.replay(x, mixing, packed, memory), wanted, gy, create_graph=True))
    return [next(grads) if need else None for _, need in zip(inputs, needed, strict=False)]
