"""Is a sample of equal shares from greedy bins a better training set than the first picks of one greedy selection?

Zhou et al., "Dataset Quantization", ICCV 2023, arXiv:2308.10524.

Fashion-MNIST at 14x14, padded to 16x16. A small convolutional network, trained on the whole training part, gives the
features that all selections see; a perceptron, a deeper convolutional network and logistic regression are then trained
on each subset, with equal numbers of updates. All selections take equal shares of every class. The learning rate of
each network is chosen once, on the validation part, with a random tenth of the data: what suits the random arm best.
The digits, 60 % of them against the other 40, are a second set, on which the same is done.

Under dataset quantization every example is as likely to be kept as under random sampling. So it can beat that only by
making samples more even, and the difference is reported with its interval and with the spread over draws.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification, small_images
from netwright.papers.evidence import (
    Evidence,
    Verdict,
    all_of,
    compare,
    decide,
    mean,
    paired_difference,
)
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from netwright.data import Normalise, TensorImages

CARD = Paper(
    slug="dataset-quantization",
    title="Dataset Quantization",
    authors=(
        "Daquan Zhou",
        "Kai Wang",
        "Jianyang Gu",
        "Xiangyu Peng",
        "Dongze Lian",
        "Yifan Zhang",
        "Yang You",
        "Jiashi Feng",
    ),
    year=2023,
    venue="IEEE/CVF International Conference on Computer Vision",
    kind="inproceedings",
    arxiv="2308.10524",
    summary=(
        "A data set is split into bins by repeated greedy selection, the most representative examples first, and the "
        "same share is drawn at random from every bin. The subset trains any network, not only that which selected it."
    ),
    method="netwright.data.condense:DatasetQuantizer",
    claims=(
        Claim("one-shot", "At 5, 10 and 30 % of the data it beats the first picks of one greedy selection."),
        Claim("whole", "60 % of the data train networks to within 0.3 points of all."),
        Claim("random", "At no share is it worse than a random sample of every class by more than a standard error."),
        Claim("margin", "It beats the random sample, over all shares.", gated=False),
        Claim("spread", "Its accuracy varies less from draw to draw than a random sample's.", gated=False),
        Claim("digits", "On the digits, too, it beats the first picks of one greedy selection.", gated=False),
        Claim("diversity", "It covers the test part better than the greedy selection, at every share.", gated=False),
    ),
    metric="accuracy at 10 %",
    seeds=5,
    fast_seeds=3,
)

RATIOS = (1, 2, 5, 10, 30, 60)
GATED = (5, 10, 30)
METHODS = ("random", "graph cut", "DQ", "k-center", "DQ, first bins")
NETWORKS = ("logistic regression", "perceptron", "deeper network")
LEARNING_RATES = (0.01, 0.03, 0.1)
BINS, BATCH = 10, 64
SECOND = "digits: "  # what the arms of the second set begin with


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    ratios = [ratio for ratio in RATIOS if _name(ratio) in arms["DQ"]]

    def figures(arm: str, ratio: int, what: str = "accuracy") -> list[Any]:
        return arms[arm][_name(ratio, what)]

    def against_one_shot(prefix: str) -> Verdict:
        ours, theirs = prefix + "DQ", prefix + "graph cut"
        return all_of(*(compare(figures(ours, r), figures(theirs, r), errors=2) for r in GATED if r in ratios))

    apart = "was not run"
    found = {"one-shot": against_one_shot(""), "digits": decide(None, reason=apart)}
    if f"{SECOND}DQ" in arms:
        found["digits"] = against_one_shot(SECOND)
    found["whole"] = decide(None, reason=f"60 % {apart}")
    if 60 in ratios:
        found["whole"] = compare(figures("DQ", 60), arms["all data"]["accuracy"], margin=-0.003)
    gaps = {r: paired_difference(figures("DQ", r), figures("random", r)) for r in ratios}
    worst = min(gaps, key=lambda r: gaps[r].mean / (gaps[r].standard_error or math.inf))
    told = ", ".join(f"{100 * g.mean:+.2f} ± {100 * g.standard_error:.2f} at {r} %" for r, g in gaps.items())
    held = all(gap.mean >= -gap.standard_error for gap in gaps.values())
    known = all(math.isfinite(gap.standard_error) for gap in gaps.values())
    found["random"] = decide(held if known else None, gaps[worst].mean, f"points above random: {told}")
    over = [
        [mean([row[i] for row in (figures(arm, r) for r in ratios)]) for i in range(len(figures(arm, ratios[0])))]
        for arm in ("DQ", "random")
    ]
    found["margin"] = compare(over[0], over[1], errors=2)
    found["spread"] = _spread(arms, ratios)
    wider = [
        compare(figures("DQ", r, "coverage"), figures("graph cut", r, "coverage"), direction="less") for r in ratios
    ]
    found["diversity"] = all_of(*wider)
    return found


def _spread(arms: Arms, ratios: list[int]) -> Verdict:
    if len(arms["DQ"][_name(ratios[0])]) < 3:
        return decide(None, reason="too few draws to tell their spread")
    ours, theirs = ([statistics.stdev(arms[arm][_name(ratio)]) for ratio in ratios] for arm in ("DQ", "random"))
    told = ", ".join(
        f"{100 * a:.2f} against {100 * b:.2f} at {r} %" for a, b, r in zip(ours, theirs, ratios, strict=True)
    )
    found = compare(ours, theirs, direction="less")
    return Verdict(found.verdict, found.statistic, found.interval, f"standard deviation over seeds, points: {told}")


def _name(ratio: int, what: str = "accuracy") -> str:
    return f"{what} at {ratio} %"


def reproduce(run: Run) -> Evidence:
    """Chooses the learning rates, then selects, trains and measures with every method and seed."""
    run.size("height and width of the images", full=14, fast=8, specified=28, scaled=False)
    images = [
        run.size("training images", full=18_000, fast=1200, specified=20_000),
        run.size("validation images", full=2000, fast=200),
        run.size("test images", full=10_000, fast=359, scaled=False),
    ]
    updates = run.size("updates", full=800, fast=100)
    if run.fast:
        rates = dict.fromkeys(NETWORKS[:1], LEARNING_RATES[1])
        arms = _compared(run, "", "digits", images, [10, 30], updates, METHODS[:3], rates)
        return run.evidence(arms, judge(arms))
    arms = _compared(run, "", "fashion-mnist", images, list(RATIOS), updates, METHODS)
    images = [
        run.size("training images of the digits", full=978, fast=978, specified=1078, scaled=False),
        run.size("validation images of the digits", full=100, fast=100, specified=0, scaled=False),
        run.size("test images of the digits", full=719, fast=719, scaled=False),
    ]
    updates = run.size("updates on the digits", full=400, fast=400, specified=800)
    arms |= _compared(run, SECOND, "digits", images, list(RATIOS), updates, METHODS)
    return run.evidence(arms, judge(arms))


def _compared(
    run: Run,
    prefix: str,
    data: str,
    images: list[int],
    ratios: list[int],
    updates: int,
    methods: Sequence[str],
    rates: dict[str, float] | None = None,
) -> Arms:
    """All arms on one set, after the learning rate of every network was chosen unless it is given."""
    if rates is None:
        tried = {
            f"{prefix}{name}, lr {lr:g}": ["random", data, images, [10], updates, {name: lr}, True]
            for name in NETWORKS
            for lr in LEARNING_RATES
        }
        scores = run.arms(tried, _arm, seeds=run.seeds[:1])
        rates = {
            name: max(LEARNING_RATES, key=lambda lr: scores[f"{prefix}{name}, lr {lr:g}"][_name(10)][0])
            for name in NETWORKS
        }
    asked = {f"{prefix}{method}": [method, data, images, ratios, updates, rates, False] for method in methods}
    arms = run.arms(asked, _arm)
    whole = f"{prefix}all data"
    arms |= run.arms({whole: ["all", data, images, [100], updates, rates, False]}, _arm)
    arms[whole]["accuracy"] = arms[whole].pop(_name(100))
    for name, rate in rates.items():
        arms[whole][f"lr of {name}"] = [rate] * len(run.seeds)
    return arms


def _arm(
    seed: int,
    method: str,
    data: str,
    images: list[int],
    ratios: list[int],
    updates: int,
    rates: dict[str, float],
    validate: bool,
) -> dict[str, Any]:
    """One way to select, at every share: the mean accuracy of all networks, that of each, and the coverage."""
    import numpy as np

    found, normalise = _parts(seed, data, tuple(images))
    train, judged = found["train"], found["validation" if validate else "test"]
    features, seen = _features(seed, data, tuple(images))
    figures: dict[str, Any] = {}
    for ratio, chosen in _selected(method, features, train.labels.numpy(), ratios, seed).items():
        subset = train.subset(chosen)
        scores = {name: _accuracy(name, subset, judged, normalise, updates, lr, seed) for name, lr in rates.items()}
        figures[_name(ratio)] = mean(list(scores.values()))
        figures |= {f"{name} at {ratio} %": score for name, score in scores.items()}
        if not validate:
            distance = np.sqrt(np.maximum(_squares(seen, features[chosen]).min(1), 0))
            figures[_name(ratio, "coverage")] = float(distance.mean())
    return figures


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T


@functools.lru_cache(maxsize=8)
def _parts(seed: int, data: str, images: tuple[int, ...]) -> tuple[dict[str, TensorImages], Normalise]:
    return small_images.parts(seed, *images) if data == "fashion-mnist" else classification.parts(data, seed, *images)


@functools.lru_cache(maxsize=8)
def _features(seed: int, data: str, images: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Features of the training and of the test part, from a network trained for three epochs on the whole of the
    first."""
    from netwright.data import Batches
    from netwright.data.condense import penultimate_features
    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    images_of, normalise = _parts(seed, data, images)
    with seeded(seed, "init", "selector"):
        network = SmallConvNet((16, 32), 64, 10, 1, grid=2)
    batches = Batches(images_of["train"], BATCH, seed=seed, normalise=normalise, name="selector")
    fit(Classifier(network, lr=0.05), batches, epochs=3, callbacks=[CosineProgress()], seed=seed)
    found = [
        penultimate_features(
            network, Batches(images_of[name], 500, shuffle=False, drop_last=False, normalise=normalise)
        )
        for name in ("train", "test")
    ]
    return found[0].numpy(), found[1].numpy()


