"""Fashion-MNIST at 16x16, on which the experiments of the search family run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import Batches, Normalise, TensorImages


@functools.lru_cache(maxsize=2)
def parts(seed: int, train: int, held_out: int, test: int) -> tuple[dict[str, TensorImages], Normalise]:
    """Training, validation and test part, pooled to 14x14 and padded to 16x16, and the training part's statistics.

    Args:
        seed: Of the choice of training and validation images; the test images are always the same.
        train: Training images.
        held_out: Validation images; with 0 there is no validation part.
        test: Test images; with 0 there is no test part.
    """
    from torch.nn import functional

    from netwright.data import Normalise, TensorImages, load, split_train, subset

    def small(part: Any, chosen: Tensor) -> TensorImages:
        pooled = functional.avg_pool2d(part.images[chosen].float(), 2).round().byte()
        return TensorImages(functional.pad(pooled, (1, 1, 1, 1)), part.labels[chosen])

    data = load("fashion-mnist")
    used = subset(data.train, train + held_out, seed=seed)
    if held_out:
        rest, held = split_train(data.train.labels[used], held_out / (train + held_out), seed=seed)
        found = {"train": small(data.train, used[rest]), "validation": small(data.train, used[held])}
    else:
        found = {"train": small(data.train, used)}
    if test:
        found["test"] = small(data.test, subset(data.test, test, seed=0))
    pixels = found["train"].images.float() / 255
    return found, Normalise((float(pixels.mean()),), (float(pixels.std()),))


def halves(seed: int, images: Sequence[int], batch: int, *, indexed: bool = False) -> tuple[Batches, Batches]:
    """Batches of the training and of the validation part of :func:`parts`, for a search.

    Args:
        seed: Of the parts and of the order.
        images: Training images and validation images.
        batch: Images in a batch.
        indexed: Whether batches tell the indices of their images.
    """
    from netwright.data import Batches

    train, held_out = images
    data, normalise = parts(seed, train, held_out, 0)
    first, second = (
        Batches(data[name], batch, seed=seed, normalise=normalise, name=name, indexed=indexed)
        for name in ("train", "validation")
    )
    return first, second


def trained_accuracy(
    network: nn.Module,
    train: TensorImages,
    test: TensorImages,
    normalise: Normalise,
    *,
    batch: int,
    epochs: int,
    lr: float,
    seed: int,
) -> float:
    """Trains a network from where it is by SGD with one cosine; its accuracy on the test part, in [0, 1]."""
    from netwright.data import Batches
    from netwright.metrics import accuracy
    from netwright.train import Classifier, evaluate, fit
    from netwright.train.schedules import CosineProgress

    batches = Batches(train, batch, seed=seed, normalise=normalise, name="train")
    fit(Classifier(network, lr=lr), batches, epochs=epochs, callbacks=[CosineProgress()], seed=seed)
    whole = Batches(test, 500, shuffle=False, drop_last=False, normalise=normalise)
    return accuracy(*evaluate(network, whole))
