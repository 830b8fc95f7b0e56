"""What a designed network may cost, at its final size: for the search, and for the choice of its width."""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from netwright.console import UserError, note
from netwright.cost import LatencyTable, count, cpu_name
from netwright.design.user_code import open_space, sizes_of
from netwright.search import spaces
from netwright.search.latency import Setup, SpaceLatencyTable, measure, measured
from netwright.search.pricing import Limit, Limits, NetworkCost, WithinLimits, cheapest, multiply_adds

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.design.options import Options
    from netwright.design.run import RunFolder
    from netwright.search.genotype import Genotype

TABLE = "latency.json"
# Tables err by some percent, and pruning leaves more zeros in one layer than in another.
LATENCY_AIM = 0.9
REPEATS = 20
TABLE_NETWORKS = 12  # in which the operations of a small space are timed


@dataclass(frozen=True)
class Allowance:
    """The limits that a run's options set to networks of one size.

    Attributes:
        options: The run's options; ``latency_ms`` is that of one image in the sparse runtime on one thread, ``flops``
            counts two a multiply-add, zeros included.
        data: The data.
        model: Sizes of the network, as in the plan.
    """

    options: Options
    data: Data
    model: dict[str, Any]

    @property
    def exists(self) -> bool:
        """Whether there is a limit at all."""
        return self.options.latency_ms is not None or self.options.flops is not None

    def limits(self, run: RunFolder | None = None) -> Limits | None:
        """The limits as the search takes them, None where there are none.

        Args:
            run: Where the table of latencies is kept, and found again when the search is taken up.

        Raises:
            UserError: If no network of the space and size keeps to them.
        """
        if not self.exists:
            return None
        found = []
        if self.options.flops is not None:
            found.append(Limit(self._priced(self._flops()), self.options.flops, "FLOPs"))
        if self.options.latency_ms is not None:
            found.append(Limit(self._priced(self._table(run)), LATENCY_AIM * self.options.latency_ms, "ms of latency"))
        limits = Limits(*found)
        try:
            WithinLimits(limits).select(self._space.supernet(self._in_channels, self._classes, **self._sizes))
        except ValueError as error:
            raise _unreachable(str(error)) from None
        return limits

    def over(self, genotype: Genotype) -> list[str]:
        """Which limits one network breaks, and by how much: counted, and measured with random zeros."""
        costs: list[tuple[str, float, float]] = []
        if self.options.flops is not None:
            network = self._space.build(genotype, self._in_channels, self._classes, seed=0, **self._sizes)
            costs.append(("FLOPs", 2 * count(network, self.data.shape).macs, self.options.flops))
        if self.options.latency_ms is not None:
            table = self._given
            taken = (
                measured(self._space, genotype, self.data.shape, self._classes, self._setup)
                if table is None
                else table.of(genotype)
            )
            costs.append(("ms of latency", taken, LATENCY_AIM * self.options.latency_ms))
        return [f"{cost:,.4g} {name} of {most:,.4g} allowed" for name, cost, most in costs if cost > most]

    def cheapest(self) -> Genotype:
        """The architecture with the fewest operations."""
        limits = Limits(Limit(self._priced(self._flops()), 1.0))
        return cheapest(limits, self._space.supernet(self._in_channels, self._classes, **self._sizes))

    @property
    def _space(self) -> spaces.AnySpace:
        found: spaces.AnySpace = open_space(self.options.space)
        return found

    @property
    def _in_channels(self) -> int:
        return self.data.shape[0]

    @property
    def _classes(self) -> int:
        return len(self.data.classes)

    @property
    def _sizes(self) -> dict[str, Any]:
        return sizes_of(self._space, **{name: self.model[name] for name in ("channels", "cells", "stem")})

    @property
    def _setup(self) -> Setup:
        return Setup("native", self.options.sparsity, repeats=REPEATS, options=self._sizes)

    @cached_property
    def _given(self) -> SpaceLatencyTable | None:
        """The table that the options name, None where they name none.

        Raises:
            UserError: If it is of something else than the run needs, telling every difference.
        """
        file = self.options.latency_table
        if file is None:
            return None
        table, needed = SpaceLatencyTable.load(file), self._needed()
        kept = {name: getattr(table, name) for name in ("runtime", "sparsity", "threads", "batch", "cpu", "space")}
        kept |= {"shape": table.shape, "classes": table.num_classes}
        kept |= _filled(self._space, {name: table.options.get(name) for name in self._sizes})
        differing = [name for name, value in needed.items() if kept[name] != value]
        if wrong := [f"{name} {kept[name]} there, {needed[name]} needed" for name in differing]:
            again = f"netwright latency-table {shlex.join(self._arguments())} --out {shlex.quote(file)} --force"
            raise UserError(f"the latency table is of something else: {'; '.join(wrong)}", where=file, cure=again)
        return table

    def _needed(self) -> dict[str, Any]:
        setup = self._setup
        found = {name: getattr(setup, name) for name in ("runtime", "sparsity", "threads", "batch")}
        found |= {"cpu": cpu_name(), "space": self._space.name, "shape": self.data.shape, "classes": self._classes}
        return found | _filled(self._space, self._sizes)

    def _arguments(self) -> list[str]:
        """Those of ``netwright latency-table`` for the table that is needed."""
        setup, sizes = self._setup, {name: size for name, size in self._sizes.items() if size is not None}
        given: dict[str, Any] = {
            "runtime": setup.runtime,
            "sparsity": setup.sparsity,
            "shape": ",".join(map(str, self.data.shape)),
        }
        given |= {"classes": self._classes, **sizes}
        return [self.options.space, *(word for name, value in given.items() for word in (f"--{name}", str(value)))]

    def _flops(self) -> dict[Any, float]:
        table = multiply_adds(self._space, self.data.shape, self._classes, **self._sizes)
        return {key: 2 * adds for key, adds in table.items()}

    def _table(self, run: RunFolder | None) -> LatencyTable:
        if run is not None and run.has(TABLE):
            return LatencyTable.load(run / TABLE)
        table = self._given
        if table is None:
            note("measuring the latency of every operation of the space on this machine")
            table = measure(self._space, self.data.shape, self._classes, self._setup)
        if run is not None:
            table.save(run / TABLE)
        return table

    def _priced(self, table: Any) -> NetworkCost:
        return NetworkCost(self._space, table, self.data.shape, self._classes, **self._sizes)


