"""Random networks beside those that were found: the line, what is chosen, and what a network costs."""

from __future__ import annotations

import math

import numpy as np
import pytest

from netwright.cost import count
from netwright.data.sources import DEBIAN_FASHION_MNIST
from netwright.papers import chains, fbnet
from netwright.search.genotype import Genotype
from netwright.search.latency import CONSTANT
from netwright.seeding import stream


def test_the_line_is_a_regression_with_a_level_a_seed():
    generator = np.random.default_rng(0)
    latencies = np.exp(generator.normal(size=(4, 6)))
    accuracies = (
        0.7 + 0.02 * np.log(latencies) + generator.normal(scale=0.01, size=(4, 6)) + 0.05 * np.arange(4)[:, None]
    )
    level = chains.line(latencies.tolist(), accuracies.tolist())
    design = np.concatenate([np.repeat(np.eye(4), 6, axis=0), np.log(latencies).reshape(-1, 1)], axis=1)
    solution = np.linalg.lstsq(design, accuracies.reshape(-1), rcond=None)[0]
    for place in range(4):
        assert level(place, 2.5) == pytest.approx(solution[place] + solution[4] * math.log(2.5))


def test_equal_latencies_give_the_mean():
    assert chains.line([[2.0, 2.0]], [[0.1, 0.3]])(0, 9.0) == pytest.approx(0.2)


def test_the_best_on_validation_is_placed_beside_the_line():
    genotypes = {"ours": [[{"g": 1}, {"g": 2}], [{"g": 3}, {"g": 1}]], "random": [[{"g": 1}, {"g": 2}]] * 2}
    genotypes["first of ours"] = [each[:1] for each in genotypes["ours"]]
    ours = {"accuracy": [[0.5, 0.6], [0.7, 0.8]], "validation": [[0.1, 0.9], [0.9, 0.1]]}
    random = {"accuracy": [[0.4, 0.5], [0.6, 0.7]], "validation": [[0.5, 0.5], [0.5, 0.5]]}
    trained = {"ours": ours, "first of ours": ours, "random": random}
    arms = chains.placed(genotypes, trained, lambda genotype: math.exp(genotype["g"]))
    assert arms["ours"]["accuracy"] == [0.6, 0.7]
    assert arms["ours"]["latency, ms"] == pytest.approx([math.exp(2), math.exp(3)])
    assert arms["ours"]["accuracy of random ones"] == pytest.approx([0.5, 0.8])
    assert arms["first of ours"]["accuracy"] == [0.5, 0.7]
    assert arms["random"]["accuracy"] == pytest.approx([0.45, 0.65])
    assert "accuracy of random ones" not in arms["random"]


def test_random_networks_keep_within_the_multiply_adds_of_others():
    space = fbnet.space()
    drawn = [space.random(stream(seed, "drawn")).to_dict() for seed in range(3)]
    low, high = chains.macs_range(space, drawn, margin=0.0)

    def macs(genotype):
        return count(space.build(Genotype.from_dict(genotype), 1, 10), chains.SHAPE).macs

    costs = [macs(genotype) for genotype in drawn]
    always = min(costs) - low  # stem and classifier
    assert 0 < always < 0.5 * min(costs)
    assert high == max(costs) - always
    assert chains.macs_range(space, drawn) == pytest.approx((0.9 * low, 1.1 * high))
    found = chains.random_within(space, low, high, 5, stream(0, "random"))
    assert len({str(g) for g in found}) == 5
    assert all(low <= macs(genotype) - always <= high for genotype in found)


def test_bounds_that_leave_too_few_are_refused(monkeypatch):
    monkeypatch.setattr(chains, "DRAWS", 20)
    with pytest.raises(ValueError, match="bounds must leave 2 architectures, got 1 to 2 with 0"):
        chains.random_within(fbnet.space(), 1.0, 2.0, 2, stream(0, "random"))


def test_the_undecided_supernet_costs_the_mean_of_every_choice():
    supernet = fbnet.space().supernet(1, 10)
    table = {key: float(number) for number, key in enumerate(supernet.operations(chains.SHAPE), start=1)}
    for theta in supernet.arch_parameters():
        theta.data.zero_()
    whole = supernet.expected_cost(table, chains.SHAPE, drawn=False).item()
    assert chains.undecided(supernet, table) == pytest.approx(whole)
    assert chains.undecided(supernet, table | {CONSTANT: 5.0}) == pytest.approx(whole + 5)


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_networks_are_trained_alike():
    space = fbnet.space()
    genotypes = [space.random(stream(seed, "trained")).to_dict() for seed in range(2)]
    both = chains.trained(0, genotypes, [64, 32], 250, [16, 1])
    (alone,) = (chains.trained(0, genotypes[1:], [64, 32], 250, [16, 1]),)
    assert {name: values[1:] for name, values in both.items()} == alone
    assert set(both) == {"accuracy", "validation", "macs", "parameters"}
    assert all(0 <= value <= 1 for value in both["accuracy"] + both["validation"])
