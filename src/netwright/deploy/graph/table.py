"""The table from torch's operators to what writes them into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

aten = torch.ops.aten

Handler = Callable[..., Any]
_H = TypeVar("_H", bound=Handler)

HANDLERS: dict[Any, Handler] = {}


class RefusedError(Exception):
    """Why an operation cannot be expressed in the intermediate form."""


def handles(*names: str) -> Callable[[_H], _H]:
    """Registers a function ``(builder, *arguments of the operator)`` for operators ``"name.overload"`` of aten."""

    def register(handler: _H) -> _H:
        for name in names:
            packet, overload = name.split(".")
            HANDLERS[getattr(getattr(aten, packet), overload)] = handler
        return handler

    return register
