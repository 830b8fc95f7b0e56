"""RARTS: architecture search on both halves of the data, each with weights of its own, by first derivatives alone.

Xue, Qi and Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", IEEE Access 2022,
arXiv:2008.03901, doi:10.1109/ACCESS.2022.3185095.

    min over y, w, alpha of  L_val(y, alpha) + lambda L_train(w, alpha) + beta/2 ||y - w||^2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from netwright.checks import number
from netwright.search.relaxed_split import RelaxedSplit
from netwright.search.searcher import Searcher, Stage

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.objective import Objective
    from netwright.search.protocol import Searchable
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet


class RARTS(Searcher):
    """DARTS' recipe with :class:`netwright.search.relaxed_split.RelaxedSplit` as its step; both sets are thrown away.

    A step costs two backward passes, as first-order DARTS does (second order: five), and the memory of one more copy
    of weights, gradients and momentum. ``lam`` and ``beta`` are not the paper's, which could not be checked: tune
    ``beta`` on validation data, say between 1e-3 and 1e-1.

    Args:
        supernet: The network with the choices.
        lam: Weight of the training loss against the validation loss, > 0.
        beta: Strength of the tie between the two sets of weights, >= 0.
        objective: Loss of both parts; cross-entropy by default.
        selector: How the genotype is read off at the end; the space's own rule by default.
        epochs: Epochs of the search.
        lr, lr_min: Learning rate of the weights at the start and at the end of a cosine.
        y_lr: Learning rate of the second set at the start, with the same cosine; ``lr`` by default.
        weight_decay: Weight decay of both sets.
        wait: Share of the search, in [0, 1), for which the architecture waits first.
        fused: All gradients at the old point in two passes; else the exact order in four.
        monotone_check: Warn when the objective rises; only where each batch is the whole data.
        **options: ``momentum``, ``clip``, ``alpha_lr``, ``alpha_betas``, ``alpha_weight_decay`` of :class:`Searcher`.

    Raises:
        ValueError: If a value is out of range, or ``beta`` so large that the tie alone makes plain steps diverge:
            lr + y_lr (fused), or the larger of the two (exact), must stay below 2 / beta.

    Example:
        >>> import torch
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> result = RARTS(supernet, epochs=1).search([batch], [batch], seed=0)
        >>> result.genotype.space, result.epochs[0]["gap"]
        ('micro-darts-2-shared', 0.0)
    """

    settled: ClassVar[Mapping[str, str]] = {
        "method": "the step is the method itself; Searcher takes any",
        "stages": "Searcher takes any",
    }

    def __init__(
        self,
        supernet: Supernet | Searchable,
        lam: float = 1.0,
        beta: float = 1e-2,
        objective: Objective | None = None,
        selector: Selector | None = None,
        *,
        epochs: int = 50,
        lr: float = 0.025,
        lr_min: float = 0.001,
        y_lr: float | None = None,
        weight_decay: float = 3e-4,
        wait: float = 0.0,
        fused: bool = True,
        monotone_check: bool = False,
        **options: Any,
    ):
        number("lam", lam, "> 0")
        number("beta", beta, ">= 0")
        stage = Stage("search", epochs, lr, lr_min, weight_decay, wait=wait)
        y_lr = lr if y_lr is None else y_lr
        number("y_lr", y_lr, "> 0")
        limit = 2 / (lr + y_lr if fused else max(lr, y_lr))
        if not beta < limit:
            raise ValueError(f"beta must be < {limit:g} with these learning rates, got {beta}")
        super().__init__(
            supernet,
            objective=objective,
            selector=selector,
            method=RelaxedSplit(lam, beta, fused=fused, y_scale=y_lr / lr, monotone_check=monotone_check),
            stages=[stage],
            **options,
        )

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
