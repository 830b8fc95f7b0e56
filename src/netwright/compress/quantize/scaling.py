"""Rounding in buckets: every few hundred weights have a scale of their own.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668. With
beta = min and alpha = max - min of a bucket and u = (v - beta) / alpha,

    uniform:      Q(v) = alpha round(u (s - 1)) / (s - 1) + beta,    s = 2^bits levels, both ends among them
    non-uniform:  Q(v) = alpha p_a + beta,    a = the nearest of the points p_1 <= ... <= p_s
"""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

SMALLEST_SPAN = 1e-10  # a bucket of less is constant
MOST_BITS = 16
MOST_FITTED_BITS = 5  # above, half a step is too little to look for
FITTED_AT_ONCE = 1 << 22  # weights, of 24 bytes each meanwhile
FITS = 20
SMALLEST_GAIN = 1e-12  # in squares of a bucket's span: less is rounding


class BucketScaler:
    """Cuts a tensor into consecutive buckets and scales each to [0, 1].

    Args:
        bucket_size: Weights of a bucket, >= 1; None makes one bucket of the tensor. A tensor of fewer weights is one
        bucket.

    Raises:
        ValueError: If ``bucket_size`` is below 1, or no whole number.

    Example:
        >>> u, alpha, beta = BucketScaler(2).scale(torch.tensor([1.0, 3.0, 5.0]))
        >>> u.tolist(), alpha.flatten().tolist(), beta.flatten().tolist()
        ([[0.0, 1.0], [0.0, 0.0]], [2.0, 1.0], [1.0, 5.0])
    """

    def __init__(self, bucket_size: int | None = 256):
        if bucket_size is not None and bucket_size < 1:
            raise ValueError(f"bucket_size must be >= 1 or None, got {bucket_size}")
        if bucket_size is not None and bucket_size != int(bucket_size):
            raise ValueError(f"bucket_size must be a whole number, got {bucket_size}")
        self.bucket_size = bucket_size

    def shape(self, numel: int) -> tuple[int, int]:
        """Number of buckets and weights in each, for a tensor of ``numel``."""
        size = max(1, min(numel, self.bucket_size or numel))
        return math.ceil(numel / size), size

    def buckets(self, v: Float[Tensor, "*shape"]) -> Float[Tensor, "buckets size"]:
        """The tensor in buckets; the last is filled up with the last weight."""
        number, size = self.shape(v.numel())
        flat = v.flatten()
        missing = number * size - len(flat)
        # Not torch.cat, for which the compiler of torch 2.14 writes code that reads beyond the end.
        return (pad(flat[None], (0, missing), mode="replicate")[0] if missing else flat).view(number, size)

    def scale(
        self, v: Float[Tensor, "*shape"]
    ) -> tuple[Float[Tensor, "buckets size"], Float[Tensor, "buckets 1"], Float[Tensor, "buckets 1"]]:
        """Scaled buckets in [0, 1], spans alpha (1 where a bucket is constant) and minima beta."""
        rows = self.buckets(v)
        if not rows.numel():
            return rows, rows.new_ones(len(rows), 1), rows.new_zeros(len(rows), 1)
        # max and min, not amax and amin: their gradient goes to one weight, not to all that are equal.
        beta = rows.min(1, keepdim=True).values
        alpha = rows.max(1, keepdim=True).values - beta
        alpha = torch.where(alpha < SMALLEST_SPAN, 1, alpha)
        return (rows - beta) / alpha, alpha, beta

    def unscale(self, u: Tensor, alpha: Tensor, beta: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """Back to the tensor's scale and shape."""
        return (alpha * u + beta).flatten()[: math.prod(shape)].view(shape)


def check_bits(bits: int) -> int:
    """The number of bits.

    Raises:
        ValueError: If it is outside 1..16, or no whole number.
    """
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"bits must lie in 1..{MOST_BITS}, got {bits}")
    if bits != int(bits):
        raise ValueError(f"bits must be a whole number, got {bits}")
    return int(bits)


