"""The grid engine: every point of a discretised region, nearest first.

The nodes of a complete ladder tree are the grid points that moves reach inside the region, and a box or a ball around
its middle is reached whole. So the exhaustive search is the evaluation of prod(2 m_p + 1) points, which is done in
batches: of the first affine map only the d columns that vary are needed, z = z_0 + Delta A_d, and sub-boxes whose class
the bounds prove are left out. Batches run in float32; where the margin is within what float32 may be off anywhere in
the region, the network itself decides, in float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netwright.console import task
from netwright.deploy.graph.ir import IDENTITY, Activation, Affine, Channels, Conv, Linear, Node, Pad, Reshape
from netwright.deploy.graph.reference import activation, kernel_of
from netwright.verify.bounds import analyse, flat_margin
from netwright.verify.deadline import check_deadline
from netwright.verify.network import Network
from netwright.verify.region import Region, short_count, size_of
from netwright.verify.relaxation import Relaxation

Tail = Callable[[Float[Tensor, "batch numbers"]], Float[Tensor, "batch classes"]]
CHUNK = 2**18  # points whose distances are computed at once
LEAF = 4096  # points below which evaluating is cheaper than bounding


@dataclasses.dataclass(frozen=True)
class GridResult:
    """What became of a grid.

    Attributes:
        witness: The nearest point with another class, flat, in float64; None if there is none, or none in time.
        distance: Its distance, in the region's norm (Euclidean without one).
        n_points: Points that were evaluated.
        n_pruned: Points that bounds decided.
        finished: Whether every point was decided, or a witness found.
        whole_box: Whether bounds alone decided, and so everything between the points too.
    """

    witness: Tensor | None
    distance: float | None
    n_points: int
    n_pruned: int = 0
    finished: bool = True
    whole_box: bool = False


def other_class(logits: Float[Tensor, "batch classes"], label: int) -> Tensor:
    """Where a class does not win; of equal logits the first wins.

    Example:
        >>> other_class(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), 0)
        tensor([False,  True])
    """
    own = logits[:, label : label + 1]
    return (logits[:, :label] >= own).any(1) | (logits[:, label + 1 :] > own).any(1)


def grid_search(
    tail: Tail | Network,
    alpha: Float[Tensor, " numbers"],
    region: Region,
    batch: int = 8192,
    order: Literal["distance", "natural"] = "distance",
    *,
    label: int | None = None,
    max_points: int = 10**7,
    timeout: float = math.inf,
    prune: bool = True,
) -> GridResult:
    """Whether a point of the grid has another class, and which is the nearest.

    Args:
        tail: From activations (batch, numbers) to logits; a :class:`Network` is taken from ``region.layer`` on, which
            allows the short cuts.
        alpha: The activation in the middle.
        region: The grid.
        batch: Points evaluated at once; changes no verdict.
        order: ``"distance"`` finds the nearest counterexample, ``"natural"`` any.
        label: The class; that of ``alpha`` by default.
        max_points: Most points.
        timeout: Seconds, of which bounds take half at most.
        prune: Whether bounds may decide sub-boxes, where the tail is a network that they know.

    Raises:
        ValueError: If there are more points than ``max_points``, or the region does not fit.

    Example:
        >>> tail = lambda x: torch.cat([x, 1 - x], dim=1)
        >>> found = grid_search(tail, torch.tensor([0.8]), Region(dims=(0,), span=0.2, steps=2))
        >>> round(found.distance, 6), [round(v, 6) for v in found.witness.tolist()]
        (0.4, [0.4])
    """
    if batch < 1:
        raise ValueError(f"batch must be >= 1, got {batch}")
    if order not in ("distance", "natural"):
        raise ValueError(f'order must be "distance" or "natural", got {order!r}')
    flat = alpha.detach().double().flatten()
    region.check(flat)
    if region.count > max_points:
        told = short_count(region.count)
        raise ValueError(f"points must be <= {max_points} (max_points), got {told}: fewer dims or steps")
    start = time.monotonic()
    deadline = start + timeout
    exact = _exact(tail, region.layer)
    if label is None:
        label = int(exact(flat[None])[0].argmax())
    boxes, pruned = [([-int(m) for m in region.limits], region.limits.tolist())], 0
    if prune and isinstance(tail, Network) and tail.graph is not None and region.count > 1:
        boxes, pruned = _open_boxes(tail, flat, region, label, start + timeout / 2)
        if not boxes:
            return GridResult(None, None, 0, pruned, whole_box=True)
    close = _rounding(tail, flat, region, label) if isinstance(tail, Network) else None
    fast = _fast(tail, flat, region) if isinstance(tail, Network) and close is not None else None
    evaluated = 0
    with task("grid points", total=region.count - pruned) as bar, contextlib.suppress(TimeoutError):
        for steps in _ordered(region, flat, boxes, batch, order == "distance", deadline):
            check_deadline(deadline)
            places = torch.arange(len(steps))
            if fast is not None and close is not None:
                places = (~(flat_margin(fast(steps), label) > close)).nonzero().flatten()
            evaluated += len(steps)
            bar.advance(len(steps))
            if not len(places):
                continue
            points = region.points(steps[places], flat)
            changed = other_class(exact(points), label).nonzero().flatten()
            if len(changed):
                first = int(changed[0])
                moved = steps[places[first : first + 1]] * region.spans
                distance = float(size_of(moved, region.norm))
                return GridResult(points[first], distance, evaluated, pruned)
        return GridResult(None, None, evaluated, pruned)
    return GridResult(None, None, evaluated, pruned, finished=False)


def _exact(tail: Tail | Network, layer: int) -> Tail:
    if not isinstance(tail, Network):
        return lambda x: tail(x).double()
    return tail.logits if layer == 0 else lambda x: tail.forward(x, layer)


def _rounding(network: Network, alpha: Tensor, region: Region, label: int) -> float | None:
    """How far a margin may be off in float32 anywhere in the region; None where no bound is known."""
    if network.graph is None:
        return None
    try:
        analysis = analyse(network, *region.box(alpha), first=region.layer, forms=False)
    except TypeError:
        return None
    return float(analysis.margins(label)[1].max())


def _ordered(
    region: Region,
    alpha: Tensor,
    boxes: list[tuple[list[int], list[int]]],
    batch: int,
    by_distance: bool,
    deadline: float,
) -> Iterator[Int[Tensor, "points dims"]]:
    """Points in batches, put in order before the first one.

    Raises:
        TimeoutError: If the time is over before they are.
    """
    if not by_distance:
        for low, high in boxes:
            for steps in region.grid(low, high).split(batch):
                kept = steps[region.kept(steps, alpha)]
                if len(kept):
                    yield kept
        return
    parts, sizes = [], []
    for low, high in boxes:
        for steps in region.grid(low, high).split(CHUNK):
            check_deadline(deadline)
            kept = steps[region.kept(steps, alpha)]
            parts.append(kept.short() if max(region.steps) < 2**15 else kept)  # type: ignore[arg-type]
            sizes.append(size_of(kept * region.spans, region.norm))
    steps, distances = torch.cat(parts), torch.cat(sizes)
    # Equal distances, up to their last digit, in the order of the grid whatever the boxes were.
    order = _place(steps, region).argsort()
    yield from steps[order[distances[order].round(decimals=12).argsort(stable=True)]].split(batch)


def _place(steps: Tensor, region: Region) -> Int[Tensor, " points"]:
    """Of points in the grid, its last dimension running fastest."""
    place = torch.zeros(len(steps), dtype=torch.int64)
    for column, limit in zip(steps.T, region.limits.tolist(), strict=True):
        place = place * (2 * limit + 1) + column + limit
    return place


def _open_boxes(
    network: Network, alpha: Tensor, region: Region, label: int, deadline: float
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Parts of the grid whose class bounds do not prove, and how many points are in the others.

    Each part is bounded up to the first points of its neighbours, so that where all are proven nothing lies between.
    """
    limits, spans = region.limits.tolist(), region.spans.tolist()
    stack = [([-m for m in limits], list(limits))]
    found: list[tuple[list[int], list[int]]] = []
    pruned = 0
    while stack:
        low, high = stack.pop()
        count = math.prod(b - a + 1 for a, b in zip(low, high, strict=True))
        small = count <= LEAF and count < region.count
        if small or time.monotonic() > deadline:
            found.append((low, high))
            continue
        try:
            proven = _proven(network, alpha, region, low, high, label, deadline)
        except TimeoutError:
            proven = False
        except TypeError:
            return [([-m for m in limits], list(limits))], 0
        if proven:
            pruned += count
        elif count <= LEAF:
            found.append((low, high))
        else:
            longest = max(range(len(spans)), key=lambda i: (high[i] - low[i]) * spans[i])
            middle = (low[longest] + high[longest]) // 2
            for a, b in ((low[longest], middle), (middle + 1, high[longest])):
                stack.append(([*low[:longest], a, *low[longest + 1 :]], [*high[:longest], b, *high[longest + 1 :]]))
    return found, pruned


