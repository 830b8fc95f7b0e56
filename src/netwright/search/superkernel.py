"""Superkernels: one depthwise kernel that holds all smaller ones, and decides by norms how much of itself it needs.

Stamoulis et al., "Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours", ECML-PKDD 2019,
arXiv:1904.02877. The 3x3 kernel is the centre of the 5x5 one, and a smaller expansion the first channels of a larger
one. With H, H' the channels of the smaller and those that the larger one adds, and I(z) = 1[z >= 0],

    d5   = I(||W_5\\3|| - t5),          W_k   = W_3 + d5 W_5\\3
    d100 = I(||W_k on H'|| - t100),    d50   = I(||W_k on H|| - t50)
    W    = d50 (W_k on H + d100 W_k on H')

and, from a table R(k, e) of measured times with rho = R(3, 6) / R(5, 6),

    R_c = d50 (R(5, 3) + d100 (R(5, 6) - R(5, 3))),    R = rho R_c + (1 - rho) R_c d5.

Backward, I has the derivative of the sigmoid. Any number of nested kernels k_1 < ... < k_K and of ratios
r_1 < ... < r_R <= 1 is decided in the same way: c_i = d_2 ... d_i tells whether ring i of the kernel is there, and
a_j = d_r1 ... d_rj whether group j of the channels is, so

    W = a_j c_i W on group j and ring i,    n_j^2 = sum_i c_i^2 s_ji,    s_ji = ||W on group j and ring i||^2,
    R = sum_j a_j (R(k_K, r_j) - R(k_K, r_j-1)) sum_i c_i (rho_i - rho_i-1),    rho_i = R(k_i, r_R) / R(k_K, r_R).

All norms follow from the s_ji, one pass over the squares of W.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.checks import number, whole

Scale = Literal["none", "sqrt_numel"]


def indicator_ste(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """1 where z >= 0, else 0; backward it is the sigmoid (Bengio et al., 2013, arXiv:1308.3432: straight through).

    Example:
        >>> z = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> d = indicator_ste(z)
        >>> d.tolist(), [round(g, 6) for g in torch.autograd.grad(d.sum(), z)[0].tolist()]
        ([0.0, 1.0, 1.0], [0.196612, 0.25, 0.104994])
    """
    soft = torch.sigmoid(z)
    return (z >= 0).to(z.dtype) + (soft - soft.detach())


def draw_scales(shape: Sequence[int], dropout: float, like: Tensor) -> Tensor:
    """Factors of indicators under inverted dropout: 1 / (1 - dropout), or 0 with probability ``dropout``.

    They are drawn from torch's global generator, on the device and of the type of ``like``.

    Raises:
        ValueError: If ``dropout`` is outside [0, 1).

    Example:
        >>> _ = torch.manual_seed(0)
        >>> sorted(set(draw_scales((1000,), 0.5, torch.zeros(())).tolist()))
        [0.0, 2.0]
    """
    number("dropout", dropout, "[0, 1)")
    return functional.dropout(like.new_ones(tuple(shape)), dropout)


class Decided(NamedTuple):
    """The indicators of one layer, or of several along leading axes.

    Attributes:
        indicators: d, the kernels' before the ratios', shape (..., K - 1 + R).
        rings: c, whether each ring of the kernel is there, shape (..., K); the first always is.
        channels: a, whether each group of channels is there, shape (..., R).
        masks: The same if the first group is, shape (..., R): a over d_r1.
    """

    indicators: Tensor
    rings: Tensor
    channels: Tensor
    masks: Tensor

    def at(self, layer: int) -> Decided:
        """Those of one layer."""
        return Decided(*(part[layer] for part in self))


def decide(
    cells: Float[Tensor, "*layers ratios kernels"],
    thresholds: Float[Tensor, "*layers decisions"],
    skippable: Tensor,
    *,
    sizes: Float[Tensor, "*layers decisions"] | None = None,
    scales: Float[Tensor, "*layers decisions"] | None = None,
    squared: bool = False,
) -> Decided:
    """The indicators that follow from norms and thresholds.

    Args:
        cells: s, sums of squared weights by group of channels and ring.
        thresholds: One for each kernel but the first, then one for each ratio.
        skippable: Whether the first group of channels may go, shape (...); otherwise its indicator is 1.
        sizes: What norms are divided by; nothing by default.
        scales: Factors of the indicators, see :func:`draw_scales`; none by default.
        squared: Compare squared norms.
    """
    larger = cells.shape[-1] - 1

    def normed(squares: Tensor, part: slice) -> Tensor:
        # Below the smallest number the derivative of the root counts as zero.
        norm = squares if squared else squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()
        return norm if sizes is None else norm / sizes[..., part]

    def indicated(squares: Tensor, part: slice) -> Tensor:
        found = indicator_ste(normed(squares, part) - thresholds[..., part])
        return found if scales is None else found * scales[..., part]

    outer = indicated(cells.sum(-2)[..., 1:], slice(0, larger))
    rings = torch.stack(_products([torch.ones_like(cells[..., 0, 0]), *outer.unbind(-1)]), -1)
    groups = indicated((cells @ rings.square()[..., None])[..., 0], slice(larger, None))
    first, *others = groups.unbind(-1)
    first = torch.where(skippable, first, torch.ones_like(first))
    masks = torch.stack(_products([torch.ones_like(first), *others]), -1)
    return Decided(torch.cat([outer, torch.stack([first, *others], -1)], -1), rings, first[..., None] * masks, masks)


def _products(factors: Sequence[Tensor]) -> list[Tensor]:
    """Products of the first one, two, ...; torch's cumprod is slow backward where there are zeros."""
    return list(itertools.accumulate(factors, torch.mul))


