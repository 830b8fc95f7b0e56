"""Keys fitted by the callback before training, and left alone by it afterwards."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from netwright.data import Batches, TensorImages
from netwright.nn.kv_bottleneck import DKVBClassifier, KeyValueBottleneck, fit_keys
from netwright.seeding import seeded, stream
from netwright.train import Classifier, KeyInitCallback, fit


def images(seed=0):
    labels = torch.arange(64) % 2
    pixels = torch.rand(64, 1, 4, 4, generator=stream(seed, "pixels"))
    return TensorImages((pixels + labels.view(-1, 1, 1, 1)) / 2, labels)


def model(sparse=False):
    bottleneck = KeyValueBottleneck(16, 8, 4, value_dim=2, sparse=sparse, generator=stream(0, "init"))
    return DKVBClassifier(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)), bottleneck)


def module(network):
    return Classifier(network, lr=2.0, momentum=0.0, weight_decay=0.0, clip=None)


@pytest.mark.parametrize("sparse", [False, True])
def test_keys_are_those_of_fit_keys_and_values_are_trained(sparse):
    unlabelled, network, other = Batches(images(1), 32), model(sparse), model()
    callback = KeyInitCallback(unlabelled, epochs=3, seed=5)
    history = fit(module(network), Batches(images(), 16), epochs=4, callbacks=[callback])
    expected = fit_keys(other.bottleneck, other.encoder, unlabelled, 3, generator=stream(5, "keys"))
    assert network.bottleneck.keys_frozen
    assert torch.equal(network.bottleneck.keys, other.bottleneck.keys)
    assert callback.history == expected
    losses = history.column("train_loss")
    assert losses[-1] < 0.8 * losses[0]
    assert (network.encoder[1].running_mean == 0).all()


def test_the_training_data_are_the_default():
    network, other = model(), model()
    fit(module(network), Batches(images(), 16), epochs=1, callbacks=[KeyInitCallback(epochs=2)])
    first_pass = list(Batches(images(), 16))
    fit_keys(other.bottleneck, other.encoder, first_pass, 2, generator=stream(0, "keys"))
    assert torch.equal(network.bottleneck.keys, other.bottleneck.keys)


@pytest.mark.parametrize("given", [False, True])
def test_a_trainer_of_ones_own_may_validate_before_it_trains(given, tmp_path):
    data = images()
    loader = DataLoader(TensorDataset(data.images, data.labels), 16)
    network, other = model(), model()
    callback = KeyInitCallback(loader if given else None, epochs=2)
    trainer = lightning.Trainer(
        max_epochs=1,
        callbacks=[callback],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module(network), loader, loader)
    expected = fit_keys(other.bottleneck, other.encoder, loader, 2, generator=stream(0, "keys"))
    assert callback.history == expected
    assert network.bottleneck.keys_frozen
    assert torch.equal(network.bottleneck.keys, other.bottleneck.keys)
    assert network.bottleneck.values.any()


def test_a_resumed_run_keeps_its_keys(tmp_path):
    def run(epochs, name, network):
        callback = KeyInitCallback(Batches(images(1), 32), epochs=2)
        fit(module(network), Batches(images(), 16), epochs=epochs, callbacks=[callback], checkpoint=tmp_path / name)
        return network, callback

    whole, _ = run(3, "whole", model())
    run(1, "parts", model())
    resumed, callback = run(3, "parts", model())
    assert callback.history.epochs == ()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_of_several_processes_the_first_decides():
    network, first = model(), model()
    fit_keys(first.bottleneck, first.encoder, [torch.rand(40, 16)], 1)
    sent = iter([first.bottleneck.keys, first.bottleneck.key_counts, first.bottleneck.key_sums])
    trainer = SimpleNamespace(world_size=2, strategy=SimpleNamespace(broadcast=lambda own: next(sent)))
    KeyInitCallback(Batches(images(), 32), epochs=1).on_train_start(trainer, network)
    for name in ("keys", "key_counts", "key_sums"):
        assert torch.equal(getattr(network.bottleneck, name), getattr(first.bottleneck, name))
    assert network.bottleneck.keys_frozen


class Pair(lightning.LightningModule):
    def __init__(self, count):
        super().__init__()
        self.models = nn.ModuleList(model() for _ in range(count))

    def training_step(self, batch, batch_idx):
        return sum(nn.functional.cross_entropy(m(batch[0]), batch[1]) for m in self.models)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_one_of_several_is_named():
    batches = Batches(images(), 32)
    for count in (0, 2):
        with pytest.raises(ValueError, match=f"exactly 1 DKVBClassifier, got {count}"):
            KeyInitCallback().on_train_start(None, Pair(count))
    with pytest.raises(ValueError, match="got 'models'"):
        KeyInitCallback(classifier="models").on_train_start(None, Pair(2))
    with pytest.raises(ValueError, match="epochs must be >= 1, got 0"):
        KeyInitCallback(epochs=0)
    with seeded(0, "pair"):
        pair = Pair(2)
    both = [KeyInitCallback(epochs=1, classifier=f"models.{i}") for i in (0, 1)]
    fit(pair, batches, epochs=1, callbacks=both)
    assert all(m.bottleneck.keys_frozen for m in pair.models)
