"""Do two sets of weights, tied by a penalty, serve an architecture search as well as second derivatives, for less?

Xue, Qi and Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", IEEE Access 2022,
arXiv:2008.03901, doi:10.1109/ACCESS.2022.3185095.

Four parts. The solvable model of three scalars, where every limit is known in closed form. The time of a step, against
both orders of DARTS in alternating rounds. Searches on the space ``micro-darts-2-shared`` on Fashion-MNIST at 16x16,
with equal data, epochs and recipe: DARTS of both orders, RARTS, single-level training on the same batches (what RARTS
is without the splitting), second-order DARTS cut to the passes that RARTS needs, and random draws; each architecture
is trained by the protocol of the table of random architectures and ranked in it. Widths: RARTS on a gate for each
channel against network slimming (Liu et al., 2017, arXiv:1708.06519) on MNIST, pruned to equal multiply-adds and
fine-tuned.

``beta``, and the strength of both penalties on widths, are chosen on validation images with a seed of their own. The
rates are those of all short searches here, four times the published one for the weights and ten times for the
architecture, since there are a hundred times fewer steps, and in every search the architecture waits for the first
half: operations without weights have nothing to learn and lead at first, so that searches as short as these otherwise
end in poolings nearly everywhere, whatever the method.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers import random_table, small_images
from netwright.papers.evidence import Evidence, Verdict, all_of, compare, decide
from netwright.papers.index import Claim, Paper
from netwright.papers.run import Arms, Run
from netwright.papers.tuning import best

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

    from netwright.cost.timing import Comparison

CARD = Paper(
    slug="rarts",
    title="RARTS: An Efficient First-Order Relaxed Architecture Search Method",
    authors=("Fanghui Xue", "Yingyong Qi", "Jack Xin"),
    year=2022,
    venue="IEEE Access",
    kind="article",
    arxiv="2008.03901",
    doi="10.1109/ACCESS.2022.3185095",
    summary=(
        "A second set of weights is fitted to the validation half of the data and tied to the first by a penalty. The "
        "architecture descends on both losses, so it learns from all data, and no second derivative is needed."
    ),
    method="netwright.search.rarts:RARTS",
    covers=("netwright.search.relaxed_split", "netwright.search.width", "netwright.search.single_level"),
    claims=(
        Claim("model", "On the solvable model RARTS ends near the true solution, where its closed form says."),
        Claim("descent", "With steps below the bound its objective falls monotonically."),
        Claim("speed", "A step takes at most 0.55 of the time of a step of second-order DARTS."),
        Claim("accuracy", "The architecture it finds ranks above that of first-order DARTS."),
        Claim("second", "It ranks at most 5 percentiles below that of second-order DARTS."),
        Claim("width", "At equal multiply-adds its widths are more accurate than those of network slimming."),
        Claim("splitting", "It ranks above what single-level training on the same data finds.", gated=False),
        Claim("time", "It ranks above what second-order DARTS finds with as many passes.", gated=False),
        Claim("random", "It ranks above random architectures.", gated=False),
        Claim("exact", "The exact order too takes at most 0.55 of the time of second-order DARTS.", gated=False),
    ),
    metric="percentile",
    seeds=5,
)

SPACE = "micro-darts-2-shared"
LR, ALPHA_LR, WAIT = 0.1, 3e-3, 0.5
BETAS = (1e-3, 1e-2, 1e-1)
L1 = {"RARTS": (0.01, 0.03, 0.1), "slimming": (3e-4, 1e-3, 3e-3)}
SHARES = (0.5, 0.3)
PASSES = 2 / 5  # backward passes of a fused RARTS step over those of second-order DARTS
TOLERANCE = 1e-6
MODEL = {  # lambda, beta and the length of the steps
    "RARTS (10, 10)": ("exact", 10.0, 10.0, 0.01),
    "RARTS (1, 5)": ("exact", 1.0, 5.0, 0.01),
    "RARTS (100, 100)": ("exact", 100.0, 100.0, 0.005),
    "RARTS (10, 10), fused": ("fused", 10.0, 10.0, 0.01),
    "DARTS-1": ("darts", 0.0, 0.0, 0.1),
    "DARTS-2, xi 0.1": ("darts", 0.1, 0.0, 0.1),
    "DARTS-2, xi 0.5": ("darts", 0.5, 0.0, 0.1),
}


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""

    def percentile(name: str) -> list[float]:
        return arms[name]["percentile"]

    model = {name: {key: value[0] for key, value in arms[f"model: {name}"].items()} for name in MODEL}
    ours = {name: figures for name, figures in model.items() if name.startswith("RARTS")}
    error, rise = (max(figures[key] for figures in ours.values()) for key in ("error", "largest rise"))
    nearest, first = model["RARTS (100, 100)"]["distance"], model["DARTS-1"]["distance"]
    times = arms["step times"]
    widths = [compare(*(arms[f"width: {name}"][f"accuracy at {share:g}"] for name in L1)) for share in SHARES]
    return {
        "model": decide(
            error < TOLERANCE and nearest < first,
            nearest,
            f"|a - 1| with (100, 100), DARTS-1 {first:.3g}; largest error of a closed form {error:.2g}",
        ),
        "descent": decide(rise <= 1e-12, rise, "largest rise of L in a step, claimed none"),
        "speed": _share(times, "fused"),
        "accuracy": compare(percentile("RARTS"), percentile("DARTS-1")),
        "second": compare(percentile("RARTS"), percentile("DARTS-2"), margin=-5.0),
        "width": all_of(*widths),
        "splitting": compare(percentile("RARTS"), percentile("single level")),
        "time": compare(percentile("RARTS"), percentile("DARTS-2, as many passes")),
        "random": compare(percentile("RARTS"), percentile("random")),
        "exact": _share(times, "exact"),
    }


def _share(times: dict[str, list[Any]], name: str) -> Verdict:
    middle, low, high = (times[f"{name} / DARTS-2{part}"][0] for part in ("", ", lower", ", upper"))
    reason = f"claimed <= 0.55: median {middle:.3f} of {times['rounds'][0]} rounds, quartiles {low:.3f} to {high:.3f}"
    return decide(middle <= 0.55, middle, reason)


def pictures(evidence: Evidence) -> dict[str, Figure]:
    """What the method's page shows beside the arms: how a moves on the solvable model."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(6.4, 3.6), layout="constrained")
    ax = canvas.subplots()
    for name, settings in MODEL.items():
        (path,) = evidence.details[f"model: {name}"]["path"]
        steps = range(0, 10 * len(path), 10)
        ax.plot(steps, path, label=name, linestyle="--" if settings[0] == "darts" else "-")
    ax.axhline(1.0, color="0.6", linewidth=1)
    ax.set_xlabel("step")
    ax.set_ylabel("a; the solution is 1")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    return {"The architecture parameter a of the solvable model, from 2; steps of DARTS are ten times as long.": canvas}


