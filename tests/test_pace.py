"""The processor's pace, on work whose time the test decides."""

from __future__ import annotations

import itertools
import time

import pytest

from netwright.cost import alternate
from netwright.cost.pace import CALLS, Pace
from netwright.search.turns import usual


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands unless the test moves it."""

    class Clock:
        def __init__(self):
            self.seconds, self.speed = 0.0, 1.0

        def spend(self, seconds):
            self.seconds += seconds / self.speed

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.seconds)
    return clock


def test_pace_is_the_work_s_time_over_its_shortest(clock):
    pace = Pace(lambda: clock.spend(1e-6))
    assert pace.now() == 1.0
    clock.speed = 0.5
    assert pace.now() == pytest.approx(2.0)
    clock.speed = 2.0
    assert pace.now() == 1.0  # a new best
    clock.speed = 1.0
    assert pace.now() == pytest.approx(2.0)


def test_the_work_s_median_counts_not_one_slow_call(clock):
    spent = itertools.cycle([50e-6] * (CALLS // 3) + [1e-6] * (CALLS - CALLS // 3))
    pace = Pace(lambda: clock.spend(next(spent)))
    assert pace.now() == 1.0
    assert pace.best == pytest.approx(1e-6)


def test_times_are_those_of_the_best_pace(clock):
    pace = Pace(lambda: clock.spend(1e-6))

    def turn():
        start = clock.seconds
        clock.spend(3e-3)
        return [clock.seconds - start]

    assert pace.at_best(turn) == pytest.approx([3e-3])
    clock.speed = 0.625
    assert pace.at_best(turn) == pytest.approx([3e-3])


def test_a_change_within_a_turn_only_lengthens_its_times(clock):
    pace = Pace(lambda: clock.spend(1e-6))
    pace.now()

    def turn():
        start = clock.seconds
        clock.spend(1e-3)
        clock.speed = 0.5
        clock.spend(1e-3)
        return [clock.seconds - start]

    assert pace.at_best(turn) == pytest.approx([3e-3])  # 2e-3 at the best pace


def test_a_slow_half_of_the_rounds_does_not_show_in_their_quartile(clock):
    pace = Pace(lambda: clock.spend(1e-6))

    def turn():
        start = clock.seconds
        clock.spend(2e-3)
        clock.speed = 1.5 - clock.speed  # 1.0 and 0.5 in turns
        return [clock.seconds - start]

    taken = alternate({"network": lambda: pace.at_best(turn)}, rounds=10)["network"]
    assert taken.max() == pytest.approx(4e-3)  # slow within, fast afterwards
    assert usual(taken) == pytest.approx(2.0)
