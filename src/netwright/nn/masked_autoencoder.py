"""Masked autoencoder: a vision transformer sees the patches of an image that are kept, and draws the others.

He, Chen, Xie, Li, Dollar and Girshick, "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377:

    z = encoder(kept patches),    x^ = decoder(z at their places, one learned token at all others)

trained by the squared error on the patches that were dropped. Parameters are named and shaped as in the authors'
published weights, so that :func:`published` reads these.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from netwright import storage
from netwright.console import UserError

EPS = 1e-6  # of every layer norm
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HEADS = {768: 12, 1024: 16, 1280: 16}  # of the published encoders, by width
_DECODER_HEADS = 16


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, EPS), _Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, EPS), _MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Patches(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


def sine_places(dim: int, rows: int, columns: int) -> Float[Tensor, "1 places dim"]:
    """Sines and cosines of column and row of every place, with zeros in front for the class token.

    Args:
        dim: Numbers of a place, a multiple of 4.
        rows: Of the grid.
        columns: Likewise.

    Example:
        >>> sine_places(8, 2, 3).shape
        torch.Size([1, 7, 8])
    """
    rate = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    parts = []
    for place in (column, row):
        angle = place.flatten()[:, None] * rate
        parts += [angle.sin(), angle.cos()]
    return functional.pad(torch.cat(parts, 1).float(), (0, 0, 1, 0))[None]


class MaskedAutoencoder(nn.Module):
    """Fills the gaps of images; as a module, an ``inpainter`` of :func:`netwright.data.condense.restore`.

    Train it with :func:`netwright.train.fit_masked_autoencoder`, or take the authors' weights, :func:`published`.

    Args:
        shape: Channels, height and width of the images.
        patch: Height and width of a patch, a divisor of both.
        dim: Width of the encoder, a multiple of 4 and of ``heads``.
        depth: Blocks of the encoder.
        heads: Of its attention.
        decoder_dim: Likewise of the decoder.
        decoder_depth: Likewise.
        decoder_heads: Likewise.
        mean: Of each channel, of values in [0, 1].
        std: Likewise, > 0.
        top: What the images that are to be filled hold for white: 255, or 1 for floats in [0, 1].

    Raises:
        ValueError: If an argument is out of its range; in ``forward``, if images or mask do not fit.

    Example:
        >>> filler = MaskedAutoencoder((3, 8, 8), 4, dim=16, depth=1, heads=2, decoder_dim=16)
        >>> images, mask = torch.rand(2, 3, 8, 8), torch.ones(2, 1, 8, 8, dtype=torch.bool)
        >>> mask[:, :, :4, :4] = False
        >>> filler(images * mask, mask).shape
        torch.Size([2, 3, 8, 8])
    """

    pos_embed: Tensor
    decoder_pos_embed: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        patch: int = 16,
        *,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
        decoder_dim: int = 128,
        decoder_depth: int = 2,
        decoder_heads: int = 4,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        top: float = 255.0,
    ):
        super().__init__()
        channels, height, width = shape
        if patch < 1 or height % patch or width % patch:
            raise ValueError(f"patch must divide the size of the images, {height} x {width}, got {patch}")
        for name, wide, many in (("dim", dim, heads), ("decoder_dim", decoder_dim, decoder_heads)):
            if wide < 4 or wide % 4 or many < 1 or wide % many:
                raise ValueError(f"{name} must be a multiple of 4 and of its {many} heads, got {wide}")
        for name, blocks in (("depth", depth), ("decoder_depth", decoder_depth)):
            if blocks < 1:
                raise ValueError(f"{name} must be >= 1, got {blocks}")
        mean, std = (mean or (0.5,) * channels), (std or (0.25,) * channels)
        if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must be {channels} numbers, std > 0, got {tuple(mean)} and {tuple(std)}")
        if not top > 0:
            raise ValueError(f"top must be > 0, got {top}")
        self.shape, self.patch, self.top = (channels, height, width), patch, float(top)
        self.grid = (height // patch, width // patch)
        self.patch_embed = _Patches(channels, dim, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        self.register_buffer("pos_embed", sine_places(dim, *self.grid))
        self.blocks = nn.ModuleList(_Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, EPS)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, decoder_dim) * 0.02)
        self.register_buffer("decoder_pos_embed", sine_places(decoder_dim, *self.grid))
        self.decoder_blocks = nn.ModuleList(_Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, EPS)
        self.decoder_pred = nn.Linear(decoder_dim, patch * patch * channels)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.detach().flatten(1))  # as a matrix; a view

    def patches(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches numbers"]:
        """Images in patches, row by row; of each the pixels row by row, of each pixel its channels."""
        size, (rows, columns) = self.patch, self.grid
        grid = images.unflatten(3, (columns, size)).unflatten(2, (rows, size))
        return grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)

    def images(self, patches: Float[Tensor, "batch patches numbers"]) -> Float[Tensor, "batch channels height width"]:
        """Patches put together again."""
        size, channels = self.patch, self.shape[0]
        grid = patches.unflatten(1, self.grid).unflatten(3, (size, size, channels))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def predict(
        self, images: Float[Tensor, "batch channels height width"], kept: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "batch patches numbers"]:
        """All patches of standardised images as the decoder draws them.

        Args:
            images: What is not kept has no influence.
            kept: Which patches the encoder sees, as many of each image.

        Raises:
            ValueError: If ``kept`` has another shape, or keeps none or another number of some image.
        """
        number = self.grid[0] * self.grid[1]
        if tuple(kept.shape) != (len(images), number):
            raise ValueError(f"kept must have shape ({len(images)}, {number}), got {tuple(kept.shape)}")
        counts = kept.sum(1)
        keep = int(counts[0]) if len(counts) else 0
        if bool((counts != keep).any()) or (len(counts) and not keep):
            raise ValueError(f"kept must hold as many patches of each image, at least 1, got {counts.tolist()}")
        # Kept places first, in order; afterwards every token goes back to its own place.
        order = kept.int().argsort(dim=1, descending=True, stable=True)
        seen = order[:, :keep, None]
        tokens = self.patch_embed(images) + self.pos_embed[:, 1:]
        tokens = tokens.gather(1, seen.expand(-1, -1, tokens.shape[2]))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(images), -1, -1)
        tokens = torch.cat([first, tokens], 1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.decoder_embed(self.norm(tokens))
        whole = self.mask_token.expand(len(images), number, -1).clone()
        whole = whole.scatter(1, seen.expand(-1, -1, whole.shape[2]), tokens[:, 1:])
        tokens = torch.cat([tokens[:, :1], whole], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            tokens = block(tokens)
        return self.decoder_pred(self.decoder_norm(tokens))[:, 1:]

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch 1 height width"],
    ) -> Float[Tensor, "batch channels height width"]:
        """Images with their gaps filled; what is kept comes back as it is.

        Args:
            images: In 0..top; anything where nothing is kept.
            mask: True where something is kept: whole patches.
        """
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images must have shape (batch, {', '.join(map(str, self.shape))}), got {images.shape}")
        kept = mask[:, 0, :: self.patch, :: self.patch]
        if tuple(mask.shape) != (len(images), 1, *self.shape[1:]) or not torch.equal(
            kept.repeat_interleave(self.patch, 1).repeat_interleave(self.patch, 2), mask[:, 0]
        ):
            raise ValueError(f"mask must be of whole patches of {self.patch} x {self.patch}, got {tuple(mask.shape)}")
        standard = self.standardised(torch.where(mask, images, 0) / self.top)
        drawn = self.images(self.predict(standard, kept.flatten(1))) * self.std + self.mean
        return torch.where(mask, images, drawn.clamp(0, 1) * self.top)

    def standardised(self, images: Tensor) -> Float[Tensor, "batch channels height width"]:
        """Images in [0, 1] as encoder and decoder know them."""
        return (images - self.mean) / self.std


def published(path: str | os.PathLike[str]) -> MaskedAutoencoder:
    """The authors' autoencoder from a file of theirs, ``mae_visualize_vit_large_ganloss.pth`` for example.

    Widths, depths and the size of images are those of the weights. Nothing but tensors is read from the file.

    Args:
        path: A checkpoint with encoder and decoder under ``model``.

    Raises:
        UserError: If the file is missing, damaged, or holds no whole masked autoencoder.
    """
    state = storage.read_checkpoint(path)
    state = state.get("model", state)
    try:
        dim, channels, patch, _ = state["patch_embed.proj.weight"].shape
        decoder_dim = state["decoder_embed.weight"].shape[0]
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
        depths = [
            1 + max(int(name.split(".")[1]) for name in state if name.startswith(f"{part}."))
            for part in ("blocks", "decoder_blocks")
        ]
        model = MaskedAutoencoder(
            (channels, side, side),
            patch,
            dim=dim,
            depth=depths[0],
            heads=_HEADS.get(dim, max(1, dim // 64)),
            decoder_dim=decoder_dim,
            decoder_depth=depths[1],
            decoder_heads=_DECODER_HEADS,
            mean=IMAGENET_MEAN[:channels],
            std=IMAGENET_STD[:channels],
        )
        model.load_state_dict({name: value for name, value in state.items() if isinstance(value, Tensor)})
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        told = str(error).splitlines()[-1].strip()
        raise UserError(f"no masked autoencoder with its decoder: {told}", where=path) from error
    return model.eval()
