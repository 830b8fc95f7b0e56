"""The diagnosis of opposing signals: the few examples that would make training spike, in groups that oppose each other.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163.

A trained network brings no record of its training. It is taken just beyond the edge of stability instead, by gradient
descent on a copy of its weights with steps a little longer than its sharpest direction allows, and longer still while
the loss falls: whoever depends on that direction swings.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from netwright.console import task
from netwright.design.diagnosis.findings import Finding, NotApplicable, Sample, cross_entropy
from netwright.diagnose.opposing_signals.descent import NoEdgeError, edge_replay
from netwright.page import Block, Cell, Images, Picture, Table, colour, png, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from netwright.diagnose.opposing_signals import EdgeReplay, OpposingReport

# Multiply-adds that it may take, a forward pass of one example counted; the examples are fewer for large networks.
WORK, PASSES = 1e12, 200
FEWEST, LEAST_EXAMPLES = 10, 100
MOST_PICTURES = 12
OPPOSED, APART = -0.5, 0.5  # correlation of the pair, and how far it must be below that of random pairs


def diagnose(sample: Sample) -> Finding:
    """The groups of examples that swing against each other at the edge of stability.

    Raises:
        NotApplicable: If there are fewer than 10 examples, or the loss has no edge of stability.
        ValueError: If a loss is not finite.
    """
    from netwright.data import subset

    if len(sample) < FEWEST:
        raise NotApplicable(f"opposing signals need at least {FEWEST} examples, got {len(sample)}")
    chosen = subset(sample.labels, min(len(sample), _affordable(sample)), 0)
    x, y = sample.normalise(sample.images[chosen]), sample.labels[chosen]
    with task("opposing signals", total=2) as bar:
        try:
            replay = edge_replay(sample.network, cross_entropy, (x, y))
        except NoEdgeError as error:
            raise NotApplicable(f"opposing signals show at the edge of stability: {error}") from error
        bar.advance()
        report = replay.tracker.report()
        bar.advance()
    place = {"up": chosen[list(report.groups.up)].tolist(), "down": chosen[list(report.groups.down)].tolist()}
    return Finding(
        title="Opposing signals",
        verdict=_verdict(sample, replay, report),
        chart=_chart(report),
        reading=(
            f"The lines are the mean losses of the {len(report.groups.up)} examples whose loss rises most in step "
            f"{report.step} (dotted), of as many whose loss falls most, and of all, around it in "
            f"{len(replay.lrs)} steps of gradient descent on a copy of the network, just longer than its sharpest "
            "direction allows.",
            "Where one line is high whenever the other is low, both groups depend on one feature with opposite "
            "answers, and they are what would make training with a large learning rate spike; lines that go together "
            "mean that there is no such pair.",
        ),
        figures={
            **report.to_dict(),
            "groups": {**place, "labels": [_named(sample, table) for table in report.groups.labels]},
            "examples": len(chosen),
            "sharpness": replay.sharpness,
            "learning rate": replay.lrs[report.step],
        },
        blocks=[*_sheets(sample, replay, report, place), _labels(sample, report)],
        details=[_scores(report)],
    )


def _affordable(sample: Sample) -> int:
    """How many examples the work allows for."""
    from netwright.cost import count

    macs = count(sample.network, sample.images.shape[1:]).macs
    return max(LEAST_EXAMPLES, int(WORK / (PASSES * max(1, macs))))


def _verdict(sample: Sample, replay: EdgeReplay, report: OpposingReport) -> str:
    pair, random = report.pair.oscillation, report.random.oscillation
    steps = len(replay.lrs)
    if not replay.tracker.interesting_steps("rise"):
        times = replay.lrs[-1] * replay.sharpness / 2
        return (
            f"The loss never rose in {steps} steps of gradient descent, up to {times:.2g} times as long as the "
            "sharpest direction allows at first: no examples swing against each other."
        )
    told = f"correlation {pair:.2g}, random pairs {random:.2g}"
    if not (pair <= OPPOSED and random - pair >= APART):
        return f"Beyond the largest stable step no groups of examples swing against each other ({told})."
    # Tables begin with the most frequent label.
    main = [sample.classes[next(iter(table))] for table in report.groups.labels]
    both = f"most often {main[0]} against {main[1]}" if main[0] != main[1] else f"most often both {main[0]}"
    return (
        f"Beyond the largest stable step {2 * len(report.groups.up)} of {len(replay.tracker)} training examples have "
        f"{100 * report.pair.share:.2g} % of all loss changes and swing against each other ({told}): {both}."
    )


def _chart(report: OpposingReport) -> str:
    def paint(canvas: Canvas) -> None:
        ax = canvas.subplots()
        steps = [*report.steps, report.steps[-1] + 1]
        for name, told, shade in (
            ("up", "loss rises most", "orange"),
            ("down", "loss falls most", "blue"),
            ("all", "all examples", "muted"),
        ):
            ax.plot(steps, report.curves[name], marker=".", color=colour(shade), label=told)
        ax.axvline(report.step, color=colour("muted"), linewidth=0.8, linestyle=":")
        ax.set_xlabel("step beyond the edge of stability")
        ax.set_ylabel("mean loss")
        ax.legend()

    return svg(paint, width=430, height=240)


def _sheets(sample: Sample, replay: EdgeReplay, report: OpposingReport, place: dict[str, list[int]]) -> list[Block]:
    if not sample.picture:
        return []
    tracker = replay.tracker
    delta = tracker.deltas()[tracker.delta_steps.index(report.step)]
    told = {
        "up": "The contact sheet of the examples whose loss rises most, with label and change of loss, and beneath it "
        "that of those whose loss falls most in the same step. Look for what both sheets share, a background, a "
        "colour or a stroke, while their labels differ; wrong labels are here too.",
        "down": "The examples whose loss falls most.",
    }
    blocks: list[Block] = []
    for name, members in (("up", report.groups.up), ("down", report.groups.down)):
        items = [
            Picture(
                png(sample.images[i].permute(1, 2, 0).numpy()),
                f"{sample.classes[int(sample.labels[i])]} ({float(delta[member]):+.2g})",
            )
            for i, member in list(zip(place[name], members, strict=True))[:MOST_PICTURES]
        ]
        blocks.append(Images(items, told[name]))
    return blocks


def _named(sample: Sample, table: dict[int, int]) -> dict[str, int]:
    return {sample.classes[label]: number for label, number in table.items()}


def _labels(sample: Sample, report: OpposingReport) -> Table:
    up, down = report.groups.labels
    rows: list[list[Cell]] = [
        [sample.classes[label], up.get(label, 0), down.get(label, 0)]
        for label in sorted({*up, *down}, key=lambda label: (down.get(label, 0) - up.get(label, 0), label))
    ]
    return Table(["class", "loss rises", "loss falls"], rows, "Labels of both groups.")


def _scores(report: OpposingReport) -> Table:
    names = {
        "oscillation": "correlation of their loss changes",
        "gradient_cosine": "cosine of their gradients",
        "slope_product": "product of their slopes along the sharpest direction",
        "opposed": "share of pairs for which that is negative",
        "share": "share of all loss changes",
        "loss": "mean loss before the step",
    }
    rows: list[list[Cell]] = [
        [told, *(_known(getattr(each, name)) for each in (report.pair, report.random, report.matched))]
        for name, told in names.items()
    ]
    caption = (
        "Large changes may merely follow large losses: the last column are groups of other examples with about the "
        f"same losses. Both groups hold {100 * report.even_share:.2g} % of the examples."
    )
    return Table(["", "both groups", "random pairs", "pairs of equal loss"], rows, caption)


def _known(value: float) -> Cell:
    return None if math.isnan(value) else value
