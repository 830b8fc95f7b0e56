"""Parameter groups of their own for parameters that a method trains otherwise than the rest of a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

# What optimisers keep in a group, and schedulers in a list with one entry a group: learning rates, and the rest.
_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
_OTHERS = ("lr_lambdas", "base_momentums", "max_momentums")


def separate_(
    optimizer: torch.optim.Optimizer,
    params: Iterable[Tensor],
    *,
    rate: float = 1.0,
    schedulers: Iterable[Any] = (),
    **changes: Any,
) -> None:
    """Gives some parameters of an optimiser groups of their own, in place.

    A new group is like the one that its parameters were in but for its learning rate and ``changes``. What the
    optimiser keeps of a parameter, its momentum say, stays. Call it before the optimiser's state is read back.

    Args:
        optimizer: Any optimiser.
        params: Parameters; those that the optimiser does not hold are passed over.
        rate: Factor of the learning rate, > 0.
        schedulers: Of the optimiser, made already; they go on with the new groups.
        changes: Settings of the new groups, ``weight_decay=0.0`` say.

    Raises:
        ValueError: If ``rate`` is not positive.

    Example:
        >>> weight, bias = torch.zeros(2, 2, requires_grad=True), torch.zeros(2, requires_grad=True)
        >>> optimizer = torch.optim.SGD([weight, bias], lr=0.1, weight_decay=1e-3)
        >>> separate_(optimizer, [bias], rate=0.5, weight_decay=0.0)
        >>> [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        [(0.1, 0.001), (0.05, 0.0)]
    """
    if not rate > 0:
        raise ValueError(f"rate must be > 0, got {rate}")
    wanted = {id(param) for param in params}
    known = list(_each(schedulers))
    for place, group in enumerate(list(optimizer.param_groups)):
        inside = [id(param) in wanted for param in group["params"]]
        if not any(inside):
            continue
        held: dict[str, list[Any]] = {name: group[name] for name in ("params", "param_names") if name in group}
        chosen = {name: list(itertools.compress(values, inside)) for name, values in held.items()}
        for name, values in held.items():
            group[name] = list(itertools.compress(values, (not own for own in inside)))
        rates = {name: group[name] * rate for name in _GROUP_RATES if group.get(name) is not None}
        new = {name: value for name, value in group.items() if name not in held} | rates | changes
        named = list(zip(chosen["param_names"], chosen["params"], strict=True)) if "param_names" in chosen else None
        optimizer.add_param_group({**new, "params": named or chosen["params"]})
        for scheduler in known:
            for name in itertools.chain(_RATES, _OTHERS):
                entries = getattr(scheduler, name, None)
                if isinstance(entries, list):
                    entries.append(entries[place] * rate if name in _RATES else entries[place])


def _each(schedulers: Iterable[Any]) -> Iterable[Any]:
    """Schedulers and those within them, of a sequence say."""
    for scheduler in schedulers:
        yield scheduler
        if isinstance(scheduler, LRScheduler):
            yield from _each(getattr(scheduler, "_schedulers", ()))
