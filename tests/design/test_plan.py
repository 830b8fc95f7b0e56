"""The plan under a budget, on a machine whose steps take as long as the test says."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest

from netwright.console import UserError
from netwright.cost import count
from netwright.data import load
from netwright.design import plan as planning
from netwright.design.options import Options
from netwright.design.plan import Phase, Plan, make_plan, refit, stem_for
from netwright.search import spaces
from netwright.seeding import stream

SHAPE, BATCH = (1, 8, 8), 64


@pytest.fixture(scope="module")
def data():
    return load("digits")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """Sets the speed of the machine: a step takes a fixed time and one that grows with the multiply-adds."""

    def at(macs_per_second: float, overhead: float = 0.002) -> None:
        def fake_step(network, shape, classes, batch_size):
            return lambda: overhead + 3 * count(network, shape).macs * batch_size / macs_per_second

        monkeypatch.setattr(planning, "training_step", fake_step)
        monkeypatch.setattr(planning, "step_seconds", lambda step, **_: step())

    return at


def options(budget: float | None = None, **more) -> Options:
    return Options(data="digits", baseline="small_convnet", space="micro-darts-2-shared", time_budget=budget, **more)


def total(plan: Plan, network: str) -> float:
    return sum(p.seconds for p in plan.phases if p.network == network)


class TestBudget:
    @pytest.mark.parametrize("budget", [60.0, 120.0, 900.0])
    @pytest.mark.parametrize("speed", [2e9, 2e10])
    def test_the_shares_add_up(self, machine, data, budget: float, speed: float):
        machine(speed)
        plan = make_plan(options(budget), data)
        finish = plan.stages[-1]["seconds"]
        usable = planning.AIM * budget - finish
        assert plan.seconds <= budget
        assert plan.search["limit"] == pytest.approx(planning.SEARCH_SHARE * usable)
        assert total(plan, "model") == pytest.approx(total(plan, "baseline"))
        assert total(plan, "model") + total(plan, "baseline") + plan.search["limit"] == pytest.approx(usable)
        # One epoch more or less of each of the three stages is the most that rounding can cost.
        assert plan.search["seconds"] <= plan.search["limit"] + 3 * plan.search["steps"] * plan.step_seconds["search"]

    @pytest.mark.parametrize("speed", [2e9, 2e10])
    def test_the_steps_fit_their_seconds(self, machine, data, speed: float):
        machine(speed)
        plan = make_plan(options(120.0), data)
        step = {
            "model": plan.step_seconds[f"model {plan.model['channels']}"],
            "baseline": plan.step_seconds["baseline"],
        }
        for phase in plan.phases:
            expected = phase.epochs * phase.steps * step[phase.network]
            epoch = phase.steps * step[phase.network]
            assert phase.limit is not None
            assert phase.limit - epoch - 1e-9 <= expected <= phase.limit + 1e-9, phase
            assert phase.epochs >= planning.CHUNKS, "an amended plan could not anneal"

    def test_a_larger_budget_never_gives_a_smaller_network(self, machine, data):
        machine(3e9)
        found = [make_plan(options(budget), data).model["channels"] for budget in (60, 90, 150, 300, 900, 3600)]
        assert found == sorted(found)
        assert found[0] < found[-1], "the budget must matter"
        assert set(found) <= set(planning.CHANNELS)

    def test_a_faster_machine_never_gives_a_smaller_network(self, machine, data):
        found = []
        for speed in (1e9, 4e9, 1.6e10):
            machine(speed)
            found.append(make_plan(options(150.0), data).model["channels"])
        assert found == sorted(found)
        assert found[0] < found[-1]

    @pytest.mark.parametrize(("sparsity", "passes"), [(0.0, planning.MIN_PASSES), (0.95, planning.FEWEST_PASSES)])
    def test_the_network_is_the_largest_that_fits(self, machine, data, monkeypatch, sparsity: float, passes: float):
        monkeypatch.setattr(planning, "MIN_KEPT", 0 if sparsity == 0 else 10**9)
        machine(1.5e9)
        plan = make_plan(options(200.0, sparsity=sparsity), data)
        per_pass = len(data.train) // BATCH
        fits = [
            channels
            for channels in planning.CHANNELS
            if f"model {channels}" in plan.step_seconds
            and plan.step_seconds[f"model {channels}"] * max(per_pass * passes, planning.MIN_STEPS)
            <= total(plan, "model")
        ]
        assert plan.model["channels"] == max(fits)
        assert plan.model["channels"] < planning.CHANNELS[-1]

    def test_a_network_that_would_starve_is_made_wider(self, machine, data, monkeypatch):
        machine(1.5e9)
        monkeypatch.setattr(planning, "MIN_STEPS", 1)
        monkeypatch.setattr(planning, "MIN_KEPT", 0)
        fed = make_plan(options(200.0), data).model["channels"]
        monkeypatch.setattr(planning, "MIN_KEPT", 10**9)
        assert make_plan(options(200.0), data).model["channels"] > fed

    @pytest.mark.parametrize("speed", [1e9, 4e9, 1.6e10])
    def test_few_data_do_not_mean_few_steps(self, machine, data, monkeypatch, speed: float):
        machine(speed)
        monkeypatch.setattr(planning, "MIN_KEPT", 10**9)
        passes = len(data.train) // BATCH
        assert passes < planning.MIN_STEPS
        plan = make_plan(options(150.0), data)
        assert plan.model["channels"] == planning.CHANNELS[0] or plan.steps("model") >= 0.9 * planning.MIN_STEPS

    @pytest.mark.parametrize("speed", [1e8, 1e9, 1e10])
    def test_too_small_and_what_is_enough(self, machine, data, speed: float):
        machine(speed)
        with pytest.raises(UserError, match="too small for one epoch of every stage") as caught:
            make_plan(options(4.0), data)
        enough = float(re.search(r"--time-budget (\d+)s", str(caught.value))[1])
        plan = make_plan(options(enough), data)
        assert plan.seconds <= enough
        assert min(p.epochs for p in plan.phases) >= 1

    def test_given_sizes_are_taken(self, machine, data):
        machine(2e10)
        plan = make_plan(options(120.0, channels=6, cells=2, search_channels=3, search_epochs=4), data)
        assert (plan.model["channels"], plan.model["cells"], plan.search["channels"]) == (6, 2, 3)
        assert sum(plan.search["epochs"]) == pytest.approx(4, abs=1)


class TestFixedSizes:
    def test_no_clock_is_looked_at(self, machine, data):
        machine(1e9)
        plan = make_plan(options(epochs=8, search_epochs=5), data)
        assert all(p.limit is None for p in plan.phases)
        assert plan.search["limit"] is None
        for network in ("model", "baseline"):
            assert sum(p.epochs for p in plan.phases if p.network == network) == pytest.approx(8, abs=1)
            assert all(p.steps == len(data.train) // BATCH for p in plan.phases)

    def test_speed_changes_seconds_but_no_sizes(self, machine, data):
        machine(1e9)
        slow = make_plan(options(), data)
        machine(1e10)
        fast = make_plan(options(), data)
        assert slow.model == fast.model
        assert [(p.epochs, p.steps) for p in slow.phases] == [(p.epochs, p.steps) for p in fast.phases]
        assert slow.search["epochs"] == fast.search["epochs"]
        assert slow.seconds > fast.seconds

    def test_threads_are_part_of_the_plan(self, machine, data):
        machine(1e9)
        assert make_plan(options(), data).threads == {"baseline": 1, "search": 1, "model": 1}


class TestRefit:
    def test_without_a_budget_nothing_changes(self, machine, data):
        machine(1e9)
        plan = make_plan(options(), data)
        found = spaces.get(options().space).random(stream(5, "x"))
        assert refit(plan, options(), data, found, math.inf) is plan

    def test_a_machine_that_got_slower_gives_a_smaller_network_in_the_same_seconds(self, machine, data):
        machine(4e9)
        chosen = options(200.0)
        plan = make_plan(chosen, data)
        machine(4e8)
        left = total(plan, "model") + total(plan, "baseline")
        fitted = refit(plan, chosen, data, spaces.get(chosen.space).random(stream(5, "x")), left)
        assert fitted.model["channels"] < plan.model["channels"]
        assert total(fitted, "model") == pytest.approx(total(plan, "model"))
        assert [p for p in fitted.phases if p.network == "baseline"] == [
            p for p in plan.phases if p.network == "baseline"
        ]
        assert fitted.step("model") == fitted.step_seconds[f"found model {fitted.model['channels']}"]
        for phase in (p for p in fitted.phases if p.network == "model"):
            assert phase.epochs * phase.steps * fitted.step("model") <= phase.limit + 1e-9
        assert fitted.amendments[-1]["why"] == "timed again with the genotype that was found"

    def test_a_width_that_the_first_plan_never_timed(self, machine, data):
        machine(2e8)
        chosen = options(200.0)
        plan = make_plan(chosen, data)
        machine(2e13)
        left = 4 * (total(plan, "model") + total(plan, "baseline"))
        fitted = refit(plan, chosen, data, spaces.get(chosen.space).random(stream(5, "x")), left)
        assert f"model {fitted.model['channels']}" not in plan.step_seconds
        assert fitted.step("model") == fitted.step_seconds[f"found model {fitted.model['channels']}"]

    def test_what_the_search_left_makes_the_network_larger(self, machine, data):
        machine(2e9)
        chosen = options(120.0)
        plan, found = make_plan(chosen, data), spaces.get(chosen.space).random(stream(5, "x"))
        left = total(plan, "model") + total(plan, "baseline")
        widths = [refit(plan, chosen, data, found, share * left).model["channels"] for share in (0.5, 1.0, 4.0)]
        assert widths == sorted(widths)
        assert widths[0] < widths[-1]

    def test_given_channels_stay(self, machine, data):
        machine(4e9)
        chosen = options(200.0, channels=8)
        plan = make_plan(chosen, data)
        machine(4e8)
        found = spaces.get(chosen.space).random(stream(5, "x"))
        assert refit(plan, chosen, data, found, 100.0).model["channels"] == 8

    def test_a_run_that_is_late_still_has_a_step_for_each_phase(self, machine, data):
        machine(4e9)
        chosen = options(200.0)
        plan = make_plan(chosen, data)
        fitted = refit(plan, chosen, data, spaces.get(chosen.space).random(stream(5, "x")), -20.0)
        assert all(p.epochs * p.steps >= 1 and p.limit > 0 for p in fitted.phases)


@pytest.fixture
def small_plan() -> Plan:
    phases = tuple(
        Phase(network, name, epochs=8, steps=5, seconds=4.0, limit=4.0)
        for network in ("model", "baseline")
        for name, _ in planning.PHASES
    )
    search = {"channels": 8, "epochs": [1, 1, 1], "steps": 3, "seconds": 2.0, "limit": 2.0}
    stages = ({"name": "search", "seconds": 2.0, "sizes": {"channels": 8}, "why": "asked"},)
    return Plan(stages, search, {"channels": 8, "cells": 3, "stem": "cifar"}, phases, {"model 8": 0.1}, {"model": 1})


class TestChanges:
    def test_with_change_touches_one_phase_and_is_on_record(self, small_plan: Plan):
        changed = small_plan.with_change("model", "prune", 3, 6).with_change("model", "prune", 4, 5)
        assert changed.phase("model", "prune").changes == ((3, 6), (4, 5))
        others = [p for p in changed.phases if (p.network, p.name) != ("model", "prune")]
        assert all(p == small_plan.phase(p.network, p.name) for p in others)
        assert [a["what"] for a in changed.amendments] == ["model: prune has 6 epochs", "model: prune has 5 epochs"]
        assert small_plan.amendments == ()

    def test_replayed_keeps_the_epochs_and_forgets_the_clock(self, small_plan: Plan):
        replayed = small_plan.with_change("model", "prune", 3, 6).replayed()
        assert all(p.limit is None for p in replayed.phases)
        assert replayed.search == {**small_plan.search, "limit": None}
        assert replayed.phase("model", "prune").changes == ((3, 6),)
        assert [p.epochs for p in replayed.phases] == [p.epochs for p in small_plan.phases]

    def test_round_trip(self, small_plan: Plan):
        plan = small_plan.with_change("baseline", "finetune", 3, 6)
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan

    def test_text(self, small_plan: Plan):
        assert str(small_plan).splitlines()[1].split() == ["search", "2", "s", "channels", "8", "asked"]
        assert str(small_plan).endswith("in all about 2 s")


@pytest.mark.parametrize(
    ("side", "stem"), [(8, "cifar"), (19, "cifar"), (20, "strided"), (95, "strided"), (96, "imagenet")]
)
def test_stem(side: int, stem: str):
    assert stem_for((3, side, 8)) == stem
    assert stem_for((1, 8, side)) == stem


def test_plans_are_immutable(small_plan: Plan):
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_plan.threads = {}  # type: ignore[misc]
