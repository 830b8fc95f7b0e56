"""Searches in a given wall time, against a clock that the test turns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from netwright.search import deadline, searcher, spaces
from netwright.search.deadline import Deadline, Rehearsal, rehearse
from netwright.search.searcher import Searcher
from netwright.search.stages import Stage

BATCH = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


class Step:
    """A step that only takes time: ``costs`` seconds, the warm-up's without the architecture."""

    def __init__(self, clock, search, warmup=0.0, phased=False):
        self.clock, self.search, self.warmup, self.phased, self.steps = clock, search, warmup, phased, 0

    def step(self, supernet, objective, w_opt, a_opt, train_batch, val_batch, *, clip=None):
        self.clock.now += self.warmup if a_opt is None else self.search
        self.steps += 1
        return {"train_loss": 1.0}


class Selector:
    """Takes a second a validation batch."""

    def __init__(self, clock):
        self.clock = clock

    def select(self, supernet, train=None, val=None, *, seed=0):
        self.clock.now += len(val)
        return supernet.derive()


@pytest.fixture
def clock(monkeypatch):
    found = SimpleNamespace(now=100.0)
    found.perf_counter = lambda: found.now
    monkeypatch.setattr(searcher, "time", found)
    monkeypatch.setattr(deadline, "time", found)
    return found


def make(step, *epochs, selector=None):
    names = ("search",) if len(epochs) == 1 else ("warmup", "search")
    stages = [Stage(name, number, alpha_step=name == "search") for name, number in zip(names, epochs, strict=True)]
    supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2, seed=0)
    return Searcher(supernet, stages=stages, method=step, selector=selector)


def test_the_pace_of_every_stage_and_of_the_selection(clock):
    step = Step(clock, search=0.5, warmup=0.25)
    rehearsal = rehearse(make(step, 2, 3, selector=Selector(clock)), [BATCH] * 30, [BATCH] * 12, seed=0, batches=4)
    assert rehearsal.stages == pytest.approx({"warmup": 30 * 0.25, "search": 30 * 0.5})
    assert rehearsal.selection == 12.0
    assert step.steps == 4 * (2 + 3)


def test_an_epoch_of_phases_has_both_kinds_of_batches(clock):
    step = Step(clock, search=1.0, phased=True)
    rehearsal = rehearse(make(step, 2), [BATCH] * 10, [BATCH] * 30, seed=0, batches=5)
    assert rehearsal.stages == {"search": 40.0}


def test_a_loader_shorter_than_the_rehearsal_is_used_whole(clock):
    assert rehearse(make(Step(clock, 1.0), 1), [BATCH] * 2, [BATCH], seed=0, batches=5).stages == {"search": 2.0}


@pytest.mark.parametrize(
    ("seconds", "epochs"), [(40.0, [5, 15]), (75.0, [10, 30]), (5.0, [1, 1]), (1.0, [1, 1]), (12.1, [1, 3])]
)
def test_epochs_that_end_nearest_to_the_time(seconds, epochs):
    assert Rehearsal({"warmup": 1.0, "search": 2.0}, selection=5.0).epochs(seconds, (0.25, 0.75)) == epochs


@pytest.mark.parametrize(("real", "epochs"), [(1.0, 10), (2.0, 5), (0.5, 20), (30.0, 1), (0.96, 10), (0.94, 11)])
def test_a_search_ends_at_the_epoch_nearest_to_the_time(clock, real, epochs):
    """Ten epochs of a second were planned; what they really take decides."""
    search = make(Step(clock, real), 10)
    result = search.search([BATCH], [BATCH], seed=0, on_epoch=Deadline(10.0, Rehearsal({"search": 1.0})))
    assert len(result.epochs) == epochs
    assert result.wall_time == pytest.approx(epochs * real)


@pytest.mark.parametrize(("selection", "epochs"), [(3.0, 7), (9.0, 1), (20.0, 1)])
def test_the_selection_is_part_of_the_time(clock, selection, epochs):
    search = make(Step(clock, 1.0), 10)
    rehearsal = Rehearsal({"search": 1.0}, selection)
    assert len(search.search([BATCH], [BATCH], seed=0, on_epoch=Deadline(10.0, rehearsal)).epochs) == epochs


def test_the_learning_rate_still_comes_to_its_end(clock):
    search = make(Step(clock, 0.2), 10)
    result = search.search([BATCH] * 10, [BATCH] * 10, seed=0, on_epoch=Deadline(10.0, Rehearsal({"search": 1.0})))
    rates = [epoch["lr"] for epoch in result.epochs]
    assert len(rates) == 5
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.1 * rates[0]


def test_stages_keep_their_proportions_and_none_is_lost(clock):
    def lengths(seconds):
        search = make(Step(clock, search=2.0, warmup=2.0), 4, 12)
        rehearsal = Rehearsal({"warmup": 1.0, "search": 1.0})
        search.search([BATCH], [BATCH], seed=0, on_epoch=Deadline(seconds, rehearsal))
        return [stage.epochs for stage in search.stages]

    # The first warm-up epoch takes 2 s instead of 1; the search's pace is only seen when it begins.
    assert lengths(16.0) == [3, 5]
    assert lengths(3.0) == [1, 1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Rehearsal({"search": 1.0}).epochs(0.0, (1.0,)), "seconds must be > 0 and finite, got 0.0"),
        (lambda: Rehearsal({"search": 1.0}).epochs(1.0, (0.5, 0.5)), "shares must be 1 numbers > 0"),
        (lambda: Rehearsal({"search": 1.0}).epochs(1.0, (0.0,)), "shares must be 1 numbers > 0"),
        (lambda: Deadline(-1.0, Rehearsal()), "seconds must be > 0 and finite, got -1.0"),
    ],
)
def test_refusals(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_rehearsal_needs_batches_and_epochs(clock):
    with pytest.raises(ValueError, match="batches must be >= 1, got 0"):
        rehearse(make(Step(clock, 1.0), 1), [BATCH], [BATCH], seed=0, batches=0)
    with pytest.raises(ValueError, match="epochs of stage 'warmup' must be >= 1"):
        rehearse(make(Step(clock, 1.0), 0, 1), [BATCH], [BATCH], seed=0)
    with pytest.raises(ValueError, match="val must hold at least 1 batch"):
        rehearse(make(Step(clock, 1.0), 1), [BATCH], [], seed=0)
