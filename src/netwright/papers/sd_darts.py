"""Does a supernet that is taught by its own snapshots end in a flatter place, and lose less when it is discretised?

Zhu, Li, Liu and Wang, "Improving Differentiable Architecture Search via Self-Distillation", 2023, arXiv:2302.05629.

Fashion-MNIST at 14x14, padded to 16x16, space ``micro-darts-2-shared``. For each seed every arm searches with the same
initialisation, batches, epochs and first-order steps: DARTS; three voting snapshots; one; label smoothing; a
sharpness-aware step of the architecture; and the one teacher of "Sharpness-Aware Training for Free", whose coefficients
are published. Agreeing with oneself also slows training down, and a network that is trained less is flatter: a control
is DARTS with the learning rate at which its final training loss is that of the three snapshots, found on the first
seed and used for all. What the paper leaves open and netwright chose is changed one thing at a time, on the first seed:
how teachers vote, which loss has the term, its temperature and its ramp.

As in the paper the architecture moves from the first step, where short searches lean to poolings; gaps and sharpness
are those of such supernets.

Measured on the same validation images: the largest eigenvalue of the Hessian in the alphas, S_rho within 5 % of the
norm of the alphas, and what loss and accuracy become when the mixture is replaced by the genotype's operations, with
the running statistics of both networks measured anew on ten batches (and, beside it, as the search left them). The
genotypes are trained as the random ones of the table are. There are a hundred times fewer steps than in the published
search, so the learning rate of the weights is four times the published one, with which DARTS's supernet has the lower
validation loss, and that of the architecture ten times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import random_table, small_images
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from netwright.search.objective import Objective
    from netwright.search.searcher import Searcher
    from netwright.search.supernet import Supernet

CARD = Paper(
    slug="sd-darts",
    title="Improving Differentiable Architecture Search via Self-Distillation",
    authors=("Xunyu Zhu", "Jian Li", "Yong Liu", "Weiping Wang"),
    year=2023,
    venue="Neural Networks",
    kind="article",
    arxiv="2302.05629",
    summary=(
        "The search of DARTS falls into sharp minima, from which discretising the architecture leads far uphill. "
        "SD-DARTS asks the supernet to agree with what several of its earlier states predict by vote, which costs a "
        "few forward passes and keeps the path of the search from being steep."
    ),
    method="netwright.search.self_distill:SDDARTS",
    covers=("netwright.search.sharpness", "netwright.train.distillation"),
    claims=(
        Claim("sharpness", "Voting snapshots make the validation loss less sharp in the alphas than DARTS does."),
        Claim("gap", "They make the loss rise less when the supernet is discretised."),
        Claim("control", "Both hold against DARTS slowed down to the same training loss."),
        Claim("accuracy", "The architecture found is at least as accurate as that of DARTS."),
        Claim("voting", "Three voting snapshots leave no larger gap than a single one.", gated=False),
        Claim("time", "A step with three snapshots takes at most 2.1 times one of DARTS.", gated=False),
    ),
    metric="accuracy",
    seeds=3,
)

PLAIN, THREE, ONE = "DARTS", "three teachers", "one teacher"
SMOOTH, AWARE, FREE, CONTROL = "label smoothing", "sharpness-aware alpha", "saf preset", "DARTS, slower"
# Choices of the implementation, each changed alone: arguments of SelfDistillation, and of its teachers.
ABLATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "hard votes": ({}, {"vote": "hard"}),
    "weighted votes": ({}, {"vote": "weighted"}),
    "loss of the weights only": ({"apply_to": "weights"}, {}),
    "loss of the architecture only": ({"apply_to": "alpha"}, {}),
    "temperature 1": ({"T": 1.0}, {}),
    "no ramp": ({"ramp": 0.0}, {}),
}
SPACE = "micro-darts-2-shared"
LR, ALPHA_LR = 0.1, 3e-3
SMOOTHING, RHO = 0.1, 0.05
MATCHED = 0.03  # training losses that differ by less are the same
TRIES = 3
SLOPE = -0.3  # by which the logarithm of the loss is first taken to fall with that of the learning rate
SHARE = 0.8  # of the seeds in which sharpness has to be lower
STEP_LIMIT = 2.1
GAP = "loss gap"
Sizes = Sequence[int]


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""

    def gap(name: str) -> list[float]:
        return _of(arms, name)[GAP]

    gained = mean(arms[THREE]["accuracy"]) - mean(arms[PLAIN]["accuracy"])
    voting = mean(gap(THREE)) - mean(gap(ONE))
    ratio = arms["step times"][f"{THREE}, ratio"][0]
    return {
        "sharpness": _flatter(arms, PLAIN),
        "gap": compare(gap(THREE), gap(PLAIN), direction="less"),
        "control": _control(arms),
        "accuracy": decide(gained >= 0, gained, "mean accuracy above that of DARTS, claimed at least 0"),
        "voting": decide(voting <= 0, voting, "mean gap above that of one teacher, claimed at most 0"),
        "time": decide(ratio <= STEP_LIMIT, ratio, f"time of a step over that of DARTS, claimed at most {STEP_LIMIT}"),
    }


def _of(arms: Arms, name: str) -> dict[str, list[Any]]:
    return arms[f"search: {name}"]


def _flatter(arms: Arms, other: str) -> Verdict:
    """Whether both measures of sharpness are lower than another arm's in enough seeds."""
    ours, theirs = _of(arms, THREE), _of(arms, other)
    parts = []
    for name in ("largest eigenvalue", "S_rho"):
        lower = [a < b for a, b in zip(ours[name], theirs[name], strict=True)]
        change = mean(ours[name]) / mean(theirs[name]) - 1
        reason = f"{name} below that of {other} in {sum(lower)} of {len(lower)} seeds, mean {change:+.1%}"
        passed = None if len(lower) < 2 else sum(lower) >= SHARE * len(lower)
        parts.append(decide(passed, sum(lower) / len(lower), reason))
    return all_of(*parts)


