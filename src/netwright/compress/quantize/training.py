"""Quantised distillation and differentiable quantization.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668. The
first trains the weights behind the rounding, with the distillation loss of a teacher; the second leaves the weights
of a trained network as they are and learns where the levels lie, with the unquantised network as the teacher. They can
alternate, epoch by epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from netwright.compress.distill import DistillationLoss, distill
from netwright.compress.quantize.placing import Which, post_training_quantize, quantize_with, quantizers, targets
from netwright.compress.quantize.quantizers import DifferentiableQuantizer, NonuniformQuantizer, Quantizer, Start
from netwright.compress.quantize.scaling import check_bits
from netwright.nn.batchnorm import frozen_statistics
from netwright.nn.sparse import clone, to_dense

if TYPE_CHECKING:
    from netwright.train import Loader

MEASURED_BATCHES = 5
WEIGHT_DECAY = 5e-4
_M = TypeVar("_M", bound=nn.Module)
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def quantized_distillation(
    student: _M,
    teacher: nn.Module,
    loader: Loader,
    *,
    bits: int = 4,
    bucket_size: int | None = 256,
    epochs: int = 10,
    optimizer: MakeOptimizer | None = None,
    lr: float = 0.05,
    loss: DistillationLoss | None = None,
    quantize: Which = "weights",
    quantize_first_last: bool = True,
    seed: int = 0,
) -> _M:
    """Trains a quantised copy of a student on what a teacher answers.

    Args:
        student: Trained or not; it is not changed.
        teacher: A trained network of as many classes.
        loader: Batches, as for :func:`netwright.compress.distill.distill`.
        bits: 1..16.
        bucket_size: Weights that share a scale; None for one scale a tensor.
        epochs: At least 1.
        optimizer: As for ``distill``; it moves the weights behind the rounding.
        lr: Likewise.
        loss: Likewise.
        quantize: ``"weights"`` of convolutions and linear layers, or ``"all"`` parameters.
        quantize_first_last: Whether the first and the last of these layers take part.
        seed: Of everything random.

    Returns:
        The copy, which computes with rounded weights; those behind them are in full precision.

    Raises:
        ValueError: If an argument is out of its range, or student and teacher have different numbers of classes.
    """
    rounded = post_training_quantize(
        student, bits, bucket_size, quantize=quantize, quantize_first_last=quantize_first_last
    )
    return distill(rounded, teacher, loader, epochs=epochs, loss=loss, lr=lr, optimizer=optimizer, seed=seed)


def differentiable_quantization(
    model: _M,
    loader: Loader,
    *,
    bits: int = 4,
    bucket_size: int | None = 256,
    init: Start = "quantiles",
    lr: float = 1e-5,
    epochs: int = 10,
    allocate_bits: bool = False,
    optimizer: MakeOptimizer | None = None,
    loss: DistillationLoss | None = None,
    quantize: Which = "weights",
    quantize_first_last: bool = True,
    seed: int = 0,
) -> _M:
    """Learns the levels of a trained network's weights; the weights themselves stay.

    Args:
        model: A trained network, which is also the teacher; it is not changed.
        loader: Batches, as for :func:`netwright.compress.distill.distill`.
        bits: 1..16: each tensor has 2^bits points, or as many on average.
        bucket_size: Weights that share a scale; None for one scale a tensor.
        init: ``"quantiles"`` or ``"uniform"``, where points start.
        lr: Learning rate of SGD with Nesterov momentum 0.9. A point's gradient is a sum over thousands of weights.
        epochs: At least 1; the paper uses 10 at 4 bits and 20 at 2.
        allocate_bits: Give more points to tensors with larger gradients, see :func:`allocate_points`.
        optimizer: Makes another optimiser from the points.
        loss: As for ``distill``.
        quantize: As for :func:`quantized_distillation`.
        quantize_first_last: Likewise.
        seed: Of everything random.

    Returns:
        A copy with the learned points, and the batch-norm statistics that belong to them.

    Raises:
        ValueError: If an argument is out of its range, or ``lr`` is not positive.
    """
    from netwright.compress.callbacks import SortedPoints

    if not lr > 0:
        raise ValueError(f"lr must be > 0, got {lr}")
    counts: list[int] | None = None
    points = 2 ** check_bits(bits)
    if allocate_bits:
        counts = allocate_points(gradient_norms(model, loader, quantize, quantize_first_last), points)

    def make(parameter: Tensor, kept: Tensor | None, number: int) -> Quantizer:
        wanted = points if counts is None else counts[number]
        return DifferentiableQuantizer(parameter, wanted, bucket_size, init=init, kept=kept)

    placed, _ = quantize_with(model, make, quantize, quantize_first_last)
    state = [p.requires_grad for p in placed.parameters()]
    placed.requires_grad_(False)
    for *_, quantizer in quantizers(placed):
        quantizer.requires_grad_(True)

    def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True)

    distill(
        placed,
        model,
        loader,
        epochs=epochs,
        loss=loss,
        optimizer=optimizer or sgd,
        callbacks=[SortedPoints()],
        seed=seed,
    )
    for parameter, before in zip(placed.parameters(), state, strict=True):
        parameter.requires_grad_(before)
    return placed


def alternating_quantization(
    student: _M,
    teacher: nn.Module,
    loader: Loader,
    *,
    bits: int = 4,
    bucket_size: int | None = 256,
    init: Start = "quantiles",
    epochs: int = 10,
    lr: float = 0.05,
    points_lr: float = 1e-5,
    loss: DistillationLoss | None = None,
    quantize: Which = "weights",
    quantize_first_last: bool = True,
    seed: int = 0,
) -> _M:
    """Differentiable quantization and quantised distillation in turn, epoch by epoch; the last epoch is of the second.

    In one epoch the levels of a trained student move and all else stays, in the next its weights (and biases and norms)
    move behind the rounding and the levels stay.

    Args:
        student: A trained network; it is not changed.
        teacher: A trained network of as many classes.
        loader: Batches, as for :func:`netwright.compress.distill.distill`.
        bits: 1..16: each tensor has 2^bits points.
        bucket_size: Weights that share a scale; None for one scale a tensor.
        init: ``"quantiles"`` or ``"uniform"``, where points start.
        epochs: Of both together, at least 1.
        lr: Learning rate of the weights, as for ``distill``.
        points_lr: Learning rate of the points. A point's gradient is a sum over thousands of weights.
        loss: As for ``distill``.
        quantize: As for :func:`quantized_distillation`.
        quantize_first_last: Likewise.
        seed: Of everything random.

    Returns:
        The copy, which computes with weights at learned points; those behind them are in full precision.

    Raises:
        ValueError: If an argument is out of its range, or student and teacher have different numbers of classes.
    """
    from netwright.compress.callbacks import AlternatingEpochs, SortedPoints

    for name, value in (("lr", lr), ("points_lr", points_lr)):
        if not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")
    points = 2 ** check_bits(bits)

    def make(parameter: Tensor, kept: Tensor | None, number: int) -> Quantizer:
        return NonuniformQuantizer(parameter, points, bucket_size, init=init, kept=kept)

    placed, made = quantize_with(student, make, quantize, quantize_first_last)
    levels = {id(parameter) for quantizer in made for parameter in quantizer.parameters()}

    def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        found = list(parameters)
        weights = [p for p in found if id(p) not in levels]
        groups = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": WEIGHT_DECAY, "lr": lr},
            {"params": [p for p in weights if p.ndim < 2], "lr": lr},
            {"params": [p for p in found if id(p) in levels], "lr": points_lr},
        ]
        return torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=0.9, nesterov=True)

    turns = [SortedPoints(), AlternatingEpochs(levels)]
    return distill(placed, teacher, loader, epochs=epochs, loss=loss, optimizer=sgd, callbacks=turns, seed=seed)


def gradient_norms(
    model: nn.Module, data: Iterable[Sequence[Tensor]], which: Which = "weights", first_last: bool = True
) -> list[float]:
    """The norm of the cross-entropy's gradient in each tensor that would be quantised, averaged over 5 batches."""
    network = clone(to_dense(model)).train().requires_grad_(True)
    parameters = [parameter for _, _, parameter in targets(network, which, first_last)]
    totals = torch.zeros(len(parameters))
    seen = 0
    with frozen_statistics(network):
        for x, labels, *_ in data:
            if seen == MEASURED_BATCHES:
                break
            loss = nn.functional.cross_entropy(network(x.to(parameters[0].device)), labels.to(parameters[0].device))
            gradients = torch.autograd.grad(loss, parameters)
            totals += torch.stack([gradient.norm().cpu() for gradient in gradients])
            seen += 1
    if not seen:
        raise ValueError("data must hold at least 1 batch, got 0")
    return (totals / seen).tolist()


