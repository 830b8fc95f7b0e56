"""Can a network memorise wrong labels and generalise perfectly, with the neurons that do the one told from the others?

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061.

Addition modulo 59 by a quadratic network of 300 neurons, 60 % of all pairs for training, a fifth of their labels wrong,
full batches, AdamW with weight decay 0, 5 and 15. The network without decay is pruned, without retraining: from the
lowest inverse participation ratio (IPR) on, from the highest, in random order (mean of five), and, as baselines, by the
norm of a neuron's weights and by its mean activation, each from that end which serves it better. Beside them one run at
the paper's own size (modulus 97, 500 neurons, half of the pairs, 35 % wrong), dropout at two of the authors' rates, and
batch norm with batches of 64. Not tested: the phase diagrams over 17 x 17 shares of data and noise, transformers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.evidence import Evidence, Values, Verdict, all_of, decide, mean
from netwright.papers.evidence.statistics import floats
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from torch import Tensor

    from netwright.diagnose.grokking import ModularArithmetic, ModularHistory, QuadraticMLP

CARD = Paper(
    slug="grokking",
    title=(
        "To grok or not to grok: Disentangling generalization and memorization on corrupted algorithmic datasets"
    ),
    authors=("Darshil Doshi", "Aritra Das", "Tianyu He", "Andrey Gromov"),
    year=2024,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="2310.13061",
    summary=(
        "Neurons that generalise on modular arithmetic are periodic in the inputs, neurons that memorise are not: the "
        "participation ratio of their spectra tells them apart, and without the latter wrong labels are forgotten."
    ),
    method="netwright.diagnose.grokking:neuron_ipr",
    claims=(
        Claim("coexistence", "Without weight decay it is 95 % right on test while it knows 90 % of the wrong labels."),
        Claim("low", "Pruning 50 to 80 % of neurons, lowest IPR first, leaves 99 % on test and 2 % of wrong labels."),
        Claim("random", "As many neurons pruned at random cost at least 20 points of test accuracy more."),
        Claim("high", "Pruning the 30 % of highest IPR leaves at most 20 % on test, and 90 % of wrong labels."),
        Claim("decay", "Wrong labels fade with weight decay, to at most 10 % where test accuracy is still 95 %."),
        Claim("ranking", "By area under the test accuracy IPR beats weight norm and mean activation by 0.1."),
        Claim("paper's size", "The same holds at modulus 97 with 500 neurons.", gated=False),
        Claim("bimodal", "The IPR of the neurons without weight decay is bimodal.", gated=False),
        Claim("stages", "With weight decay the network groks first and unlearns wrong labels later.", gated=False),
        Claim("dropout", "Dropout makes wrong labels fade as weight decay does.", gated=False),
        Claim("batch norm", "Batch norm ends in full inversion, its scale correlated with IPR.", gated=False),
    ),
    metric="test accuracy",
    seeds=5,
)  # fmt: skip

DECAYS = (0.0, 5.0, 15.0)
RATES = (0.3, 0.6)
LOW_SHARES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
PRUNED_TEST, PRUNED_CORRUPTED = 0.99, 0.02  # at least, at most, at one of these shares
HIGH_SHARE = 0.3
RANDOM_ORDERS = 5
BIMODAL = 5 / 9  # Sarle's coefficient of a uniform distribution
BASELINES = ("weight norm", "mean activation")


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    plain = arms["weight decay 0"]
    found = {
        "coexistence": _coexistence(plain),
        "low": _low(plain),
        "random": _random(plain),
        "high": _high(plain),
        "decay": _fading([arms[f"weight decay {decay:g}"] for decay in DECAYS], "weight decay"),
        "ranking": _ranking(plain),
        "bimodal": _each(
            plain["IPR, Sarle's coefficient"], BIMODAL, "Sarle's coefficient, claimed > 5/9", strictly=True
        ),
        "stages": _stages([arms[f"weight decay {decay:g}"] for decay in DECAYS[1:]]),
    }
    absent = decide(None, reason="it was not run")
    found |= dict.fromkeys(("paper's size", "dropout", "batch norm"), absent)
    if "paper's size" in arms:
        large = arms["paper's size"]
        found["paper's size"] = all_of(_coexistence(large), _low(large), _random(large), _high(large))
    if f"dropout {RATES[0]:g}" in arms:
        found["dropout"] = _fading([plain, *(arms[f"dropout {rate:g}"] for rate in RATES)], "dropout")
    if "batch norm" in arms:
        found["batch norm"] = _batch_norm(arms["batch norm"])
    return found


def _each(values: Values, bound: float, reason: str, *, most: bool = False, strictly: bool = False) -> Verdict:
    """Whether every seed's figure is at least (at most, above) a bound; the seed nearest to failing stands for all."""
    numbers = floats(values)
    worst = (max if most else min)(numbers, default=math.nan)
    if any(math.isnan(number) for number in numbers):
        return decide(None, reason=f"{reason}: a figure is missing")
    passed = worst <= bound if most else worst > bound if strictly else worst >= bound
    return decide(passed, worst, f"{reason}: {'largest' if most else 'smallest'} of {len(numbers)} is {worst:.4g}")


