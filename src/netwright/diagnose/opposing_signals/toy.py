"""A linear model with two opposing groups, in which progressive sharpening and the edge of stability can be computed.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163. Inputs carry a signal x_s ~ N(0, I), on which the label beta . x_s + sqrt(alpha) depends, and a
large feature of strength sqrt(alpha) and random sign, on which it does not. A network c (w . x_s + u +-sqrt(alpha))
has on the groups of either sign, with beta along w,

    L_+- = (c w - beta)^2 / 2 + (alpha / 2) (1 -+ c u)^2,    L = (L_+ + L_-) / 2

whose best u is 0: a valley, of curvature alpha c^2. Learning the signal makes c^2 grow to beta, and the valley sharp:
progressive sharpening. Where alpha c^2 passes 2 / eta, u changes its sign every step and grows, the groups' losses
alternate, and the growing u pulls c back.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class ToyHistory(Result):
    """A run of gradient descent on the toy model; one entry before each step and one after the last.

    Attributes:
        c: The second layer.
        w: The first layer on the signal.
        u: The first layer on the opposing feature.
        L_plus: Loss of the group whose feature is positive.
        L_minus: Of the other.
        curvature: alpha c^2, the second derivative of the loss along u.
        limit: 2 / eta, above which u grows.
        diverged: Whether a number overflowed; the entries end before it.
    """

    c: tuple[float, ...]
    w: tuple[float, ...]
    u: tuple[float, ...]
    L_plus: tuple[float, ...]
    L_minus: tuple[float, ...]
    curvature: tuple[float, ...]
    limit: float
    diverged: bool

    @property
    def peak(self) -> float:
        """The largest |u|."""
        return max(map(abs, self.u))

    def __str__(self) -> str:
        end = "diverged" if self.diverged else f"curvature ends at {self.curvature[-1]:.3g}"
        return f"{len(self.c) - 1} steps: largest |u| {self.peak:.3g}, {end} (limit {self.limit:.3g})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Losses of both groups, and the curvature over its limit."""
        ax = new_axes(ax)
        ax.plot(self.L_plus, label="group +")
        ax.plot(self.L_minus, label="group \N{MINUS SIGN}")
        ax.plot([value / self.limit for value in self.curvature], label="curvature / limit")
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.legend()
        return ax


def opposing_toy(
    alpha: float, beta: float, eta: float, steps: int, c0: float = 0.05, u0: float = 1e-3, *, w0: float = 0.0
) -> ToyHistory:
    """Gradient descent on the toy model.

    Args:
        alpha: Squared strength of the opposing feature, > 0.
        beta: The signal to learn, > 0.
        eta: Step size, > 0.
        steps: At least 1.
        c0: The second layer at the start.
        u0: The first layer on the opposing feature at the start.
        w0: The first layer on the signal at the start.

    Raises:
        ValueError: If a number is out of its range or not finite.

    Example:
        >>> print(opposing_toy(10, 4, eta=0.05, steps=400))     # 2 / eta = 40 = alpha beta
        400 steps: largest |u| 0.001, curvature ends at 40 (limit 40)
        >>> print(opposing_toy(10, 4, eta=0.055, steps=400))
        400 steps: largest |u| 0.17, curvature ends at 34.2 (limit 36.4)
    """
    for name, value in (("alpha", alpha), ("beta", beta), ("eta", eta)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be > 0 and finite, got {value}")
    for name, value in (("c0", c0), ("u0", u0), ("w0", w0)):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    c, w, u = float(c0), float(w0), float(u0)
    rows: list[tuple[float, ...]] = []
    diverged = False
    for _ in range(steps + 1):
        gap = c * w - beta
        plus, minus = (0.5 * gap * gap + alpha / 2 * (1 - sign * c * u) * (1 - sign * c * u) for sign in (1, -1))
        if not math.isfinite(plus + minus):
            diverged = True
            break
        rows.append((c, w, u, plus, minus, alpha * c * c))
        slope_c, slope_w, slope_u = gap * w + alpha * c * u * u, c * gap, alpha * c * c * u
        c, w, u = c - eta * slope_c, w - eta * slope_w, u - eta * slope_u
    names = ("c", "w", "u", "L_plus", "L_minus", "curvature")
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    return ToyHistory(**columns, limit=2 / eta, diverged=diverged)