def _proven(
    network: Network,
    alpha: Tensor,
    region: Region,
    low: list[int],
    high: list[int],
    label: int,
    deadline: float,
) -> bool:
    dims, limits = torch.tensor(region.dims), region.limits
    below, above = alpha.clone(), alpha.clone()
    below[dims] += torch.tensor(low) * region.spans
    above[dims] += torch.minimum(torch.tensor(high) + 1, limits) * region.spans
    if region.bounds is not None:
        below[dims], above[dims] = (bound[dims].clamp(*region.bounds) for bound in (below, above))
    relaxation = Relaxation(network, below, above, first=region.layer, deadline=deadline)
    return bool((relaxation.margins(label)[0] > 0).all())


def _fast(network: Network, alpha: Tensor, region: Region) -> Callable[[Tensor], Tensor] | None:
    """Logits of points given as numbers of steps, in float32; None where the network begins with something else."""
    if network.graph is None:
        return None
    graph, start = network.graph, network.layer(region.layer)
    nodes = network.between(region.layer, len(network.layers) - 1)
    readers: dict[int, int] = {}
    for node in nodes:
        for value in node.inputs:
            readers[value] = readers.get(value, 0) + 1
    place = start.value
    shape = graph.shapes[place][1:]
    dims = torch.tensor(region.dims)
    middle = alpha.reshape(1, *shape)
    moves = torch.zeros(len(dims), alpha.numel(), dtype=torch.float64)
    moves[torch.arange(len(dims)), dims] = region.spans
    moves = moves.reshape(len(dims), *shape)
    act: Activation = IDENTITY
    count = 0
    for count, node in enumerate(nodes, start=1):
        op = node.op
        if node.inputs != [place] or readers[place] > 1 or not isinstance(op, (*_MOVERS, Conv, Linear, Affine)):
            return None
        act = getattr(op, "act", IDENTITY)
        middle, moves = _linear(node, middle, moves, graph.shapes[node.output])
        place = node.output
        if not isinstance(op, _MOVERS) or count == len(nodes):
            break
    rest, begin, after = nodes[count:], middle.float(), graph.shapes[place][1:]
    columns, bend, output = moves.flatten(1).float(), activation(act), network.layers[-1].value

    def run(steps: Tensor) -> Tensor:
        z = begin + (steps.float() @ columns).reshape(len(steps), *after)
        values = {place: bend(z)}
        with torch.no_grad():
            for node in rest:
                shape = (len(steps), *graph.shapes[node.output][1:])
                kernel = kernel_of(node.op, shape, dtype=torch.float32)
                values[node.output] = kernel(*(values[v] for v in node.inputs))
        return values[output].flatten(1)

    return run


_MOVERS = (Reshape, Channels, Pad)


def _linear(node: Node, middle: Tensor, moves: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The middle and the moves behind an affine operation, its activation left out."""
    op = node.op
    if isinstance(op, _MOVERS):
        first, second = (kernel_of(op, (len(x), *shape[1:]), dtype=torch.float64)(x) for x in (middle, moves))
        return first, second
    assert isinstance(op, (Conv, Linear, Affine))
    zero = {"shift": 0 * op.shift} if isinstance(op, Affine) else {"bias": None}
    plain, still = dataclasses.replace(op, act=IDENTITY), dataclasses.replace(op, act=IDENTITY, **zero)
    return kernel_of(plain, shape, dtype=torch.float64)(middle), kernel_of(still, shape, dtype=torch.float64)(moves)
