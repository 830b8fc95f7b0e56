from collections import Counter
from types import SimpleNamespace

import pytest

from netwright.search import random_search, spaces
from netwright.search.random_search import RandomSearch, RandomSearchResult, uniform_genotypes

SPACE = spaces.get("micro-darts-2-shared")


def convolutions(genotype):
    return float(genotype.convolutions)


def test_uniform_genotypes_are_different_and_uniform():
    found = uniform_genotypes(SPACE, 600, seed=0)
    assert len(set(found)) == 600
    for genotype in found[:50]:
        SPACE.validate(genotype)
    counts = Counter(name for g in found for name, _ in g.normal.ops)
    expected = 600 * 4 / 4
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 16.3  # chi-square, 3 degrees, p = 0.001
    predecessors = Counter(tuple(p for _, p in g.normal.ops[2:]) for g in found)
    assert sum((predecessors[pair] - 200) ** 2 / 200 for pair in [(0, 1), (0, 2), (1, 2)]) < 13.8


def test_the_whole_space_can_be_drawn():
    assert len(set(uniform_genotypes(SPACE, SPACE.size, seed=1))) == SPACE.size == 768


def test_seeds():
    assert uniform_genotypes(SPACE, 5, seed=0) == uniform_genotypes(SPACE, 5, seed=0)
    assert uniform_genotypes(SPACE, 5, seed=0) != uniform_genotypes(SPACE, 5, seed=1)


def test_the_best_is_kept():
    result = RandomSearch(SPACE, convolutions, trials=12).search(seed=0)
    assert result.genotypes == tuple(uniform_genotypes(SPACE, 12, seed=0))
    assert list(result.scores) == [convolutions(g) for g in result.genotypes]
    assert result.genotype == result.genotypes[result.scores.index(max(result.scores))]
    assert result.config["trials"] == 12
    assert result.to_dict()["scores"] == list(result.scores)
    assert "best" in str(result)
    assert list(result.plot().lines[1].get_ydata())[-1] == max(result.scores)


def test_percentile():
    result = RandomSearchResult(None, scores=(1.0, 2.0, 3.0, 4.0))
    assert [result.percentile(x) for x in (0.0, 2.5, 3.0, 5.0)] == [0.0, 50.0, 62.5, 100.0]
    with pytest.raises(ValueError, match="at least 1"):
        RandomSearchResult(None).percentile(1.0)


def test_refusals():
    for count in (0, SPACE.size + 1):
        with pytest.raises(ValueError, match=r"count must lie in 1\.\.768"):
            uniform_genotypes(SPACE, count, seed=0)
        with pytest.raises(ValueError, match=r"trials must lie in 1\.\.768"):
            RandomSearch(SPACE, convolutions, trials=count)
    with pytest.raises(FloatingPointError, match="score of every genotype"):
        RandomSearch(SPACE, lambda g: float("nan"), trials=2).search(seed=0)


def test_as_many_trials_as_end_nearest_to_the_time(monkeypatch):
    clock = SimpleNamespace(now=50.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(random_search, "time", clock)

    def evaluate(genotype):
        clock.now += 2.0
        return convolutions(genotype)

    def trials(seconds, most=24):
        return RandomSearch(SPACE, evaluate, trials=most).search(seed=0, seconds=seconds)

    assert [len(trials(seconds).scores) for seconds in (0.1, 4.0, 10.9, 11.1)] == [1, 2, 5, 6]
    result = trials(8.0)
    assert result.genotypes == tuple(uniform_genotypes(SPACE, 4, seed=0))
    assert (result.wall_time, result.config["trials"]) == (8.0, 4)
    assert len(trials(1e9, most=3).scores) == 3
    with pytest.raises(ValueError, match="seconds must be > 0 or None, got 0"):
        trials(0)
    with pytest.raises(ValueError, match="seconds must be None where trials run side by side"):
        RandomSearch(SPACE, evaluate).search(seed=0, jobs=2, seconds=1.0)