def _control(arms: Arms) -> Verdict:
    """The same against the slower DARTS, if its training loss is the same."""
    ours, theirs = (mean(_of(arms, name)["training loss"]) for name in (THREE, CONTROL))
    off = theirs / ours - 1
    reason = f"final training loss {theirs:.4g} against {ours:.4g} ({off:+.1%})"
    if abs(off) > MATCHED:
        return decide(None, off, f"{reason}, which is not within {MATCHED:.0%}")
    gap = compare(_of(arms, THREE)[GAP], _of(arms, CONTROL)[GAP], direction="less")
    return all_of(gap, _flatter(arms, CONTROL), decide(True, off, reason))


def reproduce(run: Run) -> Evidence:
    """Searches in every way, matches the control, measures sharpness and gaps, and trains what was found."""
    images = [
        run.size("search training images", full=1536, fast=16, specified=4000),
        run.size("search validation images", full=1536, fast=16, specified=4000),
    ]
    batch = run.size("batch size", full=64, fast=8, scaled=False)
    epochs = run.size("search epochs", full=8, fast=2)
    measured = run.size("images for sharpness and gaps", full=512, fast=8, specified=1024)
    again = run.size("batches for running statistics", full=10, fast=1, scaled=False)
    products = run.size("products with the Hessian, at most", full=30, fast=2, scaled=False)
    rounds = run.size("timed steps", full=30, fast=1, scaled=False)
    sizes = [batch, epochs, measured, again, products]

    def searched(kind: str, lr: float = LR) -> list[Any]:
        return [kind, lr, images, sizes]

    kinds = (PLAIN, THREE, ONE, SMOOTH, AWARE, FREE)
    found = run.arms({f"search: {kind}": searched(kind) for kind in kinds}, _search)

    def slower(lr: float, seeds: Sequence[int]) -> dict[str, list[Any]]:
        name = f"search: {PLAIN}, lr {lr:g}"
        return run.arms({name: searched(PLAIN, lr)}, _search, seeds=seeds)[name]

    def loss_at(lr: float) -> float:
        return slower(lr, run.seeds[:1])["training loss"][0]

    first, target = (_of(found, kind)["training loss"][0] for kind in (PLAIN, THREE))
    lr = LR / 2 if run.fast else matching_rate(loss_at, LR, first, target)
    found[f"search: {CONTROL}"] = slower(lr, run.seeds)

    found |= run.arms(
        {f"search: three teachers, {kind}": searched(kind) for kind in ABLATIONS}, _search, seeds=run.seeds[:1]
    )

    table = random_table.tabulate(run, SPACE)
    shared = random_table.sizes(run)
    arms = run.arms_by_seed(
        {
            kind: [[genotype, shared] for genotype in _of(found, kind)["genotype"]]
            for kind in (PLAIN, THREE, ONE, CONTROL, SMOOTH, AWARE, FREE)
        },
        random_table.score,
    )
    for metrics in arms.values():
        metrics["percentile"] = [table.percentile(accuracy) for accuracy in metrics["accuracy"]]
    arms |= found
    arms["step times"] = run.arms({"step times": [rounds, batch]}, step_times, seeds=[0])["step times"]
    return run.evidence(arms, judge(arms))


def matching_rate(loss_at: Callable[[float], float], lr: float, loss: float, target: float) -> float:
    """The learning rate, of a few tried ones, whose loss is nearest to a target: secants, in the logarithm of both.

    Args:
        loss_at: The loss at a learning rate; a smaller one is expected to give a larger loss.
        lr, loss: A learning rate and its loss.
        target: The loss that is sought.

    Example:
        >>> matching_rate(lambda lr: lr**-0.5, 1.0, 1.0, 2.0)
        0.25
    """
    tried = {lr: loss}

    def nearest() -> list[float]:
        return sorted(tried, key=lambda rate: abs(math.log(tried[rate] / target)))

    while len(tried) <= TRIES and abs(tried[best := nearest()[0]] / target - 1) > MATCHED:
        slope = SLOPE
        if len(tried) > 1 and tried[other := nearest()[1]] != tried[best]:
            secant = math.log(tried[other] / tried[best]) / math.log(other / best)
            slope = secant if secant < 0 else SLOPE  # losses are noisy
        factor = math.exp(math.log(target / tried[best]) / slope)
        guess = float(f"{best * min(4.0, max(0.25, factor)):.3g}")
        if guess in tried:
            break
        tried[guess] = loss_at(guess)
    return nearest()[0]


