"""What a step of training takes on this machine, and what follows from it for the end of a run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from netwright.cost import count
from netwright.seeding import stream

# Below this many multiply-adds a step, a second thread costs more than it brings.
THREADED_MACS = 1.5e8

# Seconds of the end of a run that hardly depend on the data, and batches that the rounds of timing files are worth.
REPORT_SECONDS, EXPORT_SECONDS, TIMED_BATCHES = 8.0, 4.0, 40
# Seconds of robustness radii, by bounds and by the exact engine or on a grid, and the share of a time budget that they
# take at most.
BOUNDS_SECONDS, SOLVER_SECONDS, RADII_SHARE = 10.0, 20.0, 0.05
RADII_SECONDS = BOUNDS_SECONDS + SOLVER_SECONDS


def step_seconds(step: Callable[[], object], *, repeats: int = 4, most: float = 6.0) -> float:
    """Median seconds of a step after one untimed call, spending at most about ``most`` seconds.

    Example:
        >>> step_seconds(lambda: sum(range(1000))) > 0
        True
    """
    step()
    times: list[float] = []
    while len(times) < repeats and (not times or sum(times) + times[-1] < most):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def training_step(
    network: nn.Module, shape: tuple[int, int, int], classes: int, batch_size: int
) -> Callable[[], object]:
    """One step of stochastic gradient descent on random images, for timing."""
    from netwright.train import channels_last

    generator = stream(0, "plan")
    network = network.train().to(memory_format=torch.channels_last)
    images = channels_last(torch.randn(batch_size, *shape, generator=generator))
    labels = torch.randint(classes, (batch_size,), generator=generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def threads_for(network: nn.Module, shape: tuple[int, int, int], batch_size: int) -> int:
    """Threads for training a network: all that torch has, or 1 where the work is too small to be shared."""
    return torch.get_num_threads() if count(network, shape).macs * batch_size >= THREADED_MACS else 1


def radii_share(budget: float | None) -> float:
    """The share of their usual seconds that robustness radii may take under a time budget, in (0, 1].

    Example:
        >>> radii_share(None), radii_share(300.0)
        (1.0, 0.5)
    """
    return 1.0 if budget is None else min(1.0, RADII_SHARE * budget / RADII_SECONDS)


def finish_seconds(
    model: float, baseline: float, tested: int, batch_size: int, *, exports: int = 4, budget: float | None = None
) -> float:
    """Seconds that export, measuring and the report need, from those of a training step of both networks.

    Each network is measured before and after pruning. A pass forward counts as a third of a step.

    Example:
        >>> finish_seconds(0.0, 0.0, 1000, 64) == 4 * EXPORT_SECONDS + REPORT_SECONDS + RADII_SECONDS
        True
    """
    batches = math.ceil(tested / batch_size)
    forward = 2 * (model + baseline) * (batches + TIMED_BATCHES) + model * batches  # the last: the file is checked
    return REPORT_SECONDS + radii_share(budget) * RADII_SECONDS + exports * EXPORT_SECONDS + forward / 3
