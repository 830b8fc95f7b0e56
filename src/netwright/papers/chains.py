"""Networks of chains in the experiments: trained alike, and the line of random ones that others are held against."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import small_images
from netwright.papers.evidence import Verdict, all_of, compare, mean

if TYPE_CHECKING:
    import torch

    from netwright.papers.run import Arms
    from netwright.search.genotype import Genotype
    from netwright.search.spaces.choices import ChoiceSpace
    from netwright.search.supernet import Supernet

SHAPE = (1, 16, 16)
LR = 0.1
DRAWS = 10_000


def trained(
    seed: int, genotypes: Sequence[Mapping[str, Any]], images: Sequence[int], test: int, sizes: Sequence[int]
) -> dict[str, list[float]]:
    """Trains the network of every architecture from scratch on the training images of a search.

    Args:
        seed: Of the images, the weights and the order.
        genotypes: Architectures as plain values, of a registered space.
        images: Training and validation images.
        test: Test images.
        sizes: Images in a batch, and epochs.

    Returns:
        ``accuracy`` on test images, ``validation`` accuracy, ``macs`` and ``parameters``, each a list.
    """
    from netwright.cost import count
    from netwright.data import Batches
    from netwright.metrics import accuracy
    from netwright.search.genotype import Genotype
    from netwright.train import evaluate

    batch, epochs = sizes
    parts, normalise = small_images.parts(seed, *images, test)
    whole = Batches(parts["test"], 500, shuffle=False, drop_last=False, normalise=normalise)
    found: dict[str, list[float]] = {"accuracy": [], "validation": [], "macs": [], "parameters": []}
    for genotype in genotypes:
        network = Genotype.from_dict(genotype).build(SHAPE[0], 10, seed=seed)
        validation = small_images.trained_accuracy(
            network, parts["train"], parts["validation"], normalise, batch=batch, epochs=epochs, lr=LR, seed=seed
        )
        cost = count(network, SHAPE)
        values = accuracy(*evaluate(network, whole)), validation, cost.macs, cost.parameters
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return found


def best(scores: Sequence[float]) -> int:
    """The place of the highest score; the first of equals.

    Example:
        >>> best([0.7, 0.9, 0.9])
        1
    """
    return max(range(len(scores)), key=lambda place: scores[place])


def placed(
    genotypes: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    scores: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    ms: Callable[[Mapping[str, Any]], float],
) -> Arms:
    """Of what each way found: accuracy, latency, and the accuracy that random networks have at that latency.

    Args:
        genotypes: By way, for each seed, the architectures to choose among, ``"random"`` among the ways.
        scores: What :func:`trained` gave for them, by way and seed; further ones at the end are left out.
        ms: The latency of an architecture.

    Returns:
        Of every way the network that is best on validation images; of ``"random"`` the means.
    """
    times = {way: [[ms(genotype) for genotype in each] for each in by_seed] for way, by_seed in genotypes.items()}
    level = line(times["random"], scores["random"]["accuracy"])
    arms: Arms = {}
    for way, by_seed in times.items():
        rows = {**scores[way], "latency, ms": by_seed}
        if way == "random":
            arms[way] = {name: [mean(each) for each in values] for name, values in rows.items()}
            continue
        places = [best(each[: len(row)]) for each, row in zip(rows["validation"], by_seed, strict=True)]
        arms[way] = {
            name: [each[place] for each, place in zip(values, places, strict=True)] for name, values in rows.items()
        }
        arms[way]["accuracy of random ones"] = [level(i, each) for i, each in enumerate(arms[way]["latency, ms"])]
    return arms


def undecided(supernet: Supernet, table: Mapping[Any, float]) -> float:
    """The cost of a supernet whose candidates are all equally probable, with the constant if there is one."""
    from netwright.search.latency import CONSTANT

    rows = supernet.candidate_costs(table, SHAPE).values()
    return sum(mean(row) for row in rows) + float(table.get(CONSTANT, 0.0))


def macs_range(space: ChoiceSpace, genotypes: Iterable[Mapping[str, Any]], margin: float = 0.1) -> tuple[float, float]:
    """Least and most multiply-adds of what architectures, given as plain values, chose, with a margin on both sides."""
    from netwright.search.genotype import Genotype

    costs = [_macs(space, Genotype.from_dict(genotype)) for genotype in genotypes]
    return (1 - margin) * min(costs), (1 + margin) * max(costs)


def random_within(
    space: ChoiceSpace, low: float, high: float, count: int, generator: torch.Generator
) -> list[dict[str, Any]]:
    """Different random architectures, as plain values, whose choices have multiply-adds between two bounds.

    Raises:
        ValueError: If too few are found.
    """
    found: dict[Genotype, None] = {}
    for _ in range(DRAWS):
        drawn = space.random(generator)
        if low <= _macs(space, drawn) <= high:
            found[drawn] = None
        if len(found) == count:
            return [genotype.to_dict() for genotype in found]
    raise ValueError(f"the bounds must leave {count} architectures, got {low:g} to {high:g} with {len(found)}")


def _macs(space: ChoiceSpace, genotype: Genotype) -> float:
    costs = _candidates(space)
    return sum(costs[key][name] for key, name in space.decisions(genotype).items())


@functools.lru_cache(maxsize=8)
def _candidates(space: ChoiceSpace) -> dict[str, dict[str, float]]:
    """Multiply-adds of every candidate for one image, by key and name."""

    from netwright.search.pricing import operation_macs

    supernet = space.supernet(SHAPE[0], 10)
    table = operation_macs(supernet, SHAPE)
    names = space.choices()
    return {key: dict(zip(names[key], row, strict=True)) for key, row in supernet.candidate_costs(table, SHAPE).items()}


def cheaper(ours: Mapping[str, Sequence[float]], free: Mapping[str, Sequence[float]]) -> Verdict:
    """Whether networks found under a penalty take at least 15 % less time for at most 1.5 points of accuracy."""
    ratio = [a / b for a, b in zip(ours["latency, ms"], free["latency, ms"], strict=True)]
    return all_of(
        compare(ratio, 0.0, direction="less", margin=0.85),
        compare(ours["accuracy"], free["accuracy"], margin=-0.015),
    )


def line(latencies: Sequence[Sequence[float]], accuracies: Sequence[Sequence[float]]) -> Callable[[int, float], float]:
    """The accuracy that random networks have at a latency: straight in its logarithm, one slope, a level a seed.

    Args:
        latencies, accuracies: Of each seed's random networks, in the same order.

    Returns:
        ``level(place, latency)``: the accuracy for the seed at a place.

    Example:
        >>> level = line([[1.0, math.e], [1.0, math.e]], [[0.5, 0.6], [0.7, 0.8]])
        >>> round(level(0, 1.0), 4), round(level(1, math.e**2), 4)
        (0.5, 0.9)
    """
    xs = [[math.log(latency) for latency in each] for each in latencies]
    middles = [(mean(x), mean(y)) for x, y in zip(xs, accuracies, strict=True)]
    gaps = [
        (a - x0, b - y0)
        for x, y, (x0, y0) in zip(xs, accuracies, middles, strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    spread = sum(a * a for a, _ in gaps)
    slope = sum(a * b for a, b in gaps) / spread if spread else 0.0

    def level(place: int, latency: float) -> float:
        x0, y0 = middles[place]
        return y0 + slope * (math.log(latency) - x0)

    return level
