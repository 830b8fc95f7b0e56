"""Does taking an operation away tell its worth better than the size of its mixing weight?

Wang et al., "Rethinking Architecture Selection in Differentiable NAS", 2021, arXiv:2108.04392.

Fashion-MNIST at 14x14, padded to 16x16. For each seed a supernet of space S2 ({skip, 3x3}), one of S4 ({noise, 3x3})
and one of S2 whose alphas are never trained are searched by first-order DARTS, each with the same epochs. From the same
supernet a genotype is derived by the magnitude of alpha and by perturbation, and random ones are drawn: any, and with
as many convolutions as perturbation chose, since more convolutions are more parameters. All are trained alike.

What an operation is worth is measured on six edges of the S2 supernet: the edge is fixed to it, the supernet tuned for
one epoch, and the validation accuracy read. The architecture's learning rate is ten times the published one, since
there are a hundred times fewer steps; in the tuning of perturbation its optimiser goes on as the search left it.

Published, of which nothing is tested here (the full space on CIFAR-10 and the tables of NAS-Bench-201 are out of
reach):

| CIFAR-10 | by magnitude | by perturbation |
| --- | --- | --- |
| NAS-Bench-201, DARTS, test accuracy | 54.30 % | 88.11 % |
| DARTS space, DARTS, test error | 3.00 ± 0.14 % | 2.61 ± 0.08 % |
| DARTS space, SDARTS-RS, test error | 2.67 ± 0.03 % | 2.54 ± 0.10 % |
| DARTS space, SGAS, test error | 2.66 ± 0.24 % | 2.56 ± 0.10 % |
| S1, S2, S3, S4, DARTS, test error | 3.84, 4.85, 3.34, 7.20 % | 3.50, 2.79, 2.49, 2.64 % |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import small_images
from netwright.papers.evidence import Evidence, Verdict, compare, decide, mean, spearman
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.supernet import Supernet

CARD = Paper(
    slug="darts-pt",
    title="Rethinking Architecture Selection in Differentiable NAS",
    authors=("Ruochen Wang", "Minhao Cheng", "Xiangning Chen", "Xiaocheng Tang", "Cho-Jui Hsieh"),
    year=2021,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="2108.04392",
    summary=(
        "The mixing weight of an operation says little about what the operation is worth: with better convolutions the "
        "best weight of a skip connection grows. What an operation is worth is how much accuracy the trained supernet "
        "loses when it is taken away; operations and edges are chosen by that, one after the other."
    ),
    method="netwright.search.perturbation:PerturbationSelector",
    claims=(
        Claim(
            "agreement",
            "Taking operations away finds the best operation of an edge at least 15 points more often than alpha does.",
        ),
        Claim("accuracy", "In S2 the architecture chosen by perturbation is more accurate than the one by alpha."),
        Claim("noise", "In S4 perturbation chooses no noise on at least 90 % of the edges."),
        Claim("skips", "In S2 alpha chooses at least as many skip connections as perturbation does."),
        Claim("accuracy-s4", "In S4 the architecture chosen by perturbation is more accurate.", gated=False),
        Claim("fixed", "So it is in S2 when alphas were never trained.", gated=False),
        Claim("equal", "It is more accurate than a random one with as many convolutions.", gated=False),
    ),
    metric="accuracy",
    seeds=5,
)

EDGES = 6
MARGIN = 0.15
ALPHA_LR = 3e-3
LR = 0.1
Sizes = Sequence[int]


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""

    def accuracy(name: str) -> list[float]:
        return arms[name]["accuracy"]

    free = mean(arms["S4 perturbation"]["convolution share"])
    shares = [arms[f"S2 {name}"]["skip share"] for name in ("magnitude", "perturbation")]
    gap = mean(shares[0]) - mean(shares[1])
    return {
        "agreement": _agreement(arms["search: S2"]),
        "accuracy": compare(accuracy("S2 perturbation"), accuracy("S2 magnitude")),
        "noise": decide(free >= 0.9, free, "share of edges without noise, claimed at least 0.9"),
        "skips": decide(gap >= 0, gap, f"mean skip share {mean(shares[0]):.3f} against {mean(shares[1]):.3f}"),
        "accuracy-s4": compare(accuracy("S4 perturbation"), accuracy("S4 magnitude")),
        "fixed": compare(accuracy("S2 perturbation, alpha fixed"), accuracy("S2 magnitude")),
        "equal": compare(accuracy("S2 perturbation"), accuracy("S2 random, as many convolutions")),
    }


def _agreement(edges: dict[str, list[Any]]) -> Verdict:
    """Whether removals agree with the truth on the better operation of an edge more often than alpha does."""
    if "truth, edge 1" not in edges:
        return decide(None, reason="what operations are worth was not measured")
    alpha, perturbation, truth = (_pooled(edges, name) for name in ("alpha", "perturbation", "truth"))
    found = compare(
        [float((ours > 0) == (true > 0)) for ours, true in zip(perturbation, truth, strict=True)],
        [float((theirs > 0) == (true > 0)) for theirs, true in zip(alpha, truth, strict=True)],
        margin=MARGIN,
    )
    ranks = ", ".join(
        f"{name} {spearman(values, truth):.2f}" for name, values in (("perturbation", perturbation), ("alpha", alpha))
    )
    reason = f"{found.reason} edges; rank correlation with the truth: {ranks}"
    return Verdict(found.verdict, found.statistic, found.interval, reason)


def _pooled(edges: dict[str, list[Any]], name: str) -> list[float]:
    """The advantage of the convolution over the skip connection on every measured edge of every seed."""
    return [value for number in range(EDGES) for value in edges[f"{name}, edge {number + 1}"]]


def reproduce(run: Run) -> Evidence:
    """Searches, selects in every way, and trains what was selected."""
    images = [
        run.size("search training images", full=2000, fast=16, specified=4000),
        run.size("search validation images", full=2000, fast=16, specified=4000),
    ]
    batch = run.size("batch size", full=64, fast=16, scaled=False)
    epochs = run.size("search epochs", full=6, fast=1)
    tune = run.size("tuning epochs between decisions", full=1, fast=1, scaled=False)
    judged_by = run.size("validation batches that judge a removal", full=8, fast=1, scaled=False)
    test = run.size("test images", full=10_000, fast=250, scaled=False)
    training = run.size("training epochs", full=5, fast=1)

    def searched(space: str, alphas: bool, truth: bool) -> list[Any]:
        return [f"micro-darts-{space}", alphas, truth and not run.fast, images, [batch, epochs, tune, judged_by]]

    found = run.arms(
        {
            "S2": searched("s2", True, True),
            "S4": searched("s4", True, False),
            "S2, alpha fixed": searched("s2", False, False),
        },
        _search,
    )
    genotypes = {
        "S2 magnitude": found["S2"]["magnitude"],
        "S2 perturbation": found["S2"]["perturbation"],
        "S2 random": found["S2"]["random"],
        "S2 random, as many convolutions": found["S2"]["random alike"],
        "S2 perturbation, alpha fixed": found["S2, alpha fixed"]["perturbation"],
        "S4 magnitude": found["S4"]["magnitude"],
        "S4 perturbation": found["S4"]["perturbation"],
        "S4 random": found["S4"]["random"],
    }
    arms = run.arms_by_seed(
        {name: [[genotype, images, test, [batch, training]] for genotype in each] for name, each in genotypes.items()},
        _train,
    )
    for name, metrics in found.items():
        arms[f"search: {name}"] = metrics
    return run.evidence(arms, judge(arms))


def _search(seed: int, space: str, alphas: bool, truth: bool, images: Sizes, sizes: Sizes) -> dict[str, Any]:
    """Trains a supernet and selects from it by every rule; with ``truth`` also measures what operations are worth."""
    from netwright.data import Batches
    from netwright.search import spaces
    from netwright.search.darts import DARTS
    from netwright.search.perturbation import PerturbationSelector
    from netwright.search.selection import MagnitudeSelector
    from netwright.seeding import stream

    batch, epochs, tune, judged_by = sizes
    data, normalise = small_images.parts(seed, *images, 0)
    train, validation = small_images.halves(seed, images, batch)
    judge_on = Batches(data["validation"], batch, shuffle=False, normalise=normalise)
    supernet = spaces.get(space).supernet(in_channels=1, num_classes=10, seed=seed)
    searcher = DARTS(supernet, epochs=epochs, fixed_alpha=not alphas, alpha_lr=ALPHA_LR)
    searcher.search(train, validation, seed=seed)
    selector = PerturbationSelector(tune_epochs=tune, max_val_batches=judged_by)
    chosen = selector.select_after(searcher, train, judge_on)
    draws = stream(seed, "darts-pt", "random")
    figures: dict[str, Any] = {
        "magnitude": MagnitudeSelector().select(supernet).to_dict(),
        "perturbation": chosen.to_dict(),
        "random": supernet.space.random(draws).to_dict(),
        "random alike": _alike(supernet, chosen, draws).to_dict(),
    }
    return figures | (_worth(supernet, train, judge_on, tune, judged_by, seed) if truth else {})


def _alike(supernet: Supernet, chosen: Genotype, draws: Any) -> Genotype:
    """A random genotype with as many convolutions as the chosen one."""
    while True:
        drawn: Genotype = supernet.space.random(draws)
        if drawn.convolutions == chosen.convolutions:
            return drawn


def _worth(supernet: Supernet, train: Any, validation: Any, tune: int, judged_by: int, seed: int) -> dict[str, float]:
    """On some edges, the convolution's advantage over the skip connection: by alpha, by removal, and in truth."""
    import copy

    import torch

    from netwright.search.perturbation import LR as SEARCH_LR
    from netwright.search.searcher import Searcher
    from netwright.search.stages import Stage
    from netwright.search.strengths import op_strengths, supernet_accuracy
    from netwright.search.supernet import FixedGate
    from netwright.seeding import stream

    keys = list(supernet.arch)
    picked = torch.randperm(len(keys), generator=stream(seed, "darts-pt", "edges"))[:EDGES].tolist()
    figures = {}
    for number, key in enumerate((keys[place] for place in picked), start=1):
        names = supernet.keyed_choices()[key].names
        skip, convolution = names.index("skip_connect"), names.index("sep_conv_3x3")
        strengths = op_strengths(supernet, validation, key, max_val_batches=judged_by)
        alpha = supernet.arch[key].detach()
        accuracies = {}
        for index in (skip, convolution):
            tuned = copy.deepcopy(supernet)
            tuned.set_gate(FixedGate(index, len(names)), key)
            stage = Stage("tune", tune, SEARCH_LR / 10, 0.001)
            Searcher(tuned, stages=[stage], alpha_lr=ALPHA_LR).search(train, validation, seed=seed)
            accuracies[index] = supernet_accuracy(tuned, validation)
        figures[f"alpha, edge {number}"] = float(alpha[convolution] - alpha[skip])
        figures[f"perturbation, edge {number}"] = float(strengths[convolution] - strengths[skip])
        figures[f"truth, edge {number}"] = accuracies[convolution] - accuracies[skip]
    return figures


def _train(seed: int, genotype: dict[str, Any], images: Sizes, test: int, sizes: Sizes) -> dict[str, float]:
    """Trains the network of a genotype on both halves of the search's data and measures it on the test part."""
    import torch

    from netwright.data import TensorImages
    from netwright.search.genotype import Genotype

    batch, epochs = sizes
    data, normalise = small_images.parts(seed, *images, test)
    halves = data["train"], data["validation"]
    both = TensorImages(torch.cat([h.images for h in halves]), torch.cat([h.labels for h in halves]))
    found = Genotype.from_dict(genotype)
    network = found.build(1, 10, seed=seed)
    accuracy = small_images.trained_accuracy(
        network, both, data["test"], normalise, batch=batch, epochs=epochs, lr=LR, seed=seed
    )
    return {
        "accuracy": accuracy,
        "parameters": sum(p.numel() for p in network.parameters()),
        "skip share": found.skip_share,
        "convolution share": found.convolutions / len(found.operations),
    }
