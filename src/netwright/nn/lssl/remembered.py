"""A value that is computed again when, and only when, a tensor that it depends on has changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Remembered(Generic[Value]):
    """The last value, beside copies of the small tensors it was computed from.

    The tensors are compared number by number, so that no change is missed: an optimiser's step, ``load_state_dict``,
    ``.to()``, an assignment to ``.data``. Nothing is kept where gradients flow to them, while a graph is captured, or
    inside the transforms of :mod:`torch.func`. Copies and pickles of its owner forget the value.

    Example:
        >>> remembered, weight = Remembered(), torch.ones(2)
        >>> [float(remembered(None, [weight], lambda: weight.sum())) for _ in range(2)]
        [2.0, 2.0]
        >>> weight.data += 1
        >>> float(remembered(None, [weight], lambda: weight.sum()))
        4.0
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, list[Tensor], Value] | None = None

    def __call__(self, key: Hashable, sources: Sequence[Tensor], compute: Callable[[], Value]) -> Value:
        """The value for these tensors and this key.

        Args:
            key: Whatever else the value depends on.
            sources: The tensors.
            compute: Makes the value.
        """
        learning = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if learning or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return compute()
        if self._kept is not None and self._kept[0] == key and all(map(_same, self._kept[1], sources)):
            return self._kept[2]
        # What is made in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad():
            value = compute()
            self._kept = key, [source.detach().clone() for source in sources], value
        return value

    def __reduce__(self) -> tuple[type[Remembered[Value]], tuple[()]]:
        return Remembered, ()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
