"""From a region of one layer to a region of the next: which numbers vary there, how far, and in what steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netwright.console import nearest
from netwright.seeding import stream
from netwright.verify.bounds import analyse
from netwright.verify.deadline import check_deadline
from netwright.verify.network import Network
from netwright.verify.region import Region, axis_moves, diagonal_moves

Selector = Literal["activation", "gradient", "random"]
SELECTORS = ("activation", "gradient", "random")
FLOOR = 1e-6  # of the range of a layer: the smallest span
MOST_DIAGONAL = 7  # dimensions up to which all 3^d - 1 moves are made
ENUMERATED = 20_000  # grid points up to which the reach is that of the points, not of the box
AT_ONCE = 2**20  # numbers of the larger of two layers in a batch of points


def ranking(
    network: Network, alpha: Float[Tensor, " numbers"], layer: int, selector: Selector, label: int, seed: int = 0
) -> list[int]:
    """The numbers of an activation, the most promising first.

    Args:
        network: The network.
        alpha: The activation.
        layer: Where it stands.
        selector: ``"activation"``: furthest from the layer's mean; ``"gradient"``: largest derivative of the margin;
            ``"random"``.
        label: The class whose margin counts.
        seed: Of the random order.

    Raises:
        ValueError: If the selector is unknown.
    """
    if selector not in SELECTORS:
        raise ValueError(
            f"selector must be one of {', '.join(SELECTORS)}, got {selector!r}: {nearest(selector, SELECTORS)}"
        )
    if selector == "random":
        return torch.randperm(alpha.numel(), generator=stream(seed, "dims")).tolist()
    away = alpha - alpha.mean()
    score = network.gradient(alpha, layer, label).abs() if selector == "gradient" else away.abs()
    return score.argsort(descending=True, stable=True).tolist()


def condense(
    weight: Float[Tensor, "outputs inputs"], span: Sequence[float], steps: Sequence[int]
) -> tuple[Float[Tensor, " outputs"], Float[Tensor, " outputs"]]:
    """Spans and steps behind one affine layer: the smallest change that one move makes there, and the reach over it.

    Args:
        weight: Columns of the inputs that vary, at most 12.
        span: Of each.
        steps: Of each.

    Returns:
        Per output the smallest non-zero |sum_l t_l s_l w_l|, t_l in {-1, 0, 1}, and the reach sum_l s_l m_l |w_l| over
        it, rounded up; 0 and 0 where nothing moves.

    Example:
        >>> condense(torch.tensor([[2.0, -1.0]]), (1, 1), (1, 1))
        (tensor([1.]), tensor([3.]))
    """
    if weight.shape[1] > 12:
        raise ValueError(f"weight must have at most 12 columns, got {weight.shape[1]}")
    scaled = weight * torch.as_tensor(span, dtype=weight.dtype)
    moves = torch.tensor(list(diagonal_moves(weight.shape[1])), dtype=weight.dtype)
    changes = (scaled @ moves.T).abs()
    tiny = FLOOR * scaled.abs().amax(1, keepdim=True)
    smallest = changes.masked_fill(changes <= tiny, math.inf).amin(1)
    smallest = torch.where(smallest.isfinite(), smallest, 0)
    return smallest, stretch(weight, span, steps, smallest)


def stretch(
    weight: Float[Tensor, "outputs inputs"],
    span: Sequence[float],
    steps: Sequence[int],
    new_span: Float[Tensor, " outputs"],
) -> Float[Tensor, " outputs"]:
    """Steps of given spans behind one affine layer, so that they cover all that the inputs reach.

    Example:
        >>> stretch(torch.tensor([[2.0, -1.0]]), (1, 1), (1, 1), torch.tensor([1.0]))
        tensor([3.])
    """
    reach = weight.abs() @ (torch.as_tensor(span, dtype=weight.dtype) * torch.as_tensor(steps, dtype=weight.dtype))
    return torch.where(new_span > 0, (reach / new_span - 1e-9).ceil(), 0)


@dataclasses.dataclass(frozen=True)
class Mapped:
    """A region behind one more layer.

    Attributes:
        region: The region there; None where nothing that was chosen moves.
        covers: Whether it holds all that the earlier region is mapped to.
    """

    region: Region | None
    covers: bool


def map_region(
    network: Network,
    alpha: Float[Tensor, " numbers"],
    region: Region,
    n_dims: int,
    selector: Selector,
    label: int,
    *,
    max_steps: int | None = 2,
    seed: int = 0,
    deadline: float = math.inf,
) -> Mapped:
    """The region of the next layer that a region is mapped to.

    The span of a number is the smallest change that one move of the old region makes to it, its steps reach as far as
    any point does, m = ceil(reach / span): the points of the grid where there are few, else the box by interval
    arithmetic. Where that takes more than ``max_steps``, the span grows.

    Args:
        network: The network.
        alpha: The activation in the middle of ``region``.
        region: The old one.
        n_dims: Most numbers that vary.
        selector: Which, of those that move.
        label: The class, for the selector.
        max_steps: Most steps to one side; None for any number.
        seed: Of a random choice.
        deadline: Of ``time.monotonic()``.

    Raises:
        TimeoutError: If the time is over.
    """
    layer = region.layer + 1
    flat = alpha.double().flatten()
    middle = network.forward(flat[None], region.layer, layer)[0]
    moves = diagonal_moves if len(region.dims) <= MOST_DIAGONAL else axis_moves
    one = torch.tensor(list(moves(len(region.dims))))
    one = one[region.kept(one, flat)]
    floor = FLOOR * float(middle.max() - middle.min()) or FLOOR
    smallest = torch.full_like(middle, math.inf)
    for change in _changes(network, flat, region, one, middle, deadline):
        smallest = torch.minimum(smallest, change.masked_fill(change <= floor, math.inf).amin(0))
    analysis = analyse(network, *region.box(flat), first=region.layer, last=layer, forms=False, deadline=deadline)
    box = torch.maximum(analysis.layers[-1].high.flatten() - middle, middle - analysis.layers[-1].low.flatten())
    reach = box
    if region.count <= ENUMERATED:
        steps = region.grid()
        reach = torch.zeros_like(middle)
        for change in _changes(network, flat, region, steps[region.kept(steps, flat)], middle, deadline):
            reach = torch.maximum(reach, change.amax(0))
    moving = set((reach > floor).nonzero().flatten().tolist())
    chosen = [i for i in ranking(network, middle, layer, selector, label, seed) if i in moving][:n_dims]
    if not chosen:
        return Mapped(None, not moving)
    places = torch.tensor(chosen)
    far = reach[places]
    span = torch.minimum(smallest[places], far).clamp(min=floor)
    steps = (far / span - 1e-9).ceil().clamp(min=1)
    if max_steps is not None:
        span = torch.where(steps > max_steps, far / max_steps, span)
        steps = steps.clamp(max=max_steps)
    steps = steps.int()
    covers = set((box > floor).nonzero().flatten().tolist()) <= set(chosen)
    covers = covers and bool((span * steps >= box[places] - floor).all())
    return Mapped(Region(tuple(chosen), tuple(span.tolist()), tuple(steps.tolist()), layer=layer), covers)


def _changes(
    network: Network,
    alpha: Tensor,
    region: Region,
    steps: Int[Tensor, "points dims"],
    middle: Tensor,
    deadline: float,
) -> Iterator[Float[Tensor, "points numbers"]]:
    """How much points of a region change the next layer, batch by batch."""
    widest = max(alpha.numel(), middle.numel())
    for part in steps.split(max(1, AT_ONCE // widest)):
        check_deadline(deadline)
        points = region.points(part, alpha)
        yield (network.forward(points, region.layer, region.layer + 1) - middle).abs()
