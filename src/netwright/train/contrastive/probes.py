"""How good features are: a linear classifier on them, and their nearest neighbours.

The neighbours vote as in Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-Parametric Instance
Discrimination", CVPR 2018, arXiv:1805.01978: with weight exp(cosine / T).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.modes import in_mode
from netwright.seeding import stream
from netwright.train.classifier import channels_last

LR, MILESTONES, GAMMA = 10.0, (0.6, 0.8), 0.1
CHUNK = 512


@torch.no_grad()
def extract(
    backbone: nn.Module, data: Iterable[tuple[Tensor, ...]]
) -> tuple[Float[Tensor, "examples features"], Int[Tensor, "examples"]]:
    """Features and labels of a whole data set, in order, on the CPU.

    Args:
        backbone: Gives features of any shape, which are flattened; in evaluation mode meanwhile.
        data: Batches (x, labels, ...), as ``Batches(part, 256, shuffle=False, drop_last=False)`` gives them.

    Raises:
        ValueError: If there are no examples.

    Example:
        >>> features, labels = extract(nn.Flatten(), [(torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))])
        >>> features.shape, labels.tolist()
        (torch.Size([2, 4]), [0, 1])
    """
    device = next((p.device for p in backbone.parameters()), torch.device("cpu"))
    features, labels = [], []
    with in_mode(backbone, training=False):
        for x, y, *_ in data:
            features.append(backbone(channels_last(x.to(device))).flatten(1).float().cpu())
            labels.append(y.cpu())
    if not labels or not sum(map(len, labels)):
        raise ValueError("data must hold at least 1 example, got 0")
    return torch.cat(features), torch.cat(labels)


def fit_probe(
    features: Float[Tensor, "examples features"],
    labels: Int[Tensor, "examples"],
    num_classes: int,
    *,
    epochs: int = 100,
    lr: float = LR,
    batch_size: int = 256,
    seed: int = 0,
) -> nn.Linear:
    """A linear classifier on features, trained by SGD with momentum 0.9; the learning rate falls tenfold twice.

    Each feature is standardised and all divided by the root of their number, so that a learning rate means the same for
    every encoder; the layer that is returned takes the features as they are.

    Args:
        features: Of the training part.
        labels: Their classes, 0 .. num_classes - 1.
        num_classes: Outputs of the layer.
        epochs: Passes, >= 1; the rate falls after 60 and 80 % of them.
        lr: Learning rate at the start, > 0.
        batch_size: Examples in a step, >= 1.
        seed: Of the order.

    Raises:
        ValueError: If a number is out of its range or a label is.

    Example:
        >>> probe = fit_probe(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1]), 2)
        >>> probe(torch.tensor([[-1.0], [2.0]])).argmax(1).tolist()
        [0, 1]
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("num_classes", num_classes)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite, got {lr}")
    if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
        raise ValueError(
            f"features must have shape (examples, features) with a label each, got {tuple(features.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    count, width = features.shape
    mean, std = features.mean(0), features.std(0, correction=0)
    scale = torch.where(std > 0, std, 1) * width**0.5
    x = (features - mean) / scale
    probe = nn.Linear(width, num_classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.SGD(probe.parameters(), lr=lr, momentum=0.9)
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = lr * GAMMA ** sum(epoch >= share * epochs for share in MILESTONES)
        for chosen in torch.randperm(count, generator=stream(seed, "probe", epoch)).split(batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(probe(x[chosen]), labels[chosen]).backward()
            optimizer.step()
    with torch.no_grad():
        probe.weight.div_(scale)
        probe.bias.sub_(probe.weight @ mean)
    return probe.requires_grad_(False)


def linear_probe(
    backbone: nn.Module,
    train: Iterable[tuple[Tensor, ...]],
    test: Iterable[tuple[Tensor, ...]],
    epochs: int = 100,
    *,
    lr: float = LR,
    batch_size: int = 256,
    seed: int = 0,
) -> float:
    """The share of test examples that a linear classifier on frozen features has right, in [0, 1].

    Args:
        backbone: Gives the features; in evaluation mode, not changed.
        train: Batches (x, labels, ...) in order.
        test: Likewise.
        epochs: As for :func:`fit_probe`.
        lr: Likewise.
        batch_size: Likewise.
        seed: Likewise.

    Raises:
        ValueError: As :func:`fit_probe`, or if a part is empty.

    Example:
        >>> part = [(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0, 1, 1]))]
        >>> linear_probe(nn.Identity(), part, part)
        1.0
    """
    (x, y), (tested, truth) = extract(backbone, train), extract(backbone, test)
    classes = int(torch.cat([y, truth]).max()) + 1
    probe = fit_probe(x, y, classes, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
    return (probe(tested).argmax(1) == truth).double().mean().item()


def knn_probe(
    backbone: nn.Module,
    train: Iterable[tuple[Tensor, ...]],
    test: Iterable[tuple[Tensor, ...]],
    k: int = 20,
    T: float = 0.07,
) -> float:
    """The share of test examples that their nearest training examples have right, in [0, 1].

    Args:
        backbone: Gives the features, which are compared by their cosine; in evaluation mode, not changed.
        train: Batches (x, labels, ...) in order.
        test: Likewise.
        k: Neighbours that vote, from 1 to the training examples.
        T: Temperature of their weights, > 0.

    Raises:
        ValueError: If ``k`` or ``T`` is out of its range, or a part is empty.

    Example:
        >>> part = [(torch.eye(3), torch.tensor([0, 1, 2]))]
        >>> knn_probe(nn.Identity(), part, part, k=1)
        1.0
    """
    return knn_accuracy(*extract(backbone, train), *extract(backbone, test), k=k, T=T)


def knn_accuracy(
    features: Float[Tensor, "examples features"],
    labels: Int[Tensor, "examples"],
    tested: Float[Tensor, "others features"],
    truth: Int[Tensor, "others"],
    *,
    k: int = 20,
    T: float = 0.07,
) -> float:
    """:func:`knn_probe` of features that are there already."""
    if not 1 <= k <= len(features):
        raise ValueError(f"k must lie in 1..{len(features)}, the training examples, got {k}")
    if not 0 < T < math.inf:
        raise ValueError(f"T must be > 0 and finite, got {T}")
    unit, classes = functional.normalize(features).T, int(torch.cat([labels, truth]).max()) + 1
    right = 0
    for part, answers in zip(functional.normalize(tested).split(CHUNK), truth.split(CHUNK), strict=True):
        near, places = (part @ unit).topk(k)
        votes = torch.zeros(len(part), classes).scatter_add_(1, labels[places], ((near - 1) / T).exp())
        right += int((votes.argmax(1) == answers).sum())
    return right / len(truth)
