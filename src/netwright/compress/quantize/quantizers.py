"""Quantisers as parametrizations: the layer computes with rounded weights, the optimiser sees what is behind them.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668.

    uniform:         dL/dw = dL/dQ(w)                                  (straight through the rounding)
    differentiable:  dL/dp_j = sum over weights i of point j of  alpha_bucket(i) dL/dQ_i,    w fixed

Weights that are zero stay zero and take no part, so that a pruned network stays as sparse as it was.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.compress.quantize.scaling import (
    BucketScaler,
    check_bits,
    check_finite,
    check_points,
    least_error_ends,
    nearest,
    rounded,
)

Gradient = Literal["ste", "truncated", "exact"]
Start = Literal["quantiles", "uniform"]


class Quantizer(nn.Module):
    """What both quantisers share: buckets over the weights that are kept, levels, and which level a weight has.

    Args:
        bucket_size: Weights that share a scale, >= 1; None for one scale.
        kept: Where weights take part; elsewhere they are zero. None for all.
    """

    kept: Tensor | None

    def __init__(self, bucket_size: int | None, kept: Tensor | None):
        super().__init__()
        self.scaler = BucketScaler(bucket_size)
        self.register_buffer("kept", kept)

    def levels(self) -> Float[Tensor, "levels"]:
        """The levels, in units of a bucket's span above its minimum."""
        raise NotImplementedError

    def codes(self, weight: Tensor) -> tuple[Int[Tensor, "buckets size"], Tensor, Tensor]:
        """The number of the level of each weight that takes part, with spans and minima of the buckets."""
        raise NotImplementedError

    def taking_part(self, weight: Tensor) -> Tensor:
        """The weights that are quantised, in order."""
        return weight.flatten() if self.kept is None else weight[self.kept]

    def placed(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values of those weights, with zeros where none is kept."""
        flat = values.flatten()
        if self.kept is None:
            return flat[: math.prod(shape)].view(shape)
        flat = flat[: int(self.kept.sum())]
        return torch.zeros(shape, dtype=flat.dtype, device=flat.device).masked_scatter(self.kept, flat)


class UniformQuantizer(Quantizer):
    """Parametrization that rounds a tensor to 2^bits even levels, with a straight-through gradient.

    Args:
        bits: 1..16.
        bucket_size: Weights that share a scale, >= 1; None for one scale of the tensor.
        grad: ``"ste"`` passes the gradient as it is; ``"truncated"`` clamps weights to [-1, 1] and stops the gradient
            of those outside; ``"exact"`` adds the gradient that reaches a bucket's largest and least weight by its
            scale.
        stochastic: Round at random, without bias, in training mode.
        generator: Where that chance comes from; needed for it.
        kept: A boolean mask of the weights that take part, the others being zero; None for all.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> layer = nn.Linear(16, 4)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", UniformQuantizer(2))
        >>> len(layer.weight.unique()), len(layer.parametrizations.weight.original.unique())
        (4, 64)
    """

    ends: Tensor | None

    def __init__(
        self,
        bits: int = 4,
        bucket_size: int | None = 256,
        *,
        grad: Gradient = "ste",
        stochastic: bool = False,
        generator: torch.Generator | None = None,
        kept: Tensor | None = None,
    ):
        super().__init__(bucket_size, kept)
        one_of("grad", grad, get_args(Gradient))
        if stochastic and generator is None:
            raise ValueError("stochastic rounding needs a generator, got None")
        self.bits, self.grad, self.stochastic, self.generator = check_bits(bits), grad, stochastic, generator
        self.register_buffer("ends", None)

    def fit_ends_(self, weight: Float[Tensor, "*shape"]) -> None:
        """Lets the levels of each bucket begin and end where rounding this tensor has the least mean squared error.

        They stay there, in units of the bucket's span, when the tensor is trained on; without this call they reach from
        its least to its largest weight, as in the paper. Weights beyond them are rounded to the outermost level.

        Example:
            >>> quantizer, weight = UniformQuantizer(2), torch.linspace(-1, 1, 64)
            >>> before = (quantizer(weight) - weight).square().mean()
            >>> quantizer.fit_ends_(weight)
            >>> bool((quantizer(weight) - weight).square().mean() < 0.7 * before)
            True
        """
        u = self.scaler.scale(self.taking_part(self._clamped(weight.detach())))[0]
        self.ends = least_error_ends(u, self.bits)

    def levels(self) -> Float[Tensor, "levels"]:
        """j / (2^bits - 1)."""
        return torch.arange(2**self.bits, dtype=torch.float32) / (2**self.bits - 1)

    def codes(self, weight: Tensor) -> tuple[Int[Tensor, "buckets size"], Tensor, Tensor]:
        """The number of the level of each weight that takes part, with spans and minima of the buckets."""
        u, alpha, beta = self._scaled(self.taking_part(self._clamped(weight.detach())))
        return rounded(u, self.bits).long(), alpha, beta

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded weight."""
        v = self.taking_part(self._clamped(weight))
        u, alpha, beta = self._scaled(v if self.grad == "exact" else v.detach())
        level = rounded(u.detach(), self.bits, self.stochastic and self.training, self.generator)
        q = level / (2**self.bits - 1)
        # A value plus nothing: x - x is zero to the last bit, and has the gradient of x.
        if self.grad == "exact":
            return self.placed(alpha * (q + (u - u.detach())) + beta, weight.shape)
        values = (alpha * q + beta).flatten()[: v.numel()]
        return self.placed(values + (v - v.detach()), weight.shape)

    def _scaled(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Buckets in [0, 1] between the ends of their levels, with spans and minima of the levels."""
        u, alpha, beta = self.scaler.scale(v)
        if self.ends is None:
            return u, alpha, beta
        low, high = self.ends.to(alpha).split(1, 1)
        return ((u - low) / (high - low)).clamp(0, 1), alpha * (high - low), beta + alpha * low

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        ends = state_dict.get(f"{prefix}ends")  # a plain quantiser takes over what another was fitted to
        self.ends = None if ends is None else torch.empty_like(ends)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _clamped(self, weight: Tensor) -> Tensor:
        return weight.clamp(-1, 1) if self.grad == "truncated" else weight

    def extra_repr(self) -> str:
        """Bits and bucket size."""
        return f"bits={self.bits}, bucket_size={self.scaler.bucket_size}, grad={self.grad!r}"


class _AtPoints(torch.autograd.Function):
    """alpha p_a + beta, with the gradient of the points alone."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, chosen: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        ctx.save_for_backward(chosen, alpha)
        ctx.number = len(points)
        return alpha * points[chosen] + beta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        chosen, alpha = ctx.saved_tensors
        (grad,) = grads
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        total = torch.bincount(chosen.flatten(), (alpha * grad).flatten(), ctx.number)
        return total.to(grad), None, None, None


def start_points(points: int | Tensor, init: Start, u: Float[Tensor, "weights"]) -> Float[Tensor, "points"]:
    """Where learned points start.

    Args:
        points: How many, >= 2; or the points themselves, ascending.
        init: ``"quantiles"``, evenly spaced quantiles of ``u``; or ``"uniform"``, evenly spaced.
        u: Scaled weights.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> start_points(3, "quantiles", torch.tensor([0.0, 0.9, 0.1, 0.2, 1.0]))
        tensor([0.0000, 0.2000, 1.0000])
    """
    one_of("init", init, get_args(Start))
    if isinstance(points, Tensor):
        check_points(points)
        return points.detach().clone()
    if points < 2:
        raise ValueError(f"points must be at least 2 numbers, got {points}")
    even = torch.linspace(0, 1, points, dtype=u.dtype, device=u.device)
    if init == "uniform" or not u.numel():
        return even
    sizes = u.sort().values  # torch.quantile refuses more than 16 million
    place = even * (len(sizes) - 1)
    low = place.long().clamp(max=len(sizes) - 1)
    high = (low + 1).clamp(max=len(sizes) - 1)
    return sizes[low].lerp(sizes[high], place - low).sort().values  # rounding may have swapped equals


class LearnedPoints(Quantizer):
    """What quantisers share whose levels are parameters: keep the points sorted, by :meth:`sort_` after a step."""

    points: nn.Parameter

    def start(self, weight: Tensor, points: int | Tensor, init: Start) -> tuple[Tensor, Tensor, Tensor]:
        """Places the points for a tensor, and gives it in scaled form with spans and minima of the buckets."""
        weight = weight.detach()
        check_finite(weight, "weight")
        chosen = self.taking_part(weight)
        u, alpha, beta = self.scaler.scale(chosen)
        self.points = nn.Parameter(start_points(points, init, u.flatten()[: chosen.numel()]))
        return u, alpha, beta

    def levels(self) -> Float[Tensor, "levels"]:
        """The points."""
        return self.points.detach()

    @torch.no_grad()
    def sort_(self) -> None:
        """Brings the points into ascending order again."""
        self.points.copy_(self.points.sort().values)

    def extra_repr(self) -> str:
        """Number of points and bucket size."""
        return f"points={len(self.points)}, bucket_size={self.scaler.bucket_size}"


class DifferentiableQuantizer(LearnedPoints):
    """Parametrization that rounds a fixed tensor to points which are learned.

    The points are the parameter; the tensor is kept in scaled form. Which point a weight has follows the points in
    every forward pass, and counts as constant in the gradient.

    Args:
        weight: The tensor, finite; it does not change any more.
        points: How many, >= 2; or where to start, ascending.
        bucket_size: As for :class:`UniformQuantizer`.
        init: ``"quantiles"`` starts at evenly spaced quantiles of the scaled weights, ``"uniform"`` evenly spaced.
        kept: As for :class:`UniformQuantizer`.

    Raises:
        ValueError: If an argument is out of its range, or ``weight`` is not finite.

    Example:
        >>> layer = nn.Linear(16, 4)
        >>> quantizer = DifferentiableQuantizer(layer.weight, 4)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", quantizer)
        >>> layer(torch.ones(1, 16)).sum().backward()
        >>> quantizer.points.grad.shape, layer.parametrizations.weight.original.grad
        (torch.Size([4]), None)
    """

    u: Tensor
    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        weight: Float[Tensor, "*shape"],
        points: int | Tensor = 16,
        bucket_size: int | None = 256,
        *,
        init: Start = "quantiles",
        kept: Tensor | None = None,
    ):
        super().__init__(bucket_size, kept)
        for name, value in zip(("u", "alpha", "beta"), self.start(weight, points, init), strict=True):
            self.register_buffer(name, value)

    def codes(self, weight: Tensor) -> tuple[Int[Tensor, "buckets size"], Tensor, Tensor]:
        """The number of the point of each weight that takes part, with spans and minima of the buckets."""
        return nearest(self.u, self.points.detach()), self.alpha, self.beta

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight at its points; ``weight`` itself is not looked at."""
        chosen = nearest(self.u, self.points.detach())
        return self.placed(_AtPoints.apply(self.points, chosen, self.alpha, self.beta), weight.shape)


class NonuniformQuantizer(LearnedPoints):
    """Parametrization that rounds a tensor to points that are learned, while the tensor is trained too.

    Both gradients at once: that of the tensor goes straight through the rounding, that of the points is as for
    :class:`DifferentiableQuantizer`. Scales follow the tensor. With one of the two held still it is quantised
    distillation on uneven levels, or differentiable quantization.

    Args:
        weight: The tensor as it is now, finite; where points start depends on it.
        points: As for :class:`DifferentiableQuantizer`.
        bucket_size: As for :class:`UniformQuantizer`.
        init: As for :class:`DifferentiableQuantizer`.
        kept: As for :class:`UniformQuantizer`.

    Raises:
        ValueError: If an argument is out of its range, or ``weight`` is not finite.

    Example:
        >>> layer = nn.Linear(16, 4)
        >>> quantizer = NonuniformQuantizer(layer.weight, 4)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", quantizer)
        >>> layer(torch.ones(1, 16)).sum().backward()
        >>> quantizer.points.grad.shape, layer.parametrizations.weight.original.grad.shape
        (torch.Size([4]), torch.Size([4, 16]))
    """

    def __init__(
        self,
        weight: Float[Tensor, "*shape"],
        points: int | Tensor = 16,
        bucket_size: int | None = 256,
        *,
        init: Start = "quantiles",
        kept: Tensor | None = None,
    ):
        super().__init__(bucket_size, kept)
        self.start(weight, points, init)

    def codes(self, weight: Tensor) -> tuple[Int[Tensor, "buckets size"], Tensor, Tensor]:
        """The number of the point of each weight that takes part, with spans and minima of the buckets."""
        u, alpha, beta = self.scaler.scale(self.taking_part(weight.detach()))
        return nearest(u, self.points.detach()), alpha, beta

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight at its points."""
        v = self.taking_part(weight)
        values = _AtPoints.apply(self.points, *self.codes(weight)).flatten()[: v.numel()]
        return self.placed(values + (v - v.detach()), weight.shape)
