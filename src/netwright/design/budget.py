"""A time budget while it is spent: how long the run has taken, what is left, and who gets it.

The plan shares the seconds out before anything has run. Whatever a stage then leaves, or takes too much, goes to those
that come after it: when a phase of training begins, the seconds that are left are shared out again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING

from netwright.design.distributed import is_main
from netwright.design.plan import NETWORKS, Phase, Plan, timed_phase, usable_seconds
from netwright.design.timing import finish_seconds

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.design.options import Options
    from netwright.design.run import RunFolder

# A phase whose seconds change by more than this share is put on record as a change of plan.
TOLD = 0.1


class RunClock:
    """Wall time of a run over all its sittings, kept in the folder.

    Args:
        run: The run folder.
    """

    def __init__(self, run: RunFolder):
        self.run = run
        self._before = float(run.read("work/clock.json")["seconds"]) if run.has("work/clock.json") else 0.0
        self._start = time.monotonic()

    def seconds(self) -> float:
        """So far."""
        return self._before + time.monotonic() - self._start

    def save(self) -> None:
        """Writes it down."""
        if is_main():
            self.run.write("work/clock.json", {"seconds": self.seconds()})


def steps_seen(run: RunFolder, plan: Plan) -> dict[str, float]:
    """Seconds of a training step of each network, as its last finished phase had them.

    Until a network has finished a phase, the planned seconds count, at the pace of the other network: a machine that
    has lost a core has lost it for both.
    """
    seen, pace = {}, 1.0
    for network in NETWORKS:
        planned = plan.step(network)
        for phase in (p for p in plan.phases if p.network == network):
            if run.has(f"work/{network}-{phase.name}.json"):
                history = run.read(f"work/{network}-{phase.name}.json")
                pace = history["seconds"] / (len(history["epochs"]) * phase.steps) / planned
        seen[network] = planned * pace
    return seen


def seconds_left(run: RunFolder, plan: Plan, options: Options, data: Data, used: float, exports: int = 4) -> float:
    """What the training that is still to come may take, so that the rest of the run ends in time.

    Args:
        run: The run folder, which tells how fast the phases were that are done.
        plan: The plan.
        options: The run's options; the budget among them.
        data: The data.
        used: Seconds so far.
        exports: Files of networks still to be written.
    """
    assert options.time_budget is not None
    steps, budget = steps_seen(run, plan), options.time_budget
    taken = steps["model"], steps["baseline"]
    finish = finish_seconds(*taken, len(data.test), options.batch_size, exports=exports, budget=budget)
    return usable_seconds(budget, finish) - used


def opened(plan: Plan, first: Phase, left: float, steps: dict[str, float], per_pass: int) -> Plan:
    """The plan with the seconds that are left shared out anew among a phase and those after it, in their proportions.

    Args:
        plan: The plan, under a time budget.
        first: The phase that begins now.
        left: Seconds for it and for all phases after it; a phase gets a step at least, even when nothing is left.
        steps: Seconds of a training step of each network.
        per_pass: Steps of one pass over the training part.
    """
    place = plan.phases.index(first)
    whole = sum(phase.limit or 0.0 for phase in plan.phases[place:])
    phases = list(plan.phases)
    for i, phase in enumerate(plan.phases[place:], start=place):
        limit = max(left * (phase.limit or 0.0) / whole, steps[phase.network])
        phases[i] = timed_phase(phase.network, phase.name, limit, per_pass, steps[phase.network])
    changed = dataclasses.replace(plan, phases=tuple(phases))
    before, now = first.limit or 0.0, phases[place].limit or 0.0
    if math.isclose(before, now, rel_tol=TOLD):
        return changed
    told = f"{first.network}: {first.name} has {now:.0f} s in place of {before:.0f} s"
    return changed.amended(told, "what was left when it began")
