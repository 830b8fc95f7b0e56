"""Gradient descent on all examples at once, recorded as it goes; beyond the edge of stability; and single steps anew.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.diagnose.gradients import Batched
from netwright.diagnose.losses import LossFunction, example_losses
from netwright.diagnose.opposing_signals.edge import chunk_size, sharpness, trained_parameters
from netwright.diagnose.opposing_signals.opposition import mean_gradient
from netwright.diagnose.opposing_signals.probe import as_tensors, probe_losses
from netwright.diagnose.opposing_signals.results import Groups
from netwright.diagnose.opposing_signals.tracker import OpposingSignalTracker
from netwright.nn.modes import in_mode
from netwright.results import Result


def full_batch_descent(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Batched,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    tracker: OpposingSignalTracker | None = None,
    before: Callable[[int], None] | None = None,
) -> list[float]:
    """Trains on the mean loss of all examples, whose losses a tracker takes over without a pass of its own.

    The model is in evaluation mode meanwhile, so that the losses are those of one function of the parameters: no
    dropout, running statistics in batch norms.

    Args:
        model: Maps a batch of inputs to outputs; trained in place.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        data: A pair of tensors (inputs, targets), or batches of such pairs.
        optimizer: Makes the steps.
        steps: How many, at least 1.
        tracker: Of the same model; with the same examples as its probe it is given their losses, else it makes a pass
            over its own.
        before: Called before each step, when its losses are recorded, and once after the last, with its number.

    Returns:
        The mean loss before each step and after the last, ``steps + 1`` numbers.

    Raises:
        ValueError: If ``steps`` is below 1, or the loss does not give one number an example.
        FloatingPointError: When a loss is no longer finite; the tracker holds what was before.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = net.weight.data.fill_(1.0)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> data = torch.ones(10, 1), torch.zeros(10)
        >>> means = full_batch_descent(net, lambda output, _: 0.5 * output[:, 0] ** 2, data, sgd, steps=2)
        >>> [round(mean, 4) for mean in means]
        [0.5, 0.125, 0.0312]
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    x, y = as_tensors(data)
    device = next(iter(trained_parameters(model).values())).device
    x, y = x.to(device), y.to(device)
    same = tracker is not None and torch.equal(tracker.x.to(device), x) and torch.equal(tracker.y.to(device), y)
    means: list[float] = []
    with in_mode(model, training=False), torch.enable_grad():
        count, _ = chunk_size(model, loss_fn, x, y)
        for step in range(steps + 1):
            optimizer.zero_grad()
            parts = []
            for a, b in zip(x.split(count), y.split(count), strict=True):
                losses = example_losses(loss_fn, model(a), b)
                if step < steps:
                    (losses.sum() / len(x)).backward()
                parts.append(losses.detach())
            every = torch.cat(parts)
            mean = float(every.mean())
            if not math.isfinite(mean):
                raise FloatingPointError(f"the mean loss became {mean} before step {step}: take a smaller rate")
            means.append(mean)
            if tracker is not None:
                tracker.record(step, every if same else None)
            if before is not None:
                before(step)
            if step < steps:
                optimizer.step()
        optimizer.zero_grad()
    return means


class NoEdgeError(ValueError):
    """A loss that does not curve, or steps that leave it at once, have no edge of stability."""


class EdgeReplay(NamedTuple):
    """Steps beyond the edge of stability.

    Attributes:
        tracker: Their record.
        sharpness: Largest eigenvalue of the Hessian before them.
        lrs: Size of each step.
    """

    tracker: OpposingSignalTracker
    sharpness: float
    lrs: tuple[float, ...]


def edge_replay(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Batched,
    steps: int = 40,
    beyond: float = 1.1,
    growth: float = 1.1,
) -> EdgeReplay:
    """Gradient descent from where a network is, just beyond the edge of stability, to see who would oscillate.

    With a step size of ``beyond * 2 / sharpness`` what is left along the sharpest direction grows by a factor of
    ``2 * beyond - 1`` a step and changes its sign. A network that is still learning may become flatter meanwhile, and
    one that was thrown out of a valley sharper: the step after one in which the mean loss fell is ``growth`` times as
    long. A rise shows that what grew unseen has become large: the step after it is at most as long as the first, and
    ``growth`` times shorter after each further rise. It ends early where a loss overflows.

    Args:
        model: Maps a batch of inputs to outputs; left as it was.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        data: A pair of tensors (inputs, targets), or batches of such pairs.
        steps: At least 2.
        beyond: Size of the first step over the largest stable one, > 0.
        growth: At least 1.

    Raises:
        ValueError: If a number is out of its range, there are fewer than 10 examples, or a loss is not finite.
        NoEdgeError: If the sharpness is not positive, or the losses overflow in the first two steps.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> x = torch.ones(10, 1)
        >>> found = edge_replay(net, lambda output, y: 0.5 * (output[:, 0] - y) ** 2, (x, torch.arange(10.0)))
        >>> round(found.sharpness, 3), round(found.lrs[0], 3), len(found.tracker.steps)
        (1.0, 2.2, 41)
    """
    if steps < 2:
        raise ValueError(f"steps must be >= 2, got {steps}")
    if not 0 < beyond < math.inf:
        raise ValueError(f"beyond must be > 0 and finite, got {beyond}")
    if not 1 <= growth < math.inf:
        raise ValueError(f"growth must be >= 1 and finite, got {growth}")
    x, y = as_tensors(data)
    params = trained_parameters(model)
    tracker = OpposingSignalTracker(model, loss_fn, (x, y))
    tracker.check_losses()
    top, _ = sharpness(model, loss_fn, (x, y))
    if not top > 0:
        raise NoEdgeError(f"the sharpness must be > 0, got {top:.3g}")
    first = beyond * 2 / top
    optimizer = torch.optim.SGD(params.values(), lr=first)
    (group,) = optimizer.param_groups
    lrs: list[float] = []

    def lengthen(step: int) -> None:
        means = tracker.losses()[-2:].mean(1).tolist()
        if len(means) == 2:
            if means[1] < means[0]:
                group["lr"] *= growth
            else:
                group["lr"] = first if group["lr"] > first else group["lr"] / growth
        if step < steps:
            lrs.append(group["lr"])

    saved = {name: param.detach().clone() for name, param in params.items()}
    slopes = {name: param.grad for name, param in params.items()}
    try:
        full_batch_descent(model, loss_fn, (x, y), optimizer, steps, tracker=tracker, before=lengthen)
    except FloatingPointError as error:
        if len(tracker.steps) < 3:
            raise NoEdgeError(f"losses must stay finite for 2 steps of size {lrs[0]:.3g}, got: {error}") from error
    finally:
        with torch.no_grad():
            for name, param in params.items():
                param.copy_(saved[name])
                param.grad = slopes[name]
    return EdgeReplay(tracker, top, tuple(lrs[: len(tracker.steps) - 1]))