def runtime(
    by_ratio: Float[Tensor, "*layers ratios"], by_kernel: Float[Tensor, "*layers kernels"], decided: Decided
) -> Float[Tensor, "*layers"]:
    """The modelled time R of layers.

    Args:
        by_ratio: R(k_K, r), of the largest kernel with each ratio.
        by_kernel: R(k, 1), of each kernel with all channels.
        decided: What the layers have decided.
    """
    zero = by_ratio.new_zeros((*by_ratio.shape[:-1], 1))
    shares = by_kernel / by_kernel[..., -1:]
    whole = (decided.channels * by_ratio.diff(dim=-1, prepend=zero)).sum(-1)
    return whole * (decided.rings * shares.diff(dim=-1, prepend=zero)).sum(-1)


class SuperKernelDepthwise(nn.Module):
    """A depthwise convolution with nested kernels and nested groups of channels.

    Args:
        channels: C, those of the largest expansion.
        kernels: Odd sides, ascending.
        ratios: Shares of the channels, ascending in (0, 1]; ratio r means the first round(r C) of them. Channels beyond
            the largest are never there.
        skippable: Whether all channels may go.
        stride: Of the convolution.
        squared: Compare squared norms with the thresholds, as the paper writes; its code, and the default, take norms.
        scale: ``"sqrt_numel"`` divides each norm by the root of the number of weights it is taken over, which keeps the
            sigmoid's derivative from vanishing in wide layers; this is not in the paper.
        weight: Initial weight, shape (C, 1, k_K, k_K); by default drawn as that of a convolution.
        thresholds: A parameter of shape (K - 1 + R) that is kept elsewhere; by default the layer has its own, zero, so
            that everything is on.

    Attributes:
        scales: Factors of the indicators, or None; see :func:`draw_scales`.

    Raises:
        ValueError: If a number is out of range, kernels are not odd and ascending, ratios do not ascend in (0, 1], or
            two ratios mean the same channels.

    Example:
        >>> layer = SuperKernelDepthwise(8)
        >>> layer(torch.rand(1, 8, 6, 6)).shape, layer.decision()
        (torch.Size([1, 8, 6, 6]), (5, 1.0))
        >>> _ = layer.thresholds.data[0].fill_(9.0)    # no 5x5 kernel has so large a rim
        >>> layer.decision(), {name: d.item() for name, d in layer.indicators().items()}
        ((3, 1.0), {'d5x5': 0.0, 'd50c': 1.0, 'd100c': 1.0})
    """

    def __init__(
        self,
        channels: int,
        kernels: Sequence[int] = (3, 5),
        ratios: Sequence[float] = (0.5, 1.0),
        skippable: bool = True,
        stride: int = 1,
        squared: bool = False,
        *,
        scale: Scale = "none",
        weight: Tensor | None = None,
        thresholds: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        kernels, ratios = tuple(kernels), tuple(ratios)
        whole("channels", channels, ">= 1")
        whole("stride", stride, ">= 1")
        for kernel in kernels:
            whole("kernels", kernel, ">= 1")
        for ratio in ratios:
            number("ratios", ratio, "(0, 1]")
        if not kernels or any(k % 2 == 0 for k in kernels) or not _ascending(kernels):
            raise ValueError(f"kernels must be odd, >= 1 and ascending, got {kernels}")
        if not ratios or not _ascending(ratios):
            raise ValueError(f"ratios must be at least one and ascend, got {ratios}")
        widths = [round(channels * ratio) for ratio in ratios]
        if not _ascending((0, *widths)):
            raise ValueError(f"ratios must mean different numbers of {channels} channels, got {ratios}")
        if scale not in ("none", "sqrt_numel"):
            raise ValueError(f"scale must be 'none' or 'sqrt_numel', got {scale!r}")
        self.kernels, self.ratios, self.stride, self.squared, self.scale = kernels, ratios, stride, squared, scale
        side, decisions = kernels[-1], len(kernels) - 1 + len(ratios)
        shape = (channels, 1, side, side)
        if weight is None:
            weight = torch.empty(shape)
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight must have shape {shape}, got {tuple(weight.shape)}")
        if thresholds is not None and tuple(thresholds.shape) != (decisions,):
            raise ValueError(f"thresholds must have shape ({decisions},), got {tuple(thresholds.shape)}")
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        # In a tuple a parameter is not registered: a supernet keeps the thresholds of all its layers.
        self._elsewhere = None if thresholds is None else (thresholds,)
        self.own_thresholds = nn.Parameter(torch.zeros(decisions)) if thresholds is None else None
        self.scales: Tensor | None = None

        offset = (torch.arange(side) - side // 2).abs()
        distance = torch.maximum(offset[:, None], offset).flatten()
        ring = torch.bucketize(distance, torch.tensor([k // 2 for k in kernels]))
        group = torch.bucketize(torch.arange(channels), torch.tensor(widths), right=True)
        rings = functional.one_hot(ring, len(kernels))
        groups = functional.one_hot(group, len(ratios) + 1)[:, :-1]  # channels beyond the largest ratio are in none
        numel = torch.cat([widths[-1] * rings.sum(0)[1:], groups.sum(0) * side**2])
        for name, value in (("rings", rings), ("groups", groups), ("sizes", numel if squared else numel.sqrt())):
            self.register_buffer(name, value.to(weight.dtype), persistent=False)
        self.register_buffer("skippable", torch.tensor(skippable), persistent=False)
        self.rings: Tensor
        self.groups: Tensor
        self.sizes: Tensor
        self.skippable: Tensor

    @property
    def thresholds(self) -> nn.Parameter:
        """t: one for each kernel but the first, then one for each ratio, shape (K - 1 + R).

        The one of the smallest ratio has no say in a layer that is not skippable.
        """
        if self._elsewhere is not None:
            return self._elsewhere[0]
        assert self.own_thresholds is not None
        return self.own_thresholds

    def cells(self) -> Float[Tensor, "ratios kernels"]:
        """s: the sum of squared weights of every group of channels and ring of the kernel."""
        return self.groups.T @ (self.weight.flatten(1).square() @ self.rings)

    def decide(self, scales: Tensor | None = None) -> Decided:
        """What norms and thresholds say.

        Args:
            scales: Factors of the indicators; none by default.
        """
        sizes = self.sizes if self.scale == "sqrt_numel" else None
        return decide(
            self.cells(), self.thresholds, self.skippable, sizes=sizes, scales=scales, squared=self.squared
        )  # fmt: skip

    def masked(self, decided: Decided) -> Float[Tensor, "channels 1 side side"]:
        """The kernel that is left."""
        left = (self.groups @ decided.channels)[:, None] * (self.rings @ decided.rings)
        return (self.weight.flatten(1) * left).view(self.weight.shape)

    def convolve(self, x: Tensor, decided: Decided) -> Tensor:
        """The convolution with the kernel that is left."""
        side, channels = self.kernels[-1], self.weight.shape[0]
        return functional.conv2d(x, self.masked(decided), None, self.stride, side // 2, 1, channels)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels out_height out_width"]:
        """The convolution with the kernel that is left, under the factors :attr:`scales` in training."""
        return self.convolve(x, self.decide(self.scales if self.training else None))

    def indicators(self) -> dict[str, Tensor]:
        """The indicators by name, each 0 or 1, differentiable: ``d5x5``, and ``d50c`` for half of the channels."""
        names = [f"d{k}x{k}" for k in self.kernels[1:]] + [f"d{100 * r:g}c" for r in self.ratios]
        return dict(zip(names, self.decide().indicators.unbind(-1), strict=True))

    @torch.no_grad()
    def decision(self) -> tuple[int, float] | None:
        """The kernel and the ratio that are left, or None where nothing is.

        Raises:
            FloatingPointError: If a threshold or a weight is not finite.
        """
        if not (self.thresholds.isfinite().all() and self.weight.isfinite().all()):
            raise FloatingPointError(f"thresholds and weights must be finite, got {self.thresholds.tolist()}")
        decided = self.decide()
        if not decided.channels[0]:
            return None
        return (
            self.kernels[int(decided.rings.count_nonzero()) - 1],
            self.ratios[int(decided.channels.count_nonzero()) - 1],
        )

    def rows(self, table: Mapping[tuple[int, float], float]) -> tuple[list[float], list[float]]:
        """R(k_K, r) for every ratio and R(k, r_R) for every kernel.

        Args:
            table: Time by kernel and ratio.

        Raises:
            KeyError: If one of them is missing.
            ValueError: If one of them is not positive and finite.
        """
        wanted = [(self.kernels[-1], ratio) for ratio in self.ratios], [(k, self.ratios[-1]) for k in self.kernels]
        if missing := [key for key in (*wanted[0], *wanted[1]) if key not in table]:
            raise KeyError(f"the table has no time for kernel and ratio {missing}")
        by_ratio, by_kernel = ([float(table[key]) for key in keys] for keys in wanted)
        if bad := [value for value in (*by_ratio, *by_kernel) if not 0 < value < math.inf]:
            raise ValueError(f"times must be > 0 and finite, got {bad[0]}")
        return by_ratio, by_kernel

    def expected_runtime(self, row: Mapping[tuple[int, float], float]) -> Float[Tensor, ""]:
        """The modelled time of the layer, differentiable in weights and thresholds.

        It is the table's for the largest kernel with every ratio, and for every kernel with all channels; 0 for a
        layer that is skipped.

        Args:
            row: Time by kernel and ratio; of (k, r) only those with the largest k or the largest r are needed.

        Raises:
            KeyError: If one of them is missing.
            ValueError: If one of them is not positive and finite.

        Example:
            >>> row = {(3, 1.0): 9.2015, (5, 0.5): 5.9248, (5, 1.0): 11.5892}
            >>> round(SuperKernelDepthwise(8).expected_runtime(row).item(), 4)
            11.5892
        """
        by_ratio, by_kernel = (self.weight.new_tensor(values) for values in self.rows(row))
        return runtime(by_ratio, by_kernel, self.decide())

    def extra_repr(self) -> str:
        """Channels, kernels, ratios and stride."""
        return f"{self.weight.shape[0]}, kernels={self.kernels}, ratios={self.ratios}, stride={self.stride}"


def _ascending(values: Sequence[float]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))
