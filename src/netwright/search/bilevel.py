"""One step of bilevel optimisation: architecture parameters on validation data, then weights on training data.

Liu et al., "DARTS: Differentiable Architecture Search", ICLR 2019, arXiv:1806.09055.

    min_a L_val(w*(a), a)   subject to   w*(a) = argmin_w L_train(w, a)

    first order:    g_a = grad_a L_val(w, a)
    second order:   w' = w - xi (mu buf + grad_w L_train(w, a) + wd w),     v = grad_w' L_val(w', a)
                    g_a = grad_a L_val(w', a) - xi (grad_a L_train(w + eps v, a) - grad_a L_train(w - eps v, a)) / 2 eps

A step is an object with ``step(supernet, objective, w_opt, a_opt, train_batch, val_batch, *, clip)``. The weights are
the parameters of ``w_opt`` that require a gradient at that moment, so a method of several stages only has to freeze and
free parameters. Gradients come from :func:`torch.autograd.grad`, never from ``backward``, so no parameter receives a
gradient that was not asked for, and are averaged over the processes by one flat all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from netwright.checks import number
from netwright.nn.batchnorm import frozen_statistics
from netwright.seeding import random_state, replayed

Gradients = list[Tensor | None]


class Step(Protocol):
    """What a searcher calls for every pair of batches.

    A step with memory (a second set of weights, say) also has ``state_dict`` and ``load_state_dict``, of plain values
    and tensors.
    """

    def step(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        a_opt: torch.optim.Optimizer | None,
        train_batch: Any,
        val_batch: Any,
        *,
        clip: float | None = 5.0,
    ) -> dict[str, float]:
        """Updates architecture parameters and weights once and returns the figures of the step."""
        ...


def trained(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimiser that require a gradient now, in its order.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = layer.bias.requires_grad_(False)
        >>> [tuple(p.shape) for p in trained(torch.optim.SGD(layer.parameters(), lr=0.1))]
        [(1, 2)]
    """
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Gradients:
    """Gradients of a scalar; ``None`` for a parameter it does not depend on."""
    return list(torch.autograd.grad(loss, list(parameters), allow_unused=True))


