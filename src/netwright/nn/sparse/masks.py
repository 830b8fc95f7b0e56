"""The mask mechanism: top-k masks from scores, and the two parametrizations that apply a mask to a tensor."""

from __future__ import annotations

import math
import weakref
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

Rounding = Literal["netwright", "official"]


def check_density(density: float) -> float:
    """The density as a float.

    Raises:
        ValueError: If it is outside (0, 1].
    """
    value = float(density)
    if not 0.0 < value <= 1.0:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    return value


def kept_count(numel: int, density: float, rounding: Rounding = "netwright") -> int:
    """How many of ``numel`` weights survive.

    ``"netwright"`` keeps max(1, round(k n)); ``"official"`` keeps n - int((1 - k) n) as the published code
    does, floating-point surprises included.

    Example:
        >>> kept_count(10, 0.9), kept_count(10, 0.9, "official"), kept_count(20, 0.01)
        (9, 10, 1)
    """
    if rounding == "official":
        return numel - int((1 - density) * numel)
    return max(1, round(density * numel))


def top_k_mask(
    scores: Float[Tensor, "*shape"], density: float, rounding: Rounding = "netwright"
) -> Float[Tensor, "*shape"]:
    """The 0/1 mask of the entries with the largest absolute score, in O(n).

    Equal scores are ordered as by a stable ascending sort, so the later entry in memory order survives.

    Raises:
        ValueError: If a score is NaN, or ``density`` is outside (0, 1].

    Example:
        >>> top_k_mask(torch.tensor([0.1, -0.4, 0.2, 0.3]), 0.5)
        tensor([0., 1., 0., 1.])
    """
    n = scores.numel()
    keep = kept_count(n, check_density(density), rounding)
    size = scores.detach().abs().flatten()
    if not torch.compiler.is_compiling() and bool(size.isnan().any()):
        raise ValueError(f"scores must be numbers, got NaN in a tensor of shape {tuple(scores.shape)}")
    if keep >= n:
        return torch.ones_like(scores)
    if keep < 1:
        return torch.zeros_like(scores)
    threshold = size.kthvalue(n - keep).values
    above, tied = size > threshold, size == threshold
    room = keep - above.sum()
    rank_from_end = tied.sum() - tied.cumsum(0)
    return (above | (tied & (rank_from_end < room))).view(scores.shape).to(scores.dtype)


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight, scores, mask = ctx.saved_tensors
        (grad,) = grads
        return (
            grad * mask if ctx.needs_input_grad[0] else None,
            grad * weight * scores.sign() if ctx.needs_input_grad[1] else None,
            None,
        )