def reproduce(run: Run) -> Evidence:
    """The four parts; what only the machine or arithmetic decides runs once."""
    steps = run.size("model: steps", full=20_000, fast=400, scaled=False)
    rounds = run.size("step times: rounds", full=20, fast=1, scaled=False)
    batch = run.size("batch size", full=64, fast=16, scaled=False)
    images = [
        run.size("search training images", full=2000, fast=32, specified=4000),
        run.size("search validation images", full=2000, fast=32, specified=4000),
    ]
    epochs = run.size("search epochs", full=6, fast=1)
    width = [
        run.size("width: training images", full=3600, fast=192, scaled=False),
        run.size("width: batch size", full=64, fast=16, scaled=False),
        run.size("width: search epochs", full=10, fast=1),
        run.size("width: fine-tuning epochs", full=5, fast=1),
    ]

    arms: Arms = {}
    for name, settings in MODEL.items():
        arms |= run.arms({f"model: {name}": [*settings, steps]}, _model, seeds=[0])
    arms |= run.arms({"step times": [rounds, batch]}, _times, seeds=[0])

    beta, tried = best(run, "beta", {value: ["RARTS", value, epochs, batch, images] for value in BETAS}, _tuned)
    arms |= tried
    methods = {
        "DARTS-1": ["DARTS-1", 0.0, epochs],
        "DARTS-2": ["DARTS-2", 0.0, epochs],
        "DARTS-2, as many passes": ["DARTS-2", 0.0, max(1, round(PASSES * epochs))],
        "RARTS": ["RARTS", beta, epochs],
        "single level": ["single level", 0.0, epochs],
        "random": ["random", 0.0, epochs],
    }
    found = run.arms({f"search: {name}": [*each, batch, images] for name, each in methods.items()}, _search)
    protocol, table = random_table.sizes(run), random_table.tabulate(run, SPACE)
    scores = run.arms_by_seed(
        {name: [[genotype, protocol] for genotype in found[f"search: {name}"]["genotype"]] for name in methods},
        random_table.score,
    )
    for name, each in scores.items():
        arms[name] = {"percentile": [table.percentile(value) for value in each["accuracy"]]} | each
    arms |= found
    arms["table"] = {name: [values] for name, values in table.figures().items()}

    for name, strengths in L1.items():
        l1, tried = best(run, f"{name}, l1", {value: [name, value, width, True] for value in strengths}, _width)
        arms |= tried
        arms |= run.arms({f"width: {name}": [name, l1, width, False]}, _width)
    arms |= run.arms({"width: whole": ["slimming", 0.0, width, False]}, _width)
    return run.evidence(arms, judge(arms))


