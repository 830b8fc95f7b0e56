"""The experiment of safety verification: verdicts from made-up figures, and what an arm computes."""

from __future__ import annotations

import pytest

from netwright.papers import safety_verification as paper
from netwright.papers import verified
from netwright.papers.run import Run


def arms(
    more=0.1, chosen=0.3, far=0.0, layer=0.8, gaps=2, faults=0, faster=0.1, where_asked=None, validated=1.0, greedy=1.0,
    points=0.1,
):  # fmt: skip
    """Success of more numbers over fewer, of the tool's over random ones, and so on."""
    jitter = (0.0, 0.01, -0.01)
    found = {
        "guarantee": {
            "regions": [120] * 3, "disagreements": [faults, 0, 0], "contradictions": [0] * 3, "gaps": [gaps, 0, 0],
        }
    }  # fmt: skip
    for model in ("MLP", "CNN"):
        for i, n in enumerate((3, 5, 7)):
            ours = [0.4 + more * i + j for j in jitter]
            found[f"{model}, tool's {n}"] = {"success": ours, "validated": [validated] * 3}
            found[f"{model}, random {n}"] = {"success": [v - chosen for v in ours], "validated": [1.0, None, 1.0]}
            if n in paper.POINTS[model]:
                found[f"{model}, random points {n}"] = {"success": [points] * 3, "validated": [1.0, None, 1.0]}
            found[f"{model}, gradient's {n}"] = {"success": [v + 0.1 for v in ours], "validated": [1.0] * 3}
        found[f"{model}, FGSM 0.4"] = {"success": [0.9] * 3, "common L1": [0.1, 0.1, 0.1], "validated": [1.0] * 3}
        found[f"{model}, tool's 5"]["common L1"] = [0.05 + far, 0.06 + far, 0.05 + far]
        found[f"{model}, layerwise 15"] = {"success": [0.5] * 3, "validated": [greedy] * 3}
    found["layer, from 0"] = {"success": [0.8] * 3, "validated": [1.0] * 3}
    found["layer, from 1"] = {
        "success": [0.8] * 3, "share of layer 0's": [layer, 1.02 * layer, layer], "validated": [1.0] * 3,
    }  # fmt: skip
    found["solver, dense"] = {"solver seconds": [2.0, 2.2, 2.1]}
    both = 4.0 * (faster if where_asked is None else where_asked)
    found["solver, 95 %"] = {
        "solver seconds": [2.0 * faster] * 3, "seconds, both asked": [both] * 3, "dense, both asked": [4.0, 4.4, 4.2],
    }  # fmt: skip
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "guarantee", "supported"),
        ({"faults": 1}, "guarantee", "not supported"),
        ({}, "dims", "supported"),
        ({"more": -0.1}, "dims", "not supported"),
        ({}, "chosen", "supported"),
        ({"chosen": 0.05}, "chosen", "not supported"),
        ({}, "distance", "supported"),
        ({"far": 0.2}, "distance", "not supported"),
        ({}, "validated", "supported"),
        ({"validated": 0.9}, "validated", "not supported"),
        ({}, "layer", "supported"),
        ({"layer": 0.2}, "layer", "not supported"),
        ({}, "gradient", "supported"),
        ({}, "gap", "supported"),
        ({"gaps": 0}, "gap", "not supported"),
        ({}, "sparsity", "supported"),
        ({"faster": 0.9}, "sparsity", "not supported"),
        # Fewer images for which the solver is asked do not make it faster where it is.
        ({"where_asked": 0.9}, "sparsity", "not supported"),
        ({"greedy": 0.9}, "validated", "not supported"),
        ({}, "random search", "supported"),
        ({"points": 0.9}, "random search", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_both_networks_are_searched_with_three_five_and_seven_numbers(monkeypatch, tmp_path):
    asked = {}
    run = Run("safety-verification", out=tmp_path)
    monkeypatch.setattr(run, "arms", lambda arms, function: asked.update(arms) or {})
    monkeypatch.setattr(run, "evidence", lambda *_: None)
    for name in ("_with_common", "_with_shared", "_with_asked", "judge"):
        monkeypatch.setattr(paper, name, lambda *_: {})
    paper.reproduce(run)
    for model in ("MLP", "CNN"):
        for kind in ("tool's", "random", "gradient's"):
            assert [n for n in range(10) if f"{model}, {kind} {n}" in asked] == [3, 5, 7]
        assert [n for n in range(10) if f"{model}, random points {n}" in asked] == list(paper.POINTS[model])


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}
    none = arms()
    for model in ("MLP", "CNN"):
        none[f"{model}, FGSM 0.4"]["common L1"][0] = None
    none["layer, from 1"]["share of layer 0's"][1] = None
    none["solver, 95 %"]["seconds, both asked"][2] = None
    for model in ("MLP", "CNN"):
        del none[f"{model}, layerwise 15"]
    found = paper.judge(none)
    assert {found[key].verdict for key in ("distance", "layer", "sparsity", "validated")} == {"inconclusive"}
    del none["solver, 95 %"]
    assert paper.judge(none)["sparsity"].verdict == "inconclusive"


def test_distances_are_compared_where_both_succeed():
    made = {
        "MLP, tool's 5": {"each L1": [[0.1, None, 0.3], [None, 0.2, None]]},
        "MLP, FGSM 0.4": {"each L1": [[0.2, 0.5, 0.6], [0.1, None, 0.3]]},
    }
    found = paper._with_common("MLP", made)
    assert found["MLP, tool's 5"] == {"common L1": [pytest.approx(0.2), None]}
    assert found["MLP, FGSM 0.4"] == {"common L1": [pytest.approx(0.4), None]}


