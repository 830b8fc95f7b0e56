from collections import Counter

import pytest

from netwright.search import spaces
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