def average(
    grads: Gradients, losses: Sequence[Tensor] = (), *, like: Sequence[Tensor]
) -> tuple[Gradients, list[float]]:
    """Means over all processes of gradients and losses by one flat all-reduce; without processes, the same values.

    A gradient that is ``None`` on some processes counts as zero there; one that is ``None`` on all stays ``None``.

    Args:
        grads: Gradients of this process.
        losses: Scalars of this process.
        like: One tensor for each gradient, for the shape and place of the missing ones.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return grads, [float(loss.detach()) for loss in losses]
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, like, strict=True)]
    known = torch.tensor([g is not None for g in grads], dtype=filled[0].dtype, device=filled[0].device)
    scalars = [loss.detach().reshape(1).to(filled[0]) for loss in losses]
    flat = torch.cat([*(g.reshape(-1) for g in filled), *scalars, known])
    torch.distributed.all_reduce(flat)
    flat /= torch.distributed.get_world_size()
    parts = flat.split([*(g.numel() for g in filled), *(1 for _ in losses), len(grads)])
    present = parts[-1].tolist()
    means = [
        part.reshape(g.shape).to(g.dtype) if there else None
        for part, g, there in zip(parts, filled, present, strict=False)
    ]
    return means, [float(part) for part in parts[len(grads) : -1]]


def finite(value: float, name: str) -> float:
    """The value itself.

    Raises:
        FloatingPointError: If it is infinite or no number.
    """
    if not -float("inf") < value < float("inf"):
        raise FloatingPointError(f"{name} must be finite, got {value}; a smaller learning rate may help")
    return value


def check_disjoint(
    w_opt: torch.optim.Optimizer | None, a_opt: torch.optim.Optimizer | None, supernet: nn.Module
) -> None:
    """Refuses an optimiser of the weights that holds an architecture parameter.

    Raises:
        ValueError: If it does.
    """
    if w_opt is None:
        return
    architecture = {id(p) for group in a_opt.param_groups for p in group["params"]} if a_opt is not None else set()
    if callable(named := getattr(supernet, "arch_parameters", None)):
        architecture |= {id(p) for p in named()}
    if any(id(p) in architecture for group in w_opt.param_groups for p in group["params"]):
        raise ValueError("w_opt must hold no architecture parameter, got one that belongs to the architecture")


class FirstOrder:
    """Alternates a step of the architecture at the present weights with a step of the weights.

    Example:
        >>> a, w = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-2.0))
        >>> def objective(supernet, batch, part):
        ...     return a * w - 2 * a + 1 if part == "alpha" else (w - a) ** 2
        >>> w_opt, a_opt = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([a], lr=0.1)
        >>> for _ in range(300):
        ...     figures = FirstOrder().step(nn.Module(), objective, w_opt, a_opt, None, None, clip=None)
        >>> round(a.item(), 4), round(w.item(), 4)    # first order misses the solution (1, 1)
        (2.0, 2.0)

    Attributes:
        needs_val: Tells that a step of the architecture needs a validation batch.
    """

    needs_val = True

    def step(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        a_opt: torch.optim.Optimizer | None,
        train_batch: Any,
        val_batch: Any,
        *,
        clip: float | None = 5.0,
    ) -> dict[str, float]:
        """One step; returns ``val_loss``, ``train_loss``, ``alpha_grad_norm`` and ``weight_grad_norm``.

        Args:
            supernet: Any module; its normalisation statistics follow the training batches only.
            objective: ``objective(supernet, batch, part=...)`` -> scalar, where ``part`` is ``"alpha"`` for the
                validation loss and ``"weights"`` for the training loss.
            w_opt: Optimiser of the weights, or ``None`` to leave them.
            a_opt: Optimiser of the architecture parameters, or ``None`` to leave them.
            train_batch, val_batch: What the objective takes; the validation batch should be a fresh one.
            clip: Largest global norm of the weights' gradient; ``None`` clips nothing.

        Raises:
            ValueError: If ``w_opt`` holds an architecture parameter, or the validation loss depends on none of
                ``a_opt``.
            FloatingPointError: If a loss is not finite; what was to be updated is then unchanged. A gradient that is
                not finite while the loss is makes no update; ``weight_skipped`` or ``alpha_skipped`` is then 1.
        """
        check_disjoint(w_opt, a_opt, supernet)
        figures: dict[str, float] = {}
        if a_opt is not None:
            alphas = trained(a_opt)
            grads, loss = self.architecture_gradient(supernet, objective, w_opt, alphas, train_batch, val_batch)
            check_dependent(grads, "the validation loss")
            figures["val_loss"] = finite(loss, "validation loss")
            figures |= move_architecture(a_opt, alphas, grads)
        if w_opt is not None:
            weights = trained(w_opt)
            local = objective(supernet, train_batch, part="weights")
            grads, (loss,) = average(gradients(local, weights), [local], like=weights)
            figures["train_loss"] = finite(loss, "training loss")
            figures |= apply_gradients(w_opt, weights, grads, clip, "weight")
        return figures

    def architecture_gradient(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        alphas: Sequence[nn.Parameter],
        train_batch: Any,
        val_batch: Any,
    ) -> tuple[Gradients, float]:
        """The gradient for each of ``alphas``, averaged over processes, and the validation loss.

        Weights and running statistics are the same afterwards, to the bit.
        """
        with frozen_statistics(supernet):
            return self._gradient(supernet, objective, w_opt, alphas, train_batch, val_batch)

    def _gradient(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        alphas: Sequence[nn.Parameter],
        train_batch: Any,
        val_batch: Any,
    ) -> tuple[Gradients, float]:
        loss = objective(supernet, val_batch, part="alpha")
        grads, (mean,) = average(gradients(loss, alphas), [loss], like=alphas)
        return grads, mean


def apply_gradients(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], grads: Gradients, clip: float | None, name: str
) -> dict[str, float]:
    """One step of an optimiser with the gradients given, which are clipped in place to a global norm of ``clip``.

    Returns:
        ``{name}_grad_norm``, before clipping, and ``{name}_skipped``: 1 where a gradient was not finite and no update
        was made, else 0.
    """
    present = [g for g in grads if g is not None]
    norm = float(global_norm(present))
    if math.isinf(norm) and math.isfinite(largest := max(float(g.abs().max()) for g in present)):
        # Squares overflow long before entries do: such a gradient is large, not broken.
        norm = largest * float(global_norm(torch._foreach_div(present, largest)))
    if not math.isfinite(norm):
        # Under heavy masks a chain of batch norms over nearly dead channels can overflow in the backward pass while the
        # loss is sound. As in training with half precision, that step is left out; the searcher counts them.
        return {f"{name}_skipped": 1.0}
    if clip is not None and norm > clip:
        torch._foreach_mul_(present, clip / norm)
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {f"{name}_grad_norm": norm, f"{name}_skipped": 0.0}


def check_dependent(grads: Gradients, loss: str) -> None:
    """Refuses a loss that depends on no architecture parameter.

    Raises:
        ValueError: If there is no gradient.
    """
    if all(g is None for g in grads):
        raise ValueError(f"{loss} must depend on the architecture parameters, got no gradient")


def move_architecture(
    a_opt: torch.optim.Optimizer, alphas: Sequence[nn.Parameter], grads: Gradients
) -> dict[str, float]:
    """One step of the architecture's optimiser; returns the figures of :func:`apply_gradients`.

    Raises:
        FloatingPointError: If an architecture parameter is no longer finite.
    """
    figures = apply_gradients(a_opt, alphas, grads, None, "alpha")
    finite(float(global_norm([a.detach() for a in alphas])), "the norm of the architecture parameters")
    return figures


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries of all tensors together.

    Example:
        >>> global_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
        tensor(5.)
    """
    if not tensors:
        return torch.zeros(())
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(tensors))))


