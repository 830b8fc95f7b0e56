"""Latencies of a run's networks: all take turns, and each entry tells what it is of."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netwright.console import UserError
from netwright.deploy import onnx
from netwright.design import speed
from netwright.design.model import Architecture

ARCHITECTURE = Architecture(
    kind="named", shape=(1, 8, 8), classes=("a", "b", "c"), mean=(0.5,), std=(0.25,), picture=True, name="mobilenet_v2"
)
IMAGES = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Two networks with their files; the first is also measured at 32 images in the sparse runtime."""
    folder, found = tmp_path_factory.mktemp("networks"), {}
    for name, batches in {"one": (1, 32), "two": (1,)}.items():
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
        file = folder / f"{name}.onnx"
        onnx.export(network, file, shape=(1, 8, 8), mean=(0.5,), std=(0.25,), classes=("a", "b", "c"), scale=255.0)
        found[name] = speed.Subject(network, ARCHITECTURE, file, batches)
    return found


def test_every_network_has_its_entries(subjects):
    found = speed.latencies(subjects, IMAGES, rounds=2)
    kinds = {name: [(entry["runtime"].split()[0], entry["batch"]) for entry in each] for name, each in found.items()}
    assert kinds == {
        "one": [("ONNX", 1), ("ONNX", 32), ("netwright's", 1), ("netwright's", 32)],
        "two": [("ONNX", 1), ("ONNX", 32), ("netwright's", 1)],
    }
    for entry in (entry for each in found.values() for entry in each):
        assert 0 < entry["p10_ms"] <= entry["median_ms"] <= entry["p90_ms"]
        assert (entry["threads"], entry["rounds"]) == (1, 2 * speed.CALLS)
        assert ("agreement" in entry) == entry["runtime"].startswith("netwright's")


def test_networks_take_turns(subjects, monkeypatch):
    """A machine that gets slower meanwhile is no slower for one network than for another."""
    monkeypatch.setattr(speed, "BATCHES", (1,))
    seen = []
    monkeypatch.setattr(speed, "_turn", lambda each: seen.append((each.subject, each.runtime)) or [1e-3])
    speed.latencies(subjects, IMAGES, rounds=3)
    rounds = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    assert len(rounds) == 3
    assert all(set(each) == set(rounds[0]) and len(set(each)) == 4 for each in rounds)
    assert len({each[0] for each in rounds}) == 3  # who begins, changes


def test_logits_that_differ_are_refused(subjects, monkeypatch):
    monkeypatch.setattr(speed, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"the sparse runtime's logits are .* from PyTorch's"):
        speed.latencies(subjects, IMAGES, rounds=1)
