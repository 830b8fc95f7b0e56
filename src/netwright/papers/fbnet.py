"""Does a distribution over blocks, learned under a table of measured latencies, find networks that are fast and good?

Wu et al., "FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search", CVPR 2019,
arXiv:1812.03443.

A chain of six layers, each with one of FBNet's blocks, on Fashion-MNIST at 16x16. Latencies are tabulated on this
machine, and 30 random networks measured by the clock say what the table is worth. For each seed the search runs with
the latency term, without it, and with a table of multiply-adds in the place of latencies; the most probable
architecture and three drawn ones are trained, and the best on validation images is the result. Random networks of the
same range of multiply-adds give the accuracy that is to be had at a latency. All are measured in turns in the end. Two
more searches take the tables of two other devices, which here are batch 1 on one thread and batch 64 on two.

Latency is counted in thousandths of that of the undecided supernet, so that the term is as strong with every table, and
its factor is such that the loss of the undecided supernet is the cross-entropy: alpha of the paper scales all losses,
and so the steps of the weights. In six epochs instead of eighty the temperature falls as far as in the paper.

Published for ImageNet, and not tested here (phones, ImageNet and the cost of the search beside MnasNet's are out of
reach):

| network | top-1 accuracy | multiply-adds | parameters | latency, Samsung S8 |
| --- | --- | --- | --- | --- |
| FBNet-A | 73.0 % | 249 M | 4.3 M | 19.8 ms |
| FBNet-B | 74.1 % | 295 M | 4.5 M | 23.1 ms |
| FBNet-C | 74.9 % | 375 M | 5.5 M | 28.1 ms |

A search took 216 GPU hours. What was searched for an iPhone X is 1.4 times as fast there as what was searched for the
S8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import chains, latencies, small_images
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from netwright.search.spaces.choices import ChoiceSpace

CARD = Paper(
    slug="fbnet",
    title="FBNet: Hardware-Aware Efficient ConvNet Design via Differentiable Neural Architecture Search",
    authors=(
        "Bichen Wu",
        "Xiaoliang Dai",
        "Peizhao Zhang",
        "Yanghan Wang",
        "Fei Sun",
        "Yiming Wu",
        "Yuandong Tian",
        "Peter Vajda",
        "Yangqing Jia",
        "Kurt Keutzer",
    ),
    year=2019,
    venue="IEEE/CVF Conference on Computer Vision and Pattern Recognition",
    kind="inproceedings",
    arxiv="1812.03443",
    summary=(
        "The block of every layer is a random variable, relaxed by Gumbel-softmax. Weights and probabilities are "
        "trained in turns, on cross-entropy times a power of the expected latency, which is a sum of table look-ups. "
        "Networks are drawn from the probabilities in the end."
    ),
    method="netwright.search.fbnet:FBNet",
    covers=("netwright.search.phased", "netwright.search.sampling", "netwright.search.spaces.fbnet"),
    claims=(
        Claim(
            "table",
            "The table foretells measured latencies: correlation at least 0.95 and, one constant added, a median error "
            "of at most 15 %.",
        ),
        Claim("accuracy", "What it finds is more accurate than random networks are on average at that latency."),
        Claim("latency", "The latency term makes it at least 15 % faster and at most 1.5 points less accurate."),
        Claim("converges", "Expected latency and entropy of the distribution fall in the search."),
        Claim("probable", "The most probable architecture alone is above random networks too.", gated=False),
        Claim("draws", "It is further above them than the best of as many random ones.", gated=False),
        Claim("proxy", "It is faster than what a table of multiply-adds finds.", gated=False),
        Claim("devices", "A network searched for a device is faster on it than one for another.", gated=False),
    ),
    seeds=5,
)

MAIN = "batch 32"
DEVICES = {MAIN: 32, "batch 1": 1, "batch 64": 64}  # the first and the last on two threads
OURS, PLAIN, PROXY = "FBNet", "no latency term", "multiply-adds"
PROBABLE, BEST_RANDOM = "FBNet, most probable", "random, best"
OTHERS = {f"for {device}": device for device in DEVICES if device != MAIN}
BETA = 2.0
ALPHA_LR = 0.05
LR = 0.1
UNDECIDED = 1000.0
Sizes = Sequence[int]


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    ours, plain, proxy = (arms[name] for name in (OURS, PLAIN, PROXY))
    found = arms["latency tables"]
    correlation, error = (found[f"{MAIN}: {name}"][0] for name in ("Pearson", "median relative error"))
    return {
        "table": decide(
            correlation >= 0.95 and error <= 0.15,
            correlation,
            f"correlation, claimed at least 0.95; median error {error:.1%}, claimed at most 15 %",
        ),
        "accuracy": compare(ours["accuracy"], ours["accuracy of random ones"]),
        "latency": chains.cheaper(ours, plain),
        "converges": all_of(*(_falls(arms[f"search: {OURS}"], name) for name in ("expected latency, ms", "entropy"))),
        "probable": compare(arms[PROBABLE]["accuracy"], arms[PROBABLE]["accuracy of random ones"]),
        "draws": compare(_above(ours), _above(arms[BEST_RANDOM])),
        "proxy": compare(ours["latency, ms"], proxy["latency, ms"], direction="less"),
        "devices": compare(arms["devices"]["log ratio"], 0.0, direction="less"),
    }


def _falls(search: Mapping[str, Sequence[float]], name: str) -> Verdict:
    return compare(search[f"{name}, end"], search[f"{name}, start"], direction="less")


def _above(arm: Mapping[str, Sequence[float]]) -> list[float]:
    return [a - b for a, b in zip(arm["accuracy"], arm["accuracy of random ones"], strict=True)]


def space() -> ChoiceSpace:
    """The space of the experiment, known by its name afterwards."""
    from netwright.search import fbnet_space, spaces
    from netwright.search.spaces.chain import Stage

    stages = Stage(12, 2, 1), Stage(16, 2, 2), Stage(24, 2, 2)
    blocks = "k3_e1", "k3_e3", "k5_e1", "k5_e3"
    return spaces.register(
        fbnet_space(stages, blocks, name="fbnet-small", stem=8, stem_stride=1, head=None, shape=chains.SHAPE[1:])
    )


def reproduce(run: Run) -> Evidence:
    """Measures, searches in every way, trains what was found and random networks, and measures those."""
    from netwright.seeding import stream

    images = [
        run.size("search training images", full=2400, fast=64, specified=6400),
        run.size("search validation images", full=600, fast=32, specified=1600),
    ]
    batch = run.size("batch size", full=64, fast=16, scaled=False)
    warmup = run.size("warm-up epochs", full=6, fast=1)
    epochs = run.size("search epochs", full=6, fast=1)
    samples = run.size("architectures drawn", full=3, fast=1, scaled=False)
    training = run.size("training epochs", full=4, fast=1)
    test = run.size("test images", full=10_000, fast=250, scaled=False)
    others = run.size("random networks a seed", full=8, fast=2, scaled=False)
    foretold = run.size("random networks that test the table", full=30, fast=3, scaled=False)
    devices = latencies.settings(run, DEVICES)
    tables = run.arms({"latency tables": [devices, foretold]}, _tables, seeds=[0])["latency tables"]

    def searched(device: str, beta: float = BETA, proxy: bool = False) -> list[Any]:
        table = latencies.read(tables, device).to_dict()
        return [table, beta, proxy, images, [batch, warmup, epochs, samples]]

    kinds = {OURS: searched(MAIN), PLAIN: searched(MAIN, beta=0.0), PROXY: searched(MAIN, proxy=True)}
    kinds |= {name: searched(device) for name, device in OTHERS.items()}
    found = run.arms({f"search: {kind}": arguments for kind, arguments in kinds.items()}, _search)

    drawn = {kind: found[f"search: {kind}"]["genotypes"] for kind in (OURS, PLAIN, PROXY)}
    within = chains.macs_range(space(), [genotype for each in drawn.values() for one in each for genotype in one])
    drawn["random"] = [
        chains.random_within(space(), *within, others, stream(seed, "fbnet", "random")) for seed in run.seeds
    ]
    scores = run.arms_by_seed(
        {
            f"train: {kind}": [[each, images, test, [batch, training]] for each in by_seed]
            for kind, by_seed in drawn.items()
        },
        _train,
    )
    measured = [genotype for by_seed in drawn.values() for each in by_seed for genotype in each]
    ms = latencies.clocked(run, f"latencies: {MAIN}", measured, _clock, devices[MAIN])
    trained = {kind: scores[f"train: {kind}"] for kind in drawn}
    drawn |= {
        PROBABLE: [each[:1] for each in drawn[OURS]],
        BEST_RANDOM: [each[: samples + 1] for each in drawn["random"]],
    }
    trained |= {PROBABLE: trained[OURS], BEST_RANDOM: trained["random"]}
    arms = chains.placed(drawn, trained, ms)
    own = {device: [each[0] for each in found[f"search: {name}"]["genotypes"]] for name, device in OTHERS.items()}
    arms["devices"] = latencies.specialised(run, own, _clock, devices)
    arms |= found | scores | {"latency tables": tables}
    return run.evidence(arms, judge(arms))


def _tables(seed: int, devices: Mapping[str, latencies.Settings], count: int) -> dict[str, Any]:
    return latencies.tables(space(), chains.SHAPE, devices, count)


def _clock(seed: int, genotypes: Sequence[dict[str, Any]], settings: latencies.Settings) -> dict[str, Any]:
    return latencies.clock(space(), chains.SHAPE, genotypes, settings)


def _search(seed: int, table: dict[str, Any], beta: float, proxy: bool, images: Sizes, sizes: Sizes) -> dict[str, Any]:
    """Searches; the most probable architecture comes first, then those drawn.

    Args:
        seed: Of everything.
        table: A latency table's plain values.
        beta: Power of the latency term.
        proxy: Whether to put multiply-adds in the place of latencies, which keep their sum over the undecided supernet.
        images: For the weights and for the distribution.
        sizes: Images in a batch, epochs of warm-up, epochs of search, architectures to draw.
    """
    from netwright.cost import LatencyTable
    from netwright.search.fbnet import FBNet, TemperatureSchedule
    from netwright.search.latency import CONSTANT
    from netwright.search.pricing import operation_macs
    from netwright.search.sampling import sample_genotypes
    from netwright.search.selection import ArgmaxSelector
    from netwright.seeding import stream

    batch, warmup, epochs, samples = sizes
    supernet = space().supernet(chains.SHAPE[0], 10, seed=seed)
    prices: dict[Any, float] = dict(LatencyTable.from_dict(table))

    whole = chains.undecided(supernet, prices)
    if proxy:
        macs = operation_macs(supernet, chains.SHAPE)
        scale = (whole - prices[CONSTANT]) / chains.undecided(supernet, macs)
        prices = {key: scale * value for key, value in macs.items()} | {CONSTANT: prices[CONSTANT]}
    searcher = FBNet(
        supernet,
        prices,
        alpha=math.log(UNDECIDED) ** -beta,
        beta=beta,
        unit=whole / UNDECIDED,
        warmup_epochs=warmup,
        epochs=warmup + epochs,
        temperature=TemperatureSchedule.within(epochs),
        lr=LR,
        alpha_lr=ALPHA_LR,
        selector=ArgmaxSelector(),
    )
    result = searcher.search(*small_images.halves(seed, images, batch), seed=seed)
    before, after = result.epochs[warmup - 1], result.epochs[-1]
    chosen = [result.genotype, *sample_genotypes(supernet, samples, generator=stream(seed, "fbnet", "samples"))]
    return {
        "genotypes": [genotype.to_dict() for genotype in chosen],
        "expected latency, ms, start": before["expected_latency"],
        "expected latency, ms, end": after["expected_latency"],
        "entropy, start": before["entropy"],
        "entropy, end": after["entropy"],
        "validation loss": after["val_loss"],
        "skip share": result.skip_share[-1],
        "seconds": result.wall_time,
    }


def _train(seed: int, genotypes: Sequence[dict[str, Any]], *rest: Any) -> dict[str, Any]:
    space()
    return dict(chains.trained(seed, genotypes, *rest))
