"""The primitives of cell spaces, by name.

The eight operations of Liu, Simonyan and Yang, "DARTS", 2019, arXiv:1806.09055, and noise. Each maps C channels to C
channels at stride s, (B, C, H, W) -> (B, C, ceil(H/s), ceil(W/s)), at any size from 1x1 on, odd ones included.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import one_of
from netwright.search.fused import mixture
from netwright.search.fused.branches import alone
from netwright.search.fused.library import LANES


def channels_last(x: Tensor) -> Tensor:
    """The same values with channels innermost in memory where the tensor is on a processor.

    Depthwise convolutions and poolings are 2 to 8 times faster there, and every operation keeps the order. Written with
    permutations because these, unlike ``memory_format``, work under ``torch.func.vmap`` and vanish in an ONNX export.

    Example:
        >>> channels_last(torch.zeros(2, 3, 4, 5)).stride()
        (60, 1, 15, 3)
    """
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if x.device.type == "cpu" else x


class Zero(nn.Module):
    """The primitive ``none``: zeros, spatially subsampled by ``stride``.

    Example:
        >>> Zero(2)(torch.ones(1, 3, 5, 4)).shape
        torch.Size([1, 3, 3, 2])
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the output's shape."""
        return torch.zeros_like(x[..., :: self.stride, :: self.stride])


class Noise(nn.Module):
    """Standard normal numbers of the output's shape, whatever the input: an operation that can only do harm.

    Of space S4 of Zela et al., "Understanding and Robustifying Differentiable Architecture Search", ICLR 2020,
    arXiv:1909.09656. Drawn from torch's global generator, in evaluation mode too.

    Example:
        >>> Noise(2)(torch.ones(1, 3, 5, 4)).shape
        torch.Size([1, 3, 3, 2])
    """

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Numbers that know nothing of ``x`` but its shape."""
        return torch.randn_like(x[..., :: self.stride, :: self.stride])


class Rectified(nn.Module):
    """An operation that begins with a ReLU: ``body(relu(x))``.

    A mixed operation recognises the class and applies the ReLU once for all such candidates of an edge.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = layers[0] if len(layers) == 1 else nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """``body(relu(x))``; in training by the kernels of :mod:`netwright.search.fused` where they know the body."""
        known = alone(self.body, x.shape[1]) if self.training and type(x) is Tensor and x.dim() == 4 else None
        kernels = None if known is None else mixture.serves(x, out=known[2])
        if known is None or kernels is None:
            return self.body(functional.relu(x))
        branch, stride, channels = known
        return mixture.mix(kernels, x, [branch], stride, None, [0], channels)


class Halving(nn.Module):
    """Two 1x1 convolutions of stride 2, the second on the input shifted by one pixel, concatenated.

    The published form fails where height or width is odd; the shifted branch is then padded with one zero row or
    column, which leaves even sizes as they are. An odd number of output channels gives the first branch one more.
    """

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(c_in, c_out - c_out // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C_out, ceil(H/2), ceil(W/2))."""
        height, width = x.shape[-2:]
        shifted = x[..., 1:, 1:]
        if height % 2 or width % 2:
            shifted = functional.pad(x, (0, width % 2, 0, height % 2))[..., 1:, 1:]
        if x.requires_grad and x.shape[1] < LANES:
            # The gradient by oneDNN for AVX2 (torch 2.14) writes beyond its memory where the last row or column is not
            # read; without them the result is the same.
            x = x[..., : height - 1 + height % 2, : width - 1 + width % 2]
        return torch.cat([self.even(x), self.odd(shifted)], dim=1)


class FactorizedReduce(Rectified):
    """ReLU, :class:`Halving`, batch norm: halves the resolution without losing pixels.

    Example:
        >>> FactorizedReduce(4, 6)(torch.ones(2, 4, 5, 8)).shape
        torch.Size([2, 6, 3, 4])
    """

    def __init__(self, c_in: int, c_out: int, *, affine: bool = True) -> None:
        if c_out < 2:
            raise ValueError(f"c_out must be >= 2, got {c_out}")
        super().__init__(Halving(c_in, c_out), nn.BatchNorm2d(c_out, affine=affine))


def relu_conv_bn(c_in: int, c_out: int, *, affine: bool = True) -> Rectified:
    """ReLU, 1x1 convolution, batch norm: brings a cell's input to the cell's width."""
    return Rectified(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine))


def _separable(c: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    return [
        nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        nn.BatchNorm2d(c, affine=affine),
    ]


def _sep_conv(kernel: int) -> Callable[[int, int, bool], nn.Module]:
    def make(c: int, stride: int, search: bool) -> nn.Module:
        first, second = (_separable(c, kernel, s, 1, not search) for s in (stride, 1))
        return Rectified(*first, nn.ReLU(), *second)

    return make


def _dil_conv(kernel: int) -> Callable[[int, int, bool], nn.Module]:
    return lambda c, stride, search: Rectified(*_separable(c, kernel, stride, 2, not search))


def _pool(pool: Callable[[int], nn.Module]) -> Callable[[int, int, bool], nn.Module]:
    def make(c: int, stride: int, search: bool) -> nn.Module:
        return nn.Sequential(pool(stride), nn.BatchNorm2d(c, affine=False)) if search else pool(stride)

    return make


def _skip(c: int, stride: int, search: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(c, c, affine=not search)


OPERATIONS: dict[str, Callable[[int, int, bool], nn.Module]] = {
    "none": lambda c, stride, search: Zero(stride),
    "max_pool_3x3": _pool(lambda stride: nn.MaxPool2d(3, stride, padding=1)),
    "avg_pool_3x3": _pool(lambda stride: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)),
    "skip_connect": _skip,
    "sep_conv_3x3": _sep_conv(3),
    "sep_conv_5x5": _sep_conv(5),
    "dil_conv_3x3": _dil_conv(3),
    "dil_conv_5x5": _dil_conv(5),
    "noise": lambda c, stride, search: Noise(stride),
}
"""Name -> factory ``(channels, stride, search)``; a space may add its own."""


def operation(name: str, channels: int, stride: int = 1, *, search: bool = False) -> nn.Module:
    """The primitive ``name``.

    Args:
        name: One of :data:`OPERATIONS`.
        channels: Channels in and out, at least 1.
        stride: 1 or 2.
        search: The supernet's form: batch norms without learned scale, so that operations stay comparable, and one
            more after each pooling. Otherwise the evaluation network's: affine batch norms, none after pooling.

    Raises:
        ValueError: If the name is unknown or a number is out of range.

    Example:
        >>> sum(p.numel() for p in operation("sep_conv_3x3", 8).parameters())   # 2 (9*8 + 8*8 + 2*8)
        304
    """
    one_of("operation", name, OPERATIONS)
    if channels < 1:
        raise ValueError(f"channels must be >= 1, got {channels}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    return OPERATIONS[name](channels, stride, search)
