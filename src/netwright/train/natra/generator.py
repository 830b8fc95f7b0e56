"""A small style-based generator with an encoder, trained as an auto-encoder, and an adapter for any other decoder.

    z -> w = m(z) -> (w_1 .. w_S) -> G(w_1, .., w_S),    one w for each of S layers (W+)

Karras, Laine and Aila, "A Style-Based Generator Architecture for Generative Adversarial Networks", CVPR 2019,
arXiv:1812.04948, has the mapping and a style in each layer. What a layer is made of here is netwright's: the first one
makes a small picture of features from its code, each further one is a convolution whose channels are scaled and shifted
by its code. It serves arXiv:2105.04070 where no generator is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.seeding import stream

IMAGE_RANGE = (0.0, 1.0)  # of a generator that tells no other
STATISTICS_SAMPLES = 10_000
LARGEST_SIDE = 64


class Generator(Protocol):
    """What natural transformations ask of a generator: an ``nn.Module`` with these.

    It may tell what its images lie in as ``image_range``, two numbers; without it that is [0, 1].

    Attributes:
        num_layers: S, the codes that an image takes.
        w_mean: Mean (d,) of m(z) for standard normal z.
        w_cov: Covariance (d, d) of it.
    """

    num_layers: int
    w_mean: Tensor
    w_cov: Tensor

    def mapping(self, z: Tensor) -> Tensor:
        """z (batch, z_dim) -> w (batch, d)."""

    def synthesis(self, w_plus: Tensor) -> Tensor:
        """(batch, S, d) -> images."""


class StyleGenerator(nn.Module):
    """A small style-based generator of images in [0, 1], of 4 to 64 pixels a side.

    Args:
        image_shape: (channels, height, width).
        w_dim: d, numbers in a code w, >= 1.
        z_dim: Numbers in z; ``w_dim`` by default.
        channels: Of the convolution at each scale, from coarse to fine; each scale doubles the side. Layer 0 makes the
            features of the coarsest scale, so there are one more layers than scales.
        mapping_layers: Linear layers of the mapping, >= 1.

    Attributes:
        w_mean: Mean of m(z), (d,); :meth:`measure` makes it.
        w_cov: Covariance of m(z), (d, d).
        image_range: What its images lie in.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> generator = StyleGenerator((1, 16, 16), w_dim=8, channels=(8, 8))
        >>> generator(torch.zeros(2, 8)).shape, generator.num_layers
        (torch.Size([2, 1, 16, 16]), 3)
    """

    w_mean: Tensor
    w_cov: Tensor
    image_range = IMAGE_RANGE

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        w_dim: int = 32,
        z_dim: int | None = None,
        channels: Sequence[int] = (64, 32, 16),
        mapping_layers: int = 2,
    ):
        super().__init__()
        check_image_shape(image_shape)
        z_dim = w_dim if z_dim is None else z_dim
        for name, value in (("w_dim", w_dim), ("z_dim", z_dim), ("mapping_layers", mapping_layers)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not channels or min(channels) < 1:
            raise ValueError(f"channels must hold widths >= 1, got {tuple(channels)}")
        self.image_shape, self.w_dim, self.z_dim = tuple(image_shape), w_dim, z_dim
        self.channels, self.mapping_layers = tuple(channels), mapping_layers
        self.num_layers = 1 + len(channels)
        count, height, width = image_shape
        self.sizes = [(-(-height // 2**k), -(-width // 2**k)) for k in reversed(range(len(channels)))]
        mapped: list[nn.Module] = []
        for i in range(mapping_layers):
            mapped += [nn.Linear(z_dim if i == 0 else w_dim, w_dim), nn.LeakyReLU(0.2)]
        self.to_w = nn.Sequential(*mapped[:-1])
        self.start = nn.Linear(w_dim, channels[0] * self.sizes[0][0] * self.sizes[0][1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1)
            for before, after in zip((channels[0], *channels), channels, strict=False)
        )
        self.styles = nn.ModuleList(nn.Linear(w_dim, 2 * width) for width in channels)
        self.to_image = nn.Conv2d(channels[-1], count, 3, padding=1)
        self.register_buffer("w_mean", torch.zeros(w_dim))
        self.register_buffer("w_cov", torch.eye(w_dim))
        for layer in (
            self.start,
            *self.convolutions,
        ):  # torch's own initialisation shrinks features from layer to layer
            nn.init.kaiming_normal_(layer.weight, 0.2)
        self.measure()

    def settings(self) -> dict[str, Any]:
        """The arguments that make such a generator again, JSON-able."""
        return {
            "image_shape": list(self.image_shape), "w_dim": self.w_dim, "z_dim": self.z_dim,
            "channels": list(self.channels), "mapping_layers": self.mapping_layers,
        }  # fmt: skip

    def mapping(self, z: Float[Tensor, "batch z"]) -> Float[Tensor, "batch d"]:
        """m(z)."""
        return self.to_w(z)

    def features(
        self, w_plus: Float[Tensor, "batch layers d"], layer: int
    ) -> Float[Tensor, "batch channels rows columns"]:
        """Feature maps after layers 0 .. ``layer``."""
        first = self.start(w_plus[:, 0]).view(len(w_plus), self.channels[0], *self.sizes[0])
        return self._run(functional.leaky_relu(first, 0.2), w_plus, 0, layer)

    def render(
        self, features: Float[Tensor, "batch maps rows columns"], w_plus: Float[Tensor, "batch layers d"], layer: int
    ) -> Float[Tensor, "batch channels height width"]:
        """The images that the layers after ``layer`` make of feature maps."""
        return self.to_image(self._run(features, w_plus, layer, self.num_layers - 1)).sigmoid()

    def _run(self, h: Tensor, w_plus: Tensor, done: int, last: int) -> Tensor:
        for layer in range(done + 1, last + 1):
            size = self.sizes[layer - 1]
            if tuple(h.shape[-2:]) != size:
                h = functional.interpolate(h, size, mode="bilinear", align_corners=False)
            scale, shift = self.styles[layer - 1](w_plus[:, layer])[..., None, None].chunk(2, 1)
            h = functional.leaky_relu(torch.addcmul(shift, self.convolutions[layer - 1](h), 1 + scale), 0.2)
        return h

    def synthesis(self, w_plus: Float[Tensor, "batch layers d"]) -> Float[Tensor, "batch channels height width"]:
        """G: images in [0, 1] from a code for each layer."""
        return self.render(self.features(w_plus, 0), w_plus, 0)

    def forward(self, z: Float[Tensor, "batch z"]) -> Float[Tensor, "batch channels height width"]:
        """G(m(z), .., m(z))."""
        return self.synthesis(self.mapping(z)[:, None].expand(-1, self.num_layers, -1))

    def style_weights(self, layers: tuple[int, int] | None = None) -> Float[Tensor, "rows d"]:
        """The weights of the affine maps that read the codes of layers [s, e), one below the other; all by default."""
        first, last = (0, self.num_layers) if layers is None else layers
        affine = [self.start, *self.styles][first:last]
        return torch.cat([cast("nn.Linear", layer).weight for layer in affine])

    @torch.no_grad()
    def measure(self, samples: int = STATISTICS_SAMPLES, seed: int = 0) -> None:
        """Takes mean and covariance of m(z) from so many draws of z; to be called when the mapping has changed."""
        z = torch.randn(samples, self.z_dim, generator=stream(seed, "statistics"))
        w = self.mapping(z.to(self.w_mean)).double()
        self.w_mean.copy_(w.mean(0))
        self.w_cov.copy_(torch.cov(w.T).view(self.w_dim, self.w_dim))


class DecoderGenerator(nn.Module):
    """A plain decoder z -> image as a generator with one layer, whose codes w are z itself.

    Args:
        decoder: Maps (batch, latent_dim) to images.
        latent_dim: Numbers in z, >= 1; z is standard normal.
        weight: Weight (p, latent_dim) of the decoder's first affine map, for closed-form directions; None is that of
            the first ``nn.Linear`` in it, if there is one.
        image_range: What its images lie in; infinities for data without bounds.

    Raises:
        ValueError: If ``latent_dim`` is below 1, or ``image_range`` is empty.

    Example:
        >>> generator = DecoderGenerator(nn.Linear(3, 4), latent_dim=3)
        >>> generator.synthesis(torch.zeros(2, 1, 3)).shape, generator.style_weights().shape
        (torch.Size([2, 4]), torch.Size([4, 3]))
    """

    w_mean: Tensor
    w_cov: Tensor
    num_layers = 1

    def __init__(
        self,
        decoder: Callable[[Tensor], Tensor],
        latent_dim: int,
        *,
        weight: Tensor | None = None,
        image_range: tuple[float, float] = IMAGE_RANGE,
    ):
        super().__init__()
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be >= 1, got {latent_dim}")
        low, high = image_range
        if not -math.inf <= low < high <= math.inf:
            raise ValueError(f"image_range must be two numbers, the lesser first, got {tuple(image_range)}")
        self.image_range = (float(low), float(high))
        self.decoder, self.z_dim, self.w_dim, self._weight = decoder, latent_dim, latent_dim, weight
        self.register_buffer("w_mean", torch.zeros(latent_dim))
        self.register_buffer("w_cov", torch.eye(latent_dim))

    def mapping(self, z: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        """z."""
        return z

    def synthesis(self, w_plus: Float[Tensor, "batch 1 d"]) -> Tensor:
        """What the decoder makes of the one code."""
        return self.decoder(w_plus[:, 0])

    def forward(self, z: Float[Tensor, "batch d"]) -> Tensor:
        """What the decoder makes of z."""
        return self.decoder(z)

    def style_weights(self, layers: tuple[int, int] | None = None) -> Float[Tensor, "rows d"]:
        """The weight of the first affine map.

        Raises:
            ValueError: If there is none to be found.
        """
        if self._weight is not None:
            return self._weight
        parts = self.decoder.modules() if isinstance(self.decoder, nn.Module) else ()
        found = next((part for part in parts if isinstance(part, nn.Linear) and part.in_features == self.w_dim), None)
        if found is None:
            raise ValueError("decoder must hold a linear layer that reads z for closed-form directions: give weight=")
        return found.weight


class ImageEncoder(nn.Module):
    """Strided convolutions and a linear layer: from images to ``outputs`` numbers each.

    Args:
        image_shape: (channels, height, width).
        outputs: >= 1.
        channels: Of each 3x3 convolution of stride 2.

    Example:
        >>> ImageEncoder((1, 16, 16), 10)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
    """

    def __init__(self, image_shape: tuple[int, int, int], outputs: int, channels: Sequence[int] = (16, 32, 64)):
        super().__init__()
        check_image_shape(image_shape)
        if outputs < 1:
            raise ValueError(f"outputs must be >= 1, got {outputs}")
        count, *sides = image_shape
        layers: list[nn.Module] = []
        for before, after in zip((count, *channels), channels, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            sides = [-(-side // 2) for side in sides]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels[-1] * sides[0] * sides[1], outputs)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch outputs"]:
        """The numbers."""
        return self.head(self.body(x))


class StyleAutoEncoder(nn.Module):
    """A style generator and an encoder that tells where an image lies in its z.

    Args:
        generator: G and its mapping.
        channels: Of the encoder's convolutions.

    Example:
        >>> both = StyleAutoEncoder(StyleGenerator((1, 16, 16), w_dim=8, channels=(8, 8)))
        >>> both.encode(torch.zeros(2, 1, 16, 16)).shape  # batch, layers, w_dim
        torch.Size([2, 3, 8])
    """

    def __init__(self, generator: StyleGenerator, channels: Sequence[int] = (16, 32, 64)):
        super().__init__()
        self.generator = generator
        self.encoder = ImageEncoder(generator.image_shape, 2 * generator.z_dim, channels)  # type: ignore[arg-type]  # three

    def posterior(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch z"], Float[Tensor, "batch z"]]:
        """Mean and logarithm of the variance of z for each image, the latter kept within [-10, 4]."""
        mean, log_variance = self.encoder(x).chunk(2, 1)
        return mean, log_variance.clamp(-10, 4)

    def encode(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch layers d"]:
        """E(x): m of the mean, the same code for every layer."""
        return self.generator.mapping(self.posterior(x)[0])[:, None].expand(-1, self.generator.num_layers, -1)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        """G(E(x))."""
        return self.generator.synthesis(self.encode(x))


def check_image_shape(shape: Sequence[int]) -> None:
    """Refuses what the reference generator cannot make.

    Raises:
        ValueError: If ``shape`` is not (channels, height, width) with sides of 4 to 64 pixels.
    """
    if len(shape) != 3 or shape[0] < 1:
        raise ValueError(f"image_shape must be (channels, height, width), got {tuple(shape)}")
    if min(shape[1:]) < 4 or max(shape[1:]) > LARGEST_SIDE:
        raise ValueError(
            f"images must have sides of 4 to {LARGEST_SIDE} pixels for the generator of netwright, got "
            f"{shape[1]} x {shape[2]}"
        )
