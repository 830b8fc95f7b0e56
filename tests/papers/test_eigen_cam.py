"""Eigen-CAM's experiment: verdicts from made-up figures, boxes that are where they are said to be, one small trial."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from netwright.papers import boxed
from netwright.papers import eigen_cam as paper
from netwright.seeding import seeded, stream
from netwright.train.attacks import fgsm, pgd


def arms(photographs=True, **change):
    """Figures in which every claim holds; ``change`` sets one of Eigen-CAM's on the canvases."""
    ours = {"localisation": 0.7, "localisation, right": 0.72, "localisation, disturbed": 0.7} | change
    figures = {
        "Eigen-CAM": ours,
        "Eigen-CAM, centred": dict.fromkeys(ours, 0.6),
        "Grad-CAM": {"localisation": 0.7, "localisation, right": 0.7, "localisation, disturbed": 0.4},
        "random weights": {"localisation": 0.3},
        "centred box": {"localisation": 0.2},
    }
    jitter = (-0.01, 0.0, 0.01)
    found = {
        f"canvases, {name}": {k: [v + (j if name == "Eigen-CAM" else 0) for j in jitter] for k, v in each.items()}
        for name, each in figures.items()
    }
    if photographs:
        rates = zip(paper.METHODS, (0.6, 0.5, 0.6, 0.2, 0.2), strict=True)
        found |= {f"photographs, {name}": {"localisation": [rate] * 3} for name, rate in rates}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "finds", "supported"),
        ({"photographs": False}, "finds", "supported"),
        ({"localisation": 0.5}, "finds", "not supported"),
        ({}, "robust", "supported"),
        ({"localisation, disturbed": 0.44}, "robust", "not supported"),
        ({}, "clean", "supported"),
        ({"localisation, right": 0.58}, "clean", "not supported"),
        ({"localisation, right": 0.75}, "beats", "supported"),
        ({"localisation, right": 0.65}, "beats", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}
    without = arms()
    without["photographs, Eigen-CAM"]["localisation"] = [0.4] * 3  # 0.2 above the control only
    assert paper.judge(without)["finds"].verdict == "not supported"
    assert "photographs were not looked at" in paper.judge(arms(photographs=False))["finds"].reason
    one = {name: {k: v[:1] for k, v in each.items()} for name, each in arms().items()}
    assert paper.judge(one)["robust"].verdict == "inconclusive"
    clean = {name: {"localisation": each["localisation"]} for name, each in arms().items()}
    assert paper.judge(clean)["robust"].verdict == "inconclusive"


def test_items_lie_in_their_boxes():
    items = torch.zeros(50, 28, 28, dtype=torch.uint8)
    items[:, 5:20, 9:12] = 255
    drawn, boxes = boxed.canvases(items, stream(0, "canvases"))
    assert drawn.shape == (50, 1, 64, 64)
    assert len(boxes.unique(dim=0)) > 40
    for image, (x0, y0, x1, y1) in zip(drawn[:, 0], boxes.tolist(), strict=True):
        assert (x1 - x0, y1 - y0) == (3, 15)
        assert bool((image[y0:y1, x0:x1] == 255).all())
    assert float(drawn.float().std()) > 10


@pytest.mark.skipif(boxed.missing() is not None, reason=str(boxed.missing()))
def test_photographs_lie_in_their_boxes():
    images, boxes = boxed.pasted(2, stream(0, "photographs"))
    assert images.shape == (2 * len(boxed.CROPS), 3, 224, 224)
    assert 0 <= images.min() <= images.max() <= 1
    crops = [crop for crop in boxed.CROPS.values() for _ in range(2)]
    for (name, (left, top, right, bottom)), (x0, y0, x1, y1) in zip(crops, boxes.tolist(), strict=True):
        picture = boxed._photograph(name)
        assert 0 <= left < right <= picture.shape[2]
        assert 0 <= top < bottom <= picture.shape[1]
        assert 0.34 * 224 <= max(x1 - x0, y1 - y0) <= 0.61 * 224
        assert (x1 - x0) / (y1 - y0) == pytest.approx((right - left) / (bottom - top), rel=0.05)


def test_what_is_missing_is_said(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "skimage" else real(name))
    assert boxed.missing() == "scikit-image is not installed"


def test_a_trial_with_attacks():
    found = paper._canvases(0, [192, 40, 40, 1], True)
    clean = paper._canvases(0, [192, 40, 40, 1], False)
    assert {name: found[name] for name in clean} == clean
    methods = {name.partition(": ")[0] for name in found}
    assert methods == set(paper.METHODS)
    assert all(0 <= value <= 1 for value in found.values())
    by_method = paper._by_method("canvases", {name: [value] for name, value in found.items()})
    assert set(paper.judge(by_method)) == {claim.key for claim in paper.CARD.claims}
    assert found["Eigen-CAM: fooled by PGD 16"] >= found["Eigen-CAM: fooled by PGD 4"]
    assert found["Eigen-CAM: fooled by PGD 16"] > 0


def test_the_share_with_the_most_right_boxes():
    axis = torch.arange(64)
    cone = (1 - (axis[:, None] - 32).abs() / 32) * (1 - (axis - 32).abs() / 32)
    boxes = torch.tensor([[16, 16, 48, 48]])
    chosen = paper._share(cone[None], boxes)
    rates = {share: float(paper._hits(cone[None], boxes, share)) for share in paper.SHARES}
    assert rates[chosen] == 1
    assert rates[0.15] == 0


def test_attacks_against_a_linear_network_are_known():
    """Uphill in the loss of two logits is along sign(w_other - w_label) everywhere."""
    with seeded(0, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    x = 0.3 + 0.4 * torch.rand(20, 3, 2, 2, generator=stream(0, "x"))
    labels = net(x).argmax(1)
    weight = net[1].weight.detach()
    along = (weight[1 - labels] - weight[labels]).sign().view_as(x)
    assert torch.allclose(fgsm(net, x, labels, 0.1), x + 0.1 * along, atol=1e-6)
    found = pgd(net, x, labels, x - 0.1, x + 0.1, steps=8, step=0.5, generator=stream(0, "start"))
    still = net(found).argmax(1) == labels
    assert torch.allclose(found[still], (x + 0.1 * along)[still], atol=1e-6)
    assert torch.equal(still, net(x + 0.1 * along).argmax(1) == labels)
    assert float((found - x).abs().max()) <= 0.1 + 1e-6
    assert all(parameter.grad is None for parameter in net.parameters())
