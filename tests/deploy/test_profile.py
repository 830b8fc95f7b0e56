"""Time by step: figures, text, picture."""

import json

import pytest

from netwright.deploy.profile import MOST_BARS, Profile

STEPS = [("stem", "dense", 3000, 2e-6), ("", "pool", 0, 1e-6), ("head", "sparse", 500, 1e-6)]


def test_shares_and_rates_follow_from_the_times():
    found = Profile.of(STEPS, 5e-6, "native", 2, 20)
    assert [step.share for step in found.steps] == [0.5, 0.25, 0.25]
    assert [step.microseconds for step in found.steps] == pytest.approx([2, 1, 1])
    assert [step.gflops for step in found.steps] == pytest.approx([3, 0, 1])
    assert (found.step_microseconds, found.call_microseconds) == pytest.approx((4, 5))


def test_a_clock_that_stands_still_divides_nothing():
    found = Profile.of([("a", "b", 10, 0.0)], 0.0, "native", 1, 1)
    assert (found.steps[0].share, found.steps[0].gflops) == (0, 0)


def test_the_text_is_a_table():
    lines = str(Profile.of(STEPS, 5e-6, "native", 2, 20)).splitlines()
    assert lines[0].split() == ["layer", "kernel", "us", "%", "GFLOP/s"]
    assert lines[1].split() == ["stem", "dense", "2.0", "50.0", "3.0"]
    assert lines[-1] == "4.0 us in 3 steps, 5.0 us a call, native, 2 threads"


def test_it_is_data_and_a_picture():
    found = Profile.of(STEPS * 20, 5e-6, "torch", 1, 20)
    assert json.loads(json.dumps(found.to_dict()))["steps"][0]["path"] == "stem"
    ax = found.plot()
    assert len(ax.patches) == MOST_BARS
    assert ax.get_xlabel() == "microseconds"
    assert [patch.get_width() for patch in ax.patches[:3]].count(2e-6 * 1e6) >= 1
