"""Does a first layer that is trained by its pre-activations learn in fewer epochs, beyond a larger learning rate?

Petersen, Borgelt and Ermon, "TrAct: Making First-layer Pre-Activations Trainable", NeurIPS 2024, arXiv:2410.23970.

Fashion-MNIST, 10,000 standardised training images and the full test part, batch 128, one cosine over 2, 4 or 8 epochs;
a small convolutional network (5x5 stride 2 to 16, 3x3 stride 2 to 32 and to 64, batch norm, mean, linear) under SGD
with Nesterov's momentum 0.9, and a small vision transformer (patches 4x4 to 64, two blocks of four heads, mean) under
Adam. Three arms with the same initialisation and batches: plain; TrAct with lambda 0.1 on the first convolution; a
control, plain with another learning rate of the first layer alone, 0.3, 3 or 10 times the rest. Each arm's learning
rate is tuned on 1,000 held-out images at four epochs, with a seed of its own; the control's together with its factor,
over all pairs of the two. The 8x8 digits with a perceptron 64-64-10 give a cheap second set, and a scan of lambda shows
plain training as its limit; neither weighs in the verdict. Not tested: ImageNet, DeiT, the factor of four, which needs
long schedules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from torch import Tensor, nn

CARD = Paper(
    slug="tract",
    title="TrAct: Making First-layer Pre-Activations Trainable",
    authors=("Felix Petersen", "Christian Borgelt", "Stefano Ermon"),
    year=2024,
    venue="Advances in Neural Information Processing Systems",
    kind="inproceedings",
    arxiv="2410.23970",
    summary=(
        "The first layer takes a gradient step on its pre-activations, and the weight change that best makes it over "
        "the batch is found in closed form: bright images do not move the layer more than dull ones."
    ),
    method="netwright.train.tract:TrActLinear",
    covers=("netwright.train.callbacks.layers:TrActCallback",),
    claims=(
        Claim("gain", "TrAct is more accurate than plain training at two of three lengths, and worse with no model."),
        Claim("control", "It is not beaten by plain training with another learning rate of the first layer."),
        Claim("speed-up", "Plain training needs at least 1.25 times the epochs for TrAct's accuracy.", gated=False),
        Claim("digits", "On the digits it is more accurate after 5 and after 20 epochs.", gated=False),
        Claim("limit", "With lambda 10 the accuracy is within a point of plain's at a tenth of the rate.", gated=False),
    ),
    metric="accuracy",
    seeds=10,
    fast_seeds=3,
)

LENGTHS, DIGITS_LENGTHS = (2, 4, 8), (5, 20)
RATES = {"CNN": (0.03, 0.1, 0.3), "ViT": (5e-4, 1e-3, 3e-3), "MLP": (0.02, 0.05, 0.1, 0.2)}
FACTORS = (0.3, 3.0, 10.0)
LAMBDA = 0.1
SCAN = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
IMAGE_SEEDS = 4  # of the ten; the others are for the digits
BATCH = {"CNN": 128, "ViT": 128, "MLP": 64}


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""

    def accuracy(model: str, arm: str, length: int) -> list[float]:
        return arms[f"{model}, {arm}, {length} epochs"]["accuracy"]

    models = [model for model in ("CNN", "ViT") if f"{model}, plain, {LENGTHS[0]} epochs" in arms]
    absent = decide(None, reason="Fashion-MNIST was not run")
    lengths = [n for n in DIGITS_LENGTHS if f"MLP, plain, {n} epochs" in arms]
    found = dict.fromkeys(("gain", "control", "speed-up", "limit"), absent)
    found["digits"] = all_of(*(compare(accuracy("MLP", "TrAct", n), accuracy("MLP", "plain", n)) for n in lengths))
    if not models:
        return found
    pairs = {(m, n): (accuracy(m, "TrAct", n), accuracy(m, "plain", n)) for m in models for n in LENGTHS}
    found["gain"] = _gain(models, pairs)
    beaten = {
        (m, n): compare(accuracy(m, "control", n), accuracy(m, "TrAct", n), errors=2) for m in models for n in LENGTHS
    }
    names = [f"{m} after {n}" for (m, n), verdict in beaten.items() if verdict.verdict == "supported"]
    largest = max(verdict.statistic or 0.0 for verdict in beaten.values())
    known = all(verdict.interval is not None for verdict in beaten.values())
    told = f"beaten by two s.e.: {', '.join(names) or 'nowhere'}; largest difference {largest:.4g}"
    found["control"] = decide(not names if known else None, largest, told)
    found["speed-up"] = _speed_up({(m, n): mean(plain) for (m, n), (_, plain) in pairs.items()}, pairs)
    if "CNN, lambda 10" in arms:
        scan, small = arms["CNN, lambda 10"]["accuracy"], arms["CNN, plain, a tenth of the rate"]["accuracy"]
        found["limit"] = all_of(compare(scan, small, margin=-0.01), compare(scan, small, margin=0.01, direction="less"))
    return found


def _gain(models: Sequence[str], pairs: dict[tuple[str, int], tuple[list[float], list[float]]]) -> Verdict:
    """Better by two standard errors at two lengths with one model, and nowhere worse by one with any."""
    better = {key: compare(*pair, errors=2) for key, pair in pairs.items()}
    worse = {key: compare(*pair, direction="less", errors=1) for key, pair in pairs.items()}
    wins = {m: sum(better[m, n].verdict == "supported" for n in LENGTHS) for m in models}
    losses = [f"{m} after {n}" for (m, n), verdict in worse.items() if verdict.verdict == "supported"]
    told = ", ".join(f"{m} {count} of {len(LENGTHS)} lengths" for m, count in wins.items())
    reason = f"better by two s.e.: {told}; worse by one: {', '.join(losses) or 'nowhere'}"
    if any(verdict.interval is None for verdict in better.values()):
        return decide(None, reason="a single seed has no standard error")
    gaps = [verdict.statistic for verdict in better.values() if verdict.statistic is not None]
    return decide(max(wins.values()) >= 2 and not losses, mean(gaps), reason)


def _speed_up(plain: dict[tuple[str, int], float], pairs: dict[tuple[str, int], Any]) -> Verdict:
    """Epochs of plain training for TrAct's accuracy over TrAct's, where plain's own lengths enclose it."""
    found = []
    for (model, length), (ours, _) in pairs.items():
        curve = [(math.log(n), plain[model, n]) for n in LENGTHS]
        epochs = _crossing(curve, mean(ours))
        if epochs is not None:
            found.append((model, length, math.exp(epochs) / length))
    if not found:
        return decide(None, reason="plain training reaches TrAct's accuracy at none of the lengths, or at all")
    told = ", ".join(f"{model} after {length}: {ratio:.2f}" for model, length, ratio in found)
    largest = max(ratio for *_, ratio in found)
    return decide(largest >= 1.25, largest, f"claimed >= 1.25 somewhere; {told}")


