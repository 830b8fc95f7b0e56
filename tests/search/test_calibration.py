"""Tables corrected by whole networks, against truths that are known."""

from __future__ import annotations

import numpy as np
import pytest

from netwright.search.calibration import calibrate


def networks(rng: np.random.Generator, operations: int, count: int, layers: int = 8) -> list[list[int]]:
    return [rng.integers(operations, size=rng.integers(layers // 2, layers + 1)).tolist() for _ in range(count)]


def summed(table, constant, drawn):
    return np.array([constant + sum(table[key] for key in keys) for keys in drawn])


@pytest.mark.parametrize("seed", range(5))
def test_overhead_stretch_and_constant_are_found(seed: int):
    rng = np.random.default_rng(seed)
    table = dict(enumerate(rng.uniform(0.05, 1.0, size=20)))
    truth = {key: 0.03 + 0.8 * ms for key, ms in table.items()}
    drawn, others = networks(rng, 20, 25), networks(rng, 20, 50)
    found, constant = calibrate(table, 0.1, drawn, summed(truth, 0.7, drawn))
    assert constant == pytest.approx(0.7, rel=1e-3)
    assert list(found.values()) == pytest.approx(list(truth.values()), rel=1e-3)
    assert summed(found, constant, others) == pytest.approx(summed(truth, 0.7, others), rel=1e-3)


@pytest.mark.parametrize("seed", range(5))
def test_operations_of_their_own_kind_are_corrected_one_by_one(seed: int):
    """Noise of 1 % in the calls, 30 % in the table: other networks are foretold far better than by the table."""
    rng = np.random.default_rng(seed)
    truth = dict(enumerate(rng.uniform(0.05, 1.0, size=20)))
    table = {key: ms * rng.lognormal(0.0, 0.3) for key, ms in truth.items()}
    drawn, others = networks(rng, 20, 60), networks(rng, 20, 50)
    found, constant = calibrate(table, 0.5, drawn, summed(truth, 0.5, drawn) * rng.normal(1, 0.01, size=60))
    right = summed(truth, 0.5, others)
    before, after = (np.median(np.abs(summed(*each, others) / right - 1)) for each in ((table, 0.5), (found, constant)))
    assert after < 0.25 * before


@pytest.mark.parametrize("seed", range(5))
def test_noise_alone_leaves_a_good_table_as_it_is(seed: int):
    rng = np.random.default_rng(seed)
    table = dict(enumerate(rng.uniform(0.05, 1.0, size=20)))
    drawn, others = networks(rng, 20, 20), networks(rng, 20, 50)
    found = calibrate(table, 0.5, drawn, summed(table, 0.5, drawn) * rng.normal(1, 0.02, size=20))
    assert np.abs(summed(*found, others) / summed(table, 0.5, others) - 1).max() < 0.06


def test_an_operation_that_no_network_holds_follows_the_others():
    rng = np.random.default_rng(0)
    table = dict(enumerate(rng.uniform(0.1, 1.0, size=10)))
    drawn = networks(rng, 9, 30)
    found, _ = calibrate(table, 0.0, drawn, summed({key: 2 * ms for key, ms in table.items()}, 0.2, drawn))
    assert found[9] == pytest.approx(2 * table[9], rel=1e-2)


def test_no_operation_loses_its_price():
    table = {"a": 0.01, "b": 1.0}
    found, constant = calibrate(table, 0.0, [["a"], ["b"], ["a", "b"], ["a", "a", "b"]], [0.5, 2.0, 1.8, 1.6])
    assert all(found[key] >= 0.1 * ms for key, ms in table.items())
    assert constant >= 0


@pytest.mark.parametrize(
    ("drawn", "times", "message"),
    [
        ([["a"]], [1.0], "networks must be >= 2 with one time each, got 1 with 1 times"),
        ([["a"], ["a"]], [1.0], "got 2 with 1 times"),
        ([["a"], ["a"]], [1.0, 0.0], "milliseconds must be > 0, got 0.0"),
        ([["a"], ["c"]], [1.0, 1.0], "networks must hold operations of the table, got 'c'"),
    ],
)
def test_bad_input_is_named(drawn, times, message):
    with pytest.raises(ValueError, match=message):
        calibrate({"a": 1.0}, 0.0, drawn, times)
