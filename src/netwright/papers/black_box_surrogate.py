"""Do a few features, ranked by probing and perturbing a black box, let a simple model answer as the black box does?

Karim, Shajalal, Graß, Döhmen, Chala, Boden, Beecks and Decker, "Interpreting Black-box Machine Learning Models for High
Dimensional Datasets", IEEE DSAA 2023, arXiv:2208.13405.

Four data sets, 70 % of the rows for training: planted (3,000 rows of 500 features, the first 15 of which matter),
MNIST-5000 (784), Fashion-MNIST (3,000 training and 2,000 test images), and one-line descriptions of 5,000 Debian
packages, whose section (of the eight largest) is to be told from 2,000 binary words; left out where there is no index
of packages. The black box is a network with one hidden layer of 128; on MNIST also the paper's self-attention network
(SAN), its convolutional autoencoder with a convolutional head (CAE), and both together, the attention brought back
through the encoder. The number of features k is chosen on held-out training rows. With the same k, and depth and leaf
size chosen in the same way, surrogates are trained on: the features ranked by permutation, sensitivity and, where there
is any, attention; by attention alone and by the other two alone; random features, drawn three times (once beside the
other black boxes); those of the highest variance; of the highest mutual information with the labels; and, beside the
first black box, those that a forest of the labels goes by, by
TreeSHAP, where the package `shap` is installed. Every ranking is made from the same 1,000 training rows, 300 where all
altered rows are convolved anew. All are compared with the black box on the test rows. Rivals: trees on the labels, with
the surrogate's own k features, with the k of the highest mutual information, and with all; gradient boosting and TabNet
(where its package is installed) on all features; a tenth of TabNet's training rows say when it has learned. A claim
holds where the interval of the paired differences over the seeds lies above its bound.

Self-attention networks have ten times the published learning rate, since their softmax divides every feature by their
number. The published notebooks compare models on different features and splits; here all have the same. Not tested: the
genomic and indoor-location data, which cannot be had here (`netwright.data.published` reads them).
"""

from __future__ import annotations

import dataclasses

from netwright.console import note
from netwright.papers import surrogates
from netwright.papers.evidence import Evidence, Values, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

CARD = Paper(
    slug="black-box-surrogate",
    title="Interpreting Black-box Machine Learning Models for High Dimensional Datasets",
    authors=(
        "Md. Rezaul Karim", "Md. Shajalal", "Alexander Graß", "Till Döhmen", "Sisay Adugna Chala", "Alexander Boden",
        "Christian Beecks", "Stefan Decker",
    ),
    year=2023,
    venue="IEEE International Conference on Data Science and Advanced Analytics",
    kind="inproceedings",
    arxiv="2208.13405",
    summary=(
        "A black box on hundreds of features is probed and perturbed for the few that it goes by; a tree or a forest "
        "on these learns its answers, and rules, effects and counterfactuals are read from that."
    ),
    method="netwright.explain.tabular.surrogate:SurrogateExplainer",
    covers=("netwright.explain.tabular",),
    claims=(
        Claim("top", "Surrogates on the top features agree more often than on random ones: tree 8 points, forest 4."),
        Claim("selection", "They agree as often as on the highest variance, to 2 points as on mutual information."),
        Claim("agreement", "A forest on the top features agrees for 85 % of images, with R2 of at least 0.7."),
        Claim("planted", "Four of five planted features are among the first 15."),
        Claim("faithful", "Taking the top features away costs the black box three times as much as random ones."),
        Claim("accuracy", "The black box is at most a point less accurate than gradient boosting on the same data."),
        Claim("published", "The forest's R2 reaches the published 0.86.", gated=False),
        Claim("TabNet", "The black box is at most a point less accurate than TabNet on the same data.", gated=False),
        Claim(
            "labels",
            "A surrogate tree is as accurate, to a point, as trees on the labels with the same features and with as "
            "many of the highest mutual information.",
            gated=False,
        ),
        Claim(
            "both", "Attention and perturbing together rank features better than either alone, for SAN.", gated=False
        ),
        Claim(
            "paper's boxes", "SAN, CAE and both together are at most a point less accurate than boosting.", gated=False
        ),
    ),
    metric="tree agreement",
    seeds=3,
)  # fmt: skip

IMAGES = ("MNIST", "Fashion-MNIST")
REAL = (*IMAGES, "Debian")
OTHERS = tuple(f"MNIST ({kind})" for kind in ("SAN", "CAE", "CAE + SAN"))
SURE = 0.85  # accuracy of the black box above which planted features are looked for
LEVEL = 0.95


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    kinds = [kind for kind in ("tree", "forest") if f"{kind} agreement" in arms[f"{_first(arms)}, top"]]
    real = [name for name in REAL if f"{name}, top" in arms]
    boxes = [*real, *(name for name in OTHERS if f"{name}, top" in arms)]
    attending = [name for name in boxes if f"{name}, attention" in arms]
    images = [name for name in boxes if name != "Debian"]
    labels = ("tree on labels", "tree on labels, own features")
    return {
        "top": _all([_gap(arms, name, kind, "random", {"tree": 0.08, "forest": 0.04}[kind])
                     for name in boxes for kind in kinds]),
        "selection": _all([_gap(arms, name, kind, other, margin) for name in boxes for kind in kinds
                           for other, margin in (("variance", 0.0), ("information", -0.02))]),
        "agreement": _all([_forest(arms, name, metric, bound) for name in images
                           for metric, bound in (("agreement", 0.85), ("R2", 0.7))]),
        "planted": _planted(arms),
        "faithful": _all([_faithful(arms, name) for name in boxes]),
        "accuracy": _all([_accuracy(arms, name, "boosting") for name in ("planted", *real)]),
        "published": _all([_forest(arms, name, "R2", 0.86) for name in real]),
        "TabNet": _all([_accuracy(arms, name, "TabNet") for name in ("planted", *real)]),
        "labels": _all([_labels(arms, name, other) for name in real for other in labels]),
        "both": _all([_gap(arms, name, kind, other, 0.0) for name in attending for kind in kinds
                      for other in ("attention", "perturbation")]),
        "paper's boxes": _all([_accuracy(arms, name, "boosting", "MNIST") for name in OTHERS if name in boxes]),
    }  # fmt: skip


