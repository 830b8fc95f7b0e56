"""DASS: architecture search inside the space of sparse networks.

Mousavi, Loni, Alibeigi and Daneshtalab, "DASS: Differentiable Architecture Search for Sparse Neural Networks", ACM
TECS 22(5s), 2023, arXiv:2207.06968.

    min_a L_val(w*, m*, a),    m* = argmin_m L_train(w*, m, a)  with  ||m||_0 <= k n in every layer,
    w* = argmin_w L_train(w, m, a)

Every convolution and linear layer of the supernet owns a score for each weight and uses only the share k with the
largest scores. Three stages: weights and architecture, dense; scores alone, sparse; weights and architecture under
fixed masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from torch import nn

from netwright.nn.sparse import init_scores, set_density, sparsify, train_mode
from netwright.search.bilevel import FirstOrder, SecondOrder
from netwright.search.searcher import Searcher, Stage
from netwright.seeding import seeded

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.objective import Objective
    from netwright.search.protocol import Searchable
    from netwright.search.selection import Selector
    from netwright.search.supernet import Supernet

PRETRAIN, PRUNE, FINETUNE = "pretrain", "prune", "finetune"


@dataclass(frozen=True)
class DASSStages:
    """Length and optimiser of the three stages; the defaults are the published code's, with DARTS's 50 epochs.

    Attributes:
        pretrain, prune, finetune: Epochs of each stage.
        lr: Learning rate of the weights in the first and the third stage, at their start.
        prune_lr: Learning rate of the scores, at the start of the second stage.
        lr_min: Learning rate at the end of each stage.
        weight_decay: Weight decay of weights and scores.
        momentum: Momentum of SGD; the published search passes none.
        wait: Share of the first stage, in [0, 1), for which the architecture waits first.
    """

    pretrain: int = 50
    prune: int = 50
    finetune: int = 50
    lr: float = 0.025
    prune_lr: float = 0.1
    lr_min: float = 1e-3
    weight_decay: float = 1e-3
    momentum: float = 0.0
    wait: float = 0.0


class DASS(Searcher):
    """Searches in three stages: ``pretrain``, ``prune``, ``finetune``.

    The search works on a sparse copy, ``dass.supernet``; the supernet that was given keeps its values.

    Args:
        supernet: A dense supernet; stem, preprocessing, reductions and classifier become sparse too.
        density: Share k of the weights that every layer keeps from the second stage on, in (0, 1].
        stages: Length and optimiser of the stages.
        unrolled: Whether the architecture looks one training step ahead (second order).
        alpha_in_prune: Whether the architecture is updated in the second stage too, as the published ``base`` trainer
            does and the default one does not.
        objective: Loss of both parts; cross-entropy by default.
        selector: How the genotype is read off at the end; the space's own rule by default.
        skip: Names (with wildcards) of layers that stay dense.
        **options: ``clip``, ``alpha_lr``, ``alpha_betas``, ``alpha_weight_decay`` of :class:`Searcher`.

    Raises:
        ValueError: If ``density`` is outside (0, 1], the supernet has no convolution or linear layer, or another value
            is out of range.

    Example:
        >>> import torch
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> dass = DASS(supernet, density=0.1, stages=DASSStages(1, 1, 1), unrolled=False)
        >>> result = dass.search([batch], [batch], seed=0)
        >>> [epoch["stage"] for epoch in result.epochs], result.genotype.space
        ([0.0, 1.0, 2.0], 'micro-darts-2-shared')
    """

    shares = (0.4, 0.2, 0.4)
    settled: ClassVar[Mapping[str, str]] = {
        "method": "unrolled says which step it is",
        "momentum": "it is a part of stages",
    }

    def __init__(
        self,
        supernet: Supernet | Searchable,
        density: float = 0.01,
        stages: DASSStages | None = None,
        unrolled: bool = True,
        alpha_in_prune: bool = False,
        *,
        objective: Objective | None = None,
        selector: Selector | None = None,
        skip: Sequence[str] = (),
        **options: Any,
    ):
        plan = stages or DASSStages()
        with seeded(0, "scores"):  # overwritten by prepare(), which knows the seed
            sparse: Any = sparsify(cast(nn.Module, supernet), density, skip=skip)
        super().__init__(
            sparse,
            objective=objective,
            selector=selector,
            method=SecondOrder() if unrolled else FirstOrder(),
            stages=[
                Stage(PRETRAIN, plan.pretrain, plan.lr, plan.lr_min, plan.weight_decay, wait=plan.wait),
                Stage(PRUNE, plan.prune, plan.prune_lr, plan.lr_min, plan.weight_decay, alpha_step=alpha_in_prune),
                Stage(FINETUNE, plan.finetune, plan.lr, plan.lr_min, plan.weight_decay),
            ],
            momentum=plan.momentum,
            **options,
        )
        self.density = density
        set_density(self.supernet, 1.0)

    @classmethod
    def short(cls, supernet: Supernet, brief: Brief) -> Self:
        """First order, with momentum."""
        pretrain, prune, finetune = brief.epochs
        stages = DASSStages(pretrain, prune, finetune, lr=brief.lr, momentum=0.9, wait=brief.wait)
        return cls(
            supernet, brief.density, stages, unrolled=False,
            objective=brief.objective, selector=brief.selector, alpha_lr=brief.alpha_lr,
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        return {**super().config(), "density": self.density}

    def begin_stage(self, stage: Stage) -> None:
        """Sets what is trained, the density, and the scores with which the stage begins."""
        if stage.name == PRETRAIN:
            with seeded(self.seed or 0, "scores"):
                init_scores(self.supernet, "kaiming")
        elif stage.name == PRUNE:
            init_scores(self.supernet, "scaled")
        self.restore_stage(stage)

    def restore_stage(self, stage: Stage) -> None:
        """Sets what is trained and the density."""
        set_density(self.supernet, 1.0 if stage.name == PRETRAIN else self.density)
        train_mode(self.supernet, "scores" if stage.name == PRUNE else "weights")
