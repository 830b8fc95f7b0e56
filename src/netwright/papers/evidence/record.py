"""The record of one reproduction: the figures of each arm and seed, the verdicts, and how they came about."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from netwright.console import UserError, clock, table
from netwright.papers.evidence.statistics import (
    Outcome,
    Values,
    Verdict,
    bootstrap,
    floats,
    mean,
    overall,
    standard_error,
)
from netwright.results import Result, new_axes, plain
from netwright.storage import read_json, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Setting:
    """A size of the experiment: what was used, and what the specification or the paper asks for."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    used: float
    specified: float

    @property
    def shrunk(self) -> bool:
        """Whether less was used than specified."""
        return self.used < self.specified


@dataclasses.dataclass(frozen=True)
class Evidence(Result):
    """What one reproduction measured; the verdicts follow from the figures.

    Attributes:
        slug: Of the paper.
        title: Of the paper.
        budget: ``"full"`` or ``"fast"``; only a full run is published.
        seeds: The seeds that were run.
        figures: ``figures[arm][metric]``, one value a seed (``None`` where it failed), fewer for an arm
            that needs fewer.
        claims: Key of the claim to its verdict.
        metric: The figure that pictures show.
        details: ``details[arm][name]``, whatever else an arm reports that is no number: a genotype, say.
        settings: Sizes used beside those specified.
        machine: Processor, cores, threads, memory, system.
        versions: Of Python and the packages that matter.
        seconds: Wall time, interrupted sittings included.
        command: What to type for the same run.
        commit: Of netwright's repository; ``+changes`` when files differed from it.
        date: UTC day, ISO 8601.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    slug: str
    title: str
    budget: Literal["full", "fast"]
    seeds: tuple[int, ...]
    figures: dict[str, dict[str, list[float | None]]]
    claims: dict[str, Verdict]
    metric: str
    details: dict[str, dict[str, list[Any]]]
    settings: dict[str, Setting]
    machine: dict[str, str | int | float]
    versions: dict[str, str]
    seconds: float
    command: str
    commit: str
    date: str

    @property
    def verdict(self) -> Outcome:
        """``supported`` if all gated claims are, ``not supported`` if one is not, else ``inconclusive``."""
        return overall([claim for claim in self.claims.values() if claim.gated])

    def to_dict(self) -> dict[str, Any]:
        """The fields and the verdict as plain, JSON-able values."""
        return {"verdict": self.verdict} | {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Validates the evidence and writes it as JSON, atomically.

        Raises:
            UserError: If it is not whole; every fault is named by its path.
        """
        data = self.to_dict()
        _validate(data, path)
        write_json(path, data)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Reads evidence.

        Raises:
            UserError: If the file is missing, damaged, not whole, or names a verdict that its claims do not
                yield.
        """
        return _validate(read_json(path), path)

    def __str__(self) -> str:
        rows = [
            [arm, *(self._summary(name, metrics[name]) if name in metrics else "" for name in self._metrics())]
            for arm, metrics in self.figures.items()
            if set(metrics) & set(self._metrics())
        ]
        claims = [
            [claim.verdict, key if claim.gated else f"({key})", claim.reason] for key, claim in self.claims.items()
        ]
        head = f"{self.title}: {self.verdict} ({self.budget}, {len(self.seeds)} seeds, {clock(self.seconds)})"
        return "\n\n".join(
            [head, table(claims, ["verdict", "claim", "figures"]), table(rows, ["arm", *self._metrics()])]
        )

    def _summary(self, name: str, values: Values) -> str:
        """Mean and standard error, and the 90 % interval of the figure that pictures show too."""
        error, (low, high) = standard_error(values), bootstrap(values) if name == self.metric else (math.nan, math.nan)
        return (
            f"{mean(values):.4g}"
            + (f" ± {error:.2g}" if math.isfinite(error) else "")
            + (f" [{low:.4g}, {high:.4g}]" if math.isfinite(low) else "")
        )

    def _metrics(self) -> list[str]:
        names = dict.fromkeys(name for metrics in self.figures.values() for name in metrics)
        return sorted(names, key=lambda name: name != self.metric)[:4]

    def plot(self, ax: Axes | None = None, *, metric: str | None = None) -> Axes:
        """Every arm with each seed as a dot, and the mean with its 90 % interval.

        Raises:
            ValueError: If no arm has the metric.
        """
        metric = metric or self.metric
        arms = {arm: floats(metrics[metric]) for arm, metrics in self.figures.items() if metric in metrics}
        if not arms:
            raise ValueError(f"metric must be one of {', '.join(self._metrics())}, got {metric!r}")
        ax = new_axes(ax, size=(5.0, 0.8 + 0.35 * len(arms)))
        for row, values in enumerate(arms.values()):
            ax.scatter(values, [row] * len(values), s=16, color="0.6", zorder=2)
            ax.plot([mean(values)], [row], "D", color="C0", zorder=4)
            ax.plot(bootstrap(values), [row, row], color="C0", linewidth=2, zorder=3)
        ax.set_yticks(range(len(arms)), list(arms))
        ax.invert_yaxis()
        ax.set_xlabel(metric.replace("_", " "))
        ax.set_title(f"{self.slug}: {self.verdict}")
        return ax


def _validate(data: Any, path: str | os.PathLike[str]) -> Evidence:
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(data, Mapping):
        raise UserError("no evidence: the file must hold a JSON object", where=path)
    fields = dict(data)
    stated = fields.pop("verdict", None)
    try:
        found = TypeAdapter(Evidence).validate_python(fields)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()]
        raise UserError("damaged evidence: " + "; ".join(faults), where=path) from error
    faults = [
        f"figures.{arm}.{name}: {len(values)} values for {len(found.seeds)} seeds"
        for arm, metrics in found.figures.items()
        for name, values in metrics.items()
        if not 1 <= len(values) <= len(found.seeds)
    ]
    if not any(claim.gated for claim in found.claims.values()):
        faults.append("claims: none is gated")
    elif stated != found.verdict:
        faults.append(f"verdict: {stated!r} is stated, {found.verdict!r} follows from the claims")
    if faults:
        raise UserError("damaged evidence: " + "; ".join(faults), where=path)
    return found
