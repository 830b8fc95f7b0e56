"""What the report tells of a network: accuracy with its interval, counts, file sizes, and the speed of its file."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from netwright import metrics
from netwright.results import Result

if TYPE_CHECKING:
    from netwright.data import Data
    from netwright.design.model import Architecture

CHECKED = 512  # test images on which the exports of the three other networks are compared


@dataclasses.dataclass(frozen=True)
class Measurement(Result):
    """One network on one test set.

    Attributes:
        name: Which network.
        accuracy: Share of right answers on the test part, in [0, 1].
        interval: Wilson's 95 % interval of it.
        nll: Mean negative log-likelihood, nats.
        ece: Expected calibration error, percent.
        parameters: All of them.
        nonzeros: Those that are not zero.
        sparsity: Zeros over all weights of convolutions and linear layers, in [0, 1].
        macs: Multiply-adds for one input.
        sparse_macs: Those of weights that are not zero.
        file_bytes: Size of the ONNX file.
        gzip_bytes: Its size after gzip.
        latency: Preprocessing included: of the ONNX file at batch 1 and 32, and of the network in netwright's own
            runtime at batch 1, the designed one also at 32. All networks take turns
            (:func:`netwright.design.speed.latencies`).
        confusion: Counts, true class by row, predicted class by column.
        agreement: Largest absolute difference of a logit between the ONNX file and torch: on the whole test part for
            the designed network, on its first 512 examples for the others.
        train_seconds: Wall time of training and pruning.
    """

    name: str
    accuracy: float
    interval: tuple[float, float]
    nll: float
    ece: float
    parameters: int
    nonzeros: int
    sparsity: float
    macs: int
    sparse_macs: int
    file_bytes: int
    gzip_bytes: int
    latency: tuple[dict[str, Any], ...]
    confusion: tuple[tuple[int, ...], ...]
    agreement: float
    train_seconds: float


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share of ``n`` trials, at 95 % by default.

    Raises:
        ValueError: If ``n`` is below 1 or ``share`` outside [0, 1].

    Example:
        >>> [round(x, 4) for x in wilson(0.9, 100)]
        [0.8256, 0.9448]
    """
    if n < 1:
        raise ValueError(f"n must be >= 1, got {n}")
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def onnx_input(images: Tensor, picture: bool) -> np.ndarray:
    """Images as the exported file takes them: uint8 (batch, height, width, channels), or floats as they are."""
    array = images.numpy()
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if picture else array


def measure(
    name: str,
    network: nn.Module,
    architecture: Architecture,
    data: Data,
    onnx_file: Path,
    *,
    train_seconds: float,
    whole: bool = True,
) -> tuple[Measurement, Tensor]:
    """Measures a network and the ONNX file made from it.

    Returns:
        The figures but the latencies, and the class probabilities of the test part.

    Raises:
        UserError: If the ONNX file does not agree with the network within 1e-4.
    """
    from netwright.cost import count
    from netwright.data.tensors import Batches
    from netwright.deploy import onnx as deploy
    from netwright.nn.sparse import sparsity
    from netwright.train import evaluate

    normalise = data.normalise()
    probs, labels = evaluate(network, Batches(data.test, 256, shuffle=False, normalise=normalise))
    right = metrics.accuracy(probs, labels)
    cost = count(network, data.shape)
    agreement = check_export(onnx_file, network, data, images=len(data.test) if whole else CHECKED)
    size = deploy.file_sizes(onnx_file)
    classes = len(data.classes)
    confusion = torch.zeros(classes * classes, dtype=torch.int64).index_add_(
        0, labels * classes + probs.argmax(1), torch.ones_like(labels)
    )
    figures = Measurement(
        name=name,
        accuracy=right,
        interval=wilson(right, len(labels)),
        nll=metrics.nll(probs, labels),
        ece=metrics.expected_calibration_error(probs, labels),
        parameters=cost.parameters,
        nonzeros=cost.nonzeros,
        sparsity=sparsity(network),
        macs=cost.macs,
        sparse_macs=cost.sparse_macs,
        file_bytes=size.raw,
        gzip_bytes=size.gzipped,
        latency=(),
        confusion=tuple(tuple(row) for row in confusion.reshape(classes, classes).tolist()),
        agreement=agreement,
        train_seconds=train_seconds,
    )
    return figures, probs


def check_export(onnx_file: Path, network: nn.Module, data: Data, *, images: int) -> float:
    """Largest absolute difference of a logit between the file and the network over the first test images.

    Raises:
        UserError: If it is above 1e-4.
    """
    from netwright.deploy import onnx as deploy

    compared, _ = first_images(data, images)
    return deploy.check(onnx_file, network, data.normalise(), compared, tolerance=1e-4).largest


def first_images(data: Data, n: int) -> tuple[Tensor, Tensor]:
    """The first ``n`` test images as they are stored, (n, channels, height, width), and their labels."""
    test = data.test
    n = min(n, len(test))
    if hasattr(test, "images"):
        return test.images[:n], test.labels[:n]
    pairs = [test[i] for i in range(n)]
    stacked = torch.stack([x for x, _ in pairs])
    return (stacked * 255).round().to(torch.uint8), torch.tensor([int(y) for _, y in pairs])
