"""How long each stage may take and how large the networks are, decided before anything starts and shown first.

Steps are timed on this machine with the run's own batch size. Under a time budget the seconds are shared out first and
the sizes chosen to fit them; without one the sizes are fixed and the seconds are a forecast.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from netwright.console import UserError, clock, table
from netwright.cost import threads
from netwright.data.augment import Compose, HorizontalFlip
from netwright.design.limits import Allowance, at_width_of_table, widest_within
from netwright.design.timing import finish_seconds, step_seconds, threads_for, training_step
from netwright.design.user_code import open_space, sizes_of
from netwright.results import Result
from netwright.search import method, spaces
from netwright.search.brief import shared_out
from netwright.seeding import seeded, stream

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.design.options import Options
    from netwright.search.genotype import Genotype
    from netwright.search.spaces.network import Stem

# Shares of a time budget, after what export, measuring and the report need.
NETWORKS = ("model", "baseline")
SEARCH_SHARE, NETWORK_SHARE = 0.1, 0.45
PHASES = (("pretrain", 0.36), ("prune", 0.32), ("finetune", 0.32))
AUGMENTED_PASSES = 12
CELLS, SEARCH_CHANNELS = 3, 8
CHUNKS = 8  # an epoch under a time budget is at most this part of its phase, so that an amended plan still anneals
AIM = 0.97  # share of a time budget that is given away: imports and loading the data come before the clock starts
CHANNELS = (8, 12, 16, 24, 32, 48, 64, 96)
# Passes over the data that a size must allow before a larger one is chosen: few, since what is left after heavy pruning
# depends on the width more than on the last epochs.
MIN_PASSES, FEWEST_PASSES, MIN_KEPT = 3.0, 1.0, 10000  # the second while pruning would leave fewer weights than that
MIN_STEPS = 300  # which matter where a pass over few data has only some: with fewer, a wide network is at chance
# Without a budget: with half of these steps a network for digits loses a point of accuracy more to pruning.
DEFAULT_STEPS, DEFAULT_PASSES, SEARCH_STEPS, DEFAULT_CHANNELS = 1200, 6, 120, 32
ALONE_STEPS = 600  # of a search that no training follows


@dataclasses.dataclass(frozen=True)
class Phase(Result):
    """One phase of training of one network.

    Attributes:
        network: ``"model"`` or ``"baseline"``.
        name: ``"pretrain"``, ``"prune"`` or ``"finetune"``.
        epochs: How many.
        steps: Batches in each.
        seconds: Expected wall time.
        limit: Seconds after which the plan is amended; None where the number of epochs is fixed.
        changes: Amendments made on the way, as pairs (epochs so far, epochs in all).
    """

    network: str
    name: str
    epochs: int
    steps: int
    seconds: float
    limit: float | None = None
    changes: tuple[tuple[int, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan(Result):
    """Stages with their seconds, sizes and reasons; what ``plan.json`` holds.

    Attributes:
        stages: Dictionaries with ``name``, ``seconds``, ``sizes`` and ``why``.
        search: Sizes of the search: ``channels``, ``cells``, ``epochs`` (one number a stage), ``steps``, ``limit``.
        model: Sizes of the designed network: ``channels``, ``cells``, ``stem``.
        phases: Every phase of training, both networks.
        step_seconds: What was timed.
        threads: Threads for the search and for each network; part of the plan, since sums depend on them.
        amendments: What changed on the way, and why.
    """

    stages: tuple[dict[str, Any], ...]
    search: dict[str, Any]
    model: dict[str, Any]
    phases: tuple[Phase, ...]
    step_seconds: dict[str, float]
    threads: dict[str, int]
    amendments: tuple[dict[str, Any], ...] = ()

    @property
    def seconds(self) -> float:
        """Expected wall time of all stages."""
        return sum(stage["seconds"] for stage in self.stages)

    def phase(self, network: str, name: str) -> Phase:
        """One phase by its network and name."""
        return next(p for p in self.phases if (p.network, p.name) == (network, name))

    def steps(self, network: str) -> int:
        """Planned training steps of ``"model"`` or ``"baseline"``, over all phases."""
        return sum(phase.epochs * phase.steps for phase in self.phases if phase.network == network)

    def step(self, network: str) -> float:
        """Planned seconds of a training step of ``"model"`` or ``"baseline"``."""
        if network == "baseline":
            return self.step_seconds["baseline"]
        key = f"model {self.model['channels']}"
        found = f"found {key}"  # a width that was timed after the search alone has no other entry
        return self.step_seconds[found if found in self.step_seconds else key]

    def amended(self, what: str, why: str, **changes: Any) -> Plan:
        """This plan with a change, and the change on record."""
        return dataclasses.replace(self, amendments=(*self.amendments, {"what": what, "why": why}), **changes)

    def with_change(self, network: str, name: str, done: int, total: int) -> Plan:
        """This plan with another number of epochs in one phase, from ``done`` epochs on."""
        phases = tuple(
            dataclasses.replace(p, changes=(*p.changes, (done, total))) if (p.network, p.name) == (network, name) else p
            for p in self.phases
        )
        return self.amended(f"{network}: {name} has {total} epochs", f"time, seen after epoch {done}", phases=phases)

    def replayed(self) -> Plan:
        """This plan for another run: the epochs that really were run, without looking at the clock."""
        phases = tuple(dataclasses.replace(p, limit=None) for p in self.phases)
        return dataclasses.replace(self, phases=phases, search={**self.search, "limit": None})

    def __str__(self) -> str:
        rows = [
            [s["name"], clock(s["seconds"]), ", ".join(f"{k} {v}" for k, v in s["sizes"].items()), s["why"]]
            for s in self.stages
        ]
        return table(rows, ["stage", "time", "sizes", "why"]) + f"\nin all about {clock(self.seconds)}"

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Plan:
        """The plan that ``to_dict`` made."""
        fields = {f.name: content[f.name] for f in dataclasses.fields(cls)}
        fields["stages"], fields["amendments"] = tuple(fields["stages"]), tuple(fields["amendments"])
        fields["phases"] = tuple(
            Phase(**{**phase, "changes": tuple((a, b) for a, b in phase["changes"])}) for phase in fields["phases"]
        )
        return cls(**fields)


def augmentation(data: Data, passes: float) -> Compose:
    """The data's own augmentation, or no more than its flip where each example is seen only a few times.

    Example:
        >>> from netwright.data import load
        >>> augmentation(load("digits"), passes=2), augmentation(load("digits"), passes=40)
        (Compose([]), Compose([RandomCrop(padding=1)]))
    """
    usual = data.augmentation()
    if passes >= AUGMENTED_PASSES:
        return usual
    return Compose([step for step in usual.steps if isinstance(step, HorizontalFlip)])


def stem_for(shape: tuple[int, int, int]) -> Stem:
    """The stem for inputs of ``shape``: it keeps small images, halves those from 20 pixels on, and shrinks large ones.

    Example:
        >>> stem_for((1, 8, 8)), stem_for((1, 28, 28)), stem_for((3, 224, 224))
        ('cifar', 'strided', 'imagenet')
    """
    side = max(shape[1:])
    return "imagenet" if side >= 96 else "strided" if side >= 20 else "cifar"


def make_plan(options: Options, data: Data) -> Plan:
    """Times the steps on this machine and decides seconds and sizes.

    Raises:
        UserError: If the budget is too small for one epoch, telling what would be enough.
    """
    options = at_width_of_table(options)
    shape, classes, batch = data.shape, len(data.classes), options.batch_size
    per_pass = max(1, len(data.train) // batch)
    stem, cells = stem_for(shape), cells_for(options)
    baseline, used = _time_baseline(options, shape, classes)
    use = {"baseline": used}
    times = {"baseline": baseline}

    genotype = open_space(options.space).random(stream(options.seed, "plan"))
    widths = _Sizes(options, genotype, data, cells, stem)
    search_channels = options.search_channels or SEARCH_CHANNELS
    times["search"], use["search"] = _time_search(options, shape, classes, stem)
    per_step, pricing, size = {"baseline": baseline}, 0.0, {"cells": cells, "stem": stem}
    finish = partial(
        finish_seconds, baseline=baseline, tested=len(data.test), batch_size=batch, budget=options.time_budget
    )
    if options.time_budget is None:
        epochs = options.epochs or max(DEFAULT_PASSES, math.ceil(DEFAULT_STEPS / per_pass))
        channels, pricing = _within_limits(options, data, size, genotype, options.channels or DEFAULT_CHANNELS)
        why = "as given" if options.epochs else f"at least {DEFAULT_STEPS} steps and {DEFAULT_PASSES} passes"
        per_step["model"] = widths.seconds(channels)
        phases = [p for network in NETWORKS for p in _fixed_phases(network, epochs, per_pass, per_step[network])]
        search = _search_sizes(options, data, search_channels, times["search"], None)
    else:
        budget = options.time_budget

        def room(step: float) -> float:
            """Seconds for search and training when a step of the network takes ``step``."""
            return usable_seconds(budget, finish(step)) - pricing

        widest = options.channels or widths.largest(lambda step: NETWORK_SHARE * room(step))
        channels, pricing = _within_limits(options, data, size, genotype, widest)
        why = (
            f"the largest for {MIN_PASSES:g} passes ({FEWEST_PASSES:g} while under {MIN_KEPT:,} weights would stay) "
            f"and {MIN_STEPS} steps"
        )
        per_step["model"] = widths.seconds(channels)
        usable = room(per_step["model"])
        phases = [
            timed_phase(network, name, usable * NETWORK_SHARE * share, per_pass, per_step[network])
            for network in NETWORKS
            for name, share in PHASES
        ]
        search = _search_sizes(options, data, search_channels, times["search"], usable * SEARCH_SHARE)
        if min(p.epochs * p.steps for p in phases) < 2:
            slowest = max(*per_step.values(), times["search"])
            raise _too_small(budget, (AIM * budget - usable + 3 * CHUNKS * slowest / SEARCH_SHARE) / AIM)
    search["seconds"] += pricing
    model = {"channels": channels, "cells": cells, "stem": stem}
    use["model"] = threads_for(widths.build(channels), shape, batch)
    stages = _stages(options, search, model, phases, why, finish(per_step["model"]))
    return Plan(stages, search, model, tuple(phases), {**times, **widths.times}, use)


def search_plan(options: Options, data: Data) -> Plan:
    """The plan of a search alone: all of the time budget, or a fixed number of epochs.

    Raises:
        UserError: If the budget is too small for one epoch of every part of the search.
    """
    options = at_width_of_table(options)
    shape, stem, channels = data.shape, stem_for(data.shape), options.search_channels or SEARCH_CHANNELS
    step, used = _time_search(options, shape, len(data.classes), stem)
    size = {"cells": cells_for(options), "stem": stem}
    genotype = open_space(options.space).random(stream(options.seed, "plan"))
    width, pricing = _within_limits(options, data, size, genotype, options.channels or DEFAULT_CHANNELS)
    limit = None if options.time_budget is None else AIM * options.time_budget - pricing
    search = _search_sizes(options, data, channels, step, limit, steps=ALONE_STEPS, passes=DEFAULT_PASSES)
    if limit is not None and search["seconds"] > 1.2 * limit:
        raise _too_small(options.time_budget or 0.0, (pricing + search["seconds"]) / AIM)
    search["seconds"] += pricing
    model = {"channels": width, **size}
    stages = _stages(options, search, model, [], "", 0.0)[:1]
    return Plan(stages, search, model, (), {"search": step}, {"search": used})


def _within_limits(
    options: Options, data: Data, size: dict[str, Any], genotype: Genotype, channels: int
) -> tuple[int, float]:
    """The width that limits leave (one that was asked for stays), and the seconds that they take."""
    if not Allowance(options, data, size).exists:
        return channels, 0.0
    allowed = [channels] if options.channels else [c for c in reversed(CHANNELS) if c <= channels]
    started = time.monotonic()
    channels, table = widest_within(options, data, size, genotype, allowed)
    return channels, time.monotonic() - started + table


def _time_search(options: Options, shape: tuple[int, int, int], classes: int, stem: Stem) -> tuple[float, int]:
    """Seconds of a search step, and the threads it has."""
    from netwright.design.search_stage import make_supernet

    supernet = make_supernet(options, shape, classes, options.search_channels or SEARCH_CHANNELS, stem)
    used = threads_for(supernet, shape, options.batch_size)
    with threads(used):
        # A first-order step runs the supernet on two batches.
        return 2 * step_seconds(training_step(supernet, shape, classes, options.batch_size), repeats=2), used


def cells_for(options: Options) -> int | None:
    """Cells of the network; a chain of layers has what it has."""
    return (options.cells or CELLS) if isinstance(open_space(options.space), spaces.Space) else options.cells


def _stages(
    options: Options, search: dict[str, Any], model: dict[str, Any], phases: list[Phase], why: str, finish: float
) -> tuple[dict[str, Any], ...]:
    """What the plan's table shows."""
    stages = [
        {
            "name": "search",
            "seconds": search["seconds"],
            "sizes": {"channels": search["channels"], "epochs": "+".join(map(str, search["epochs"]))},
            "why": f"{options.search.upper()} over {options.space} at {options.sparsity:.0%} sparsity",
        }
    ]
    same = "the same " + ("epochs" if options.time_budget is None else "seconds")
    shown = {
        "model": ({"channels": model["channels"], "cells": model["cells"]}, why),
        "baseline": ({"network": options.baseline}, same),
    }
    for phase in phases:
        sizes, reason = shown[phase.network]
        stages.append(
            {
                "name": f"{phase.network}: {phase.name}",
                "seconds": phase.seconds,
                "sizes": {**sizes, "epochs": phase.epochs, "steps": phase.epochs * phase.steps},
                "why": reason,
            }
        )
    stages.append({"name": "finish", "seconds": finish, "sizes": {}, "why": "export, measure, report"})
    return tuple(stages)


