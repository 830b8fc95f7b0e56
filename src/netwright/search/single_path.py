"""Single-Path NAS: one path with superkernels, trained once, with thresholds that learn what is worth its time.

Stamoulis et al., "Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours", ECML-PKDD 2019,
arXiv:1904.02877. Weights w and thresholds t of the superkernels (:mod:`netwright.search.superkernel`) descend together,

    min over w, t of  CE(w, t) + lam ln R(w, t) + L2,

with one optimiser, no second data set and the memory of the largest network. For the first 5 of 8 epochs lam is 0 and
indicators are dropped at random. (The published code writes lam = 20 as 0.020 times 1000; R is in milliseconds, so a
millisecond less is worth 20 / R.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from netwright.results import new_axes
from netwright.search.priced import WARMUP, PricedSearch
from netwright.search.pricing import ExpectedCost
from netwright.search.result import SearchResult
from netwright.search.superkernel_supernet import SuperKernelSupernet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.search.genotype import Genotype
    from netwright.search.pricing import Costs
    from netwright.search.stages import Stage
    from netwright.search.supernet import Supernet


class MultiplyAdds(ExpectedCost):
    """The multiply-adds of a supernet's choices for inputs of its last shape, as a price.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = SuperKernelSupernet(spaces.get("micro-chain"), 1, 10)
        >>> _ = supernet(torch.zeros(1, 1, 16, 16))
        >>> MultiplyAdds()(supernet).item() == MultiplyAdds().of(supernet, supernet.derive())
        True
    """

    def __init__(self) -> None:
        self._counted: dict[tuple[int, ...], dict[str, list[float]]] = {}

    def candidates(self, supernet: Supernet) -> Costs:
        """The multiply-adds of every candidate by key."""
        if supernet.input_shape is None:
            raise ValueError("the supernet must have had a forward pass, got none")
        channels, height, width = shape = supernet.input_shape
        if shape not in self._counted:
            from netwright.cost import count

            operations = supernet.operations((channels, height, width))
            table = {key: float(count(module, size).macs) for key, (module, size) in operations.items()}
            self._counted[shape] = supernet.candidate_costs(table, (channels, height, width))
        return self._counted[shape]


@dataclasses.dataclass(frozen=True, eq=False)
class SinglePathResult(SearchResult):
    """What a search with superkernels found; ``alpha_history`` holds thresholds, and ``cost`` has ``macs`` of the
    layers with superkernels and, where there was a table, the ``latency`` of the architecture by it."""

    def plot(self, ax: Axes | None = None) -> Axes:
        """Thresholds over the epochs, one line each, and the share of layers that are left out."""
        ax = new_axes(ax)
        for key in self.alpha_history[0] if self.alpha_history else ():
            path = torch.stack([thresholds[key] for thresholds in self.alpha_history])
            ax.plot(range(len(path)), path.numpy(), color="0.7", linewidth=0.8)
        ax.set_xlabel("epoch")
        ax.set_ylabel("threshold")
        share = ax.twinx()
        share.plot(range(1, len(self.skip_share) + 1), self.skip_share, color="tab:red", marker=".")
        share.set_ylabel("share of layers left out")
        share.set_ylim(0, 1.02)
        return ax


class SinglePathNAS(PricedSearch):
    """Two stages, ``warmup`` and ``search``, of one training; the defaults are those of the paper.

    Besides the figures of :class:`~netwright.search.priced.PricedSearch` an epoch has ``modelled_latency`` and, by the
    table itself, ``decided_latency``, both in milliseconds.

    Args:
        supernet: A supernet of superkernels.
        latency, lam, warmup: As for :class:`~netwright.search.priced.PricedSearch`.
        indicator_dropout: Share of the indicators dropped in each step of the first stage, in [0, 1).
        **options: ``epochs``, ``lr``, ``decay``, ``decay_epochs``, ``weight_decay``, ``label_smoothing``, ``ema``,
            ``optimizer``, ``selector`` and ``clip`` of :class:`~netwright.search.priced.PricedSearch`.

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
        >>> len(result.genotype.decisions), result.cost["latency"]
        (6, 3.0)
    """

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
        if not 0 <= indicator_dropout < 1:
            raise ValueError(f"indicator_dropout must lie in [0, 1), got {indicator_dropout}")
        super().__init__(supernet, latency, lam, warmup, **options)
        self.superkernels, self.indicator_dropout = supernet, indicator_dropout

    def config(self) -> dict[str, Any]:
        """The settings, as plain values."""
        own = {"squared": self.superkernels.squared, "scale": self.superkernels.scale}
        return {**super().config(), "indicator_dropout": self.indicator_dropout, **own}

    def begin_stage(self, stage: Stage) -> None:
        """Lets indicators be dropped in the warm-up, and latency count after it."""
        super().begin_stage(stage)
        self.superkernels.indicator_dropout = self.indicator_dropout if stage.name == WARMUP else 0.0

    def epoch_figures(self, genotype: Genotype) -> dict[str, float]:
        """Latencies; see the class."""
        if self.latency is None:
            return {}
        with torch.no_grad():
            modelled = float(self.latency(self.supernet)) * self.latency.unit
        return {"modelled_latency": modelled, "decided_latency": self.latency.of(self.supernet, genotype)}

    def _cost(self) -> dict[str, float]:
        if self._shape is None:
            return {}
        genotype = self.supernet.derive()
        found = {"macs": MultiplyAdds().of(self.supernet, genotype)}
        return found if self.latency is None else found | {"latency": self.latency.of(self.supernet, genotype)}

    def result(self, train: Any = None, val: Any = None) -> SinglePathResult:
        """What the search has found so far."""
        return SinglePathResult(**vars(super().result(train, val)))
