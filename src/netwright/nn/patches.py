"""How a layer reads its input: the rows of the matrix that its weight multiplies.

A linear layer reads its input as it is; a convolution reads patches, so that it too is a product with a matrix of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

CHUNK = 2**22  # numbers of unfolded patches that are held at once


class Patches(NamedTuple):
    """How a layer reads its input: rows of what it multiplies with its weight.

    Attributes:
        kernel: Size along each axis of the picture; empty for a linear layer.
        stride: Likewise.
        dilation: Likewise.
        pads: As for ``torch.nn.functional.pad``.
        mode: Likewise.
        groups: Of channels.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    mode: str = "constant"
    groups: int = 1

    @classmethod
    def of_layer(cls, layer: nn.Module) -> Patches:
        """Those of a convolution, or of a linear layer.

        Example:
            >>> Patches.of_layer(nn.Conv2d(2, 4, 3, padding=1, groups=2)).groups
            2
        """
        if isinstance(layer, nn.Linear):
            return cls()
        conv: Any = layer
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        pads = tuple(conv._reversed_padding_repeated_twice)
        return cls(conv.kernel_size, conv.stride, conv.dilation, pads, mode, conv.groups)

    def of(self, x: Tensor) -> Iterator[Tensor]:
        """The rows of each group, transposed: (groups, inputs, rows), in pieces of consecutive examples.

        Example:
            >>> import torch
            >>> [piece.shape for piece in Patches.of_layer(nn.Conv2d(1, 4, 3)).of(torch.zeros(5, 1, 6, 6))]
            [torch.Size([1, 9, 80])]
        """
        if not self.kernel:
            yield x.reshape(-1, x.shape[-1]).T[None]
            return
        axes = len(self.kernel)
        if x.ndim == axes + 1:
            x = x[None]
        if any(self.pads):
            x = functional.pad(x, self.pads, mode=self.mode)
        each = x[0].numel() * math.prod(self.kernel) // math.prod(self.stride)
        order = [1, *range(2 + axes, 2 + 2 * axes), 0, *range(2, 2 + axes)]
        for part in x.split(max(1, CHUNK // max(1, each))):
            windows = part
            for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
                windows = windows.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
            inputs = part.shape[1] // self.groups * math.prod(self.kernel)
            yield windows.permute(order).reshape(self.groups, inputs, -1)
