"""A look at a data set before any minute is spent on it: counts, faults, one picture a class."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from netwright.console import table
from netwright.data.loading import PICTURES_SHOWN, draw, one_each
from netwright.data.parts import PARTS, class_problems, duplicate_problems
from netwright.data.problems import Problem
from netwright.data.sources import Reading, read
from netwright.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class DataReport(Result):
    """What :func:`check` found.

    Attributes:
        name: Name of the data set.
        source: Where it comes from.
        classes: Its classes; those that only other parts than training have come last.
        shape: (channels, height, width) of the images as they will be used.
        counts: ``counts[part][class]``: images, in the parts as they were found.
        sizes: Images of each stored size, ``"height x width"``, most frequent first.
        problems: The faults found.
        samples: One picture of each class, for at most 20 classes: name and float32 (C, H, W).
    """

    name: str
    source: str
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    counts: dict[str, dict[str, int]]
    sizes: dict[str, int]
    problems: tuple[Problem, ...]
    samples: tuple[tuple[str, Tensor], ...]

    @property
    def spoiled(self) -> bool:
        """Whether a fault would spoil a run."""
        return any(problem.spoils for problem in self.problems)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures, JSON-able."""
        return {
            "name": self.name,
            "source": self.source,
            "shape": list(self.shape),
            "classes": list(self.classes),
            "counts": self.counts,
            "sizes": self.sizes,
            "problems": [vars(problem) for problem in self.problems],
            "spoiled": self.spoiled,
            "samples": [label for label, _ in self.samples],
        }

    def __str__(self) -> str:
        names = list(self.counts)
        rows = [[label, *(self.counts[part][label] for part in names)] for label in self.classes]
        rows.append(["all", *(sum(self.counts[part].values()) for part in names)])
        sizes = [f"{size} ({count})" for size, count in list(self.sizes.items())[:SIZES_SHOWN]]
        more = len(self.sizes) - SIZES_SHOWN
        lines = [
            f"{self.name}, from {self.source}",
            f"used as {' x '.join(map(str, self.shape))} (channels x height x width); "
            f"stored as {', '.join(sizes)}{f' and {more} more sizes' if more > 0 else ''}",
            "",
            table(rows, ["class", *names]),
            "",
        ]
        for problem in self.problems:
            lines.append(f"{'FAULT' if problem.spoils else 'note'}: {problem.message}")
            lines.append(f"  in {problem.where}")
            if problem.cure:
                lines.append(f"  do {problem.cure}")
        if not self.problems:
            lines.append("no faults found")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """One picture of each class."""
        return draw(list(self.samples), ax)


def check(
    name_or_path: str | os.PathLike[str],
    *,
    download: bool = False,
    skip_broken: bool = False,
    drop_unknown: bool = False,
    size: tuple[int, int] | None = None,
    root: str | os.PathLike[str] | None = None,
    memory_limit: int | None = None,
) -> DataReport:
    """Looks at a data set and lists every fault, those too for which :func:`netwright.data.load` refuses it.

    Args:
        name_or_path: As for :func:`netwright.data.load`, like everything else.
        download: Allows a download.
        skip_broken: Unreadable files no longer count as spoiling.
        drop_unknown: Classes that training lacks no longer count as spoiling.
        size: (height, width) to resize to.
        root: The data folder.
        memory_limit: Bytes above which images stay on disk.

    Raises:
        UserError: If there is nothing to look at: no such data, no images, no labels.

    Example:
        >>> report = check("digits")
        >>> report.counts["train"]["0"], report.spoiled
        (178, False)
    """
    how = Reading(download=download, skip_broken=skip_broken, size=size, root=root, memory_limit=memory_limit)
    parts = read(name_or_path, how)
    problems = parts.problems + class_problems(parts, drop_unknown=drop_unknown)
    problems += duplicate_problems(parts, {part: images.digests() for part, images in parts.images.items()})
    samples: dict[str, Tensor] = {}
    for part in (p for p in PARTS if p in parts.images):
        for label, picture in one_each(parts.images[part], parts.classes, limit=len(parts.classes)):
            samples.setdefault(label, picture)
    return DataReport(
        name=parts.name,
        source=parts.source,
        classes=parts.classes,
        shape=parts.images["train"].shape,
        counts=parts.counts(),
        sizes={f"{h} x {w}": count for (h, w), count in parts.sizes.most_common()},
        problems=tuple(sorted(problems, key=lambda problem: not problem.spoils)),
        samples=tuple(list(samples.items())[:PICTURES_SHOWN]),
    )
