"""Copies of networks that share nothing, not even the classes that parametrizations make."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

_M = TypeVar("_M", bound=nn.Module)


def separate_copy(module: _M) -> _M:
    """A deep copy whose parametrizations can be removed without harm to the original.

    Torch gives each parametrised layer a class of its own, with the parametrised tensor as a property. A deep copy has
    the same class, and removing a parametrization takes the property from it, hence from both.

    Args:
        module: Any network; it is not changed.

    Example:
        >>> net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        >>> other = parametrize.remove_parametrizations(separate_copy(net), "weight")
        >>> net.weight.shape == other.weight.shape
        True
    """
    made = copy.deepcopy(module)
    for part in made.modules():
        if parametrize.is_parametrized(part):
            shared = type(part)
            own = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
            part.__class__ = type(shared.__name__, shared.__bases__, own)
    return made
