"""Coherence measured in training, and gradients replaced in it, against loops of one's own."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn

from netwright.data import Batches, TensorImages
from netwright.diagnose import (
    CoherenceCallback,
    MedianOfMeans,
    RunningMedian,
    SuppressionCallback,
    WinsorizedGradients,
    m_coherence,
)
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream
from netwright.train import Classifier, fit

LOSS = nn.CrossEntropyLoss(reduction="none")
IMAGES = torch.randint(0, 256, (48, 1, 4, 4), dtype=torch.uint8, generator=stream(0, "images"))
DATA = TensorImages(IMAGES, torch.arange(48) % 3)
PROBE = IMAGES[:20].float() / 255, DATA.labels[:20]


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def train(net: nn.Module, *callbacks: lightning.Callback, epochs: int = 2, checkpoint=None) -> dict[str, float]:
    history = fit(
        Classifier(net, clip=None), Batches(DATA, 12, seed=0), epochs=epochs, callbacks=callbacks,
        optimizer=lambda params: torch.optim.SGD(params, 0.2), checkpoint=checkpoint,
    )  # fmt: skip
    return history.last


def weights(net: nn.Module) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach()


def by_hand(make, epochs: int = 2) -> torch.Tensor:
    net = network()
    optimizer = make(torch.optim.SGD(net.parameters(), 0.2), net)
    batches = Batches(DATA, 12, seed=0)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for batch in batches:
            if isinstance(optimizer, RunningMedian):
                optimizer.zero_grad()
                LOSS(net(batch[0]), batch[1]).mean().backward()
                optimizer.step()
            else:
                optimizer.step(batch)
    return weights(net)


def test_coherence_is_that_of_the_weights_before_the_step():
    net, found = network(), CoherenceCallback(PROBE, every=3, per_layer=True)
    last = train(net, found)
    assert found.steps == [0, 3, 6]
    expected = m_coherence(network(), LOSS, PROBE, per_layer=True)
    assert found.results[0].alpha == pytest.approx(expected.alpha)
    assert found.results[0].loss == pytest.approx(expected.loss)
    assert found.results[2].alpha != pytest.approx(expected.alpha)
    assert len(found.results[0].per_layer) == 2
    assert last["m_coherence"] == pytest.approx(found.results[2].m_coherence)
    same = network()
    train(same)
    assert torch.equal(weights(net), weights(same))


def test_batch_norms_and_their_statistics_stay_as_they_are():
    def made() -> nn.Module:
        with seeded(0, "init"):
            return SmallConvNet((4,), 0, 3, 1)

    watched, plain = made(), made()
    train(watched, CoherenceCallback([PROBE], every=1))
    train(plain)
    assert all(
        torch.equal(a, b) for a, b in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_the_default_cadence_and_a_rule_of_ones_own():
    often, rule = (
        CoherenceCallback((PROBE[0][:2], PROBE[1][:2])),
        CoherenceCallback(PROBE, every=lambda step: step in (1, 5), name="probe"),
    )
    assert {"m_coherence", "probe"} <= set(train(network(), often, rule, epochs=3))
    assert often.steps == [0, 4, 8]  # 24 * 2 examples, 12 a step
    assert rule.steps == [1, 5]


def test_a_resumed_training_remembers(tmp_path):
    first, again = CoherenceCallback(PROBE, every=2), CoherenceCallback(PROBE, every=2)
    train(network(), first, epochs=1, checkpoint=tmp_path / "a.ckpt")
    train(network(), again, epochs=2, checkpoint=tmp_path / "a.ckpt")
    whole = CoherenceCallback(PROBE, every=2)
    train(network(), whole, epochs=2)
    assert again.steps == whole.steps == [0, 2, 4, 6]
    assert [found.alpha for found in again.results] == [found.alpha for found in whole.results]


def test_a_second_training_is_measured_anew():
    """With a cadence of its own, which follows from the batches: 24 * 2 examples, 12 or 24 a step."""
    found = CoherenceCallback((PROBE[0][:2], PROBE[1][:2]))
    train(network(), found)
    first = found.results
    assert found.steps == [0, 4]
    other = network()
    fit(
        Classifier(other, clip=None), Batches(DATA, 24, seed=0), epochs=2, callbacks=[found],
        optimizer=lambda params: torch.optim.SGD(params, 0.2),
    )  # fmt: skip
    assert found.steps == [0, 2]
    assert found.results[0].alpha == pytest.approx(first[0].alpha)
    assert found.results[1].alpha != pytest.approx(first[1].alpha)


@pytest.mark.parametrize(
    ("callback", "make"),
    [
        (lambda: SuppressionCallback("winsorized", 20), lambda o, net: WinsorizedGradients(o, net, LOSS, 20)),
        (lambda: SuppressionCallback("m3", seed=3), lambda o, net: MedianOfMeans(o, net, LOSS, 3)),
        (lambda: SuppressionCallback("rm3"), lambda o, net: RunningMedian(o)),
    ],
    ids=["winsorized", "m3", "rm3"],
)
def test_suppression_is_that_of_the_loop(callback, make, tmp_path):
    net = network()
    train(net, callback())
    assert torch.allclose(weights(net), by_hand(make), atol=1e-6)
    plain = network()
    train(plain)
    assert not torch.allclose(weights(net), weights(plain), atol=1e-5)
    resumed = network()
    train(resumed, callback(), epochs=1, checkpoint=tmp_path / "a.ckpt")
    train(resumed, callback(), epochs=2, checkpoint=tmp_path / "a.ckpt")
    assert torch.equal(weights(resumed), weights(net))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: CoherenceCallback(PROBE, every=0), "every must be >= 1, got 0"),
        (lambda: CoherenceCallback(iter([PROBE])), "read many times, got an iterator"),
        (lambda: SuppressionCallback("m2"), "method must be one of winsorized, m3, rm3, got 'm2'"),
        (lambda: SuppressionCallback(c=50), r"c must lie in \[0, 50\)"),
        (lambda: train(SmallConvNet((4,), 0, 3, 1), SuppressionCallback()), "evaluation mode, got batch norm"),
    ],
)
def test_what_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
