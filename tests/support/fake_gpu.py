"""A GPU that is not there: tensors without numbers whose devices are checked as those of a real one are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Indexing(TorchDispatchMode):
    """Refuses indices on a GPU into what is not there, which fake tensors let pass."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.index.Tensor:
            found = {index.device.type for index in args[1] if index is not None} - {"cpu", args[0].device.type}
            if found:
                raise RuntimeError(f"indices should be either on cpu or on the same device, got {found}")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def fake_gpu() -> Iterator[str]:
    """Within the block all tensors are without numbers; gives the name of the device.

    Nothing that is made outside of the block may be used in it.
    """
    with FakeTensorMode(), _Indexing():
        yield "cuda"