class SecondOrder(FirstOrder):
    """As :class:`FirstOrder`, but the architecture sees the weights one training step ahead.

    The mixed second derivative is taken as a central difference along ``v``, at a distance of ``eps / ||v||``. The
    weights are saved and copied back, so they are restored to the bit. The inner step is that of SGD with momentum and
    weight decay, whatever the weight optimiser is. What gates and layers draw at random from torch's generators is the
    same in the three passes of the training batch, so that their difference is one of the weights alone.

    Args:
        xi: Length of the inner step; ``None`` takes the present learning rate of each parameter group.
        eps: Distance of the two probes, before division by the norm of ``v``.

    Raises:
        ValueError: If ``xi`` is negative or ``eps`` is not positive; in :meth:`step` if a choice's gradients are
            estimates beside the loss, so that their difference is no derivative.

    Example:
        >>> a, w = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-2.0))
        >>> def objective(supernet, batch, part):
        ...     return a * w - 2 * a + 1 if part == "alpha" else (w - a) ** 2
        >>> w_opt, a_opt = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([a], lr=0.1)
        >>> for _ in range(300):
        ...     figures = SecondOrder(xi=0.5).step(nn.Module(), objective, w_opt, a_opt, None, None, clip=None)
        >>> round(a.item(), 4), round(w.item(), 4)
        (1.0, 1.0)
    """

    def __init__(self, xi: float | None = None, eps: float = 1e-2):
        if xi is not None:
            number("xi", xi, ">= 0")
        number("eps", eps, "> 0")
        self.xi, self.eps = xi, eps

    def _gradient(
        self,
        supernet: nn.Module,
        objective: Any,
        w_opt: torch.optim.Optimizer | None,
        alphas: Sequence[nn.Parameter],
        train_batch: Any,
        val_batch: Any,
    ) -> tuple[Gradients, float]:
        if w_opt is None:
            return super()._gradient(supernet, objective, w_opt, alphas, train_batch, val_batch)
        check_derivatives(supernet, "second order", "use FirstOrder")
        weights, state = trained(w_opt), random_state()
        lengths, direction = self._inner_step(w_opt, weights, objective(supernet, train_batch, part="weights"))
        saved = [p.detach().clone() for p in weights]
        try:
            assign(weights, torch._foreach_sub(saved, torch._foreach_mul(direction, lengths)))
            loss = objective(supernet, val_batch, part="alpha")
            both = [*alphas, *weights]
            grads, (mean,) = average(gradients(loss, both), [loss], like=both)
            ahead = [
                torch.zeros_like(p) if g is None else g for g, p in zip(grads[len(alphas) :], weights, strict=True)
            ]
            # With one xi for all weights xi v / ||xi v|| is v / ||v||: the same probes, and lengths per group besides.
            ahead = list(torch._foreach_mul(ahead, lengths))
            norm = finite(float(global_norm(ahead)), "gradient norm one step ahead")
            if norm == 0.0:
                return grads[: len(alphas)], mean
            probe = torch._foreach_mul(ahead, self.eps / norm)
            assign(weights, torch._foreach_add(saved, probe))
            with replayed(state):
                above = gradients(objective(supernet, train_batch, part="weights"), alphas)
            assign(weights, torch._foreach_sub(saved, probe))
            with replayed(state):
                below = gradients(objective(supernet, train_batch, part="weights"), alphas)
        finally:
            assign(weights, saved)
        mixed, _ = average([_minus(up, down) for up, down in zip(above, below, strict=True)], like=alphas)
        scale = norm / (2 * self.eps)
        return [
            _minus(g, None if m is None else m * scale) for g, m in zip(grads[: len(alphas)], mixed, strict=True)
        ], mean

    def _inner_step(
        self, w_opt: torch.optim.Optimizer, weights: list[nn.Parameter], loss: Tensor
    ) -> tuple[list[float], list[Tensor]]:
        """Length and direction of the step that the weight optimiser is about to make, for each weight."""
        grads, _ = average(gradients(loss, weights), like=weights)
        known = {id(p): g for p, g in zip(weights, grads, strict=True)}
        lengths, direction = [], []
        for group in w_opt.param_groups:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                grad = known[id(parameter)]
                lengths.append(float(group["lr"] if self.xi is None else self.xi))
                if grad is None:  # the optimiser will leave this weight, so the look ahead does too
                    direction.append(torch.zeros_like(parameter))
                    continue
                move = grad.add(parameter.detach(), alpha=group.get("weight_decay", 0.0))
                buffer = w_opt.state.get(parameter, {}).get("momentum_buffer")
                direction.append(move if buffer is None else move.add(buffer, alpha=group["momentum"]))
        return lengths, direction


def check_derivatives(supernet: nn.Module, what: str, instead: str) -> None:
    """Refuses a supernet that gives the architecture estimates in place of the derivatives of its loss.

    Raises:
        ValueError: If the gate of a choice, or the choice itself where it has none, says so by ``second_order``.
    """
    for name, choice in getattr(supernet, "named_choices", tuple)():
        rule = getattr(choice, "gate", choice)
        if not getattr(rule, "second_order", True):
            raise ValueError(
                f"{what} must have derivatives of the loss in the architecture, got {type(rule).__name__} on {name}: "
                f"the loss of its passes goes in steps, and its gradients are estimates beside it; {instead}"
            )


def _minus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if b is None:
        return a
    return -b if a is None else a - b


def assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies values into parameters, outside of autograd."""
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), list(values))