def check_finite(v: Tensor, name: str = "v") -> None:
    """Refuses NaN and infinities.

    Raises:
        ValueError: If there is one.
    """
    if not bool(torch.isfinite(v).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity in a tensor of shape {tuple(v.shape)}")


def check_points(points: Tensor) -> None:
    """Refuses points that cannot serve.

    Raises:
        ValueError: If there are fewer than 2, or they are not finite, or not sorted.
    """
    if points.ndim != 1 or len(points) < 2:
        raise ValueError(f"points must be at least 2 numbers, got shape {tuple(points.shape)}")
    check_finite(points, "points")
    if bool((points[1:] < points[:-1]).any()):
        raise ValueError(f"points must be sorted, got {points.tolist()}")


def rounded(u: Tensor, bits: int, stochastic: bool = False, generator: torch.Generator | None = None) -> Tensor:
    """The number of the level of each u in [0, 1], as floats; half to even, or up with the probability of the rest."""
    x = u * (2**bits - 1)
    if not stochastic:
        return x.round()
    if generator is None:
        raise ValueError("stochastic rounding needs a generator, got None")
    low = x.floor()
    return low + (torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype) < x - low)


def nearest(u: Tensor, points: Tensor) -> Int[Tensor, "*shape"]:
    """The number of the nearest of sorted points; between two, the lower."""
    return torch.bucketize(u, (points[1:] + points[:-1]) / 2)