def widest_within(
    options: Options, data: Data, model: dict[str, Any], genotype: Genotype, widths: Sequence[int]
) -> tuple[int, float]:
    """The largest of some widths at which a random network keeps to the limits; the smallest if any network does there.

    Args:
        options: The run's options.
        data: The data.
        model: Sizes of the network, as in the plan, apart from its width.
        genotype: The random network.
        widths: From the largest to the smallest.

    Returns:
        The width, and the seconds that the table of latencies is going to take.

    Raises:
        UserError: If even the cheapest network of the smallest width breaks a limit.
    """
    for width in widths:
        allowance, started = Allowance(options, data, {**model, "channels": width}), time.monotonic()
        over = allowance.over(genotype)
        measures = options.latency_ms is not None and options.latency_table is None
        seconds = TABLE_NETWORKS * (time.monotonic() - started) if measures else 0.0
        if not over:
            break
    else:
        if over := allowance.over(allowance.cheapest()):
            raise _unreachable(f"the cheapest network of {options.space} with {width} channels has {'; '.join(over)}")
    return width, seconds


def at_width_of_table(options: Options) -> Options:
    """The options with the width of the latency table that they name, where they say none themselves."""
    if options.latency_table is None or options.channels is not None:
        return options
    return dataclasses.replace(options, channels=SpaceLatencyTable.load(options.latency_table).options.get("channels"))


def _filled(space: spaces.AnySpace, sizes: dict[str, Any]) -> dict[str, Any]:
    """Sizes with what a cell space takes for those that are not given."""
    own: dict[str, Any] = {"stem": "cifar"}
    if isinstance(space, spaces.Space):
        own |= {"channels": space.channels, "cells": space.cells}
    return {name: own.get(name) if size is None else size for name, size in sizes.items()}


def _unreachable(what: str) -> UserError:
    return UserError(what, cure="raise --latency-ms or --flops, give a smaller --channels, or another --space")
