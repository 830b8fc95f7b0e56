"""Views of an image with another bias: translated afresh, or once for all classes and kept as bytes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Generator, Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import gaussian_blur

from netwright.checks import number, one_of
from netwright.console import UserError, task
from netwright.data.tensors import Examples, Normalise, TensorImages, scaled
from netwright.storage import free_bytes
from netwright.train.debias.networks import check_classes
from netwright.train.debias.translator import check_signed

ViewKind = Literal["transformed", "original+transformed"]
MEMORY_LIMIT = 1_000_000_000
AT_ONCE = 4_000_000  # numbers in the images of one pass through a translator


class Translates(Protocol):
    """Anything that turns images into other classes: :class:`BiasTranslator`, or a known change of the bias."""

    num_classes: int

    def translate(self, x: Tensor, y_target: Tensor) -> Tensor:
        """Images in [-1, 1] as images of the classes ``y_target``."""


def signed_range(channels: int) -> Normalise:
    """The layer that turns bytes, or floats in [0, 1], into [-1, 1], where translators live.

    Example:
        >>> signed_range(1)(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist()
        [-1.0, 1.0]
    """
    return Normalise([0.5] * channels, [0.5] * channels)


def as_bytes(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Images in [-1, 1] as bytes.

    Example:
        >>> as_bytes(torch.tensor([-1.0, 0.0, 1.0])).tolist()
        [0, 128, 255]
    """
    return (127.5 * (images + 1)).round().clamp(0, 255).byte()


class ViewCache(Dataset[tuple[Tensor, int]]):
    """All translations of every image of a data set, made once: item i is ((K, C, H, W) uint8, label).

    It takes n K C H W bytes, four times as many where views are not rounded. Above ``memory_limit`` they lie in a file
    that is mapped into memory.

    Args:
        dataset: :class:`netwright.data.TensorImages` of bytes, or any map-style data set of (image, label) whose images
            are bytes or floats in [0, 1].
        translator: Turns images into other classes.
        path: File for the views when they are many, which stays; by default one that goes with the object.
        memory_limit: Bytes up to which they are kept in memory, >= 0.
        batch_size: Translations made at once, >= 1; by default as many as suit the size of the images.
        rounded: Whether views are bytes; else float32 in [0, 1], as the translator made them.

    Attributes:
        views: (N, K, C, H, W) uint8, or float32.
        labels: (N,) int64.

    Raises:
        ValueError: If the data set is empty, images are no bytes and not in [0, 1], or a number is out of its range.
        UserError: If the file does not fit on the disk.

    Example:
        >>> class Negative:
        ...     num_classes = 2
        ...     def translate(self, x, y_target):
        ...         return torch.where(y_target.view(-1, 1, 1, 1) == 1, -x, x)
        >>> data = TensorImages(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.tensor([0, 1, 0]))
        >>> cache = ViewCache(data, Negative())
        >>> cache[0][0][:, 0, 0, 0].tolist(), cache[1][1]
        ([255, 0], 1)
    """

    def __init__(
        self,
        dataset: Examples,
        translator: Translates,
        *,
        path: str | Path | None = None,
        memory_limit: int = MEMORY_LIMIT,
        batch_size: int | None = None,
        rounded: bool = True,
    ):
        if len(dataset) == 0:
            raise ValueError("dataset must hold at least 1 image, got 0")
        if memory_limit < 0:
            raise ValueError(f"memory_limit must be >= 0, got {memory_limit}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        first, _ = _images(dataset, torch.tensor([0]))
        self.classes = translator.num_classes
        shape = (len(dataset), self.classes, *first.shape[1:])
        self.views = self._room(shape, path, memory_limit, torch.uint8 if rounded else torch.float32)
        self.labels = torch.empty(len(dataset), dtype=torch.int64)
        flat = self.views.view(-1, *first.shape[1:])
        at_once = at_once_for(first) if batch_size is None else batch_size
        with task("translating", total=len(flat)) as bar:
            for pairs in torch.arange(len(flat)).split(at_once):
                rows, targets = pairs // self.classes, pairs % self.classes
                images, labels = _images(dataset, rows.unique())
                self.labels[rows[0] : rows[-1] + 1] = labels
                made = translated(translator, images[rows - rows[0]], targets, rounded=rounded)
                flat[pairs[0] : pairs[-1] + 1] = made
                bar.update(int(pairs[-1]) + 1)

    def _room(self, shape: tuple[int, ...], path: str | Path | None, memory_limit: int, dtype: torch.dtype) -> Tensor:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size <= memory_limit:
            return torch.empty(shape, dtype=dtype)
        place = Path(tempfile.gettempdir()) if path is None else Path(path).parent
        if free_bytes(place) < size:
            raise UserError(
                f"the views take {size / 1e9:.1f} GB, more than is free",
                where=place,
                cure="translate each batch afresh",
            )
        # An unnamed file vanishes with the map.
        file: Any = tempfile.TemporaryFile() if path is None else Path(path)  # noqa: SIM115
        return torch.from_numpy(
            np.memmap(file, f"{'u' if dtype == torch.uint8 else 'f'}{dtype.itemsize}", "w+", shape=shape)
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.views[index], int(self.labels[index])

    def pick(self, index: Int[Tensor, "batch"], targets: Int[Tensor, "batch"]) -> Tensor:
        """(batch, channels, height, width): the translation of image ``index[i]`` into class ``targets[i]``."""
        return self.views[index, targets]


def at_once_for(images: Tensor) -> int:
    """How many images of this size pass through a translator at once."""
    return max(1, AT_ONCE // images[0].numel())


def translated(
    translator: Translates, images: Tensor, targets: Int[Tensor, "batch"], *, rounded: bool = True
) -> Tensor:
    """Pictures (batch, channels, height, width) as pictures of other classes, a few at a time where they are large.

    Args:
        translator: Turns images into other classes.
        images: Bytes, or floats in [0, 1].
        targets: The class of each.
        rounded: Whether they come as bytes; else as floats in [0, 1].
    """
    signed, number = signed_range(images.shape[1]), at_once_for(images)
    pairs = zip(images.split(number), targets.split(number), strict=True)
    made = (translator.translate(signed(x), to) for x, to in pairs)
    return torch.cat([as_bytes(x) if rounded else (x + 1) / 2 for x in made])


def _images(dataset: Examples, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes or floats in [0, 1], and labels."""
    if isinstance(dataset, TensorImages):
        images, labels = dataset.images[rows], dataset.labels[rows]
    else:
        items = [dataset[i] for i in rows.tolist()]
        images, labels = torch.stack([item[0] for item in items]), torch.tensor([int(item[1]) for item in items])
    if images.dtype != torch.uint8:
        low, high = (float(value) for value in images.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images of the data set must be bytes or lie in [0, 1], got {low:.4g}..{high:.4g}")
    return images, labels


class TwoViews:
    """Draws the two views of each image of a batch: same label, bias of two classes drawn by lot.

    Views are rounded to bytes whether they are kept or made afresh, so that both are the same, and so that nothing
    hides in what an eye cannot see. Then each is augmented by itself, blurred, and noise is added: an image itself too
    where it is a view, lest the treatment tell which of the two is a translation.

    Args:
        translator: Turns images into other classes; not needed with a cache.
        kind: ``"transformed"``, or ``"original+transformed"``, whose first view is the image itself.
        cache: All translations of the training set, for batches that tell indices.
        augment: Function of a batch of floats in [0, 1] and a generator, for each view by itself; it is given views on
            the CPU.
        noise: Standard deviation of Gaussian noise on views, on a scale from -1 to 1; >= 0.
        blur: Standard deviation in pixels of a Gaussian blur of views, >= 0: takes away fine traces of the label.
        rounded: Whether views that are made afresh are rounded; a cache has its own.

    Raises:
        ValueError: If a value is out of its range, or neither translator nor cache is given.
    """

    def __init__(
        self,
        translator: Translates | None,
        kind: ViewKind = "transformed",
        *,
        cache: ViewCache | None = None,
        augment: Callable[[Tensor, Generator], Tensor] | None = None,
        noise: float = 0.0,
        blur: float = 0.0,
        rounded: bool = True,
    ):
        if kind not in ("transformed", "original+transformed"):
            raise ValueError(f"views must be 'transformed' or 'original+transformed', got {kind!r}")
        number("view_noise", noise, ">= 0")
        number("view_blur", blur, ">= 0")
        one_of("round_views", rounded, (True, False))
        if cache is not None:
            self.num_classes = cache.classes
        elif translator is not None:
            self.num_classes = translator.num_classes
        else:
            raise ValueError("translator must be given where there is no cache, got None")
        self.translator, self.kind, self.cache, self.augment = translator, kind, cache, augment
        self.noise, self.blur, self.rounded = noise, blur, rounded

    def draw_targets(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """The classes that the two views are turned into, each drawn from all, the image's own among them."""
        first, second = torch.randint(self.num_classes, (2, count), generator=generator)
        return first, second

    def __call__(
        self, x: Float[Tensor, "batch channels height width"], index: Tensor | None, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """The two views, floats in [0, 1] but for the noise.

        Args:
            x: The images, floats in [0, 1].
            index: Of the images in the data set, for the cache.
            generator: Of classes, augmentation and noise.

        Raises:
            ValueError: If there is a cache and no indices.
        """
        targets = self.draw_targets(len(x), generator)
        first = x if self.original else self._translated(x, index, targets[0])
        second = self._translated(x, index, targets[1])
        return self._finished(first, generator), self._finished(second, generator)

    @property
    def original(self) -> bool:
        """Whether the first view is the image itself."""
        return self.kind == "original+transformed"

    def kept(
        self,
        index: Int[Tensor, "batch"],
        generator: Generator,
        images: Float[Tensor, "batch channels height width"] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The two views by indices, out of the cache.

        Args:
            index: Of the images in the data set.
            generator: Of classes, augmentation and noise.
            images: The images themselves where they are a view, floats in [0, 1] that are augmented already.

        Raises:
            ValueError: If images are a view and not given.
        """
        assert self.cache is not None
        first, second = (
            scaled(self.cache.pick(index.cpu(), each)) for each in self.draw_targets(len(index), generator)
        )
        if self.original:
            if images is None:
                raise ValueError("images must be given where they are a view, got None")
            return self._covered(images, generator), self._finished(second, generator)
        return self._finished(first, generator), self._finished(second, generator)

    def _finished(self, view: Tensor, generator: Generator) -> Tensor:
        if self.augment is not None:
            view = self.augment(view.cpu(), generator).to(view.device)
        return self._covered(view, generator)

    def _covered(self, view: Tensor, generator: Generator) -> Tensor:
        if self.blur:
            width = 2 * math.ceil(3 * self.blur) + 1
            # Reflection needs a picture that is larger than the reach of the kernel.
            width = min(width, 2 * min(view.shape[2:]) - 1)
            view = gaussian_blur(view, [width, width], [self.blur, self.blur])
        return view + self.noise / 2 * torch.randn(view.shape, generator=generator).to(view) if self.noise else view

    def _translated(self, x: Tensor, index: Tensor | None, targets: Tensor) -> Tensor:
        if self.cache is not None:
            if index is None:
                raise ValueError(
                    "batches must be (x, labels, indices) for cached views: make Batches(..., indexed=True)"
                )
            check_classes("indices", index, len(x), len(self.cache))
            return scaled(self.cache.pick(index.cpu(), targets).to(x.device))
        assert self.translator is not None
        signed = 2 * x - 1
        check_signed(signed)
        made = self.translator.translate(signed, targets.to(x.device))
        return scaled(as_bytes(made)) if self.rounded else (made + 1) / 2


def panel(
    translator: Translates, images: UInt8[Tensor, "examples channels height width"], classes: Sequence[int]
) -> UInt8[Tensor, "examples columns channels height width"]:
    """Images beside their translations into some classes, for the eye: column 0 is the image itself.

    Args:
        translator: Turns images into other classes.
        images: Pictures.
        classes: Which.
    """
    columns = [translated(translator, images, torch.full((len(images),), label)) for label in classes]
    return torch.stack([images, *columns], 1)
