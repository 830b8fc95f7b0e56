"""Single-Path NAS: one path with superkernels, trained once, with thresholds that learn what is worth its time.

Stamoulis et al., "Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours", ECML-PKDD 2019,
arXiv:1904.02877. Weights w and thresholds t of the superkernels (:mod:`netwright.search.superkernel`) descend together,

    min over w, t of  CE(w, t) + lam ln R(w, t) + L2,

with one optimiser, no second data set and the memory of the largest network. For the first 5 of 8 epochs lam is 0 and
indicators are dropped at random. (The published code writes lam = 20 as 0.020 times 1000; R is in milliseconds, so a
millisecond less is worth 20 / R.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch

from netwright.checks import number
from netwright.search.priced import WARMUP, PricedSearch
from netwright.search.pricing import ExpectedCost, MultiplyAdds, WithinLimits
from netwright.search.selection import ArgmaxSelector
from netwright.search.superkernel_supernet import SuperKernelSupernet, check_space

if TYPE_CHECKING:
    from netwright.search.brief import Brief
    from netwright.search.genotype import Genotype
    from netwright.search.stages import Stage
    from netwright.search.supernet import Supernet


class SinglePathNAS(PricedSearch):
    """Two stages, ``warmup`` and ``search``, of one training; the defaults are those of the paper.

    Besides the figures of :class:`~netwright.search.priced.PricedSearch` an epoch has ``modelled_cost`` and, by the
    table itself, ``decided_cost``, in the unit of the table. The result's ``alpha_history`` holds the thresholds; its
    ``cost`` is that of what is decided.

    Args:
        supernet: A supernet of superkernels.
        latency, lam, warmup: As for :class:`~netwright.search.priced.PricedSearch`.
        indicator_dropout: Share of the indicators dropped in each step of the first stage, in [0, 1).
        **options: ``objective``, ``epochs``, ``lr``, ``decay``, ``decay_epochs``, ``weight_decay``,
            ``label_smoothing``, ``ema``, ``optimizer``, ``selector`` and ``clip`` of
            :class:`~netwright.search.priced.PricedSearch`.

    Raises:
        ValueError: If a value is out of range, or the supernet has no superkernels; in the first step, if a latency is
            not positive.
        KeyError: In the first step, if the table misses an operation.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = SuperKernelSupernet(spaces.get("micro-chain"), 1, 3, seed=0)
        >>> table = dict.fromkeys(supernet.operations((1, 16, 16)), 0.5)
        >>> batch = torch.rand(6, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> search = SinglePathNAS(supernet, table, epochs=2, warmup=0.5, lr=1e-3)
        >>> result = search.search([batch], [batch], seed=0)
        >>> len(result.genotype.decisions), result.cost["decided_cost"]
        (6, 3.0)
    """

    selectors = ("argmax",)  # thresholds decide: there is nothing to draw from or to take away

    def __init__(
        self,
        supernet: Supernet,
        latency: Mapping[Any, float] | ExpectedCost | None = None,
        lam: float = 20.0,
        warmup: float = 0.625,
        indicator_dropout: float = 0.4,
        **options: Any,
    ):
        if not isinstance(supernet, SuperKernelSupernet):
            raise ValueError(f"supernet must be a SuperKernelSupernet, got a {type(supernet).__name__}")
        number("indicator_dropout", indicator_dropout, "[0, 1)")
        super().__init__(supernet, latency, lam, warmup, **options)
        self.superkernels, self.indicator_dropout = supernet, indicator_dropout

    @classmethod
    def fits(cls, space: Any) -> None:
        """Refuses a space whose layers no superkernel holds."""
        check_space(space)

    @classmethod
    def supernet_of(cls, space: Any, in_channels: int, num_classes: int, **options: Any) -> Supernet:
        """A supernet of superkernels."""
        return SuperKernelSupernet(space, in_channels, num_classes, **options)

    @classmethod
    def short(cls, supernet: Supernet, brief: Brief) -> Self:
        """As :meth:`PricedSearch.short`.

        Raises:
            ValueError: If a selector is asked for that thresholds have no use for.
        """
        if brief.chosen is not None and not isinstance(brief.chosen, (ArgmaxSelector, WithinLimits)):
            kind = type(brief.chosen).__name__
            raise ValueError(f"superkernels decide by their thresholds, so select must be argmax, got {kind}")
        return super().short(supernet, brief)

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        own = {"architecture": "thresholds", "squared": self.superkernels.squared, "scale": self.superkernels.scale}
        return {**super().config(), "indicator_dropout": self.indicator_dropout, **own}

    def begin_stage(self, stage: Stage) -> None:
        """Lets indicators be dropped in the warm-up, and latency count after it."""
        super().begin_stage(stage)
        self.superkernels.indicator_dropout = self.indicator_dropout if stage.name == WARMUP else 0.0

    def epoch_figures(self, genotype: Genotype) -> dict[str, float]:
        """Costs; see the class."""
        if self.latency is None:
            return {}
        with torch.no_grad():
            modelled = float(self.latency(self.supernet)) * self.latency.unit
        return {"modelled_cost": modelled, "decided_cost": self.latency.of(self.supernet, genotype)}

    def _cost(self) -> dict[str, float]:
        if self._shape is None:
            return {}
        genotype = self.supernet.derive()  # its cost is exact; the supernet's own is a model, for gradients
        found = {"expected_macs": MultiplyAdds().of(self.supernet, genotype)}
        return found if self.latency is None else found | {"decided_cost": self.latency.of(self.supernet, genotype)}
