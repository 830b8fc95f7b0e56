"""Latency in the experiments: tables and how well they foretell the clock, and networks measured in turns.

What is timed must have the machine to itself, so each function here does all of its measuring in one call: one arm of a
run, which no other runs beside. Its figures are plain values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.evidence import mean, spearman

if TYPE_CHECKING:
    from netwright.cost import LatencyTable
    from netwright.papers.run import Run
    from netwright.search.genotype import Genotype
    from netwright.search.latency import Setup, Shape
    from netwright.search.spaces import AnySpace

Settings = Mapping[str, Any]
"""Fields of a :class:`netwright.search.latency.Setup`."""


def settings(run: Run, devices: Mapping[str, int]) -> dict[str, Settings]:
    """How devices are measured that differ in the inputs at once: one alone on one thread, more on two.

    Args:
        run: The reproduction; it notes threads and timed calls.
        devices: Inputs at once, by name.
    """
    repeats = run.size("timed calls", full=200, fast=2, scaled=False)
    threads = run.size("threads of a device with several inputs at once", full=2, fast=1, scaled=False)
    calibration = run.size("networks that correct a latency table", full=30, fast=2, scaled=False)
    return {
        name: {
            "batch": inputs,
            "threads": threads if inputs > 1 else 1,
            "repeats": repeats,
            "calibration": calibration,
        }
        for name, inputs in devices.items()
    }


def tables(
    space: AnySpace, shape: Shape, devices: Mapping[str, Settings], count: int, draws: int = 1
) -> dict[str, Any]:
    """A latency table for every device, and how well it foretells random architectures.

    They are measured twice, with other weights and zeros: how well one measurement foretells the other is what no table
    can exceed.

    Args:
        space: The space.
        shape: (C, H, W) of one input.
        devices: How each is measured, by name.
        count: Random architectures to measure, at least 2.
        draws: Draws of weights and zeros over which a measurement is the mean, at least 1.

    Returns:
        By ``"DEVICE: table"`` the table's plain values (see :func:`read`), by ``"DEVICE: predicted, ms"`` and
        ``"DEVICE: measured, ms"`` both latencies of every architecture, what :func:`agreement` says of them, and by
        ``"DEVICE: Spearman, again"`` the rank correlation of the two measurements.
    """
    from netwright.search.latency import Setup, measure, predict
    from netwright.search.random_search import uniform_genotypes

    drawn = uniform_genotypes(space, count, seed=0)
    found: dict[str, Any] = {}
    for device, setting in devices.items():
        setup = Setup(**setting)
        table = measure(space, shape, setup=setup)
        predicted = [predict(space, genotype, table, shape) for genotype in drawn]
        one, other = range(draws), range(draws, 2 * draws)
        measured, again = (_mean_latencies(space, drawn, shape, setup, seeds) for seeds in (one, other))
        figures = agreement(predicted, measured) | {"predicted, ms": predicted, "measured, ms": measured}
        figures["Spearman, again"] = spearman(measured, again)
        found |= {f"{device}: {name}": value for name, value in {"table": table.to_dict(), **figures}.items()}
    return found


def _mean_latencies(
    space: AnySpace, genotypes: Sequence[Genotype], shape: Shape, setup: Setup, seeds: Iterable[int]
) -> list[float]:
    """Milliseconds of each architecture, the mean over draws of its weights and zeros."""
    from netwright.search.latency import measured_all

    found = [measured_all(space, genotypes, shape, setup=setup, seed=seed) for seed in seeds]
    return [mean(each) for each in zip(*found, strict=True)]


def read(figures: Mapping[str, Sequence[Any]], device: str) -> LatencyTable:
    """The table of a device from the arm that called :func:`tables`."""
    from netwright.cost import LatencyTable

    return LatencyTable.from_dict(figures[f"{device}: table"][0])


def agreement(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """How well one series foretells another that may lie higher by a constant.

    Returns:
        ``Pearson`` and ``Spearman`` correlation; ``constant, ms``, the median of what is missing; ``median relative
        error`` and ``largest relative error`` once it is added, and the median without it.

    Example:
        >>> found = agreement([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
        >>> found["constant, ms"], found["median relative error"], found["median relative error, no constant"]
        (0.5, 0.0, 0.2)
    """
    import numpy as np

    from netwright.metrics import pearson

    left, right = np.asarray(predicted), np.asarray(measured)
    constant = float(np.median(right - left))
    errors = np.abs(left + constant - right) / right
    return {
        "Pearson": pearson(predicted, measured),
        "Spearman": spearman(predicted, measured),
        "constant, ms": constant,
        "median relative error": float(np.median(errors)),
        "largest relative error": float(errors.max()),
        "median relative error, no constant": float(np.median(np.abs(left - right) / right)),
    }


def clock(space: AnySpace, shape: Shape, genotypes: Sequence[Mapping[str, Any]], setting: Settings) -> dict[str, Any]:
    """Milliseconds of architectures, given as plain values, by the clock: ``{"ms": [...]}``."""
    from netwright.search.genotype import Genotype
    from netwright.search.latency import Setup, measured_all

    found = [Genotype.from_dict(genotype) for genotype in genotypes]
    return {"ms": measured_all(space, found, shape, setup=Setup(**setting))}


def clocked(
    run: Run,
    name: str,
    genotypes: Iterable[Mapping[str, Any]],
    function: Callable[..., Mapping[str, Any]],
    setting: Settings,
) -> Callable[[Mapping[str, Any]], float]:
    """Measures architectures, given as plain values, all in turns in one arm of the run; equal ones once.

    Args:
        run: The reproduction.
        name: Of the arm.
        genotypes: What is to be measured.
        function: An experiment's ``function(seed, genotypes, setting)`` that calls :func:`clock` with its space.
        setting: How to measure.

    Returns:
        ``ms(genotype)``: the milliseconds of each.
    """
    from netwright.storage import digest

    distinct = {digest(genotype): genotype for genotype in genotypes}
    (ms,) = run.arms({name: [list(distinct.values()), dict(setting)]}, function, seeds=[0])[name]["ms"]
    times = dict(zip(distinct, ms, strict=True))
    return lambda genotype: float(times[digest(genotype)])


def specialised(
    run: Run,
    own: Mapping[str, Sequence[Mapping[str, Any]]],
    function: Callable[..., Mapping[str, Any]],
    devices: Mapping[str, Settings],
) -> dict[str, list[float]]:
    """Latency, on each of two devices, of the network searched for it over that of the network for the other one.

    Args:
        run: The reproduction.
        own: By device, for each seed, the architecture searched for it, as plain values.
        function: As for :func:`clocked`.
        devices: How each is measured.

    Returns:
        ``"DEVICE: own / other"`` for both, and ``log ratio``, the mean of their logarithms.
    """
    both = [genotype for each in own.values() for genotype in each]
    figures: dict[str, list[float]] = {}
    for device, ours in own.items():
        ms = clocked(run, f"latencies of networks for devices: {device}", both, function, devices[device])
        (theirs,) = (each for name, each in own.items() if name != device)
        figures[f"{device}: own / other"] = [ms(a) / ms(b) for a, b in zip(ours, theirs, strict=True)]
    logs = [[math.log(ratio) for ratio in each] for each in figures.values()]
    return figures | {"log ratio": [mean(each) for each in zip(*logs, strict=True)]}
