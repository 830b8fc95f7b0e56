"""Does a translator between classes change the bias and keep the signal, and do its views make a classifier unbiased?

Jung, Shim, Yang and Yang, "Fighting Fire with Fire: Contrastive Debiasing without Bias-free Data via Generative
Bias-transformation", ICML 2023, arXiv:2112.01021. No code of it is public; the coefficients of its second stage are
this library's reading.

MNIST-5000, 3,600 training images of 28 x 28, coloured: in each class 100 %, 99.5 % or 98 % wear the colour of the
class, the others any other one; in the test part colours are uniform, so that its accuracy is the unbiased one. One
translator a share (width 16, one down-sampling, two residual blocks, 2,400 steps of the critic at batch 16), judged by
the nearest colour and by a classifier of grey digits. Arms, with one convolutional network, Adam, batch 64 and 8
epochs: plain training (ERM); LfF; translated views without contrast; CDvG. Learning rates and the weight of the
contrast are chosen by accuracy on the biased validation part at 99.5 % after 4 epochs, with a seed of their own. A
translator can hide traces of the old class in its images, as cycle consistency asks of it. So every network is also
asked for training images in colours drawn anew, which hide nothing, and those of the views for the translations of the
same images. At 100 % each remedy is tried by itself: noise and blur on views, each at two levels of which the biased
validation part chooses one, views that are not rounded to bytes (the others are), a smaller weight of the
reconstruction, and a translator of half the steps. Three that know the bias are ceilings: ERM on images in random
colours, ERM under strong jitter of colours and greyscale (with a learning rate of its own), and CDvG whose translator
is the exact recolouring. As a control, plain training and CDvG where colours tell nothing of the class; at 98 % no
views without contrast. Seeds differ in initialisation, order and views; all share images and translator. Not tested:
BFFHQ, Corrupted CIFAR-10, 128 x 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from netwright.papers.coloured import (
    BATCH,
    CLASSES,
    KeptViews,
    Recolouring,
    features,
    parts,
    random_colours,
    strong_jitter,
    translate,
    translator_file,
)
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.data import BiasedDataset

CARD = Paper(
    slug="cdvg",
    title="Fighting Fire with Fire: Contrastive Debiasing without Bias-free Data via Generative Bias-transformation",
    authors=("Yeonsung Jung", "Hajin Shim", "June Yong Yang", "Eunho Yang"),
    year=2023,
    venue="International Conference on Machine Learning",
    kind="inproceedings",
    arxiv="2112.01021",
    summary=(
        "An image translator between the classes of a biased data set changes the bias and keeps the rest; a "
        "classifier that has to answer alike for such views of an image no longer goes by the bias."
    ),
    method="netwright.train.debias:CDvG",
    covers=(
        "netwright.train.debias.translator:BiasTranslator",
        "netwright.train.callbacks.debias:CDvGCallback",
    ),
    claims=(
        Claim("translation", "Translated, at least 60 % have the target's colour and 60 % their own shape."),
        Claim("gain", "At 100 % and 99.5 % bias CDvG is right 10 points more often than plain training."),
        Claim("scarce", "With no image against the bias CDvG is right more often than LfF."),
        Claim("control", "Where colours tell nothing they are not transferred, and CDvG does not beat plain training."),
        Claim("contrast", "At 100 % the contrast adds to translated views.", gated=False),
        Claim("malignancy", "Its lead over LfF is larger at 100 % than at 98 %.", gated=False),
        Claim("traces", "At 100 % translations are told 10 points better than the same in exact colours.", gated=False),
        Claim("noise", "At 100 % noise on the views makes CDvG less biased.", gated=False),
        Claim("blur", "At 100 % blurred views make CDvG less biased.", gated=False),
        Claim("rounding", "At 100 % CDvG is less biased on views that are rounded to bytes.", gated=False),
        Claim("reconstruction", "At 100 % a weight of it below 10, chosen on biased images, helps.", gated=False),
        Claim("longer", "At 100 % twice the steps of the translator make CDvG less biased.", gated=False),
    ),
    metric="unbiased",
    seeds=3,
    fast_seeds=1,
)

SHARES = {"100 %": 1.0, "99.5 %": 0.995, "98 %": 0.98, "no bias": 0.1}
RATES, CONTRASTS = (3e-4, 1e-3, 3e-3), (0.1, 0.5, 1.0)
TUNED_AT, WORST = "99.5 %", "100 %"
EVERY = ("ERM", "LfF", "views", "CDvG")
ARMS = {"98 %": ("ERM", "LfF", "CDvG"), "no bias": ("ERM", "CDvG")}  # all of them elsewhere
JITTERED = "jitter and grey"
NOISES, BLURS, RECONSTRUCTION, LIGHTER = (0.2, 0.4), (0.7, 1.4), 10.0, (1.0, 3.0)
REMEDIES: dict[str, dict[str, Any]] = {  # by what the two views of an image are other than in CDvG
    **{f"noise {noise:g}": {"view_noise": noise} for noise in NOISES},
    **{f"blur {blur:g}": {"view_blur": blur} for blur in BLURS},
    "not rounded": {"round_views": False},
}
TEMPERATURE, CHANCE, RECOLOURED = 0.1, 0.1, 1000


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    absent = decide(None, reason="it was not run")

    def unbiased(share: str, arm: str) -> list[Any]:
        return arms[f"{share}, {arm}"]["unbiased"]

    def ran(share: str) -> bool:
        return f"{share}, CDvG" in arms

    biased = [share for share in (WORST, TUNED_AT) if ran(share)]
    found = {
        "translation": all_of(*(_translates(arms[f"{share}, translator"]) for share in biased)),
        "gain": all_of(
            *(compare(unbiased(share, "CDvG"), unbiased(share, "ERM"), margin=0.1, errors=2) for share in biased)
        ),
        "scarce": compare(unbiased(WORST, "CDvG"), unbiased(WORST, "LfF"), errors=2),
        "contrast": compare(unbiased(WORST, "CDvG"), unbiased(WORST, "views")),
    }
    if TUNED_AT not in biased:
        found |= {"translation": absent, "gain": absent}
    found |= _hidden(arms, absent)
    found["control"] = found["malignancy"] = absent
    if ran("no bias"):
        transfer = mean(arms["no bias, translator"]["bias transfer"])
        better = compare(unbiased("no bias", "CDvG"), unbiased("no bias", "ERM"), errors=2)
        told = f"colours of targets {transfer:.3g}, chance {CHANCE:g}, claimed < {2 * CHANCE:g}; CDvG over ERM: "
        passed = transfer < 2 * CHANCE and better.verdict != "supported"
        found["control"] = decide(passed if better.interval else None, transfer, told + better.reason)
    if ran("98 %"):
        leads = [
            [ours - theirs for ours, theirs in zip(unbiased(share, "CDvG"), unbiased(share, "LfF"), strict=True)]
            for share in (WORST, "98 %")
        ]
        found["malignancy"] = compare(*leads)
    return found


def _hidden(arms: Arms, absent: Verdict) -> dict[str, Verdict]:
    """Whether translations hold traces of the class they came from, and what helps."""
    plain = f"{WORST}, CDvG"

    def chosen(names: Sequence[str]) -> str:
        """The arm that is right most often on biased images, the first of equals."""
        return max(names, key=lambda name: mean(arms[name]["validation accuracy"]))

    def against(names: Sequence[str]) -> Verdict:
        """The arm that biased images choose of some, against CDvG as it is."""
        there = [f"{plain}, {name}" for name in names if f"{plain}, {name}" in arms]
        return compare(arms[chosen(there)]["unbiased"], arms[plain]["unbiased"], errors=2) if there else absent

    found = {
        "traces": compare(arms[plain]["accuracy on views"], arms[plain]["recoloured"], margin=0.1, errors=2),
        "noise": against([f"noise {noise:g}" for noise in NOISES]),
        "blur": against([f"blur {blur:g}" for blur in BLURS]),
    }
    for key, name in (("rounding", "not rounded"), ("longer", "half the steps")):
        other = arms.get(f"{plain}, {name}")
        found[key] = absent if other is None else compare(arms[plain]["unbiased"], other["unbiased"], errors=2)
    lighter = [f"{plain}, reconstruction {weight:g}" for weight in LIGHTER]
    if not all(name in arms for name in lighter):
        return {**found, "reconstruction": absent}
    weight = chosen([plain, *lighter])
    if weight == plain:
        told = f"of {', '.join(f'{weight:g}' for weight in (*LIGHTER, RECONSTRUCTION))} biased images choose the last"
        return {**found, "reconstruction": decide(False, RECONSTRUCTION, told)}
    return {**found, "reconstruction": compare(arms[weight]["unbiased"], arms[plain]["unbiased"], errors=2)}


def _translates(arm: dict[str, list[Any]]) -> Verdict:
    transfer, kept = (min(arm[name]) for name in ("bias transfer", "signal kept"))
    told = f"target's colour {transfer:.3g}, own shape {kept:.3g}, claimed >= 0.6 for both"
    return decide(transfer >= 0.6 and kept >= 0.6, min(transfer, kept), told)


def reproduce(run: Run) -> Evidence:
    """Trains a translator for each share, chooses what is to be chosen on biased validation images, trains the arms."""
    images = [
        run.size("training images", full=3600, fast=300, scaled=False),
        run.size("validation images", full=400, fast=100, scaled=False),
        run.size("test images", full=1000, fast=200, scaled=False),
    ]
    side = run.size("pixels a side", full=28, fast=16, specified=32, scaled=False)
    steps = run.size("steps of the translator", full=2400, fast=150, specified=3000)
    epochs = run.size("epochs", full=8, fast=1)
    trial = run.size("epochs of a trial", full=4, fast=1)
    shares = {WORST: SHARES[WORST]} if run.fast else SHARES
    files = {share: str(run.out.resolve() / f"views-{ratio:g}.safetensors") for share, ratio in shares.items()}
    common = {
        share: [ratio, side, images, steps, RECONSTRUCTION, files[share], run.fast] for share, ratio in shares.items()
    }
    others: dict[str, list[Any]] = {}
    if not run.fast:
        place = str(run.out.resolve())
        for weight in LIGHTER:
            others[f"reconstruction {weight:g}"] = [
                1.0, side, images, steps, weight, f"{place}/views-reconstruction-{weight:g}.safetensors", False
            ]  # fmt: skip
        others["half the steps"] = [
            1.0, side, images, max(1, steps // 2), RECONSTRUCTION, f"{place}/views-half.safetensors", False
        ]  # fmt: skip
    translators = {f"{share}, translator": common[share] for share in shares}
    translators |= {f"{WORST}, translator, {name}": setting for name, setting in others.items()}
    arms = run.arms(translators, translate, seeds=[0])
    chosen: dict[str, list[float]] = {}
    tuned = common[TUNED_AT if TUNED_AT in common else WORST]
    for arm in EVERY if run.fast else (*EVERY, JITTERED):
        trials = {lr: [*tuned, arm, lr, CONTRASTS[-1], {}, trial, True] for lr in RATES}
        lr, tried = best(run, f"{arm}, lr", trials, _train)
        arms |= tried
        chosen[arm] = [lr, CONTRASTS[-1]]
    lr = chosen["CDvG"][0]
    trials = {weight: [*tuned, "CDvG", lr, weight, {}, trial, True] for weight in CONTRASTS}
    chosen["CDvG"][1], tried = best(run, "CDvG, contrast", trials, _train)
    arms |= tried
    wanted = {
        f"{share}, {arm}": [*common[share], arm, *chosen[arm], {}, epochs, False]
        for share in shares
        for arm in ARMS.get(share, EVERY)
    }
    if not run.fast:
        ours = f"{WORST}, CDvG"
        for name, remedy in REMEDIES.items():
            wanted[f"{ours}, {name}"] = [*common[WORST], "CDvG", *chosen["CDvG"], remedy, epochs, False]
        for name, setting in others.items():
            wanted[f"{ours}, {name}"] = [*setting, "CDvG", *chosen["CDvG"], {}, epochs, False]
        known = {
            "random colours": chosen["ERM"],
            JITTERED: chosen[JITTERED],
            "CDvG, exact": chosen["CDvG"],
        }
        wanted |= {f"{WORST}, {arm}": [*common[WORST], arm, *known[arm], {}, epochs, False] for arm in known}
    arms |= run.arms(wanted, _train)
    return run.evidence(arms, judge(arms))


def _module(
    seed: int, arm: str, data: BiasedDataset, weight: float, remedy: dict[str, Any], views: tuple[Any, Any] | None
) -> nn.Module:
    """What is trained; every arm starts with the same features."""
    from torch import nn

    from netwright.seeding import derive, seeded
    from netwright.train import Classifier
    from netwright.train.debias import CDvG, LfF

    side = data.shape[1]
    with seeded(seed, "init"):
        encoder = features(3, side)
        if views is not None:
            translator, cache = views
            return CDvG(
                encoder, CLASSES, translator, weight, TEMPERATURE, cache=cache, seed=derive(seed, "views"), **remedy
            )  # fmt: skip
        network = nn.Sequential(encoder, nn.Linear(576, CLASSES))
    if arm == "LfF":
        with seeded(seed, "biased"):
            return LfF(network, nn.Sequential(features(3, side), nn.Linear(576, CLASSES)), num_examples=len(data))
    return Classifier(network, clip=None)


def _train(
    seed: int,
    ratio: float,
    side: int,
    images: Sequence[int],
    steps: int,
    reconstruction: float,
    file: str,
    fast: bool,
    arm: str,
    lr: float,
    weight: float,
    remedy: dict[str, Any],
    epochs: int,
    tuning: bool,
) -> dict[str, Any]:
    """One arm: accuracies by bias on the test part, or when tuning accuracy on the biased validation part.

    ``recoloured`` is the accuracy on training images in colours drawn from all, ``accuracy on views`` that on the same
    images translated into the classes of these colours.
    """
    import torch

    from netwright.data import Batches, TensorImages
    from netwright.data.biased import PALETTE, recolored
    from netwright.seeding import stream
    from netwright.train import evaluate, fit
    from netwright.train.debias import BiasTranslator, ViewCache, bias_metrics, signed_range

    found = parts(ratio, side, images)
    data, signed = found["train"], signed_range(3)
    views: tuple[Any, Any] | None = None
    if arm == "CDvG, exact":
        exact = Recolouring(data.shape)
        views = exact, ViewCache(data, exact)
    elif arm in ("views", "CDvG"):
        if not (Path(file).exists() and translator_file(file).exists()):  # on another machine, or deleted
            translate(0, ratio, side, images, steps, reconstruction, file, fast)
        if remedy.get("round_views", True):
            views = Recolouring(data.shape), KeptViews(file)
        else:
            translator = BiasTranslator.load(translator_file(file))
            views = translator, ViewCache(data, translator, rounded=False)
    known: dict[str, Any] = {"random colours": random_colours, JITTERED: strong_jitter()}
    module = _module(seed, arm, data, 0.0 if arm == "views" else weight, remedy, views)
    history = fit(
        module,
        Batches(
            data, BATCH, seed=seed, normalise=signed, indexed=True,
            augment=known.get(arm),
        ),
        epochs=epochs,
        optimizer=lambda params: torch.optim.Adam(params, lr),
        seed=seed,
    )  # fmt: skip

    def answers(part: TensorImages) -> Tensor:
        return evaluate(module, Batches(part, 500, shuffle=False, drop_last=False, normalise=signed))[0].argmax(1)

    def accuracy(part: TensorImages) -> float:
        return float((answers(part) == part.labels).double().mean())

    if tuning:
        return {"validation accuracy": accuracy(found["validation"])}
    test, rows = found["test"], torch.arange(min(RECOLOURED, len(data)))
    some, targets = data.labels[rows], torch.randint(CLASSES, (len(rows),), generator=stream(seed, "recoloured"))
    figures = {"recoloured": accuracy(TensorImages(recolored(data.images[rows], torch.tensor(PALETTE)[targets]), some))}
    if views is not None:
        shown = views[1].pick(rows, targets)
        figures["accuracy on views"] = accuracy(TensorImages(shown, some))
    return {
        **bias_metrics(answers(test), test.labels, test.bias),
        **figures,
        "validation accuracy": accuracy(found["validation"]),
        "training loss": history.last["train_loss"],
        "learning rate": lr,
        "weight of the contrast": weight,
        "seconds an epoch": history.seconds / epochs,
    }