def _crossing(curve: Sequence[tuple[float, float]], level: float) -> float | None:
    """Where a broken line first reaches a level; None if it does not, or starts above it."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y0 <= level <= y1 and y1 > y0:
            return x0 + (x1 - x0) * (level - y0) / (y1 - y0)
    return None


def reproduce(run: Run) -> Evidence:
    """Tunes every arm of every model, trains all lengths, and scans lambda."""
    images = [
        run.size("training images", full=10_000, fast=200),
        run.size("validation images", full=1000, fast=100, scaled=False),
        run.size("test images", full=10_000, fast=100, scaled=False),
    ]
    digits = [
        run.size("digits training images", full=1000, fast=1000, scaled=False),
        run.size("digits validation images", full=200, fast=200, scaled=False),
        run.size("digits test images", full=597, fast=597, scaled=False),
    ]
    arms = _model(run, "MLP", DIGITS_LENGTHS[:1] if run.fast else DIGITS_LENGTHS, digits, run.seeds, ("plain", "TrAct"))
    if not run.fast:
        seeds = run.seeds[:IMAGE_SEEDS]
        for model in ("CNN", "ViT"):
            arms |= _model(run, model, LENGTHS, images, seeds, ("plain", "TrAct", "control"))
        lr = arms["CNN, plain, 4 epochs"]["learning rate"][0]
        ours = arms["CNN, TrAct, 4 epochs"]["learning rate"][0]
        arms |= run.arms(
            {f"CNN, lambda {value:g}": ["CNN", ours, value, 1.0, 4, images, False] for value in SCAN},
            _train,
            seeds=seeds,
        )
        # lambda grad W -> G^T x: the first layer moves as plain training at 1 / lambda of the rate.
        tenth = ["CNN", ours, 0.0, 0.1, 4, images, False]
        arms |= run.arms({"CNN, plain, a tenth of the rate": tenth}, _train, seeds=seeds)
        arms |= run.arms({"CNN, plain, its rate": ["CNN", lr, 0.0, 1.0, 4, images, False]}, _train, seeds=seeds[:1])
    return run.evidence(arms, judge(arms))


def _model(
    run: Run, model: str, lengths: Sequence[int], images: Sequence[int], seeds: Sequence[int], names: Sequence[str]
) -> Arms:
    """All arms of one model at all lengths, each with what is best for it on held-out images."""
    middle = lengths[len(lengths) // 2]
    arms: Arms = {}
    chosen: dict[str, list[float]] = {}
    for name in names[:2]:
        strength = LAMBDA if name == "TrAct" else 0.0
        trials = {lr: [model, lr, strength, 1.0, middle, images, True] for lr in RATES[model]}
        lr, tried = best(run, f"{model}, {name}, lr", trials, _train)
        arms |= tried
        chosen[name] = [lr, strength, 1.0]
    if "control" in names:
        pairs = {f"lr {lr:g} factor {factor:g}": [lr, 0.0, factor] for lr in RATES[model] for factor in FACTORS}
        grid = {pair: [model, *setting, middle, images, True] for pair, setting in pairs.items()}
        pair, tried = best(run, f"{model}, control,", grid, _train)
        arms |= tried
        chosen["control"] = pairs[pair]
    wanted = {
        f"{model}, {name}, {length} epochs": [model, *setting, length, images, False]
        for name, setting in chosen.items()
        for length in lengths
    }
    return arms | run.arms(wanted, _train, seeds=seeds)


def _train(
    seed: int, model: str, lr: float, lambda_: float, factor: float, epochs: int, images: Sequence[int], tuning: bool
) -> dict[str, Any]:
    import torch

    from netwright.seeding import seeded
    from netwright.train.callbacks import TrActCallback

    data = classification.parts("digits" if model == "MLP" else "fashion-mnist", seed, *images)
    with seeded(seed, "init"):
        network = {"CNN": _cnn, "ViT": _vit, "MLP": _mlp}[model]()
    first = list(_first_layer(network).parameters())

    def optimizer(params: Sequence[Any]) -> torch.optim.Optimizer:
        rest = [param for param in params if not any(param is own for own in first)]
        groups: list[dict[str, Any]] = [{"params": first, "lr": lr * factor}, {"params": rest}]
        if model == "ViT":
            return torch.optim.Adam(groups, lr=lr)
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)

    last = classification.train(
        network, data, epochs=epochs, batch=BATCH[model], lr=lr, seed=seed, optimizer=optimizer,
        methods=[TrActCallback(lambda_)] if lambda_ else [],
    )  # fmt: skip
    if tuning:
        return {"validation accuracy": classification.measured(network, data, "validation")["accuracy"]}
    return classification.measured(network, data, "test") | {
        "training loss": last["train_loss"],
        "learning rate": lr,
        "factor": factor,
    }


def _first_layer(network: nn.Module) -> nn.Module:
    """The one that TrAct changes."""
    from torch import nn

    return next(part for part in network.modules() if isinstance(part, (nn.Conv2d, nn.Linear)))


def _cnn() -> nn.Module:
    from torch import nn

    layers: list[nn.Module] = []
    for width_in, width, kernel in ((1, 16, 5), (16, 32, 3), (32, 64, 3)):
        layers += [nn.Conv2d(width_in, width, kernel, 2, kernel // 2), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _mlp() -> nn.Module:
    from torch import nn

    from netwright.nn.convnet import MLP

    return nn.Sequential(nn.Flatten(), MLP(64, [64, 10]))


def _vit(width: int = 64, blocks: int = 2, heads: int = 4, patch: int = 4, side: int = 28) -> nn.Module:
    """A vision transformer with pre-norm blocks, learned positions and the mean of all patches."""
    import torch
    from torch import nn

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(1, width, patch, patch)
            self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
            block = nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            self.blocks = nn.TransformerEncoder(block, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
            self.head = nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.embed(x).flatten(2).mT + self.positions
            return self.head(self.blocks(tokens).mean(1))

    return Transformer()
