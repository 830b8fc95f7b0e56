"""Is an architecture that was searched under a mask a better host for heavy pruning than one searched dense?

Mousavi et al., "DASS: Differentiable Architecture Search for Sparse Neural Networks", 2023, arXiv:2207.06968.

Fashion-MNIST at 14x14, padded to 16x16. For each seed, DASS searches the space ``micro-darts`` at each density and
DARTS searches it dense, with the same epochs, optimisers and first-order steps. Each cell and, at the lowest
density, three random ones and a small MobileNet-v2 get the width at which they have nearest to 20,000 dense
parameters, and the same training: dense, HYDRA scores, fine-tuning. Each of the four families has its learning
rate chosen on the validation part from the same three values. The architecture's learning rate is ten times the
published one, since there are a hundred times fewer steps; SGD has momentum in both searches.

The speed of the published 99 % cell is measured apart and is not part of the verdict: dense forward passes on a
processor, as in the published script, and with the 1x1 convolutions as CSR matrices.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import small_images
from netwright.papers.evidence import Evidence, Verdict, compare, decide, mean, paired_difference
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from torch import Tensor, nn

CARD = Paper(
    slug="dass",
    title="DASS: Differentiable Architecture Search for Sparse Neural Networks",
    authors=("Hamid Mousavi", "Mohammad Loni", "Mina Alibeigi", "Masoud Daneshtalab"),
    year=2023,
    venue="ACM Transactions on Embedded Computing Systems 22(5s), article 105",
    kind="article",
    arxiv="2207.06968",
    doi="10.1145/3609385",
    summary=(
        "A cell found by dense search is a poor host for 95 to 99 % pruning. DASS searches inside the pruned "
        "space: every convolution and linear layer of the supernet keeps only the weights with the largest "
        "learned scores while the architecture is learned."
    ),
    method="netwright.search.dass:DASS",
    covers=("netwright.nn.sparse.layers", "netwright.nn.sparse.modules"),
    claims=(
        Claim("gain", "At 97 % sparsity networks found by DASS are more accurate than those found by DARTS."),
        Claim("interaction", "The gain over DARTS is larger at 97 % sparsity than at 50 %."),
        Claim("random", "At 97 % sparsity DASS beats the median of three random cells."),
        Claim("hand-made", "At 97 % sparsity DASS beats a MobileNet-v2 of equal size.", gated=False),
        Claim(
            "speed",
            "The dense DASS-Tiny is faster than MobileNet-v2 on a processor (published: 3.87 times).",
            gated=False,
        ),
        Claim("sparse-speed", "So it is when both run their 1x1 layers at 99 % sparsity as CSR matrices.", gated=False),
    ),
    metric="accuracy",
    seeds=5,
)

DENSITIES = (0.03, 0.1, 0.5)
LEARNING_RATES = (0.03, 0.1, 0.3)
RANDOM_CELLS = 3
PARAMETERS = 20_000
BATCH = 32
ALPHA_LR = 3e-3
SPACE = "micro-darts"
Sizes = Sequence[int]


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    low, high = DENSITIES[0], DENSITIES[-1]
    ours, theirs = (_accuracy(arms, name, low) for name in ("DASS", "DARTS"))
    draws = [_accuracy(arms, f"random {i + 1}", low) for i in range(RANDOM_CELLS)]
    medians = [statistics.median(values) for values in zip(*draws, strict=True)]
    found = {
        "gain": compare(ours, theirs),
        "interaction": decide(None, reason=f"density {high:g} was not run"),
        "random": compare(ours, medians),
        "hand-made": compare(ours, _accuracy(arms, "MobileNet-v2", low)),
    }
    if _arm("DASS", high) in arms:
        found["interaction"] = _interaction(arms, low, high)
    for key, form in (("speed", "dense"), ("sparse-speed", "CSR")):
        found[key] = _speed(arms["latency"], form)
    return found


def _interaction(arms: Arms, low: float, high: float) -> Verdict:
    gains = [
        [a - b for a, b in zip(_accuracy(arms, "DASS", k), _accuracy(arms, "DARTS", k), strict=True)]
        for k in (low, high)
    ]
    if len(gains[0]) < 2:
        return decide(None, reason="a single seed tells no sign")
    gap = paired_difference(*gains)
    reason = (
        f"claimed sign +: gain {mean(gains[0]):.4g} at density {low:g}, {mean(gains[1]):.4g} at {high:g}; 90 % "
        f"interval of the difference {gap.interval[0]:.4g} to {gap.interval[1]:.4g}"
    )
    decided = decide(gap.mean > 0, gap.mean, reason)
    return Verdict(decided.verdict, decided.statistic, gap.interval, reason)


def _speed(latency: dict[str, list[float]], form: str) -> Verdict:
    ratio, low, high = (latency[f"{form} {name}"][0] for name in ("ratio", "lower quartile", "upper quartile"))
    times = ", ".join(f"{net} {latency[f'{form} {net} ms'][0]:.2f} ms" for net in ("DASS", "MobileNet"))
    reason = (
        f"time of MobileNet-v2 / DASS-Tiny, batch 1, threads {latency['threads'][0]:g}: {times}; quartiles of rounds"
    )
    decided = decide(None if low <= 1 <= high else ratio > 1, ratio, reason)
    return Verdict(decided.verdict, ratio, (low, high), reason)


def _arm(name: str, density: float) -> str:
    return f"{name} at {100 * density:g} %"


def _accuracy(arms: Arms, name: str, density: float) -> list[float]:
    return arms[_arm(name, density)]["accuracy"]


def reproduce(run: Run) -> Evidence:
    """Searches, chooses learning rates, trains, prunes and fine-tunes every arm, and measures the speed."""
    images = [
        run.size("training images", full=1600, fast=32, specified=8000),
        run.size("search validation images", full=800, fast=32, specified=4000),
    ]
    test = run.size("test images", full=10_000, fast=250, scaled=False)
    search = [run.size(f"search {name} epochs", full=2, fast=1) for name in ("pretrain", "prune", "finetune")]
    train = [
        run.size(f"{name} epochs", full=full, fast=1) for name, full in (("pretrain", 4), ("prune", 2), ("finetune", 4))
    ]
    rounds = run.size("latency rounds", full=200, fast=3, scaled=False)
    densities = DENSITIES[:1] if run.fast else DENSITIES

    searches: dict[str, list[Any]] = {_arm("DASS", k): [k, images, search] for k in densities}
    cells = run.arms({**searches, "DARTS": [None, images, search]}, _search)
    families = _families(run, cells, densities)
    rates = {name: LEARNING_RATES[1] for name in families} if run.fast else _rates(run, families, images, train)

    arms = run.arms_by_seed(
        {
            _arm(name, k): [[genotype, k, rates[name], images, test, train] for genotype in genotypes[k]]
            for name, genotypes in families.items()
            for k in genotypes
        },
        _train,
    )
    for name, metrics in cells.items():
        arms[f"search: {name}"] = metrics
    arms["latency"] = run.arms({"latency": [rounds, 1 if run.fast else 2]}, _latency, seeds=[0])["latency"]
    return run.evidence(arms, judge(arms))


def _families(run: Run, cells: Arms, densities: Sequence[float]) -> dict[str, dict[float, list[Any]]]:
    """Family to density to one genotype a seed (None is the hand-made network)."""
    from netwright.search import spaces
    from netwright.search.random_search import uniform_genotypes

    found: dict[str, dict[float, list[Any]]] = {
        "DASS": {k: cells[_arm("DASS", k)]["genotype"] for k in densities},
        "DARTS": dict.fromkeys(densities, cells["DARTS"]["genotype"]),
        "MobileNet-v2": {densities[0]: [None] * len(run.seeds)},
    }
    draws = [uniform_genotypes(spaces.get(SPACE), RANDOM_CELLS, seed=seed) for seed in run.seeds]
    for i in range(RANDOM_CELLS):
        found[f"random {i + 1}"] = {densities[0]: [draw[i].to_dict() for draw in draws]}
    return found


def _rates(run: Run, families: dict[str, dict[float, list[Any]]], images: Sizes, train: Sizes) -> dict[str, float]:
    """The learning rate of each family, chosen on the validation part with the first seed at the lowest density."""
    tried = {
        f"{name}, lr {lr:g}": [genotypes[DENSITIES[0]][0], DENSITIES[0], lr, images, 0, train]
        for name, genotypes in families.items()
        if not name.startswith("random") or name == "random 1"
        for lr in LEARNING_RATES
    }
    found = run.arms(tried, _train, seeds=run.seeds[:1])
    best = {}
    for name in families:
        judged_by = "random 1" if name.startswith("random") else name
        scores = [found[f"{judged_by}, lr {lr:g}"]["validation accuracy"][0] for lr in LEARNING_RATES]
        best[name] = LEARNING_RATES[scores.index(max(scores))]
    return best


def _search(seed: int, density: float | None, images: Sizes, stages: Sizes) -> dict[str, Any]:
    """Searches with DASS at a density, or with DARTS."""
    from netwright.search import spaces
    from netwright.search.darts import DARTS
    from netwright.search.dass import DASS, DASSStages

    supernet = spaces.get(SPACE).supernet(in_channels=1, num_classes=10, seed=seed)
    halves = small_images.halves(seed, images, BATCH)
    searcher = (
        DARTS(supernet, epochs=sum(stages), alpha_lr=ALPHA_LR)
        if density is None
        else DASS(
            supernet,
            density,
            DASSStages(stages[0], stages[1], stages[2], weight_decay=3e-4, momentum=0.9),
            unrolled=False,
            alpha_lr=ALPHA_LR,
        )
    )
    result = searcher.search(*halves, seed=seed)
    return {
        "genotype": result.genotype.to_dict(),
        "skip share": result.genotype.skip_share,
        "convolutions": result.genotype.convolutions,
    }


def _train(
    seed: int, genotype: dict[str, Any] | None, density: float, lr: float, images: Sizes, test: int, epochs: Sizes
) -> dict[str, Any]:
    """Trains a network dense, learns its mask, fine-tunes it, and measures it (on the test part if ``test``)."""
    from netwright.compress.hydra import HydraPruner
    from netwright.data import Batches
    from netwright.metrics import accuracy
    from netwright.nn.sparse import sparsity_report
    from netwright.train import Classifier, evaluate, fit
    from netwright.train.schedules import CosineProgress

    parts, normalise = small_images.parts(seed, *images, test)
    network = _network(genotype, seed)
    parameters = sum(p.numel() for p in network.parameters())
    figures: dict[str, Any] = {}

    def measure(name: str) -> float:
        return accuracy(
            *evaluate(network, Batches(parts[name], 500, shuffle=False, drop_last=False, normalise=normalise))
        )

    def train(module: nn.Module, stage: str) -> None:
        batches = Batches(parts["train"], BATCH, seed=seed, normalise=normalise, name=stage)
        number = epochs[("pretrain", "prune", "finetune").index(stage)]
        # The scores start in HYDRA's units, whatever learning rate suits the weights.
        rate = 0.1 if stage == "prune" else lr
        fit(Classifier(module, lr=rate), batches, epochs=number, callbacks=[CosineProgress()], seed=seed)
        if stage == "pretrain":
            figures["dense validation accuracy"] = measure("validation")

    HydraPruner(1 - density).run(network, train)
    layers = sparsity_report(network).values()
    return {
        **({"accuracy": measure("test")} if test else {}),
        "validation accuracy": measure("validation"),
        **figures,
        "parameters": parameters,
        "kept": sum(layer.kept for layer in layers),
        "dead filters": sum(layer.dead_filters for layer in layers) / sum(layer.filters for layer in layers),
        "learning rate": lr,
    }


def _network(genotype: dict[str, Any] | None, seed: int) -> nn.Module:
    """The network of a genotype at the width whose dense parameters are nearest the common number."""
    import torch

    from netwright.search.genotype import Genotype
    from netwright.seeding import seeded

    if genotype is None:
        with seeded(seed, "init"):
            return _mobilenet()
    found = Genotype.from_dict(genotype)

    def distance(channels: int) -> float:
        with torch.device("meta"):
            network = found.build(1, 10, channels=channels)
        return abs(sum(p.numel() for p in network.parameters()) / PARAMETERS - 1)

    return found.build(1, 10, channels=min(range(6, 33), key=distance), seed=seed)


def _mobilenet(width: int = 13, head: int = 52) -> nn.Module:
    """MobileNet-v2's blocks with one reduction, as the cells have, for 16x16 images."""
    from torch import nn

    from netwright.nn.mbconv import MBConv

    wider = 3 * width // 2
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(),
        MBConv(width, width, expansion=1),
        MBConv(width, wider, expansion=4, stride=2),
        MBConv(wider, wider, expansion=4),
        MBConv(wider, 2 * width, expansion=4),
        MBConv(2 * width, 2 * width, expansion=4),
        nn.Conv2d(2 * width, head, 1, bias=False),
        nn.BatchNorm2d(head),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(head, 10),
    )


