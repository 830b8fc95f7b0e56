"""TrAct's gradient of a weight: a ridge regression over the rows that the layer reads (arXiv:2410.23970).

grad W = G^T x (x^T x / b + lambda I)^-1 = G^T (x x^T / b + lambda I)^-1 x
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from netwright.console import warn
from netwright.nn.patches import Patches

Form = Literal["auto", "primal", "dual"]

_warned: set[str] = set()


def check_lambda(lambda_: float) -> float:
    """Lambda as a float, which must be positive."""
    if not 0 < lambda_ < math.inf:
        raise ValueError(f"lambda_ must be > 0 and finite, got {lambda_}")
    return float(lambda_)


def tract_gradient(
    x: Float[Tensor, "batch inputs"],
    grad_z: Float[Tensor, "batch outputs"],
    lambda_: float = 0.1,
    form: Form = "auto",
) -> Float[Tensor, "outputs inputs"]:
    """TrAct's gradient of the weight of a linear layer, from its inputs and the gradients of its outputs.

    Args:
        x: Inputs, standardised.
        grad_z: Gradients of the pre-activations, as autograd delivers them.
        lambda_: Strength of the ridge, > 0.
        form: ``"primal"`` solves with an (inputs, inputs) matrix, ``"dual"`` with a (batch, batch) one, ``"auto"``
            with the smaller.

    Raises:
        ValueError: If ``lambda_`` is not positive, the form is unknown, or shapes disagree.

    Example:
        >>> x, grad = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[0.5], [-1.0]])
        >>> tract_gradient(x, grad)
        tensor([[-0.4228,  0.6879]])
    """
    check_lambda(lambda_)
    if form not in ("auto", "primal", "dual"):
        raise ValueError(f"form must be 'auto', 'primal' or 'dual', got {form!r}")
    if x.ndim != 2 or grad_z.ndim != 2 or len(x) != len(grad_z):
        raise ValueError(f"x and grad_z must be (batch, ...) of one batch, got {tuple(x.shape)}, {tuple(grad_z.shape)}")
    batch, inputs = x.shape
    if form == "primal" or (form == "auto" and batch >= inputs):
        return _solved(x.T @ x / batch, (x.T @ grad_z)[None], lambda_)[0][0].T
    return grad_z.T @ _solved(x @ x.T / batch, x[None], lambda_)[0][0]


def _solved(gram: Tensor, right: Tensor, lambda_: float) -> tuple[Tensor, Tensor]:
    """(gram + lambda I)^-1 right for each group, and whether the factorisation failed."""
    gram = gram[None] if gram.ndim == 2 else gram
    ridge = lambda_ * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge)
    return torch.cholesky_solve(right, factor), failed != 0


class Precondition(torch.autograd.Function):
    """The weight itself; its gradient is multiplied by (x^T x / b + lambda I)^-1 on the way back."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, lambda_: float, sync: bool, patches: Patches) -> Tensor:
        """The weight; ``x`` is the input that the layer reads with ``patches``."""
        ctx.save_for_backward(x)
        ctx.lambda_, ctx.sync, ctx.patches = lambda_, sync, patches
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The changed gradient of the weight."""
        (grad,) = grads
        (x,) = ctx.saved_tensors
        if grad.requires_grad:
            raise NotImplementedError("TrAct has no second derivative: its gradient is not that of a function")
        with torch.autocast(x.device.type, enabled=False):
            changed = _preconditioned(grad, x, ctx.lambda_, ctx.sync, ctx.patches)
        return changed.to(grad.dtype), None, None, None, None


def _preconditioned(grad: Tensor, x: Tensor, lambda_: float, sync: bool, patches: Patches) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    plain = grad.to(wide).reshape(patches.groups, grad.shape[0] // patches.groups, -1)
    inputs, gram, rows, kept = plain.shape[-1], None, 0, []
    for piece in patches.of(x):
        a = piece.to(wide)
        rows += a.shape[-1]
        kept.append(a)
        if rows >= inputs or sync:
            # No dual form any more: what was kept goes into the Gram matrix, and nothing is kept.
            for each in kept:
                gram = each @ each.mT if gram is None else gram.baddbmm_(each, each.mT)
            kept = []
    if gram is not None:
        if sync and torch.distributed.is_available() and torch.distributed.is_initialized():
            plain = plain.clone(memory_format=torch.contiguous_format)  # may be a view of autograd's own tensor
            rows = _reduced(gram, plain, rows)
        right, failed = _solved(gram / rows, plain.mT, lambda_)
        found = right.mT
    else:
        a = torch.cat(kept, 2)
        inner, failed = _solved(a.mT @ a / rows, a.mT, lambda_)
        found = (plain - plain @ a @ inner / rows) / lambda_
        # What cancels in the difference above is made good by one step of refinement.
        rest = plain - lambda_ * found - found @ a @ a.mT / rows
        found = found + (rest - rest @ a @ inner / rows) / lambda_
    return _sound(found, plain, failed).reshape(grad.shape)


def _reduced(gram: Tensor, plain: Tensor, rows: int) -> int:
    """Sums the Gram matrices of all ranks and averages their gradients, in place; the rows of all."""
    count = torch.tensor([rows], dtype=torch.float64, device=gram.device)
    for value in (gram, plain, count):
        torch.distributed.all_reduce(value)
    plain /= torch.distributed.get_world_size()
    return int(count)


def _sound(found: Tensor, plain: Tensor, failed: Tensor) -> Tensor:
    """The plain gradient of a group whose factorisation failed: its inputs were not finite."""
    if torch.compiler.is_compiling():
        return torch.where(failed[:, None, None], plain, found)
    if not bool(failed.any()):
        return found
    if torch.is_anomaly_enabled():
        raise FloatingPointError("the inputs of a TrAct layer must be finite, got NaN or infinity")
    if "factor" not in _warned:
        _warned.add("factor")
        warn("the inputs of a TrAct layer were not finite; it trains with the plain gradient where that happens")
    return torch.where(failed[:, None, None], plain, found)