@dataclasses.dataclass(frozen=True)
class StepReplay(Result):
    """One step of gradient descent made anew, whole and smaller.

    Attributes:
        step: The step.
        lr: Step size.
        factor: Of the smaller one.
        up: Change of the mean loss of ``groups.up`` by the whole and by the smaller step.
        down: Of ``groups.down``.
        all: Of all examples of the probe.
    """

    step: int
    lr: float
    factor: float
    up: tuple[float, float]
    down: tuple[float, float]
    all: tuple[float, float]


def replay_step(tracker: OpposingSignalTracker, groups: Groups, lr: float, factor: float = 0.5) -> StepReplay:
    """A step of gradient descent on the probe anew, with its step size and a smaller one: does a spike stay away?

    Args:
        tracker: Must have kept the parameters before the step.
        groups: Of the step, as ``tracker.groups`` gives them.
        lr: Step size, > 0.
        factor: By which it is made smaller, in (0, 1).

    Raises:
        ValueError: If a number is out of its range, or the parameters were not kept.

    Example:
        >>> net, x = nn.Linear(1, 1, bias=False), torch.ones(10, 1)
        >>> _ = net.weight.data.fill_(1.0)
        >>> loss, sgd = lambda output, _: 0.5 * output[:, 0] ** 2, torch.optim.SGD(net.parameters(), lr=2.5)
        >>> tracker = OpposingSignalTracker(net, loss, (x, x[:, 0]))
        >>> _ = full_batch_descent(net, loss, (x, x[:, 0]), sgd, 1, tracker=tracker)
        >>> found = replay_step(tracker, tracker.groups(), lr=2.5)      # 1 -> -1.5, and 1 -> -0.25
        >>> [round(change, 3) for change in found.all]
        [0.625, -0.469]
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be > 0 and finite, got {lr}")
    if not 0 < factor < 1:
        raise ValueError(f"factor must lie in (0, 1), got {factor}")
    model, loss_fn, x, y = tracker.model, tracker.loss_fn, tracker.x, tracker.y
    params = list(trained_parameters(model).values())
    changes = []
    with tracker.parameters_of(groups.step) as known:
        if not known:
            raise ValueError(
                f"the parameters before step {groups.step} must have been kept; they were for {tracker.snapshot_steps}"
            )
        before = probe_losses(model, loss_fn, x, y)
        slope = mean_gradient(model, loss_fn, x, y)
        moves = [part.view_as(p) for part, p in zip(slope.split([p.numel() for p in params]), params, strict=True)]
        start = [param.detach().clone() for param in params]
        for size in (lr, factor * lr):
            with torch.no_grad():
                for param, old, move in zip(params, start, moves, strict=True):
                    param.copy_(old - size * move)
            changes.append((probe_losses(model, loss_fn, x, y) - before).cpu())

    def means(members: Sequence[int]) -> tuple[float, float]:
        whole, smaller = (float(change[torch.tensor(members)].mean()) for change in changes)
        return whole, smaller

    return StepReplay(
        groups.step, lr, factor, means(groups.up), means(groups.down), means(range(len(x)))
    )  # fmt: skip


def feature_sweep(
    model: nn.Module, x: Float[Tensor, "batch ..."], direction: Float[Tensor, "..."], scales: Sequence[float]
) -> Float[Tensor, "scales batch classes"]:
    """Outputs while a feature of the inputs is turned up and down: those of x + s d for each s.

    Args:
        model: Maps a batch of inputs to outputs; in evaluation mode meanwhile, left as it was.
        x: Inputs.
        direction: d, of the shape of one input, or one that broadcasts to it.
        scales: The s, at least one.

    Raises:
        ValueError: If there is no scale, or the direction does not fit.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.fill_(1.0)
        >>> feature_sweep(net, torch.zeros(1, 2), torch.tensor([1.0, 1.0]), [-1.0, 0.0, 2.0]).flatten()
        tensor([-2.,  0.,  4.])
    """
    if not len(scales):
        raise ValueError("scales must hold at least 1 number, got 0")
    try:
        added = direction.to(x).expand(x.shape[1:])
    except RuntimeError as error:
        raise ValueError(
            f"direction must broadcast to an input {tuple(x.shape[1:])}, got {tuple(direction.shape)}"
        ) from error
    with in_mode(model, training=False), torch.no_grad():
        return torch.stack([model(x + scale * added) for scale in scales])
