"""Which neurons of a network memorise, told by their weights alone.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from netwright.diagnose.grokking.arithmetic import ModularArithmetic, Op
from netwright.diagnose.grokking.network import linear_pair, norms_between
from netwright.diagnose.grokking.periodicity import neuron_ipr, random_ipr, scale_correlation
from netwright.diagnose.grokking.phases import SHOWN, Phase, classify_phase, draw_accuracies
from netwright.diagnose.grokking.pruning import pruning_curve
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class NeuronReport(Result):
    """The neurons of a hidden layer, parted into periodic and memorising ones.

    Attributes:
        ipr: Inverse participation ratio of each neuron.
        threshold: Below it a neuron memorises.
        noise: What a neuron of random weights has on average.
        memorising: Numbers of the neurons that memorise, lowest IPR first.
        dead: Numbers of those without incoming or without outgoing weights.
        scale_correlation: Spearman's correlation of the norm's scale with the IPR; NaN without a norm.
        phase: Of the network, where data were given.
        before: Accuracy of each group, where data were given.
        without: The same without the memorising neurons.
    """

    ipr: tuple[float, ...]
    threshold: float
    noise: float
    memorising: tuple[int, ...]
    dead: tuple[int, ...] = ()
    scale_correlation: float = math.nan
    phase: Phase | None = None
    before: dict[str, float] = dataclasses.field(default_factory=dict)
    without: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        periodic = len(self.ipr) - len(self.memorising) - len(self.dead)
        told = [
            f"{len(self.ipr)} neurons: {periodic} periodic, {len(self.memorising)} memorising "
            f"(IPR below {self.threshold:.3g}), {len(self.dead)} dead"
        ]
        if not math.isnan(self.scale_correlation):
            told.append(f"rank correlation of the norm's scale with the IPR: {self.scale_correlation:.2f}")
        if self.before:
            told.append(f"phase: {self.phase}; accuracy with all neurons, and without the memorising ones:")
            told += [
                f"  {name.replace('_', ', ')}: {value:.3f}, {self.without[name]:.3f}"
                for name, value in self.before.items()
                if not math.isnan(value)
            ]
        return "\n".join(told)

    def plot(self, ax: Axes | None = None) -> Axes:
        """How many neurons have which IPR, with the threshold and the level of random weights."""
        ax = new_axes(ax)
        gone = set(self.memorising)
        parted = [
            [value for number, value in enumerate(self.ipr) if (number in gone) == memorises]
            for memorises in (True, False)
        ]
        edges = [step / 40 for step in range(41)]
        ax.hist(parted, edges, stacked=True, label=["memorising", "periodic"], color=["C1", "C0"])
        ax.axvline(self.threshold, color="0.3", linestyle="--", label="threshold")
        ax.axvline(self.noise, color="0.6", linestyle=":", label="random weights")
        ax.set_xlabel("inverse participation ratio")
        ax.set_ylabel("neurons")
        ax.legend()
        return ax


def memorising_neurons(
    model: nn.Module,
    data: ModularArithmetic | None = None,
    *,
    threshold: float | None = None,
    op: Op = "add",
    blocks: int = 2,
) -> NeuronReport:
    """Tells the neurons that memorise from those that are periodic in the inputs.

    It holds for a network with two linear layers whose inputs are the one-hot forms of ``blocks`` numbers and whose
    classes are cyclic like them; of others the spectrum says nothing.

    Args:
        model: The network.
        data: Pairs with ``split="all"``, encoded as the network takes them: what the network knows with and without
            the memorising neurons is then told too. Their operation stands for ``op``.
        threshold: IPR below which a neuron memorises, in (0, 1); by default the geometric mean of that of random
            weights (:func:`random_ipr`) and that of a wave, 1.
        op: As for :func:`neuron_ipr`.
        blocks: As for :func:`neuron_ipr`.

    Raises:
        ValueError: If ``threshold`` is out of its range, or the network is not of that kind.

    Example:
        >>> from netwright.diagnose.grokking import QuadraticMLP
        >>> print(memorising_neurons(QuadraticMLP.analytic(23, 100)))
        100 neurons: 100 periodic, 0 memorising (IPR below 0.392), 0 dead
    """
    first, second = linear_pair(model)
    op = op if data is None else data.op
    ipr = neuron_ipr(model, op=op, blocks=blocks)
    noise = random_ipr(first.in_features // blocks)
    if threshold is None:
        threshold = math.sqrt(noise)
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
    dead = (first.weight == 0).all(1) | (second.weight == 0).all(0)
    low = (ipr < threshold) & ~dead
    ranked = [number for number in ipr.argsort(stable=True).tolist() if low[number]]
    scaled = any(norm.weight is not None for norm in norms_between(model))
    report = NeuronReport(
        ipr=tuple(ipr.tolist()),
        threshold=threshold,
        noise=noise,
        memorising=tuple(ranked),
        dead=tuple(dead.nonzero().flatten().tolist()),
        scale_correlation=scale_correlation(model, op=op, blocks=blocks) if scaled else math.nan,
    )
    if data is None:
        return report
    order = low.int().argsort(descending=True, stable=True)
    curve = pruning_curve(model, data, order, [0, len(ranked)])
    before, without = ({name: float(curve[name][at]) for name in curve if name != "count"} for at in (0, 1))
    phase = None
    if not math.isnan(before["train"] + before["test"]):
        phase = classify_phase(before["train"], before["test"], before["corrupted"])
    return dataclasses.replace(report, phase=phase, before=before, without=without)


def plot_pruning(curve: Mapping[str, Tensor], ax: Axes | None = None) -> Axes:
    """Accuracies over the number of pruned neurons, of what :func:`pruning_curve` gives."""
    return draw_accuracies(
        curve["count"].tolist(), {name: curve[name].tolist() for name in SHOWN}, "neurons pruned", ax
    )
