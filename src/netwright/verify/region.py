"""Which points around an activation are looked at, and the moves between them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Norm = Literal[1, 2, "inf"]


@dataclasses.dataclass(frozen=True)
class Region:
    """Some numbers of a layer vary around an activation, each by j steps of its span, j = -steps..steps.

    As a box (the exact engine) the numbers vary freely between the outermost steps.

    Args:
        dims: Which numbers of the flat activation vary.
        span: Length of a step, > 0: one for all, or one each.
        steps: How many to each side, >= 1: one for all, or one each.
        layer: Of the activation; 0 is the input.
        norm: Keeps points with this norm of the change at most ``radius``: 1, 2 or ``"inf"``; None keeps all.
        radius: For ``norm``, > 0.
        bounds: Points with a number outside are left out; a box is cut off there.

    Raises:
        ValueError: If a number is out of its range, dims repeat, or norm and radius are not given together.

    Example:
        >>> Region(dims=(0, 3), span=0.1, steps=2).count
        25
    """

    dims: tuple[int, ...]
    span: float | tuple[float, ...]
    steps: int | tuple[int, ...] = 1
    layer: int = 0
    norm: Norm | None = None
    radius: float | None = None
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(int(d) for d in self.dims))
        if not self.dims:
            raise ValueError("dims must name at least 1 number, got none")
        if min(self.dims) < 0 or len(set(self.dims)) < len(self.dims):
            raise ValueError(f"dims must be different numbers >= 0, got {_short(self.dims)}")
        for name, lowest in (("span", 0.0), ("steps", 1)):
            value = getattr(self, name)
            each = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(self.dims)
            if len(each) != len(self.dims):
                raise ValueError(f"{name} must be 1 number or {len(self.dims)}, as dims are, got {len(each)}")
            for number in each:
                if not math.isfinite(number) or number < lowest or (name == "span" and number == 0):
                    raise ValueError(f"{name} must be {'> 0' if name == 'span' else '>= 1'} and finite, got {number}")
                if name == "steps" and number != int(number):
                    raise ValueError(f"steps must be whole numbers, got {number}")
            object.__setattr__(self, name, each if name == "span" else tuple(map(int, each)))
        if self.layer < 0:
            raise ValueError(f"layer must be >= 0, got {self.layer}")
        if self.norm not in (None, 1, 2, "inf"):
            raise ValueError(f'norm must be None, 1, 2 or "inf", got {self.norm!r}')
        if (self.norm is None) != (self.radius is None):
            raise ValueError(f"norm and radius must be given together, got {self.norm!r} and {self.radius}")
        if self.radius is not None and not (self.radius > 0 and math.isfinite(self.radius)):
            raise ValueError(f"radius must be > 0 and finite, got {self.radius}")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds must be (low, high) with low < high, got {self.bounds}")

    @property
    def spans(self) -> Tensor:
        """The span of each dimension, (dims,)."""
        return torch.tensor(self.span, dtype=torch.float64)

    @property
    def limits(self) -> Int[Tensor, " dims"]:
        """The number of steps of each dimension."""
        return torch.tensor(self.steps)

    @property
    def count(self) -> int:
        """Points of the grid, prod(2 m + 1), before norm and bounds leave some out."""
        return math.prod((2 * self.limits + 1).tolist())

    def check(self, alpha: Tensor) -> None:
        """Refuses an activation that the region does not fit.

        Raises:
            ValueError: If a dimension lies outside, or the activation is not finite or outside the bounds.
        """
        if max(self.dims) >= alpha.numel():
            raise ValueError(f"dims must lie in 0..{alpha.numel() - 1}, got {max(self.dims)}")
        if not bool(alpha.isfinite().all()):
            raise ValueError("x must be finite, got a number that is not")
        if self.bounds is not None:
            check_within(alpha, self.bounds)

    def box(self, alpha: Float[Tensor, " numbers"]) -> tuple[Tensor, Tensor]:
        """Least and largest value of each number, cut off at the bounds."""
        flat = alpha.detach().double().flatten()
        low, high = flat.clone(), flat.clone()
        dims, reach = torch.tensor(self.dims), self.spans * self.limits
        if self.radius is not None:
            reach = reach.clamp(max=self.radius)
        low[dims], high[dims] = flat[dims] - reach, flat[dims] + reach
        if self.bounds is not None:
            low[dims], high[dims] = (bound[dims].clamp(*self.bounds) for bound in (low, high))
        return low, high

    def kept(self, steps: Int[Tensor, "points dims"], alpha: Float[Tensor, " numbers"]) -> Tensor:
        """Which points belong to the region, given as numbers of steps."""
        moved = steps * self.spans
        keep = (steps.abs() <= self.limits).all(1)
        if self.radius is not None:
            # A point at the radius itself belongs, whatever the last digit of its distance.
            keep &= size_of(moved, self.norm) <= self.radius * (1 + 1e-9)
        if self.bounds is not None:
            values = alpha.double().flatten()[torch.tensor(self.dims)] + moved
            slack = 1e-9 * max(abs(bound) for bound in self.bounds)
            keep &= ((values >= self.bounds[0] - slack) & (values <= self.bounds[1] + slack)).all(1)
        return keep

    def holds(self, values: Float[Tensor, " numbers"], alpha: Float[Tensor, " numbers"], slack: float = 1e-9) -> bool:
        """Whether an activation lies in the region, between the points of its grid too.

        Args:
            values: The activation, flat.
            alpha: That in the middle.
            slack: By how much it may miss bounds and radius.

        Example:
            >>> region = Region(dims=(0, 1), span=0.2, norm=1, radius=0.3)
            >>> middle = torch.zeros(3)
            >>> [region.holds(torch.tensor(v), middle) for v in ([0.1, 0.15, 0.0], [0.2, 0.2, 0.0], [0.0, 0.0, 0.1])]
            [True, False, False]
        """
        flat, middle = values.detach().double().flatten(), alpha.detach().double().flatten()
        low, high = self.box(middle)
        if bool(((flat < low - slack) | (flat > high + slack)).any()):
            return False
        return self.radius is None or float(size_of((flat - middle)[None], self.norm)) <= self.radius + slack

    def points(self, steps: Tensor, alpha: Float[Tensor, " numbers"]) -> Float[Tensor, "points numbers"]:
        """Activations of points given as numbers of steps, within the bounds to the last digit."""
        flat = alpha.detach().double().flatten()
        dims = torch.tensor(self.dims)
        found = flat.repeat(len(steps), 1)
        found[:, dims] += steps * self.spans
        if self.bounds is not None:
            found[:, dims] = found[:, dims].clamp(*self.bounds)
        return found

    def grid(self, low: Sequence[int] | None = None, high: Sequence[int] | None = None) -> Int[Tensor, "points dims"]:
        """All points of the grid, or of a part of it, as numbers of steps."""
        first = [-int(m) for m in self.steps] if low is None else low  # type: ignore[union-attr]
        last = [int(m) for m in self.steps] if high is None else high  # type: ignore[union-attr]
        axes = [torch.arange(a, b + 1, dtype=torch.int32) for a, b in zip(first, last, strict=True)]
        return torch.cartesian_prod(*axes).reshape(-1, len(axes))


def check_within(x: Tensor, bounds: tuple[float, float]) -> None:
    """Refuses an activation with a number outside its bounds.

    Raises:
        ValueError: If there is one.
    """
    low, high = float(x.min()), float(x.max())
    if low < bounds[0] or high > bounds[1]:
        raise ValueError(f"x must lie within bounds {bounds}, got {low:g}..{high:g}")


def short_count(count: int) -> str:
    """A number of points in a few characters, however large: floats and digits end before grids do.

    Example:
        >>> short_count(5**4), short_count(3**16), short_count(3**784), short_count(10**5000 - 1)
        ('625', '4.3e+07', '1.16e+374', '1e+5000')
    """
    if count < 10**6:
        return str(count)
    size = math.log10(count)
    exponent = math.floor(size)
    digits = round(10 ** (size - exponent), 2)
    if digits == 10:
        digits, exponent = 1.0, exponent + 1
    return f"{digits:g}e+{exponent:02d}"


def size_of(moved: Float[Tensor, "points dims"], norm: Norm | None) -> Float[Tensor, " points"]:
    """Length of each change; with no norm the Euclidean one.

    Example:
        >>> [float(size_of(torch.tensor([[3.0, -4.0]]), norm)) for norm in (1, 2, "inf", None)]
        [7.0, 5.0, 4.0, 5.0]
    """
    if norm == 1:
        return moved.abs().sum(1)
    if norm == "inf":
        return moved.abs().amax(1)
    return moved.square().sum(1).sqrt()


def diagonal_moves(dims: int) -> Iterator[tuple[int, ...]]:
    """Moves that change every dimension by -1, 0 or 1 step, but not all by 0: 3^dims - 1.

    Example:
        >>> len(list(diagonal_moves(3)))
        26
    """
    return (move for move in itertools.product((-1, 0, 1), repeat=dims) if any(move))


def axis_moves(dims: int) -> Iterator[tuple[int, ...]]:
    """Moves that change one dimension by a step: 2 dims. They reach the same points as the diagonal ones.

    Example:
        >>> list(axis_moves(2))
        [(1, 0), (-1, 0), (0, 1), (0, -1)]
    """
    return (tuple(sign * (i == j) for j in range(dims)) for i in range(dims) for sign in (1, -1))


def _short(values: Sequence[int]) -> str:
    shown = ", ".join(map(str, values[:8]))
    return shown + ", ..." * (len(values) > 8)
