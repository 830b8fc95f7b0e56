"""Images without their least informative patches, stored as bytes and filled in again when they are read.

Zhou et al., "Dataset Quantization", ICCV 2023, arXiv:2308.10524, step 3: of the L patches of an image the

    int(L (1 - theta))

with the highest Grad-CAM++ importance are kept. The paper fills the gaps with a masked autoencoder
(:class:`netwright.nn.masked_autoencoder.MaskedAutoencoder`); any module that maps (pixels, mask) to an image serves,
and three fillers without training come along.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from netwright.nn.activations import CamMethod, class_map

Filler = Callable[[Tensor, Tensor], Tensor]
"""Takes images (batch, channels, height, width), zero where nothing is kept, and a boolean mask (batch, 1, height,
width) that is True where something is; gives whole images."""


def _grid(height: int, width: int, patch: int) -> tuple[int, int]:
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch must divide the size of the images, {height} x {width}, got {patch}")
    return height // patch, width // patch


def patch_importance(
    model: nn.Module,
    images: Float[Tensor, "batch channels height width"],
    target: Int[Tensor, "batch"] | None = None,
    patch: int = 16,
    method: CamMethod = "gradcam++",
) -> Float[Tensor, "batch patches"]:
    """How much each patch speaks for the class: the class map of a trained classifier, resized to the patches.

    Args:
        model: The classifier.
        images: As it takes them.
        target: The class of each image; the predicted one by default.
        patch: Height and width of a patch, a divisor of the images'.
        method: ``"gradcam++"`` or ``"gradcam"``.

    Returns:
        Numbers >= 0, patches row by row.

    Raises:
        ValueError: If ``patch`` is no divisor, or as :func:`netwright.nn.activations.class_map`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> patch_importance(net, torch.rand(3, 1, 8, 8), patch=4).shape
        torch.Size([3, 4])
    """
    size = _grid(images.shape[-2], images.shape[-1], patch)
    places = class_map(model, images, target, method=method)
    return functional.interpolate(places[:, None], size, mode="bilinear", antialias=True)[:, 0].flatten(1)


@dataclass(frozen=True, eq=False)
class PatchedImages:
    """Images of which some patches are kept.

    Attributes:
        patches: (images, kept, channels, patch, patch), of the type of the images.
        index: (images, kept), the number of each patch, row by row, ascending; the smallest unsigned type that does.
        shape: Channels, height and width of an image.
    """

    patches: Tensor
    index: Tensor
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, chosen: Any) -> PatchedImages:
        return PatchedImages(self.patches[chosen], self.index[chosen], self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of patches and indices."""
        return self.patches.nbytes + self.index.nbytes

    def canvas(self) -> tuple[Tensor, Bool[Tensor, "batch 1 height width"]]:
        """The images with zeros for what is not kept, and the mask of what is."""
        channels, height, width = self.shape
        size = self.patches.shape[-1]
        rows, columns = height // size, width // size
        index = self.index.long()
        whole = self.patches.new_zeros(len(self), rows * columns, channels, size, size)
        whole.scatter_(1, index[:, :, None, None, None].expand_as(self.patches), self.patches)
        kept = torch.zeros(len(self), rows * columns, dtype=torch.bool, device=index.device).scatter_(1, index, True)
        mask = kept.view(-1, 1, rows, columns).repeat_interleave(size, 2).repeat_interleave(size, 3)
        images = whole.view(-1, rows, columns, channels, size, size).permute(0, 3, 1, 4, 2, 5)
        return images.reshape(-1, channels, height, width), mask


def drop_patches(
    images: Tensor, importance: Float[Tensor, "batch patches"], drop_ratio: float, patch: int
) -> PatchedImages:
    """Keeps the int(L (1 - drop_ratio)) most important of L patches, at least one; equal ones by lower number.

    Args:
        images: (batch, channels, height, width) of any type; uint8 is what is worth storing.
        importance: Of each patch, row by row.
        drop_ratio: Share of patches to drop, in [0, 1).
        patch: Height and width of a patch, a divisor of the images'.

    Raises:
        ValueError: If an argument is out of its range, or ``importance`` does not fit the images.

    Example:
        >>> images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4)
        >>> drop_patches(images, torch.tensor([[0.1, 0.9, 0.3, 0.2]]), 0.5, 2).index.tolist()
        [[1, 2]]
    """
    if not 0 <= drop_ratio < 1:
        raise ValueError(f"drop_ratio must lie in [0, 1), got {drop_ratio}")
    batch, channels, height, width = images.shape
    rows, columns = _grid(height, width, patch)
    number = rows * columns
    if tuple(importance.shape) != (batch, number):
        raise ValueError(f"importance must have shape ({batch}, {number}), got {tuple(importance.shape)}")
    keep = max(1, int(number * (1 - drop_ratio) + 1e-9))  # 0.8 * 5 is 3.9999999999999996
    chosen = importance.sort(dim=1, descending=True, stable=True).indices[:, :keep].sort(dim=1).values.to(images.device)
    whole = images.reshape(batch, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
    whole = whole.reshape(batch, number, channels, patch, patch)
    patches = whole.gather(1, chosen[:, :, None, None, None].expand(-1, -1, channels, patch, patch))
    kind = next(kind for kind in (torch.uint8, torch.uint16, torch.int32) if number - 1 <= torch.iinfo(kind).max)
    return PatchedImages(patches, chosen.to(kind), (channels, height, width))


def mean_of_kept(images: Tensor, mask: Tensor) -> Tensor:
    """Every gap gets the mean of what is kept of its image, channel by channel."""
    return torch.where(mask, images, images.sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True))


