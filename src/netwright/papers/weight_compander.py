"""Does a compander spread the weights more evenly, and does a network that has few examples generalise better with it?

Cakaj, Mehnert and Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", IJCNN 2023,
arXiv:2306.16993. Only the abstract is public; form and defaults of the function are this library's reading.

Two sets in the over-fitting regime: Fashion-MNIST with 2,000 training images and a small convolutional network, the 8x8
digits of scikit-learn with 500 and a perceptron 64-128-128-10. SGD with Nesterov's momentum 0.9, batch 64, one cosine.
Three arms: plain, a compander of fixed shape, one whose shape each layer learns. A compander changes the effective
learning rate, so each arm is tuned over the same grid of learning rate and weight decay on held-out images, with a seed
of its own and fewer epochs. The better of the two companders on held-out images is the one that is compared. Not
tested: ImageNet and TinyImageNet. The published gains are below a point on large networks; a null result here would not
refute them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from torch import nn

CARD = Paper(
    slug="weight-compander",
    title="Weight Compander: A Simple Weight Reparameterization for Regularization",
    authors=("Rinor Cakaj", "Jens Mehnert", "Bin Yang"),
    year=2023,
    venue="International Joint Conference on Neural Networks",
    kind="inproceedings",
    arxiv="2306.16993",
    summary=(
        "Each weight is an odd, increasing, saturating function of a free parameter, steep at zero: small weights are "
        "pushed away from zero and large ones are held back."
    ),
    method="netwright.train.weight_compander:WeightCompander",
    covers=("netwright.train.callbacks.layers:WeightCompanderCallback",),
    claims=(
        Claim("mechanism", "In every layer it lowers kurtosis and largest weight, and on average the share near zero."),
        Claim("gain", "The better compander is more accurate than plain training on a set, and worse on none."),
        Claim("learned", "The learned compander is more accurate than the fixed one on Fashion-MNIST.", gated=False),
    ),
    metric="accuracy",
    seeds=5,
    fast_seeds=2,
)

ARMS = ("plain", "fixed", "learned")
DATA = {"fashion": "fashion-mnist", "digits": "digits"}
RATES, DECAYS = (0.02, 0.05, 0.1), (0.0, 5e-4, 5e-3)
BATCH = 64


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    sets = [name for name in DATA if f"{name}, plain" in arms]
    better = {name: _better(arms, name) for name in sets}
    found = {
        "mechanism": all_of(*(_spread(arms[f"{name}, {better[name]}"], arms[f"{name}, plain"]) for name in sets)),
        "gain": decide(None, reason="only one set was run"),
        "learned": decide(None, reason="Fashion-MNIST was not run"),
    }
    if len(sets) == len(DATA):
        accuracy = {name: [arms[f"{name}, {arm}"]["accuracy"] for arm in (better[name], "plain")] for name in sets}
        found["gain"] = _gain(accuracy)
        learned, fixed = (arms[f"fashion, {arm}"]["accuracy"] for arm in ("learned", "fixed"))
        found["learned"] = compare(learned, fixed)
    return found


def _better(arms: Arms, name: str) -> str:
    """The compander with the higher accuracy on held-out images, which the tuning did not see."""
    held = {arm: mean(arms[f"{name}, {arm}"]["validation accuracy"]) for arm in ARMS[1:]}
    return max(held, key=held.__getitem__)


def _spread(ours: dict[str, list[Any]], plain: dict[str, list[Any]]) -> Verdict:
    """Three standard errors for each layer's kurtosis and largest weight, and for the mean share near zero."""
    each = [name for name in ours if name.startswith(("kurtosis", "largest"))]
    near = [name for name in ours if name.startswith("near zero")]
    averages = [[mean(values) for values in zip(*(arm[name] for name in near), strict=True)] for arm in (ours, plain)]
    return all_of(
        *(compare(ours[name], plain[name], direction="less", errors=3) for name in each),
        compare(*averages, direction="less", errors=3),
    )


def _gain(accuracy: dict[str, list[list[float]]]) -> Verdict:
    """Above zero by two standard errors on a set, and on none below it by one."""
    above = {name: compare(*pair, errors=2) for name, pair in accuracy.items()}
    below = {name: compare(*pair, direction="less", errors=1) for name, pair in accuracy.items()}
    reason = "; ".join(f"{name}: {verdict.reason}" for name, verdict in above.items())
    gains = [verdict.statistic for verdict in above.values() if verdict.statistic is not None]
    if any(verdict.interval is None for verdict in above.values()):
        return decide(None, None, reason)
    worse = any(verdict.verdict == "supported" for verdict in below.values())
    gained = any(verdict.verdict == "supported" for verdict in above.values())
    return decide(gained and not worse, max(gains), reason)


def reproduce(run: Run) -> Evidence:
    """Tunes every arm on every set, then trains it for every seed."""
    sizes = {
        "fashion": [
            run.size("Fashion-MNIST training images", full=2000, fast=200),
            run.size("Fashion-MNIST validation images", full=1000, fast=100, scaled=False),
            run.size("Fashion-MNIST test images", full=10_000, fast=100, scaled=False),
        ],
        "digits": [
            run.size("digits training images", full=500, fast=500, scaled=False),
            run.size("digits validation images", full=300, fast=300, scaled=False),
            run.size("digits test images", full=997, fast=997, scaled=False),
        ],
    }
    epochs = {"fashion": run.size("epochs", full=25, fast=10), "digits": run.size("digits epochs", full=60, fast=30)}
    grid_epochs = run.size("epochs of the grid", full=10, fast=10)
    arms: Arms = {}
    for name in ("digits",) if run.fast else DATA:
        for arm in ARMS:
            trials = {
                f"lr {lr:g} wd {decay:g}": [name, arm, lr, decay, grid_epochs, sizes[name]]
                for lr in RATES
                for decay in DECAYS
            }
            setting, tried = best(run, f"{name}, {arm},", trials, _train)
            _, _, lr, decay, *_ = trials[setting]
            arms |= tried
            arms |= run.arms({f"{name}, {arm}": [name, arm, lr, decay, epochs[name], sizes[name]]}, _train)
    return run.evidence(arms, judge(arms))


def _train(
    seed: int, name: str, arm: str, lr: float, weight_decay: float, epochs: int, images: Sequence[int]
) -> dict[str, Any]:
    from netwright.train.callbacks import WeightCompanderCallback
    from netwright.train.weight_compander import weight_statistics

    data = classification.parts(DATA[name], seed, *images)
    network = _network(name, seed)
    last = classification.train(
        network, data, epochs=epochs, batch=BATCH, lr=lr, seed=seed, weight_decay=weight_decay,
        methods=[] if arm == "plain" else [WeightCompanderCallback(learnable=arm == "learned")],
    )  # fmt: skip
    held_out = classification.measured(network, data, "validation")
    found: dict[str, Any] = {"validation accuracy": held_out["accuracy"], "learning rate": lr}
    for layer, figures in weight_statistics(network).items():
        found |= {f"{figure} {layer}": value for figure, value in figures.items()}
    found |= {"training loss": last["train_loss"], "weight decay": weight_decay}
    return classification.measured(network, data, "test") | found


def _network(name: str, seed: int) -> nn.Module:
    from torch import nn

    from netwright.nn.convnet import MLP, SmallConvNet
    from netwright.seeding import seeded

    with seeded(seed, "init"):
        if name == "fashion":
            return SmallConvNet(in_channels=1, grid=7)
        return nn.Sequential(nn.Flatten(), MLP(64, [128, 128, 10]))
