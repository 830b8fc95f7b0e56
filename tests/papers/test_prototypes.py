"""The experiment of prototype classification: verdicts from made-up figures, and its arms."""

from __future__ import annotations

import pytest

from netwright.papers import prototypes as paper

JITTER = (-0.002, 0.0, 0.002)


def arms(**change):
    """Figures in which every claim holds; ``change`` names a figure of the full loss."""
    near = {"agreement": 0.9, "classes covered": 9.5, "R1": 0.02, "R2": 0.1, "decoding distance": 1.0}
    full = {"accuracy": 0.96} | near | change
    loose = {"accuracy": 0.96, "agreement": 0.3, "classes covered": 8, "R1": 0.2, "R2": 0.4, "decoding distance": 2.2}
    plain = {"accuracy": 0.965}
    found = {"full loss": full, "no ties": loose, "no decoder": plain, "ordinary layers": plain}
    found |= {"Fashion-MNIST, full loss": {"accuracy": full["accuracy"]}, "Fashion-MNIST, ordinary layers": plain}
    return {arm: {k: [v + j for j in JITTER] for k, v in figures.items()} for arm, figures in found.items()}


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "accuracy", "supported"),
        ({"accuracy": 0.95}, "accuracy", "not supported"),
        ({}, "decodable", "supported"),
        ({"decoding distance": 1.4}, "decodable", "not supported"),
        ({"decoding distance": 1.6}, "decodable", "not supported"),
        ({}, "classes", "supported"),
        ({"agreement": 0.7}, "classes", "not supported"),
        ({"classes covered": 8.5}, "classes", "not supported"),
        ({}, "ties", "supported"),
        ({"R1": 0.1}, "ties", "not supported"),
        ({"R2": 0.2}, "ties", "not supported"),
        ({}, "decoder", "supported"),
        ({"accuracy": 0.95}, "decoder", "not supported"),
        ({}, "fashion", "supported"),
        ({"accuracy": 0.95}, "fashion", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict_also_where_arms_are_missing():
    keys = {claim.key for claim in paper.CARD.claims}
    assert set(paper.judge(arms())) == keys
    two = {name: figures for name, figures in arms().items() if name in ("full loss", "no ties")}
    found = paper.judge(two)
    assert set(found) == keys
    assert {key for key in keys if found[key].verdict == "inconclusive"} == {"accuracy", "decoder", "fashion"}


def test_arms_start_alike_and_differ_in_the_claim_alone():
    import torch

    networks = {arm: paper._network("mnist-5000", arm, 3) for arm in paper.LOSSES}
    first = networks["full loss"].encoder.state_dict()
    for arm, network in networks.items():
        assert all(
            torch.equal(a, b) for a, b in zip(first.values(), network.encoder.state_dict().values(), strict=True)
        )
        assert (network.decoder is None) == (arm == "no decoder")
    assert torch.equal(networks["no ties"].prototypes, networks["full loss"].prototypes)
    assert networks["full loss"](torch.rand(2, 1, 28, 28)).z.shape == (2, 40)


def test_every_arm_runs():
    images = [200, 50, 100]
    each = {arm: paper._train(0, "digits", arm, 2e-3, 1, images, False) for arm in paper.LOSSES}
    assert each["full loss"] == paper._train(0, "digits", "full loss", 2e-3, 1, images, False)
    assert len({figures["accuracy"] for figures in each.values()} | {f["cross-entropy"] for f in each.values()}) > 4
    near = {"agreement", "classes covered", "R1", "R2"}
    assert near | {"decoding distance", "reconstruction"} <= set(each["no ties"])
    assert near <= set(each["no decoder"])
    assert "decoding distance" not in each["no decoder"]
    assert not near & set(each["ordinary layers"])
    assert set(paper._train(1000, "digits", "full loss", 2e-3, 1, images, True)) == {"validation accuracy"}
