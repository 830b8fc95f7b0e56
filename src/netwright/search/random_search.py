"""Random search: the baseline that every search has to beat at the same budget.

Li and Talwalkar, "Random Search and Reproducibility for Neural Architecture Search", UAI 2019, arXiv:1902.07638.

    g_1, ..., g_n ~ Uniform(space),    best = argmax_i score(g_i)

A search over shared weights is compared with :func:`uniform_genotypes` of its space, which cost nothing to find.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from netwright.parallel import run_all
from netwright.results import new_axes
from netwright.search.result import SearchResult
from netwright.seeding import stream

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.search.genotype import Genotype
    from netwright.search.spaces import AnySpace


def uniform_genotypes(space: AnySpace, count: int, *, seed: int) -> list[Genotype]:
    """Different genotypes, drawn uniformly from a space without replacement.

    Args:
        space: The search space.
        count: How many; the first of more are the same as those of fewer.
        seed: Seed of the draw.

    Raises:
        ValueError: If ``count`` is below 1 or above the number of genotypes in the space.

    Example:
        >>> from netwright.search import spaces
        >>> space = spaces.get("micro-darts-2-shared")
        >>> few, more = uniform_genotypes(space, 3, seed=0), uniform_genotypes(space, 5, seed=0)
        >>> more[:3] == few, len(set(more))
        (True, 5)
    """
    if not 1 <= count <= space.size:
        raise ValueError(f"count must lie in 1..{space.size} for space {space.name!r}, got {count}")
    return list(itertools.islice(_drawn(space, seed), count))


def _drawn(space: AnySpace, seed: int) -> Iterator[Genotype]:
    """Different genotypes, one after the other, as many as the space has."""
    generator = stream(seed, "random search", space.name)
    found: set[Genotype] = set()
    while len(found) < space.size:
        genotype = space.random(generator)
        if genotype not in found:
            found.add(genotype)
            yield genotype


def percentile(scores: Sequence[float], score: float) -> float:
    """Share of ``scores`` that ``score`` beats, ties counting half, in percent.

    Raises:
        ValueError: If there are no scores.

    Example:
        >>> percentile((0.1, 0.2, 0.2, 0.4), 0.2)
        50.0
    """
    if not scores:
        raise ValueError("scores must hold at least 1 value, got 0")
    beaten = sum((other < score) + 0.5 * (other == score) for other in scores)
    return 100.0 * beaten / len(scores)


@dataclass(frozen=True, eq=False)
class RandomSearchResult(SearchResult):
    """The best of the random architectures, and all of them.

    Attributes:
        genotypes: Every architecture, in the order drawn.
        scores: The score of each; higher is better.
    """

    genotypes: tuple[Genotype, ...] = ()
    scores: tuple[float, ...] = ()

    def percentile(self, score: float) -> float:
        """Share of the random architectures that ``score`` beats, ties counting half, in percent.

        Example:
            >>> RandomSearchResult(None, scores=(0.1, 0.2, 0.2, 0.4)).percentile(0.2)
            50.0
        """
        return percentile(self.scores, score)

    def __str__(self) -> str:
        scores = sorted(self.scores)
        return (
            f"best {scores[-1]:.4g}, median {scores[len(scores) // 2]:.4g}, worst {scores[0]:.4g} "
            f"of {len(scores)}\n{self.genotype}"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """The best score so far over the trials, and each trial."""
        ax = new_axes(ax)
        trials = range(1, len(self.scores) + 1)
        ax.plot(trials, self.scores, ".", color="0.6", label="trial")
        ax.step(trials, [max(self.scores[:i]) for i in trials], where="post", label="best so far")
        ax.set_xlabel("trial")
        ax.set_ylabel("score")
        ax.legend()
        return ax


class RandomSearch:
    """Scores random architectures of a space one by one and keeps the best.

    Args:
        space: The search space.
        evaluate: Score of a genotype, higher is better; a module-level function when several processes are used.
        trials: Number of different architectures.

    Raises:
        ValueError: If ``trials`` is below 1 or above the number of genotypes in the space.

    Example:
        >>> from netwright.search import spaces
        >>> space = spaces.get("micro-darts-2-shared")
        >>> result = RandomSearch(space, lambda genotype: 1 - genotype.skip_share, trials=20).search(seed=0)
        >>> len(result.scores), 1 - result.genotype.skip_share == max(result.scores)
        (20, True)
    """

    def __init__(self, space: AnySpace, evaluate: Callable[[Genotype], float], trials: int = 24):
        if not 1 <= trials <= space.size:
            raise ValueError(f"trials must lie in 1..{space.size} for space {space.name!r}, got {trials}")
        self.space, self.evaluate, self.trials = space, evaluate, trials

    def search(
        self, *, seed: int, jobs: int = 1, ray: str | None = None, seconds: float | None = None
    ) -> RandomSearchResult:
        """Draws, scores and ranks; ties go to the first drawn.

        Args:
            seed: Seed of the draw.
            jobs: Processes at once.
            ray: Address of a Ray cluster.
            seconds: Wall time, > 0: as many trials as end nearest to it, one after the other, at least one and at most
                ``trials``.

        Raises:
            ValueError: If ``seconds`` is not positive, or comes with several processes.
            FloatingPointError: If a score is not finite.
        """
        if seconds is not None and not seconds > 0:
            raise ValueError(f"seconds must be > 0 or None, got {seconds}")
        if seconds is not None and (jobs != 1 or ray is not None):
            raise ValueError(f"seconds must be None where trials run side by side, got {seconds}")
        start = time.perf_counter()
        if seconds is None:
            genotypes = uniform_genotypes(self.space, self.trials, seed=seed)
            calls = [(genotype,) for genotype in genotypes]
            scores = [
                float(s) for s in run_all(self.evaluate, calls, jobs=jobs, ray=ray, description="random architectures")
            ]
        else:
            genotypes, scores = [], []
            for genotype in itertools.islice(_drawn(self.space, seed), self.trials):
                genotypes.append(genotype)
                scores.append(float(self.evaluate(genotype)))
                spent = time.perf_counter() - start
                if spent + spent / len(scores) / 2 > seconds:
                    break
        for genotype, score in zip(genotypes, scores, strict=True):
            if not -float("inf") < score < float("inf"):
                raise FloatingPointError(f"the score of every genotype must be finite, got {score} for {genotype}")
        best = max(range(len(scores)), key=lambda i: scores[i])
        return RandomSearchResult(
            genotype=genotypes[best],
            seed=seed,
            wall_time=time.perf_counter() - start,
            config={"searcher": type(self).__name__, "space": self.space.name, "trials": len(scores)},
            genotypes=tuple(genotypes),
            scores=tuple(scores),
        )