def test_the_layers_are_compared_on_the_images_that_the_input_breaks():
    made = {
        "layer, from 0": {"each": [[True, False, True, True], [False] * 4]},
        "layer, from 1": {"each": [[True, True, False, False], [True] * 4]},
    }
    assert paper._with_shared(made) == {
        "layer, from 0": {},
        "layer, from 1": {"share of layer 0's": [pytest.approx(1 / 3), None]},
    }


def test_seconds_of_the_solver_are_compared_where_it_was_asked_twice():
    made = {
        "solver, dense": {"each": [[1.0, None, 3.0, 4.0], [None, 2.0]]},
        "solver, 95 %": {"each": [[None, 1.0, 2.0, 1.0], [1.0, None]]},
    }
    found = paper._with_asked(made)
    assert found["solver, 95 %"] == {
        "both asked": [2.0, 0.0], "seconds, both asked": [1.5, None], "dense, both asked": [3.5, None],
    }  # fmt: skip
    assert found["solver, dense"]["seconds, both asked"] == [pytest.approx(8 / 3), 2.0]


IMAGES = (300, 0, 200)


def test_the_guarantee_counts_every_region():
    found = verified.agree(0, 1, 0.3, 25, IMAGES)
    assert found["regions"] == len(verified.SPANS)
    assert found["disagreements"] == found["contradictions"] == 0
    assert 0.5 < found["accuracy"] <= 1


@pytest.mark.parametrize(
    ("kind", "strength"),
    [("tool's", 3), ("random", 3), ("gradient's", 3), ("FGSM", 0.3), ("JSMA", 0.4), ("points", 4), ("layerwise", 12)],
)
def test_ways_of_looking_for_counterexamples(kind, strength):
    found = verified.falsify(0, "guarantee", kind, strength, 5, 25, IMAGES)
    assert 0 <= found["success"] <= 1
    assert len(found["each L1"]) == 5
    assert found["success"] == sum(each is not None for each in found["each L1"]) / 5
    if found["success"]:
        assert found["validated"] == 1.0
        if kind in ("tool's", "random", "gradient's"):
            assert found["numbers changed"] <= strength
    if kind == "points":
        # As many passes as the grid has points, unless one of them is a counterexample.
        assert found["forward passes"] <= 5**4
        assert found["success"] or found["forward passes"] == 5**4
    if kind == "layerwise":
        assert found["success"]
        assert found["forward passes"] <= 12 * 2**5
    if kind == "FGSM":
        assert found["forward passes"] == 1
    if kind == "JSMA":
        # One to begin with, and one after each pair, of which an image takes several.
        assert found["forward passes"] > 2


def test_counterexamples_are_validated_in_float32_too(monkeypatch):
    """(2^20 + 1) a - 2^20 a is a up to a sixteenth in float32: 0.5 for an a above 0.51."""
    import torch
    from torch import nn

    from netwright import verify

    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[2.0**20 + 1], [2.0**20]]))
        model[2].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
        model[2].bias.copy_(torch.tensor([0.51, 0.0]))
    x, network = torch.tensor([[0.4], [0.4]]), verify.Network(model, (1,))
    witnesses = iter([torch.tensor([0.512]).double(), torch.tensor([0.6]).double()])
    labels = torch.zeros(2, dtype=torch.long)
    monkeypatch.setattr(verified, "_trained", lambda *_: (network, 1.0))
    monkeypatch.setattr(verified, "_right", lambda *_: (x, labels))
    monkeypatch.setattr(
        verify.DLV, "verify",
        lambda self, x, label: verify.VerificationResult("unsafe", "grid", label, next(witnesses), 1, 0.1),
    )  # fmt: skip
    assert network.logits(torch.tensor([[0.512], [0.6]])).argmax(1).tolist() == [1, 1]
    assert verified.layer_search(0, 1, 2, 1.0, 1, IMAGES)["validated"] == 0.5


def test_the_solver_sees_images_that_all_networks_get_right(monkeypatch):
    import torch

    seen = []
    right = verified._right
    monkeypatch.setattr(verified, "_right", lambda *a: seen.append(right(*a)) or seen[-1])
    found = [verified.solve(0, sparsity, [0.0, 0.95], 3, 0.2, 6, IMAGES) for sparsity in (0.0, 0.95)]
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    for sparsity in (0.0, 0.95):
        network, _ = verified._trained("solver", 0, 6, IMAGES, sparsity)
        assert (network.logits(seen[0][0]).argmax(1) == seen[0][1]).all()
    for figures in found:
        asked = [seconds for seconds in figures["each"] if seconds is not None]
        assert figures["asked"] == len(asked)
        assert figures["solver seconds"] == pytest.approx(sum(asked) / 3)


def test_networks_with_zeros_are_trained_as_long(monkeypatch):
    from netwright.papers import classification

    asked = []
    train = classification.train
    monkeypatch.setattr(
        classification, "train", lambda *a, epochs, **k: asked.append(epochs) or train(*a, epochs=1, **k)
    )
    for sparsity in (0.0, 0.9):
        asked.clear()
        network, _ = verified._trained.__wrapped__("solver", 0, 7, IMAGES, sparsity)
        assert asked == [3, 4]
        weights = [p for name, p in network.double.named_parameters() if name.endswith("weight")]
        zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
        assert zeros == pytest.approx(sparsity, abs=1e-3)
