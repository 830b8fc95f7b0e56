"""A search in a given wall time: the number of epochs is found from a rehearsal and corrected after every epoch.

Methods whose steps cost differently are compared fairly when each gets the same seconds. A learning rate that falls
along a cosine has to know when the search ends, so the end is planned first,

    epochs_s = n share_s,    n = (T - selection) / sum_s share_s pace_s,

with the seconds ``pace_s`` of an epoch of stage s, and planned anew from what epochs really took.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netwright.checks import number, whole
from netwright.results import Result
from netwright.search.pairs import Pairs

if TYPE_CHECKING:
    from netwright.search.searcher import EpochEnd, Searcher


@dataclass(frozen=True)
class Rehearsal(Result):
    """What a search takes.

    Attributes:
        stages: Seconds of an epoch of each stage, by name.
        selection: Seconds from the end of the last epoch to the genotype.
    """

    stages: Mapping[str, float] = field(default_factory=dict)
    selection: float = 0.0

    def epochs(self, seconds: float, shares: Sequence[float]) -> list[int]:
        """Epochs of each stage, at least one, that end nearest to a wall time, selection included.

        Args:
            seconds: The time, > 0.
            shares: Share of the epochs that each stage gets, > 0.

        Raises:
            ValueError: If a number is out of its range, or there is not one share a stage.

        Example:
            >>> Rehearsal({"warmup": 1.0, "search": 2.0}, selection=5.0).epochs(40.0, (0.25, 0.75))
            [5, 15]
        """
        _positive(seconds)
        if len(shares) != len(self.stages) or not all(share > 0 for share in shares):
            raise ValueError(f"shares must be {len(self.stages)} numbers > 0, one a stage, got {tuple(shares)}")
        one = sum(share * pace for share, pace in zip(shares, self.stages.values(), strict=True))
        whole = max(0.0, seconds - self.selection) / one
        return [max(1, round(whole * share)) for share in shares]


def rehearse(searcher: Searcher, train: Any, val: Any, *, seed: int, batches: int = 5) -> Rehearsal:
    """Measures what a method takes by a small search, which is thrown away.

    The last epoch of each stage counts: the first ones also pay for what is done once, and a method may need some
    before its steps are of the usual cost. The selection is that of the real search.

    Args:
        searcher: The method with a few epochs in every stage; it is used up.
        train, val: The batches of the real search.
        seed: Seed of the search.
        batches: How many of each are used in an epoch, at least 1; the times are multiplied by what is left out.

    Raises:
        ValueError: If ``batches`` is below 1, a stage has no epoch, or the search refuses its arguments.

    Example:
        >>> import torch
        >>> from netwright.search import DARTS, spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> found = rehearse(DARTS(supernet, epochs=2), [batch] * 20, [batch] * 20, seed=0)
        >>> list(found.stages), found.stages["search"] > found.selection
        (['search'], True)
    """
    whole("batches", batches, ">= 1")
    for stage in searcher.stages:
        if stage.epochs < 1:
            raise ValueError(f"epochs of stage {stage.name!r} must be >= 1 in a rehearsal, got {stage.epochs}")
    few = _First(train, batches), _First(val, batches)
    pairs = Pairs(*few, searcher)
    scale = len(Pairs(train, val, searcher)) / len(pairs)
    took: dict[str, float] = {}
    searcher.prepare(seed=seed, steps_per_epoch=len(few[0]))
    while not searcher.finished:
        start = time.perf_counter()
        for train_batch, val_batch in pairs:
            searcher.step(train_batch, val_batch)
        ended = searcher.end_epoch(few[1])
        took[ended.stage] = (time.perf_counter() - start) * scale
    start = time.perf_counter()
    searcher.result(train, val)
    return Rehearsal(took, time.perf_counter() - start)


class _First:
    """The first batches of a loader."""

    def __init__(self, loader: Any, batches: int):
        self.loader, self.batches = loader, batches

    def __len__(self) -> int:
        return min(self.batches, len(self.loader))

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.loader, self.batches)


class Deadline:
    """Given to :meth:`Searcher.search` as ``on_epoch``, lets a search end at the epoch nearest to a wall time.

    After each epoch the stages that are left get more epochs or fewer, in the proportions that were planned; a stage
    that has not begun keeps one at least.

    Args:
        seconds: Wall time of the search, selection included, > 0.
        rehearsal: What epochs and selection are expected to take; for a stage under way its last epoch tells better.

    Raises:
        ValueError: If ``seconds`` is not positive.

    Example:
        >>> import torch
        >>> from netwright.search import DARTS, spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> late = Deadline(1e-3, Rehearsal({"search": 1e-4}))
        >>> len(DARTS(supernet, epochs=10).search([batch], [batch], seed=0, on_epoch=late).epochs)
        1
    """

    def __init__(self, seconds: float, rehearsal: Rehearsal):
        _positive(seconds)
        self.seconds = seconds
        self._end, self._pace = seconds - rehearsal.selection, dict(rehearsal.stages)
        self._before = 0.0

    def __call__(self, ended: EpochEnd) -> None:
        """Plans what is left of the search."""
        searcher = ended.searcher
        self._pace[ended.stage], self._before = searcher.seconds - self._before, searcher.seconds
        left = searcher.epochs_left
        expected = sum(epochs * self._pace[name] for name, epochs in left.items())
        if not expected:
            return
        scale = max(0.0, self._end - searcher.seconds) / expected
        begun = searcher.stage_epoch > 0
        changes = {}
        for name, epochs in left.items():
            present = name == searcher.stage.name
            fitting = max(0 if present and begun else 1, round(epochs * scale))
            changes[name] = fitting + (searcher.stage_epoch if present else 0)
        searcher.set_epochs(changes)


def _positive(seconds: float) -> None:
    number("seconds", seconds, "> 0")