def _latency(seed: int, rounds: int, threads: int) -> dict[str, float]:
    """Times one image through the published 99 % network and MobileNet-v2, dense and with CSR matrices."""
    import torch

    from netwright.cost import compare_times, count
    from netwright.nn.mbconv import mobilenet_v2_32
    from netwright.nn.sparse import init_scores, sparsify, sparsity_report, to_dense
    from netwright.search.genotype import DASS_99
    from netwright.seeding import seeded, stream

    with seeded(seed, "init"):
        networks = {
            "DASS": DASS_99.build(3, 10, channels=30, cells=16),
            "MobileNet": mobilenet_v2_32(conv_shortcuts=True),
        }
    image = torch.rand(1, 3, 32, 32, generator=stream(seed, "image"))
    figures: dict[str, float] = {"threads": threads}
    calls: dict[str, dict[str, Any]] = {"dense": {}, "CSR": {}}
    for name, network in networks.items():
        masked = sparsify(network, 0.01)
        init_scores(masked, "scaled")
        pruned = to_dense(masked).eval()
        figures[f"{name} MACs"] = count(network, (3, 32, 32)).macs
        figures[f"{name} kept"] = sum(layer.kept for layer in sparsity_report(pruned).values())
        calls["dense"][name] = functools.partial(network.eval(), image)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            calls["CSR"][name] = functools.partial(_with_csr(pruned), image)
    with torch.inference_mode():
        for form, pair in calls.items():
            times = compare_times(pair, rounds=rounds, threads=threads)
            figures |= {f"{form} {name} ms": times[name].median_ms for name in pair}
            other = times["MobileNet"]
            figures |= {f"{form} ratio": other.ratio}
            figures |= {f"{form} lower quartile": other.ratio_low, f"{form} upper quartile": other.ratio_high}
    return figures


def _with_csr(network: nn.Module) -> nn.Module:
    """The network with its ungrouped 1x1 convolutions as products of a CSR matrix with one image's pixels."""
    import torch
    from torch import nn

    from netwright.nn.sparse import export_csr

    class Pointwise(nn.Module):
        def __init__(self, layer: nn.Conv2d, matrix: Tensor):
            super().__init__()
            self.matrix, self.bias, self.stride = matrix, layer.bias, layer.stride

        def forward(self, x: Tensor) -> Tensor:
            x = x[0, :, :: self.stride[0], :: self.stride[1]]
            y = torch.mm(self.matrix, x.flatten(1)).unflatten(1, x.shape[1:])
            return (y if self.bias is None else y + self.bias[:, None, None])[None]

    for name, matrix in export_csr(network).items():
        layer = network.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            network.set_submodule(name, Pointwise(layer, matrix))
    return network
