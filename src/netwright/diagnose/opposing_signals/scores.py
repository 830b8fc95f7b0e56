"""Groups of examples whose losses move most, and how far two groups oppose each other.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163. With the loss l_i^t of example i before step t,

    Delta_i^t = l_i^(t+1) - l_i^t,    up = the k largest Delta_i^t,    down = the k most negative ones,
    rho(A, B) = Pearson correlation over t of mean_A Delta^t and mean_B Delta^t

which is near -1 for groups that pull a parameter to opposite sides, and positive for groups that just go along.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netwright.checks import one_of

FEWEST = 5  # in a group
NEAR = 10  # of how many examples of the nearest loss each way a matched one is drawn
Kind = Literal["spike", "rise", "largest"]
Members = Sequence[int] | Int[Tensor, " members"]
Pairs = Int[Tensor, "pairs two members"]


def group_size(examples: int, k: float = 0.01) -> int:
    """How many examples are in a group: a share k of all, at least 5.

    Raises:
        ValueError: If ``k`` is not in (0, 0.5], or there are not twice as many examples.

    Example:
        >>> group_size(2000, 0.01), group_size(100, 0.01)
        (20, 5)
    """
    if not 0 < k <= 0.5:
        raise ValueError(f"k must lie in (0, 0.5], as a share of the examples, got {k}")
    size = min(max(FEWEST, round(k * examples)), max(FEWEST, examples // 2))
    if examples < 2 * size:
        raise ValueError(f"the probe must hold at least {2 * size} examples, for two groups of {size}, got {examples}")
    return size


def largest_changes(
    delta: Float[Tensor, " examples"], size: int
) -> tuple[Int[Tensor, " members"], Int[Tensor, " members"]]:
    """The examples whose loss rose most, and those whose loss fell most, in that order; of equal ones the first.

    Example:
        >>> largest_changes(torch.tensor([0.0, 2.0, -1.0, 2.0, -3.0]), 2)
        (tensor([1, 3]), tensor([4, 2]))
    """
    return delta.argsort(descending=True, stable=True)[:size], delta.argsort(stable=True)[:size]


def correlation(a: Float[Tensor, "steps ..."], b: Float[Tensor, "steps ..."]) -> Float[Tensor, "..."]:
    """Pearson's correlation along the first axis, in [-1, 1]; NaN where a side is constant.

    Example:
        >>> correlation(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([-1.0, 2.0, -3.0]))
        tensor(-1., dtype=torch.float64)
    """
    sides = [(side - side.mean(0)) for side in (a.double(), b.double())]
    norms = [side.square().sum(0).sqrt() for side in sides]
    below = norms[0] * norms[1]
    known = below > 0
    found = (sides[0] * sides[1]).sum(0) / torch.where(known, below, 1.0)
    return torch.where(known, found.clamp(-1, 1), math.nan)


def oscillation_score(
    deltas: Float[Tensor, "steps examples"], a: Members, b: Members, window: slice | Sequence[int] | None = None
) -> float:
    """rho of two groups: the correlation of their mean loss changes over a window of steps.

    Args:
        deltas: Loss changes.
        a: Examples of one group.
        b: Of the other.
        window: Rows of ``deltas``; all when None.

    Returns:
        In [-1, 1], near -1 for opposing groups; NaN where a group's mean does not change.

    Raises:
        ValueError: If a group is empty, or fewer than 2 steps are left.

    Example:
        >>> deltas = torch.tensor([[1.0, -1.0, 1.0], [-2.0, 2.0, -1.0], [3.0, -3.0, 2.0]])
        >>> oscillation_score(deltas, [0], [1]), oscillation_score(deltas, [0], [0, 2]) > 0.9
        (-1.0, True)
    """
    rows = deltas if window is None else deltas[window]
    groups = [torch.as_tensor(group, dtype=torch.int64) for group in (a, b)]
    if not all(len(group) for group in groups):
        raise ValueError("groups must hold at least 1 example each, got an empty one")
    if len(rows) < 2:
        raise ValueError(f"deltas must hold at least 2 steps in the window, got {len(rows)}")
    first, second = (rows[:, group].double().mean(1) for group in groups)
    return float(correlation(first, second))


def oscillations(deltas: Float[Tensor, "steps examples"], pairs: Pairs) -> Float[Tensor, " pairs"]:
    """rho of many pairs of groups.

    Example:
        >>> oscillations(torch.tensor([[1.0, -1.0], [-2.0, 2.0]]), torch.tensor([[[0], [1]], [[0], [0]]]))
        tensor([-1.,  1.], dtype=torch.float64)
    """
    means = deltas[:, pairs].double().mean(-1)
    return correlation(means[..., 0], means[..., 1])


def outsized_share(delta: Float[Tensor, "... examples"], members: Members) -> float:
    """The share of all loss changes, by absolute value, that some examples have; |members| / n would be their due.

    Example:
        >>> outsized_share(torch.tensor([3.0, -4.0, 2.0, -1.0]), [0, 1])
        0.7
    """
    size = delta.double().abs()
    total = float(size.sum())
    return float(size[..., torch.as_tensor(members)].sum()) / total if total else math.nan


def jaccard(a: Members, b: Members) -> float:
    """How far two sets overlap, in [0, 1]: what is in both over what is in one of them.

    Example:
        >>> jaccard([1, 2, 3], [2, 3, 4])
        0.5
    """
    first, second = (set(torch.as_tensor(group).tolist()) for group in (a, b))
    return len(first & second) / len(first | second) if first | second else math.nan


def random_pairs(examples: int, size: int, draws: int, generator: torch.Generator) -> Pairs:
    """Pairs of disjoint groups of any examples."""
    order = torch.rand(draws, examples, generator=generator).argsort(1)
    return order[:, : 2 * size].unflatten(1, (2, size))


def matched_pairs(
    losses: Float[Tensor, " examples"],
    pair: tuple[Members, Members],
    draws: int,
    generator: torch.Generator,
) -> Pairs:
    """Pairs of disjoint groups of other examples that have about the losses of a given pair.

    For each member an example is drawn whose loss is near in rank, no example twice in a pair of groups. None when
    there are too few other examples.
    """
    first, second = (torch.as_tensor(group, dtype=torch.int64) for group in pair)
    members = torch.cat([first, second])
    other = torch.ones(len(losses), dtype=torch.bool)
    other[members] = False
    candidates = other.nonzero().flatten()
    count = len(members)
    if len(candidates) < count:
        return torch.empty(0, 2, len(first), dtype=torch.int64)
    candidates = candidates[losses[candidates].argsort(stable=True)]
    place = torch.searchsorted(losses[candidates].contiguous(), losses[members].contiguous())
    reach = max(NEAR, count)
    drawn = place + torch.randint(-reach, reach + 1, (draws, count), generator=generator)
    # Where one is drawn twice the later one moves on to the next free; sorted, that is a running maximum.
    sorted_, member = drawn.clamp(0, len(candidates) - 1).sort(dim=1, stable=True)
    steps = torch.arange(count)
    free = (sorted_ - steps).cummax(1).values + steps
    free = torch.minimum(free, len(candidates) - count + steps)
    chosen = torch.empty_like(free).scatter_(1, member, free)
    return candidates[chosen].unflatten(1, (2, len(first)))


def interesting_steps(
    losses: Float[Tensor, " steps"], deltas: Float[Tensor, "steps examples"], kind: Kind
) -> list[int]:
    """Rows of loss changes that are worth a look.

    Args:
        losses: Mean loss before and after each row, one more than rows.
        deltas: Loss changes.
        kind: ``"spike"``: the last rise before a local maximum of the mean loss; ``"rise"``: every rise; ``"largest"``:
            the one row with the largest sum of absolute changes.

    Raises:
        ValueError: If ``kind`` is unknown.

    Example:
        >>> mean = torch.tensor([3.0, 1.0, 2.0, 2.5, 1.0])
        >>> [interesting_steps(mean, mean.diff()[:, None], kind) for kind in ("spike", "rise", "largest")]
        [[2], [1, 2], [0]]
    """
    one_of("kind", kind, get_args(Kind))
    if not len(deltas):
        return []
    if kind == "largest":
        return [int(deltas.abs().sum(1).argmax())]
    rises = losses.diff() > 0
    if kind == "spike":
        rises = rises & torch.cat([~rises[1:], torch.tensor([False])])
    return [int(row) for row in rises.nonzero().flatten()]


def interest(delta: Float[Tensor, " examples"]) -> tuple[bool, float]:
    """What makes one step more interesting than another: a rise of the mean loss before any fall, then its size.

    Example:
        >>> interest(torch.tensor([2.0, -1.0])) > interest(torch.tensor([-9.0, 1.0]))
        True
    """
    rise = float(delta.double().mean())
    return (True, rise) if rise > 0 else (False, float(delta.double().abs().sum()))


def alternation(deltas: Float[Tensor, "steps examples"], steps: Sequence[int], span: int, size: int) -> float:
    """How far what rises most in a step is what falls most in the next one, and the other way round, in [0, 1].

    Args:
        deltas: Loss changes.
        steps: The step of each row; rows that are ``span`` apart are neighbours.
        span: Steps between neighbours.
        size: Examples in a group.

    Returns:
        Mean overlap (Jaccard) over neighbours; NaN where there are none.

    Example:
        >>> alternation(torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]]), steps=[4, 5], span=1, size=1)
        1.0
    """
    sets = [largest_changes(delta, size) for delta in deltas]
    found = [
        (jaccard(up, next_down) + jaccard(down, next_up)) / 2
        for ((up, down), (next_up, next_down)), (a, b) in zip(
            itertools.pairwise(sets), itertools.pairwise(steps), strict=True
        )
        if b - a == span
    ]
    return sum(found) / len(found) if found else math.nan


def persistence(deltas: Float[Tensor, "spikes examples"], size: int) -> float:
    """How far the groups of one spike are those of the next, up and down together, in [0, 1].

    Returns:
        Mean overlap (Jaccard) over successive spikes; NaN for fewer than two.

    Example:
        >>> persistence(torch.tensor([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]]), size=1)
        1.0
    """
    sets = [torch.cat(largest_changes(delta, size)) for delta in deltas]
    found = [jaccard(a, b) for a, b in itertools.pairwise(sets)]
    return sum(found) / len(found) if found else math.nan
