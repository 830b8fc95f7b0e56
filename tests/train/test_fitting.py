"""The training loop: exact resumption, no side effects, clear failures."""

from __future__ import annotations

import signal
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn

from netwright.console import UserError
from netwright.data.augment import HorizontalFlip
from netwright.data.tensors import Batches, TensorImages
from netwright.seeding import seeded
from netwright.train import Classifier, evaluate, fit
from netwright.train.schedules import CosineProgress, Deadline, Timetable


def data(n: int = 96, **settings) -> Batches:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 6, 6), dtype=torch.uint8, generator=generator)
    labels = (images.float()[:, :, :3].mean((1, 2, 3)) > images.float()[:, :, 3:].mean((1, 2, 3))).long()
    return Batches(TensorImages(images, labels), 16, seed=3, **settings)


def network() -> nn.Module:
    with seeded(0, "init"):
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 2)
        )


class StopAfter(lightning.Callback):
    """Dies in the middle of an epoch, as a kill would."""

    def __init__(self, epoch: int, batch: int = 2, error: type[BaseException] = RuntimeError):
        self.epoch, self.batch, self.error = epoch, batch, error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            raise self.error("killed")


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stops", [(0,), (1,), (1, 2), (3,)])
def test_resumed_run_is_bit_equal(tmp_path: Path, stops: tuple[int, ...]):
    settings = {"augment": HorizontalFlip(), "steps": 4}
    whole = network()
    history = fit(
        Classifier(whole, lr=0.05),
        data(**settings),
        epochs=4,
        validation=data(shuffle=False),
        seed=1,
        callbacks=[CosineProgress()],
    )
    broken, checkpoint = network(), tmp_path / "a.ckpt"
    for stop in stops:
        broken = network()
        with pytest.raises(RuntimeError, match="killed"):
            fit(
                Classifier(broken, lr=0.05),
                data(**settings),
                epochs=4,
                validation=data(shuffle=False),
                seed=1,
                callbacks=[CosineProgress(), StopAfter(stop)],
                checkpoint=checkpoint,
            )
    broken = network()
    resumed = fit(
        Classifier(broken, lr=0.05),
        data(**settings),
        epochs=4,
        validation=data(shuffle=False),
        seed=1,
        callbacks=[CosineProgress()],
        checkpoint=checkpoint,
    )
    assert equal(weights(whole), weights(broken))
    assert not equal(weights(whole), weights(network()))
    assert resumed.column("val_loss") == history.column("val_loss")
    assert resumed.column("lr") == history.column("lr")


