"""The pieces of a training phase: how it prunes, and what it is watched on."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from netwright.compress import prune
from netwright.data.tensors import Batches, TensorImages
from netwright.design.training_stage import (
    FEWEST_VALIDATED,
    MOST_VALIDATED,
    SCOPES,
    SMOOTHING,
    _agreement,
    _coherence,
    _Ramp,
    _watched,
)
from netwright.diagnose import CoherenceCallback, coherence_from_gradients, m_coherence
from netwright.seeding import seeded
from netwright.train import Classifier, fit
from netwright.train.callbacks.layers import TrActCallback
from netwright.train.schedules import Timetable


def chain() -> nn.Module:
    """Three layers, of which the middle one has weights a thousand times smaller."""
    with seeded(0, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(16, 20), nn.Linear(20, 20), nn.Linear(20, 2))
    with torch.no_grad():
        net[2].weight.mul_(1e-3)
    return prune.place_masks(net)


def batches() -> Batches:
    images = torch.randint(0, 256, (80, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batches(TensorImages(images, torch.arange(80) % 2), 8)


@pytest.mark.parametrize("scope", sorted(set(SCOPES.values())))
@pytest.mark.parametrize("changes", [[], [(1, 2)], [(1, 5), (3, 4)]])
def test_the_ramp_ends_at_the_exact_sparsity_however_long_the_phase_becomes(scope, changes):
    net = chain()
    fit(Classifier(net, lr=1e-4), batches(), epochs=3, callbacks=[_Ramp(net, 0.9, scope), Timetable(changes)])
    report = prune.sparsity(net)
    assert report.kept == round(0.1 * report.total)


def test_the_ramp_of_a_baseline_starves_no_layer():
    kept = {}
    for network, scope in SCOPES.items():
        net = chain()
        fit(Classifier(net, lr=1e-4), batches(), epochs=3, callbacks=[_Ramp(net, 0.9, scope)])
        kept[network] = prune.sparsity(net).layers["2"].kept
    assert kept["model"] == 1
    assert kept["baseline"] > 20


class TestWatched:
    @pytest.mark.parametrize(
        ("there", "trained", "watched"),
        [
            (6000, 1280, FEWEST_VALIDATED),
            (6000, 6400, 960),
            (6000, 10**6, MOST_VALIDATED),
            (144, 1280, 144),
            (1, 64, 1),
        ],
    )
    def test_how_many(self, there: int, trained: int, watched: int):
        part = TensorImages(torch.zeros(there, 1, 1, 1, dtype=torch.uint8), torch.zeros(there, dtype=torch.int64))
        assert len(_watched(SimpleNamespace(validation=part), trained)) == watched

    def test_every_class_is_seen_when_the_part_is_sorted_by_class(self):
        labels = torch.arange(10).repeat_interleave(600)
        part = TensorImages(torch.zeros(6000, 1, 1, 1, dtype=torch.uint8), labels)
        counts = _watched(SimpleNamespace(validation=part), 1280).labels.bincount()
        assert counts.max() - counts.min() <= 1


class TestCoherence:
    def stage(self, train: TensorImages) -> SimpleNamespace:
        data = SimpleNamespace(train=train, normalise=lambda: nn.Identity())
        return SimpleNamespace(data=data, options=SimpleNamespace(batch_size=8))

    def phase(self, network: str = "model", name: str = "pretrain", epochs: int = 25) -> SimpleNamespace:
        return SimpleNamespace(network=network, name=name, steps=10, epochs=epochs)

    def test_the_curve_is_that_of_the_training_loss(self):
        train = batches().dataset
        watched = _coherence(self.stage(train), self.phase(), [])
        with seeded(0, "init"):
            net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        # 80 examples at 24 times that make 240 steps of 8: later than an epoch of 10.
        fit(Classifier(net, lr=1e-9), batches(), epochs=25, callbacks=[watched])
        assert watched.steps == [239]
        loss = partial(functional.cross_entropy, reduction="none", label_smoothing=SMOOTHING)
        images = train.images.float() / 255
        found = m_coherence(net, loss, (images, train.labels))
        assert watched.results[0].m == 80
        assert watched.results[0].m_coherence == pytest.approx(found.m_coherence, rel=1e-3)

    def test_an_epoch_without_a_measurement_repeats_no_other(self):
        watched = CoherenceCallback((torch.zeros(2, 1), torch.zeros(2)), 1)
        assert _agreement(watched, 0) == _agreement(None, 0) == {}
        watched.steps, watched.results = [7], [coherence_from_gradients(torch.eye(4))]
        assert _agreement(watched, 7) == {"coherence_examples": 4, "m_coherence": 1.0}
        assert math.isnan(_agreement(watched, 8)["m_coherence"])

    def test_where_it_is_not_measured(self):
        stage = self.stage(batches().dataset)
        assert _coherence(stage, self.phase("baseline"), []) is None
        assert _coherence(stage, self.phase(name="prune"), []) is None
        assert _coherence(stage, self.phase(), [TrActCallback()]) is None

    def test_a_short_phase_has_one_point(self):
        watched = _coherence(self.stage(batches().dataset), self.phase(epochs=3), [])
        assert [step for step in range(60) if watched.every(step)] == [29, 59]
