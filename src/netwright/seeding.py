"""Independent random streams by name: the same seed gives the same result, whatever else draws numbers.

A stream is addressed by what it is for, not by when it is first used, so two arms of an experiment share
``stream(seed, "init")`` and ``stream(seed, "order")`` even when one of them draws noise in between, and an interrupted
run needs no saved generator state: the stream of epoch 7 is ``stream(seed, "order", 7)``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on ``seed`` and every name, and on nothing else.

    Raises:
        ValueError: If ``seed`` is not a non-negative integer.

    Example:
        >>> derive(0, "init") == derive(0, "init"), derive(0, "init") == derive(0, "order")
        (True, False)
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
    text = "\x1f".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator of its own for each name.

    Example:
        >>> import torch
        >>> a = torch.rand(2, generator=stream(0, "noise", 3))
        >>> bool((a == torch.rand(2, generator=stream(0, "noise", 3))).all())
        True
    """
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


def numpy_stream(seed: int, *names: str | int) -> np.random.Generator:
    """The NumPy generator of the same name (its numbers are not those of :func:`stream`)."""
    import numpy as np

    return np.random.default_rng(derive(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Seeds torch's global generators (CPU and accelerators) inside the block and restores them after it.

    For code that draws from the global generator, as the initialisers of :mod:`torch.nn` and dropout do.

    Example:
        >>> import torch
        >>> with seeded(0, "init"):
        ...     a = torch.nn.Linear(2, 2).weight
        >>> with seeded(0, "init"):
        ...     b = torch.nn.Linear(2, 2).weight
        >>> torch.equal(a, b)
        True
    """
    import torch

    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(derive(seed, *names))
        yield


def random_state() -> tuple[torch.Tensor, ...]:
    """Where torch's global generators are: that of the CPU, then those of the accelerators in use."""
    import torch

    accelerators = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return (torch.get_rng_state(), *accelerators)


@contextmanager
def replayed(state: tuple[torch.Tensor, ...]) -> Iterator[None]:
    """Lets torch's global generators draw again what they drew from ``state`` on; after the block they go on.

    Example:
        >>> import torch
        >>> state = random_state()
        >>> first = torch.rand(2)
        >>> with replayed(state):
        ...     again = torch.rand(2)
        >>> torch.equal(first, again), torch.equal(first, torch.rand(2))
        (True, False)
    """
    now = random_state()
    try:
        _go_to(state)
        yield
    finally:
        _go_to(now)


def _go_to(state: tuple[torch.Tensor, ...]) -> None:
    import torch

    torch.set_rng_state(state[0])
    for device, own in enumerate(state[1:]):
        torch.cuda.set_rng_state(own, device)
