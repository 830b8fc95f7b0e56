"""Do a few examples in opposing groups make gradient descent oscillate at the edge of stability?

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.

Toy: the linear model at alpha 10, beta 4 and five step sizes. Real data: full-batch gradient descent on the squared
error to the one-hot label (mean over classes), tanh perceptrons in torch's initialisation, on 500 digits (64-64-64-10,
learning rate 1 for 400 steps and 0.5 for 800, since it takes about 350 to reach its edge) and on 2,000 images of
Fashion-MNIST (784-100-100-10, 0.5, 400 steps). Spikes of the first quarter are left out: there the sharpness lies above
2 / eta because of the initialisation, not because of training. All figures of a spike are those of its last rising
step, with the groups of 1 % that move most in it, beside 200 random pairs and 200 pairs with the same losses.

Planted: 1 % of the images, of class T-shirt, and 1 % of class sneaker get a patch of 6x6 pixels of three times white.
Removal is compared at learning rate 0.2, below the edge, since at the edge 2 / eta caps the sharpness of all.
Optimisers: on the planted images, momentum 0.9, the learning rate of each chosen from five by the final training loss;
SplitSGD has the learning rate of SGD, and the length of its large steps is chosen from the rates of Adam.

Not tested: CIFAR-10 and text with networks of the paper's sizes, and what groups mean to the eye.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.evidence import Evidence, Values, Verdict, all_of, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.one_hot import one_hot_problem, perceptron, planted, squared_error
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from netwright.diagnose import OpposingSignalTracker

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
    ),
    metric="oscillation",
    seeds=5,
    fast_seeds=1,
)

WATCHED = ("digits, lr 1", "digits, lr 0.5", "Fashion-MNIST, lr 0.5")
WIDTHS = {"digits": (64, 64, 64, 10), "fashion-mnist": (784, 100, 100, 10)}
TOY_RATES, ALPHA, BETA, TOY_STEPS = (0.01, 0.05, 0.055, 0.06, 0.1), 10.0, 4.0, 400
MOST_SPIKES, KEPT = 20, 100
SHARPNESS_EVERY = 10
LR, LOW_LR = 0.5, 0.2
REMOVALS = ("all images", "without the planted", "without random ones")
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
        "share": _share,
        "edge": _edge,
        "half step": _half_step,
    }.items():
        found[key] = all_of(*(rule(arms[name], name) for name in watched))
    if "planted" in arms:
        precision = _median(arms["planted"]["precision"])
        found["planted"] = _bound(precision, 0.6, "share of planted examples in the groups, median, claimed >= 0.6")
    if REMOVALS[1] in arms:
        found["removal"] = _removal(arms)
    if "SplitSGD" in arms:
        found["optimisers"] = _optimisers(arms)
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


def _oscillation(arm: Mapping[str, Values], name: str) -> Verdict:
    own, gap = _median(arm["oscillation"]), _median(_gaps(arm, "oscillation, random"))
    return all_of(
        _bound(own, -0.5, f"{name}: correlation, median, claimed <= -0.5", most=True),
        _bound(gap, 0.5, "random pairs minus that, median, claimed >= 0.5"),
    )


def _not_just_loss(arm: Mapping[str, Values], name: str) -> Verdict:
    gap = _median(_gaps(arm, "oscillation, same losses"))
    return _bound(gap, 0.3, f"{name}: pairs of the same losses minus both groups, median, claimed >= 0.3")


def _gaps(arm: Mapping[str, Values], other: str) -> list[float | None]:
    pairs = zip(arm["oscillation"], arm[other], strict=True)
    return [None if own is None or their is None else their - own for own, their in pairs]


def _slopes(arm: Mapping[str, Values], name: str) -> Verdict:
    spikes = sum(value or 0 for value in arm["spikes"])
    opposed = sum(value or 0 for value in arm["spikes opposed"])
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


def reproduce(run: Run) -> Evidence:
    """The toy model and the digits; then, unless it is fast, Fashion-MNIST, planted examples and optimisers."""
    steps = {
        "digits, lr 1": run.size("steps, digits, lr 1", full=400, fast=150),
        "digits, lr 0.5": run.size("steps, digits, lr 0.5", full=800, fast=150, specified=400, scaled=False),
    }
    count = run.size("digits training images", full=500, fast=500)
    watched = {f"digits, lr {lr:g}": ["digits", count, lr, steps[f"digits, lr {lr:g}"]] for lr in (1.0, 0.5)}
    arms = run.arms({f"toy, eta {eta:g}": [eta] for eta in TOY_RATES}, _run_toy, seeds=[0])
    if run.fast:
        arms |= run.arms({"digits, lr 1": watched["digits, lr 1"]}, _watch)
        return run.evidence(arms, judge(arms))
    images = run.size("Fashion-MNIST training images", full=2000, fast=200)
    long = run.size("steps, Fashion-MNIST", full=400, fast=20)
    watched["Fashion-MNIST, lr 0.5"] = ["fashion-mnist", images, LR, long]
    arms |= run.arms(watched, _watch)
    arms |= run.arms({"planted": [images, LR, long]}, _find_planted)
    arms |= run.arms({name: [images, LOW_LR, long, name] for name in REMOVALS}, _late_sharpness)
    return run.evidence(arms | (more := _optimised(run, images, long)), judge(arms | more))


def _optimised(run: Run, images: int, steps: int) -> Arms:
    """Each optimiser with the rate that is best for it."""
    arms: Arms = {}
    chosen: dict[str, list[Any]] = {}
    rates: dict[str, float] = {}
    for name, grid in {**RATES, "SplitSGD": RATES["Adam"]}.items():
        trials = {
            rate: [name, *((rates["SGD"], rate) if name == "SplitSGD" else (rate, 0.0)), images, steps] for rate in grid
        }
        rates[name], tried = best(run, name, trials, _optimise, figure="training loss", lowest=True)
        arms |= tried
        chosen[name] = trials[rates[name]]
    return arms | run.arms(chosen, _optimise, seeds=run.seeds[:3])


def _run_toy(seed: int, eta: float) -> dict[str, Any]:
    from netwright.diagnose import opposing_toy

    found = opposing_toy(ALPHA, BETA, eta, TOY_STEPS)
    ends = {"curvature": found.curvature[-1], "limit": found.limit}
    return {"peak": found.peak, **ends, "diverged": float(found.diverged)}


def _descend(
    seed: int, x: Tensor, y: Tensor, widths: Sequence[int], lr: float, steps: int, kept: int
) -> tuple[OpposingSignalTracker, dict[int, float], list[float]]:
    """Full-batch gradient descent: its record, the sharpness every few steps, and the mean losses."""
    import torch

    from netwright.diagnose import OpposingSignalTracker, full_batch_descent, sharpness

    network = perceptron(widths, seed)
    tracker = OpposingSignalTracker(network, squared_error, (x, y), snapshots=kept)
    found: dict[int, float] = {}
    last: Tensor | None = None

    def look(step: int) -> None:
        nonlocal last
        if step % SHARPNESS_EVERY == 0:
            found[step], last = sharpness(network, squared_error, (x, y), v0=last)

    optimizer = torch.optim.SGD(network.parameters(), lr)
    means = full_batch_descent(network, squared_error, (x, y), optimizer, steps, tracker=tracker, before=look)
    return tracker, found, means


def _spikes(tracker: OpposingSignalTracker, steps: int) -> list[int]:
    """The largest spikes after the first quarter whose parameters were kept, the largest rise first."""
    deltas = dict(zip(tracker.delta_steps, tracker.deltas().mean(1).tolist(), strict=True))
    known = set(tracker.snapshot_steps)
    late = [step for step in tracker.interesting_steps("spike") if step >= steps // 4 and step in known]
    return sorted(late, key=deltas.__getitem__, reverse=True)[:MOST_SPIKES]


def _watch(seed: int, data: str, images: int, lr: float, steps: int) -> dict[str, Any]:
    """The groups at the spikes of one training."""
    from netwright.diagnose import replay_step

    x, y = one_hot_problem(data, seed, images)
    tracker, sharp, means = _descend(seed, x, y, WIDTHS[data], lr, steps, KEPT)
    every = {"first loss": means[0], "last loss": means[-1], "last sharpness": sharp[max(sharp)]}
    spikes = _spikes(tracker, steps)
    if not spikes:
        return {**every, "spikes": 0.0, "spikes opposed": 0.0, **dict.fromkeys(_OF_A_SPIKE)}
    reports = [tracker.report(step) for step in spikes]
    top = reports[0]
    delta = tracker.deltas()[tracker.delta_steps.index(top.step)].abs()
    most = max(1, round(0.01 * len(delta)))
    near = [value for step, value in sharp.items() if abs(step - top.step) <= SHARPNESS_EVERY]
    half = replay_step(tracker, top.groups, lr)
    return {
        **every,
        "spikes": float(len(spikes)),
        "spikes opposed": float(sum(report.pair.slope_product < 0 for report in reports)),
        "oscillation": top.pair.oscillation,
        "oscillation, random": top.random.oscillation,
        "oscillation, same losses": top.matched.oscillation,
        "loss": top.pair.loss,
        "loss, same losses": top.matched.loss,
        "gradient cosine": top.pair.gradient_cosine,
        "gradient cosine, random": top.random.gradient_cosine,
        "share over even": float(delta.topk(most).values.sum() / delta.sum()) / (most / len(delta)),
        "sharpness over limit": statistics.median([*near, top.sharpness]) * lr / 2,
        "rise with the whole step": (half.up[0] + half.down[0]) / 2,
        "rise with half a step": (half.up[1] + half.down[1]) / 2,
        "alternation": top.alternation,
        "persistence": top.persistence,
        "step": float(top.step),
        "labels": [{str(label): count for label, count in table.items()} for table in top.groups.labels],
    }


_OF_A_SPIKE = (
    "oscillation", "oscillation, random", "oscillation, same losses", "share over even", "sharpness over limit",
    "rise with half a step",
)  # fmt: skip


def _find_planted(seed: int, images: int, lr: float, steps: int) -> dict[str, Any]:
    """How many of the examples in the groups at the spikes are planted ones."""
    x, y, chosen = planted(seed, images)
    tracker, _, _ = _descend(seed, x, y, WIDTHS["fashion-mnist"], lr, steps, KEPT)
    spikes = _spikes(tracker, steps)
    if not spikes:
        return {"precision": None, "spikes": 0.0}
    known = set(chosen.tolist())
    groups = [tracker.groups(step) for step in spikes]
    hits = [sum(one in known for one in (*each.up, *each.down)) / (2 * len(each.up)) for each in groups]
    deltas, rows = tracker.deltas().abs(), [tracker.delta_steps.index(step) for step in spikes]
    shares = [float(deltas[row][chosen].sum() / deltas[row].sum()) * images / len(chosen) for row in rows]
    return {"precision": mean(hits), "planted share over even": mean(shares), "spikes": float(len(spikes))}


def _late_sharpness(seed: int, images: int, lr: float, steps: int, kind: str) -> dict[str, Any]:
    """Mean sharpness over the last fifth of a training, with and without some examples."""
    import torch

    from netwright.seeding import stream

    x, y, chosen = planted(seed, images)
    keep = torch.ones(len(x), dtype=torch.bool)
    if kind == REMOVALS[1]:
        keep[chosen] = False
    elif kind == REMOVALS[2]:
        others = torch.ones(len(x), dtype=torch.bool)
        others[chosen] = False
        candidates = others.nonzero().flatten()
        keep[candidates[torch.randperm(len(candidates), generator=stream(seed, "removed"))[: len(chosen)]]] = False
    _, sharp, means = _descend(seed, x[keep], y[keep], WIDTHS["fashion-mnist"], lr, steps, 0)
    late = [value for step, value in sharp.items() if step >= 0.8 * steps]
    return {"late sharpness": mean(late), "late sharpness over limit": mean(late) * lr / 2, "last loss": means[-1]}


def _optimise(seed: int, name: str, lr: float, lr_large: float, images: int, steps: int) -> dict[str, Any]:
    """The final training loss of an optimiser on the planted images; None where it diverges."""
    from netwright.diagnose import full_batch_descent

    x, y, _ = planted(seed, images)
    network = perceptron(WIDTHS["fashion-mnist"], seed)
    optimizer = _optimizer(name, network, lr, lr_large)
    try:
        means = full_batch_descent(network, squared_error, (x, y), optimizer, steps)
    except FloatingPointError:
        return {"training loss": None, "learning rate": lr}
    rises = sum(later > before for before, later in itertools.pairwise(means))
    return {"training loss": mean(means[-10:]), "rising steps": rises, "learning rate": lr, "large step": lr_large}


def _optimizer(name: str, network: nn.Module, lr: float, lr_large: float) -> torch.optim.Optimizer:
    import torch

    from netwright.train import SplitSGD

    params = network.parameters()
    if name == "Adam":
        return torch.optim.Adam(params, lr)
    if name == "SGD":
        return torch.optim.SGD(params, lr, momentum=0.9, dampening=0.9)
    return SplitSGD(params, lr, lr_large, momentum=0.9, quantile=0.9)
