"""Latent codes of images: one or several for each, with weights that merge their feature maps at an inner layer.

With M codes an image is (Gu, Shen and Zhou, "Image Processing Using Multi-Code GAN Prior", CVPR 2020, arXiv:1912.07116)

    F = sum_m alpha_m o F_l(w^(m)),    x = the layers after l of F with the mean code,

alpha_m one weight a channel. This is "latent codes expansion" of arXiv:2105.04070 as netwright reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from netwright.train.natra.generator import Generator


@dataclasses.dataclass(frozen=True, eq=False)
class LatentCodes:
    """What a generator makes a batch of images of.

    Attributes:
        w: M codes for each image and layer, (B, M, S, d).
        alpha: Weights (B, M, C) of the channels of layer ``merge_layer``; None where M is 1 and nothing is merged.
        merge_layer: l, in 0 .. S - 1.

    Raises:
        ValueError: If a shape is wrong, several codes have no weights or no layer to be merged at, or there is no such
            layer.

    Example:
        >>> codes = LatentCodes(torch.zeros(5, 1, 3, 8))
        >>> len(codes), len(codes[:2]), codes.mean.shape
        (5, 2, torch.Size([5, 3, 8]))
    """

    w: Float[Tensor, "batch codes layers d"]
    alpha: Float[Tensor, "batch codes channels"] | None = None
    merge_layer: int | None = None

    def __post_init__(self) -> None:
        if self.w.ndim != 4:
            raise ValueError(f"w must have shape (batch, codes, layers, d), got {tuple(self.w.shape)}")
        if (self.alpha is None) != (self.merge_layer is None) or (self.alpha is None and self.w.shape[1] > 1):
            raise ValueError(f"{self.w.shape[1]} codes an image need both alpha and merge_layer, or one code neither")
        if self.alpha is not None and self.alpha.shape[:2] != self.w.shape[:2]:
            raise ValueError(f"alpha must begin with {tuple(self.w.shape[:2])}, got {tuple(self.alpha.shape)}")
        if self.merge_layer is not None and not 0 <= self.merge_layer < self.w.shape[2]:
            raise ValueError(f"merge_layer must lie in 0..{self.w.shape[2] - 1}, got {self.merge_layer}")

    def __len__(self) -> int:
        return len(self.w)

    def __getitem__(self, rows: Any) -> LatentCodes:
        return LatentCodes(self.w[rows], None if self.alpha is None else self.alpha[rows], self.merge_layer)

    @property
    def mean(self) -> Float[Tensor, "batch layers d"]:
        """The mean code of each image; of equal codes exactly these."""
        first = self.w[:, 0]
        return first if self.w.shape[1] == 1 else first + (self.w - first[:, None]).mean(1)

    def decode(self, generator: Generator, shift: Float[Tensor, "batch layers d"] | None = None) -> Tensor:
        """The images, all M codes moved by ``shift``.

        Args:
            generator: G; for codes that are merged it also needs ``features(w_plus, layer)`` and ``render(features,
                w_plus, layer)``, as :class:`netwright.train.natra.StyleGenerator` has them.
            shift: Of the codes of each layer; none by default.
        """
        w = self.w if shift is None else self.w + shift[:, None]
        if self.alpha is None or self.merge_layer is None:
            return generator.synthesis(w[:, 0])
        batch, count = w.shape[:2]
        maps = generator.features(w.flatten(0, 1), self.merge_layer)  # type: ignore[attr-defined]
        maps = maps.view(batch, count, *maps.shape[1:])
        weight = self.alpha[..., None, None]
        # As weights of the differences to the first code: equal codes whose weights sum to 1 change no bit of it.
        merged = maps[:, 0] * weight.sum(1)
        if count > 1:
            merged = merged + (weight[:, 1:] * (maps[:, 1:] - maps[:, :1])).sum(1)
        return generator.render(merged, LatentCodes(w, self.alpha, self.merge_layer).mean, self.merge_layer)  # type: ignore[attr-defined]

    def to(self, device: torch.device | str) -> LatentCodes:
        """The codes on another device."""
        return LatentCodes(self.w.to(device), None if self.alpha is None else self.alpha.to(device), self.merge_layer)

    @staticmethod
    def joined(parts: Sequence[LatentCodes]) -> LatentCodes:
        """One batch after another."""
        alphas = [part.alpha for part in parts if part.alpha is not None]
        return LatentCodes(
            torch.cat([part.w for part in parts]), torch.cat(alphas) if alphas else None, parts[0].merge_layer
        )
