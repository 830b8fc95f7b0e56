from __future__ import annotations

import copy
import statistics

import pytest
import torch

from netwright.nn.sparse import init_scores, kept_count, sparsify, sparsity_report, to_dense
from netwright.papers import dass, small_images
from netwright.papers.run import reproduce
from netwright.search import spaces
from netwright.search.genotype import DASS_99, Genotype
from netwright.search.random_search import uniform_genotypes

SEEDS = 5
LATENCY = {"ratio": 1.0, "lower quartile": 0.9, "upper quartile": 1.1, "DASS ms": 1.0, "MobileNet ms": 1.0}


def arms(*, ours=0.7, theirs=0.6, ours_high=0.85, theirs_high=0.85, draw=0.6, ratio=0.5):
    def spread(value):
        return {"accuracy": [value + 0.001 * i for i in range(SEEDS)]}

    ratios = {"ratio": ratio, "lower quartile": ratio - 0.1, "upper quartile": ratio + 0.1}
    return {
        "DASS at 3 %": {"accuracy": [ours + 0.002 * i for i in range(SEEDS)]},
        "DARTS at 3 %": spread(theirs),
        "DASS at 50 %": spread(ours_high),
        "DARTS at 50 %": spread(theirs_high),
        "MobileNet-v2 at 3 %": spread(0.5),
        "random 1 at 3 %": spread(draw - 0.3),
        "random 2 at 3 %": spread(draw),
        "random 3 at 3 %": spread(draw + 0.2),
        "latency": {"threads": [2]}
        | {f"{form} {name}": [value] for form in ("dense", "CSR") for name, value in (LATENCY | ratios).items()},
    }


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "gain", "supported"),
        ({}, "interaction", "supported"),
        ({}, "random", "supported"),
        ({}, "hand-made", "supported"),
        ({}, "speed", "not supported"),
        ({"ratio": 1.05}, "speed", "inconclusive"),
        ({"ratio": 1.5}, "sparse-speed", "supported"),
        ({"theirs": 0.75}, "gain", "not supported"),
        ({"ours_high": 0.99}, "interaction", "not supported"),
        ({"draw": 0.75}, "random", "not supported"),
        ({"draw": 0.69}, "random", "supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert dass.judge(arms(**change))[key].verdict == verdict


def test_the_interaction_is_a_difference_of_gains():
    found = dass.judge(arms(ours=0.7, theirs=0.6, ours_high=0.85, theirs_high=0.83))["interaction"]
    # The gain at 3 % grows by 0.001 with each seed: 0.1 .. 0.104, less 0.02.
    assert found.statistic == pytest.approx(0.082)
    assert found.interval is not None
    assert found.interval[0] < 0.082 < found.interval[1]


def test_one_seed_or_one_density_decides_nothing():
    single = {arm: {k: v[:1] for k, v in metrics.items()} for arm, metrics in arms().items()}
    assert {dass.judge(single)[key].verdict for key in ("gain", "interaction", "random")} == {"inconclusive"}
    low = {arm: metrics for arm, metrics in arms().items() if "50 %" not in arm}
    assert dass.judge(low)["interaction"].verdict == "inconclusive"


def test_every_network_has_the_same_size():
    counts = []
    for genotype in uniform_genotypes(spaces.get(dass.SPACE), 8, seed=3):
        network = dass._network(genotype.to_dict(), seed=0)
        counts.append(sum(p.numel() for p in network.parameters()))
        assert network(torch.zeros(2, 1, 16, 16)).shape == (2, 10)
    assert all(abs(count / dass.PARAMETERS - 1) < 0.09 for count in counts), counts
    assert abs(statistics.mean(counts) / dass.PARAMETERS - 1) < 0.05
    hand_made = dass._network(None, seed=0)
    assert abs(sum(p.numel() for p in hand_made.parameters()) / dass.PARAMETERS - 1) < 0.05
    assert hand_made(torch.zeros(2, 1, 16, 16)).shape == (2, 10)


def test_initial_weights_depend_on_the_seed_alone():
    a, b, c = (dass._network(None, seed)[0].weight for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_data_is_pooled_padded_and_disjoint():
    parts, normalise = small_images.parts(0, 60, 30, 50)
    assert {name: tuple(part.images.shape) for name, part in parts.items()} == {
        "train": (60, 1, 16, 16),
        "validation": (30, 1, 16, 16),
        "test": (50, 1, 16, 16),
    }
    for part in parts.values():
        border = part.images.clone()
        border[:, :, 1:-1, 1:-1] = 0
        assert not border.any()
        assert part.labels.unique().numel() == 10
    rows = {part: {bytes(image.numpy().tobytes()) for image in parts[part].images} for part in ("train", "validation")}
    assert not rows["train"] & rows["validation"]
    x = normalise(parts["train"].images)
    assert float(x.mean()) == pytest.approx(0, abs=1e-4)
    assert float(x.std()) == pytest.approx(1, abs=1e-3)


def test_training_ends_with_exactly_the_kept_weights():
    genotype = uniform_genotypes(spaces.get(dass.SPACE), 1, seed=0)[0].to_dict()
    found = dass._train(0, genotype, 0.1, 0.1, [64, 32], 20, [1, 1, 1])
    sizes = [layer.total for layer in sparsity_report(dass._network(genotype, 0)).values()]
    assert found["kept"] == sum(kept_count(size, 0.1) for size in sizes)
    assert {"accuracy", "validation accuracy", "dense validation accuracy"} <= set(found)
    assert "accuracy" not in dass._train(0, None, 0.5, 0.1, [64, 32], 0, [1, 1, 1])


def test_both_searches_derive_a_cell_of_the_space():
    for density in (0.1, None):
        found = dass._search(0, density, [64, 32], [1, 1, 1])
        assert Genotype.from_dict(found["genotype"]).space == dass.SPACE
        assert 0 <= found["skip share"] <= 1


def test_csr_changes_no_logit():
    masked = sparsify(DASS_99.build(3, 10, channels=6, cells=3, seed=0), 0.05)
    init_scores(masked, "scaled")
    network = to_dense(masked).eval()
    image = torch.rand(1, 3, 32, 32)
    sparse = dass._with_csr(copy.deepcopy(network))
    assert sum(type(m).__name__ == "Pointwise" for m in sparse.modules()) > 10
    with torch.inference_mode():
        torch.testing.assert_close(sparse(image), network(image))


def test_latency_is_of_the_published_networks():
    found = dass._latency(0, 1, 1)
    assert found["DASS kept"] == pytest.approx(9_900, rel=0.02)
    assert found["MobileNet kept"] == pytest.approx(23_000, rel=0.02)
    assert found["DASS MACs"] > found["MobileNet MACs"]


def search_stub(seed, density, images, stages):
    chosen = uniform_genotypes(spaces.get(dass.SPACE), 1, seed=seed + (1000 if density is None else 0))[0]
    return {"genotype": chosen.to_dict(), "skip share": chosen.skip_share, "convolutions": chosen.convolutions}


def train_stub(seed, genotype, density, lr, images, test, epochs):
    # The hand-made network likes a small rate, cells a large one.
    score = lr if genotype is not None else 1 - lr
    return {**({"accuracy": score} if test else {}), "validation accuracy": score, "learning rate": lr, "kept": 1}


def latency_stub(seed, rounds, threads):
    return {"threads": threads} | {
        f"{form} {name}": value for form in ("dense", "CSR") for name, value in LATENCY.items()
    }


def test_a_full_run_holds_every_arm_and_tunes_each_family(monkeypatch, tmp_path):
    for name, stub in (("_search", search_stub), ("_train", train_stub), ("_latency", latency_stub)):
        monkeypatch.setattr(dass, name, stub)
    (found,) = reproduce(["dass"], out=tmp_path)
    trained = {name for name in found.figures if " at " in name and not name.startswith("search")}
    cells = {f"{name} at {k} %" for name in ("DASS", "DARTS") for k in (3, 10, 50)}
    assert trained == cells | {f"{name} at 3 %" for name in ("MobileNet-v2", "random 1", "random 2", "random 3")}
    assert all(len(found.figures[name]["accuracy"]) == SEEDS for name in trained)
    assert found.figures["DARTS at 10 %"]["learning rate"] == [max(dass.LEARNING_RATES)] * SEEDS
    assert found.figures["MobileNet-v2 at 3 %"]["learning rate"] == [min(dass.LEARNING_RATES)] * SEEDS
    genotypes = found.details["search: DARTS"]["genotype"]
    assert len(genotypes) == SEEDS
    assert genotypes != found.details["search: DASS at 3 %"]["genotype"]
    assert found.settings["training images"].shrunk
    assert found.claims["interaction"].verdict in {"supported", "not supported"}
