"""Do binary gates search a chain with the memory of one path, as well as a mixture of all does?

Cai, Zhu and Han, "ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware", ICLR 2019,
arXiv:1812.00332.

A chain of five layers on Fashion-MNIST at 16x16. For each seed the same supernet is searched, with equal images and
batches, through gates that look at two candidates, at all, by REINFORCE, and as a softmax mixture; gradients with one
penalty of the expected latency by a table measured on this machine, REINFORCE with the published reward, and gates of
two also without a penalty. What is found is trained from scratch beside random networks, and measured in turns by the
clock. One more search takes the table of another device: here devices are batch 1 on one thread and batch 64 on two.

Memory is counted, not measured: the bytes that autograd keeps in an architecture step, against those of the network of
the path that was drawn, and of the mixture. Latency is counted in thousandths of that of the undecided supernet, which
is also what the penalty aims from. The published rate of the alphas, 1e-3 with one step of them in five, is for 120
epochs of ImageNet; in four epochs it leaves every alpha where it was. The rate, one step in two, and the power of the
penalty were chosen on seed 1000, which is none of the evidence's: with them the gates and the mixture end equally
decided.

Published, and not tested here (CIFAR-10 at full size, ImageNet, phones and graphics cards are out of reach):

| network | data | result | latency | MobileNet-v2 |
| --- | --- | --- | --- | --- |
| Proxyless-G with cutout, 5.7 M parameters | CIFAR-10 | 2.08 % error | | |
| Proxyless, mobile | ImageNet | 74.6 % top-1, 92.2 % top-5 | 78 ms, Pixel 1 | 72.0 %, 75 ms |
| Proxyless, GPU | ImageNet | 75.1 % top-1, 92.5 % top-5 | 5.1 ms, V100, batch 8 | 72.0 %, 6.1 ms |

The mobile search took 200 GPU hours.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import chains, latencies, small_images
from netwright.papers.evidence import Evidence, Verdict, compare, decide, mean
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run

if TYPE_CHECKING:
    from netwright.search.latency import ExpectedLatency
    from netwright.search.objective import Objective
    from netwright.search.searcher import Searcher
    from netwright.search.spaces.choices import ChoiceSpace
    from netwright.search.supernet import Choice, Supernet

CARD = Paper(
    slug="proxylessnas",
    title="ProxylessNAS: Direct Neural Architecture Search on Target Task and Hardware",
    authors=("Han Cai", "Ligeng Zhu", "Song Han"),
    year=2019,
    venue="International Conference on Learning Representations",
    kind="inproceedings",
    arxiv="1812.00332",
    summary=(
        "Every choice of the supernet runs one candidate, drawn by a binary gate, so a search takes the memory of "
        "ordinary training and needs no proxy task. The gates pass gradients on to the probabilities, to which the "
        "expected latency on the device adds its own."
    ),
    method="netwright.search.proxyless:ProxylessNAS",
    covers=("netwright.search.binary_gate", "netwright.search.alternating", "netwright.search.spaces.proxyless"),
    claims=(
        Claim("memory", "An architecture step keeps at most 1.3 times the memory of one path, and half the mixture's."),
        Claim("accuracy", "What the gates find is at most 1 point less accurate than what the mixture finds."),
        Claim("latency", "The penalty makes it at least 15 % faster and at most 1.5 points less accurate."),
        Claim("table", "Expected latency foretells measured latency: correlation at least 0.9."),
        Claim("random", "It is more accurate than the median of random networks."),
        Claim("front", "It is more accurate than random networks are on average at its latency.", gated=False),
        Claim("full", "Gates that look at all candidates find a network at most 1 point more accurate.", gated=False),
        Claim("reinforce", "REINFORCE finds a network at most 1 point less accurate.", gated=False),
        Claim("devices", "A network searched for a device is faster on it than one for another.", gated=False),
    ),
    seeds=5,
)

DEVICES = {"batch 1": 1, "batch 64": 64}  # the second on two threads
MAIN = "batch 1"
TWO, FREE, FULL, REINFORCE, MIXTURE = "gates of two", "gates of two, no penalty", "gates of all", "REINFORCE", "mixture"
OTHER = "gates of two, for batch 64"
ALPHA_LR = 0.03
ARCH_EVERY = 2
BETA = 4.0
LR = 0.1
PATHS = 5
UNDECIDED = 1000.0
Sizes = Sequence[int]


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""
    two, free = arms[TWO], arms[FREE]
    path, mixture = (arms["memory"][f"gates of two / {name}, largest"][0] for name in ("one path", "mixture"))
    correlation = arms["latency tables"][f"{MAIN}: Pearson"][0]
    return {
        "memory": decide(
            path <= 1.3 and mixture <= 0.5,
            path,
            f"largest share of one path's, claimed at most 1.3; of the mixture's {mixture:.3f}, claimed at most 0.5",
        ),
        "accuracy": compare(two["accuracy"], arms[MIXTURE]["accuracy"], margin=-0.01),
        "latency": chains.cheaper(two, free),
        "table": decide(correlation >= 0.9, correlation, "correlation, claimed at least 0.9"),
        "random": compare(two["accuracy"], arms["random"]["median accuracy"]),
        "front": compare(two["accuracy"], two["accuracy of random ones"]),
        "full": compare(arms[FULL]["accuracy"], two["accuracy"], direction="less", margin=0.01),
        "reinforce": compare(arms[REINFORCE]["accuracy"], two["accuracy"], margin=-0.01),
        "devices": compare(arms["devices"]["log ratio"], 0.0, direction="less"),
    }


def space() -> ChoiceSpace:
    """The space of the experiment, known by its name afterwards."""
    from netwright.search import mbconv_space, spaces

    return spaces.register(
        mbconv_space(
            "proxylessnas-small", stem=8, width=(12, 16, 24), depth=(2, 2, 1), stride=(1, 2, 2), kernels=(3, 5),
            expansions=(2, 4), shape=chains.SHAPE[1:], bn_eps=1e-3,
        )
    )  # fmt: skip


def reproduce(run: Run) -> Evidence:
    """Measures, searches in every way, trains what was found and random networks, and measures those."""
    from netwright.search.random_search import uniform_genotypes

    images = [
        run.size("search training images", full=4000, fast=64, specified=8000),
        run.size("search validation images", full=2000, fast=32, specified=4000),
    ]
    batch = run.size("batch size", full=64, fast=16, scaled=False)
    warmup = run.size("warm-up epochs", full=2, fast=1)
    epochs = run.size("search epochs", full=4, fast=1)
    training = run.size("training epochs", full=4, fast=1)
    test = run.size("test images", full=10_000, fast=250, scaled=False)
    others = run.size("random networks a seed", full=8, fast=2, scaled=False)
    passes = run.size("passes whose memory is counted", full=50, fast=3, scaled=False)
    foretold = run.size("random networks that test the table", full=30, fast=3, scaled=False)
    devices = latencies.settings(run, DEVICES)
    tables = run.arms({"latency tables": [devices, foretold]}, _tables, seeds=[0])["latency tables"]

    def searched(kind: str, device: str = MAIN, beta: float = BETA) -> list[Any]:
        return [kind, latencies.read(tables, device).to_dict(), beta, images, [batch, warmup, epochs]]

    kinds = {kind: searched(kind) for kind in (TWO, FULL, REINFORCE, MIXTURE)}
    kinds |= {FREE: searched(TWO, beta=0.0), OTHER: searched(TWO, "batch 64")}
    found = run.arms({f"search: {kind}": arguments for kind, arguments in kinds.items()}, _search)
    drawn = {kind: [[each] for each in found[f"search: {kind}"]["genotype"]] for kind in kinds}
    drawn["random"] = [[g.to_dict() for g in uniform_genotypes(space(), others, seed=seed)] for seed in run.seeds]
    scores = run.arms_by_seed(
        {
            f"train: {kind}": [[each, images, test, [batch, training]] for each in by_seed]
            for kind, by_seed in drawn.items()
        },
        _train,
    )
    measured = [genotype for by_seed in drawn.values() for each in by_seed for genotype in each]
    ms = latencies.clocked(run, f"latencies: {MAIN}", measured, _clock, devices[MAIN])
    arms = chains.placed(drawn, {kind: scores[f"train: {kind}"] for kind in drawn}, ms)
    arms["random"]["median accuracy"] = [statistics.median(each) for each in scores["train: random"]["accuracy"]]
    own = {MAIN: found[f"search: {TWO}"]["genotype"], "batch 64": found[f"search: {OTHER}"]["genotype"]}
    arms["devices"] = latencies.specialised(run, own, _clock, devices)
    arms["memory"] = run.arms({"memory": [passes, batch]}, _memory, seeds=[0])["memory"]
    arms |= found | scores | {"latency tables": tables}
    return run.evidence(arms, judge(arms))


def _tables(seed: int, devices: Mapping[str, latencies.Settings], count: int) -> dict[str, Any]:
    return latencies.tables(space(), chains.SHAPE, devices, count)


def _clock(seed: int, genotypes: Sequence[dict[str, Any]], settings: latencies.Settings) -> dict[str, Any]:
    return latencies.clock(space(), chains.SHAPE, genotypes, settings)


def _train(seed: int, genotypes: Sequence[dict[str, Any]], *rest: Any) -> dict[str, Any]:
    space()
    return dict(chains.trained(seed, genotypes, *rest))


def _search(seed: int, kind: str, table: dict[str, Any], beta: float, images: Sizes, sizes: Sizes) -> dict[str, Any]:
    """Searches in one way; with ``beta`` 0 without a penalty."""
    from netwright.cost import LatencyTable
    from netwright.search.latency import ExpectedLatency

    batch, warmup, epochs = sizes
    supernet = space().supernet(chains.SHAPE[0], 10, seed=seed)
    times: dict[Any, float] = dict(LatencyTable.from_dict(table))
    cost = ExpectedLatency(times, unit=chains.undecided(supernet, times) / UNDECIDED)
    searcher = _searcher(supernet, kind, cost, beta, [warmup, epochs])
    result = searcher.search(*small_images.halves(seed, images, batch), seed=seed)
    certainty = [float(m.detach().max()) for m in supernet.mixing_weights().values()]
    return {
        "genotype": result.genotype.to_dict(),
        "expected latency, ms": float(supernet.expected_cost(times, chains.SHAPE, drawn=False).detach()),
        "largest probability": mean(certainty),
        "training loss": result.epochs[-1]["train_loss"],
        "skip share": result.skip_share[-1],
        "seconds": result.wall_time,
    }


def _searcher(supernet: Supernet, kind: str, cost: ExpectedLatency, beta: float, epochs: Sizes) -> Searcher:
    """The search of one arm; the steps of the weights are the same in all."""
    from netwright.search.alternating import Alternating
    from netwright.search.binary_gate import BinaryGate
    from netwright.search.objective import CostPenalty, TaskLoss
    from netwright.search.proxyless import ProxylessNAS
    from netwright.search.searcher import Searcher
    from netwright.search.stages import Stage

    warmup, searching = epochs
    objective: Objective = TaskLoss(label_smoothing=0.1)
    if beta and kind != REINFORCE:
        objective = objective + CostPenalty("mul_log", cost, beta=beta, ref=UNDECIDED)
    if kind != MIXTURE:
        return ProxylessNAS(
            supernet,
            objective,
            cost if kind == REINFORCE else None,
            "reinforce" if kind == REINFORCE else "grad",
            ARCH_EVERY,
            warmup,
            ref=UNDECIDED if kind == REINFORCE else None,
            gate=BinaryGate("full" if kind == FULL else "two"),
            epochs=searching,
            settle_epochs=0,
            lr=LR,
            warmup_lr=LR,
            samples=PATHS,
            alpha_lr=ALPHA_LR,
        )
    searcher = Searcher(
        supernet,
        objective=objective,
        method=Alternating(every=ARCH_EVERY),
        stages=[
            Stage("warmup", warmup, LR, 0.0, 4e-5, alpha_step=False),
            Stage("search", searching, LR, 0.0, 4e-5),
        ],
        clip=None,
        alpha_lr=ALPHA_LR,
        alpha_weight_decay=0.0,
    )
    for group in searcher.w_opt.param_groups:
        group["nesterov"] = True
    return searcher


def _memory(seed: int, passes: int, batch: int) -> dict[str, Any]:
    """Bytes kept in architecture passes of gates, over those of the drawn path's own network and of the mixture."""
    import torch

    from netwright.cost import saved_bytes
    from netwright.search.binary_gate import BinaryGate
    from netwright.seeding import seeded, stream

    x = torch.rand(batch, *chains.SHAPE, generator=stream(seed, "memory"))

    def kept(network: Any) -> int:
        return saved_bytes(lambda: network.train()(x))

    mixture = kept(space().supernet(chains.SHAPE[0], 10, seed=seed))
    found: dict[str, Any] = {"mixture, MB": mixture / 1e6}
    gates = {TWO: BinaryGate("two"), FULL: BinaryGate("full"), f"{FULL}, recomputed": BinaryGate("full_recompute")}
    for name, gate in gates.items():
        supernet = space().supernet(chains.SHAPE[0], 10, seed=seed, gate=gate)
        of_path, of_mixture = [], []
        for number in range(passes):
            with seeded(seed, "memory", number):
                supernet.redraw("alpha", batch)
            path = {key: choice.names[_active(choice)] for key, choice in supernet.keyed_choices().items()}
            gated = kept(supernet)
            of_path.append(gated / kept(space().build(space().genotype(path), chains.SHAPE[0], 10, seed=seed)))
            of_mixture.append(gated / mixture)
        for against, shares in (("one path", of_path), ("mixture", of_mixture)):
            found |= {f"{name} / {against}": mean(shares), f"{name} / {against}, largest": max(shares)}
    return found


def _active(choice: Choice) -> int:
    """The number of the candidate that runs in the present pass."""
    assert choice.drawn is not None
    return int(choice.drawn[0])