def _selected(
    method: str, features: np.ndarray, labels: np.ndarray, ratios: list[int], seed: int
) -> dict[int, list[int]]:
    """The subset of every share, in equal shares of each class."""
    import numpy as np

    from netwright.data import subset
    from netwright.data.condense import dataset_bins, graphcut_order, sample_bins

    count = len(labels)
    if method == "all":
        return {r: list(range(count)) for r in ratios}
    if method == "random":
        return {r: subset(labels, round(r * count / 100), seed).tolist() for r in ratios}
    if method.startswith("DQ"):
        bins = dataset_bins(features, labels, BINS)
        if method == "DQ":
            return {r: sample_bins(bins, r / 100, labels, seed=seed, allow_empty=True).tolist() for r in ratios}
        random = np.random.default_rng(seed)
        order = np.concatenate([random.permutation(b) for b in bins])
        return _first(ratios, [order[labels[order] == label] for label in np.unique(labels)], labels)
    orders = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        most = max(1, round(max(ratios) * len(own) / 100))
        pick = graphcut_order if method == "graph cut" else _farthest
        orders.append(own[pick(features[own], most)])
    return _first(ratios, orders, labels)


def _first(ratios: list[int], orders: list[np.ndarray], labels: np.ndarray) -> dict[int, list[int]]:
    """The first of every class, in equal shares."""
    sizes = [int((labels == labels[order[0]]).sum()) for order in orders]
    pairs = list(zip(orders, sizes, strict=True))
    return {r: [i for order, n in pairs for i in order[: max(1, round(r * n / 100))].tolist()] for r in ratios}