def _model(seed: int, kind: str, lam: float, beta: float, lr: float, steps: int) -> dict[str, Any]:
    """The solvable model from (a, w, y) = (2, -2, -2) by plain steps in float64; of DARTS, ``lam`` is xi."""
    import torch
    from torch import nn

    from netwright.search.bilevel import FirstOrder, SecondOrder, Step
    from netwright.search.relaxed_split import RelaxedSplit

    class Scalars(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.w = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (2.0, -2.0))

    def losses(net: Any, batch: Any, part: str) -> torch.Tensor:
        return net.a * net.w - 2 * net.a + 1 if part == "alpha" else net.w**2 - 2 * net.a * net.w + net.a**2

    net, darts = Scalars(), kind == "darts"
    step: Step = (
        (SecondOrder(lam) if lam else FirstOrder()) if darts else RelaxedSplit(lam, beta, fused=kind == "fused")
    )
    w_opt, a_opt = torch.optim.SGD([net.w], lr=lr), torch.optim.SGD([net.a], lr=lr)
    path, rise, last = [float(net.a.detach())], 0.0, None
    for number in range(1, (steps // 3 if darts else steps) + 1):  # the steps of DARTS are ten times as long
        figures = step.step(net, losses, w_opt, a_opt, None, None, clip=None)
        if last is not None and not darts:
            rise = max(rise, figures["objective"] - last)
        last = figures.get("objective")
        if number <= 1000 and number % 10 == 0:
            path.append(float(net.a.detach()))
    limit = 2 / (1 + 2 * lam) if darts else 1 / (1 - 1 / (4 * lam) - 1 / (2 * beta))
    a = float(net.a.detach())
    found = {"a": a, "w": float(net.w.detach()), "limit of a": limit, "error": abs(a - limit), "distance": abs(a - 1)}
    if isinstance(step, RelaxedSplit):
        y = float(step.second["w"].detach())
        wanted = limit * (1 - 1 / (2 * lam)), limit * (1 - 1 / (2 * lam) - 1 / beta)
        found["error"] = max(found["error"], abs(found["w"] - wanted[0]), abs(y - wanted[1]))
        found |= {"y": y, "largest rise": rise}
    return found | {"path": path}


def step_times(rounds: int, batch: int, peers: Mapping[str, Any] | None = None) -> Comparison:
    """Times of one search step by each method on the same supernet, in alternating rounds on one thread.

    Args:
        rounds: How often each is timed.
        batch: Images in a batch.
        peers: Other steps by name, with the method of :class:`netwright.search.bilevel.Step`.
    """
    import torch

    from netwright.cost import compare_times
    from netwright.search import spaces
    from netwright.search.bilevel import FirstOrder, SecondOrder
    from netwright.search.objective import TaskLoss
    from netwright.search.relaxed_split import RelaxedSplit
    from netwright.seeding import stream

    draws = stream(0, "step times")
    train, val = (
        (torch.rand(batch, 1, 16, 16, generator=draws), torch.randint(10, (batch,), generator=draws)) for _ in range(2)
    )
    steps: dict[str, Any] = {
        "DARTS-2": SecondOrder(),
        "DARTS-1": FirstOrder(),
        "RARTS fused": RelaxedSplit(),
        "RARTS exact": RelaxedSplit(fused=False),
        **(peers or {}),
    }

    def one(step: Any) -> Callable[[], Any]:
        net = spaces.get(SPACE).supernet(1, 10, seed=0).train()
        w_opt = torch.optim.SGD(net.weight_parameters(), lr=0.025, momentum=0.9, weight_decay=3e-4)
        a_opt = torch.optim.Adam(net.arch_parameters(), lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
        return functools.partial(step.step, net, TaskLoss(), w_opt, a_opt, train, val)

    return compare_times({name: one(step) for name, step in steps.items()}, rounds=rounds, threads=1)


def _times(seed: int, rounds: int, batch: int) -> dict[str, Any]:
    times = step_times(rounds, batch)
    found: dict[str, Any] = {f"{timing.name}, ms": timing.median_ms for timing in times.timings}
    for name, short in (("RARTS fused", "fused"), ("RARTS exact", "exact"), ("DARTS-1", "DARTS-1")):
        timing = times[name]
        found |= {f"{short} / DARTS-2": timing.ratio}
        found |= {f"{short} / DARTS-2, lower": timing.ratio_low, f"{short} / DARTS-2, upper": timing.ratio_high}
    return found | {"rounds": times.rounds, "cpu": times.cpu}


def _search(seed: int, kind: str, beta: float, epochs: int, batch: int, images: Sequence[int]) -> dict[str, Any]:
    """Searches with one method; the recipe is the same for all."""
    from netwright.search import spaces
    from netwright.search.bilevel import FirstOrder, SecondOrder, Step
    from netwright.search.relaxed_split import RelaxedSplit
    from netwright.search.searcher import Searcher
    from netwright.search.single_level import SingleLevel
    from netwright.search.stages import Stage
    from netwright.seeding import stream

    if kind == "random":
        return {"genotype": spaces.get(SPACE).random(stream(seed, "rarts", "random")).to_dict(), "seconds": 0.0}
    train, validation = small_images.halves(seed, images, batch)
    steps: dict[str, Step] = {
        "DARTS-1": FirstOrder(),
        "DARTS-2": SecondOrder(),
        "RARTS": RelaxedSplit(beta=beta),
        "single level": SingleLevel(),
    }
    searcher = Searcher(
        spaces.get(SPACE).supernet(1, 10, seed=seed),
        method=steps[kind],
        stages=[Stage("search", epochs, LR, wait=WAIT)],
        alpha_lr=ALPHA_LR,
    )
    result = searcher.search(train, validation, seed=seed)
    return {
        "genotype": result.genotype.to_dict(),
        "seconds": result.wall_time,
        "skip share": result.skip_share[-1],
        "training loss": result.epochs[-1]["train_loss"],
        "validation loss": result.epochs[-1]["val_loss"],
        "gap": result.epochs[-1].get("gap"),
        "beta": beta if kind == "RARTS" else None,
    }


def _tuned(seed: int, kind: str, beta: float, epochs: int, batch: int, images: Sequence[int]) -> dict[str, Any]:
    """A search, and what its network learns from one half of that data about the other."""
    from netwright.search.genotype import Genotype

    found = _search(seed, kind, beta, epochs, batch, images)
    data, normalise = small_images.parts(seed, *images, 0)
    network = Genotype.from_dict(found["genotype"]).build(1, 10, seed=seed)
    accuracy = small_images.trained_accuracy(
        network, data["train"], data["validation"], normalise,
        batch=random_table.BATCH, epochs=epochs, lr=random_table.LR, seed=seed,
    )  # fmt: skip
    return found | {"validation accuracy": accuracy}


def _width(seed: int, kind: str, l1: float, sizes: Sequence[int], tuning: bool) -> dict[str, Any]:
    """Trains with scales under a penalty, prunes to each share of the multiply-adds, fine-tunes and measures.

    Both ways see every training image once an epoch: RARTS each half with its own weights, slimming all with one set.
    Without penalty the network is not pruned, but fine-tuned all the same.
    """
    from netwright.compress.channels import prune_channels, threshold_for
    from netwright.cost import count
    from netwright.data import subset
    from netwright.nn.convnet import SmallConvNet
    from netwright.seeding import seeded

    images, batch, epochs, tuned = sizes
    data = _digits()
    train = data.train.subset(subset(data.train.labels, images, seed=seed))
    with seeded(seed, "init"):
        network: nn.Module = SmallConvNet((16, 32, 64), hidden=0, num_classes=10, in_channels=1)
    shape = data.train.shape
    measured = data.validation if tuning else data.test
    whole = count(network, shape).macs
    normalise = data.normalise()
    (_relaxed if kind == "RARTS" else _slimmed)(network, l1, train, normalise, batch, epochs, seed)
    found: dict[str, Any] = {"l1": l1}
    for share in SHARES if l1 else (1.0,):
        narrow = prune_channels(network, threshold_for(network, share, shape)) if l1 else network
        accuracy = small_images.trained_accuracy(
            narrow, train, measured, normalise, batch=batch, epochs=tuned, lr=0.02, seed=seed
        )
        found |= {f"accuracy at {share:g}": accuracy, f"share at {share:g}": count(narrow, shape).macs / whole}
    if tuning:
        found["validation accuracy"] = sum(found[f"accuracy at {share:g}"] for share in SHARES) / len(SHARES)
    return found


@functools.lru_cache(maxsize=1)
def _digits() -> Any:
    """MNIST's 5000 digits: reading them takes seconds."""
    from netwright.data import load

    return load("mnist-5000")


def _relaxed(network: nn.Module, l1: float, train: Any, normalise: Any, batch: int, epochs: int, seed: int) -> None:
    from netwright.data import Batches, split_train
    from netwright.search.width import WidthSearch

    halves = split_train(train.labels, 0.5, seed=seed)
    loaders = [
        Batches(train.subset(half), batch, seed=seed, normalise=normalise, name=name)
        for half, name in zip(halves, ("train", "validation"), strict=True)
    ]
    WidthSearch(network, l1=l1, epochs=epochs).search(*loaders, seed=seed)


def _slimmed(network: nn.Module, l1: float, train: Any, normalise: Any, batch: int, epochs: int, seed: int) -> None:
    """Network slimming: the sign of gamma, times the strength, is added to its gradient."""
    import torch
    from torch import nn

    from netwright.data import Batches
    from netwright.train import Classifier, fit
    from netwright.train.schedules import CosineProgress

    gammas = [part.weight for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    hooks = [gamma.register_hook(lambda grad, gamma=gamma: grad + l1 * gamma.detach().sign()) for gamma in gammas]
    fit(
        Classifier(network),
        Batches(train, batch, seed=seed, normalise=normalise, name="train"),
        epochs=epochs,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=3e-4),
        callbacks=[CosineProgress()],
        seed=seed,
    )
    for hook in hooks:
        hook.remove()
