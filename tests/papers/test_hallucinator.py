"""The experiment of the Hallucinator: verdicts from made-up figures, paired arms, and what each control changes."""

from __future__ import annotations

import pytest
import torch

from netwright.papers import hallucinator as paper

JITTER = (-1, 0.5, 0, 0.5)


def arms(gain=0.01, spread=0.001, crops=0.0, host=0.06, ratio=1.01, control=-0.01, controls=True):
    """Gains of the hallucinator and of crops near the middle, of hosts over random weights, of controls over it."""
    found = {"random weights": {"accuracy": [0.72] * 4}, "step time": {"ratio": [ratio]}}
    for name in paper.HOSTS:
        for crop in paper.CROPS:
            plain = 0.72 + host + (crops if crop == "center" else 0.0)
            found[f"{name}, {crop} crops, alone"] = {"accuracy": [plain] * 4}
            found[f"{name}, {crop} crops, hallucinator"] = {"accuracy": [plain + gain + spread * j for j in JITTER]}
        ours = found[f"{name}, random crops, hallucinator"]["accuracy"]
        for kind in paper.CONTROLS.values() if controls else ():
            found[f"{name}, random crops, {kind}"] = {"accuracy": [value + control for value in ours]}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "gain", "supported"),
        ({"gain": -0.02}, "gain", "not supported"),
        ({"gain": 0.0}, "gain", "inconclusive"),
        ({"gain": 0.0, "spread": 0.02}, "gain", "not supported"),  # the interval reaches below half a point
        ({}, "hosts", "supported"),
        ({"host": 0.04}, "hosts", "not supported"),
        ({}, "overhead", "supported"),
        ({"ratio": 1.06}, "overhead", "not supported"),
        ({}, "crops", "inconclusive"),
        ({"crops": 0.01}, "crops", "supported"),
        ({"crops": -0.01}, "crops", "not supported"),
        ({}, "ratio", "supported"),
        ({"control": 0.01}, "extrapolation", "not supported"),
        ({"controls": False}, "network", "inconclusive"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}
    fast = {name: {k: v[:1] for k, v in figures.items()} for name, figures in arms(controls=False).items()}
    fast = {name: figures for name, figures in fast.items() if not name.startswith("MoCo")}
    assert paper.judge(fast)["gain"].verdict == "inconclusive"
    assert paper.judge(arms())["gain"].statistic == pytest.approx(0.01)


def test_arms_of_a_seed_begin_alike():
    states = [
        paper._host(3, "MoCo", kind, paper._encoder, 8, 16).state_dict()
        for kind in ("alone", "hallucinator", "no network")
    ]
    for state in states[1:]:
        assert all(torch.equal(value, state[name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["queue"], paper._host(4, "MoCo", "alone", paper._encoder, 8, 16).queue)
    assert sum(p.numel() for p in paper._encoder().parameters()) <= 60_000
    assert paper._encoder()(torch.rand(2, 1, 28, 28)).shape == (2, 64)


def test_what_each_control_changes():
    q, k = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    made = {kind: paper._hallucinator(kind, 4) for kind in ("hallucinator", *paper.CONTROLS.values())}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert float(made["interpolated"].drawn_ratio(q)) < 0
        assert float(made["hallucinator"].drawn_ratio(q)) > 0
        assert float(made["nothing extrapolated"].drawn_ratio(q)) == 0
        h = made["no network"](q, k)[0][5:]
    assert torch.allclose(((h - q) / (q - k)), ((h - q) / (q - k))[0, 0].expand(5, 4), atol=1e-3)
    assert not list(made["no network"].parameters())


def test_an_arm_of_every_kind():
    images = [256, 64, 64]
    alone, ours = (paper._train(0, "MoCo", "center", kind, 0.1, 1, images, False) for kind in paper.KINDS)
    assert alone["loss"] != ours["loss"]
    assert 0 < alone["accuracy"] <= 1
    assert alone["uniformity"] < 0 < alone["alignment"]
    assert set(paper._train(0, "SimSiam", "random", "alone", 0.1, 1, images, True)) == {"validation accuracy"}
    assert paper._train(0, "SimCLR", "random", "alone", 0.1, 0, images, False)["loss"] is None
