"""SplitSGD: the coordinates with the largest momentum take steps of one length, all others plain SGD's.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163, which uses it to ask what of Adam helps against opposing signals. As read here:

    m <- momentum m + (1 - momentum) g,   tau = the q-quantile of |m| over all parameters
    p <- p - lr_large sign(m)  where |m| > tau,   p <- p - lr m  elsewhere
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from netwright.checks import number


class SplitSGD(torch.optim.Optimizer):
    """SGD with dampened momentum, but for the largest coordinates, which take steps of a fixed length.

    Schedules that change a group's ``lr`` change the length of its large steps by the same factor; its ``lr_large`` is
    that length at the ``lr`` with which it was added, and may be changed too.

    Args:
        params: Parameters or groups of them, with ``lr``, ``lr_large`` and ``momentum`` of their own where these are
            given; the threshold is one for all groups.
        lr: Learning rate of the small coordinates, > 0.
        lr_large: Length of the step of a large one, > 0.
        momentum: Decay of the mean gradient, in [0, 1); the mean begins at 0.
        quantile: Share of the coordinates that are small, in (0, 1).
        warmup: Steps after which the threshold stays as it is; computed anew in each step when None.

    Raises:
        ValueError: If a value is out of its range, a group's own as well.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = SplitSGD([w], lr=0.1, lr_large=0.01, momentum=0.0, quantile=0.5)
        >>> w.grad = torch.tensor([2.0, -30.0])
        >>> optimizer.step()
        >>> w.detach()      # 1 - 0.1 * 2, and 1 + 0.01
        tensor([0.8000, 1.0100])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        lr_large: float = 1e-3,
        momentum: float = 0.9,
        quantile: float = 0.9,
        *,
        warmup: int | None = None,
    ) -> None:
        _check(lr, lr_large, momentum)
        if not 0 < quantile < 1:
            raise ValueError(f"quantile must lie in (0, 1), got {quantile}")
        if warmup is not None and warmup < 1:
            raise ValueError(f"warmup must be >= 1, got {warmup}")
        self.quantile, self.warmup = quantile, warmup
        super().__init__(params, {"lr": lr, "lr_large": lr_large, "momentum": momentum})
        self.param_groups[0].update(steps=0, threshold=0.0)  # where a state holds them

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters, with rates of their own where they are given.

        Raises:
            ValueError: If one of these is out of its range.
        """
        group = {**self.defaults, **param_group}
        _check(group["lr"], group["lr_large"], group["momentum"])
        super().add_param_group(param_group)
        self.param_groups[-1]["first_lr"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step.

        Args:
            closure: Computes the loss again; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        means: list[list[Tensor]] = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"mean": torch.zeros_like(p)}
            own = [self.state[p]["mean"] for p in params]
            if params:
                torch._foreach_lerp_(own, [p.grad for p in params], 1 - group["momentum"])
            means.append(own)
        if not any(means):
            return loss
        threshold = self._threshold([mean for own in means for mean in own])
        for group, own in zip(self.param_groups, means, strict=True):
            length = group["lr_large"] * (group["lr"] / group["first_lr"])
            params = [p for p in group["params"] if p.grad is not None]
            for p, mean in zip(params, own, strict=True):
                p.sub_(torch.where(mean.abs() > threshold, length * mean.sign(), group["lr"] * mean))
        return loss

    def _threshold(self, means: list[Tensor]) -> float:
        """The smallest size that a share ``quantile`` of all coordinates does not exceed."""
        known = self.param_groups[0]
        if self.warmup is None or known["steps"] < self.warmup:
            sizes = torch.cat([mean.abs().reshape(-1) for mean in means])
            place = min(len(sizes), math.ceil(self.quantile * len(sizes)))
            known["threshold"] = float(sizes.kthvalue(place).values)
        known["steps"] += 1
        return known["threshold"]


def _check(lr: float, lr_large: float, momentum: float) -> None:
    number("lr", lr, "> 0")
    number("lr_large", lr_large, "> 0")
    number("momentum", momentum, "[0, 1)")