def _searcher(supernet: Supernet, kind: str, lr: float, epochs: int, ramp: float | None = None) -> Searcher:
    """The search of one arm."""
    from netwright.search.objective import TaskLoss
    from netwright.search.searcher import Searcher
    from netwright.search.self_distill import SelfDistillation, SnapshotTeachers
    from netwright.search.sharpness import SharpnessAware
    from netwright.search.stages import Stage

    changed, voting = ABLATIONS.get(kind, ({}, {}))
    taught = {"ramp": ramp} | changed

    def voted() -> Objective:
        return TaskLoss() + SelfDistillation(teachers=SnapshotTeachers(**voting), **taught)

    objective = dict.fromkeys(ABLATIONS, voted) | {
        THREE: lambda: TaskLoss() + SelfDistillation(ramp=ramp),
        ONE: lambda: TaskLoss() + SelfDistillation(ramp=ramp, teachers=SnapshotTeachers(k=1)),
        FREE: lambda: TaskLoss() + SelfDistillation(preset="saf"),
        SMOOTH: lambda: TaskLoss(SMOOTHING),
    }
    method = SharpnessAware(RHO) if kind == AWARE else None
    return Searcher(
        supernet,
        objective=objective.get(kind, TaskLoss)(),
        method=method,
        stages=[Stage(epochs=epochs, lr=lr)],
        alpha_lr=ALPHA_LR,
    )


def _search(seed: int, kind: str, lr: float, images: Sizes, sizes: Sizes) -> dict[str, Any]:
    """Searches in one way, and measures where the search has ended."""
    import itertools

    import torch

    from netwright.data import Batches
    from netwright.search import spaces
    from netwright.search.sharpness import alpha_hessian_eig, discretisation_gap, loss_and_accuracy, rho_sharpness

    batch, epochs, measured, again, products = sizes
    parts, normalise = small_images.parts(seed, *images, 0)
    train, validation = small_images.halves(seed, images, batch, indexed=True)
    on_train, on_validation = (
        Batches(parts[name].subset(range(measured)), batch, shuffle=False, normalise=normalise)
        for name in ("train", "validation")
    )
    supernet = spaces.get(SPACE).supernet(in_channels=1, num_classes=10, seed=seed)
    found = _searcher(supernet, kind, lr, epochs).search(train, validation, seed=seed).genotype
    few = list(itertools.islice(train, again))
    gap = discretisation_gap(supernet, found, on_validation, statistics="running", recalibrate_on=few)
    stale = discretisation_gap(supernet, found, on_validation, statistics="running")
    norm = float(torch.cat([alpha.detach() for alpha in supernet.arch_parameters()]).norm())
    return {
        **gap,
        **{f"{name}, statistics of the search": stale[name] for name in ("loss gap", "accuracy gap")},
        "largest eigenvalue": float(alpha_hessian_eig(supernet, on_validation, max_steps=products)[0]),
        "S_rho": rho_sharpness(supernet, on_validation, RHO * norm),
        "norm of alpha": norm,
        "training loss": loss_and_accuracy(supernet, on_train)[0],
        "learning rate": lr,
        "skip share": found.skip_share,
        "genotype": found.to_dict(),
    }


def step_times(seed: int, rounds: int, batch: int, threads: int = 1) -> dict[str, float]:
    """The time of a search step of every kind, once its teachers are there, over that of DARTS, taking turns."""
    import functools

    import torch

    from netwright.cost import compare_times
    from netwright.search import spaces
    from netwright.seeding import stream

    draws = stream(seed, "step times")
    pair = [
        (
            torch.rand(batch, 1, 16, 16, generator=draws),
            torch.randint(10, (batch,), generator=draws),
            torch.arange(batch),
        )
        for _ in range(2)
    ]
    steps = {}
    for kind in (PLAIN, THREE, ONE, FREE, AWARE):
        supernet = spaces.get(SPACE).supernet(in_channels=1, num_classes=10, seed=seed)
        searcher = _searcher(supernet, kind, LR, epochs=100, ramp=0.0)
        searcher.prepare(seed=seed, steps_per_epoch=1)
        for _ in range(5):  # the preset begins after the fifth epoch
            searcher.step(*pair)
            searcher.end_epoch()
        steps[kind] = functools.partial(searcher.step, *pair)
    found = compare_times(steps, rounds=rounds, threads=threads)
    figures: dict[str, float] = {"threads": threads}
    for timing in found.timings:
        figures |= {
            f"{timing.name}, ms": timing.median_ms,
            f"{timing.name}, ratio": timing.ratio,
            f"{timing.name}, lower quartile": timing.ratio_low,
            f"{timing.name}, upper quartile": timing.ratio_high,
        }
    return figures