def _farthest(features: np.ndarray, k: int) -> np.ndarray:
    """k-center greedy: the most central example, then always the one farthest from all that are chosen."""
    import numpy as np

    distance = _squares(features, features.mean(0, keepdims=True))[:, 0]
    picks = [int(distance.argmin())]
    nearest = _squares(features, features[picks])[:, 0]
    while len(picks) < k:
        picks.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, _squares(features, features[picks[-1:]])[:, 0])
    return np.array(picks)


def _network(name: str, shape: tuple[int, int, int], seed: int) -> nn.Module:
    from torch import nn
    from torchvision.ops import MLP

    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded

    inputs = math.prod(shape)
    with seeded(seed, "init", name):
        if name == "logistic regression":
            return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10))
        if name == "perceptron":
            return nn.Sequential(nn.Flatten(), MLP(inputs, [128, 10]))
        return SmallConvNet((12, 24, 48), 0, 10, shape[0])


def _accuracy(
    name: str, train: TensorImages, judged: TensorImages, normalise: Normalise, updates: int, lr: float, seed: int
) -> float:
    """A fresh network after so many updates on a subset."""
    from netwright.data import Batches
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    network = _network(name, train.shape, seed)
    batches = Batches(train, BATCH, seed=seed, normalise=normalise, steps=updates, name="train")
    fit(Classifier(network, lr=lr), batches, epochs=1, callbacks=[CosineProgress()], seed=seed)
    return classification.measured(network, ({"judged": judged}, normalise), "judged")["accuracy"]