def _first(arms: Arms) -> str:
    return next(name.removesuffix(", top") for name in arms if name.endswith(", top"))


def _all(parts: list[Verdict]) -> Verdict:
    return all_of(*parts) if parts else decide(None, reason="was not run")


def _beats(told: str, ours: Values, theirs: Values | float, margin: float = 0.0) -> Verdict:
    """Whether the interval of the paired differences over the seeds lies above the margin."""
    found = compare(ours, theirs, margin=margin, level=LEVEL)
    return dataclasses.replace(found, reason=f"{told}: {found.reason}")


def _gap(arms: Arms, name: str, kind: str, other: str, margin: float) -> Verdict:
    """Whether surrogates on the top features agree more often than on others, by a margin."""
    metric = f"{kind} agreement"
    if f"{name}, {other}" not in arms:
        return decide(None, reason=f"{name}: {other} was not run")
    ours, theirs = arms[f"{name}, top"][metric], arms[f"{name}, {other}"][metric]
    return _beats(f"{name}, {kind}, top minus {other}", ours, theirs, margin)


def _forest(arms: Arms, name: str, metric: str, bound: float) -> Verdict:
    figures = arms[f"{name}, top"]
    if f"forest {metric}" not in figures:
        return decide(None, reason=f"{name}: no forest was trained")
    return _beats(f"{name}, forest, {metric} minus {bound:g}", figures[f"forest {metric}"], bound)


def _planted(arms: Arms) -> Verdict:
    if "planted, top" not in arms:
        return decide(None, reason="was not run")
    recall, sure = arms["planted, top"]["recall"], mean(arms["planted, black box"]["accuracy"])
    if sure < SURE:
        told = f"the black box is right for {sure:.3f} only, {SURE} is asked; recall {mean(recall):.3f}"
        return decide(None, mean(recall), told)
    return _beats("recall of the 15 planted minus 0.8", recall, 0.8)


def _faithful(arms: Arms, name: str) -> Verdict:
    ours, theirs = (arms[f"{name}, {which}"]["comprehensiveness"] for which in ("top", "random"))
    thrice = [None if value is None else 3 * value for value in theirs]
    told = f"{name}, probability lost with the top features"
    return all_of(_beats(f"{told}, minus thrice that with random ones", ours, thrice), _beats(told, ours, 0.0))


def _accuracy(arms: Arms, name: str, rival: str, data: str = "") -> Verdict:
    if f"{data or name}, {rival}" not in arms:
        return decide(None, reason=f"{name}: {rival} was not run")
    ours, theirs = arms[f"{name}, black box"]["accuracy"], arms[f"{data or name}, {rival}"]["accuracy"]
    return _beats(f"{name}, accuracy minus that of {rival}", ours, theirs, -0.01)


def _labels(arms: Arms, name: str, other: str) -> Verdict:
    if f"{name}, {other}" not in arms:
        return decide(None, reason=f"{name}: no {other} was trained")
    ours, theirs = arms[f"{name}, top"]["tree accuracy"], arms[f"{name}, {other}"]["accuracy"]
    return _beats(f"{name}, accuracy of the surrogate minus that of a {other}", ours, theirs, -0.01)


def reproduce(run: Run) -> Evidence:
    """Trains black boxes and surrogates on every data set for every seed."""
    from netwright.data.debian import absent

    rows = {
        "planted": [run.size("planted rows", full=3000, fast=600), run.size("planted features", full=500, fast=100)],
        "MNIST": [run.size("images of MNIST-5000", full=5000, fast=1000)],
    }
    epochs = run.size("epochs of a black box", full=30, fast=5)
    if not run.fast:
        rows["Fashion-MNIST"] = [
            run.size("training images of Fashion-MNIST", full=3000, fast=1, specified=10_000),
            run.size("test images of Fashion-MNIST", full=2000, fast=1, scaled=False),
        ]
        reason = absent()
        if reason is None:
            rows["Debian"] = [
                run.size("packages", full=5000, fast=1, specified=8000),
                run.size("words", full=2000, fast=1, specified=5000),
            ]
        else:
            note(f"black-box-surrogate: Debian's packages are left out: {reason}")
    trials = {name: [name, "dense", sizes, epochs, run.fast] for name, sizes in rows.items()}
    if not run.fast:
        for name in OTHERS:
            kind = name.removeprefix("MNIST (").removesuffix(")")
            trials[name] = ["MNIST", kind, rows["MNIST"], epochs, False]
    arms: Arms = {}
    for name, figures in run.arms(trials, surrogates.trial).items():
        for key, values in figures.items():
            arm, _, metric = key.rpartition(": ")
            arms.setdefault(f"{name}, {arm}", {})[metric] = values
    return run.evidence(arms, judge(arms))
