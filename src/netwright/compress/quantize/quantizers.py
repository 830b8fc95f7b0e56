"""Quantisers as parametrizations: the layer computes with rounded weights, the optimiser sees what is behind them.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668.

    uniform:         dL/dw = dL/dQ(w)                                  (straight through the rounding)
    differentiable:  dL/dp_j = sum over weights i of point j of  alpha_bucket(i) dL/dQ_i,    w fixed

Weights that are zero stay zero and take no part, so that a pruned network stays as sparse as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.compress.quantize.scaling import (
    BucketScaler,
    check_bits,
    check_finite,
    check_points,
    nearest,
    rounded,
)
from netwright.nn.sparse import LAYERS, bake, to_dense

WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
Gradient = Literal["ste", "truncated", "exact"]
Which = Literal["weights", "all"]
_M = TypeVar("_M", bound=nn.Module)


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
        >>> _ = parametrize.register_parametrization(layer, "weight", UniformQuantizer(2))
        >>> len(layer.weight.unique()), len(layer.parametrizations.weight.original.unique())
        (4, 64)
    """

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
        if grad not in get_args(Gradient):
            raise ValueError(f"grad must be one of {', '.join(map(repr, get_args(Gradient)))}, got {grad!r}")
        if stochastic and generator is None:
            raise ValueError("stochastic rounding needs a generator, got None")
        self.bits, self.grad, self.stochastic, self.generator = check_bits(bits), grad, stochastic, generator

    def levels(self) -> Float[Tensor, "levels"]:
        """j / (2^bits - 1)."""
        return torch.arange(2**self.bits, dtype=torch.float32) / (2**self.bits - 1)

    def codes(self, weight: Tensor) -> tuple[Int[Tensor, "buckets size"], Tensor, Tensor]:
        """The number of the level of each weight that takes part, with spans and minima of the buckets."""
        u, alpha, beta = self.scaler.scale(self.taking_part(self._clamped(weight.detach())))
        return rounded(u, self.bits).long(), alpha, beta

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The rounded weight."""
        v = self.taking_part(self._clamped(weight))
        u, alpha, beta = self.scaler.scale(v if self.grad == "exact" else v.detach())
        level = rounded(u.detach(), self.bits, self.stochastic and self.training, self.generator)
        q = level / (2**self.bits - 1)
        # A value plus nothing: x - x is zero to the last bit, and has the gradient of x.
        if self.grad == "exact":
            return self.placed(alpha * (q + (u - u.detach())) + beta, weight.shape)
        values = (alpha * q + beta).flatten()[: v.numel()]
        return self.placed(values + (v - v.detach()), weight.shape)

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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        chosen, alpha = ctx.saved_tensors
        (grad,) = grads
        total = torch.bincount(chosen.flatten(), (alpha * grad).flatten(), ctx.number)
        return total.to(grad), None, None, None


class DifferentiableQuantizer(Quantizer):
    """Parametrization that rounds a fixed tensor to points which are learned.

    The points are the parameter; the tensor is kept in scaled form. Which point a weight has follows the points in
    every forward pass, and counts as constant in the gradient. Keep them sorted: :meth:`sort_` after a step.

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
        >>> _ = parametrize.register_parametrization(layer, "weight", quantizer)
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
        init: Literal["quantiles", "uniform"] = "quantiles",
        kept: Tensor | None = None,
    ):
        super().__init__(bucket_size, kept)
        weight = weight.detach()
        check_finite(weight, "weight")
        if init not in ("quantiles", "uniform"):
            raise ValueError(f"init must be 'quantiles' or 'uniform', got {init!r}")
        chosen = self.taking_part(weight)
        for name, value in zip(("u", "alpha", "beta"), self.scaler.scale(chosen), strict=True):
            self.register_buffer(name, value)
        if isinstance(points, int):
            if points < 2:
                raise ValueError(f"points must be at least 2 numbers, got {points}")
            points = self._start(points, init, self.u.flatten()[: chosen.numel()])
        check_points(points)
        self.points = nn.Parameter(points.detach().clone())

    @staticmethod
    def _start(number: int, init: str, u: Tensor) -> Tensor:
        even = torch.linspace(0, 1, number, dtype=u.dtype, device=u.device)
        if init == "uniform" or not u.numel():
            return even
        sizes = u.sort().values  # torch.quantile refuses more than 16 million
        place = even * (len(sizes) - 1)
        low = place.long().clamp(max=len(sizes) - 1)
        high = (low + 1).clamp(max=len(sizes) - 1)
        return sizes[low].lerp(sizes[high], place - low).sort().values  # rounding may have swapped equals

    def levels(self) -> Float[Tensor, "levels"]:
        """The points."""
        return self.points.detach()

    def codes(self, weight: Tensor) -> tuple[Int[Tensor, "buckets size"], Tensor, Tensor]:
        """The number of the point of each weight that takes part, with spans and minima of the buckets."""
        return nearest(self.u, self.points.detach()), self.alpha, self.beta

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The weight at its points; ``weight`` itself is not looked at."""
        chosen = nearest(self.u, self.points.detach())
        return self.placed(_AtPoints.apply(self.points, chosen, self.alpha, self.beta), weight.shape)

    @torch.no_grad()
    def sort_(self) -> None:
        """Brings the points into ascending order again."""
        self.points.copy_(self.points.sort().values)

    def extra_repr(self) -> str:
        """Number of points and bucket size."""
        return f"points={len(self.points)}, bucket_size={self.scaler.bucket_size}"


def quantizers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Quantizer]]:
    """Name of each quantised tensor, as in the plain network's ``state_dict``, its layer, its own name, and its
    quantiser.

    Example:
        >>> [name for name, *_ in quantizers(post_training_quantize(nn.Sequential(nn.Linear(2, 2)), 4))]
        ['0.weight']
    """
    for path, part in module.named_modules():
        if not parametrize.is_parametrized(part):
            continue
        for name, steps in cast(nn.ModuleDict, part.parametrizations).items():
            found = [step for step in cast(nn.ModuleList, steps) if isinstance(step, Quantizer)]
            if found:
                yield f"{path}.{name}" if path else name, part, name, found[-1]


def targets(
    module: nn.Module, which: Which = "weights", first_last: bool = True
) -> list[tuple[nn.Module, str, Tensor]]:
    """The parameters that are to be quantised: layer, name, and the tensor as the layer uses it.

    Args:
        module: Any network; of a masked layer the masked tensor is meant.
        which: ``"weights"``, those of convolutions and linear layers and of attention's projections; ``"all"``, every
            parameter.
        first_last: Whether the first and the last convolution or linear layer are among them.

    Raises:
        ValueError: If ``which`` is unknown, or nothing is left.
    """
    if which not in get_args(Which):
        raise ValueError(f"quantize must be one of {', '.join(map(repr, get_args(Which)))}, got {which!r}")
    weighed = [part for part in module.modules() if isinstance(part, LAYERS)]
    left_out = set() if first_last or not weighed else {id(weighed[0]), id(weighed[-1])}
    found: list[tuple[nn.Module, str, Tensor]] = []
    seen: set[int] = set()
    for part in module.modules():
        wanted = which == "all" or isinstance(part, (*LAYERS, nn.MultiheadAttention))
        if not wanted or id(part) in left_out:
            continue
        for name, parameter in _own_tensors(part):
            if (which == "all" or name in WEIGHTS) and parameter.numel() and id(parameter) not in seen:
                found.append((part, name, parameter))
                seen.add(id(parameter))
    if not found:
        raise ValueError(f"module must hold weights to quantise, got {type(module).__name__} without any left")
    return found


def _own_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters(recurse=False)
    if parametrize.is_parametrized(part):
        for name in cast(nn.ModuleDict, part.parametrizations):
            yield name, getattr(part, name)


def kept_weights(weight: Tensor) -> Tensor | None:
    """Where a pruned tensor is not zero; None for one that holds no zero, or nothing else."""
    kept = weight.detach() != 0
    return kept if bool(kept.any()) and not bool(kept.all()) else None


def quantize_with(
    module: _M,
    make: Callable[[Tensor, Tensor | None, int], Quantizer],
    which: Which = "weights",
    first_last: bool = True,
) -> tuple[_M, list[Quantizer]]:
    """A plain copy of a network whose tensors go through the quantisers that ``make(parameter, kept, number)``
    gives."""
    plain = cast(_M, to_dense(module))
    for part in plain.modules():
        if parametrize.is_parametrized(part):
            raise ValueError(f"module must be plain or masked, got another parametrization in {type(part).__name__}")
    made = []
    for number, (part, name, parameter) in enumerate(targets(plain, which, first_last)):
        check_finite(parameter, name)
        quantizer = make(parameter, kept_weights(parameter), number)
        parametrize.register_parametrization(part, name, quantizer)
        made.append(quantizer)
    return plain, made


def post_training_quantize(
    model: _M,
    bits: int,
    bucket_size: int | None = 256,
    *,
    quantize: Which = "weights",
    quantize_first_last: bool = True,
    grad: Gradient = "ste",
) -> _M:
    """A copy of a network that computes with weights rounded to 2^bits levels; nothing is trained.

    The weights behind the rounding are still there, so the copy can be trained on with any loop; :func:`baked` and
    every export put the rounded ones in their place, :func:`pack` stores them in as many bits.

    Args:
        model: The network; it is not changed. Masks are baked in, and their zeros stay.
        bits: 1..16.
        bucket_size: Weights that share a scale; None for one scale a tensor.
        quantize: ``"weights"`` of convolutions and linear layers, or ``"all"`` parameters.
        quantize_first_last: Whether the first and the last of these layers take part.
        grad: As for :class:`UniformQuantizer`, for those who train on.

    Raises:
        ValueError: If an argument is out of its range, or a weight is not finite.

    Example:
        >>> net = post_training_quantize(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)), 2)
        >>> len(net[2].weight.unique()) <= 4
        True
    """

    def make(parameter: Tensor, kept: Tensor | None, number: int) -> Quantizer:
        return UniformQuantizer(bits, bucket_size, grad=grad, kept=kept)

    return quantize_with(model, make, quantize, quantize_first_last)[0]


def baked(model: _M) -> _M:
    """A plain copy with the rounded weights in place.

    Example:
        >>> net = baked(post_training_quantize(nn.Linear(64, 8), 2))
        >>> list(net.state_dict()), len(net.weight.unique()) <= 4 * 2
        (['weight', 'bias'], True)
    """
    plain = cast(_M, to_dense(model))
    for _, part, name, _ in reversed(list(quantizers(plain))):  # so that parameters get their order back
        bake(part, name)
    return plain
