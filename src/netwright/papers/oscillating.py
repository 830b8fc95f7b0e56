"""What the experiment on opposing signals does for one seed: trainings that are watched, changed, and compared."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from netwright.papers.evidence import mean
from netwright.papers.one_hot import PATCH, PLANTED_CLASSES, one_hot_problem, perceptron, planted, squared_error

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from netwright.diagnose import OpposingReport, OpposingSignalTracker

WIDTHS = {"digits": (64, 64, 64, 10), "fashion-mnist": (784, 100, 100, 10)}
ALPHA, BETA, TOY_STEPS = 10.0, 4.0, 400
MOST_SPIKES, KEPT = 20, 100
SHARPNESS_EVERY = 10
ALONE = 20  # steps of a training on the pair alone
SWEPT, SCALES = 200, (0.0, 0.5, 1.0)  # images on which the patch is turned up, and how far
REMOVALS = ("all images", "without the planted", "without random ones")


def run_toy(seed: int, eta: float) -> dict[str, Any]:
    """The linear model at a step size, from where the paper's figures begin."""
    from netwright.diagnose import opposing_toy

    found = opposing_toy(ALPHA, BETA, eta, TOY_STEPS)
    ends = {"curvature": found.curvature[-1], "limit": found.limit}
    return {"peak": found.peak, **ends, "diverged": float(found.diverged)}


def _descend(
    seed: int, x: Tensor, y: Tensor, widths: Sequence[int], lr: float, steps: int, kept: int
) -> tuple[OpposingSignalTracker, dict[int, float], list[float]]:
    """Full-batch gradient descent: its record, the sharpness every few steps, and the mean losses."""
    import torch

    from netwright.diagnose import OpposingSignalTracker, full_batch_descent, sharpness

    network = perceptron(widths, seed)
    tracker = OpposingSignalTracker(network, squared_error, (x, y), snapshots=kept)
    found: dict[int, float] = {}
    last: Tensor | None = None

    def look(step: int) -> None:
        nonlocal last
        if step % SHARPNESS_EVERY == 0:
            found[step], last = sharpness(network, squared_error, (x, y), v0=last)

    optimizer = torch.optim.SGD(network.parameters(), lr)
    means = full_batch_descent(network, squared_error, (x, y), optimizer, steps, tracker=tracker, before=look)
    return tracker, found, means


def _spikes(tracker: OpposingSignalTracker, first: int = 0) -> list[int]:
    """All spikes from a step on, the largest rise first."""
    deltas = dict(zip(tracker.delta_steps, tracker.deltas().mean(1).tolist(), strict=True))
    late = [step for step in tracker.interesting_steps("spike") if step >= first]
    return sorted(late, key=deltas.__getitem__, reverse=True)


