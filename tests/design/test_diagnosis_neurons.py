"""The diagnosis of memorising neurons: waves and noise put together by hand, and networks of another kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from netwright.data import Normalise
from netwright.design.diagnosis import diagnose_model, neurons
from netwright.design.diagnosis.findings import NotApplicable, Sample
from netwright.diagnose.grokking import ModularArithmetic, QuadraticMLP, memorising_neurons
from netwright.seeding import stream

P, WAVES, NOISE = 11, 400, 6


def network() -> nn.Module:
    """Adds modulo 11 by waves; six further neurons, far too weak to matter, have random weights."""
    net = QuadraticMLP.analytic(P, WAVES + NOISE, stream(0, "phases"))
    with torch.no_grad():
        for layer, shape in ((net.fc1, (NOISE, 2 * P)), (net.fc2.weight.T, (NOISE, P))):
            weight = layer.weight if isinstance(layer, nn.Linear) else layer
            weight[WAVES:] = 0.05 * torch.randn(shape, generator=stream(0, "noise"))
    return nn.Sequential(nn.Flatten(), net)


def sample(net: nn.Module, op: str = "add", corruption: float = 0.2) -> Sample:
    data = ModularArithmetic(P, op, train_frac=0.9, corruption=corruption, encoding="one-hot")
    classes = tuple(map(str, range(P)))
    return Sample(net, data.inputs[:, None, None, :], data.targets, classes, Normalise((0.0,), (1.0,)), picture=False)


def test_neurons_of_random_weights_memorise_and_labels_are_told_apart():
    net = network()
    given = sample(net)
    found = neurons.diagnose(given)
    report = memorising_neurons(net)
    assert set(found.figures["memorising"]) == set(report.memorising) == set(range(WAVES, WAVES + NOISE))
    assert (found.figures["operation"], found.figures["modulus"]) == ("add", P)
    wrong = int((given.labels != ModularArithmetic(P, train_frac=0.9, corruption=0.2).clean_targets).sum())
    assert found.figures["examples"] == {"right": len(given) - wrong, "wrong": wrong}
    assert found.figures["accuracy"]["right"]["without"] > 0.9
    assert found.figures["accuracy"]["wrong"]["without"] < 0.2
    assert found.verdict.startswith(f"{NOISE} of {WAVES + NOISE} neurons memorise")
    assert sum(text.count(". ") for text in found.reading) == 0
    assert len(found.reading) == 2


def test_products_are_known_from_the_labels():
    net = nn.Sequential(nn.Flatten(), QuadraticMLP(P, 8, generator=stream(0, "init")))
    assert neurons.diagnose(sample(net, "mul", corruption=0.0)).figures["operation"] == "mul"


def test_other_networks_and_data_are_left_out():
    net = network()
    given = sample(net)

    def changed(**fields) -> Sample:
        return Sample(**({name: getattr(given, name) for name in Sample.__dataclass_fields__} | fields))

    for other, told in (
        (changed(network=nn.Linear(2 * P, P)), "two linear layers: model must hold 2"),
        (changed(network=nn.Sequential(nn.Linear(6, 4), nn.Linear(4, P))), "got 6 inputs and 11 outputs"),
        (changed(images=torch.rand(len(given), 1, 1, 2 * P)), "inputs of another form"),
        (changed(labels=torch.randint(0, P, (len(given),), generator=stream(0, "labels"))), "sums or products mod 11"),
    ):
        with pytest.raises(NotApplicable, match=told):
            neurons.diagnose(other)


def test_on_the_command_line(tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\nfrom netwright.diagnose import QuadraticMLP\nfrom netwright.seeding import stream\n"
        "def make():\n"
        f"    return nn.Sequential(nn.Flatten(), QuadraticMLP.analytic({P}, {WAVES}, stream(0, 'phases')))\n"
    )
    data = ModularArithmetic(P, split="all", encoding="one-hot")
    np.savez(tmp_path / "sums.npz", x=data.inputs[:, None, None, :].numpy(), y=data.targets.numpy())
    result = diagnose_model(f"{tmp_path}/nets.py:make", str(tmp_path / "sums.npz"), tmp_path / "out")
    assert list(result.findings) == ["coherence", "opposing-signals", "memorising-neurons"]
    assert not result.left_out
    assert "0 of 400 neurons memorise" in (tmp_path / "out" / "diagnosis.html").read_text()
