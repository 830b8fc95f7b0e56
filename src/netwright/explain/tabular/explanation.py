"""Why a surrogate answers as it does for one row."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import numpy as np

from netwright.console import table
from netwright.explain.tabular.rules import Rule
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Explanation(Result):
    """One row: the surrogate's answer, the rule it follows, and what each feature adds.

    Attributes:
        columns: The surrogate's features, numbered as in the whole table.
        values: (k,) what the row has there.
        base: (classes of the surrogate,) its answer when nothing is known.
        contributions: (k, classes of the surrogate); base + their sum is the surrogate's answer in ``units``.
        classes: Numbers of the surrogate's classes.
        probabilities: Of the surrogate, for all classes of the black box.
        black_box: Of the black box.
        rule: The path of a tree; the first rule of a forest that holds, or None.
        names: Of all features, or None.
        class_names: Or None.
        units: Of base and contributions: ``"probability"``, or of boosted trees ``"margin"``: what
            ``decision_function`` gives, of two classes that of the second, and its negative for the first.
    """

    columns: tuple[int, ...]
    values: np.ndarray
    base: np.ndarray
    contributions: np.ndarray
    classes: tuple[int, ...]
    probabilities: np.ndarray
    black_box: np.ndarray
    rule: Rule | None
    names: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    units: Literal["probability", "margin"] = "probability"

    @property
    def prediction(self) -> int:
        """The surrogate's class."""
        return int(self.probabilities.argmax())

    @property
    def effects(self) -> np.ndarray:
        """(k,) what each feature adds to the surrogate's class."""
        found: np.ndarray = self.contributions[:, self.classes.index(self.prediction)]
        return found

    def __str__(self) -> str:
        theirs = int(self.black_box.argmax())
        lines = [
            f"surrogate: {self._class(self.prediction)}, {self.probabilities.max():.3f}; "
            f"black box: {self._class(theirs)}, {self.black_box.max():.3f}"
        ]
        lines += [self.rule.text(self.names, self.class_names)] if self.rule is not None else []
        order = np.argsort(-np.abs(self.effects), kind="stable")[:SHOWN]
        rows = [[self._name(i), f"{self.values[i]:.4g}", f"{self.effects[i]:+.4f}"] for i in order if self.effects[i]]
        return "\n".join([*lines, table(rows, ["feature", "value", self._effect])])

    def plot(self, ax: Axes | None = None) -> Axes:
        """What the features add to the surrogate's class, the largest on top."""
        order = [i for i in np.argsort(-np.abs(self.effects), kind="stable")[:SHOWN] if self.effects[i]][::-1]
        ax = new_axes(ax, size=(5.0, 0.8 + 0.25 * max(1, len(order))))
        effects = self.effects[order]
        ax.barh(range(len(order)), effects, color=["C0" if effect > 0 else "C1" for effect in effects])
        ax.set_yticks(range(len(order)), [f"{self._name(i)} = {self.values[i]:.4g}" for i in order])
        ax.set_xlabel(self._effect)
        ax.grid(axis="y", visible=False)
        return ax

    @property
    def _effect(self) -> str:
        what = "" if self.units == "probability" else f"the {self.units} of "
        return f"adds to {what}{self._class(self.prediction)}"

    def _name(self, place: int) -> str:
        column = self.columns[place]
        return f"x{column}" if self.names is None else self.names[column]

    def _class(self, number: int) -> str:
        return f"class {number}" if self.class_names is None else self.class_names[number]
