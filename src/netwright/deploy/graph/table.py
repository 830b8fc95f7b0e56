"""The table from torch's operators to what writes them into a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

aten = torch.ops.aten

Handler = Callable[..., Any]
_H = TypeVar("_H", bound=Handler)

HANDLERS: dict[Any, Handler] = {}
MIXED: set[Any] = set()
"""Operators whose first operand may be a constant while another comes from the input."""


class RefusedError(Exception):
    """Why an operation cannot be expressed in the intermediate form."""


def handles(*names: str, mixed: bool = False) -> Callable[[_H], _H]:
    """Registers a function ``(builder, *arguments of the operator)`` for operators ``"name.overload"`` of aten.

    Args:
        names: Of the operators.
        mixed: Whether it takes a constant as first operand, too.
    """

    def register(handler: _H) -> _H:
        for name in names:
            packet, overload = name.split(".")
            operator = getattr(getattr(aten, packet), overload)
            HANDLERS[operator] = handler
            if mixed:
                MIXED.add(operator)
        return handler

    return register