def _coexistence(arm: Mapping[str, Values]) -> Verdict:
    return all_of(
        _each(arm["corrupted accuracy"], 0.9, "wrong labels known, claimed >= 0.9"),
        _each(arm["test accuracy"], 0.95, "test, claimed >= 0.95"),
    )


def _low(arm: Mapping[str, Values]) -> Verdict:
    return all_of(
        _each(arm["low IPR pruned, test"], PRUNED_TEST, f"test, claimed >= {PRUNED_TEST:g}"),
        _each(
            arm["low IPR pruned, corrupted"],
            PRUNED_CORRUPTED,
            f"wrong labels known, claimed <= {PRUNED_CORRUPTED:g}",
            most=True,
        ),
    )


def _random(arm: Mapping[str, Values]) -> Verdict:
    pairs = zip(floats(arm["low IPR pruned, test"]), floats(arm["random pruned, test"]), strict=True)
    return _each([low - random for low, random in pairs], 0.2, "test, lowest IPR minus random, claimed >= 0.2")


def _high(arm: Mapping[str, Values]) -> Verdict:
    return all_of(
        _each(arm["high IPR pruned, test"], 0.2, "test, claimed <= 0.2", most=True),
        _each(arm["high IPR pruned, corrupted"], 0.9, "wrong labels known, claimed >= 0.9"),
    )


def _ranking(arm: Mapping[str, Values]) -> Verdict:
    def lead(baseline: str) -> list[float]:
        return [
            ours - theirs
            for ours, theirs in zip(floats(arm["area, IPR"]), floats(arm[f"area, {baseline}"]), strict=True)
        ]

    return all_of(*(_each(lead(name), 0.1, f"area, IPR minus {name}, claimed >= 0.1") for name in BASELINES))


def _fading(each: Sequence[Mapping[str, Values]], what: str) -> Verdict:
    """Wrong labels fade from one strength to the next, in every seed, and are gone where the test is still passed."""
    known = list(zip(*(floats(arm["corrupted accuracy"]) for arm in each), strict=True))
    tests = list(zip(*(floats(arm["test accuracy"]) for arm in each), strict=True))
    if any(math.isnan(value) for values in (*known, *tests) for value in values):
        return decide(None, reason="a figure is missing")
    falls = all(all(a >= b for a, b in itertools.pairwise(row)) and row[0] > row[-1] for row in known)
    left = []
    for row, test in zip(known, tests, strict=True):
        good = [at for at, value in enumerate(test) if value >= 0.95]
        left.append(row[good[-1]] if good else 1.0)
    means = ", ".join(f"{mean(column):.3g}" for column in zip(*known, strict=True))
    reason = (
        f"wrong labels known, mean at each {what}: {means}; "
        f"at the largest with test >= 0.95, claimed <= 0.1: at most {max(left):.3g}"
    )
    return decide(falls and max(left) <= 0.1, max(left), reason)


def _stages(each: Sequence[Mapping[str, Values]]) -> Verdict:
    """Steps from grokking to unlearning, in every run with decay that did both."""
    gaps = [
        later - first
        for arm in each
        for first, later in zip(floats(arm["grokked at step"]), floats(arm["unlearned at step"]), strict=True)
    ]
    done = [gap for gap in gaps if not math.isnan(gap)]
    if not done:
        return decide(None, reason="no run both grokked and unlearned")
    reason = f"steps between, in {len(done)} of {len(gaps)} runs that did both: {min(done):g} to {max(done):g}"
    return decide(min(done) > 0, min(done), reason)


def _batch_norm(arm: Mapping[str, Values]) -> Verdict:
    return all_of(
        _each(arm["corrupted accuracy"], 0.1, "wrong labels known, claimed <= 0.1", most=True),
        _each(arm["test accuracy"], 0.9, "test, claimed >= 0.9"),
        _each(arm["scale and IPR, Spearman"], 0.5, "Spearman's correlation of scale and IPR, claimed >= 0.5"),
    )


def reproduce(run: Run) -> Evidence:
    """Trains every strength of decay, dropout and norm, and prunes what was trained without."""
    sizes = {
        "p": run.size("modulus", full=59, fast=41, scaled=False),
        "width": run.size("neurons", full=300, fast=200, scaled=False),
        "steps": run.size("steps", full=500, fast=300, scaled=False),
        "train_frac": 0.7 if run.fast else 0.6,
        "corruption": 0.2,
    }
    arms = run.arms({f"weight decay {decay:g}": [sizes | {"weight_decay": decay}] for decay in DECAYS}, _train)
    if not run.fast:
        arms |= run.arms({f"dropout {rate:g}": [sizes | {"dropout": rate}] for rate in RATES}, _train)
        small = {"norm": "bn", "batch_size": 64, "lr": 0.005, "train_frac": 0.65}
        steps = run.size("steps with batch norm", full=3000, fast=3000, specified=8000)
        arms |= run.arms({"batch norm": [sizes | small | {"steps": steps}]}, _train)
        paper = {"p": 97, "width": 500, "steps": 1000, "train_frac": 0.5, "corruption": 0.35}
        arms |= run.arms({"paper's size": [paper]}, _train, seeds=run.seeds[:1])
    return run.evidence(arms, judge(arms))


