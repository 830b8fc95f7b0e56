"""The experiment of LSSL: verdicts from made-up figures, the memory's known values, and an arm of each kind."""

from __future__ import annotations

import pytest
import torch

from netwright.data.sources import DEBIAN_FASHION_MNIST
from netwright.papers import lssl as paper
from netwright.seeding import seeded

JITTER = (-0.002, 0.0, 0.002)


def arms(recalled=0.999, random=0.2, lssl=0.83, fixed=0.82, gru=0.75, other=0.82, doubled=0.8, same=0.5, digits=0.8):
    found = {f"memory, {name}": {"R2 at 75": [recalled] * 5} for name in paper.SYSTEMS}
    found["memory, random A"] = {"R2 at 75": [random] * 5}
    images = {"LSSL": lssl, "LSSL-f": fixed, "GRU": gru, "random A": other, "CNN": other}
    found |= {name: {"accuracy": [value + j for j in JITTER]} for name, value in images.items()}
    found["LSSL"] |= {
        "accuracy at half the rate, step 2": [doubled] * 3,
        "accuracy at half the rate, step 1": [same] * 3,
    }
    sequences = {"LSSL": digits, "logistic regression": 0.32, "MLP": 0.68}
    return found | {f"MNIST-1D, {name}": {"accuracy": [value] * 3} for name, value in sequences.items()}


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "memory", "supported"),
        ({"recalled": 0.98}, "memory", "not supported"),
        ({"random": 0.5}, "memory", "not supported"),
        ({}, "accuracy", "supported"),
        ({"gru": 0.8}, "accuracy", "not supported"),
        ({"fixed": 0.77}, "accuracy", "not supported"),
        ({}, "baselines", "supported"),
        ({"other": 0.85}, "baselines", "not supported"),
        ({}, "rate", "supported"),
        ({"doubled": 0.7}, "rate", "not supported"),
        ({"same": 0.78}, "rate", "not supported"),
        ({}, "mnist1d", "supported"),
        ({"digits": 0.6}, "mnist1d", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(paper.judge(arms())) == {claim.key for claim in paper.CARD.claims}
    one = {name: {key: values[:1] for key, values in figures.items()} for name, figures in arms().items()}
    assert paper.judge(one)["accuracy"].verdict == "inconclusive"
    fast = {name: figures for name, figures in arms().items() if "memory" in name or name.startswith("MNIST-1D, L")}
    assert {key: found.verdict for key, found in paper.judge(fast).items() if key != "memory"} == dict.fromkeys(
        ("accuracy", "baselines", "rate", "mnist1d"), "inconclusive"
    )


REFERENCE = {  # of the specification, at delays of 5, 25, 50, 75, 95 and 150 samples
    "LegT": (1.00, 1.00, 1.00, 1.00, 1.00, 0.09),
    "LegS": (1.00, 1.00, 1.00, 1.00, 1.00, 0.72),
    "random A": (0.84, 0.27, 0.15, 0.11, 0.09, 0.07),
    "diagonal A": (1.00, 0.89, 0.33, 0.17, 0.12, 0.07),
}


@pytest.mark.parametrize("system", paper.SYSTEMS)
def test_memory(system):
    """The random matrix and the noise are other draws than the reference's."""
    found = list(paper._memory(0, system, 6000).values())
    assert found == pytest.approx(REFERENCE[system], abs=0.2 if "A" in system else 0.08)
    if "A" not in system:
        assert found[:5] == pytest.approx([1.0] * 5, abs=0.005)


def test_networks_are_of_one_size():
    sizes = [48, 32, 2]
    wanted = paper._size(paper._network("LSSL", sizes, 196, 0))
    for arm in ("random A", "GRU", "CNN"):
        assert abs(paper._size(paper._network(arm, sizes, 196, 0)) - wanted) <= 0.1 * wanted, arm
    x = torch.randn(2, 1, 1, 50)
    for arm in paper.ARMS:
        assert paper._network(arm, sizes, 50, 0)(x).shape == (2, 10)


def test_a_random_matrix_is_beside_the_initialisation_of_lssl():
    states = {}
    for arm, seed in (("LSSL", 3), ("random A", 3), ("random A", 4)):
        with seeded(3, "init"):
            states[arm, seed] = paper._network(arm, [8, 8, 2], 50, seed).state_dict()
    ours, paired, other = states.values()
    alike = [name for name in ours if "layer.A." not in name and not name.endswith("layer.b")]
    assert {"C", "D", "log_dt"} <= {name.rsplit(".")[-1] for name in alike}
    for name in alike:
        assert torch.equal(ours[name], paired[name]), name
    A = "blocks.0.layer.A.A"
    assert torch.equal(paired[A], paired["blocks.1.layer.A.A"])
    assert not torch.equal(paired[A], other[A])


def test_the_convolutional_network_is_causal_before_its_mean():
    network, x = paper._cnn(4), torch.randn(1, 1, 1, 300)
    late = x.clone()
    late[..., 299] += 5
    gap = []
    network.decoder.register_forward_pre_hook(lambda module, inputs: gap.append(inputs[0]))
    seen = []
    hook = network.convolutions[-1].register_forward_hook(lambda module, inputs, out: seen.append(out))
    network(x), network(late)
    hook.remove()
    assert torch.equal(seen[0][..., :299], seen[1][..., :299])
    assert not torch.equal(gap[0], gap[1])


@pytest.mark.parametrize("arm", ["LSSL", "LSSL, shuffled", "logistic regression", "MLP"])
def test_an_arm_on_mnist1d(arm):
    pytest.importorskip("mnist1d")
    found = paper._train(0, "mnist1d", arm, 4e-3, [8, 8, 1], [128, 64, 64, 1], False)
    assert 0 <= found["accuracy"] <= 1
    assert set(paper._train(1000, "mnist1d", arm, 4e-3, [8, 8, 1], [128, 64, 64, 1], True)) == {"validation accuracy"}


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_arms_on_images():
    both = {f"accuracy at half the rate, step {rate}" for rate in (1, 2)}
    for arm, rates in (("LSSL", both), ("CNN", {"accuracy at half the rate, step 1"})):
        found = paper._train(0, "fashion-mnist", arm, 4e-3, [8, 8, 1], [64, 32, 64, 1], False)
        assert rates == {key for key in found if "half" in key}
    fixed = paper._network("random A", [8, 8, 1], 196, 0)
    assert not fixed.blocks[0].layer.A.A.requires_grad
    assert fixed.blocks[0].layer.log_dt.requires_grad
