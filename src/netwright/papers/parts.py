"""Small parts of a named data set, on which the experiments of compression run."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from netwright.data import Batches, Normalise, TensorImages


@functools.lru_cache(maxsize=4)
def parts(data: str, seed: int, train: int, held_out: int, test: int) -> tuple[dict[str, TensorImages], Normalise]:
    """Training, validation and test part of the data's own size, and their normalisation.

    Args:
        data: A name of :func:`netwright.data.names`.
        seed: Of the choice of training and validation images; the test images are always the same.
        train: Training images.
        held_out: Validation images.
        test: Test images, at most all that there are.
    """
    from netwright.data import load, split_train, subset

    found = load(data)
    used = subset(found.train, min(train + held_out, len(found.train)), seed=seed)
    rest, held = split_train(found.train.labels[used], held_out / (train + held_out), seed=seed)
    chosen: Any = {
        "train": found.train.subset(used[rest]),
        "validation": found.train.subset(used[held]),
        "test": found.test.subset(subset(found.test, min(test, len(found.test)), seed=0)),
    }
    return chosen, found.normalise()


def batches(data: str, seed: int, images: tuple[int, ...], batch: int) -> Batches:
    """Batches of the training part, in the same order whenever they are asked for."""
    from netwright.data import Batches

    found, normalise = parts(data, seed, *images)
    return Batches(found["train"], batch, seed=seed, normalise=normalise)


def measured(network: nn.Module, part: TensorImages, normalise: Normalise) -> float:
    """Share of right answers of a network on a part, in [0, 1]."""
    from netwright.data import Batches
    from netwright.metrics import accuracy
    from netwright.train.fit import evaluate

    whole: Any = Batches(part, 500, shuffle=False, drop_last=False, normalise=normalise)
    return accuracy(*evaluate(network, whole))
