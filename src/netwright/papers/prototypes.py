"""Does a classifier that goes by learned cases stay as accurate, and are its cases real ones of every class?

Li, Liu, Chen and Rudin, "Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its
Predictions", AAAI 2018, arXiv:1710.04806.

MNIST-5000 (3,500 training, 500 validation and 1,000 test images) under elastic deformation, the paper's convolutional
autoencoder with Kaiming's initialisation, 15 prototypes, Adam, batch 250, 60 epochs in place of 1,500. Four arms with
the same initial encoder and batches: the full loss; without the two terms that tie prototypes to data; without the
decoder; and a control in which a linear layer with ReLU and an ordinary classifier stand for distances and weights,
with the decoder's loss. Each arm's learning rate is chosen on the validation images, with a seed of its own. Then the
full loss and the control on 20,000 images of Fashion-MNIST, ten epochs, at the same rates, without deformation.

Measured on the undeformed training images: whether the class of a prototype, where its weight is the least, is the
commonest of the 20 nearest encodings; how far decoded prototypes are from the nearest image, in units of what test
images are; R1 and R2 in units of the mean squared distance between two encodings. Not tested: 99.22 % on MNIST, which
takes 60,000 images and 1,500 epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, decide, mean, paired_difference
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from netwright.data import TensorImages
    from netwright.explain import PrototypeClassifier

CARD = Paper(
    slug="prototypes",
    title=("Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its Predictions"),
    authors=("Oscar Li", "Hao Liu", "Chaofan Chen", "Cynthia Rudin"),
    year=2018,
    venue="AAAI Conference on Artificial Intelligence",
    kind="inproceedings",
    arxiv="1710.04806",
    summary=(
        "A network that classifies by the distances of an encoding to learned cases and by nothing else. A decoder "
        "shows the cases as pictures, and two terms of the loss keep them near the data."
    ),
    method="netwright.explain.prototypes:PrototypeClassifier",
    covers=("netwright.explain.prototypes",),
    claims=(
        Claim("accuracy", "Its accuracy is at most a point below that of ordinary layers in place of prototypes."),
        Claim("decodable", "Decoded prototypes are as near to real images as claimed, and nearer than without ties."),
        Claim("classes", "The weights name the class that a prototype's neighbours have, and nearly all classes."),
        Claim("ties", "Both distances between prototypes and data are at least 2.5 times smaller than without ties."),
        Claim("decoder", "Its accuracy is at most a point below that of the network without a decoder.", gated=False),
        Claim("fashion", "On Fashion-MNIST, too, it is at most a point below ordinary layers.", gated=False),
    ),
    metric="accuracy",
    seeds=3,
    fast_seeds=1,
)

LOSSES: dict[str, dict[str, Any]] = {
    "full loss": {},
    "no ties": {"lambda_1": 0.0, "lambda_2": 0.0},
    "no decoder": {"lambda_ae": 0.0},
    "ordinary layers": {"lambda_1": 0.0, "lambda_2": 0.0},
}
MAPS = {"mnist-5000": (32, 32, 32, 10), "fashion-mnist": (32, 32, 32, 10), "digits": (32, 32, 10)}
BATCH = {"mnist-5000": 250, "fashion-mnist": 250, "digits": 50}
DIGITS_MARGIN = 4  # 8x8 becomes 16x16
RATES = (1e-3, 2e-3, 4e-3)
PROTOTYPES, NEIGHBOURS = 15, 20


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    full, loose = arms["full loss"], arms["no ties"]
    near, other = mean(full["decoding distance"]), mean(loose["decoding distance"])
    agreement, coverage = mean(full["agreement"]), mean(full["classes covered"])
    ratios = {name: mean(loose[name]) / mean(full[name]) for name in ("R1", "R2")}
    return {
        "accuracy": _within_a_point(arms, "full loss", "ordinary layers"),
        "decodable": decide(
            near <= 1.5 and near <= 0.6 * other,
            near,
            f"distance of decoded prototypes to the nearest image over that of test images: {near:.3g}, claimed <= 1.5 "
            f"and <= 0.6 of {other:.3g} without ties",
        ),
        "classes": decide(
            agreement >= 0.8 and coverage >= 9,
            agreement,
            f"weights agree with the neighbours for {100 * agreement:.0f} % of prototypes, claimed >= 80 %; "
            f"{coverage:.3g} of 10 classes have a prototype, claimed >= 9",
        ),
        "ties": decide(
            min(ratios.values()) >= 2.5,
            min(ratios.values()),
            "without ties over with them, claimed >= 2.5: " + ", ".join(f"{n} {v:.3g}" for n, v in ratios.items()),
        ),
        "decoder": _within_a_point(arms, "full loss", "no decoder"),
        "fashion": _within_a_point(arms, "Fashion-MNIST, full loss", "Fashion-MNIST, ordinary layers"),
    }


def _within_a_point(arms: Arms, ours: str, other: str) -> Verdict:
    if ours not in arms or other not in arms:
        return decide(None, reason=f"{other} was not run")
    gap = paired_difference(arms[ours]["accuracy"], arms[other]["accuracy"])
    error = f", s.e. {gap.standard_error:.2g}" if gap.count > 1 else ""
    return decide(gap.mean >= -0.01, gap.mean, f"mean difference {gap.mean:.4g}{error}, claimed >= -0.01")


def reproduce(run: Run) -> Evidence:
    """Chooses each arm's learning rate, trains every arm for every seed, then two arms on Fashion-MNIST."""
    data = "digits" if run.fast else "mnist-5000"
    images = [
        run.size("training images", full=3500, fast=1000),
        run.size("validation images", full=500, fast=200, scaled=False),
        run.size("test images", full=1000, fast=500, scaled=False),
    ]
    epochs = run.size("epochs", full=60, fast=8, specified=1500)
    arms: Arms = {}
    chosen: dict[str, list[Any]] = {}
    for arm in list(LOSSES)[: 2 if run.fast else None]:
        trials = {lr: [data, arm, lr, epochs, images, True] for lr in RATES}
        lr, tried = best(run, arm, trials, _train)
        arms |= tried
        chosen[arm] = [data, arm, lr, epochs, images, False]
    arms |= run.arms(chosen, _train)
    if not run.fast:
        clothes = [
            run.size("Fashion-MNIST training images", full=20_000, fast=1),
            0,
            run.size("Fashion-MNIST test images", full=10_000, fast=1, scaled=False),
        ]
        passes = run.size("Fashion-MNIST epochs", full=10, fast=1)
        pair = {
            f"Fashion-MNIST, {arm}": ["fashion-mnist", arm, chosen[arm][2], passes, clothes, False]
            for arm in ("full loss", "ordinary layers")
        }
        arms |= run.arms(pair, _train)
    return run.evidence(arms, judge(arms))


