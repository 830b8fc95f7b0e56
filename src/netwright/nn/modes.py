"""Training and evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """The module and all its parts are in training or evaluation mode inside the block, then each as it was before.

    Args:
        module: Whose parts may be in different modes.
        training: Whether they train inside the block.

    Example:
        >>> net = nn.Sequential(nn.Dropout().eval(), nn.Dropout())
        >>> with in_mode(net, training=True):
        ...     net[0].training
        True
        >>> net[0].training, net[1].training
        (False, True)
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for part, before in modes:
            part.training = before