def _train(seed: int, fields: dict[str, Any]) -> dict[str, Any]:
    """The figures of one network; those of pruning too, where nothing regularises it."""
    from netwright.diagnose.grokking import ModularConfig, neuron_ipr, scale_correlation, train_modular

    config = ModularConfig(seed=seed, **fields)
    model, data = config.model(), config.data()
    history = train_modular(config, model, log_every=5 if config.batch_size is None else 100)
    groups = ("test", "train", "corrupted", "uncorrupted")
    figures: dict[str, Any] = {f"{name} accuracy": history.last[f"{name}_accuracy"] for name in groups}
    figures |= _turns(history)
    ipr = neuron_ipr(model)
    figures |= {"IPR, mean": float(ipr.mean()), "IPR, Sarle's coefficient": _sarle(ipr.tolist())}
    if config.norm:
        figures["scale and IPR, Spearman"] = scale_correlation(model)
    elif not config.weight_decay and not config.dropout:
        figures |= _pruned(model, data, seed)
    return figures | {"phase": history.phase}


def _turns(history: ModularHistory) -> dict[str, float | None]:
    """When the test is passed, and when half of the wrong labels known at the best time are gone."""
    steps, known = history.column("step"), history.column("corrupted_accuracy")
    passed = [step for step, value in zip(steps, history.column("test_accuracy"), strict=True) if value >= 0.9]
    peak = known.index(max(known))
    gone = [step for step, value in zip(steps[peak:], known[peak:], strict=True) if value <= known[peak] / 2]
    return {
        "grokked at step": passed[0] if passed else None,
        "unlearned at step": gone[0] if gone else None,
        "corrupted accuracy at best": known[peak],
    }


def _sarle(values: Sequence[float]) -> float:
    """Sarle's coefficient, (skewness^2 + 1) / kurtosis: 1/3 for a normal, 5/9 for a uniform one."""
    from scipy.stats import kurtosis, skew

    return float((skew(values) ** 2 + 1) / kurtosis(values, fisher=False))


def _best(test: Tensor, corrupted: Tensor) -> int:
    """Where test accuracy is furthest above that on wrong labels, of what keeps to both bounds if anything does."""
    lead = test - corrupted
    kept = (test >= PRUNED_TEST) & (corrupted <= PRUNED_CORRUPTED)
    return int((lead.masked_fill(~kept, -math.inf) if kept.any() else lead).argmax())


def _pruned(model: QuadraticMLP, data: ModularArithmetic, seed: int) -> dict[str, Any]:
    """Accuracies and areas of pruning in each order."""
    import torch

    from netwright.diagnose.grokking import pruning_curve
    from netwright.seeding import stream

    width = model.width
    grid = torch.linspace(0, width, 21).round().long()

    def area(order: Any) -> float:
        curve = pruning_curve(model, data, order, grid)
        return float(torch.trapezoid(curve["test"], curve["count"].double() / width))

    low = pruning_curve(model, data, "low", [round(share * width) for share in LOW_SHARES])
    best = _best(low["test"], low["corrupted"])
    count = int(low["count"][best])
    high = pruning_curve(model, data, "high", [round(HIGH_SHARE * width)])
    draws = stream(seed, "random orders")
    orders = [torch.randperm(width, generator=draws) for _ in range(RANDOM_ORDERS)]
    with torch.inference_mode():
        norms = torch.cat([model.U, model.V, model.W.T], 1).norm(dim=1)
        train = data.pairs[data.is_train]
        activations = (model.U.T[train[:, 0]] + model.V.T[train[:, 1]]).square().mean(0)
    figures = {
        "low IPR pruned, share": count / width,
        "low IPR pruned, test": float(low["test"][best]),
        "low IPR pruned, corrupted": float(low["corrupted"][best]),
        "low IPR pruned, train": float(low["train"][best]),
        "random pruned, test": mean([float(pruning_curve(model, data, one, [count])["test"][0]) for one in orders]),
        "high IPR pruned, test": float(high["test"][0]),
        "high IPR pruned, corrupted": float(high["corrupted"][0]),
        "area, IPR": area("low"),
        "area, random": mean([area(one) for one in orders]),
    }
    for name, scores in zip(BASELINES, (norms, activations), strict=True):
        figures[f"area, {name}"] = max(area(scores.argsort(descending=down)) for down in (False, True))
    return figures