def usable_seconds(budget: float, finish: float) -> float:
    """What search and training may take of a time budget."""
    return AIM * budget - finish


def _time_baseline(options: Options, shape: tuple[int, int, int], classes: int) -> tuple[float, int]:
    """Seconds of a training step of the baseline, and the threads it has."""
    from netwright.design.model import baseline_network

    with seeded(options.seed, "plan"):
        network = baseline_network(options.baseline, shape, classes)
    try:
        used = threads_for(network, shape, options.batch_size)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the baseline {options.baseline} cannot take inputs of {' x '.join(map(str, shape))}",
            cure="choose another --baseline, or a --size that it can take",
        ) from error
    with threads(used):
        return step_seconds(training_step(network, shape, classes, options.batch_size)), used


def _too_small(budget: float, enough: float) -> UserError:
    return UserError(
        f"a time budget of {clock(budget)} is too small for one epoch of every stage",
        cure=f"give at least --time-budget {math.ceil(enough / 30) * 30}s, or a smaller --baseline",
    )


def _fixed_phases(network: str, epochs: int, per_pass: int, step: float) -> list[Phase]:
    return [
        Phase(
            network,
            name,
            max(1, round(share * epochs)),
            per_pass,
            max(1, round(share * epochs)) * per_pass * step,
        )
        for name, share in PHASES
    ]


