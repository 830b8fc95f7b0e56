"""What does each search find in the same time, among random architectures of its space?

Two tables of random architectures, each trained alike: of ``micro-darts-2-shared``, and of ``micro-chain`` for the
methods of MBConv chains; the gates of ProxylessNAS and FBNet are tried on both. Each method searches on Fashion-MNIST
at 16x16 for the same wall time on one thread, selection included, with the same two halves of images. What it finds is
trained as the table's entries were and ranked among them. Random search trains as many architectures as the time
allows, by the table's protocol on the first half, and keeps the one that is most accurate on the second.

How many epochs fit is found by a rehearsal that is not counted, and corrected as the search goes on, so that each
learning rate comes to its end; what each used is stated. The rates are those of short searches, 0.1 for weights and
0.003 for alphas, for all methods but FBNet, whose temperature and theta go as far as in the paper's 80 epochs, and
Single-Path NAS, which has one RMSProp for both, learns from the first half alone, and has a price on multiply-adds,
without which it would keep the largest network. Methods without a warm-up of their own let the architecture wait for
half of their first stage. DASS searches at a density of 0.1, and what it finds is trained dense
as all are. The best architecture of each table is trained again from other seeds: its rank says how much of a rank is
chance.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from netwright.papers import random_table, small_images
from netwright.papers.evidence import Evidence, Verdict, all_of, bootstrap, compare, mean
from netwright.papers.evidence.statistics import floats
from netwright.papers.index import Claim, Comparison
from netwright.papers.run import Arms, Run
from netwright.results import save_figure
from netwright.seeding import stream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from netwright.search.brief import Brief
    from netwright.search.searcher import Searcher

CELLS, CHAIN = "micro-darts-2-shared", "micro-chain"
RANDOM = "random search"
BEST = "best of the table, again"
DENSITY = 0.1
REHEARSED = 5  # batches: one architecture step of ProxylessNAS among them
MOST = 200  # architectures that random search may train
COLUMNS = (
    "space", "method", "percentile of each seed", "mean", "90 % interval", "accuracy", "seconds used", "trained (mean)",
)  # fmt: skip

Make = Callable[[Any, "Brief", int], "Searcher"]
"""``(supernet, brief, batches of an epoch)`` to the searcher."""


@dataclass(frozen=True)
class Method:
    """How a method takes part.

    Attributes:
        spaces: The spaces on which it is tried.
        name: Its name in :data:`netwright.search.METHODS`.
        make: The searcher, where that is not the short search of the name.
    """

    spaces: tuple[str, ...]
    name: str
    make: Make | None = None

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the epochs of each stage."""
        from netwright.search import method

        shares: tuple[float, ...] = method(self.name).shares
        return shares

    def searcher(self, space: str, seed: int, epochs: list[int], batches: int) -> Searcher:
        """The searcher with its supernet."""
        from netwright.search import Brief, method, spaces

        supernet = method(self.name).supernet_of(spaces.get(space), 1, 10, seed=seed)
        brief = Brief(epochs, DENSITY)
        if self.make is not None:
            return self.make(supernet, brief, batches)
        searcher: Searcher = method(self.name).short(supernet, brief)
        return searcher


def _second_order(supernet: Any, brief: Brief, batches: int) -> Searcher:
    from netwright.search import DARTS

    return DARTS(supernet, 2, epochs=sum(brief.epochs), lr=brief.lr, alpha_lr=brief.alpha_lr, wait=brief.wait)


