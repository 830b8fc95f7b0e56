"""Loss and gradient of ELR made at once: compiled, in one pass over each row, or by torch's operations.

Without autograd's tape, for the gradient has a closed form.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from importlib import resources
from typing import Any

import torch
from torch import Tensor

LARGEST = 2**18  # logits in a batch; beyond, torch's threads are worth more than its passes cost
FLAGS = ("-fopenmp-simd", "-fno-trapping-math")  # comparisons that may trap would not be vectorised
FINE = 0


@functools.cache
def _compiled() -> Callable[..., int] | None:
    """The function, compiled at first use; None without a compiler."""
    from netwright.deploy.native.build import BuildError, build
    from netwright.deploy.native.machine import this_machine

    text = resources.files("netwright.train").joinpath("early_learning_step.c.in").read_text()
    machine = this_machine()
    try:
        function = build(text, flags=FLAGS, facts=(machine.cpu, machine.flags)).elr_step
    except BuildError:
        return None
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 3 + [ctypes.c_float] * 3
    function.restype = ctypes.c_int
    return function


def elr_step(
    logits: Tensor,
    labels: Tensor | None,
    index: Tensor,
    memory: Tensor,
    seen: Tensor,
    beta: float,
    lam: float,
    clamp: float,
) -> tuple[Tensor, Tensor] | None:
    """Moves the averages of a batch; the loss, and its gradient for the logits.

    Args:
        logits: (batch, classes).
        labels: Classes, or None for the pull without cross-entropy.
        index: Of the examples.
        memory: (examples, classes), which is written.
        seen: (examples,), which is written.
        beta: Share of the average that is kept.
        lam: Weight of the pull.
        clamp: Probabilities are kept this far from 0 and 1.

    Returns:
        None where torch has to do it, and nothing is written then: without a compiler, for another type, device or
        layout, for large batches, and where something is wrong with what was given.
    """
    function = _compiled() if 0 < logits.numel() <= LARGEST else None
    ids = index if labels is None else labels
    if function is None or index.ndim != 1 or any(
        type(each) is not Tensor or each.device.type != "cpu" or each.dtype != dtype or not each.is_contiguous()
        for each, dtype in ((logits, torch.float32), (memory, torch.float32), (index, torch.int64), (ids, torch.int64))
    ):  # fmt: skip
        return None
    value, gradient = logits.new_empty(()), torch.empty_like(logits)
    found = function(
        logits.data_ptr(), None if labels is None else labels.data_ptr(), index.data_ptr(), memory.data_ptr(),
        seen.data_ptr(), gradient.data_ptr(), value.data_ptr(), len(logits), logits.shape[1], len(memory), beta, lam,
        clamp,
    )  # fmt: skip
    return (value, gradient) if found == FINE else None


class KnownGradient(torch.autograd.Function):
    """A value whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
        """The first of value and gradient, which come as one so that autograd does not look at them."""
        value, slope = known
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Its gradient for the logits."""
        (slope,) = ctx.saved_tensors
        return slope * grad, None


def agreement(
    probs: Tensor, clamped: Tensor, target: Tensor, clamp: float, scale: float
) -> tuple[Tensor, Callable[[], Tensor]]:
    """scale mean log(1 - <t, p>) of clamped p, and what makes its gradient for log p, once."""
    product = clamped * target
    agreed = product.sum(1, keepdim=True)

    def slope() -> Tensor:
        # A probability that was clamped has no gradient.
        inside = torch.ops.aten.hardtanh_backward(product, probs, clamp, 1 - clamp)
        return inside.mul_((1 - agreed).reciprocal_().mul_(-scale / len(probs)))

    return agreed.neg().log1p_().sum().mul_(scale / len(probs)), slope


def through_softmax(slope: Tensor, log_probs: Tensor) -> Tensor:
    """The gradient for logits that belongs to one for their log-probabilities."""
    return torch.ops.aten._log_softmax_backward_data(slope, log_probs, 1, log_probs.dtype)