def timed_phase(network: str, name: str, limit: float, per_pass: int, step: float) -> Phase:
    """The phase that fits ``limit`` seconds: about ``CHUNKS`` epochs, none of them longer than a pass."""
    steps = max(1, min(per_pass, math.floor(limit / CHUNKS / step)))
    epochs = max(1, math.floor(limit / (steps * step)))
    return Phase(network, name, epochs, steps, limit, limit)


class _Sizes:
    """What a width costs and leaves, for the networks of one genotype; everything is built and timed once."""

    def __init__(self, options: Options, genotype: Genotype, data: Data, cells: int | None, stem: Stem):
        self.options, self.genotype, self.data, self.cells, self.stem = options, genotype, data, cells, stem
        self.times: dict[str, float] = {}
        self._weights: dict[int, int] = {}

    def build(self, channels: int) -> nn.Module:
        """The network with a width."""
        with seeded(self.options.seed, "plan"):
            space = open_space(self.options.space)
            sizes = sizes_of(space, channels=channels, cells=self.cells, stem=self.stem)
            network: nn.Module = space.build(self.genotype, self.data.shape[0], len(self.data.classes), **sizes)
        return network

    def seconds(self, channels: int) -> float:
        """Of a training step."""
        key = f"model {channels}"
        if key not in self.times:
            network, shape, batch = self.build(channels), self.data.shape, self.options.batch_size
            self._weights[channels] = sum(p.numel() for p in network.parameters() if p.ndim > 1)
            with threads(threads_for(network, shape, batch)):
                self.times[key] = step_seconds(training_step(network, shape, len(self.data.classes), batch))
        return self.times[key]

    def kept(self, channels: int) -> float:
        """Weights that pruning leaves."""
        self.seconds(channels)
        return (1 - self.options.sparsity) * self._weights[channels]

    def largest(self, room: Callable[[float], float]) -> int:
        """The largest width that the seconds allow which a network has when a step of it takes so many."""
        per_pass = max(1, len(self.data.train) // self.options.batch_size)
        best = CHANNELS[0]
        for channels in CHANNELS[1:]:
            fewest = MIN_PASSES if self.kept(best) >= MIN_KEPT else FEWEST_PASSES
            step = self.seconds(channels)
            if step * max(per_pass * fewest, MIN_STEPS) > room(step):
                break
            best = channels
        return best


def refit(plan: Plan, options: Options, data: Data, genotype: Genotype, left: float) -> Plan:
    """The plan with the network's size chosen anew for the genotype that was found.

    Before the search the sizes rest on a random genotype, which may be slower or faster than the one found.

    Args:
        plan: The plan so far.
        options: The run's options.
        data: The data.
        genotype: What the search found.
        left: Seconds for the training of both networks.
    """
    if any(p.limit is None for p in plan.phases):
        return plan
    per_pass = max(1, len(data.train) // options.batch_size)
    found = _Sizes(options, genotype, data, plan.model["cells"], plan.model["stem"])
    # Limits were kept at the width of the plan: it stays.
    limited = Allowance(options, data, {}).exists
    channels = plan.model["channels"] if limited else options.channels or found.largest(lambda step: left / 2)
    step = found.seconds(channels)
    fitted = [timed_phase("model", name, max(left / 2 * share, step), per_pass, step) for name, share in PHASES]
    others = [p for p in plan.phases if p.network != "model"]
    return plan.amended(
        f"model: {channels} channels, {sum(p.epochs * p.steps for p in fitted)} steps",
        "timed again with the genotype that was found",
        model={**plan.model, "channels": channels},
        phases=(*fitted, *others),
        threads={**plan.threads, "model": threads_for(found.build(channels), data.shape, options.batch_size)},
        step_seconds={**plan.step_seconds, **{f"found {name}": value for name, value in found.times.items()}},
    )


def _search_sizes(
    options: Options,
    data: Data,
    channels: int,
    step: float,
    limit: float | None,
    steps: int = SEARCH_STEPS,
    passes: int = 1,
) -> dict[str, Any]:
    per_pass = max(1, len(data.train) // 2 // options.batch_size)
    # Random search has no epochs; it is planned as if it had, so that all methods leave as much to the training.
    shares = getattr(method(options.search), "shares", (1.0,))
    if limit is None:
        epochs = options.search_epochs or max(len(shares), passes, math.ceil(steps / per_pass))
        steps = per_pass
    else:
        steps = max(1, min(per_pass, math.floor(limit / 12 / step)))
        epochs = options.search_epochs or math.floor(limit / (steps * step))
    split = shared_out(epochs, shares)
    return {
        "channels": channels,
        "epochs": split,
        "steps": steps,
        "seconds": sum(split) * steps * step,
        "limit": limit,
    }
