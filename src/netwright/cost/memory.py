"""Memory of training: the bytes that a forward pass keeps for the backward pass.

    kept = sum over the storages that autograd saves, each counted once

The count is exact and the same on every machine and device. Parameters are left out, since they are there anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def saved_bytes(function: Callable[[], Any]) -> int:
    """Bytes that autograd saves while ``function`` runs, parameters and what is seen twice left out.

    Args:
        function: Makes a forward pass; its result is kept alive until the count is made.

    Example:
        >>> x = torch.ones(10, requires_grad=True)
        >>> saved_bytes(lambda: x.exp()), saved_bytes(lambda: x + 1)    # exp saves its result, 10 numbers of 4 bytes
        (40, 0)
    """
    sizes: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # a storage freed meanwhile would give its address away
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    del result
    return sum(sizes.values())