def allocate_points(grad_norms: Sequence[float], points_per_tensor: int) -> list[int]:
    """Shares out points among tensors: half of them evenly, the rest in proportion to the gradients.

    What rounding gives too much is taken from the largest, what it gives too little goes to the smallest; every tensor
    has at least two.

    Args:
        grad_norms: One number >= 0 for each tensor.
        points_per_tensor: Points a tensor has on average, >= 2.

    Raises:
        ValueError: If there is no tensor, a norm is negative or not finite, or ``points_per_tensor`` is below 2.

    Example:
        >>> allocate_points([3.0, 1.0], 8)
        [10, 6]
    """
    if not grad_norms or not all(0 <= norm < float("inf") for norm in grad_norms):
        raise ValueError(f"grad_norms must be finite numbers >= 0, at least one, got {list(grad_norms)}")
    if points_per_tensor < 2:
        raise ValueError(f"points_per_tensor must be >= 2, got {points_per_tensor}")
    number, total = len(grad_norms), points_per_tensor * len(grad_norms)
    base = points_per_tensor // 2
    whole = sum(grad_norms)
    shares = [norm / whole if whole > 0 else 1 / number for norm in grad_norms]
    counts = [max(2, base + round(share * (total - base * number))) for share in shares]
    while sum(counts) != total:
        if sum(counts) > total:
            counts[counts.index(max(counts))] -= 1
        else:
            counts[counts.index(min(counts))] += 1
    return counts
