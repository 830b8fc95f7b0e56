"""The verdicts of SD-DARTS's experiment from made-up figures, and how its control is found."""

from __future__ import annotations

import pytest

from netwright.papers import sd_darts

SEEDS = 3


def arms(**change):
    """Figures in which every claim holds; ``change`` names an arm's figure and its value as "arm: figure"."""
    figures = {
        sd_darts.PLAIN: {"largest eigenvalue": 2.0, "S_rho": 0.2, "loss gap": 0.6, "training loss": 1.0},
        sd_darts.THREE: {"largest eigenvalue": 1.0, "S_rho": 0.1, "loss gap": 0.3, "training loss": 1.1},
        sd_darts.ONE: {"loss gap": 0.4},
        sd_darts.CONTROL: {"largest eigenvalue": 1.5, "S_rho": 0.15, "loss gap": 0.5, "training loss": 1.12},
    }
    found = {
        f"search: {arm}": {name: [value + 0.001 * seed for seed in range(SEEDS)] for name, value in metrics.items()}
        for arm, metrics in figures.items()
    }
    found[sd_darts.PLAIN], found[sd_darts.THREE] = {"accuracy": [0.8] * SEEDS}, {"accuracy": [0.8] * SEEDS}
    found["step times"] = {f"{sd_darts.THREE}, ratio": [1.9]}
    for place, values in change.items():
        arm, name = place.rsplit(": ", 1)
        found[arm][name] = values
    return found


PLAIN, THREE, CONTROL = (f"search: {arm}" for arm in (sd_darts.PLAIN, sd_darts.THREE, sd_darts.CONTROL))


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "sharpness", "supported"),
        ({f"{PLAIN}: S_rho": [0.2, 0.2, 0.05]}, "sharpness", "not supported"),
        ({f"{PLAIN}: largest eigenvalue": [0.5] * 3}, "sharpness", "not supported"),
        ({}, "gap", "supported"),
        ({f"{PLAIN}: loss gap": [0.1, 0.2, 0.1]}, "gap", "not supported"),
        ({f"{PLAIN}: loss gap": [0.1, 0.9, 0.3]}, "gap", "inconclusive"),
        ({}, "control", "supported"),
        ({f"{CONTROL}: training loss": [1.2] * 3}, "control", "inconclusive"),
        ({f"{CONTROL}: loss gap": [0.1] * 3}, "control", "not supported"),
        ({f"{CONTROL}: S_rho": [0.05] * 3}, "control", "not supported"),
        ({}, "accuracy", "supported"),
        ({f"{sd_darts.THREE}: accuracy": [0.79] * 3}, "accuracy", "not supported"),
        ({}, "voting", "supported"),
        ({f"search: {sd_darts.ONE}: loss gap": [0.2] * 3}, "voting", "not supported"),
        ({}, "time", "supported"),
        ({f"step times: {sd_darts.THREE}, ratio": [2.2]}, "time", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert sd_darts.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(sd_darts.judge(arms())) == {claim.key for claim in sd_darts.CARD.claims}


def test_a_single_seed_tells_nothing_of_sharpness():
    one = {arm: {name: values[:1] for name, values in metrics.items()} for arm, metrics in arms().items()}
    verdicts = sd_darts.judge(one)
    assert {verdicts[key].verdict for key in ("sharpness", "gap", "control")} == {"inconclusive"}


@pytest.mark.parametrize("target", [0.8, 1.0, 1.02, 1.5])
@pytest.mark.parametrize("power", [-0.1, -0.5])
def test_the_control_has_the_loss_of_the_method(target, power):
    tried = []

    def loss_at(lr):
        tried.append(lr)
        return lr**power

    lr = sd_darts.matching_rate(loss_at, 1.0, 1.0, target)
    assert len(tried) <= sd_darts.TRIES
    reachable = 0.25 ** (sd_darts.TRIES * power) > target > 4.0 ** (sd_darts.TRIES * power)
    assert not reachable or abs(lr**power / target - 1) <= sd_darts.MATCHED
    assert (lr == 1.0) == (abs(target - 1) <= sd_darts.MATCHED)


def test_a_loss_that_does_not_answer_ends_the_search_of_the_control():
    assert sd_darts.matching_rate(lambda lr: 1.0, 1.0, 1.0, 2.0) in (1.0, 0.25, 0.0625, 0.015625, 0.0156)
    noise = iter([1.3, 0.9, 1.2])
    assert sd_darts.matching_rate(lambda lr: next(noise), 1.0, 1.0, 1.25) > 0
