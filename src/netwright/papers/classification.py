"""Small classification problems on which the experiments of training and compression run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning
    from torch import Tensor, nn

    from netwright.data import Batches, Normalise, TensorImages


@functools.lru_cache(maxsize=2)
def _whole(name: str) -> tuple[TensorImages, TensorImages | None]:
    """What training images are drawn from, and the test part; for data without an official one, all and None."""
    import torch

    from netwright.data import TensorImages, load

    data = load(name)
    parts: list[Any] = [data.train, data.validation, *([data.test] if "test" in data.split_off else [])]
    images, labels = (torch.cat([getattr(part, field) for part in parts]) for field in ("images", "labels"))
    official = None if "test" in data.split_off else data.test
    return TensorImages(images, labels), official  # type: ignore[return-value]  # small data lie in memory


@functools.lru_cache(maxsize=2)
def parts(name: str, seed: int, train: int, held_out: int, test: int) -> tuple[dict[str, TensorImages], Normalise]:
    """Stratified training, validation and test parts, and the layer that standardises them.

    Args:
        name: ``"fashion-mnist"``, ``"digits"``, ``"mnist-5000"``, ``"mnist1d"``.
        seed: Of the choice of training and validation images, and of the test images where there is no official part.
        train: Training images.
        held_out: Validation images; with 0 there is no such part.
        test: Test images, at most.
    """
    import torch

    from netwright.data import Normalise, split_train, subset
    from netwright.data.tensors import scaled

    pool, official = _whole(name)
    used = subset(pool, train + held_out, seed=seed)
    found = {"train": pool.subset(used)}
    if held_out:
        rest, held = split_train(found["train"].labels, held_out / (train + held_out), seed=seed)
        found |= {"train": pool.subset(used[rest]), "validation": pool.subset(used[held])}
    if official is None:
        other = torch.ones(len(pool), dtype=torch.bool)
        other[used] = False
        official, seed_of_test = pool.subset(other.nonzero().flatten()), seed
    else:
        seed_of_test = 0
    found["test"] = official.subset(subset(official, min(test, len(official)), seed=seed_of_test))
    pixels = scaled(found["train"].images)
    return found, Normalise((float(pixels.mean()),), (float(pixels.std()),))


def noisy_parts(
    name: str, seed: int, rate: float, train: int, held_out: int, test: int
) -> tuple[dict[str, TensorImages], Normalise, Tensor]:
    """:func:`parts`, with a share of the training labels drawn anew, and which of them are other than before."""
    from netwright.data import TensorImages
    from netwright.data.label_noise import symmetric_noise
    from netwright.seeding import stream

    found, normalise = parts(name, seed, train, held_out, test)
    clean = found["train"]
    noisy, changed = symmetric_noise(clean.labels, rate, int(clean.labels.max()) + 1, stream(seed, "label noise"))
    return {**found, "train": TensorImages(clean.images, noisy)}, normalise, changed


def batches(name: str, seed: int, images: tuple[int, ...], batch: int) -> Batches:
    """Batches of the training part of :func:`parts`, in the same order whenever they are asked for."""
    from netwright.data import Batches

    found, normalise = parts(name, seed, *images)
    return Batches(found["train"], batch, seed=seed, normalise=normalise)


def train(
    network: nn.Module,
    data: tuple[dict[str, TensorImages], Normalise],
    *,
    epochs: int,
    batch: int,
    lr: float,
    seed: int,
    weight_decay: float = 0.0,
    label_smoothing: float = 0.0,
    optimizer: Callable[[Any], Any] | None = None,
    methods: Sequence[lightning.Callback] = (),
    schedule: lightning.Callback | None = None,
) -> dict[str, float]:
    """Trains by Nesterov's momentum 0.9 with one cosine unless told otherwise; what the last epoch recorded.

    Batches depend on the seed alone, so paired arms see the same ones.
    """
    from netwright.data import Batches
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    parts, normalise = data
    indexed = any(getattr(method, "indexed", False) for method in methods)
    module = Classifier(network, lr=lr, weight_decay=weight_decay, label_smoothing=label_smoothing)
    history = fit(
        module,
        Batches(parts["train"], batch, seed=seed, normalise=normalise, indexed=indexed),
        epochs=epochs,
        optimizer=optimizer,
        callbacks=[*methods, CosineProgress() if schedule is None else schedule],
        seed=seed,
    )
    return history.last


def measured(network: nn.Module, data: tuple[dict[str, TensorImages], Normalise], part: str) -> dict[str, float]:
    """Accuracy in [0, 1], NLL in nats, ECE in percent and AURC times 1000 on a part."""
    from netwright import metrics
    from netwright.data import Batches
    from netwright.train import evaluate

    images, normalise = data[0][part], data[1]
    found = evaluate(network, Batches(images, 500, shuffle=False, drop_last=False, normalise=normalise))
    return {
        "accuracy": metrics.accuracy(*found),
        "NLL": metrics.nll(*found),
        "ECE": metrics.expected_calibration_error(*found),
        "AURC": metrics.aurc(*found),
    }


def right(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """Which examples are classified as their label says; the network may lie on another device."""
    import torch

    from netwright.nn.modes import in_mode

    device = next((param.device for param in network.parameters()), x.device)
    with in_mode(network, training=False), torch.inference_mode():
        answers = [network(part.to(device)).argmax(1).to(labels.device) for part in x.split(1000)]
        return torch.cat(answers) == labels


def each_epoch(look: Callable[[nn.Module], None]) -> lightning.Callback:
    """Calls ``look(module)`` after every epoch of a training."""
    import lightning

    class EachEpoch(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
            look(pl_module)

    return EachEpoch()
