"""Does a search with one path cost what training one network does, and does it find what is fast and accurate?

Stamoulis et al., "Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours", ECML-PKDD 2019,
arXiv:1904.02877.

Space ``micro-chain`` (stem 8, stages 12, 16, 24 of two layers, kernels 3 and 5, expansions 2 and 4) on Fashion-MNIST at
16x16; latencies are those of PyTorch on this machine for 32 images on one thread (one at a time, the overhead of a call
would hide what kernels and widths cost). Times of a step are taken in alternating rounds: training the largest network,
a step of the search with its penalty and its looks at validation data, a step of the softmax over all paths with the
same penalty. Searches for three values of lambda by Single-Path NAS and by that softmax, with the same data, epochs,
optimiser and learning rate (the paper's rule, 0.016 for 256 images); of the epochs 0.625 are warm-up, as published.
Seeds that find the same network differ in its training alone. Lambda is 0, 1 and 2: the published 20 is for
networks of twenty layers whose constant part is a quarter of the latency, and here removes every layer that may go, as
5 does; 0.5 removes none. The softmax over all paths, whose weights follow the price from its first step on, ends near
the smallest network under either, so the comparison with it holds at equal lambda alone. Each architecture is trained
by the protocol of the table of random architectures. What it is held against is the mean of those random architectures
of the table whose latencies are nearest to its own. The runtime model is compared with the clock on random decisions,
whole networks measured in turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import random_table, small_images
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide, mean, spearman
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from netwright.cost.timing import Comparison

CARD = Paper(
    slug="single-path-nas",
    title="Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours",
    authors=(
        "Dimitrios Stamoulis",
        "Ruizhou Ding",
        "Di Wang",
        "Dimitrios Lymberopoulos",
        "Bodhi Priyantha",
        "Jie Liu",
        "Diana Marculescu",
    ),
    year=2019,
    venue="European Conference on Machine Learning and Principles and Practice of Knowledge Discovery in Databases",
    kind="inproceedings",
    arxiv="1904.02877",
    summary=(
        "One kernel holds all smaller ones: the 3x3 kernel is the centre of the 5x5 one, a smaller expansion its first "
        "channels. Thresholds on the norms of the parts decide what stays, learned with the weights under a penalty on "
        "the modelled runtime."
    ),
    method="netwright.search.single_path:SinglePathNAS",
    covers=(
        "netwright.search.priced",
        "netwright.search.superkernel",
        "netwright.search.superkernel_block",
        "netwright.search.superkernel_supernet",
        "netwright.search.spaces.single_path",
        "netwright.train.rmsprop",
    ),
    claims=(
        Claim("cost", "A step takes at most 1.2 of training the largest network, and 0.4 of a search over all paths."),
        Claim("parameters", "The supernet has the parameters of the largest network and three scalars a layer."),
        Claim("lambda", "In four of five seeds a larger lambda always finds a faster network."),
        Claim("accuracy", "What it finds is more accurate than random networks of the same latency."),
        Claim("runtime", "The modelled runtime of random decisions correlates with the clock, r at least 0.9."),
        Claim("paths", "It is as far above random networks as what a search over all paths finds.", gated=False),
        Claim("random", "It ranks above random architectures of any latency.", gated=False),
    ),
    metric="above random",
    seeds=5,
)

SPACE, SHAPE = "micro-chain", (1, 16, 16)
LAMBDAS = {"0": 0.0, "low": 1.0, "high": 2.0}
METHODS = ("single path", "all paths")
BATCH = 64
LR = 0.016 * BATCH / 256
IMAGES = 32  # at once, where latency is measured
NEAREST = 10  # random architectures that a finding is held against
STEPS = ("single path", "largest", "all paths")


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    times, sizes, model = arms["step times"], arms["parameters"], arms["latencies"]
    beyond = sizes["single path"][0] - sizes["largest"][0]
    wanted = 3 * sizes["layers"][0]
    series = list(zip(*(arms[f"single path, lambda {name}"]["latency, ms"] for name in LAMBDAS), strict=True))
    falls = [_falls(latencies) for latencies in series]
    r = model["Pearson"][0]
    return {
        "cost": all_of(_share(times, "largest", 1.2), _share(times, "all paths", 0.4)),
        "parameters": decide(beyond == wanted, beyond, f"more than the largest network, claimed {wanted}"),
        "lambda": decide(
            sum(falls) >= 0.8 * len(falls),
            sum(falls) / len(falls),
            f"share of seeds in which latency falls with lambda, claimed >= 0.8; median latencies "
            f"{', '.join(f'{mean(each):.3g}' for each in zip(*series, strict=True))} ms",
        ),
        "accuracy": compare(_above(arms, "single path"), 0.0),
        "runtime": decide(r >= 0.9, r, "claimed r >= 0.9"),
        "paths": compare(_above(arms, "single path"), _above(arms, "all paths")),
        "random": compare(
            [
                mean(values)
                for values in zip(*(arms[_arm("single path", n)]["percentile"] for n in _penalised()), strict=True)
            ],
            50.0,
        ),
    }


def _falls(latencies: Sequence[float]) -> bool:
    return spearman(range(len(latencies)), latencies) == -1.0


def _share(times: Mapping[str, list[Any]], other: str, most: float) -> Verdict:
    middle, low, high = (times[f"single path / {other}{part}"][0] for part in ("", ", lower", ", upper"))
    reason = f"over {other}, claimed <= {most:g}: median {middle:.3f} of {times['rounds'][0]} rounds"
    return decide(middle <= most, middle, f"{reason}, quartiles {low:.3f} to {high:.3f}")


def _arm(method: str, name: str) -> str:
    return f"{method}, lambda {name}"


def _penalised() -> tuple[str, ...]:
    """The values of lambda under which latency counts."""
    return tuple(name for name, lam in LAMBDAS.items() if lam > 0)


def _above(arms: Arms, method: str) -> list[float]:
    """By how much what was found is above random networks of its latency, averaged over the penalties, a seed."""
    return [
        mean(values)
        for values in zip(*(arms[_arm(method, name)]["above random"] for name in _penalised()), strict=True)
    ]


def reproduce(run: Run) -> Evidence:
    """Times, sizes and the runtime model once; searches for every lambda and seed."""
    rounds = run.size("step times: rounds", full=20, fast=1, scaled=False)
    batch = run.size("step times: batch size", full=BATCH, fast=8, scaled=False)
    repeats = run.size("latencies: timed calls", full=100, fast=3, scaled=False)
    calibration = run.size("networks that correct the latency table", full=30, fast=2, scaled=False)
    decisions = run.size("runtime model: random decisions", full=30, fast=6, scaled=False)
    images = [
        run.size("search training images", full=4000, fast=64, specified=8000),
        run.size("search validation images", full=1000, fast=64),
    ]
    epochs = run.size("search epochs", full=6, fast=2, specified=12)

    arms: Arms = run.arms({"step times": [rounds, batch]}, _times, seeds=[0])
    arms |= run.arms({"parameters": []}, _parameters, seeds=[0])
    arms |= run.arms({"latencies": [decisions, repeats, calibration]}, _latencies, seeds=[0])
    milliseconds = arms["latencies"]["table"][0]
    found = run.arms(
        {
            _arm(method, name): [method, lam, epochs, images, milliseconds]
            for method in METHODS
            for name, lam in LAMBDAS.items()
        },
        _search,
    )
    space = _space()
    ends = {"smallest": _uniform(space, first=True), "largest": _uniform(space, first=False)}
    protocol, table = random_table.sizes(run), random_table.tabulate(run, SPACE)
    scores = run.arms_by_seed(
        {name: [[genotype, protocol] for genotype in each["genotype"]] for name, each in found.items()}
        | {name: [[genotype, protocol]] * len(run.seeds) for name, genotype in ends.items()},
        random_table.score,
    )
    above = _Reference(milliseconds, table)
    genotypes = {name: each["genotype"] for name, each in found.items()}
    genotypes |= {name: [genotype] * len(run.seeds) for name, genotype in ends.items()}
    for name, each in scores.items():
        latencies = [above.latency(genotype) for genotype in genotypes[name]]
        accuracies = each["accuracy"]
        arms[name] = {
            "above random": [a - above(ms) for a, ms in zip(accuracies, latencies, strict=True)],
            "percentile": [table.percentile(accuracy) for accuracy in accuracies],
            "latency, ms": latencies,
            **each,
            **{key: values for key, values in found.get(name, {}).items() if key != "latency, ms"},
        }
    arms["table"] = {name: [values] for name, values in table.figures().items()} | {"latency, ms": [above.latencies]}
    return run.evidence(arms, judge(arms))


class _Reference:
    """The accuracy that random architectures of the table have at a latency."""

    def __init__(self, milliseconds: Mapping[str, Any], table: random_table.RandomTable) -> None:
        from netwright.cost import LatencyTable
        from netwright.search.latency import CONSTANT

        times = LatencyTable.from_dict(milliseconds)
        supernet = _space().supernet(1, 10)
        self._costs, self._names = supernet.candidate_costs(times, SHAPE), _space().choices()
        self._constant = times[CONSTANT]
        self.latencies = [self.latency(genotype) for genotype in table.genotypes]
        self.accuracies = table.accuracies

    def latency(self, genotype: Mapping[str, Any]) -> float:
        """Milliseconds of an architecture by the table of latencies."""
        decisions = genotype["decisions"].items()
        return self._constant + sum(self._costs[key][self._names[key].index(name)] for key, name in decisions)

    def __call__(self, latency: float) -> float:
        """Mean accuracy of the random architectures nearest to a latency."""
        order = sorted(range(len(self.latencies)), key=lambda i: abs(self.latencies[i] - latency))
        return mean([self.accuracies[i] for i in order[:NEAREST]])


def _space() -> Any:
    from netwright.search import spaces

    return spaces.get(SPACE)


def _uniform(space: Any, *, first: bool) -> dict[str, Any]:
    """The architecture of the least (what can go is gone) or of the most of everything."""
    chosen = {}
    for key, names in space.choices().items():
        blocks = sorted(name for name in names if name != "skip")
        chosen[key] = blocks[-1] if not first else "skip" if "skip" in names else blocks[0]
    genotype: dict[str, Any] = space.genotype(chosen).to_dict()
    return genotype


def _parameters(seed: int) -> dict[str, Any]:
    from netwright.search.genotype import Genotype
    from netwright.search.superkernel_supernet import SuperKernelSupernet

    def size(network: Any) -> int:
        return sum(p.numel() for p in network.parameters())

    space = _space()
    largest = Genotype.from_dict(_uniform(space, first=False)).build(1, 10, seed=0)
    return {
        "single path": size(SuperKernelSupernet(space, 1, 10)),
        "all paths": size(space.supernet(1, 10)),
        "largest": size(largest),
        "layers": len(space.choices()),
    }


def _latencies(seed: int, decisions: int, repeats: int, calibration: int) -> dict[str, Any]:
    """The table of latencies, and for random decisions the modelled and the measured runtime."""
    import torch

    from netwright.metrics import pearson
    from netwright.search.latency import ExpectedLatency, Setup, measure, measured_all, predict
    from netwright.search.random_search import uniform_genotypes
    from netwright.search.superkernel_supernet import SuperKernelSupernet

    space, setup = _space(), Setup(batch=IMAGES, repeats=repeats, calibration=calibration)
    table = measure(space, SHAPE, setup=setup)
    drawn = uniform_genotypes(space, decisions, seed=1)
    supernet = SuperKernelSupernet(space, 1, 10).eval()
    model = ExpectedLatency(table)
    modelled = []
    with torch.no_grad():
        supernet(torch.zeros(1, *SHAPE))
        for genotype in drawn:
            supernet.adopt(genotype)
            modelled.append(float(model(supernet)))
    measured = measured_all(space, drawn, SHAPE, setup=setup)
    return {
        "Pearson": pearson(modelled, measured),
        "modelled, ms": modelled,
        "by the table, ms": [predict(space, genotype, table, SHAPE) for genotype in drawn],
        "measured, ms": measured,
        "table": table.to_dict(),
    }


def step_times(rounds: int, batch: int) -> Comparison:
    """Times of a step by each method in alternating rounds on one thread, all with the same optimiser."""
    import torch

    from netwright.cost import compare_times
    from netwright.search.genotype import Genotype
    from netwright.search.objective import TaskLoss
    from netwright.search.single_level import SingleLevel
    from netwright.seeding import stream
    from netwright.train.rmsprop import RMSpropTF

    draws = stream(0, "step times")
    train, val = (
        (torch.rand(batch, *SHAPE, generator=draws), torch.randint(10, (batch,), generator=draws)) for _ in range(2)
    )
    largest: Any = Genotype.from_dict(_uniform(_space(), first=False)).build(1, 10, seed=0)
    largest = largest.to(memory_format=torch.channels_last).train()
    optimizer, loss = RMSpropTF(largest.parameters(), lr=LR, weight_decay=1e-5), TaskLoss(0.1)
    x = train[0].clone(memory_format=torch.channels_last), train[1]
    table = dict.fromkeys(_space().supernet(1, 10).operations(SHAPE), 0.1) | {"constant": 0.1}
    steps: dict[str, Callable[[], Any]] = {}
    for method in METHODS:
        searcher = _searcher(method, 0, LAMBDAS["low"], 1, table)
        searcher.prepare(seed=0, steps_per_epoch=1_000_000)
        steps[method] = functools.partial(searcher.step, train, val)
    steps["largest"] = lambda: SingleLevel().step(largest, loss, optimizer, None, x, None, clip=None)
    return compare_times({name: steps[name] for name in STEPS}, rounds=rounds, threads=1)


def _times(seed: int, rounds: int, batch: int) -> dict[str, Any]:
    times = step_times(rounds, batch)
    found: dict[str, Any] = {f"{each.name}, ms": each.median_ms for each in times.timings}
    for other in STEPS[1:]:
        timing, name = times[other], f"{STEPS[0]} / {other}"
        found |= {
            name: 1 / timing.ratio,
            f"{name}, lower": 1 / timing.ratio_high,
            f"{name}, upper": 1 / timing.ratio_low,
        }
    return found | {"rounds": times.rounds, "cpu": times.cpu}


def _searcher(method: str, seed: int, lam: float, epochs: int, table: Mapping[Any, float]) -> Any:
    """A search by one of the methods; both have the same optimiser, learning rate and warm-up."""
    from netwright.search.priced import PricedSearch
    from netwright.search.single_path import SinglePathNAS
    from netwright.search.superkernel_supernet import SuperKernelSupernet

    space = _space()
    options: dict[str, Any] = {"lam": lam, "epochs": epochs, "lr": LR, "ema": None}
    if method == "single path":
        return SinglePathNAS(SuperKernelSupernet(space, 1, 10, seed=seed), table, **options)
    return PricedSearch(space.supernet(1, 10, seed=seed), table, **options)


def _search(
    seed: int, method: str, lam: float, epochs: int, images: Sequence[int], table: Mapping[str, Any]
) -> dict[str, Any]:
    """A search by one of the methods."""
    from netwright.cost import LatencyTable

    train, validation = small_images.halves(seed, images, BATCH)
    searcher = _searcher(method, seed, lam, epochs, LatencyTable.from_dict(table))
    result = searcher.search(train, validation, seed=seed)
    return {
        "genotype": result.genotype.to_dict(),
        "seconds": result.wall_time,
        "left out": result.skip_share[-1],
        "training loss": result.epochs[-1]["train_loss"],
        "gap": result.epochs[-1].get("gap"),
    }
