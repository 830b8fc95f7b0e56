"""Single-Path NAS's experiment: verdicts from made-up figures, its references, one search of each kind."""

from __future__ import annotations

import pytest
import torch

from netwright.cost import LatencyTable
from netwright.papers import single_path_nas
from netwright.papers.random_table import RandomTable
from netwright.search import spaces
from netwright.search.latency import predict
from netwright.seeding import stream

SEEDS = 5
SPACE = spaces.get("micro-chain")


def spread(value, step=0.001):
    return [value + step * i for i in range(SEEDS)]


def arms(
    *, largest=1.1, paths=0.38, beyond=18, r=0.95, latencies=(9.0, 6.0, 3.0), mended=0, above=0.02, other=0.01, rank=70
):
    times = {"rounds": [20]}
    for name, value in (("largest", largest), ("all paths", paths)):
        for part, shift in (("", 0.0), (", lower", -0.01), (", upper", 0.01)):
            times[f"single path / {name}{part}"] = [value + shift]
    found = {
        "step times": times,
        "parameters": {"single path": [1000 + beyond], "largest": [1000], "layers": [6]},
        "latencies": {"Pearson": [r], "measured, ms": [[1.0] * 30]},
    }
    for method, gap in (("single path", above), ("all paths", other)):
        for (name, _), ms in zip(single_path_nas.LAMBDAS.items(), latencies, strict=True):
            found[f"{method}, lambda {name}"] = {
                "latency, ms": [ms if i >= mended else 10.0 - ms for i in range(SEEDS)],
                "above random": spread(gap),
                "percentile": spread(rank),
            }
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "cost", "supported"),
        ({"largest": 1.21}, "cost", "not supported"),
        ({"paths": 0.41}, "cost", "not supported"),
        ({}, "parameters", "supported"),
        ({"beyond": 17}, "parameters", "not supported"),
        ({}, "lambda", "supported"),
        ({"mended": 1}, "lambda", "supported"),
        ({"mended": 2}, "lambda", "not supported"),
        ({"latencies": (9.0, 9.0, 3.0)}, "lambda", "not supported"),
        ({}, "accuracy", "supported"),
        ({"above": -0.02}, "accuracy", "not supported"),
        ({"above": -0.002}, "accuracy", "inconclusive"),
        ({}, "runtime", "supported"),
        ({"r": 0.89}, "runtime", "not supported"),
        ({}, "paths", "supported"),
        ({"other": 0.05}, "paths", "not supported"),
        ({}, "random", "supported"),
        ({"rank": 30}, "random", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert single_path_nas.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict():
    assert set(single_path_nas.judge(arms())) == {claim.key for claim in single_path_nas.CARD.claims}


def test_lambda_zero_has_no_say_in_accuracy():
    figures = arms()
    for method in single_path_nas.METHODS:
        figures[f"{method}, lambda 0"] |= {"above random": [-9.0] * SEEDS, "percentile": [0.0] * SEEDS}
    assert single_path_nas.judge(figures)["accuracy"].verdict == "supported"
    assert single_path_nas.judge(figures)["random"].verdict == "supported"


def priced():
    """A table in which every operation costs its kernel."""
    keys = SPACE.supernet(1, 10).operations(single_path_nas.SHAPE)
    times = {key: float(key[0][1]) for key in keys} | {"constant": 1.0}
    return LatencyTable(times, "a processor", 1, 32, "float32", torch.__version__)


def test_a_finding_is_held_against_random_architectures_of_its_latency():
    ends = [single_path_nas._uniform(SPACE, first=first) for first in (True, False)]
    table = RandomTable("micro-chain", (0.5,) * 10 + (0.7,) * 10, (1,) * 20, tuple([ends[0]] * 10 + [ends[1]] * 10))
    above = single_path_nas._Reference(priced().to_dict(), table)
    assert above.latencies == [1 + 3 * 3.0] * 10 + [1 + 6 * 5.0] * 10
    assert above(9.0) == pytest.approx(0.5)
    assert above(25.0) == pytest.approx(0.7)
    genotype = SPACE.random(stream(0, "genotype"))
    found = above.latency(genotype.to_dict())
    assert found == pytest.approx(predict(SPACE, genotype, priced(), single_path_nas.SHAPE))


def test_parameters_are_three_a_layer_more_than_the_largest_network():
    figures = single_path_nas._parameters(0)
    assert figures["single path"] == figures["largest"] + 3 * 6
    assert figures["all paths"] > 2 * figures["largest"]


@pytest.mark.parametrize("method", single_path_nas.METHODS)
def test_searches_of_both_kinds(method, monkeypatch):
    from netwright.data import Batches, TensorImages

    draw = stream(0, "images")

    def halves(seed, images, batch):
        made = TensorImages(
            torch.randint(256, (16, *single_path_nas.SHAPE), generator=draw, dtype=torch.uint8), torch.arange(16) % 10
        )
        return Batches(made, 8), Batches(made, 8)

    monkeypatch.setattr(single_path_nas.small_images, "halves", halves)
    figures = single_path_nas._search(0, method, 20.0, 2, [16, 16], priced().to_dict())
    assert figures["genotype"]["space"] == "micro-chain"
    assert figures["training loss"] > 20  # 20 times the logarithm of some 30 ms