def nearest_kept(images: Tensor, mask: Tensor) -> Tensor:
    """Every pixel of a gap gets the nearest kept pixel of its image."""
    from scipy.ndimage import distance_transform_edt

    batch, _, height, width = images.shape
    # All images in one transform: a step to another image is longer than any way inside one.
    apart = (2.0 * (height + width), 1.0, 1.0)
    kept = mask[:, 0].cpu().numpy()
    place = distance_transform_edt(~kept, sampling=apart, return_distances=False, return_indices=True)
    source = torch.from_numpy(np.ravel_multi_index(tuple(place[1:]), (height, width))).to(images.device)
    flat = images.flatten(2)
    return flat.gather(2, source.view(batch, 1, -1).expand_as(flat)).view_as(images)


def biharmonic(images: Tensor, mask: Tensor) -> Tensor:
    """Gaps get the surface of least bending energy, sum u_xx^2 + 2 u_xy^2 + u_yy^2, through what is kept.

    Inside a gap it solves the biharmonic equation; slopes go on where a gap meets the border. One sparse system for the
    whole batch. Where hardly anything is kept (all on one line), a weak pull to the mean decides.
    """
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    batch, channels, height, width = images.shape

    def differences(n: int, order: int) -> Any:
        stencil = {0: [1.0], 1: [-1.0, 1.0], 2: [1.0, -2.0, 1.0]}[order]
        rows = max(0, n - order)
        return sparse.diags_array(stencil, offsets=range(order + 1), shape=(rows, n))

    terms = ((2, 0, 1.0), (0, 2, 1.0), (1, 1, 2.0))
    bend = [(sparse.kron(differences(height, a), differences(width, b)), weight) for a, b, weight in terms]
    energy = sum(weight * (d.T @ d) for d, weight in bend) + 1e-9 * sparse.eye_array(height * width)
    system = sparse.kron(sparse.eye_array(batch), energy).tocsr()
    kept = mask.expand(batch, 1, height, width).reshape(-1).cpu().numpy()
    mean = images.sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
    centred = torch.where(mask, images - mean, 0).transpose(0, 1).reshape(channels, -1).double().cpu().numpy()
    filled = centred.copy()
    if not kept.all():
        pulled = -(system[~kept][:, kept] @ centred[:, kept].T)
        filled[:, ~kept] = spsolve(system[~kept][:, ~kept].tocsc(), pulled).reshape(-1, channels).T
    whole = torch.from_numpy(filled).view(channels, batch, height, width).transpose(0, 1)
    return torch.where(mask, images, whole.to(images) + mean)


def restore(patched: PatchedImages, inpainter: Filler = mean_of_kept) -> Tensor:
    """Whole images: gaps from the filler, kept patches exactly as they were.

    Args:
        patched: From :func:`drop_patches`.
        inpainter: :func:`mean_of_kept`, :func:`nearest_kept`, :func:`biharmonic`, or a module,
            :class:`~netwright.nn.masked_autoencoder.MaskedAutoencoder` say. It works on floats; uint8 images are in
            0..255 and rounded afterwards.

    Raises:
        ValueError: If the filler gives another shape.

    Example:
        >>> images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
        >>> patched = drop_patches(images, torch.rand(2, 4), 0.0, 4)
        >>> torch.equal(restore(patched), images)
        True
    """
    images, mask = patched.canvas()
    exact = not images.is_floating_point()
    with torch.no_grad():
        filled = inpainter(images.float() if exact else images, mask)
    if filled.shape != images.shape:
        raise ValueError(f"inpainter must give {tuple(images.shape)}, got {tuple(filled.shape)}")
    if exact:
        filled = filled.round().clamp(0, torch.iinfo(images.dtype).max).to(images.dtype)
    return torch.where(mask, images, filled.to(images.dtype))


class QuantizedImageDataset(Dataset[tuple[Tensor, int]]):
    """A data set that keeps patches as bytes and restores images as they are read, a batch at a time.

    Args:
        patched: Patches of uint8 images.
        labels: (images,) whole numbers.
        inpainter: As for :func:`restore`.

    Raises:
        ValueError: If the images are not uint8, or images and labels differ in number.

    Example:
        >>> images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
        >>> data = QuantizedImageDataset(drop_patches(images, torch.rand(4, 4), 0.25, 4), torch.arange(4))
        >>> data[2][0].shape, data[2][1], data.nbytes < images.nbytes
        (torch.Size([1, 8, 8]), 2, True)
    """

    def __init__(self, patched: PatchedImages, labels: Int[Tensor, "images"], inpainter: Filler = mean_of_kept):
        if patched.patches.dtype != torch.uint8:
            raise ValueError(f"patched must hold uint8 images, got {patched.patches.dtype}")
        if tuple(labels.shape) != (len(patched),):
            raise ValueError(f"labels must be {len(patched)} numbers, got shape {tuple(labels.shape)}")
        self.patched, self.labels, self.inpainter = patched, labels.to(torch.int64), inpainter

    def __len__(self) -> int:
        return len(self.patched)

    @property
    def nbytes(self) -> int:
        """Bytes of patches and indices."""
        return self.patched.nbytes

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        """What a loader asks for: floats in [0, 1] and labels."""
        images = restore(self.patched[indices], self.inpainter).float() / 255
        return list(zip(images, self.labels[indices].tolist(), strict=True))