def _late_spikes(tracker: OpposingSignalTracker, steps: int) -> list[int]:
    """The largest spikes after the first quarter whose parameters were kept, the largest rise first."""
    known = set(tracker.snapshot_steps)
    return [step for step in _spikes(tracker, steps // 4) if step in known][:MOST_SPIKES]


def _first_quarter_too(tracker: OpposingSignalTracker) -> dict[str, Any]:
    """The correlations at the largest spike of the whole record."""
    spikes = _spikes(tracker)
    if not spikes:
        return dict.fromkeys(f"{name}, any spike" for name in _CORRELATIONS)
    report = tracker.report(spikes[0], curvature=False)
    found = (report.pair.oscillation, report.random.oscillation, report.matched.oscillation)
    named = dict(zip(_CORRELATIONS, found, strict=True))
    return {f"{name}, any spike": value for name, value in named.items()} | {"step, any spike": float(report.step)}


def _pair_alone(tracker: OpposingSignalTracker, report: OpposingReport, lr: float) -> dict[str, Any]:
    """Descent on both groups alone from before the spike, with their share of the step that all examples take."""
    import torch

    from netwright.diagnose import OpposingSignalTracker, full_batch_descent, oscillation_score, sharpness

    groups = report.groups
    x, y = tracker.examples([*groups.up, *groups.down])
    share = lr * len(x) / len(tracker)
    network = tracker.model
    with tracker.parameters_of(groups.step) as known:
        if not known:
            return {}
        top, _ = sharpness(network, squared_error, (x, y))
        alone = OpposingSignalTracker(network, squared_error, (x, y), snapshots=0)
        try:
            optimizer = torch.optim.SGD(network.parameters(), share)
            full_batch_descent(network, squared_error, (x, y), optimizer, ALONE, tracker=alone)
        except FloatingPointError:
            return {"oscillation, pair alone": None, "sharpness over limit, pair alone": top * share / 2}
    up, down = range(len(groups.up)), range(len(groups.up), len(x))
    rho = oscillation_score(alone.deltas(), up, down)
    return {"oscillation, pair alone": rho, "sharpness over limit, pair alone": top * share / 2}


def _opposed_along_the_step(tracker: OpposingSignalTracker, report: OpposingReport) -> bool:
    """Whether the slopes of both groups have opposite signs along the step that all examples take together."""
    from netwright.diagnose import gradient_opposition
    from netwright.diagnose.opposing_signals.opposition import mean_gradient

    up, down = (tracker.examples(group) for group in (report.groups.up, report.groups.down))
    with tracker.parameters_of(report.step):
        step = mean_gradient(tracker.model, squared_error, tracker.x, tracker.y)
        return gradient_opposition(tracker.model, squared_error, up, down, step) < 0


def watch(seed: int, data: str, images: int, lr: float, steps: int) -> dict[str, Any]:
    """The groups at the spikes of one training."""
    from netwright.diagnose import replay_step

    x, y = one_hot_problem(data, seed, images)
    tracker, sharp, means = _descend(seed, x, y, WIDTHS[data], lr, steps, KEPT)
    every = {"first loss": means[0], "last loss": means[-1], "last sharpness": sharp[max(sharp)]}
    every |= _first_quarter_too(tracker)
    spikes = _late_spikes(tracker, steps)
    if not spikes:
        return {**every, **dict.fromkeys(_COUNTS, 0.0), **dict.fromkeys(_OF_A_SPIKE)}
    reports = [tracker.report(step) for step in spikes]
    top = reports[0]
    delta = tracker.deltas()[tracker.delta_steps.index(top.step)].abs()
    most = max(1, round(0.01 * len(delta)))
    near = [value for step, value in sharp.items() if abs(step - top.step) <= SHARPNESS_EVERY]
    half = replay_step(tracker, top.groups, lr)
    return {
        **every,
        **_pair_alone(tracker, top, lr),
        "spikes": float(len(spikes)),
        "spikes opposed": float(sum(report.pair.slope_product < 0 for report in reports)),
        "spikes opposed along the step": float(sum(_opposed_along_the_step(tracker, report) for report in reports)),
        "oscillation": top.pair.oscillation,
        "oscillation, random": top.random.oscillation,
        "oscillation, same losses": top.matched.oscillation,
        "loss": top.pair.loss,
        "loss, same losses": top.matched.loss,
        "gradient cosine": top.pair.gradient_cosine,
        "gradient cosine, random": top.random.gradient_cosine,
        "share over even": float(delta.topk(most).values.sum() / delta.sum()) / (most / len(delta)),
        "sharpness over limit": statistics.median([*near, top.sharpness]) * lr / 2,
        "rise with the whole step": (half.up[0] + half.down[0]) / 2,
        "rise with half a step": (half.up[1] + half.down[1]) / 2,
        "alternation": top.alternation,
        "persistence": top.persistence,
        "step": float(top.step),
        "labels": [{str(label): count for label, count in table.items()} for table in top.groups.labels],
    }


_CORRELATIONS = ("oscillation", "oscillation, random", "oscillation, same losses")
_COUNTS = ("spikes", "spikes opposed", "spikes opposed along the step")
_OF_A_SPIKE = (
    *_CORRELATIONS, "share over even", "sharpness over limit", "rise with half a step", "oscillation, pair alone",
)  # fmt: skip


def _swept(network: nn.Module, x: Tensor, chosen: Tensor) -> dict[str, float]:
    """Mean outputs of the planted classes and of the others while the patch is turned up on images without it."""
    import torch

    from netwright.diagnose import feature_sweep

    plain = torch.ones(len(x), dtype=torch.bool)
    plain[chosen] = False
    direction = torch.zeros_like(x[0])
    direction[:, :PATCH, :PATCH] = x[chosen, 0, 0, 0].mean() - x[plain].min()
    outputs = feature_sweep(network, x[plain][:SWEPT], direction, SCALES)
    known = torch.zeros(outputs.shape[-1], dtype=torch.bool)
    known[list(PLANTED_CLASSES)] = True
    return {
        f"output, {told}, patch times {scale:g}": float(each[:, mask].mean())
        for scale, each in zip(SCALES, outputs, strict=True)
        for told, mask in (("planted classes", known), ("other classes", ~known))
    }


def _fitted(network: nn.Module, x: Tensor, y: Tensor, chosen: Tensor) -> dict[str, float]:
    """Mean loss and share of right answers of the planted examples and of the others."""
    import torch

    with torch.no_grad():
        outputs = network(x)
    losses, right = squared_error(outputs, y), outputs.argmax(1) == y.argmax(1)
    own = torch.zeros(len(x), dtype=torch.bool)
    own[chosen] = True
    return {
        f"{told}, {whose}": float(values.float()[mask].mean())
        for told, values in (("loss", losses), ("right", right))
        for whose, mask in (("planted", own), ("others", ~own))
    }


def find_planted(seed: int, images: int, lr: float, steps: int) -> dict[str, Any]:
    """How many of the examples in the groups at the spikes are planted ones."""
    x, y, chosen = planted(seed, images)
    tracker, _, _ = _descend(seed, x, y, WIDTHS["fashion-mnist"], lr, steps, KEPT)
    learned = _swept(tracker.model, x, chosen) | _fitted(tracker.model, x, y, chosen)
    spikes = _late_spikes(tracker, steps)
    if not spikes:
        return {"precision": None, "spikes": 0.0, **learned}
    known = set(chosen.tolist())
    groups = [tracker.groups(step) for step in spikes]
    hits = [sum(one in known for one in (*each.up, *each.down)) / (2 * len(each.up)) for each in groups]
    deltas, rows = tracker.deltas().abs(), [tracker.delta_steps.index(step) for step in spikes]
    shares = [float(deltas[row][chosen].sum() / deltas[row].sum()) * images / len(chosen) for row in rows]
    return {"precision": mean(hits), "planted share over even": mean(shares), "spikes": float(len(spikes)), **learned}


def _kept(seed: int, images: int, kind: str) -> tuple[Tensor, Tensor]:
    """The planted set, whole, without the planted examples, or without as many others."""
    import torch

    from netwright.seeding import stream

    x, y, chosen = planted(seed, images)
    keep = torch.ones(len(x), dtype=torch.bool)
    if kind == REMOVALS[1]:
        keep[chosen] = False
    elif kind == REMOVALS[2]:
        others = torch.ones(len(x), dtype=torch.bool)
        others[chosen] = False
        candidates = others.nonzero().flatten()
        keep[candidates[torch.randperm(len(candidates), generator=stream(seed, "removed"))[: len(chosen)]]] = False
    return x[keep], y[keep]


def late_sharpness(seed: int, images: int, lr: float, steps: int, kind: str) -> dict[str, Any]:
    """Mean sharpness over the last fifth of a training, with and without some examples."""
    x, y = _kept(seed, images, kind)
    _, sharp, means = _descend(seed, x, y, WIDTHS["fashion-mnist"], lr, steps, 0)
    late = [value for step, value in sharp.items() if step >= 0.8 * steps]
    return {"late sharpness": mean(late), "late sharpness over limit": mean(late) * lr / 2, "last loss": means[-1]}


def remedy(seed: int, images: int, lr: float, steps: int, kind: str) -> dict[str, Any]:
    """How much a training at the edge of stability oscillates, as it is or with something against it."""
    import torch

    from netwright.diagnose import full_batch_descent

    x, y = _kept(seed, images, kind)
    network = perceptron(WIDTHS["fashion-mnist"], seed, norm=kind == "BatchNorm")
    optimizer = torch.optim.SGD(network.parameters(), lr)
    before = _clipped(network) if kind == "clipping" else None
    try:
        means = full_batch_descent(network, squared_error, (x, y), optimizer, steps, before=before)
    except FloatingPointError:
        return {"rise over loss": None, "rise": None, "last loss": None}
    return {**_rises(means), "last loss": means[-1]}


def _clipped(network: nn.Module) -> Callable[[int], None]:
    """Shortens a gradient to the median of all norms so far, a threshold that needs no tuning.

    Seetharaman et al., "AutoClip", 2020, arXiv:2007.14469.
    """
    from torch.nn.utils import clip_grad_norm_, get_total_norm

    norms: list[float] = []

    def before(step: int) -> None:
        slopes = [param.grad for param in network.parameters() if param.grad is not None]
        if slopes:
            norms.append(float(get_total_norm(slopes)))
            clip_grad_norm_(network.parameters(), statistics.median(norms))

    return before


def _rises(means: Sequence[float]) -> dict[str, float]:
    """How far the mean loss rises after the first quarter, in all: as it is, and over the loss before each rise."""
    late = list(itertools.pairwise(means[len(means) // 4 :]))
    rises = [(after - before, before) for before, after in late if after > before]
    return {"rise": sum(rise for rise, _ in rises), "rise over loss": sum(rise / loss for rise, loss in rises)}


def optimise(seed: int, name: str, lr: float, lr_large: float, images: int, steps: int) -> dict[str, Any]:
    """The final training loss of an optimiser on the planted images; None where it diverges."""
    from netwright.diagnose import full_batch_descent

    x, y, _ = planted(seed, images)
    network = perceptron(WIDTHS["fashion-mnist"], seed)
    optimizer = _optimizer(name, network, lr, lr_large)
    try:
        means = full_batch_descent(network, squared_error, (x, y), optimizer, steps)
    except FloatingPointError:
        return {"training loss": None, "rise over loss": None, "learning rate": lr}
    rises = sum(later > before for before, later in itertools.pairwise(means))
    rates = {"learning rate": lr, "large step": lr_large}
    return {"training loss": mean(means[-10:]), "rising steps": rises, **_rises(means), **rates}


def _optimizer(name: str, network: nn.Module, lr: float, lr_large: float) -> torch.optim.Optimizer:
    import torch

    from netwright.train import SplitSGD

    params = network.parameters()
    if name == "Adam":
        return torch.optim.Adam(params, lr)
    if name == "SGD":
        return torch.optim.SGD(params, lr, momentum=0.9, dampening=0.9)
    return SplitSGD(params, lr, lr_large, momentum=0.9, quantile=0.9)
