"""Does a network that is held to its own early predictions leave wrong labels unlearned?

Liu, Niles-Weed, Razavian and Fernandez-Granda, "Early-Learning Regularization Prevents Memorization of Noisy Labels",
NeurIPS 2020, arXiv:2007.00151.

MNIST-5000: 3,600 training and 400 validation images, both with wrong labels, and 1,000 test images with right ones. 40
or 60 % of the labels are drawn anew among the other classes, or 40 % become the next class. A small convolutional
network (16 and 32 channels with batch norm, 128 hidden units, 210,000 parameters), SGD 0.02 with momentum 0.9 and
weight decay 1e-3, batch 128, 25 epochs, no augmentation: long enough for cross-entropy to memorise. Arms with the same
initialisation and batches: cross-entropy, at the end and where its accuracy on the noisy validation part is best; label
smoothing 0.1; mixup; ELR; ELR+ once, with 25 epochs for each network and averaged weights without a ramp, whose 40,000
updates are 57 times as many as there are here. The weight of ELR and the alpha of mixup are chosen by the accuracy on
the noisy validation part, for each kind of noise, with a seed of their own. Fashion-MNIST confirms once. The theory is
tried as it stands: two Gaussian classes in 400 dimensions, 200 examples, 30 % wrong labels, a linear network under
gradient descent. Not tested: Clothing1M, WebVision, the ranking among published methods, which need large networks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.classification import each_epoch, right
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    import lightning
    from torch import Tensor, nn

    from netwright.data import Normalise, TensorImages

CARD = Paper(
    slug="early-learning",
    title="Early-Learning Regularization Prevents Memorization of Noisy Labels",
    authors=("Sheng Liu", "Jonathan Niles-Weed", "Narges Razavian", "Carlos Fernandez-Granda"),
    year=2020,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="2007.00151",
    summary=(
        "A network fits the right labels first and memorises the wrong ones later: holding its predictions to their "
        "running average keeps it where it was right, and the averages tell which labels are wrong."
    ),
    method="netwright.train.early_learning:ELRLoss",
    covers=(
        "netwright.train.callbacks.early_learning:ELRCallback",
        "netwright.train.callbacks.early_learning_plus:ELRPlusCallback",
        "netwright.train.early_learning_plus:ELRPlus",
    ),
    claims=(
        Claim("gain", "ELR ends at least 5 points above cross-entropy with 40 % wrong labels, and 8 points with 60 %."),
        Claim("memorised", "It memorises less than a third of the wrong labels that cross-entropy memorises."),
        Claim("averages", "With 40 % wrong labels its averages tell the true class of at least 85 % of the examples."),
        Claim("stopping", "With 40 % it is not worse by a point than cross-entropy stopped by noisy validation."),
        Claim(
            "theory",
            "A linear network is right on more than 90 % of the wrongly labelled at its best, and on less than 10 % in "
            "the end.",
        ),
        Claim("asymmetric", "It ends above cross-entropy where 40 % of each class become the next one.", gated=False),
        Claim("mixup", "It ends above mixup with 40 % wrong labels.", gated=False),
        Claim("Fashion-MNIST", "There too it ends at least 5 points above cross-entropy.", gated=False),
        Claim("linear", "A linear network with ELR stays right on the wrongly labelled for 1,200 steps.", gated=False),
    ),
    metric="accuracy",
    seeds=3,
    fast_seeds=1,
)

NOISE = {"40 %": ("symmetric", 0.4), "60 %": ("symmetric", 0.6), "asymmetric": ("asymmetric", 0.4)}
STRENGTHS, ALPHAS = (1.0, 3.0, 7.0), (1.0, 4.0, 8.0)
BETA, SMOOTHING = 0.7, 0.1
LR, DECAY, BATCH, CLASSES = 0.02, 1e-3, 128, 10
MEMORISES = 0.3  # share of wrong labels that cross-entropy must memorise for a comparison to mean anything
DIMENSIONS, POINTS, FLIPPED, SIGMA, LINEAR_LR = 400, 200, 0.3, 0.15, 0.5


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    absent = decide(None, reason="it was not run")

    def accuracy(noise: str, arm: str) -> list[Any]:
        return arms[f"{noise}, {arm}"]["accuracy"]

    def above(noise: str, margin: float = 0.0) -> Verdict:
        if f"{noise}, ELR" not in arms:
            return absent
        return compare(accuracy(noise, "ELR"), accuracy(noise, "cross-entropy"), margin=margin, errors=2)

    plain, ours = arms["40 %, cross-entropy"], arms["40 %, ELR"]
    kinds = [noise for noise in NOISE if f"{noise}, ELR" in arms]
    found = {"gain": all_of(above("40 %", 0.05), above("60 %", 0.08))}
    found["memorised"] = all_of(*(_memorised(arms, noise) for noise in kinds))
    least = min(ours["averages"])
    found["averages"] = decide(least >= 0.85, least, f"{least:.4g} in the worst seed, claimed >= 0.85")
    found["stopping"] = compare(ours["accuracy"], plain["stopped accuracy"], margin=-0.01)
    found["theory"] = _theory(arms["linear, cross-entropy"])
    found["asymmetric"] = above("asymmetric")
    found["mixup"] = compare(ours["accuracy"], accuracy("40 %", "mixup")) if "40 %, mixup" in arms else absent
    found["Fashion-MNIST"] = found["linear"] = absent
    if "Fashion-MNIST, ELR" in arms:
        gap = mean(accuracy("Fashion-MNIST", "ELR")) - mean(accuracy("Fashion-MNIST", "cross-entropy"))
        found["Fashion-MNIST"] = decide(gap >= 0.05, gap, f"{100 * gap:+.1f} points in one run, claimed >= 5")
    if "linear, ELR 3" in arms:
        kept = min(arms["linear, ELR 3"]["end"])
        found["linear"] = decide(kept > 0.9, kept, f"right on {kept:.3g} of them in the worst seed, claimed > 0.9")
    return found


def _memorised(arms: Arms, noise: str) -> Verdict:
    plain, ours = (mean(arms[f"{noise}, {arm}"]["memorised"]) for arm in ("cross-entropy", "ELR"))
    if plain < MEMORISES:
        return decide(None, plain, f"{noise}: cross-entropy memorises {plain:.3g} only, of {MEMORISES:g} at least")
    told = f"{noise}: {ours:.3g} of the wrong labels against {plain:.3g}, claimed less than a third"
    return decide(ours < plain / 3, ours / plain, told)


def _theory(linear: dict[str, list[Any]]) -> Verdict:
    peak, end = min(linear["peak"]), max(linear["end"])
    told = f"right on the wrongly labelled: {peak:.3g} at its best, {end:.3g} in the end, in the worst seeds"
    return decide(peak > 0.9 and end < 0.1, end, told)


def reproduce(run: Run) -> Evidence:
    """Chooses the strengths of ELR and mixup for each kind of noise, trains every arm, and tries the theory."""
    images = [
        run.size("training images", full=3600, fast=1000),
        run.size("validation images", full=400, fast=100, scaled=False),
        run.size("test images", full=1000, fast=500, scaled=False),
    ]
    epochs = run.size("epochs", full=25, fast=8)
    steps = run.size("steps, linear", full=4000, fast=600, scaled=False)
    arms: Arms = {}
    for noise, (kind, rate) in NOISE.items():
        if run.fast and noise != "40 %":
            continue
        seeds = run.seeds if noise == "40 %" else run.seeds[: max(1, len(run.seeds) - 1)]
        common = ["mnist-5000", kind, rate]

        def trials(arm: str, values: Sequence[float], common: list[Any] = common) -> dict[float, list[Any]]:
            return {value: [*common, arm, value, epochs, images, True] for value in values}

        lam, tried = best(run, f"{noise}, ELR, lambda", trials("ELR", STRENGTHS), _train)
        arms |= tried
        chosen = {"cross-entropy": 0.0, "ELR": lam}
        if not run.fast:
            alpha, tried = best(run, f"{noise}, mixup, alpha", trials("mixup", ALPHAS), _train)
            arms |= tried
            chosen |= {"label smoothing": SMOOTHING, "mixup": alpha}
        wanted = {f"{noise}, {arm}": [*common, arm, value, epochs, images, False] for arm, value in chosen.items()}
        arms |= run.arms(wanted, _train, seeds=seeds)
        if noise == "40 %" and not run.fast:
            plus = [*common, "ELR+", lam, epochs, images, False]
            fashion = ["fashion-mnist", kind, rate]
            once = {"40 %, ELR+": plus} | {
                f"Fashion-MNIST, {arm}": [*fashion, arm, chosen[arm], epochs, images, False]
                for arm in ("cross-entropy", "ELR")
            }
            arms |= run.arms(once, _train, seeds=run.seeds[:1])
    linear = {"linear, cross-entropy": [0.0, steps]}
    if not run.fast:
        linear |= {"linear, ELR 1": [1.0, steps], "linear, ELR 3": [3.0, 1200]}
    arms |= run.arms(linear, _linear)
    return run.evidence(arms, judge(arms))


def noisy_parts(
    name: str, seed: int, kind: str, rate: float, images: Sequence[int]
) -> tuple[dict[str, TensorImages], Normalise, Tensor]:
    """Training and validation part with wrong labels, test part with right ones, and the true training labels."""
    from netwright.data.label_noise import asymmetric_noise, next_class, symmetric_noise
    from netwright.seeding import stream

    train, held_out, test = images
    found, normalise = classification.parts(name, seed, train, held_out, test)
    clean = found["train"].labels
    for part in ("train", "validation"):
        generator = stream(seed, "label noise", part)
        labels = found[part].labels
        if kind == "symmetric":
            noisy, _ = symmetric_noise(labels, rate, CLASSES, generator, exclude_true=True)
        else:
            noisy, _ = asymmetric_noise(labels, rate, next_class(CLASSES), generator)
        found = {**found, part: found[part].with_labels(noisy)}
    return found, normalise, clean


def _network(seed: int, stream: str = "init") -> nn.Module:
    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded

    with seeded(seed, stream):
        return SmallConvNet((16, 32), hidden=128, in_channels=1, grid=7)


def _module(seed: int, arm: str, value: float, count: int) -> tuple[Any, list[lightning.Callback]]:
    """What is trained, and the callbacks of its method."""
    from netwright.data.augment import mixup
    from netwright.seeding import derive
    from netwright.seeding import stream as stream_of
    from netwright.train import Classifier, ELRPlus
    from netwright.train.callbacks import ELRCallback
    from netwright.train.memory import one_hot

    if arm == "ELR+":
        networks = iter([_network(seed), _network(seed, "partner")])
        plus = ELRPlus(lambda: next(networks), count, CLASSES, value, BETA, ema_ramp=0, seed=derive(seed, "elr+"))
        return plus, []

    class Mixed(Classifier):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            generator = stream_of(seed, "mixup", self.current_epoch, batch_idx)
            return super().training_step(mixup(batch[0], one_hot(batch[1], CLASSES), value, generator), batch_idx)

    kind = Mixed if arm == "mixup" else Classifier
    smoothing = value if arm == "label smoothing" else 0.0
    module = kind(_network(seed), lr=LR, clip=None, label_smoothing=smoothing)
    return module, [ELRCallback(value, BETA)] if arm == "ELR" else []


def _train(
    seed: int,
    data: str,
    kind: str,
    rate: float,
    arm: str,
    value: float,
    epochs: int,
    images: Sequence[int],
    tuning: bool,
) -> dict[str, Any]:
    """One arm: accuracy on the test part, what became of the wrong labels, and what the averages tell."""
    import torch

    from netwright.data import Batches
    from netwright.train import MemorizationTracker, fit

    parts, normalise, clean = noisy_parts(data, seed, kind, rate, images)
    module, methods = _module(seed, arm, value, len(clean))
    inputs = {name: (normalise(part.images), part.labels) for name, part in parts.items()}
    whole = Batches(parts["train"], 600, shuffle=False, drop_last=False, normalise=normalise)
    tracker = MemorizationTracker(whole, clean)
    rows: list[dict[str, float]] = []

    def look(trained: nn.Module) -> None:
        rows.append({name: float(right(trained, *inputs[name]).double().mean()) for name in ("validation", "test")})

    plus = arm == "ELR+"
    history = fit(
        module,
        Batches(parts["train"], BATCH, seed=seed, normalise=normalise, indexed=plus or bool(methods)),
        epochs=2 * epochs if plus else epochs,
        optimizer=lambda params: torch.optim.SGD(params, LR, momentum=0.9, weight_decay=DECAY),
        callbacks=[*methods, *([] if tuning else [tracker]), each_epoch(look)],
        seed=seed,
    )
    if tuning:
        return {"validation accuracy": rows[-1]["validation"]}
    stopped = max(range(len(rows)), key=lambda epoch: rows[epoch]["validation"])
    last = tracker.epochs[-1]
    found = {
        "accuracy": rows[-1]["test"],
        "best accuracy": max(row["test"] for row in rows),
        "stopped accuracy": rows[stopped]["test"],
        "stopped epoch": stopped + 1,
        "memorised": last.false_memorised,
        "wrongly labelled, true class": last.false_correct,
        "rightly labelled, true class": last.clean_correct,
        "training loss": history.last["train_loss"],
        "value": value,
        "curve": {
            "test accuracy": [row["test"] for row in rows],
            "memorised": [each.false_memorised for each in tracker.epochs],
            "true class": [each.false_correct for each in tracker.epochs],
        },
    }
    method: Any = module.method if plus else methods[0] if methods else None
    return found | (_told(method.target, parts["train"].labels, clean) if method is not None else {})


def _told(target: Tensor, labels: Tensor, clean: Tensor) -> dict[str, float | None]:
    """How well the averages tell the true class, and which labels are wrong."""
    from netwright.train.early_learning import suspicious

    target = target.cpu()
    doubted, wrong = suspicious(target, labels), labels != clean
    return {
        "averages": float((target.argmax(1) == clean).double().mean()),
        "doubted that are wrong": float(wrong[doubted].double().mean()) if bool(doubted.any()) else None,
        "wrong that are doubted": float(doubted[wrong].double().mean()),
    }


def _linear(seed: int, lam: float, steps: int) -> dict[str, Any]:
    """Full-batch gradient descent of two linear logits from zero, on two Gaussian classes with flipped labels."""
    import torch

    from netwright.seeding import stream
    from netwright.train import ELRLoss

    draws = stream(seed, "linear")
    direction = torch.zeros(DIMENSIONS)
    direction[0] = 1.0
    true = torch.randint(2, (POINTS,), generator=draws)
    x = (2 * true[:, None] - 1) * direction + SIGMA * torch.randn(POINTS, DIMENSIONS, generator=draws)
    wrong = torch.rand(POINTS, generator=draws) < FLIPPED
    labels, index = torch.where(wrong, 1 - true, true), torch.arange(POINTS)
    weights, loss = torch.zeros(DIMENSIONS, 2, requires_grad=True), ELRLoss(POINTS, 2, lam, BETA)
    shares = []
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss(x @ weights, labels, index), weights)
        with torch.no_grad():
            weights -= LINEAR_LR * grad
            shares.append(((x[wrong] @ weights).argmax(1) == true[wrong]).float().mean())
    kept = torch.stack(shares)
    return {"peak": float(kept.max()), "end": float(kept[-1]), "wrong labels": int(wrong.sum())}
