"""The diagnosis of opposing signals: a planted pair of groups, and when it says nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from netwright.data import Normalise
from netwright.design.diagnosis import opposing
from netwright.design.diagnosis.findings import NotApplicable, Sample
from netwright.seeding import seeded, stream

CLASSES = ("shirt", "boot", "bag")


def sample(network: nn.Module | None = None, images: int = 300, picture: bool = True) -> Sample:
    """Three classes told by rows; twelve images have nothing but a bright patch, half of them of either class."""
    labels = torch.arange(images) % 3
    pixels = torch.randint(0, 40, (images, 1, 6, 6), dtype=torch.uint8, generator=stream(0, "pixels"))
    pixels[torch.arange(images), 0, labels] += 60
    planted = (torch.arange(images) < 18) & (labels < 2)
    pixels[planted] = 20
    pixels[planted, :, 3:] = 255
    if network is None:
        with seeded(0, "init"):
            network = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
        x = Normalise((0.15,), (0.1,))(pixels)
        optimizer = torch.optim.SGD(network.parameters(), 1e-3)
        for _ in range(60):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), labels).backward()
            optimizer.step()
    return Sample(network, pixels, labels, CLASSES, Normalise((0.15,), (0.1,)), picture)


def test_a_planted_pair_is_found_and_shown():
    given = sample()
    before = [param.detach().clone() for param in given.network.parameters()]
    found = opposing.diagnose(given)
    groups = found.figures["groups"]
    planted = {i for i in range(18) if i % 3 < 2}
    assert {*groups["up"], *groups["down"]} <= planted
    assert {max(table, key=table.get) for table in groups["labels"]} == {"shirt", "boot"}
    assert "swing against each other" in found.verdict
    assert "shirt against boot" in found.verdict or "boot against shirt" in found.verdict
    assert found.figures["pair"]["oscillation"] < -0.5
    assert found.figures["learning rate"] >= 2.19 / found.figures["sharpness"]
    up, down, table = found.blocks
    assert len(up.items) == len(down.items) == 5
    assert up.reading.count(". ") == 1  # two sentences
    assert [row[0] for row in table.rows] == [max(t, key=t.get) for t in groups["labels"]]
    assert all(torch.equal(a, b) for a, b in zip(before, given.network.parameters(), strict=True))


def test_what_cannot_be_shown_has_no_pictures():
    assert len(opposing.diagnose(sample(picture=False)).blocks) == 1


def test_large_networks_are_looked_at_on_fewer_examples(monkeypatch):
    monkeypatch.setattr(opposing, "WORK", 1.0)
    monkeypatch.setattr(opposing, "LEAST_EXAMPLES", 60)
    assert opposing.diagnose(sample()).figures["examples"] == 60


class Flat(nn.Module):
    """Gives the same logits whatever its parameter is."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(x), 3) + 0 * self.scale


def test_where_there_is_no_edge_nothing_is_said():
    with pytest.raises(NotApplicable, match="sharpness must be > 0, got 0"):
        opposing.diagnose(sample(Flat()))
    with pytest.raises(NotApplicable, match="at least 10 examples, got 9"):
        opposing.diagnose(sample(images=9))


def test_a_loss_that_never_rises_says_so(monkeypatch):
    from netwright.diagnose.opposing_signals.descent import edge_replay

    gentle = lambda *arguments: edge_replay(*arguments, steps=5, beyond=1e-3)  # noqa: E731
    monkeypatch.setattr(opposing, "edge_replay", gentle)
    assert "The loss never rose in 5 steps" in opposing.diagnose(sample()).verdict


def test_groups_that_go_together_are_not_called_opposing(monkeypatch):
    monkeypatch.setattr(opposing, "OPPOSED", -1.1)
    assert "no groups of examples swing against each other (correlation -" in opposing.diagnose(sample()).verdict