def _removals(supernet: Any, brief: Brief, batches: int) -> Searcher:
    from netwright.search import DARTS, PerturbationSelector

    selector = PerturbationSelector(tune_epochs=1, max_val_batches=max(1, batches // 4))
    return DARTS.short(supernet, dataclasses.replace(brief, chosen=selector))


# A method joins the comparison by one line here.
METHODS: dict[str, Method] = {
    RANDOM: Method((CELLS, CHAIN), "random"),
    "DARTS, first order": Method((CELLS,), "darts"),
    "DARTS, second order": Method((CELLS,), "darts", _second_order),
    "DARTS-PT": Method((CELLS,), "darts", _removals),
    "DASS": Method((CELLS,), "dass"),
    "RARTS": Method((CELLS,), "rarts"),
    "SD-DARTS": Method((CELLS,), "sd-darts"),
    "ProxylessNAS": Method((CELLS, CHAIN), "proxylessnas"),
    "FBNet": Method((CELLS, CHAIN), "fbnet"),
    "Single-Path NAS": Method((CHAIN,), "single-path"),
}


def arms_of(space: str) -> dict[str, str]:
    """Name of the arm of every method on a space, by method."""
    return {name: f"{space}: {name}" for name, method in METHODS.items() if space in method.spaces}


def _rows(space: str) -> dict[str, str]:
    """The same, and the best of the table."""
    return arms_of(space) | {BEST: f"{space}: {BEST}"}


SPACES = tuple(dict.fromkeys(space for method in METHODS.values() for space in method.spaces))
PAIRS = [(space, name) for space in SPACES for name in arms_of(space) if name != RANDOM]

CARD = Comparison(
    family="search",
    title="Architecture searches in equal time",
    claims=(
        Claim("family", "On both spaces the methods together rank above random search in the same time."),
        *(
            Claim(f"{space}: {name}", f"On {space} {name} ranks above random search.", gated=False)
            for space, name in PAIRS
        ),
    ),
    metric="percentile",
)


def judge(arms: Arms) -> dict[str, Verdict]:
    """The verdicts that follow from the figures."""

    def ranks(space: str, name: str) -> list[float]:
        return arms[arms_of(space)[name]]["percentile"]

    together = []
    for space in SPACES:
        each = [ranks(space, name) for name in arms_of(space) if name != RANDOM]
        together.append(compare([mean(seed) for seed in zip(*each, strict=True)], ranks(space, RANDOM)))
    return {
        "family": all_of(*together),
        **{f"{space}: {name}": compare(ranks(space, name), ranks(space, RANDOM)) for space, name in PAIRS},
    }


def reproduce(run: Run) -> Evidence:
    """Makes the tables, searches with every method, ranks what was found, and draws the picture beside the evidence."""
    images = [
        run.size("search training images", full=2000, fast=32, specified=4000),
        run.size("search validation images", full=2000, fast=32, specified=4000),
    ]
    batch = run.size("batch size", full=64, fast=16, scaled=False)
    # After three epochs SD-DARTS has all its teachers, so the fourth is of the usual cost.
    rehearsal = run.size("epochs of the rehearsal, each stage", full=4, fast=1, scaled=False)
    seconds = run.size("search time, tenths of a second", full=400, fast=2, scaled=False) / 10
    protocol = random_table.sizes(run)
    tables = {space: random_table.tabulate(run, space) for space in SPACES}
    names = {arm: (space, name) for space in SPACES for name, arm in arms_of(space).items()}
    found = run.arms(
        {arm: [name, space, seconds, images, batch, [rehearsal, protocol[1]]] for arm, (space, name) in names.items()},
        find,
    )
    scores = run.arms_by_seed(
        {f"{arm}, trained": [[g, protocol] for g in found[arm]["genotype"]] for arm in names}, random_table.score
    )
    again = {f"{space}: {BEST}": [_best(table), protocol] for space, table in tables.items()}
    trained = {arm: scores[f"{arm}, trained"] for arm in names} | run.arms(again, _again)
    arms: Arms = {}
    for space, table in tables.items():
        for arm in _rows(space).values():
            ranks = [table.percentile(value) for value in trained[arm]["accuracy"]]
            arms[arm] = {"percentile": ranks} | trained[arm] | found.get(arm, {})
    verdicts = judge(arms)
    for space, table in tables.items():
        arms[f"table: {space}"] = {name: [values] for name, values in table.figures().items()}
    evidence = run.evidence(arms, verdicts)
    for suffix in (".svg", ".png"):
        save_figure(figure(evidence), run.file.with_suffix(suffix))
    return evidence


def _best(table: random_table.RandomTable) -> dict[str, Any]:
    return table.genotypes[max(range(len(table.accuracies)), key=lambda i: table.accuracies[i])]


def _again(seed: int, genotype: dict[str, Any], protocol: Sequence[int]) -> dict[str, Any]:
    """Another training of an entry, whose own seed is 0."""
    return random_table.score(seed + 1, genotype, protocol)


def find(
    seed: int, name: str, space: str, seconds: float, images: Sequence[int], batch: int, epochs: Sequence[int]
) -> dict[str, Any]:
    """The arm that searches with one method for a wall time, on one thread.

    Args:
        seed: Of images, weights, order and draws.
        name: One of :data:`METHODS`.
        space: One of its spaces.
        seconds: Wall time, selection included.
        images: Training images and validation images.
        batch: Images in a batch.
        epochs: Epochs of each stage in the rehearsal, and epochs for which random search trains an architecture.
    """
    from netwright.cost import threads

    with threads(1):
        if name == RANDOM:
            return _random(seed, space, seconds, images, epochs[1])
        return _searched(seed, METHODS[name], space, seconds, images, batch, epochs[0])


def _searched(
    seed: int, method: Method, space: str, seconds: float, images: Sequence[int], batch: int, rehearsal: int
) -> dict[str, Any]:
    from netwright.search import Deadline, rehearse

    make, shares = method.searcher, method.shares
    train, validation = small_images.halves(seed, images, batch)
    rehearsed = make(space, seed, [rehearsal] * len(shares), len(validation))
    found = rehearse(rehearsed, train, validation, seed=seed, batches=REHEARSED)
    planned = found.epochs(seconds, shares)
    start = time.perf_counter()
    searcher = make(space, seed, planned, len(validation))
    left = max(seconds - (time.perf_counter() - start), seconds / 10)
    result = searcher.search(train, validation, seed=seed, on_epoch=Deadline(left, found))
    return {
        "genotype": result.genotype.to_dict(),
        "seconds": time.perf_counter() - start,
        "seconds of selection": time.perf_counter() - start - searcher.seconds,
        "epochs": searcher.epoch,
        "epochs planned": sum(planned),
        "training loss": result.epochs[-1]["train_loss"],
        "skip share": result.genotype.skip_share,
    }


def _random(seed: int, space: str, seconds: float, images: Sequence[int], epochs: int) -> dict[str, Any]:
    """Random search; seeds are moved on, so that the first seed does not draw what the table holds."""
    from netwright.search import RandomSearch, spaces

    data, normalise = small_images.parts(seed, *images, 0)

    def evaluate(genotype: Any) -> float:
        return small_images.trained_accuracy(
            genotype.build(1, 10, seed=seed), data["train"], data["validation"], normalise,
            batch=random_table.BATCH, epochs=epochs, lr=random_table.LR, seed=seed,
        )  # fmt: skip

    known = spaces.get(space)
    evaluate(known.random(stream(seed, "rehearsal")))
    result = RandomSearch(known, evaluate, trials=min(known.size, MOST)).search(seed=seed + 1, seconds=seconds)
    return {
        "genotype": result.genotype.to_dict(),
        "seconds": result.wall_time,
        "architectures": len(result.scores),
        "skip share": result.genotype.skip_share,
    }


def figure(evidence: Evidence) -> Figure:
    """A panel a space: each method's percentile for every seed, the mean and its 90 % interval, and the median."""
    from matplotlib.figure import Figure

    rows = {space: _rows(space) for space in SPACES}
    counts = [len(names) for names in rows.values()]
    canvas = Figure(figsize=(6.4, 1.6 + 0.3 * sum(counts)), layout="constrained")
    panels = canvas.subplots(len(rows), 1, sharex=True, height_ratios=counts)
    for ax, (space, names) in zip(panels, rows.items(), strict=True):
        for row, (name, arm) in enumerate(names.items()):
            values = evidence.figures[arm]["percentile"]
            colour = "C7" if name in (RANDOM, BEST) else "C0"
            ax.scatter(values, [row] * len(values), s=16, color="0.65", zorder=2)
            ax.plot([mean(values)], [row], "D", color=colour, zorder=4)
            ax.plot(bootstrap(values), [row, row], color=colour, linewidth=2, zorder=3)
        ax.axvline(50, color="0.8", linewidth=1, zorder=1)
        ax.set_yticks(range(len(names)), list(names))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set_title(space, loc="left", fontsize="medium")
    panels[-1].set_xlim(-2, 102)
    panels[-1].set_xlabel("percentile among random architectures")
    return canvas


def ranking(evidence: Evidence) -> list[list[str]]:
    """A row a method and space, with the columns :data:`COLUMNS`."""
    rows = []
    for space in SPACES:
        for name, arm in _rows(space).items():
            figures = {key: floats(values) for key, values in evidence.figures[arm].items()}
            ranks, seconds = figures["percentile"], figures.get("seconds")
            low, high = bootstrap(ranks)
            trained = "architectures" if "architectures" in figures else "epochs"
            rows.append(
                [
                    space,
                    name,
                    ", ".join(f"{value:.0f}" for value in ranks),
                    f"{mean(ranks):.1f}",
                    f"{low:.1f} to {high:.1f}",
                    f"{mean(figures['accuracy']):.4f}",
                    f"{min(seconds):.1f} to {max(seconds):.1f}" if seconds else "",
                    f"{mean(figures[trained]):.1f} {trained}" if seconds else "",
                ]
            )
    return rows