def _train(
    seed: int, data: str, arm: str, lr: float, epochs: int, images: Sequence[int], tuning: bool
) -> dict[str, Any]:
    from netwright.data import Batches
    from netwright.data.elastic import Elastic
    from netwright.explain import LitPrototypeClassifier, PrototypeLoss
    from netwright.metrics import accuracy
    from netwright.train import evaluate, fit

    parts = _parts(data, seed, images)
    network = _network(data, arm, seed)
    module = LitPrototypeClassifier(network, PrototypeLoss(**LOSSES[arm]), lr=lr)
    augment = Elastic() if data == "mnist-5000" else None
    last = fit(module, Batches(parts["train"], BATCH[data], seed=seed, augment=augment), epochs=epochs, seed=seed).last
    part = parts["validation" if tuning else "test"]
    share = accuracy(*evaluate(module, Batches(part, 500, shuffle=False, drop_last=False)))
    if tuning:
        return {"validation accuracy": share}
    figures = {"accuracy": share, "learning rate": lr, "cross-entropy": last["cross_entropy"]}
    if network.decoder is not None:
        figures["reconstruction"] = last["reconstruction"]
    measured = data != "fashion-mnist" and arm != "ordinary layers"
    return figures | (_measured(network, parts) if measured else {})


def _parts(data: str, seed: int, images: Sequence[int]) -> dict[str, TensorImages]:
    from torch.nn import functional

    from netwright.data import TensorImages

    train, held_out, test = images
    parts, _ = classification.parts(data, seed, train, held_out, test)
    if data != "digits":
        return parts
    return {
        name: TensorImages(functional.pad(part.images, [DIGITS_MARGIN] * 4), part.labels)
        for name, part in parts.items()
    }


def _network(data: str, arm: str, seed: int) -> PrototypeClassifier:
    """The classifier of an arm; encoder and decoder start alike in all of them."""
    from torch import nn

    from netwright.explain import PrototypeClassifier
    from netwright.explain.prototypes import conv_decoder, conv_encoder
    from netwright.seeding import seeded

    maps = MAPS[data]
    side = 16 if data == "digits" else 28
    with seeded(seed, "init"):
        encoder, decoder = conv_encoder(1, maps), conv_decoder(1, maps, side)
        network = PrototypeClassifier(
            encoder, None if arm == "no decoder" else decoder, PROTOTYPES, 10, input_shape=(1, side, side)
        )
        if arm == "ordinary layers":
            dim = network.prototypes.shape[1]
            network.prototype_layer = nn.Sequential(nn.Linear(dim, PROTOTYPES), nn.ReLU())  # type: ignore[assignment]
            network.linear = nn.Linear(PROTOTYPES, 10)
    return network


def _measured(network: PrototypeClassifier, parts: dict[str, TensorImages]) -> dict[str, float]:
    """How the prototypes lie among the training images."""
    import torch

    from netwright.data import Batches
    from netwright.data.tensors import scaled
    from netwright.explain.prototypes import squared_distances
    from netwright.nn.modes import in_mode

    train = Batches(parts["train"], 500, shuffle=False, drop_last=False)
    near = network.nearest_training(train, NEIGHBOURS)
    with torch.no_grad(), in_mode(network, training=False):
        z = torch.cat([network.encode(x) for x, _ in train])
        distances = squared_distances(z, network.prototypes)
    between = 2 * float(z.var(0).sum())  # mean squared distance of two different encodings
    figures = {
        "agreement": near.agreement,
        "classes covered": len(near.prototype_classes.unique()),
        "R1": float(distances.amin(0).mean()) / between,
        "R2": float(distances.amin(1).mean()) / between,
    }
    if near.decoded is not None:
        images, unseen = (scaled(parts[name].images).flatten(1) for name in ("train", "test"))
        decoded, usual = (squared_distances(x, images).amin(1).mean() for x in (near.decoded.flatten(1), unseen))
        figures["decoding distance"] = float(decoded / usual)
    return figures
