"""Tables, clock and devices in experiments, on networks that wait for a known time."""

from __future__ import annotations

import math
import time

import pytest
from scipy.stats import spearmanr
from torch import nn

from netwright.papers import latencies
from netwright.papers.run import Run
from netwright.search import spaces
from netwright.search.latency import CONSTANT, predict
from netwright.search.random_search import uniform_genotypes
from netwright.search.spaces.choices import ChoiceSpace

pytestmark = pytest.mark.usefixtures("even")
SHAPE = (1, 4, 4)
SETTINGS = {"batch": 2, "threads": 1, "repeats": 3}


class Wait(nn.Module):
    def __init__(self, milliseconds):
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, x):
        time.sleep(self.milliseconds / 1e3)
        return x


def network(choose, in_channels, num_classes):
    return nn.Sequential(
        choose("a", {"1 ms": lambda: Wait(1), "20 ms": lambda: Wait(20)}),
        choose("b", {"skip": nn.Identity, "10 ms": lambda: Wait(10)}),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(in_channels, num_classes),
    )


@pytest.fixture
def space():
    return spaces.register(ChoiceSpace("waiting-experiment", network, shape=(4, 4)))


def test_a_table_foretells_times_that_add_up(space):
    found = latencies.tables(space, SHAPE, {"here": SETTINGS}, 4)
    table = latencies.read({name: [value] for name, value in found.items()}, "here")
    assert (table.batch, table.threads) == (2, 1)
    assert {key[0] for key in table if key != CONSTANT} == {"1 ms", "20 ms", "10 ms"}
    drawn = uniform_genotypes(space, 4, seed=0)
    assert found["here: predicted, ms"] == [predict(space, genotype, table, SHAPE) for genotype in drawn]
    least = [sum(int(name.split()[0]) for _, name in g.decisions if name != "skip") for g in drawn]
    assert all(ms >= shortest for ms, shortest in zip(found["here: measured, ms"], least, strict=True))
    assert sorted(least) == [1, 11, 20, 30]
    assert found["here: Pearson"] > 0.8


def test_a_measurement_is_the_mean_of_draws(space, monkeypatch):
    seen = []

    def measured_all(space, genotypes, shape, *, setup, seed):
        seen.append(seed)
        return [number + 10.0 * seed for number in range(len(genotypes))]

    monkeypatch.setattr("netwright.search.latency.measured_all", measured_all)
    found = latencies.tables(space, SHAPE, {"here": SETTINGS}, 4, draws=3)
    assert seen == [0, 1, 2, 3, 4, 5]
    assert found["here: measured, ms"] == [10.0, 11.0, 12.0, 13.0]
    assert found["here: Spearman, again"] == pytest.approx(1.0)


def test_agreement_by_hand():
    found = latencies.agreement([1.0, 2.0, 4.0], [2.0, 4.0, 5.0])
    assert found["constant, ms"] == 1.0
    assert found["median relative error"] == 0.0
    assert found["largest relative error"] == pytest.approx(1 / 4)
    assert found["median relative error, no constant"] == 0.5
    assert found["Spearman"] == pytest.approx(spearmanr([1, 2, 4], [2, 4, 5])[0])
    # gaps of -4/3, -1/3, 5/3 and -5/3, 1/3, 4/3
    assert found["Pearson"] == pytest.approx((20 / 9 - 1 / 9 + 20 / 9) / math.sqrt(42 / 9 * 42 / 9))


def known(seed, genotypes, settings):
    """A clock that is a formula: the sum of the waits, times the batch for one kind of operation."""
    return {
        "ms": [sum(settings["batch"] ** (name == "20 ms") * NUMBERS[name] for name in g.values()) for g in genotypes]
    }


NUMBERS = {"1 ms": 1.0, "20 ms": 20.0, "skip": 0.0, "10 ms": 10.0}


def test_equal_architectures_are_measured_once(tmp_path):
    asked = []

    def function(seed, genotypes, settings):
        asked.append((seed, len(genotypes)))
        return known(seed, genotypes, settings)

    (tmp_path / "arms").mkdir()
    first, second = {"a": "1 ms", "b": "10 ms"}, {"a": "20 ms", "b": "skip"}
    ms = latencies.clocked(Run("rarts", out=tmp_path), "clock", [first, second, dict(first)], function, {"batch": 1})
    assert asked == [(0, 2)]
    assert (ms(first), ms(dict(second))) == (11.0, 20.0)


def test_networks_for_devices_are_compared_on_each(tmp_path):
    (tmp_path / "arms").mkdir()
    small, large = {"a": "1 ms", "b": "10 ms"}, {"a": "20 ms", "b": "skip"}
    devices = {"one": {"batch": 1}, "two": {"batch": 3}}
    own = {"one": [large, small], "two": [small, small]}
    found = latencies.specialised(Run("rarts", out=tmp_path), own, known, devices)
    assert found["one: own / other"] == [20 / 11, 1.0]
    assert found["two: own / other"] == [11 / 60, 1.0]
    assert found["log ratio"] == pytest.approx([(math.log(20 / 11) + math.log(11 / 60)) / 2, 0.0])


def test_the_clock_of_an_experiment_measures_plain_values(space):
    slow, fast = (space.genotype({"a": a, "b": "skip"}).to_dict() for a in ("20 ms", "1 ms"))
    ms = latencies.clock(space, SHAPE, [slow, fast], SETTINGS)["ms"]
    assert ms[0] >= 20
    assert ms[1] >= 1
    assert ms[1] < ms[0]
