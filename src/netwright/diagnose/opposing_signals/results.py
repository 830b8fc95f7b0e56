"""What a tracker reports: groups of examples, their scores, and the same scores of groups that say nothing.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from netwright.console import table
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Groups(Result):
    """The examples whose losses moved most in a step.

    Attributes:
        step: The losses are those before this step and after it.
        up: Examples whose loss rose most, the largest rise first.
        down: Examples whose loss fell most, the largest fall first.
        labels: How many of ``up`` and of ``down`` have which label; empty where targets are no classes.
    """

    step: int
    up: tuple[int, ...]
    down: tuple[int, ...]
    labels: tuple[dict[int, int], dict[int, int]] = ({}, {})


@dataclasses.dataclass(frozen=True)
class PairScores(Result):
    """How far two groups oppose each other; of several pairs the mean.

    Attributes:
        oscillation: Correlation rho of the groups' mean loss changes in the window, in [-1, 1]; NaN where one does not
            change.
        gradient_cosine: Cosine of the groups' mean gradients; NaN without the parameters of the step.
        slope_product: Product of the groups' mean slopes along the sharpest direction, below 0 where a move along it
            helps one and harms the other; NaN without them.
        opposed: Share of pairs whose ``slope_product`` is below 0.
        share: Share that both have of all loss changes of the step, by absolute value.
        loss: Mean loss of both before the step.
        pairs: How many pairs these are the means of.
    """

    oscillation: float
    gradient_cosine: float
    slope_product: float
    opposed: float
    share: float
    loss: float
    pairs: int = 1


@dataclasses.dataclass(frozen=True)
class OpposingReport(Result):
    """Opposing signals around one step, beside what pairs of other examples show.

    Attributes:
        step: The step.
        groups: The examples whose losses moved most in it.
        steps: Steps of the window that were recorded.
        pair: Scores of ``groups.up`` and ``groups.down``.
        random: Of pairs of random groups of the same size.
        matched: Of random groups with about the same losses before the step; NaN where too few examples are left.
        even_share: Share of all loss changes that both groups would have if all examples had the same.
        alternation: Overlap (Jaccard) of what rose most in one step of the window with what fell most in the next, and
            the other way round, in [0, 1]; NaN for fewer than two neighbouring steps.
        persistence: Overlap of the groups of successive spikes of the whole record, up and down together; NaN for fewer
            than two.
        sharpness: Largest eigenvalue of the Hessian of the probe's mean loss before the step; NaN without the
            parameters of the step.
        curves: Mean losses before each step of the window and after the last: of ``up``, of ``down``, of all.
    """

    step: int
    groups: Groups
    steps: tuple[int, ...]
    pair: PairScores
    random: PairScores
    matched: PairScores
    even_share: float
    alternation: float
    persistence: float
    sharpness: float
    curves: dict[str, tuple[float, ...]]

    def __str__(self) -> str:
        names = ("oscillation", "gradient_cosine", "slope_product", "opposed", "share", "loss")
        rows = [
            [name.replace("_", " "), *(f"{getattr(each, name):.3g}" for each in (self.pair, self.random, self.matched))]
            for name in names
        ]
        told = [
            f"step {self.step}: {len(self.groups.up)} examples up, {len(self.groups.down)} down, "
            f"which have {self.pair.share:.3g} of all loss changes ({self.even_share:.3g} would be even)",
            table(rows, ["", "up and down", "random pairs", "pairs of equal loss"]),
            f"alternation {self.alternation:.3g}, persistence {self.persistence:.3g}",
        ]
        if not math.isnan(self.sharpness):
            told.append(f"sharpness {self.sharpness:.4g}")
        return "\n".join(told)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean losses of both groups and of all examples around the step."""
        ax = new_axes(ax)
        gap = self.steps[1] - self.steps[0] if len(self.steps) > 1 else 1
        steps = [*self.steps, self.steps[-1] + gap]
        names = {"up": "up: loss rises most", "down": "down: loss falls most", "all": "all examples"}
        for name, colour in zip(names, ("C1", "C0", "C2"), strict=True):
            ax.plot(steps, self.curves[name], marker=".", color=colour, label=names[name])
        ax.axvline(self.step, color="0.5", linewidth=0.8, linestyle=":")
        ax.set_xlabel("step")
        ax.set_ylabel("mean loss")
        ax.legend()
        return ax
