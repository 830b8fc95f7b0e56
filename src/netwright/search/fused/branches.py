"""Which operations the kernels know, read off the modules at every call: they may be replaced, masked or hooked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.nn.sparse.layers import SparseConv2d

SEPARABLE, MAX_POOL, MEAN_POOL, IDENTITY, PROJECTION, HALVING = range(6)


@dataclass(frozen=True)
class Unit:
    """A depthwise and a pointwise convolution (or neither, behind a pooling), then a batch norm (or none).

    A projection has no depthwise convolution; a halving's two convolutions stand in the places of both.
    """

    depthwise: Any
    pointwise: Any
    norm: nn.BatchNorm2d | None


@dataclass(frozen=True)
class Branch:
    """An operation as the kernels see it; all but poolings and the identity begin with a ReLU."""

    kind: int
    units: tuple[Unit, ...]
    kernel: int = 3
    dilation: int = 1

    @property
    def convolutions(self) -> int:
        """Of each unit."""
        return {SEPARABLE: 2, HALVING: 2, PROJECTION: 1}.get(self.kind, 0)


def read(operation: nn.Module, channels: int, stride: int, *, rectified: bool = False) -> Branch | None:
    """The operation as a branch of so many channels and such a stride; None if it is anything else.

    Args:
        operation: A candidate, or what follows the ReLU of one.
        channels: Channels in and out.
        stride: Its stride.
        rectified: Whether its input goes through a ReLU that is not part of ``operation``.
    """
    if not bare(operation):
        return None
    if rectified:
        return _separable(operation, channels, stride)
    if type(operation) is nn.Identity and stride == 1:
        return Branch(IDENTITY, ())
    pool, norm = operation, None
    if type(operation) is nn.Sequential and len(operation) == 2:
        pool, norm = operation[0], operation[1]
        if not (bare(pool) and _is_norm(norm, channels)):
            return None
    kind = _pooling(pool, stride)
    return None if kind is None else Branch(kind, (Unit(None, None, norm),))  # type: ignore[arg-type]


def alone(body: nn.Module, channels: int) -> tuple[Branch, int, int] | None:
    """What follows the ReLU of an operation, as a branch with its stride and channels out; None if it is anything else.

    Args:
        body: What follows the ReLU.
        channels: Channels in.
    """
    if type(body) is not nn.Sequential or not len(body) or not bare(body):
        return None
    first: Any = body[0]
    if isinstance(first, nn.Conv2d) and first.kernel_size != (1, 1):
        branch = _separable(body, channels, first.stride[0])
        return None if branch is None else (branch, first.stride[0], channels)
    last: Any = body[-1]
    out = getattr(last, "num_features", 0)
    if len(body) != 2 or out % 8 or not _is_norm(last, out):
        return None
    if isinstance(first, nn.Conv2d):
        known = _is_convolution(first, (channels, out), 1, (1, 1), (1, 1), (0, 0))
        return (Branch(PROJECTION, (Unit(None, first, last),)), 1, out) if known else None
    if not _is_halving(first):
        return None
    known = all(
        _is_convolution(half, (channels, out // 2), 1, (1, 1), (2, 2), (0, 0)) for half in (first.even, first.odd)
    )
    return (Branch(HALVING, (Unit(first.even, first.odd, last),)), 2, out) if known else None


def _is_halving(module: nn.Module) -> bool:
    from netwright.search.spaces.operations import Halving  # which imports this module

    return type(module) is Halving and bare(module)


def bare(module: nn.Module) -> bool:
    """Whether calling the module is calling its class's ``forward`` and nothing else."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or state.get("_compiled_call_impl") is not None
    )


def weight(convolution: Any) -> Tensor:
    """The weight that a convolution computes with, masked where it is sparse."""
    if type(convolution) is SparseConv2d:
        return convolution.apply_mask(convolution.weight)
    return convolution.weight


def _separable(body: nn.Module, channels: int, stride: int) -> Branch | None:
    if type(body) is not nn.Sequential or len(body) not in (3, 7):
        return None
    layers: list[Any] = list(body)
    first = layers[0]
    shape = _depthwise(first, channels, stride)
    if shape is None or not _is_unit(layers[:3], channels):
        return None
    units = [Unit(*layers[:3])]
    if len(layers) == 7:
        relu = layers[3]
        if type(relu) is not nn.ReLU or not bare(relu) or _depthwise(layers[4], channels, 1) != shape:
            return None
        if not _is_unit(layers[4:], channels):
            return None
        units.append(Unit(*layers[4:]))
    return Branch(SEPARABLE, tuple(units), *shape)


def _is_unit(layers: list[Any], channels: int) -> bool:
    return _is_convolution(layers[1], (channels, channels), 1, (1, 1), (1, 1), (0, 0)) and _is_norm(layers[2], channels)


def _depthwise(layer: Any, channels: int, stride: int) -> tuple[int, int] | None:
    """Kernel and dilation."""
    if not isinstance(layer, nn.Conv2d):
        return None
    kernel, dilation = layer.kernel_size[0], layer.dilation[0]
    padding = dilation * (kernel // 2)
    known = kernel in (3, 5) and dilation in (1, 2) and layer.dilation[1] == dilation
    if not known or not _is_convolution(
        layer, (channels, channels), channels, (kernel, kernel), (stride, stride), (padding, padding)
    ):
        return None
    return kernel, dilation


def _is_convolution(
    layer: Any,
    channels: tuple[int, int],
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> bool:
    kind = parametrize.type_before_parametrizations(layer)
    return bool(
        (kind is nn.Conv2d or type(layer) is SparseConv2d)
        and bare(layer)
        and (layer.in_channels, layer.out_channels) == channels
        and layer.groups == groups
        and layer.kernel_size == kernel
        and layer.stride == stride
        and layer.padding == padding
        and layer.bias is None
        and layer.padding_mode == "zeros"
    )


def _is_norm(layer: nn.Module, channels: int) -> bool:
    return type(layer) is nn.BatchNorm2d and bare(layer) and layer.num_features == channels


def _pooling(pool: Any, stride: int) -> int | None:
    if type(pool) is nn.MaxPool2d:
        same = pool.dilation in (1, (1, 1)) and not pool.return_indices
        kind = MAX_POOL
    elif type(pool) is nn.AvgPool2d:
        same = not pool.count_include_pad and pool.divisor_override is None
        kind = MEAN_POOL
    else:
        return None
    wanted = ((3, (3, 3)), (stride, (stride, stride)), (1, (1, 1)))
    given = (pool.kernel_size, pool.stride, pool.padding)
    same = same and not pool.ceil_mode and all(a in b for a, b in zip(given, wanted, strict=True))
    return kind if same else None