def masked_weight(
    weight: Float[Tensor, "*shape"], scores: Float[Tensor, "*shape"], mask: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """``mask * weight`` with the gradient of the module's docstring; ``scores`` only receives its gradient.

    Example:
        >>> weight = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> scores = torch.tensor([0.1, -0.4], requires_grad=True)
        >>> masked_weight(weight, scores, torch.tensor([0.0, 1.0])).sum().backward()
        >>> weight.grad, scores.grad
        (tensor([0., 1.]), tensor([ 1., -2.]))
    """
    # A plain product when scores are frozen leaves every transform of torch.func available.
    return _StraightThrough.apply(weight, scores, mask) if scores.requires_grad else weight * mask


class _Kept:
    """A tensor computed from others, valid as long as these are the same objects with unchanged values.

    Values are followed by torch's version counter, which writes through ``.data`` alone escape.
    """

    def __init__(self, value: Tensor, *sources: Tensor):
        self.value, self._version = value, value._version
        self._sources = [(weakref.ref(source), source._version, source.data_ptr()) for source in sources]

    def get(self, *sources: Tensor) -> Tensor | None:
        """The value, or ``None`` when it has to be computed again."""
        if self.value._version != self._version:
            return None
        for source, (ref, version, address) in zip(sources, self._sources, strict=True):
            if ref() is not source or source._version != version or source.data_ptr() != address:
                return None
        return self.value


def _lasting(tensor: Tensor) -> bool:
    # Temporaries of functional_call, torch.func and torch.compile are not worth keeping (nor always able to
    # tell their version); inference tensors have no version at all.
    return isinstance(tensor, nn.Parameter) and not tensor.is_inference() and not torch.compiler.is_compiling()


class Scored:
    """Mixin of the sparse layers and of :class:`TopKMask`: scores, a density, and the mask they imply."""

    scores: nn.Parameter
    _density: float
    _rounding: Rounding
    _mask: _Kept | None
    _product: _Kept | None

    def _set_up(self, density: float, rounding: Rounding) -> None:
        if rounding not in ("netwright", "official"):
            raise ValueError(f"rounding must be 'netwright' or 'official', got {rounding!r}")
        self._density, self._rounding = check_density(density), rounding
        self._mask = self._product = None

    @property
    def density(self) -> float:
        """Share of the weights that is kept, in (0, 1]."""
        return self._density

    @property
    def rounding(self) -> Rounding:
        """How the number of kept weights is rounded."""
        return self._rounding

    def set_density(self, density: float) -> None:
        """Sets the share of weights that is kept.

        Raises:
            ValueError: If it is outside (0, 1].
        """
        value = check_density(density)
        if value != self._density:
            self._density, self._mask, self._product = value, None, None

    def mask(self) -> Tensor:
        """The 0/1 mask, shaped like the weight; computed again only when scores or density have changed."""
        scores = self.scores
        if not _lasting(scores):
            return top_k_mask(scores, self._density, self._rounding)
        kept = self._mask.get(scores) if self._mask else None
        if kept is None:
            with torch.inference_mode(False):  # a mask made inside inference_mode could not be trained with later
                kept = top_k_mask(scores, self._density, self._rounding)
            self._mask = _Kept(kept, scores)
        return kept

    def apply_mask(self, weight: Tensor) -> Tensor:
        """``mask * weight``, differentiable in both; kept between calls while no gradient is wanted."""
        scores = self.scores
        if self._density == 1.0 and not scores.requires_grad:
            return weight
        if torch.is_grad_enabled() and (weight.requires_grad or scores.requires_grad):
            return masked_weight(weight, scores, self.mask())
        product = self._product.get(weight, scores) if self._product else None
        if product is None:
            if not (_lasting(weight) and _lasting(scores)):
                return weight * self.mask()
            with torch.inference_mode(False), torch.no_grad():
                product = weight * self.mask()
            self._product = _Kept(product, weight, scores)
        return product

    def init_scores(self, weight: Tensor, method: Literal["kaiming", "scaled"], generator: Any = None) -> None:
        """Fills the scores; see the function of the same name."""
        if method not in ("kaiming", "scaled"):
            raise ValueError(f"method must be 'kaiming' or 'scaled', got {method!r}")
        fan_in = max(1, weight[0].numel() if weight.ndim > 1 else weight.numel())
        with torch.no_grad():
            if method == "kaiming":
                self.scores.normal_(0.0, math.sqrt(2.0 / fan_in), generator=generator)
                return
            largest = weight.abs().max()
            if not bool(largest > 0):
                raise ValueError(f"scaled scores need a weight that is not all zero, got shape {tuple(weight.shape)}")
            self.scores.copy_(weight / largest * math.sqrt(6.0 / fan_in))

    def get_extra_state(self) -> Tensor:
        """Density and rounding, so that a mask survives ``state_dict``; a tensor, as safetensors demands."""
        return torch.tensor([self._density, float(self._rounding == "official")], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores density and rounding."""
        density, official = state.tolist()
        self._set_up(density, "official" if official else "netwright")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mask": None, "_product": None}


class TopKMask(Scored, nn.Module):
    """Parametrization that keeps the weights with the largest absolute scores.

    Scores are created when it is registered, Kaiming-normal and frozen; see :func:`init_scores` and
    :func:`train_mode`. With density 1 and frozen scores it returns the weight itself.

    Args:
        density: Share k of the weights that is kept, in (0, 1].
        scores: Initial scores, shaped like the tensor; magnitude pruning is ``scores=weight.detach().abs()``.
        rounding: ``"netwright"`` or ``"official"``, see :func:`kept_count`.

    Raises:
        ValueError: If ``density`` is outside (0, 1], or ``scores`` has another shape than the tensor.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(10, 10)
        >>> _ = parametrize.register_parametrization(layer, "weight", TopKMask(0.1))
        >>> int((layer.weight != 0).sum())
        10
    """

    def __init__(self, density: float, scores: Tensor | None = None, *, rounding: Rounding = "netwright"):
        super().__init__()
        self._set_up(density, rounding)
        self.register_parameter(
            "scores", None if scores is None else nn.Parameter(scores.detach().clone(), requires_grad=False)
        )

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself: assigning ``layer.weight`` changes the weight behind the mask."""
        self._fit(weight)
        return weight

    def _fit(self, weight: Tensor) -> None:
        if self.scores is None:
            self.scores = nn.Parameter(torch.empty_like(weight), requires_grad=False)
            self.init_scores(weight, "kaiming")
        if self.scores.shape != weight.shape:
            raise ValueError(f"scores must have shape {tuple(weight.shape)}, got {tuple(self.scores.shape)}")

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The masked weight."""
        if self.scores is None:  # torch calls forward first when the tensor is parametrized already
            self._fit(weight)
        return self.apply_mask(weight)

    def extra_repr(self) -> str:
        """The density."""
        return f"density={self.density:g}"


class FixedMask(nn.Module):
    """Parametrization that multiplies a tensor with a 0/1 mask held in a buffer.

    Args:
        mask: Zeros and ones (or booleans), shaped like the tensor.

    Raises:
        ValueError: If ``mask`` holds anything else, or does not fit the tensor.

    Example:
        >>> from torch.nn.utils import parametrize
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = parametrize.register_parametrization(layer, "weight", FixedMask(torch.tensor([[1, 0]])))
        >>> bool(layer.weight[0, 1] == 0)
        True
    """

    keep: Tensor

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("keep", self._checked(mask).detach().clone())

    @staticmethod
    def _checked(mask: Tensor) -> Tensor:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask must hold only zeros and ones, got other values")
        return mask

    @property
    def density(self) -> float:
        """Share of the weights that is kept, in [0, 1]."""
        return float(self.keep.double().mean())

    def mask(self) -> Tensor:
        """The 0/1 mask, shaped like the weight."""
        return self.keep

    def set_mask(self, mask: Float[Tensor, "*shape"]) -> None:
        """Replaces the mask.

        Raises:
            ValueError: If it holds anything but zeros and ones, or has another shape.
        """
        if mask.shape != self.keep.shape:
            raise ValueError(f"mask must have shape {tuple(self.keep.shape)}, got {tuple(mask.shape)}")
        with torch.no_grad():
            self.keep.copy_(self._checked(mask))

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The weight itself; on registration the mask takes its type and device."""
        if self.keep.shape != weight.shape:
            raise ValueError(f"mask must have shape {tuple(weight.shape)}, got {tuple(self.keep.shape)}")
        self.keep = self.keep.to(weight)
        return weight

    def forward(self, weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The masked weight."""
        return weight * self.keep

    def extra_repr(self) -> str:
        """The density."""
        return f"density={self.density:g}"
