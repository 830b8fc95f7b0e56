"""Opposing signals watched in training, against a tracker in a loop of one's own."""

from __future__ import annotations

import lightning
import pytest
import torch
from torch import nn

from netwright.data import Batches, TensorImages
from netwright.diagnose import OpposingSignalCallback, oscillation_score
from netwright.nn.convnet import SmallConvNet
from netwright.seeding import seeded, stream
from netwright.train import Classifier, fit

LOSS = nn.CrossEntropyLoss(reduction="none")
IMAGES = torch.randint(0, 256, (48, 1, 4, 4), dtype=torch.uint8, generator=stream(0, "images"))
DATA = TensorImages(IMAGES, torch.arange(48) % 3)
PROBE = IMAGES[:20].float() / 255, DATA.labels[:20]


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(SmallConvNet((4,), 0, 8, 1), nn.Dropout(), nn.Linear(8, 3))


def train(net: nn.Module, *callbacks: lightning.Callback, epochs: int = 3, checkpoint=None) -> dict[str, float]:
    module = net if isinstance(net, Classifier) else Classifier(net, clip=None)
    history = fit(
        module, Batches(DATA, 12, seed=0), epochs=epochs, callbacks=callbacks,
        optimizer=lambda params: torch.optim.SGD(params, 0.2), checkpoint=checkpoint,
    )  # fmt: skip
    return history.last


def test_bursts_hold_the_losses_before_their_steps():
    seen: dict[int, torch.Tensor] = {}

    class Look(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.eval()
            with torch.no_grad():
                seen[trainer.global_step] = LOSS(pl_module(PROBE[0]), PROBE[1])
            pl_module.train()

    watch = OpposingSignalCallback(PROBE, every=5, burst=3)
    last = train(network(), Look(), watch)
    tracker = watch.tracker
    assert tracker is not None
    assert tracker.steps == [0, 1, 2, 5, 6, 7, 10, 11, 12]
    for row, step in enumerate(tracker.steps[:-1]):  # the last one is after the training
        assert torch.allclose(tracker.losses()[row], seen[step], atol=1e-5)
    assert tracker.delta_steps == [0, 1, 5, 6, 10, 11]
    deltas = tracker.deltas()[2:4]
    row = int(deltas.mean(1).argmax())
    up, down = deltas[row].argsort(descending=True)[:5], deltas[row].argsort()[:5]
    assert -1 <= oscillation_score(deltas, up, down) <= 1
    assert last["opposing/share"] > 10 / 20


def test_training_is_the_same_to_the_bit():
    watched, plain = network(), network()
    train(watched, OpposingSignalCallback(PROBE, every=3, burst=3))
    train(plain)
    assert all(
        torch.equal(a, b) for a, b in zip(watched.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def test_the_default_cadence_and_a_name():
    watch = OpposingSignalCallback(PROBE, burst=3, name="probe")
    last = train(network(), watch, epochs=8)
    assert watch.every == 25  # 5 * 3 * 20 examples, 12 a step
    assert watch.tracker.steps == [0, 1, 2, 25, 26, 27]
    assert 0 < last["probe/share"] <= 1
    assert OpposingSignalCallback(PROBE, name="other").state_key != watch.state_key


def test_a_resumed_training_remembers(tmp_path):
    first, again = (OpposingSignalCallback(PROBE, every=5, burst=3) for _ in range(2))
    train(network(), first, epochs=1, checkpoint=tmp_path / "a.ckpt")
    train(network(), again, epochs=3, checkpoint=tmp_path / "a.ckpt")
    whole = OpposingSignalCallback(PROBE, every=5, burst=3)
    train(network(), whole)
    assert again.tracker.steps == whole.tracker.steps
    assert torch.allclose(again.tracker.losses(), whole.tracker.losses(), atol=1e-6)


def test_a_second_training_of_a_module_has_a_record_of_its_own():
    watch, net = OpposingSignalCallback(PROBE, every=5, burst=3, capacity=3), Classifier(network(), clip=None)
    first = train(net, watch)
    before = watch.tracker
    assert before.model is net
    again = train(net, watch)
    assert watch.tracker is not before
    assert watch.tracker.steps == before.steps == [10, 11, 12]
    assert not torch.equal(watch.tracker.losses(), before.losses())
    assert "opposing/share" in first
    assert "opposing/share" in again


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: OpposingSignalCallback(PROBE, burst=2), "burst must be >= 3, got 2"),
        (lambda: OpposingSignalCallback(PROBE, every=5), "every must be >= burst, 11, got 5"),
        (lambda: OpposingSignalCallback(PROBE, burst=4, capacity=3), "capacity must be >= burst, 4, got 3"),
        (lambda: OpposingSignalCallback(iter([PROBE])), "read many times, got an iterator"),
        (lambda: train(network(), OpposingSignalCallback((PROBE[0][:9], PROBE[1][:9]))), "at least 10 examples"),
        (lambda: train(network(), OpposingSignalCallback(PROBE, k=0.7)), r"k must lie in \(0, 0.5\]"),
        (lambda: train(network(), OpposingSignalCallback(PROBE, nn.CrossEntropyLoss())), "one loss for each of 20"),
    ],
)
def test_what_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()