def uniform_quantize(
    v: Float[Tensor, "*shape"],
    bits: int,
    bucket_size: int | None = 256,
    stochastic: bool = False,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*shape"]:
    """Rounds a tensor to 2^bits evenly spaced levels from the least to the largest weight of each bucket.

    Args:
        v: Any tensor of finite floats.
        bits: 1..16.
        bucket_size: Weights that share a scale; None for one scale.
        stochastic: Round up with the probability of the remainder, so that the mean is ``v``.
        generator: Where that chance comes from; needed for it.

    Raises:
        ValueError: If ``v`` is not finite, chance has no generator, or another argument is out of its range.

    Example:
        >>> uniform_quantize(torch.tensor([-1.0, -0.2, 0.1, 0.9]), 2)
        tensor([-1.0000, -0.3667,  0.2667,  0.9000])
    """
    bits = check_bits(bits)
    scaler = BucketScaler(bucket_size)
    check_finite(v)
    u, alpha, beta = scaler.scale(v)
    return scaler.unscale(rounded(u, bits, stochastic, generator) / (2**bits - 1), alpha, beta, v.shape)


def least_error_ends(u: Float[Tensor, "buckets size"], bits: int) -> Float[Tensor, "buckets 2"]:
    """Where even levels of each bucket should begin and end for the least mean squared error of rounding.

    Between the least and the largest weight, few levels lie where few weights are. From the best pair of ends on grids
    of tenths and finer, weights are assigned to their nearest levels and a line is fitted through the levels' numbers,
    in turns (Lloyd's algorithm for evenly spaced centres). Above 5 bits there is little to gain, and ends stay as they
    are.

    Args:
        u: Scaled buckets in [0, 1], as :meth:`BucketScaler.scale` gives them.
        bits: 1..16.

    Returns:
        Beginning and end of the levels for each bucket, in units of its span.

    Raises:
        ValueError: If ``bits`` is out of its range.

    Example:
        >>> least_error_ends(torch.linspace(0, 1, 1001)[None], 1).round(decimals=3)  # at a quarter and three quarters
        tensor([[0.2500, 0.7500]])
    """
    whole = u.new_tensor([0.0, 1.0]).repeat(len(u), 1)
    if check_bits(bits) > MOST_FITTED_BITS or not u.numel():
        return whole
    rows = max(1, FITTED_AT_ONCE // u.shape[1])
    return torch.cat([_SortedBuckets(part.detach(), 2**bits).least_ends() for part in u.split(rows)]).to(u)


class _SortedBuckets:
    """Sums over runs of sorted weights: an error costs as much as there are levels, not as there are weights."""

    def __init__(self, u: Tensor, levels: int):
        self.u, self.number = u.sort(1).values.double(), torch.arange(levels, dtype=torch.float64, device=u.device)
        self.sums = [pad((self.u**power).cumsum(1), (1, 0)) for power in (1, 2)]

    def least_ends(self) -> Tensor:
        self.ends = self.u.new_tensor([0.0, 1.0]).repeat(len(self.u), 1)
        self.least, self.line = self.fitted(self.ends)
        for low, high in itertools.combinations([i / 10 for i in range(11)], 2):
            self.try_(self.u.new_tensor([low, high]).expand_as(self.ends))
        for reach in (0.05, 0.025):
            around = self.ends
            for shift in itertools.product((-reach, 0, reach), repeat=2):
                self.try_(around + around.new_tensor(shift))
        for _ in range(FITS):
            if not self.try_(self.line):
                break
        return self.ends

    def try_(self, ends: Tensor) -> bool:
        """Takes these ends where they have less error than those that are known, and says whether any has."""
        error, line = self.fitted(ends)
        less = (error < self.least - SMALLEST_GAIN) & (ends[:, :1] < ends[:, 1:])
        self.ends, self.line = torch.where(less, ends, self.ends), torch.where(less, line, self.line)
        self.least = torch.where(less, error, self.least)
        return bool(less.any())

    def fitted(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of the levels between some ends, and the ends of the line through what they are given."""
        low, span = ends[:, :1], ends[:, 1:] - ends[:, :1]
        levels = low + span * self.number / self.number[-1]
        cuts = torch.searchsorted(self.u, (levels[:, 1:] + levels[:, :-1]) / 2)
        cuts = pad(cuts, (1, 1))
        cuts[:, -1] = self.u.shape[1]
        count = cuts.diff(dim=1)
        first, second = (total.gather(1, cuts).diff(dim=1) for total in self.sums)
        size = self.u.shape[1]
        error = (second - 2 * levels * first + levels**2 * count).sum(1, keepdim=True) / size
        at = (self.number * count).sum(1, keepdim=True) / size
        mean = first.sum(1, keepdim=True) / size
        spread = (self.number**2 * count).sum(1, keepdim=True) / size - at**2
        slope = ((self.number * first).sum(1, keepdim=True) / size - at * mean) / spread
        line = mean + slope * (self.number[[0, -1]] - at)
        return error, torch.where(spread > 0, line, ends)


def nonuniform_quantize(
    v: Float[Tensor, "*shape"], points: Float[Tensor, "points"], bucket_size: int | None = 256
) -> tuple[Float[Tensor, "*shape"], Int[Tensor, "*shape"]]:
    """Rounds a tensor to the nearest of given points of its scaled buckets.

    Args:
        v: Any tensor of finite floats.
        points: At least 2, ascending, in units of a bucket's span above its minimum; they may lie outside [0, 1].
        bucket_size: As for :func:`uniform_quantize`.

    Returns:
        The rounded tensor, and the number of the point of each weight.

    Raises:
        ValueError: If ``v`` or the points are not finite, or the points are fewer than 2 or unsorted.

    Example:
        >>> nonuniform_quantize(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([0.0, 0.2, 1.0]))
        (tensor([0.0000, 0.8000, 4.0000]), tensor([0, 1, 2]))
    """
    check_points(points)
    check_finite(v)
    scaler = BucketScaler(bucket_size)
    u, alpha, beta = scaler.scale(v)
    chosen = nearest(u, points)
    values = scaler.unscale(points[chosen], alpha, beta, v.shape)
    return values, chosen.flatten()[: v.numel()].view(v.shape)
