"""One step of single-level optimisation: weights and architecture descend together on one loss.

The plainest alternative to the bilevel problem of DARTS, and what RARTS (Xue et al., 2022, arXiv:2008.03901) tends to
when its two sets of weights are tied without slack:

    min over w, a of  (L_train(w, a) + L_val(w, a)) / 2
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from netwright.search.bilevel import (
    apply_gradients,
    average,
    check_dependent,
    check_disjoint,
    finite,
    gradients,
    move_architecture,
    trained,
)


class SingleLevel:
    """Updates weights and architecture from the same gradients, on all data: the training and the validation batch.

    Example:
        >>> a, w = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(-2.0))
        >>> def objective(supernet, batch, part):
        ...     return (a - batch) ** 2 + (w - batch) ** 2
        >>> w_opt, a_opt = torch.optim.SGD([w], lr=0.1), torch.optim.SGD([a], lr=0.1)
        >>> for _ in range(200):
        ...     figures = SingleLevel().step(nn.Module(), objective, w_opt, a_opt, 0.0, 1.0, clip=None)
        >>> round(a.item(), 4), round(w.item(), 4)
        (0.5, 0.5)
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
        """One step; returns ``train_loss``, ``val_loss`` and the norms of the gradients.

        Args:
            supernet: Any module.
            objective: ``objective(supernet, batch, part="both")`` -> scalar.
            w_opt: Optimiser of the weights, or ``None`` to leave them.
            a_opt: Optimiser of the architecture parameters, or ``None`` to leave them.
            train_batch, val_batch: What the objective takes; without a validation batch the training batch is all data.
            clip: Largest global norm of the weights' gradient; ``None`` clips nothing.

        Raises:
            ValueError: If ``w_opt`` holds an architecture parameter, or the loss depends on none of ``a_opt``.
            FloatingPointError: If a loss is not finite; nothing is updated then.
        """
        check_disjoint(w_opt, a_opt, supernet)
        weights = trained(w_opt) if w_opt is not None else []
        alphas = trained(a_opt) if a_opt is not None else []
        batches = [train_batch] if val_batch is None else [train_batch, val_batch]
        losses = [objective(supernet, batch, part="both") for batch in batches]
        both = [*weights, *alphas]
        grads, values = average(gradients(sum(losses) / len(losses), both), losses, like=both)
        figures = {"train_loss": finite(values[0], "training loss")}
        if len(values) == 2:
            figures["val_loss"] = finite(values[1], "validation loss")
        if w_opt is not None:
            figures |= apply_gradients(w_opt, weights, grads[: len(weights)], clip, "weight")
        if a_opt is not None:
            check_dependent(grads[len(weights) :], "the loss")
            figures |= move_architecture(a_opt, alphas, grads[len(weights) :])
        return figures
