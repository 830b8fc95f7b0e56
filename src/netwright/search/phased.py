"""A step in phases: within an epoch all weight steps come first, then all steps of the architecture.

Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search", CVPR 2019,
arXiv:1812.03443, section 3.3. Other searches alternate after every batch.

    for (x, y) in train:       w     <- w - lr grad_w L(w, theta; x, y)
    for (x, y) in validation:  theta <- Adam(theta, grad_theta L(w, theta; x, y))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from netwright.search.bilevel import FirstOrder


class Phased(FirstOrder):
    """Updates the weights on a training batch, or the architecture on a validation batch, whichever is given.

    :class:`netwright.search.pairs.Pairs` hands it the batches of one phase after those of the other. A warm-up is a
    stage with ``alpha_step=False``.

    Attributes:
        phased: Tells how batches are to be paired.

    Example:
        >>> a, w = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(-2.0))
        >>> def objective(supernet, batch, part):
        ...     return (w - a) ** 2
        >>> w_opt, a_opt = torch.optim.SGD([w], lr=0.5), torch.optim.SGD([a], lr=0.5)
        >>> _ = Phased().step(nn.Module(), objective, w_opt, a_opt, "a batch", None, clip=None)
        >>> a.item(), w.item()
        (2.0, 2.0)
    """

    phased = True

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
        """One step of the phase whose batch is given; the parameters of the other stay the same to the bit.

        Args:
            supernet, objective, w_opt, a_opt, clip: As for :class:`~netwright.search.bilevel.FirstOrder`.
            train_batch, val_batch: A batch and None.

        Raises:
            ValueError: If both batches are given, or none.
        """
        if (train_batch is None) == (val_batch is None):
            both = "both" if train_batch is not None else "none"
            raise ValueError(f"one of train_batch and val_batch must be given in a step of phases, got {both}")
        return super().step(
            supernet,
            objective,
            None if train_batch is None else w_opt,
            None if val_batch is None else a_opt,
            train_batch,
            val_batch,
            clip=clip,
        )
