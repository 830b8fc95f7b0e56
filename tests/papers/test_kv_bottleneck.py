"""The experiment of the key-value bottleneck: verdicts from made-up figures, its splits and its arms."""

from __future__ import annotations

import pytest
import torch

from netwright.papers import kv_bottleneck as paper

JITTER = (-0.002, 0.0, 0.002)
IMAGES = [60, 200, 100]


def arms(**change):
    """Figures in which every claim holds; ``change`` names an arm and gives its accuracy or (accuracy, forgetting)."""
    figures = {
        "linear, long": (0.5, 0.6),
        "MLP, long": (0.2, 0.9),
        "DKVB, long": (0.85, 0.08),
        "linear, brief": (0.6, 0.5),
        "MLP, brief": (0.3, 0.8),
        "DKVB, brief": (0.84, 0.08),
        "wide MLP, long": (0.3, 0.8),
        "DKVB by Adam, long": (0.6, 0.4),
        "DKVB, i.i.d., long": (0.86, None),
        "DKVB with keys of the stream, long": (0.88, 0.07),
        "DKVB with keys of the stream, i.i.d., long": (0.89, None),
        "DKVB 8 x 32, brief": (0.6, 0.2),
        "DKVB 8 x 256, brief": (0.7, 0.2),
        "DKVB 64 x 32, brief": (0.75, 0.1),
        "DKVB with long keys, brief": (0.7, 0.1),
        "nearest class mean": (0.76, None),
    }
    found = {f"{encoder}, {name}": pair for encoder in paper.ENCODERS for name, pair in figures.items()} | change
    return {
        name: {"accuracy": [pair[0] + j for j in JITTER]}
        | ({} if pair[1] is None else {"forgetting": [pair[1] + j for j in JITTER]})
        for name, pair in found.items()
    }


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "ahead", "supported"),
        ({"CNN, MLP, long": (0.6, 0.4)}, "ahead", "not supported"),
        ({"PCA, linear, long": (0.76, 0.4)}, "ahead", "not supported"),
        ({}, "retained", "supported"),
        ({"PCA, DKVB, i.i.d., long": (0.92, None)}, "retained", "not supported"),
        ({}, "forgetting", "supported"),
        ({"CNN, linear, long": (0.5, 0.2)}, "forgetting", "not supported"),
        ({}, "size", "supported"),
        ({"CNN, DKVB 8 x 32, brief": (0.9, 0.1)}, "size", "not supported"),
        ({"CNN, DKVB 8 x 32, brief": (0.7, 0.1)}, "size", "inconclusive"),
        ({}, "own keys", "supported"),
        ({"CNN, DKVB with keys of the stream, long": (0.88, 0.21)}, "own keys", "not supported"),
        ({"CNN, DKVB with keys of the stream, i.i.d., long": (0.95, None)}, "own keys", "not supported"),
        ({"PCA, MLP, long": (0.6, 0.9)}, "own keys", "not supported"),
        ({}, "brief", "supported"),
        ({"CNN, linear, brief": (0.8, 0.1)}, "brief", "not supported"),
        ({}, "wide", "supported"),
        ({"CNN, wide MLP, long": (0.9, 0.1)}, "wide", "not supported"),
        ({}, "locality", "supported"),
        ({"PCA, DKVB by Adam, long": (0.9, 0.01)}, "locality", "not supported"),
        ({}, "long keys", "supported"),
        ({"PCA, DKVB with long keys, brief": (0.9, 0.1)}, "long keys", "not supported"),
        ({}, "means", "supported"),
        ({"PCA, nearest class mean": (0.9, None)}, "means", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_every_claim_has_a_verdict_also_where_arms_are_missing():
    keys = {claim.key for claim in paper.CARD.claims}
    assert set(paper.judge(arms())) == keys
    few = ("DKVB, long", "linear, long", "MLP, long", "DKVB, i.i.d., long")
    found = paper.judge({name: v for name, v in arms().items() if name in [f"PCA, {each}" for each in few]})
    assert {key for key, verdict in found.items() if verdict.verdict == "supported"} == {
        "ahead",
        "retained",
        "forgetting",
    }
    assert {key for key, verdict in found.items() if verdict.verdict == "inconclusive"} == keys - {
        "ahead",
        "retained",
        "forgetting",
    }


def rows(part):
    return {image.numpy().tobytes() for image in part.images}


def test_followers_go_by_the_rate_of_the_bottleneck(monkeypatch):
    """The arms of a full run: each tuned on a stream of its own way and length, or led by the bottleneck that was."""
    given, tuned = {}, {}

    class Run:
        fast = False
        size = staticmethod(lambda name, full, **_: full)
        evidence = staticmethod(lambda arms, verdicts: set(verdicts))

        @staticmethod
        def arms(arms, function):
            given.update(arms)
            return {}

    def best_inside(run, name, rates, trial, function, *, more):
        tuned[name] = {rate: trial(rate) for rate in rates}
        assert all(each[-3] == rate for rate, each in tuned[name].items())
        return (0.0625 if 0.0625 in rates else 0.01), True, {}

    monkeypatch.setattr(paper, "best_inside", best_inside)
    monkeypatch.setattr(paper, "judge", lambda arms: {claim.key: None for claim in paper.CARD.claims})
    assert paper.reproduce(Run) == {claim.key for claim in paper.CARD.claims}
    missing = set(arms()) - set(given)
    assert not missing, "judge asks for arms that are not run"
    assert len(tuned) == 2 * 11
    assert all(len(trials) == 5 for trials in tuned.values())
    assert all(trial[-1] is True for trials in tuned.values() for trial in trials.values())
    assert not any("keys" in name or " x " in name for name in tuned)
    for name, (_, encoder, _, way, head, rate, epochs, tuning) in given.items():
        assert name.startswith(encoder)
        assert not tuning
        if way != "means":
            assert (way == "all at once") == ("i.i.d." in name)
            assert epochs == (100 if name.endswith("long") else 5)
            assert rate == (0.0625 if head.get("optimizer") == "SGD" else 0.01)


def test_nothing_is_chosen_on_what_is_tested():
    """Test images are the same for all seeds, and neither the streams nor the choice of learning rates see them."""
    each = {seed: paper._parts("digits", seed, tuple(IMAGES), False) for seed in (0, 1)}
    tuned = paper._parts("digits", 1000, tuple(IMAGES), True)
    test = rows(each[0]["held out"])
    assert test == rows(each[1]["held out"])
    for parts in (*each.values(), tuned):
        assert not test & rows(parts["stream"])
        assert not test & rows(parts["pretraining"])
        assert not rows(parts["stream"]) & rows(parts["pretraining"])
    assert not test & rows(tuned["held out"])
    assert not rows(tuned["stream"]) & rows(tuned["held out"])
    assert len(tuned["held out"]) == 40
    assert torch.unique(each[0]["held out"].labels, return_counts=True)[1].tolist() == pytest.approx([10] * 10, abs=1)


def test_baselines_have_as_many_learning_rates():
    assert len(paper.RATES) == len(paper.SHARES)
    heads = paper._heads()
    wide = heads["wide MLP, long"]["hidden"]
    network = paper._plain(64, wide)
    trained = sum(p.numel() for p in network.parameters())
    assert trained == pytest.approx(64 * 256 * 10, rel=0.01)


def test_pca_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    part = paper._parts("digits", 0, tuple(IMAGES), False)["pretraining"].images
    flat = (part.float() / 255).flatten(1).numpy()
    found = paper._encoder("digits", "PCA", 0, tuple(IMAGES))(part.float() / 255)
    expected = PCA(16, svd_solver="full").fit_transform(flat)
    assert torch.allclose(found.abs(), torch.from_numpy(expected).float().abs(), atol=1e-3)


def run(head, way="stream", encoder="PCA", tuning=False, rate=0.1, seed=0):
    return paper._trained(seed, "digits", encoder, IMAGES, way, head, rate, 1, tuning)


def test_every_kind_of_arm_runs_and_repeats():
    small = paper.SMALL | {"codebooks": 4, "pairs": 8}
    heads = {
        "linear": {},
        "perceptron": {"hidden": 8},
        "bottleneck": small,
        "keys of the stream": small | {"keys": "stream"},
        "Adam": small | {"optimizer": "Adam"},
        "long keys": small | {"key_dim": 16},
    }
    found = {name: run(head) for name, head in heads.items()}
    assert found["bottleneck"] == run(small)
    assert found["bottleneck"]["learning rate"] == pytest.approx(0.4)
    assert found["Adam"]["learning rate"] == 0.1
    assert len({f["accuracy"] for f in found.values()} | {f["forgetting"] for f in found.values()}) > 6
    assert all({"accuracy", "forgetting", "learning accuracy"} <= set(f) for f in found.values())
    assert 1 < found["bottleneck"]["perplexity"] <= 8
    assert set(run({}, "all at once")) == {"accuracy", "learning rate"}
    assert set(run(small, tuning=True, seed=1000)) == {"validation accuracy"}
    assert set(run({}, "means")) == {"accuracy"}
    assert run({}, encoder="CNN")["accuracy"] > 0.1


def test_nearest_means_by_scikit_learn():
    from sklearn.neighbors import NearestCentroid

    parts = paper._parts("digits", 0, tuple(IMAGES), False)
    z = paper._embedded("digits", "PCA", 0, tuple(IMAGES), False)
    peer = NearestCentroid().fit(z["stream"].numpy(), parts["stream"].labels.numpy())
    expected = peer.score(z["held out"].numpy(), parts["held out"].labels.numpy())
    assert run({}, "means")["accuracy"] == pytest.approx(expected)
