"""Do a few examples in opposing groups make gradient descent oscillate at the edge of stability?

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.

Toy: the linear model at alpha 10, beta 4 and five step sizes. Real data: full-batch gradient descent on the squared
error to the one-hot label (mean over classes), tanh perceptrons in torch's initialisation, on 500 digits (64-64-64-10,
learning rate 1 for 400 steps and 0.5 for 800, since it takes about 350 to reach its edge) and on 2,000 images of
Fashion-MNIST (784-100-100-10, 0.5, 400 steps). Spikes of the first quarter are left out: there the sharpness lies above
2 / eta because of the initialisation, not because of training; the correlations at the largest spike of all stand
beside. At most the 20 largest spikes of a training count, those of its 100 largest rises. All figures of a spike are
those of its last rising step, with the groups of 1 % that move most in it, beside 200 random pairs and 200 pairs with
the same losses. From before the largest spike both groups alone are trained on for 20 steps, each as long as their
share of the step that all examples take.

Planted: 1 % of the images, of class T-shirt, and 1 % of class sneaker get a patch of 6x6 pixels of three times white.
After training the patch is turned up on images without it, and the outputs of both classes are told beside the others;
so are loss and share of right answers of the planted images.
Removal is compared at learning rate 0.2, below the edge, since at the edge 2 / eta caps the sharpness of all; and at
0.5, where training oscillates, beside gradients clipped to the median norm so far and batch norm by the statistics of
all images: the rises of the mean loss after the first quarter, each over the loss before it, are added up.
Optimisers: on the planted images, momentum 0.9, the learning rate of each chosen by the final training loss from five,
and from more while the best is at an end; a third of it, or a ninth, where a seed diverges with it. The length of
SplitSGD's large steps is chosen at the rate of SGD, beginning with the rates of Adam, and then its rate with that
length.

Not tested: CIFAR-10 and text with networks of the paper's sizes, and what groups mean to the eye.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from netwright.papers import oscillating
from netwright.papers.evidence import Evidence, Values, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.oscillating import ALPHA, BETA, REMOVALS
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best_inside

CARD = Paper(
    slug="opposing-signals",
    title="Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization",
    authors=("Elan Rosenfeld", "Andrej Risteski"),
    year=2024,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="2311.04163",
    summary=(
        "Training oscillates at the edge of stability because of few examples: paired groups that share a strong "
        "feature and need opposite outputs, whose losses rise and fall in turns."
    ),
    method="netwright.diagnose.opposing_signals.tracker:OpposingSignalTracker",
    covers=(
        "netwright.diagnose.opposing_signals.callbacks:OpposingSignalCallback",
        "netwright.diagnose.opposing_signals.toy:opposing_toy",
        "netwright.train.split_sgd:SplitSGD",
    ),
    claims=(
        Claim(
            "toy",
            "In the linear model learning the signal sharpens the opposing direction to alpha beta; beyond 2 / eta it "
            "oscillates and heals itself, and at a much larger step size it diverges.",
        ),
        Claim(
            "oscillation",
            "At the largest spike the losses of both groups are correlated by -0.5 or less (median of the seeds), "
            "random pairs by at least 0.5 more.",
        ),
        Claim("not just loss", "Pairs of other examples with the same losses are correlated by at least 0.3 more."),
        Claim("slopes", "Along the sharpest direction the groups' slopes have opposite signs in 80 % of the spikes."),
        Claim(
            "slopes along the step",
            "Along the step itself the groups' slopes have opposite signs in 80 % of the spikes.",
            gated=False,
        ),
        Claim("share", "The 1 % of examples that move most have at least three times their share of all loss changes."),
        Claim("edge", "At the largest spike the sharpness is within 25 % of 2 / eta."),
        Claim("planted", "At least 60 % of the groups at the spikes are the planted examples."),
        Claim(
            "removal",
            "Without the planted examples the late sharpness is at least 20 % lower; without as many others it changes "
            "by less than 10 %.",
        ),
        Claim(
            "half step",
            "With half the step size the mean loss of both groups does not rise in the same step.",
            gated=False,
        ),
        Claim("optimisers", "SplitSGD's final training loss is nearer to Adam's than SGD's is.", gated=False),
        Claim(
            "first quarter too",
            "At the largest spike of all, the first quarter's too, the same correlations hold.",
            gated=False,
        ),
        Claim(
            "pair alone",
            "Trained on alone, with their share of the step, the groups' losses are correlated by -0.5 or less "
            "(median of the seeds).",
            gated=False,
        ),
        Claim(
            "remedies",
            "Without the planted examples, with clipped gradients or with batch norm the loss rises less in all than "
            "without; with Adam and SplitSGD less than with SGD.",
            gated=False,
        ),
    ),
    metric="oscillation",
    seeds=5,
    fast_seeds=1,
)

WATCHED = ("digits, lr 1", "digits, lr 0.5", "Fashion-MNIST, lr 0.5")
TOY_RATES = (0.01, 0.05, 0.055, 0.06, 0.1)
LR, LOW_LR = 0.5, 0.2
CUTS = 2  # of a learning rate that is best for one seed and makes another diverge
REMEDIES = (*REMOVALS, "clipping", "BatchNorm")
RATES = {"Adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "SGD": (0.03, 0.1, 0.3, 1.0, 3.0)}


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    found = {claim.key: decide(None, reason="it was not run") for claim in CARD.claims}
    found["toy"] = _toy(arms)
    watched = [name for name in WATCHED if name in arms]
    for key, rule in {
        "oscillation": _oscillation,
        "not just loss": _not_just_loss,
        "slopes": _slopes,
        "slopes along the step": _slopes_along_the_step,
        "share": _share,
        "edge": _edge,
        "half step": _half_step,
        "first quarter too": _any_spike,
        "pair alone": _pair_alone,
    }.items():
        found[key] = all_of(*(rule(arms[name], name) for name in watched))
    if "planted" in arms:
        precision = _median(arms["planted"]["precision"])
        found["planted"] = _bound(precision, 0.6, "share of planted examples in the groups, median, claimed >= 0.6")
    if REMOVALS[1] in arms:
        found["removal"] = _removal(arms)
    if "SplitSGD" in arms:
        found["optimisers"] = _optimisers(arms)
    if "remedy, clipping" in arms and "SplitSGD" in arms:
        found["remedies"] = _remedies(arms)
    return found


def _median(values: Values) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else math.nan


def _bound(value: float, bound: float, told: str, *, most: bool = False) -> Verdict:
    """Whether a figure is at least (at most) a bound."""
    if math.isnan(value):
        return decide(None, reason=f"{told}: a figure is missing")
    return decide(value <= bound if most else value >= bound, value, f"{told}: {value:.3g}")


def _toy(arms: Arms) -> Verdict:
    toy = {eta: {name: values[0] for name, values in arms[f"toy, eta {eta:g}"].items()} for eta in TOY_RATES}
    target = ALPHA * BETA
    below, beyond, far = toy[0.01], (toy[0.055], toy[0.06]), toy[0.1]
    stable = below["peak"] <= 2e-3 and abs(below["curvature"] / target - 1) < 0.01
    healed = all(one["peak"] > 0.05 and one["curvature"] < one["limit"] and not one["diverged"] for one in beyond)
    told = f"curvature ends at {below['curvature']:.4g} of {target:g} below the limit; beyond it at "
    told += ", ".join(
        f"{one['curvature']:.3g} (limit {one['limit']:.3g}, largest |u| {one['peak']:.3g})" for one in beyond
    )
    told += "; the largest step size diverges" if far["diverged"] else "; the largest step size does not diverge"
    return decide(bool(stable and healed and far["diverged"]), beyond[0]["curvature"], told)


def _oscillation(arm: Mapping[str, Values], name: str, which: str = "") -> Verdict:
    own = _median(arm[f"oscillation{which}"])
    gap = _median(_gaps(arm, f"oscillation, random{which}", f"oscillation{which}"))
    return all_of(
        _bound(own, -0.5, f"{name}: correlation, median, claimed <= -0.5", most=True),
        _bound(gap, 0.5, "random pairs minus that, median, claimed >= 0.5"),
    )


def _not_just_loss(arm: Mapping[str, Values], name: str) -> Verdict:
    gap = _median(_gaps(arm, "oscillation, same losses"))
    return _bound(gap, 0.3, f"{name}: pairs of the same losses minus both groups, median, claimed >= 0.3")


def _any_spike(arm: Mapping[str, Values], name: str) -> Verdict:
    return _oscillation(arm, name, ", any spike")


def _pair_alone(arm: Mapping[str, Values], name: str) -> Verdict:
    told = f"{name}: correlation in a training on the pair alone, median, claimed <= -0.5"
    return _bound(_median(arm["oscillation, pair alone"]), -0.5, told, most=True)


def _gaps(arm: Mapping[str, Values], other: str, own: str = "oscillation") -> list[float | None]:
    pairs = zip(arm[own], arm[other], strict=True)
    return [None if ours is None or their is None else their - ours for ours, their in pairs]


def _slopes_along_the_step(arm: Mapping[str, Values], name: str) -> Verdict:
    return _slopes(arm, name, " along the step")


def _slopes(arm: Mapping[str, Values], name: str, where: str = "") -> Verdict:
    spikes = sum(value or 0 for value in arm["spikes"])
    opposed = sum(value or 0 for value in arm[f"spikes opposed{where}"])
    if not spikes:
        return decide(None, reason=f"{name}: no spike")
    return _bound(opposed / spikes, 0.8, f"{name}: share of {spikes:g} spikes with opposite slopes, claimed >= 0.8")


def _share(arm: Mapping[str, Values], name: str) -> Verdict:
    return _bound(_median(arm["share over even"]), 3, f"{name}: share over an even one, median, claimed >= 3")


def _edge(arm: Mapping[str, Values], name: str) -> Verdict:
    ratio = _median(arm["sharpness over limit"])
    told = f"{name}: sharpness over 2 / eta, median, claimed within 0.75 .. 1.25: {ratio:.3g}"
    return decide(None if math.isnan(ratio) else abs(ratio - 1) <= 0.25, ratio, told)


def _half_step(arm: Mapping[str, Values], name: str) -> Verdict:
    worst = _median(arm["rise with half a step"])
    return _bound(worst, 0, f"{name}: rise of both groups with half a step, median, claimed <= 0", most=True)


def _removal(arms: Arms) -> Verdict:
    full, without, random = (mean(arms[name]["late sharpness"]) for name in REMOVALS)
    lower, change = 1 - without / full, abs(random / full - 1)
    return all_of(
        _bound(lower, 0.2, "late sharpness lower by, without the planted, claimed >= 0.2"),
        _bound(change, 0.1, "changed by, without random ones, claimed < 0.1", most=True),
    )


def _optimisers(arms: Arms) -> Verdict:
    adam, sgd, split = (mean(arms[name]["training loss"]) for name in ("Adam", "SGD", "SplitSGD"))
    if any(map(math.isnan, (adam, sgd, split))):
        return decide(None, reason="a training diverged")
    ours, theirs = abs(math.log(split / adam)), abs(math.log(sgd / adam))
    told = f"final training loss: Adam {adam:.3g}, SplitSGD {split:.3g}, SGD {sgd:.3g}"
    return decide(ours < theirs, theirs - ours, told)


def _remedies(arms: Arms) -> Verdict:
    pairs = [(f"remedy, {kind}", f"remedy, {REMOVALS[0]}") for kind in (REMOVALS[1], "clipping", "BatchNorm")]
    pairs += [(name, "SGD") for name in ("Adam", "SplitSGD")]
    parts = []
    for ours, theirs in pairs:
        found = compare(arms[ours]["rise over loss"], arms[theirs]["rise over loss"], direction="less")
        parts.append(dataclasses.replace(found, reason=f"{ours} against {theirs}: {found.reason}"))
    return all_of(*parts)


def reproduce(run: Run) -> Evidence:
    """The toy model and the digits; then, unless it is fast, Fashion-MNIST, planted examples and optimisers."""
    steps = {
        "digits, lr 1": run.size("steps, digits, lr 1", full=400, fast=150),
        "digits, lr 0.5": run.size("steps, digits, lr 0.5", full=800, fast=150, specified=400, scaled=False),
    }
    count = run.size("digits training images", full=500, fast=500)
    watched = {f"digits, lr {lr:g}": ["digits", count, lr, steps[f"digits, lr {lr:g}"]] for lr in (1.0, 0.5)}
    arms = run.arms({f"toy, eta {eta:g}": [eta] for eta in TOY_RATES}, oscillating.run_toy, seeds=[0])
    if run.fast:
        arms |= run.arms({"digits, lr 1": watched["digits, lr 1"]}, oscillating.watch)
        return run.evidence(arms, judge(arms))
    images = run.size("Fashion-MNIST training images", full=2000, fast=200)
    long = run.size("steps, Fashion-MNIST", full=400, fast=20)
    watched["Fashion-MNIST, lr 0.5"] = ["fashion-mnist", images, LR, long]
    arms |= run.arms(watched, oscillating.watch)
    arms |= run.arms({"planted": [images, LR, long]}, oscillating.find_planted)
    arms |= run.arms({name: [images, LOW_LR, long, name] for name in REMOVALS}, oscillating.late_sharpness)
    arms |= run.arms({f"remedy, {kind}": [images, LR, long, kind] for kind in REMEDIES}, oscillating.remedy)
    return run.evidence(arms | (more := _optimised(run, images, long)), judge(arms | more))


def _optimised(run: Run, images: int, steps: int) -> Arms:
    """Each optimiser with the rate that is best for it."""
    arms: Arms = {}
    rates: dict[str, float] = {}

    def chosen(label: str, grid: Sequence[float], trial: Callable[[float], list[Any]]) -> float:
        found, inside, tried = best_inside(
            run, label, grid, trial, oscillating.optimise, figure="training loss", lowest=True
        )
        arms.update(tried)
        arms[f"tuned, {label}"] = {"value": [found], "inside the grid": [float(inside)]}
        return found

    for name, grid in RATES.items():
        rates[name] = chosen(name, grid, lambda rate, name=name: [name, rate, 0.0, images, steps])  # type: ignore[misc]
    large = chosen("SplitSGD, large step", RATES["Adam"], lambda rate: ["SplitSGD", rates["SGD"], rate, images, steps])
    around = [float(f"{rates['SGD'] * factor:.2g}") for factor in (0.1, 0.3, 1.0, 3.0, 10.0)]
    rates["SplitSGD"] = chosen("SplitSGD", around, lambda rate: ["SplitSGD", rate, large, images, steps])
    for name, best_rate in rates.items():
        for rate in (float(f"{best_rate / 3**cut:.2g}") for cut in range(CUTS + 1)):
            label = f"final: {name} {rate:g}"
            large_step = large if name == "SplitSGD" else 0.0
            trial = {label: [name, rate, large_step, images, steps]}
            found = run.arms(trial, oscillating.optimise, seeds=run.seeds[:3])[label]
            arms[name] = found
            if None not in found["training loss"]:
                break
            arms[label] = found
    return arms
