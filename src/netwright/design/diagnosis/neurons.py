"""The diagnosis of memorising neurons, for networks of two layers that have learned arithmetic on pairs of numbers.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from netwright.design.diagnosis.findings import Finding, NotApplicable, Sample
from netwright.diagnose.grokking import linear_pair, memorising_neurons, prune_neurons
from netwright.diagnose.grokking.arithmetic import Op, is_prime
from netwright.page import Cell, Table, colour, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from netwright.diagnose.grokking import NeuronReport

LEAST_MODULUS = 3
LEAST_RIGHT = 0.2  # share of the labels that must be the sum or the product, and at least twice chance


def diagnose(sample: Sample) -> Finding:
    """Which hidden neurons memorise, and what the network knows without them.

    Raises:
        NotApplicable: If the network has not two linear layers on pairs of numbers in one-hot form, or its labels are
            neither sums nor products.
    """
    pairs, p = _pairs(sample)
    op, right = _operation(pairs, sample.labels, p)
    report = memorising_neurons(sample.network, op=op)
    networks = {"all": sample.network, "without": prune_neurons(sample.network, report.memorising)}
    hits = {name: _hits(network, sample) for name, network in networks.items()}
    parts = {"right": right, "wrong": ~right}
    accuracies = {
        kind: {name: float(hit[mask].double().mean()) if bool(mask.any()) else None for name, hit in hits.items()}
        for kind, mask in parts.items()
    }
    counts = {kind: int(mask.sum()) for kind, mask in parts.items()}
    return Finding(
        title="Memorising neurons",
        verdict=_verdict(report, accuracies),
        chart=_chart(report),
        reading=(
            "A bar counts hidden neurons by their inverse participation ratio: 1 if a neuron's weights are one wave "
            "over the numbers, which is how it computes, and as low as for random weights (dotted) if it knows single "
            "examples.",
            "Neurons to the left of the dashed threshold memorise; where the table shows that right labels are still "
            "known without them the network has learned the rule, and where they are not only the examples.",
        ),
        figures={
            **report.to_dict(),
            "operation": op,
            "modulus": p,
            "examples": counts,
            "accuracy": accuracies,
        },
        blocks=[_table(counts, accuracies, op)],
    )


def _pairs(sample: Sample) -> tuple[Tensor, int]:
    """The two numbers of each example, and the modulus."""
    try:
        first, second = linear_pair(sample.network)
    except ValueError as error:
        raise NotApplicable(f"memorising neurons are those of a network with two linear layers: {error}") from error
    p = second.out_features
    numbers = sample.images.flatten(1)
    if p < LEAST_MODULUS or first.in_features != 2 * p or numbers.shape[1] != 2 * p or len(sample.classes) != p:
        raise NotApplicable(
            "memorising neurons are those of a network from two one-hot numbers of p places to p classes, p >= 3, got "
            f"{first.in_features} inputs and {p} outputs"
        )
    halves = numbers.float().unflatten(1, (2, p))
    high, low = halves.amax(-1, keepdim=True), halves.amin(-1, keepdim=True)
    hot = halves == high
    if not bool(((hot.sum(-1) == 1) & (hot | (halves == low)).all(-1)).all()):
        raise NotApplicable("memorising neurons need numbers in one-hot form, got inputs of another form")
    return hot.int().argmax(-1), p


def _operation(pairs: Tensor, labels: Tensor, p: int) -> tuple[Op, Tensor]:
    """Sum or product, whichever more labels are, and which labels are it."""
    right: dict[Op, Tensor] = {"add": pairs.sum(1) % p == labels}
    if is_prime(p):
        right["mul"] = pairs.prod(1) % p == labels
    op: Op = max(right, key=lambda name: int(right[name].sum()))
    share = float(right[op].double().mean())
    if share < max(LEAST_RIGHT, 2 / p):
        raise NotApplicable(
            f"memorising neurons need labels that are sums or products mod {p}, got {100 * share:.3g} %"
        )
    return op, right[op]


@torch.inference_mode()
def _hits(network: nn.Module, sample: Sample) -> Tensor:
    return torch.cat([network(x).argmax(1) == y for x, y in sample.batches()])


def _verdict(report: NeuronReport, accuracies: dict[str, dict[str, float | None]]) -> str:
    told = f"{len(report.memorising)} of {len(report.ipr)} neurons memorise"
    changes = [
        f"{100 * after:.3g} % of the {kind} labels instead of {100 * before:.3g} %"
        for kind, both in accuracies.items()
        if (before := both["all"]) is not None and (after := both["without"]) is not None
    ]
    return f"{told}; without them the network knows {' and '.join(changes)}."


def _chart(report: NeuronReport) -> str:
    def paint(canvas: Canvas) -> None:
        ax = report.plot(canvas.subplots())
        for line in ax.lines:
            line.set_color(colour("muted"))

    return svg(paint, width=430, height=220)


def _table(counts: dict[str, int], accuracies: dict[str, dict[str, float | None]], op: Op) -> Table:
    rows: list[list[Cell]] = [
        [kind, counts[kind], both["all"], both["without"]] for kind, both in accuracies.items() if counts[kind]
    ]
    name = {"add": "sum", "mul": "product"}[op]
    caption = f"Share of the training examples that the network knows; a label is right where it is the {name}."
    return Table(["labels", "examples", "known", "without the memorising neurons"], rows, caption)
