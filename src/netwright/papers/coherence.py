"""Do gradients of single examples agree more where a network generalises, and does it memorise less without weak ones?

Chatterjee and Zielinski, "On the Generalization Mystery in Deep Learning", 2022, arXiv:2203.10036.

Coherence: 300 of the digits with a perceptron 64-64-64-10, and 3,000 images of Fashion-MNIST with two convolutions and
one dense layer (29k parameters), SGD without momentum, learning rate 0.1, batch 50; labels true, half of them drawn
anew, and all of them. m-coherence is measured on the whole training set every two steps of the first forty, every
twenty of the first two epochs, and then every epoch. A peak is no fair figure, since random labels rise late too, so
that means are compared over the measurements with the same loss: 95 to 70 % of what it was before training.
Suppression: the digits with half of the labels drawn anew, 200 epochs, in which SGD fits nearly all of them; the
learning rate of each arm, and the strength of weight decay, by accuracy on 200 clean validation images at the end.
Easy and hard: 5,000 images of MNIST, halved by the epoch from which on an independent network is right; 1,000 to train
on and 1,000 to test on of each half.

Not tested: ResNet-50 and other networks on ImageNet, where the published curves and the results of M3 and RM3 are from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.classification import each_epoch, noisy_parts, right
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    import lightning
    from torch import Tensor, nn

    from netwright.data import Normalise, TensorImages

CARD = Paper(
    slug="coherence",
    title="On the Generalization Mystery in Deep Learning",
    authors=("Satrajit Chatterjee", "Piotr Zielinski"),
    year=2022,
    arxiv="2203.10036",
    summary=(
        "Gradient descent generalises where the gradients of single examples agree: m-coherence counts how many "
        "examples a step on one of them helps, and what suppresses the directions of few examples memorises less."
    ),
    method="netwright.diagnose.coherence:m_coherence",
    covers=(
        "netwright.diagnose.callbacks:CoherenceCallback",
        "netwright.diagnose.running:RunningCoherence",
        "netwright.diagnose.suppression:WinsorizedGradients",
    ),
    claims=(
        Claim(
            "coherence",
            "At the same loss m-coherence is at least 2.5 times as high with true as with random labels, and falls "
            "with the share of random ones, in every seed.",
        ),
        Claim("start", "Before training it is at least 1.5 times as high with true as with random labels."),
        Claim(
            "clean",
            "At the best test accuracy examples with clean labels contribute more to the mean gradient than others, "
            "which their share tells apart with an AUC of at least 0.8.",
        ),
        Claim(
            "suppression",
            "Winsorised gradients or M3 fit at least 30 points fewer of the corrupted labels than SGD, and are at "
            "least 3 points more accurate on the test part.",
        ),
        Claim("easy", "The gap between training and test accuracy is at least 3 points smaller on easy examples."),
        Claim(
            "running median", "RM3 fits at least 10 points fewer of them than SGD, and is more accurate.", gated=False
        ),
        Claim("early stopping", "SGD that is stopped early is more accurate than SGD in the end.", gated=False),
        Claim(
            "late rise",
            "At five times the learning rate m-coherence with random labels doubles late, while they are memorised.",
            gated=False,
        ),
    ),
    metric="m-coherence",
    seeds=3,
    fast_seeds=1,
)

NOISE = {"true labels": 0.0, "half random": 0.5, "random labels": 1.0}
DATA = {"digits": "digits", "Fashion-MNIST": "fashion-mnist"}
BATCH, CLASSES = 50, 10
WINDOW = (0.95, 0.7)  # of the loss before training
LR, LARGE_LR = 0.1, 0.5
RATES = (0.25, 0.5, 1.0)
DECAYS = (1e-3, 3e-3, 1e-2)
WINSORIZED = (4.0, 8.0, 16.0)
SUPPRESSED = {
    "SGD": ["", 0.0],
    **{f"winsorised {c:g} %": ["winsorized", c] for c in WINSORIZED},
    "M3": ["m3", 0.0],
    "RM3": ["rm3", 0.0],
}
FITTED = 0.9  # of the corrupted labels that SGD must fit for the comparison to mean anything


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    found = {claim.key: decide(None, reason="it was not run") for claim in CARD.claims}
    names = [name for name in DATA if f"{name}, true labels" in arms]
    found["coherence"] = all_of(*(_coherence(arms, name) for name in names))
    found["start"] = all_of(*(_start(arms, name) for name in names))
    found["clean"] = all_of(*(_clean(arms[f"{name}, half random"], name) for name in names))
    if "SGD" in arms:
        strong = [name for name in arms if name.startswith("winsorised") or name == "M3"]
        each = [_suppressed(arms, name, 0.3, 0.03) for name in strong]
        order = ("supported", "inconclusive", "not supported")
        found["suppression"] = min(each, key=lambda verdict: order.index(verdict.verdict))
        found["running median"] = _suppressed(arms, "RM3", 0.1, 0.0)
        found["early stopping"] = compare(arms["early stopping"]["accuracy"], arms["SGD"]["accuracy"])
    if "easy and hard" in arms:
        halves = arms["easy and hard"]
        found["easy"] = compare(halves["gap, hard"], halves["gap, easy"], margin=0.03)
    if "digits, random labels, large rate" in arms:
        found["late rise"] = _late(arms["digits, random labels, large rate"])
    return found


def _coherence(arms: Arms, data: str) -> Verdict:
    true, half, random = (arms[f"{data}, {name}"]["m-coherence"] for name in NOISE)
    if any(value is None for value in (*true, *half, *random)):
        return decide(None, reason=f"{data}: no measurement at 95 to 70 % of the loss")
    ratios = [a / b for a, b in zip(true, random, strict=True)]
    ordered = all(a > b > c for a, b, c in zip(true, half, random, strict=True))
    told = f"{data}: {min(ratios):.3g} times in the worst seed, claimed >= 2.5; "
    told += "falls with the noise in every seed" if ordered else "does not fall with the noise in every seed"
    return decide(min(ratios) >= 2.5 and ordered, min(ratios), told)


def _start(arms: Arms, data: str) -> Verdict:
    true, random = (arms[f"{data}, {name}"]["m-coherence before"] for name in ("true labels", "random labels"))
    ratios = [a / b for a, b in zip(true, random, strict=True)]
    return decide(min(ratios) >= 1.5, min(ratios), f"{data}: {min(ratios):.3g} times in the worst seed, claimed >= 1.5")


def _clean(half: dict[str, list[Any]], data: str) -> Verdict:
    gaps = [a - b for a, b in zip(half["share, clean"], half["share, corrupted"], strict=True)]
    least = min(half["AUC"])
    told = f"{data}: AUC {least:.3g} in the worst seed, claimed >= 0.8; shares differ by {min(gaps):.3g} there or more"
    return decide(least >= 0.8 and min(gaps) > 0, least, told)


def _late(late: dict[str, list[Any]]) -> Verdict:
    ratios = [last / first for last, first in zip(late["late peak"], late["m-coherence before"], strict=True)]
    told = f"late peak over what it was before training: {min(ratios):.3g} in the worst seed, claimed >= 2"
    return decide(min(ratios) >= 2, min(ratios), told)


def _suppressed(arms: Arms, name: str, fit: float, gain: float) -> Verdict:
    plain, ours = arms["SGD"], arms[name]
    if mean(plain["corrupted labels"]) < FITTED:
        told = f"SGD fits {mean(plain['corrupted labels']):.3g} of the corrupted labels, too few to compare"
        return decide(None, reason=told)
    less = mean(plain["corrupted labels"]) - mean(ours["corrupted labels"])
    more = mean(ours["accuracy"]) - mean(plain["accuracy"])
    told = f"{name}: {100 * less:.1f} points fewer corrupted labels, claimed >= {100 * fit:g}; "
    told += f"{100 * more:+.1f} points of test accuracy, claimed {'>=' if gain else '>'} {100 * gain:g}"
    return decide(less >= fit and (more >= gain if gain else more > 0), less, told)


def reproduce(run: Run) -> Evidence:
    """Coherence with true and random labels; then, unless it is fast, suppression and easy and hard examples."""
    digits = [run.size("digits training images", full=300, fast=300), 200, 1000]
    images = [run.size("Fashion-MNIST training images", full=3000, fast=300), 200, 2000]
    epochs = run.size("epochs, digits", full=60, fast=20)
    wanted = {f"digits, {name}": ["digits", rate, LR, epochs, digits] for name, rate in NOISE.items()}
    if not run.fast:
        longer = run.size("epochs, Fashion-MNIST", full=40, fast=2)
        wanted |= {
            f"Fashion-MNIST, {name}": ["fashion-mnist", rate, LR, longer, images] for name, rate in NOISE.items()
        }
        late = run.size("epochs, large rate", full=150, fast=2)
        wanted["digits, random labels, large rate"] = ["digits", 1.0, LARGE_LR, late, digits]
    arms = run.arms(wanted, _watch)
    if not run.fast:
        arms |= _suppression(run, digits)
        count = run.size("MNIST images of a half", full=1000, fast=100, scaled=False)
        halves = [count, run.size("epochs, MNIST", full=30, fast=2)]
        arms |= run.arms({"easy and hard": halves}, _easy_and_hard)
    return run.evidence(arms, judge(arms))


def _suppression(run: Run, images: Sequence[int]) -> Arms:
    """Every arm with the learning rate that is best for it."""
    epochs = run.size("epochs, suppression", full=200, fast=2)
    arms: Arms = {}
    chosen: dict[str, list[Any]] = {}
    for name, (method, c) in SUPPRESSED.items():
        trials = {lr: [method, c, lr, 0.0, False, epochs, images, True] for lr in RATES}
        lr, tried = best(run, f"{name}, lr", trials, _suppress)
        arms |= tried
        chosen[name] = [method, c, lr, 0.0, False, epochs, images, False]
    lr, tried = best(
        run, "early stopping, lr", {lr: ["", 0.0, lr, 0.0, True, epochs, images, True] for lr in RATES}, _suppress
    )
    arms |= tried
    chosen["early stopping"] = ["", 0.0, lr, 0.0, True, epochs, images, False]
    pairs = {f"{lr:g} {decay:g}": (lr, decay) for lr in RATES for decay in DECAYS}
    trials_of_pairs = {key: ["", 0.0, *pair, False, epochs, images, True] for key, pair in pairs.items()}
    key, tried = best(run, "weight decay, lr and decay", trials_of_pairs, _suppress)
    arms |= tried
    chosen["weight decay"] = ["", 0.0, *pairs[key], False, epochs, images, False]
    return arms | run.arms(chosen, _suppress)


def _network(name: str, seed: int, stream: str = "init") -> nn.Module:
    from torch import nn

    from netwright.nn.convnet import MLP
    from netwright.seeding import seeded

    with seeded(seed, stream):
        if name == "digits":
            return nn.Sequential(nn.Flatten(), MLP(64, [64, 64, CLASSES]))
        if name == "mnist-5000":
            return nn.Sequential(nn.Flatten(), MLP(784, [128, CLASSES]))
        return nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1568, CLASSES),
        )  # fmt: skip


def _fit(
    network: nn.Module,
    train: TensorImages,
    normalise: Normalise,
    lr: float,
    epochs: int,
    seed: int,
    *,
    decay: float = 0.0,
    callbacks: Sequence[lightning.Callback] = (),
) -> None:
    """SGD without momentum, at a constant learning rate."""
    import torch

    from netwright.data import Batches
    from netwright.train import Classifier, fit

    fit(
        Classifier(network, lr=lr, clip=None),
        Batches(train, BATCH, seed=seed, normalise=normalise),
        epochs=epochs,
        optimizer=lambda params: torch.optim.SGD(params, lr, weight_decay=decay),
        callbacks=callbacks,
        seed=seed,
    )


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def _watch(seed: int, data: str, rate: float, lr: float, epochs: int, images: Sequence[int]) -> dict[str, Any]:
    """m-coherence of the training set while it is learned."""
    from netwright.diagnose import CoherenceCallback

    parts, normalise, changed = noisy_parts(data, seed, rate, *images)
    train = parts["train"]
    whole = normalise(train.images), train.labels
    an_epoch = len(train) // BATCH
    # True labels are through the window in a few steps.
    often = [2] * 40 + [20] * (2 * an_epoch - 40)
    coherence = CoherenceCallback(
        whole, every=lambda step: step % (often[step] if step < len(often) else an_epoch) == 0
    )
    network = _network(data, seed)
    rows: list[dict[str, float]] = []
    test = normalise(parts["test"].images), parts["test"].labels

    def look(module: nn.Module) -> None:
        rows.append({"accuracy": _share(right(module, *test)), **_shares(module, whole, changed, rate)})

    _fit(network, train, normalise, lr, epochs, seed, callbacks=[coherence, each_epoch(look)])
    losses = [float(found.loss or 0.0) for found in coherence.results]
    values = [found.m_coherence for found in coherence.results]
    high, low = (share * losses[0] for share in WINDOW)
    inside = [value for value, loss in zip(values, losses, strict=True) if low <= loss <= high]
    top = max(rows, key=lambda row: row["accuracy"])
    return {
        "m-coherence": mean(inside) if inside else None,
        "m-coherence before": values[0],
        "m-coherence peak": max(values),
        "late peak": max(values[len(values) // 2 :]),
        "measurements at that loss": len(inside),
        "loss before": losses[0],
        "loss after": losses[-1],
        **top,
        "curve": {"step": coherence.steps, "loss": losses, "m-coherence": values},
    }


def _shares(module: nn.Module, whole: tuple[Tensor, Tensor], changed: Tensor, rate: float) -> dict[str, float]:
    """Mean shares of examples with clean and with corrupted labels, and the AUC of telling them apart."""
    if rate != 0.5:
        return {}
    from sklearn.metrics import roc_auc_score

    from netwright.diagnose import per_example_alignment
    from netwright.diagnose.callbacks import CROSS_ENTROPY

    shares = per_example_alignment(module, CROSS_ENTROPY, whole)
    return {
        "share, clean": float(shares[~changed].mean()),
        "share, corrupted": float(shares[changed].mean()),
        "AUC": float(roc_auc_score(~changed, shares)),
    }


def _suppress(
    seed: int,
    method: Any,
    c: float,
    lr: float,
    decay: float,
    early: bool,
    epochs: int,
    images: Sequence[int],
    tuning: bool,
) -> dict[str, Any]:
    """Training on half random digits, with weak directions suppressed or not."""
    from netwright.diagnose import SuppressionCallback

    parts, normalise, changed = noisy_parts("digits", seed, 0.5, *images)
    network = _network("digits", seed)
    inputs = {name: (normalise(part.images), part.labels) for name, part in parts.items()}
    rows: list[dict[str, float]] = []

    def look(module: nn.Module) -> None:
        fitted = right(module, *inputs["train"])
        rows.append(
            {
                "validation accuracy": _share(right(module, *inputs["validation"])),
                "accuracy": _share(right(module, *inputs["test"])),
                "corrupted labels": _share(fitted[changed]),
                "clean labels": _share(fitted[~changed]),
                "epoch": len(rows) + 1,
            }
        )

    methods = [SuppressionCallback(method, c, seed=seed)] if method else []
    callbacks = [*methods, each_epoch(look)]
    _fit(network, parts["train"], normalise, lr, epochs, seed, decay=decay, callbacks=callbacks)
    row = max(rows, key=lambda each: each["validation accuracy"]) if early else rows[-1]
    if tuning:
        return {"validation accuracy": row["validation accuracy"]}
    return {**row, "best accuracy": max(each["accuracy"] for each in rows), "learning rate": lr, "weight decay": decay}


def _easy_and_hard(seed: int, count: int, epochs: int) -> dict[str, Any]:
    """Gaps of two networks, each trained and tested on one half of the examples, halved by an independent network."""
    import torch

    from netwright.data import load
    from netwright.data.tensors import Normalise, TensorImages
    from netwright.seeding import stream

    data = load("mnist-5000")
    images, labels = (torch.cat([getattr(p, field) for p in data.parts.values()]) for field in ("images", "labels"))
    pool, normalise = TensorImages(images, labels), Normalise(data.mean, data.std)
    x = normalise(images)
    late = torch.zeros(len(pool))
    wrongs = torch.zeros(len(pool))
    seen = 0

    def look(module: nn.Module) -> None:
        nonlocal seen
        seen += 1
        wrong = ~right(module, x, labels)
        late[wrong] = seen
        wrongs.add_(wrong)

    independent = _network("mnist-5000", seed, "independent")
    _fit(independent, pool, normalise, LR, epochs, seed, callbacks=[each_epoch(look)])
    # Learned in the same epoch: first who was wrong less often, then by lot.
    lot = torch.rand(len(pool), generator=stream(seed, "ties"))
    order = (late + (wrongs + lot) / (epochs + 2)).argsort()
    found: dict[str, Any] = {}
    for name, half in (("easy", order[: len(order) // 2]), ("hard", order[len(order) // 2 :])):
        chosen = half[torch.randperm(len(half), generator=stream(seed, "halves"))[: 2 * count]]
        train, test = chosen[:count], chosen[count:]
        network = _network("mnist-5000", seed)
        _fit(network, pool.subset(train), normalise, LR, epochs, seed)
        fitted, tested = (_share(right(network, x[part], labels[part])) for part in (train, test))
        found |= {f"gap, {name}": fitted - tested, f"training accuracy, {name}": fitted}
        found |= {f"test accuracy, {name}": tested}
        found[f"learned in epoch, {name}"] = float(late[half].mean()) + 1
    return found
