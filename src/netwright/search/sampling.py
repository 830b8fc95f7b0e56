"""Selection by sampling: architectures are drawn from the distribution that a search has learned, the best is kept.

Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search", CVPR 2019,
arXiv:1812.03443: P(a) = prod_l P_l(a_l) with P_l = softmax(theta_l), drawn by the Gumbel-max trick,

    a_l = argmax_i (log P_l,i + g_l,i),    g = -log(-log U),    U ~ Uniform(0, 1).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from netwright.checks import whole
from netwright.nn.batchnorm import recalibrate
from netwright.search.pairs import to_device
from netwright.search.pricing import WithinLimits
from netwright.search.protocol import need, need_gates
from netwright.search.selection import mixing
from netwright.seeding import stream

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.pricing import Limits
    from netwright.search.supernet import Supernet

CALIBRATION_BATCHES = 20


def sample_genotypes(supernet: Supernet, count: int, *, generator: torch.Generator) -> list[Genotype]:
    """Genotypes drawn from the mixing weights, each choice by itself; the same one may come twice.

    The log weights are perturbed and the space's own rule reads the genotype off: in a space that keeps all choices
    each candidate comes with its probability; a node of a cell keeps the two edges that are then the strongest.

    Args:
        supernet: A supernet.
        count: How many.
        generator: Of the draws, on the CPU.

    Raises:
        ValueError: If ``count`` is below 1, or the supernet has no probabilities to draw by: superkernels decide.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-chain").supernet(1, 10)
        >>> _ = supernet.arch["layer_0"].data[2].fill_(99.0)
        >>> {g.operations[0] for g in sample_genotypes(supernet, 5, generator=stream(0, "samples"))}
        {'k5_e2'}
    """
    whole("count", count, ">= 1")
    need_gates("a draw of genotypes", supernet, "whose weights are probabilities")
    space, weights = supernet.space, mixing(supernet)
    rule = space.selector()

    def perturbed(m: Tensor) -> Tensor:
        noise = torch.empty(m.shape, dtype=torch.float64).exponential_(generator=generator).log().neg()
        return (m.double().log() + noise).softmax(-1)

    return [rule.read(space, {key: (names, perturbed(m)) for key, (names, m) in weights.items()}) for _ in range(count)]


def inherited_accuracy(
    supernet: Supernet,
    genotype: Genotype,
    train: Iterable[Any],
    val: Iterable[Any],
    *,
    calibration_batches: int = CALIBRATION_BATCHES,
) -> float:
    """Accuracy of a genotype with the weights that it has in the supernet, in [0, 1]; all processes' batches count.

    In the search a batch norm saw mixtures, not what one candidate gives, so its statistics are measured anew on
    training batches first. The supernet is not changed.

    Args:
        supernet: A trained supernet.
        genotype: An architecture of its space.
        train: Batches for the statistics.
        val: Batches ``(inputs, labels)``.
        calibration_batches: Training batches to use.

    Raises:
        ValueError: If a loader is missing or has no batch.
    """
    for name, loader in (("train", train), ("val", val)):
        if loader is None:
            raise ValueError(f"{name} must be batches (inputs, labels), got None")
    need("inherited_accuracy", supernet, "adopt")
    network: Supernet = copy.deepcopy(supernet)
    network.adopt(genotype)
    device = next(network.parameters()).device
    calibrating = (to_device(batch, device) for batch in itertools.islice(train, calibration_batches))
    recalibrate(network, calibrating).eval()
    counts = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in val:
            x, labels = to_device(batch, device)[:2]
            counts += torch.tensor([int((network(x).argmax(-1) == labels).sum()), len(labels)])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        counts = counts.to(device)
        torch.distributed.all_reduce(counts)
    if not counts[1]:
        raise ValueError("val must hold at least 1 batch, got 0")
    return float(counts[0] / counts[1])


class SampleSelector:
    """Draws architectures, scores them and the most probable one, and keeps the best; ties: the first.

    Args:
        samples: Architectures to draw; equal ones are scored once.
        evaluate: Score of a genotype, higher is better: the paper trains each. By default
            :func:`inherited_accuracy`, which trains nothing.
        limits: What a candidate may cost; the most probable one is then the most probable within them.

    Raises:
        ValueError: If ``samples`` is below 0; in :meth:`select`, if there is nothing to score on.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-chain").supernet(1, 10)
        >>> selector = SampleSelector(samples=3, evaluate=lambda genotype: genotype.skip_share)
        >>> len(selector.candidates(supernet)), selector.select(supernet).space
        (4, 'micro-chain')
    """

    def __init__(
        self,
        samples: int = 6,
        evaluate: Callable[[Genotype], float] | None = None,
        limits: Limits | None = None,
    ):
        whole("samples", samples, ">= 0")
        self.samples, self.evaluate, self.limits = samples, evaluate, limits

    def candidates(self, supernet: Supernet, *, seed: int = 0) -> list[Genotype]:
        """What is scored: the most probable architecture, then the drawn ones, each once."""
        limits = self.limits
        found = [supernet.derive() if limits is None else WithinLimits(limits).select(supernet)]
        if self.samples:
            drawn = sample_genotypes(supernet, self.samples, generator=stream(seed, "samples"))
            found += [genotype for genotype in drawn if limits is None or not limits.over(supernet, genotype)]
        return list(dict.fromkeys(found))

    def select(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        val: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Genotype:
        """The best candidate; the data are not needed when there is an ``evaluate``."""
        candidates = self.candidates(supernet, seed=seed)
        if self.evaluate is not None:
            scores = [float(self.evaluate(genotype)) for genotype in candidates]
        elif train is None or val is None:
            raise ValueError(
                "train and val must be batches to score samples on, got None; give an evaluate, or select by "
                "the space's own rule"
            )
        else:
            scores = [inherited_accuracy(supernet, genotype, train, val) for genotype in candidates]
        return candidates[max(range(len(scores)), key=lambda i: scores[i])]
