"""Does an exhaustive search of a discretised region keep its guarantee, and are its counterexamples cheaper?

Huang, Kwiatkowska, Wang and Wu, "Safety Verification of Deep Neural Networks", CAV 2017, arXiv:1610.06940.

Guarantee: a perceptron 64-24-12-10 on the 8x8 digits, test images it gets right, grids of four numbers with two steps
of 1/16, 1/8 and 1/4 to each side; the grid engine against a literal walk of the ladder tree and against plain
evaluation in float64, and the exact engine on the box between the same points. Falsification: a perceptron
784-64-32-10 and a small convolutional network on MNIST-5000, pixels within 0.3: the search with 3, 5 and 7 numbers,
chosen as the authors' tool does (furthest from the mean activation) or by the gradient; the same grids of random
numbers; as many random points as each grid has, but for the grids of seven numbers on the convolutional network, where
these would cost more than all its other arms; FGSM and the saliency map attack; and the tool's own greedy search of 15,
30 and 90 features of five numbers, which go over their whole range. Layers: the search from layer 1, its
counterexamples taken back to inputs whose whole activation there lies in the region, on the images that the search of
five numbers over their whole range breaks from the input. Sparsity, which is not in the paper: a perceptron
64-128-64-10 on the digits, dense and with 90, 95 and 99 % zeros, all trained for the same number of epochs (half before
pruning, half after), on images that all four get right, all pixels within 0.05; seconds of Z3 without an attack, a
time-out counting as its limit, over all images (none where bounds decide) and over those for which the solver was asked
of the dense network too. Not tested: ImageNet and GTSRB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from netwright.papers import verified
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

CARD = Paper(
    slug="safety-verification",
    title="Safety Verification of Deep Neural Networks",
    authors=("Xiaowei Huang", "Marta Kwiatkowska", "Sen Wang", "Min Wu"),
    year=2017,
    venue="Computer Aided Verification",
    kind="inproceedings",
    arxiv="1610.06940",
    summary=(
        "Around one input a discretised region is searched exhaustively, layer by layer, so that a counterexample in "
        "it is found if there is one, and an SMT solver takes those of hidden layers back to inputs."
    ),
    method="netwright.verify.safety:verify_point",
    covers=(
        "netwright.verify",
        "netwright.verify.layer_search:DLV",
        "netwright.verify.exact:smt_verify",
        "netwright.verify.grid:grid_search",
    ),
    claims=(
        Claim("guarantee", "Grid engine, ladder walk and plain evaluation agree; no exact verdict contradicts them."),
        Claim("dims", "Varying more numbers finds more counterexamples: 5 than 3, and 7 than 5."),
        Claim("chosen", "The numbers that the tool chooses succeed 15 points more often than random ones."),
        Claim("distance", "Where FGSM succeeds too, the counterexamples are no further in L1."),
        Claim(
            "validated",
            "Every counterexample, those of the greedy search too, is one for the network itself, in float32 too.",
        ),
        Claim("layer", "From layer 1, half of the images that are broken from the input are broken too, or more."),
        Claim("gradient", "Numbers chosen by the gradient succeed more often than those of the tool.", gated=False),
        Claim(
            "random search",
            "The tool's grids succeed more often than as many random points (of 3 and 5 numbers on the CNN).",
            gated=False,
        ),
        Claim("gap", "Between the points of a safe grid there is a counterexample somewhere.", gated=False),
        Claim(
            "sparsity",
            "The solver needs less than half the time with 95 % zeros than without, over all images and over those "
            "for which it is asked of both networks.",
            gated=False,
        ),
    ),
    metric="success",
    seeds=3,
)

DIMS = (3, 5, 7)
POINTS = {"MLP": DIMS, "CNN": DIMS[:2]}  # whose grids are set beside as many random points
FEATURES = (15, 30, 90)
EPS, THETA = (0.1, 0.2, 0.4), (0.1, 0.4)
SPARSITIES = {"dense": 0.0, "90 %": 0.9, "95 %": 0.95, "99 %": 0.99}


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    models = [model for model in ("MLP", "CNN") if f"{model}, tool's 3" in arms]

    def success(model: str, name: str) -> list[float]:
        return arms[f"{model}, {name}"]["success"]

    dims = {model: [n for n in DIMS if f"{model}, tool's {n}" in arms] for model in models}
    more = [
        compare(success(m, f"tool's {b}"), success(m, f"tool's {a}"))
        for m in models
        for a, b in itertools.pairwise(dims[m])
    ]
    grids = [(m, n) for m in models for n in dims[m]]
    scattered = [(m, n) for m, n in grids if f"{m}, random points {n}" in arms]

    def share(kind: str, which: Sequence[tuple[str, int]]) -> list[float]:
        return [mean(column) for column in zip(*(success(m, f"{kind} {n}") for m, n in which), strict=True)]

    found = {
        "guarantee": _guarantee(arms["guarantee"]),
        "dims": all_of(*more),
        "chosen": compare(share("tool's", grids), share("random", grids), margin=0.15),
        "gradient": compare(share("gradient's", grids), share("tool's", grids)),
        "random search": compare(share("tool's", scattered), share("random points", scattered)),
        "distance": _distance(arms, models),
        "validated": _validated(arms, models),
        "layer": _layer(arms),
        "gap": decide(sum(arms["guarantee"]["gaps"]) > 0, sum(arms["guarantee"]["gaps"]), "safe grids in unsafe boxes"),
        "sparsity": decide(None, reason="not run"),
    }
    if "solver, 95 %" in arms:
        found["sparsity"] = _sparsity(arms["solver, 95 %"], arms["solver, dense"])
    return found


def _sparsity(ours: dict[str, list[Any]], dense: dict[str, list[Any]]) -> Verdict:
    parts = [compare(ours["solver seconds"], [value / 2 for value in dense["solver seconds"]], direction="less")]
    both = list(zip(ours["seconds, both asked"], ours["dense, both asked"], strict=True))
    if any(value is None for pair in both for value in pair):
        parts.append(decide(None, reason="no image for which the solver is asked of both networks, for some seed"))
    else:
        parts.append(compare([own for own, _ in both], [other / 2 for _, other in both], direction="less"))
    return all_of(*parts)


def _guarantee(figures: dict[str, list[Any]]) -> Verdict:
    faults = sum(figures["disagreements"]) + sum(figures["contradictions"])
    told = f"{sum(figures['disagreements'])} disagreements, {sum(figures['contradictions'])} contradictions"
    return decide(faults == 0, faults, f"{told} in {sum(figures['regions'])} regions")


def _distance(arms: Arms, models: Sequence[str]) -> Verdict:
    pairs = [
        (arms[f"{m}, tool's 5"]["common L1"], arms[f"{m}, FGSM 0.4"]["common L1"])
        for m in models
        if "common L1" in arms[f"{m}, tool's 5"]
    ]
    known = [(a, b) for a, b in pairs if all(value is not None for value in (*a, *b))]
    if not known:
        return decide(None, reason="no image on which both succeed, for some seed")
    return all_of(*(compare(a, b, direction="less") for a, b in known))


def _validated(arms: Arms, models: Sequence[str]) -> Verdict:
    shares = [
        value
        for name, figures in arms.items()
        if "validated" in figures and name.partition(",")[0] in (*models, "layer")
        for value in figures["validated"]
        if value is not None
    ]
    if not any(f"{model}, layerwise {n}" in arms for model in models for n in FEATURES):
        return decide(None, reason="the greedy search was not run")
    return decide(
        min(shares) == 1.0 if shares else None, min(shares, default=math.nan), "least share over arms and seeds"
    )


def _layer(arms: Arms) -> Verdict:
    shared = arms["layer, from 1"]["share of layer 0's"]
    if any(value is None for value in shared):
        return decide(None, reason="no counterexample from the input, for some seed")
    return compare(shared, 0.5)


def reproduce(run: Run) -> Evidence:
    """Runs the four parts."""
    sizes = {
        "digits": [
            run.size("digits training images", full=1000, fast=500, scaled=False),
            0,
            run.size("digits test images", full=597, fast=300, scaled=False),
        ],
        "mnist-5000": [
            run.size("MNIST training images", full=3500, fast=500),
            0,
            run.size("MNIST test images", full=1000, fast=200, scaled=False),
        ],
    }
    epochs = run.size("epochs", full=20, fast=6)
    regions = run.size("images of the guarantee", full=40, fast=1)
    images = run.size("images attacked", full=100, fast=3)
    conv = run.size("images attacked, convolutional network", full=30, fast=1, specified=100)
    timeout = run.size("seconds of the solver", full=10, fast=1)
    arms = run.arms({"guarantee": [regions, timeout, epochs, sizes["digits"]]}, verified.agree)
    models = {"MLP": (images, DIMS[:2] if run.fast else DIMS)}
    if not run.fast:
        models["CNN"] = (conv, DIMS)
    for model, (count, dims) in models.items():
        methods: dict[str, tuple[str, float]] = {}
        for kind in ("tool's", "random", "gradient's"):
            methods |= {f"{kind} {n}": (kind, n) for n in dims}
        methods |= {f"FGSM {eps:g}": ("FGSM", eps) for eps in EPS}
        methods |= {f"saliency map {theta:g}": ("JSMA", theta) for theta in (THETA[1:] if run.fast else THETA)}
        methods |= {f"random points {n}": ("points", n) for n in dims if n in POINTS[model]}
        methods |= {f"layerwise {n}": ("layerwise", n) for n in (FEATURES[:1] if run.fast else FEATURES)}
        chosen = {
            f"{model}, {name}": [model, *how, count, epochs, sizes[verified.NETS[model][0]]]
            for name, how in methods.items()
        }
        arms |= _with_common(model, run.arms(chosen, verified.falsify))
    deep = run.size("images searched from layer 1", full=25, fast=1)
    searched = {f"layer, from {start}": [start, deep, timeout, epochs, sizes["mnist-5000"]] for start in (0, 1)}
    arms |= _with_shared(run.arms(searched, verified.layer_search))
    solved = run.size("images of the solver", full=60, fast=1)
    names = ("dense", "95 %") if run.fast else SPARSITIES
    zeros = [SPARSITIES[name] for name in names]
    asked = {f"solver, {name}": [SPARSITIES[name], zeros, solved, timeout, epochs, sizes["digits"]] for name in names}
    arms |= _with_asked(run.arms(asked, verified.solve))
    return run.evidence(arms, judge(arms))


def _with_shared(arms: Arms) -> Arms:
    """With the share of the images broken from the input that are broken from layer 1 too."""
    deep, input_ = (arms[f"layer, from {start}"] for start in (1, 0))
    deep["share of layer 0's"] = []
    for ours, theirs in zip(deep["each"], input_["each"], strict=True):
        both = [bool(a) for a, b in zip(ours, theirs, strict=True) if b]
        deep["share of layer 0's"].append(mean([float(a) for a in both]) if both else None)
    for figures in arms.values():
        del figures["each"]
    return arms


def _with_asked(arms: Arms) -> Arms:
    """With the mean seconds over the images for which the solver was asked of the dense network too, of both."""
    dense = arms["solver, dense"]["each"]
    for figures in arms.values():
        for name in ("both asked", "seconds, both asked", "dense, both asked"):
            figures[name] = []
        for ours, theirs in zip(figures["each"], dense, strict=True):
            both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
            figures["both asked"].append(float(len(both)))
            figures["seconds, both asked"].append(mean([a for a, _ in both]) if both else None)
            figures["dense, both asked"].append(mean([b for _, b in both]) if both else None)
    for figures in arms.values():
        del figures["each"]
    return arms


def _with_common(model: str, arms: Arms) -> Arms:
    """With the mean L1 over images that both FGSM and the search break, of the counterexamples of each."""
    pair = [arms[f"{model}, {name}"] for name in ("tool's 5", "FGSM 0.4")]
    for figures in pair:
        figures["common L1"] = []
    for first, second in zip(*(figures["each L1"] for figures in pair), strict=True):
        both = [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a is not None and b is not None]
        for figures, each in zip(pair, (first, second), strict=True):
            figures["common L1"].append(mean([each[i] for i in both]) if both else None)
    for figures in arms.values():
        del figures["each L1"]
    return arms
