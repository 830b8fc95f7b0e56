"""NaTra's experiment: verdicts from made-up figures, the parts of its data, the arms that change their images."""

from __future__ import annotations

import pytest
import torch

from netwright.data.nuisance import NAMES, WIDE
from netwright.papers import natra as paper
from netwright.papers import small_images

JITTER = (-0.002, 0.0, 0.002)


def arms(**change):
    """Figures in which every claim holds."""
    wide = {"ERM": 0.5, "jitter": 0.6, "mixup": 0.5, "PGD": 0.48, "oracle": 0.75, paper.OURS: 0.62, paper.RANDOM: 0.58}
    wide |= {paper.NOISE: 0.52, paper.NOISE_WORST: 0.54}
    wide |= {name: value for name, value in change.items() if name in wide}
    found = {
        name: {"accuracy": [value + j for j in (JITTER if name == paper.OURS else (0, 0, 0))]}
        for name, value in wide.items()
    }
    for arm in found.values():
        arm["narrow accuracy"] = [0.8, 0.8, 0.8]
    found[paper.OURS]["narrow accuracy"] = [change.get("narrow", 0.795)] * 3
    found["generator"] = {
        "error of one code": [0.01] * 3,
        "error of four codes": [change.get("four", 0.008)] * 3,
        "correlation": [change.get("correlation", 0.7)] * 3,
    }
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "gain", "supported"),
        ({"PGD": 0.6}, "gain", "not supported"),
        ({"mixup": 0.59}, "gain", "inconclusive"),
        ({}, "control", "supported"),
        ({paper.NOISE: 0.63}, "control", "not supported"),
        ({paper.NOISE_WORST: 0.63}, "control", "not supported"),
        ({}, "narrow", "supported"),
        ({"narrow": 0.78}, "narrow", "not supported"),
        ({}, "codes", "supported"),
        ({"four": 0.0086}, "codes", "not supported"),
        ({}, "directions", "supported"),
        ({"correlation": 0.5}, "directions", "not supported"),
        ({"jitter": 0.65}, "jitter", "not supported"),
        ({paper.RANDOM: 0.63}, "search", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    found = paper.judge(arms(**change))
    assert found[key].verdict == verdict
    assert set(found) == {claim.key for claim in paper.CARD.claims}


def test_the_parts():
    data = paper._parts(0, 60, 20, 100, 30, True)
    assert {name: len(data[name]) for name in ("train", "clean", "pool", "validation", "wide", "narrow")} == {
        "train": 60, "clean": 60, "pool": 100, "validation": 20, "wide": 30, "narrow": 30,
    }  # fmt: skip
    assert torch.equal(data["wide"].labels, data["narrow"].labels)
    clean = small_images.parts(0, 160, 20, 30)[0]["test"].images.float()
    near, far = (float((data[name].images.float() - clean).abs().mean()) for name in ("narrow", "wide"))
    assert far > 2 * near > 0
    low, high = torch.tensor([getattr(WIDE, name) for name in NAMES]).T
    spread = (data["numbers"].max(0).values - data["numbers"].min(0).values) / (high - low)
    assert bool(((spread > 0.8) & (spread <= 1)).all())  # those of the pool are wide too
    assert float((data["train"].images.float() - data["clean"].images.float()).abs().mean()) > 0
    digests = {name: {row.tobytes() for row in data[name].digests()} for name in ("train", "pool", "validation")}
    assert not digests["train"] & digests["validation"]
    assert data["train"].labels.bincount(minlength=10).min() >= 5


def test_a_fast_trial():
    sizes = [64, 20, 96, 40, 1, 1, 1, 1]
    wanted = [[name, 0.05, paper.STRENGTHS.get(name, (0.0,))[0]] for name in ("ERM", "mixup", *paper.GENERATED)]
    found = paper._trial(0, wanted, sizes, False)
    assert found["generator: identity"] is True
    by_arm = paper._by_arm({name: [value] for name, value in found.items()})
    assert set(by_arm) == {"generator", *(name for name, _, _ in wanted)}
    losses = {tuple(arm["NLL"]) for name, arm in by_arm.items() if name != "generator"}
    assert len(losses) == len(wanted)  # every arm trains in a way of its own
    assert 0 <= found["generator: correlation"] <= 1
    assert by_arm[paper.OURS]["strength"] == [2.0]
    settings = [["ERM", 0.05, 0.0], [paper.OURS, 0.05, 2.0], [paper.OURS, 0.05, 5.0]]
    tuned = paper._trial(0, settings, sizes, True)
    wanted_names = ["ERM: lr 0.05", f"{paper.OURS}: lr 0.05, strength 2", f"{paper.OURS}: lr 0.05, strength 5"]
    assert [name for name in tuned if not name.startswith("generator")] == wanted_names


@pytest.mark.parametrize("name", [*paper.PLAIN, *paper.GENERATED])
def test_the_strength_of_an_arm_is_that_of_its_training(name):
    """Two strengths train two networks; an arm without one is the same whatever it is told."""
    data = paper._parts(0, 64, 20, 96, 40, True)
    grids = {}
    if name in paper.GENERATED:
        grids, _ = paper._grids(0, data, 1, 1, (2.0, 5.0), True, False)
    found = []
    for strength in paper.STRENGTHS.get(name, (0.0, 1.0)):
        network = paper._train(0, name, 0.05, strength, data, grids.get((name, strength)), 1)
        found.append(torch.cat([param.detach().flatten() for param in network.parameters()]))
    assert torch.equal(*found) == (name not in paper.STRENGTHS)


@pytest.mark.parametrize("small", [True, False])
def test_the_filter_is_left_out_of_a_fast_run_alone(small, monkeypatch):
    """However few epochs the generator has, in a full run that was scaled down too."""
    seen = []

    def stop(network, reference, images, labels, *, recipe, seed):
        seen.append(recipe)
        raise InterruptedError

    monkeypatch.setattr("netwright.train.natra.prepared_from", stop)
    monkeypatch.setattr("netwright.train.natra.reference_classifier", lambda *args, epochs, seed: seen.append(epochs))
    with pytest.raises(InterruptedError):
        paper._trial(0, [[paper.OURS, 0.05, 2.0]], [64, 20, 96, 40, 1, 1, 1, int(small)], True)
    epochs, recipe = seen
    assert epochs == (1 if small else 20)
    assert recipe.max_flip == (1.0 if small else 0.1)


def test_the_attacked_arm_stays_in_its_box():
    from netwright.data import Normalise
    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded, stream

    with seeded(0, "init"):
        network = SmallConvNet((4,), 8, in_channels=1)
    normalise = Normalise((0.3,), (0.2,))
    module = paper._module("PGD")(network, normalise, 0, 0.05, 0.05)
    images = torch.rand(6, 1, 16, 16, generator=stream(0, "x"))
    labels = torch.arange(6)
    worst, same = module.changed(normalise(images), labels, 0)
    pixels = worst * 0.2 + 0.3
    assert torch.equal(same, labels)
    assert float((pixels - images).abs().max()) <= 0.05 + 1e-5
    assert float(pixels.min()) >= -1e-5
    assert float(pixels.max()) <= 1 + 1e-5
    network.eval()
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(network(x), labels) for x in (normalise(images), worst)]
    assert float(losses[1]) > float(losses[0])
