"""What a benchmark leaves: its figures beside what was aimed at, with the machine, the versions and the command.

``benchmarks/results/NAME.json`` holds everything, ``NAME.md`` the table that the documentation includes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from netwright import __version__, storage
from netwright.cost import cpu_name
from netwright.cost.timing import Timing

RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Figure:
    """One figure of a benchmark.

    Attributes:
        what: What was measured.
        value: The figure; None where it could not be measured.
        low, high: Its quartiles over the rounds.
        least, most: What is aimed at; both None where there is no aim.
        note: What the reader should know of it.
    """

    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def aim(self) -> str:
        """The aim in words."""
        bounds = (("at least", self.least), ("at most", self.most))
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without one. What was not measured meets none."""
        if not self.aim:
            return None
        if self.value is None:
            return False
        return (self.least is None or self.value >= self.least) and (self.most is None or self.value <= self.most)

    def row(self) -> list[str]:
        """The cells of its line."""
        value = "not measured" if self.value is None else f"{self.value:.3g}"
        spread = "" if self.low is None or self.high is None else f"{self.low:.3g} to {self.high:.3g}"
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        return [self.what, value, spread, self.aim, verdict, self.note]


def over(timing: Timing, what: str, *, inverse: bool = False, **fields: Any) -> Figure:
    """The time of something over that of the first of a comparison; ``inverse``: that of the first over it."""
    values = timing.ratio, timing.ratio_low, timing.ratio_high
    if inverse:
        values = 1 / timing.ratio, 1 / timing.ratio_high, 1 / timing.ratio_low
    return Figure(what, *values, **fields)


def table(figures: Sequence[Figure]) -> list[str]:
    """The figures as lines of Markdown; a column that would be empty is left out."""
    head = ["what", "figure", "quartiles", "aim", "", "remark"]
    rows = [figure.row() for figure in figures]
    used = [i for i in range(len(head)) if i < 2 or any(row[i] for row in rows)]
    return markdown([head[i] for i in used], [[row[i] for i in used] for row in rows])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def leave(name: str, content: object, lines: Sequence[str], settings: str, *, missed: bool, quick: bool) -> int:
    """Prints a table with where it comes from, and writes it unless the sizes were those of a trial.

    Args:
        name: Of the two files.
        content: What the JSON holds.
        lines: The table, as lines of Markdown.
        settings: Threads, batch, rounds.
        missed: Whether an aim was missed.
        quick: Whether sizes were small to try the code: nothing is written, and nothing counts as missed.

    Returns:
        The exit code: 1 if an aim was missed.
    """
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    where = f"{cpu_name()}, {settings}; netwright {__version__}, torch {torch.__version__}. `{command}`"
    text = "\n".join([*lines, "", where, ""])
    if not quick:
        storage.write_json(RESULTS / f"{name}.json", content)
        storage.write_text(RESULTS / f"{name}.md", text)
    print(f"\n{text}")
    return int(missed and not quick)


def record(name: str, figures: Sequence[Figure], settings: Mapping[str, Any], *, quick: bool) -> int:
    """:func:`leave` for figures with aims: the settings stand below the table and in the JSON."""
    said = ", ".join(f"{key} {value}" for key, value in settings.items())
    content = {
        "machine": cpu_name(),
        "versions": {"netwright": __version__, "torch": torch.__version__},
        "settings": dict(settings),
        "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
    }
    missed = any(figure.met is False for figure in figures)
    return leave(name, content, table(figures), said, missed=missed, quick=quick)
