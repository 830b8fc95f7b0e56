"""RMSProp as TensorFlow computes it, with which MnasNet and its descendants are trained.

Tieleman and Hinton, "Lecture 6.5: rmsprop", Coursera, 2012; the recipe of Stamoulis et al., "Single-Path NAS", 2019,
arXiv:1904.02877.

    v <- alpha v + (1 - alpha) g^2,   v_0 = 1
    m <- momentum m + lr g / sqrt(v + eps),   w <- w - m

:class:`torch.optim.RMSprop` begins with v_0 = 0, adds eps to the root and multiplies by lr after the momentum; with the
recipe's eps of 1e-3 these are other step lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp with epsilon inside the root, mean squares that begin at 1, and the learning rate inside the momentum.

    Args:
        params: Parameters or groups of them.
        lr: Learning rate, > 0.
        alpha: Decay of the mean squares, in [0, 1).
        eps: Inside the root, >= 0.
        weight_decay: L2 penalty, >= 0.
        momentum: In [0, 1).

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = RMSpropTF([w], lr=0.1, momentum=0.0)
        >>> w.grad = torch.tensor([2.0])
        >>> optimizer.step()
        >>> round(w.item(), 4)    # 1 - 0.1 * 2 / sqrt(0.9 + 0.1 * 4 + 0.001)
        0.8247
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.064,
        alpha: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr must be > 0, got {lr}")
        for name, value in (("alpha", alpha), ("momentum", momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {value}")
        for name, value in (("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        defaults = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)

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
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"square_avg": torch.ones_like(p), "momentum_buffer": torch.zeros_like(p)}
            squares, buffers = ([self.state[p][name] for p in params] for name in ("square_avg", "momentum_buffer"))
            grads: Any = [p.grad for p in params]
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_mul_(squares, group["alpha"])
            torch._foreach_addcmul_(squares, grads, grads, value=1 - group["alpha"])
            roots: tuple[Tensor, ...] = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_addcdiv_(buffers, grads, roots, value=group["lr"])
            torch._foreach_sub_(params, buffers)
        return loss
