"""How hyper-parameters of an experiment are chosen."""

from __future__ import annotations

import pytest

from netwright.papers.run import Run
from netwright.papers.tuning import TUNING_SEED, best, best_inside


def test_the_best_value_is_tried_with_a_seed_of_its_own(tmp_path):
    run = Run("rarts", seeds=2, out=tmp_path)
    seen = []

    def arm(seed, value):
        seen.append(seed)
        return {"validation accuracy": 1 - abs(value - 0.1)}

    found, tried = best(run, "x", {value: [value] for value in (0.0, 0.1, 0.5)}, arm)
    assert found == 0.1
    assert seen == [TUNING_SEED] * 3
    assert TUNING_SEED not in run.seeds
    assert list(tried) == ["tuning: x 0", "tuning: x 0.1", "tuning: x 0.5"]


def test_a_fast_run_takes_the_middle(tmp_path):
    def arm(seed, value):
        raise AssertionError("nothing is tried")

    assert best(Run("rarts", fast=True, out=tmp_path), "x", {"a": [1], "b": [2], "c": [3]}, arm) == ("b", {})


def test_another_figure_where_the_lowest_is_best_and_a_missing_one_the_worst(tmp_path):
    def arm(seed, value):
        return {"loss": None if value > 1 else abs(value - 0.1)}

    grid = {value: [value] for value in (0.0, 0.1, 0.5, 2.0)}
    found, _ = best(Run("rarts", seeds=2, out=tmp_path), "x", grid, arm, figure="loss", lowest=True)
    assert found == 0.1


def test_more_rates_are_tried_while_the_best_is_at_an_end(tmp_path):
    seen = []

    def arm(seed, rate, optimum):
        seen.append(rate)
        return {"loss": None if rate > 20 else abs(rate - optimum)}

    run = Run("rarts", seeds=2, out=tmp_path)

    def chosen(optimum, **options):
        seen.clear()
        found = best_inside(
            run,
            f"x{optimum}",
            (0.1, 0.3, 1.0),
            lambda rate: [rate, optimum],
            arm,
            figure="loss",
            lowest=True,
            **options,
        )
        assert len(found[2]) == len(set(seen))  # no rate twice
        return found[:2]

    assert chosen(0.25) == (0.3, True)
    assert chosen(3.0) == (3.3, True)
    assert sorted(set(seen)) == [0.1, 0.3, 1.0, 3.3, 11.0]
    assert chosen(0.03) == (0.033, True)
    # The rates above 20 diverge, so the end of those that do not is inside.
    assert chosen(15.0) == (11.0, True)
    assert chosen(1e-9, more=2) == (pytest.approx(0.011), False)
    assert best_inside(
        Run("rarts", fast=True, out=tmp_path), "x", (0.1, 0.3, 1.0), lambda rate: [rate, 1.0], arm, figure="loss"
    )[:2] == (0.3, True)
