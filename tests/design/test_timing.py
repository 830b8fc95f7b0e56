"""What is timed, and what the end of a run is expected to take."""

from __future__ import annotations

import math

import pytest
import torch

from netwright.cost import count
from netwright.design import timing
from netwright.design.timing import finish_seconds, step_seconds, threads_for, training_step

SHAPE = (1, 8, 8)


def test_threads_for_small_and_large_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer = torch.nn.Conv2d(1, 4, 3, padding=1)
    macs = count(layer, SHAPE).macs
    enough = math.ceil(timing.THREADED_MACS / macs)
    assert threads_for(layer, SHAPE, enough - 1) == 1
    assert threads_for(layer, SHAPE, enough) == 2


def test_step_seconds_takes_the_median_and_leaves_out_the_first(monkeypatch: pytest.MonkeyPatch):
    now, took = [0.0], iter([100.0, 3.0, 1.0, 2.0, 50.0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def step() -> None:
        now[0] += next(took)

    assert step_seconds(step, repeats=3, most=100.0) == 2.0
    # A slow step is timed once: a second one would exceed what may be spent.
    now[0], took = 0.0, iter([7.0, 7.0])
    assert step_seconds(step, repeats=3, most=6.0) == 7.0


def test_a_training_step_trains():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(72, 3))
    before = network[2].weight.detach().clone()
    training_step(network, SHAPE, 3, 4)()
    assert not torch.equal(network[2].weight, before)


class TestFinish:
    def test_every_part_counts(self):
        plain = finish_seconds(0.1, 0.3, 1000, 64)
        assert finish_seconds(0.2, 0.3, 1000, 64) > plain
        assert finish_seconds(0.1, 0.4, 1000, 64) > plain
        assert finish_seconds(0.1, 0.3, 2000, 64) > plain
        assert finish_seconds(0.1, 0.3, 1000, 64, exports=1) == pytest.approx(plain - 3 * timing.EXPORT_SECONDS)

    def test_radii_take_a_twentieth_of_a_short_budget(self):
        without = finish_seconds(0.1, 0.3, 1000, 64, budget=0.0)
        assert finish_seconds(0.1, 0.3, 1000, 64, budget=60.0) == pytest.approx(without + 3.0)
        assert finish_seconds(0.1, 0.3, 1000, 64, budget=6000.0) == pytest.approx(without + timing.RADII_SECONDS)
        assert finish_seconds(0.1, 0.3, 1000, 64) == pytest.approx(without + timing.RADII_SECONDS)

    def test_passes_over_a_large_test_part(self):
        """Each network is measured before and after pruning, and the file of the designed one is checked."""
        one_pass = 0.1 / 3 * 1e6 / 50
        assert finish_seconds(0.1, 0.1, 10**6, 50) == pytest.approx(5 * one_pass, rel=0.02)
