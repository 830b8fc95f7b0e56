"""Convolution and affine layers that own a weight and a score for each of its entries."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.nn.sparse.masks import Rounding, Scored

What = Literal["weights", "scores", "both"]


def set_trainable(what: What, scores: nn.Parameter, *weights: nn.Parameter | None) -> None:
    """Sets what is trained of one masked layer: its weights (and bias), its scores, or both."""
    if what not in ("weights", "scores", "both"):
        raise ValueError(f"what must be 'weights', 'scores' or 'both', got {what!r}")
    scores.requires_grad_(what != "weights")
    for weight in weights:
        if weight is not None:
            weight.requires_grad_(what != "scores")


class _SparseLayer(Scored):
    weight: Any  # a Parameter; torch.nn.Conv2d and torch.nn.Linear declare it too
    bias: Any

    def _add_scores(self, density: float, rounding: Rounding) -> None:
        self._set_up(density, rounding)
        self.scores = nn.Parameter(torch.empty_like(self.weight), requires_grad=False)
        self.init_scores(self.weight, "kaiming")

    def train_mode(self, what: What) -> None:
        """Chooses what is trained: ``"weights"`` (with the bias; the default), ``"scores"``, or ``"both"``.

        Raises:
            ValueError: If ``what`` is none of the three.
        """
        set_trainable(what, self.scores, self.weight, self.bias)

    def to_dense(self) -> nn.Module:
        """A plain layer whose weight is the masked one."""
        from netwright.nn.sparse.modules import to_dense

        return to_dense(self)  # type: ignore[arg-type]


class SparseConv2d(_SparseLayer, nn.Conv2d):
    """Convolution that uses only the weights with the largest absolute scores; the bias is never masked.

    Args:
        *args: As for :class:`torch.nn.Conv2d`.
        density: Share k of the weights that is kept, in (0, 1].
        rounding: ``"netwright"`` or ``"official"``, see :func:`kept_count`.
        **kwargs: As for :class:`torch.nn.Conv2d`.

    Raises:
        ValueError: If ``density`` is outside (0, 1].

    Example:
        >>> conv = SparseConv2d(3, 8, 3, padding=1, density=0.1)
        >>> conv(torch.rand(2, 3, 8, 8)).shape, int(conv.mask().sum())
        (torch.Size([2, 8, 8, 8]), 22)
    """

    def __init__(self, *args: Any, density: float = 1.0, rounding: Rounding = "netwright", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._add_scores(density, rounding)

    def forward(self, x: Float[Tensor, "*batch in_channels height width"]) -> Tensor:
        """The convolution with the masked weight."""
        return self._conv_forward(x, self.apply_mask(self.weight), self.bias)

    def extra_repr(self) -> str:
        """That of the dense layer, and the density."""
        return f"{super().extra_repr()}, density={self.density:g}"


class SparseLinear(_SparseLayer, nn.Linear):
    """Affine map that uses only the weights with the largest absolute scores; the bias is never masked.

    Args:
        *args: As for :class:`torch.nn.Linear`.
        density: Share k of the weights that is kept, in (0, 1].
        rounding: ``"netwright"`` or ``"official"``, see :func:`kept_count`.
        **kwargs: As for :class:`torch.nn.Linear`.

    Raises:
        ValueError: If ``density`` is outside (0, 1].

    Example:
        >>> SparseLinear(4, 3, density=0.5).mask().sum()
        tensor(6.)
    """

    def __init__(self, *args: Any, density: float = 1.0, rounding: Rounding = "netwright", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._add_scores(density, rounding)

    def forward(self, x: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """The affine map with the masked weight."""
        return nn.functional.linear(x, self.apply_mask(self.weight), self.bias)

    def extra_repr(self) -> str:
        """That of the dense layer, and the density."""
        return f"{super().extra_repr()}, density={self.density:g}"
