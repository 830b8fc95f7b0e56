"""Do features that are learned without labels become better by a positive that is hallucinated in feature space?

Wu, Hobbs and Hovakimyan, "Hallucination Improves the Performance of Unsupervised Visual Representation Learning", ICCV
2023, arXiv:2307.12168.

Fashion-MNIST, 3,000 training images without labels; a convolutional encoder (3x3 with stride 2 to 16, 32 and 64
channels, batch norm, mean: 64 features), embeddings of width 64, temperature 0.2, batch 256, 24 epochs (twice as many
bring MoCo nothing), SGD with momentum 0.9 and one cosine; views by crops of 0.2 to 1 of the area, flip, brightness and
contrast. A linear probe on the frozen features is trained with the labels of the same images. SimCLR and MoCo v2 (2,048
keys, momentum 0.99), each with crops anywhere and near the middle, each with and without the hallucinator, so that the
two changes are told apart: the same initial weights and batches in all arms of a seed. Each host's learning rate is the
one that is best for it alone, without the hallucinator, on 1,000 held-out images with a seed of its own, which favours
the baseline. Beside them, with crops anywhere: the hallucinator with nothing extrapolated (r = 0), with interpolation
(r in (-0.1, 0)), without its network; random weights; SimSiam, once. Step times are those of MoCo on ResNet-18 at
32x32, where the encoder dominates, and of the small encoder. A fast run has 500 images and SimCLR alone. Not tested:
ImageNet, 500 epochs, transfer to detection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import classification
from netwright.papers.evidence import Evidence, Verdict, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from torch import Tensor, nn

    from netwright.train.contrastive import Host
    from netwright.train.hallucinator import Hallucinator

CARD = Paper(
    slug="hallucinator",
    title="Hallucination Improves the Performance of Unsupervised Visual Representation Learning",
    authors=("Jing Wu", "Jennifer Hobbs", "Naira Hovakimyan"),
    year=2023,
    venue="IEEE/CVF International Conference on Computer Vision",
    kind="inproceedings",
    arxiv="2307.12168",
    summary=(
        "Contrastive learning gets a third positive for each image in feature space: the query is extrapolated away "
        "from its key and smoothed by a small network that the host's own loss trains."
    ),
    method="netwright.train.hallucinator:Hallucinator",
    claims=(
        Claim("gain", "With it the linear probe is more accurate than with the same host alone, whatever the crops."),
        Claim("hosts", "The hosts alone are at least 5 points above random weights."),
        Claim("overhead", "A step with it takes at most 1.05 times as long where the encoder dominates."),
        Claim("crops", "Crops near the middle are better than crops anywhere.", gated=False),
        Claim("extrapolation", "Extrapolation is better than interpolation.", gated=False),
        Claim("ratio", "Extrapolation is better than the network alone, with nothing extrapolated.", gated=False),
        Claim("network", "The network is better than the extrapolation alone.", gated=False),
    ),
    metric="accuracy",
    seeds=4,
    fast_seeds=1,
)

HOSTS, CROPS, KINDS = ("SimCLR", "MoCo"), ("random", "center"), ("alone", "hallucinator")
RATES = (0.03, 0.1)
DIM, BATCH, KEYS = 64, 256, 2048
TOLERATED = 0.005  # of a share: half a point
CONTROLS = {"ratio": "nothing extrapolated", "extrapolation": "interpolated", "network": "no network"}


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    hosts = [host for host in HOSTS if f"{host}, random crops, alone" in arms]

    def accuracy(kind: str, crops: Sequence[str] = ("random",)) -> list[float]:
        """Of every host and seed, the mean over the crops."""
        each = [[arms[f"{host}, {crop} crops, {kind}"]["accuracy"] for crop in crops] for host in hosts]
        return [mean(values) for of_host in each for values in zip(*of_host, strict=True)]

    random = mean(arms["random weights"]["accuracy"])
    gaps = {host: mean(arms[f"{host}, random crops, alone"]["accuracy"]) - random for host in hosts}
    told = ", ".join(f"{host} {100 * gap:+.1f} points" for host, gap in gaps.items())
    ratio = mean(arms["step time"]["ratio"])
    found = {
        "gain": _gain(compare(accuracy("hallucinator", CROPS), accuracy("alone", CROPS), level=0.95)),
        "hosts": decide(min(gaps.values()) >= 0.05, min(gaps.values()), f"over random weights: {told}"),
        "overhead": decide(ratio <= 1.05, ratio, "median ratio of steps in alternating rounds, claimed <= 1.05"),
        "crops": compare(
            [mean(pair) for pair in zip(*(_of(arms, hosts, "center", k) for k in KINDS), strict=True)],
            [mean(pair) for pair in zip(*(_of(arms, hosts, "random", k) for k in KINDS), strict=True)],
            level=0.95,
        ),
    }
    for key, kind in CONTROLS.items():
        if f"{hosts[0]}, random crops, {kind}" in arms:
            found[key] = compare(accuracy("hallucinator"), accuracy(kind), level=0.95)
        else:
            found[key] = decide(None, reason="the control was not run")
    return found


def _of(arms: Arms, hosts: Sequence[str], crop: str, kind: str) -> list[float]:
    """Accuracies of all hosts and seeds."""
    return [value for host in hosts for value in arms[f"{host}, {crop} crops, {kind}"]["accuracy"]]


def _gain(verdict: Verdict) -> Verdict:
    """An interval about zero is no contradiction while it does not reach half a point below."""
    if verdict.verdict == "inconclusive" and verdict.interval is not None and verdict.interval[0] < -TOLERATED:
        reason = f"{verdict.reason}; the interval reaches below {-TOLERATED:g}"
        return dataclasses.replace(verdict, verdict="not supported", reason=reason)
    return verdict


def reproduce(run: Run) -> Evidence:
    """Tunes each host alone, trains the 2 x 2 arms and the controls, and times steps."""
    images = [
        run.size("training images", full=3000, fast=500, scaled=False),
        run.size("validation images", full=1000, fast=100, scaled=False),
        run.size("test images", full=3000, fast=500, scaled=False),
    ]
    epochs = run.size("epochs", full=24, fast=2, specified=500)
    arms: Arms = {}
    hosts = HOSTS[:1] if run.fast else HOSTS
    wanted: dict[str, list[Any]] = {"random weights": ["SimCLR", "random", "alone", RATES[0], 0, images, False]}
    for host in hosts:
        trials = {lr: [host, "random", "alone", lr, epochs, images, True] for lr in RATES}
        lr, tried = best(run, f"{host}, lr", trials, _train)
        arms |= tried
        for crop in CROPS:
            for kind in KINDS:
                wanted[f"{host}, {crop} crops, {kind}"] = [host, crop, kind, lr, epochs, images, False]
        if not run.fast:
            for kind in CONTROLS.values():
                wanted[f"{host}, random crops, {kind}"] = [host, "random", kind, lr, epochs, images, False]
    arms |= run.arms(wanted, _train)
    if not run.fast:
        once = {f"SimSiam, {kind}": ["SimSiam", "random", kind, RATES[1], epochs, images, False] for kind in KINDS}
        arms |= run.arms(once, _train, seeds=run.seeds[:1])
    batch = run.size("images in a timed step", full=32, fast=2, scaled=False)
    rounds = run.size("rounds of timing", full=7, fast=2, scaled=False)
    arms |= run.arms({"step time": [batch, rounds]}, _time, seeds=run.seeds[:1])
    return run.evidence(arms, judge(arms))


def _train(
    seed: int, host: str, crop: str, kind: str, lr: float, epochs: int, images: Sequence[int], tuning: bool
) -> dict[str, Any]:
    import torch

    from netwright.data import Batches
    from netwright.train.contrastive import alignment, fit_contrastive, knn_probe, linear_probe, policy, uniformity

    parts, normalise = classification.parts("fashion-mnist", seed, *images)
    module, last = _host(seed, host, kind, _encoder, DIM, KEYS), {}
    views = policy((1, 28, 28), "fashion-mnist", crop=crop)  # type: ignore[arg-type]
    if epochs:
        batches = Batches(parts["train"], BATCH, seed=seed, augment=views, normalise=normalise)
        last = fit_contrastive(module, batches, epochs=epochs, lr=lr, seed=seed).last

    def whole(part: str) -> Batches:
        return Batches(parts[part], 500, shuffle=False, drop_last=False, normalise=normalise)

    if tuning:
        return {"validation accuracy": linear_probe(module.backbone, whole("train"), whole("validation"), seed=seed)}
    with torch.no_grad():
        pairs = Batches(parts["test"], BATCH, seed=0, augment=views, normalise=normalise)
        first, second = (module.eval().embed(view) for view in next(iter(pairs))[0].unbind(1))
    return {
        "accuracy": linear_probe(module.backbone, whole("train"), whole("test"), seed=seed),
        "accuracy of neighbours": knn_probe(module.backbone, whole("train"), whole("test")),
        "alignment": alignment(first, second).item(),
        "uniformity": uniformity(first).item(),
        "loss": last.get("train_loss"),
        "learning rate": lr,
    }


def _host(seed: int, host: str, kind: str, encoder: Any, dim: int, keys: int) -> Host:
    """A host whose weights and queue depend on the seed alone, whatever is hallucinated in it."""
    from netwright.seeding import seeded
    from netwright.train.contrastive import MoCo, SimCLR, SimSiam

    with seeded(seed, "hallucinator"):
        extra = None if kind == "alone" else _hallucinator(kind, dim)
    with seeded(seed, "init"):
        if host == "SimCLR":
            return SimCLR(encoder, dim, 0.2, extra)
        if host == "MoCo":
            return MoCo(encoder, dim, keys, 0.99, 0.2, hallucinator=extra)
        return SimSiam(encoder, dim, dim // 4, extra)


def _hallucinator(kind: str, dim: int) -> Hallucinator:
    from torch import nn

    from netwright.train.hallucinator import Hallucinator

    class Interpolating(Hallucinator):
        def drawn_ratio(self, q: Tensor) -> Tensor:
            return -super().drawn_ratio(q)

    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, dim:]  # what was extrapolated, as it is

    if kind == "interpolated":
        return Interpolating(dim)
    found = Hallucinator(dim, ratio_max=0.0 if kind == "nothing extrapolated" else 0.1)
    if kind == "no network":
        found.smooth = nn.Sequential(Second())
    return found


def _encoder() -> nn.Module:
    from torch import nn

    layers: list[nn.Module] = []
    for width_in, width in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(width_in, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def _resnet() -> nn.Module:
    from torch import nn

    from netwright.nn.resnet import resnet18_cifar

    network = resnet18_cifar()
    network.fc = nn.Identity()
    return network


def _time(seed: int, batch: int, rounds: int) -> dict[str, float]:
    """Step times with the hallucinator over those without it."""
    return {
        "ratio": _step_ratio(seed, "MoCo", _resnet, (3, 32, 32), 128, batch, rounds),
        "ratio, small encoder, SimCLR": _step_ratio(seed, "SimCLR", _encoder, (1, 28, 28), DIM, 8 * batch, 3 * rounds),
        "ratio, small encoder, MoCo": _step_ratio(seed, "MoCo", _encoder, (1, 28, 28), DIM, 8 * batch, 3 * rounds),
    }


def _step_ratio(
    seed: int, host: str, encoder: Any, shape: tuple[int, int, int], dim: int, batch: int, rounds: int
) -> float:
    import torch

    from netwright.cost import compare_times
    from netwright.seeding import seeded, stream

    x1, x2 = torch.randn(2, batch, *shape, generator=stream(seed, "images"))

    def step(kind: str) -> Any:
        module = _host(seed, host, kind, encoder, dim, KEYS)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-3, momentum=0.9)

        def call() -> None:
            optimizer.zero_grad()
            module(x1, x2).backward()
            optimizer.step()

        return call

    with seeded(seed, "steps"):
        return compare_times({kind: step(kind) for kind in KINDS}, rounds=rounds)[KINDS[1]].ratio
