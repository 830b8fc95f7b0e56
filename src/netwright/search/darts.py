"""DARTS: architecture search by gradient descent on a continuous relaxation.

Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, arXiv:1806.09055.

    y = sum_i softmax(alpha)_i o_i(x)
    min_alpha L_val(w*(alpha), alpha)  with  w*(alpha) = argmin_w L_train(w, alpha)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch

from netwright.search.bilevel import FirstOrder, SecondOrder
from netwright.search.searcher import Searcher, Stage

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.objective import Objective
    from netwright.search.protocol import Searchable
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet


class DARTS(Searcher):
    """The original search: one stage, magnitude selection; the defaults are those of the paper.

    Args:
        supernet: The network with the choices.
        order: 1 updates the architecture at the present weights, 2 one training step ahead (four times the passes).
        objective: Loss of both parts; cross-entropy by default.
        selector: How the genotype is read off at the end; the space's own rule by default.
        epochs: Epochs of the search.
        lr, lr_min: Learning rate of the weights at the start and at the end of a cosine.
        weight_decay: Weight decay of the weights.
        wait: Share of the search, in [0, 1), for which the architecture waits first.
        fixed_alpha: Whether every alpha is set to zero and stays so: operations are mixed alike, only weights are
            trained. The search then says nothing by its alphas, so the selector must be one that measures
            (:class:`~netwright.search.perturbation.PerturbationSelector`: the blank-pt of arXiv:2108.04392).
        **options: ``momentum``, ``clip``, ``alpha_lr``, ``alpha_betas``, ``alpha_weight_decay`` of :class:`Searcher`.

    Raises:
        ValueError: If ``order`` is neither 1 nor 2, or 2 with fixed alphas, or another value is out of range.

    Example:
        >>> import torch
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> result = DARTS(supernet, epochs=1).search([batch], [batch], seed=0)
        >>> result.genotype.space, len(result.alpha_history)
        ('micro-darts-2-shared', 2)
    """

    settled: ClassVar[Mapping[str, str]] = {
        "method": "the step is the method itself; Searcher takes any",
        "stages": "Searcher takes any",
    }

    def __init__(
        self,
        supernet: Supernet | Searchable,
        order: Literal[1, 2] = 1,
        objective: Objective | None = None,
        selector: Selector | None = None,
        *,
        epochs: int = 50,
        lr: float = 0.025,
        lr_min: float = 0.001,
        weight_decay: float = 3e-4,
        wait: float = 0.0,
        fixed_alpha: bool = False,
        **options: Any,
    ):
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order!r}")
        if fixed_alpha and order == 2:
            raise ValueError("order must be 1 with fixed_alpha, where the architecture makes no step, got 2")
        super().__init__(
            supernet,
            objective=objective,
            selector=selector,
            method=FirstOrder() if order == 1 else SecondOrder(),
            stages=[Stage("search", epochs, lr, lr_min, weight_decay, alpha_step=not fixed_alpha, wait=wait)],
            **options,
        )
        self.order = order
        if fixed_alpha:
            with torch.no_grad():
                torch._foreach_zero_(list(supernet.arch_parameters()))

    @classmethod
    def short(cls, supernet: Supernet, brief: Brief) -> Self:
        """With the settings of a short search."""
        return cls(
            supernet,
            objective=brief.objective,
            selector=brief.selector,
            epochs=sum(brief.epochs),
            lr=brief.lr,
            alpha_lr=brief.alpha_lr,
            wait=brief.wait,
        )
