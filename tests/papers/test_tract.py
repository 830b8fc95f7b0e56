"""The experiment of TrAct: verdicts from made-up figures, the speed-up, and an arm of each model."""

from __future__ import annotations

import math

import pytest

from netwright.papers import tract as paper

JITTER = (-1, 0.5, 0, 0.5)
PLAIN = {2: 0.80, 4: 0.83, 8: 0.85}


def arms(tract=0.01, vit=0.0, control=0.0, scan=0.0):
    """TrAct's, its control's and the scan's accuracy over plain's."""
    found = {}
    for model, gain in (("CNN", tract), ("ViT", vit)):
        for length, value in PLAIN.items():
            found[f"{model}, plain, {length} epochs"] = {"accuracy": [value] * 4}
            ours = [value + gain + 0.001 * j for j in JITTER]
            found[f"{model}, TrAct, {length} epochs"] = {"accuracy": ours}
            found[f"{model}, control, {length} epochs"] = {"accuracy": [value + control] * 4}
    for length in paper.DIGITS_LENGTHS:
        found[f"MLP, plain, {length} epochs"] = {"accuracy": [0.9] * 10}
        found[f"MLP, TrAct, {length} epochs"] = {"accuracy": [0.91] * 10}
    found["CNN, lambda 10"] = {"accuracy": [0.8 + scan] * 4}
    found["CNN, plain, a tenth of the rate"] = {"accuracy": [0.8] * 4}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "gain", "supported"),
        ({"tract": 0.0005}, "gain", "not supported"),
        ({"vit": -0.01}, "gain", "not supported"),
        ({}, "control", "supported"),
        ({"control": 0.05}, "control", "not supported"),
        ({}, "speed-up", "supported"),
        ({"tract": 0.002}, "speed-up", "not supported"),
        ({"tract": 0.2, "vit": 0.2}, "speed-up", "inconclusive"),
        ({}, "digits", "supported"),
        ({}, "limit", "supported"),
        ({"scan": 0.05}, "limit", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}
    one = {name: {"accuracy": figures["accuracy"][:1]} for name, figures in arms().items()}
    assert {paper.judge(one)[key].verdict for key in ("gain", "control", "digits", "limit")} == {"inconclusive"}


def test_where_a_line_reaches_a_level():
    curve = [(math.log(n), value) for n, value in PLAIN.items()]
    assert math.exp(paper._crossing(curve, 0.815)) == pytest.approx(2 * 2**0.5)
    assert paper._crossing(curve, 0.79) is None
    assert paper._crossing(curve, 0.9) is None


@pytest.mark.parametrize("model", ["CNN", "ViT", "MLP"])
def test_an_arm_of_each_model(model):
    images = [64, 32, 64]
    found = [
        paper._train(0, model, paper.RATES[model][0], lambda_, factor, 1, images, False)["NLL"]
        for lambda_, factor in ((0.0, 1.0), (0.1, 1.0), (0.0, 10.0))
    ]
    assert len(set(found)) == 3


def test_the_control_changes_the_layer_that_tract_changes():
    from netwright.train.tract import apply_tract, traced

    for make in (paper._cnn, paper._vit, paper._mlp):
        net = make()
        first = paper._first_layer(net)
        assert [net.get_submodule(name) for name in traced(apply_tract(net))] == [first]
