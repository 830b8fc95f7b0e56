"""Pictures without labels: whatever lies in a folder, or the images of a data set whose labels are not looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from netwright.console import UserError
from netwright.data.pictures import UnreadableError, decode, extensions
from netwright.data.sources import NAMED, Reading, read


def unlabelled_images(
    name_or_path: str, shape: tuple[int, int, int], *, limit: int | None = None
) -> UInt8[Tensor, "images channels height width"]:
    """All pictures of a folder and the folders in it, of a ``.npz``, or of a data set by name.

    Args:
        name_or_path: A folder of images of any depth, a ``.npz`` as for :func:`netwright.data.load`, or a name.
        shape: (channels, height, width); pictures of a folder are resized to it, others must have it.
        limit: Images at most; all by default.

    Raises:
        UserError: If nothing is there, a file cannot be read, or images of fixed size are of another one.

    Example:
        >>> unlabelled_images("digits", (1, 8, 8), limit=3).shape
        torch.Size([3, 1, 8, 8])
    """
    folder = Path(name_or_path).expanduser()
    if name_or_path not in NAMED and folder.is_dir():
        return _of_folder(folder, shape, limit)
    parts = read(name_or_path, Reading())
    found = [images for images in parts.images.values() if len(images)]
    for part in found:
        if tuple(part.shape) != tuple(shape) or getattr(part, "images", torch.empty(0)).dtype != torch.uint8:
            sides = " x ".join(map(str, shape))
            raise UserError(
                f"unlabelled images must be pictures of {sides}, got {' x '.join(map(str, part.shape))}",
                where=name_or_path,
            )
    images: Tensor = torch.cat([part.images for part in found])  # type: ignore[attr-defined]  # not on disk
    return images[:limit]


def _of_folder(folder: Path, shape: tuple[int, int, int], limit: int | None) -> Tensor:
    endings = extensions()
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings and path.is_file())
    if not files:
        raise UserError("no images here", where=folder)
    made = np.empty((len(files[:limit]), *shape), np.uint8)
    for i, path in enumerate(files[:limit]):
        try:
            made[i] = decode(str(path), shape)
        except UnreadableError as error:
            raise UserError(f"cannot read the image: {error}", where=path, cure="take it away") from error
    return torch.from_numpy(made)