def test_seed_decides_and_the_global_generator_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = network(), network(), network()
    fit(one, data(), epochs=2, seed=1)
    fit(two, data(), epochs=2, seed=1)
    fit(other, data(), epochs=2, seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert equal(weights(one), weights(two))
    assert not equal(weights(one), weights(other))


def test_it_learns_and_evaluate_agrees_with_validation():
    net = network()
    history = fit(Classifier(net, lr=0.1), data(256), epochs=12, validation=data(256, shuffle=False))
    probs, labels = evaluate(net, data(256, shuffle=False))
    accuracy = float((probs.argmax(1) == labels).float().mean())
    assert accuracy > 0.8
    assert history.last["val_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert torch.allclose(probs.sum(1), torch.ones(len(probs)))


def test_a_loss_that_is_not_finite_stops_with_its_place(tmp_path: Path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    with torch.no_grad():
        net[1].weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"nan in epoch 1, step 1; a smaller learning rate"):
        fit(net, data(), epochs=1)


def test_ctrl_c_becomes_a_keyboard_interrupt_and_the_handler_is_restored(tmp_path: Path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="stopped after epoch 1"):
        fit(network(), data(), epochs=3, callbacks=[StopAfter(1, error=KeyboardInterrupt)], checkpoint=tmp_path / "a")
    assert signal.getsignal(signal.SIGINT) is before


def test_damaged_checkpoint_is_one_line(tmp_path: Path):
    checkpoint = tmp_path / "a.ckpt"
    fit(network(), data(), epochs=1, checkpoint=checkpoint)
    whole = checkpoint.read_bytes()
    for damage in (b"", b"nonsense", whole[: len(whole) // 2]):
        checkpoint.write_bytes(damage)
        with pytest.raises(UserError, match="damaged checkpoint"):
            fit(network(), data(), epochs=2, checkpoint=checkpoint)
        assert checkpoint.read_bytes() == damage


def test_checkpoint_holds_plain_types_only(tmp_path: Path):
    checkpoint = tmp_path / "a.ckpt"
    fit(network(), data(), epochs=1, checkpoint=checkpoint, callbacks=[CosineProgress(), Deadline(100)])
    assert "state_dict" in torch.load(checkpoint, weights_only=True)


def test_fit_refuses_no_epochs():
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        fit(network(), data(), epochs=0)


class TestSchedules:
    def test_cosine_reaches_its_floor(self):
        history = fit(
            Classifier(network(), lr=0.2), data(), epochs=6, callbacks=[CosineProgress(floor=0.25, warmup=0.2)]
        )
        rates = history.column("lr")
        assert max(rates) <= 0.2
        assert rates[0] < rates[1]
        assert rates[-1] == pytest.approx(0.05, rel=0.02)
        assert rates[2:] == sorted(rates[2:], reverse=True)

    def test_deadline_takes_epochs_away_and_the_rate_still_anneals(self, monkeypatch: pytest.MonkeyPatch):
        now = [0.0]

        class Slow(lightning.Callback):
            def on_train_batch_end(self, *args):
                now[0] += 1.0

        monkeypatch.setattr("netwright.train.schedules.time.monotonic", lambda: now[0])
        changes: list[tuple[int, int]] = []
        deadline = Deadline(20.0, amended=lambda done, total: changes.append((done, total)))
        net = network()
        history = fit(
            Classifier(net, lr=0.2), data(), epochs=10, callbacks=[CosineProgress(), deadline, Slow()], seed=4
        )
        assert changes == [(1, 3)]
        assert len(history.epochs) == 3
        assert history.last["lr"] < 0.005

        again = network()
        repeated = fit(
            Classifier(again, lr=0.2), data(), epochs=10, callbacks=[CosineProgress(), Timetable(changes)], seed=4
        )
        assert repeated.column("lr") == history.column("lr")
        assert equal(weights(net), weights(again))

    def test_deadline_survives_a_restart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        now = [0.0]

        class Slow(lightning.Callback):
            def on_train_batch_end(self, *args):
                now[0] += 1.0

        monkeypatch.setattr("netwright.train.schedules.time.monotonic", lambda: now[0])
        checkpoint = tmp_path / "a.ckpt"
        with pytest.raises(RuntimeError, match="killed"):
            fit(network(), data(), epochs=10, callbacks=[Deadline(20.0), Slow(), StopAfter(1)], checkpoint=checkpoint)
        history = fit(network(), data(), epochs=10, callbacks=[Deadline(20.0), Slow()], checkpoint=checkpoint)
        assert len(history.epochs) == 3

    def test_timetable_survives_a_restart(self, tmp_path: Path):
        def run(*more, **options):
            callbacks = [CosineProgress(), Timetable([(1, 6), (2, 4)]), *more]
            return fit(Classifier(network(), lr=0.2), data(), epochs=10, callbacks=callbacks, **options)

        checkpoint = tmp_path / "a.ckpt"
        with pytest.raises(RuntimeError, match="killed"):
            run(StopAfter(2), checkpoint=checkpoint)
        assert run(checkpoint=checkpoint).column("lr") == run().column("lr")

    @pytest.mark.parametrize("seconds", [0, -1.0, float("nan")])
    def test_deadline_refuses(self, seconds):
        with pytest.raises(ValueError, match="seconds must be > 0"):
            Deadline(seconds)

    def test_cosine_refuses(self):
        with pytest.raises(ValueError, match="floor must lie in"):
            CosineProgress(floor=1.5)
        with pytest.raises(ValueError, match="warmup must lie in"):
            CosineProgress(warmup=1.0)
