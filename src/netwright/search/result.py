"""What a search returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netwright.console import table
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.search.genotype import Genotype
    from netwright.search.supernet import Supernet


@dataclass(frozen=True, eq=False)
class SearchResult(Result):
    """The architecture that was found, and how.

    Attributes:
        genotype: The architecture.
        alpha_history: Architecture parameters by key before the first epoch and after every epoch.
        cost: ``expected_macs``: multiply-adds of the choices for one input, averaged by the final mixing weights;
            empty when the search has seen no input or the supernet cannot tell.
        seed: The seed of the search.
        wall_time: Seconds, over all sittings.
        config: All settings, as plain values.
        skip_share: Share of skip connections among the edges of the genotype of every epoch; near 1 means that the
            search has collapsed. Empty where a genotype has none.
        epochs: Means of the figures of every epoch, among them ``train_loss`` and ``val_loss``.
    """

    genotype: Genotype
    alpha_history: tuple[dict[str, Tensor], ...] = ()
    cost: dict[str, float] = field(default_factory=dict)
    seed: int = 0
    wall_time: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    skip_share: tuple[float, ...] = ()
    epochs: tuple[dict[str, float], ...] = ()

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> SearchResult:
        """The result that ``to_dict`` gave."""
        from netwright.search.genotype import Genotype

        history = [{key: torch.tensor(alpha) for key, alpha in alphas.items()} for alphas in content["alpha_history"]]
        return SearchResult(
            genotype=Genotype.from_dict(content["genotype"]),
            alpha_history=tuple(history),
            cost=dict(content["cost"]),
            seed=content["seed"],
            wall_time=content["wall_time"],
            config=dict(content["config"]),
            skip_share=tuple(content["skip_share"]),
            epochs=tuple(content["epochs"]),
        )

    def __str__(self) -> str:
        last = self.epochs[-1] if self.epochs else {}
        from netwright.search import spaces

        rows: list[list[object]] = [["epochs", str(len(self.epochs))], ["seed", str(self.seed)]]
        rows += [["seconds", f"{self.wall_time:.1f}"]]
        rows += [[name, f"{value:.4g}"] for name, value in {**last, **self.cost}.items()]
        found = str(self.genotype)
        if (space := spaces.SPACES.get(getattr(self.genotype, "space", ""))) is not None:
            decisions = space.decisions(self.genotype)
            found = table([[key, name] for key, name in decisions.items()], ["choice", "operation"])
        return f"{found}\n\n{table(rows, ['figure', 'value'])}"

    @property
    def by_thresholds(self) -> bool:
        """Whether ``alpha_history`` holds thresholds of superkernels instead of one number for each candidate."""
        return bool(self.config.get("architecture") == "thresholds")

    def plot(self, ax: Axes | None = None) -> Axes:
        """How decided each choice is (its largest softmax weight, one line a choice), and the skip share.

        Of a search with superkernels, the largest threshold of each layer instead.
        """
        ax = new_axes(ax)
        if self.by_thresholds:
            return self._plot_thresholds(ax)
        for key in self.alpha_history[0] if self.alpha_history else ():
            sure = [float(alphas[key].softmax(-1).max()) for alphas in self.alpha_history]
            ax.plot(range(len(sure)), sure, color="0.7", linewidth=0.8)
        ax.plot(range(1, len(self.skip_share) + 1), self.skip_share, color="tab:red", marker=".", label="skip share")
        ax.set_xlabel("epoch")
        ax.set_ylabel("share; largest weight of each choice")
        ax.set_ylim(0, 1.02)
        ax.legend()
        return ax

    def _plot_thresholds(self, ax: Axes) -> Axes:
        for key in self.alpha_history[0] if self.alpha_history else ():
            largest = [float(thresholds[key].max()) for thresholds in self.alpha_history]
            ax.plot(range(len(largest)), largest, color="0.7", linewidth=0.8)
        ax.set_xlabel("epoch")
        ax.set_ylabel("largest threshold of each layer")
        share = ax.twinx()
        share.plot(range(1, len(self.skip_share) + 1), self.skip_share, color="tab:red", marker=".")
        share.set_ylabel("skip share")
        share.set_ylim(0, 1.02)
        return ax


def expected_macs(supernet: Supernet, shape: tuple[int, int, int]) -> float:
    """Multiply-adds of all choices for one input of ``shape`` (C, H, W), averaged by the mixing weights.

    Stem, preprocessing and classifier, which no choice changes, are left out.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 10)
        >>> before = expected_macs(supernet, (1, 16, 16))
        >>> _ = supernet.arch["normal_0_2"].data[0].fill_(9.0)    # "none" costs nothing
        >>> expected_macs(supernet, (1, 16, 16)) < before
        True
    """
    from netwright.search.pricing import operation_macs

    table = operation_macs(supernet, shape)
    with torch.no_grad():
        return float(supernet.expected_cost(table, shape, drawn=False))
