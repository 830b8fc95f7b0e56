"""The table of random architectures: what is trained, what is kept, and ranks."""

import pytest

from netwright.data.sources import DEBIAN_FASHION_MNIST
from netwright.papers import random_table
from netwright.papers.random_table import RandomTable
from netwright.papers.run import Run
from netwright.search import spaces
from netwright.seeding import stream

SPACE = "micro-darts-2-shared"


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Which genotypes were trained; accuracy grows with the number of the training."""
    calls = []

    def train(seed, genotype, protocol):
        calls.append((seed, genotype))
        return {"accuracy": 0.5 + 0.01 * len(calls), "parameters": len(calls)}

    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr("netwright.storage.cache_folder", lambda *names: cache)
    monkeypatch.setattr(random_table, "_train", train)
    return calls


def test_two_runs_share_what_was_trained(trained, tmp_path):
    tables = [
        random_table.tabulate(Run("darts-pt", fast=True, out=tmp_path / name), SPACE) for name in ("first", "second")
    ]
    assert tables[0] == tables[1]
    assert len(trained) == len(tables[0].accuracies) == 3
    assert len({str(genotype) for _, genotype in trained}) == 3
    assert tables[0].figures() == {"accuracy": [0.51, 0.52, 0.53], "parameters": [1, 2, 3]}


def test_another_seed_or_protocol_is_another_training(trained):
    genotype = {"space": SPACE}
    first = random_table.score(0, genotype, [64, 1, 250])
    assert random_table.score(0, genotype, [64, 1, 250]) == first
    assert random_table.score(1, genotype, [64, 1, 250]) != first
    assert random_table.score(0, genotype, [64, 2, 250]) != first
    assert len(trained) == 3


def test_sizes_are_noted_with_those_of_the_specification(tmp_path):
    run = Run("darts-pt", out=tmp_path)
    assert random_table.sizes(run) == [4000, 2, 4000]
    assert run.settings["table: training images"].specified == 6000


@pytest.mark.parametrize(("accuracy", "percentile"), [(0.4, 0.0), (0.5, 12.5), (0.65, 75.0), (0.9, 100.0)])
def test_percentile(accuracy, percentile):
    table = RandomTable(SPACE, (0.5, 0.6, 0.6, 0.7), (1, 2, 3, 4), ({},) * 4)
    assert table.percentile(accuracy) == percentile


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_a_real_entry_is_the_same_twice():
    genotype = spaces.get(SPACE).random(stream(0, "random")).to_dict()
    first, second = (random_table._train(0, genotype, [128, 1, 250]) for _ in range(2))
    assert first == second
    assert 0 <= first["accuracy"] <= 1
    assert first["parameters"] > 100
