"""Images in memory, their normalisation, and batches whose order depends on the seed and the step alone."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from netwright.data.augment import Augmentation, rows
from netwright.seeding import stream

Augment = Callable[[Tensor, Generator], Tensor]


class Examples(Protocol):
    """A map-style data set of (image tensor, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Images(Protocol):
    """What a part of a data set is: :class:`TensorImages` in memory, ``FolderImages`` on disk."""

    labels: Tensor
    files: tuple[str, ...] | None
    rows: Tensor | None

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...
    def subset(self, indices: Sequence[int] | Tensor) -> Images:
        """The examples at ``indices``, in that order."""

    def with_labels(self, labels: Tensor) -> Images:
        """The same images with other labels."""

    def digests(self) -> np.ndarray:
        """(N, 16) uint8: equal rows mean equal images."""

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and mean square of each channel, float64 (C,), of values scaled to [0, 1]."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""


def scaled(images: Tensor) -> Tensor:
    """uint8 as float32 in [0, 1]; floats as they are.

    Example:
        >>> scaled(torch.tensor([0, 51, 255], dtype=torch.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return images.float() / 255 if images.dtype == torch.uint8 else images


def image_digests(images: np.ndarray) -> np.ndarray:
    """A 16-byte BLAKE2b digest of each image's bytes, as (N, 16) uint8.

    Example:
        >>> d = image_digests(np.array([[1, 2], [3, 4], [1, 2]], dtype=np.uint8))
        >>> bool((d[0] == d[2]).all()), bool((d[0] == d[1]).all())
        (True, False)
    """
    flat = np.ascontiguousarray(images).reshape(len(images), -1)
    joined = b"".join(hashlib.blake2b(row.data, digest_size=16).digest() for row in flat)
    return np.frombuffer(joined, np.uint8).reshape(-1, 16)


class TensorImages(Dataset[tuple[Tensor, int]]):
    """A data set held in memory.

    Args:
        images: (N, C, H, W) uint8, or float32 for data that is no picture.
        labels: (N,) whole numbers, 0 or more.
        files: The file each image came from, where there is one.
        rows: (N,) the row of each image in the array or data set it came from; subsets keep it.

    Attributes:
        images: As given.
        labels: As int64.
        files: A tuple; None where there are no files.
        rows: As int64; None where they are not known.

    Raises:
        ValueError: If a shape, a type or a length is wrong.

    Example:
        >>> data = TensorImages(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), torch.tensor([0, 1]))
        >>> x, y = data[1]
        >>> x.dtype, float(x.max()), y
        (torch.float32, 1.0, 1)
    """

    def __init__(
        self,
        images: UInt8[Tensor, "examples channels height width"] | Float[Tensor, "examples channels height width"],
        labels: Int[Tensor, "examples"],
        *,
        files: Sequence[str] | None = None,
        rows: Int[Tensor, "examples"] | None = None,
    ):
        if images.ndim != 4:
            raise ValueError(f"images must have shape (examples, channels, height, width), got {tuple(images.shape)}")
        if images.dtype not in {torch.uint8, torch.float32}:
            raise ValueError(f"images must be uint8 or float32, got {images.dtype}")
        if labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise ValueError(f"labels must be {len(images)} integers, got {labels.dtype} of {tuple(labels.shape)}")
        if len(labels) and int(labels.min()) < 0:
            raise ValueError(f"labels must be >= 0, got {int(labels.min())}")
        if files is not None and len(files) != len(images):
            raise ValueError(f"files must be {len(images)} names, got {len(files)}")
        if rows is not None and (rows.is_floating_point() or rows.shape != labels.shape):
            raise ValueError(f"rows must be {len(images)} integers, got {rows.dtype} of {tuple(rows.shape)}")
        self.images, self.labels = images, labels.to(torch.int64)
        self.rows = None if rows is None else rows.to(torch.int64)
        self.files = None if files is None else tuple(files)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return scaled(self.images[index]), int(self.labels[index])

    def __repr__(self) -> str:
        return f"TensorImages({len(self)} x {self.shape}, {self.images.dtype})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def subset(self, indices: Sequence[int] | Tensor) -> TensorImages:
        """A copy of the examples at ``indices``, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        files = None if self.files is None else [self.files[i] for i in chosen.tolist()]
        rows = None if self.rows is None else self.rows[chosen]
        return TensorImages(self.images[chosen], self.labels[chosen], files=files, rows=rows)

    def with_labels(self, labels: Int[Tensor, "examples"]) -> TensorImages:
        """The same images, not copied, with other labels.

        Raises:
            ValueError: If there is not one whole number >= 0 an image.
        """
        return TensorImages(self.images, labels, files=self.files, rows=self.rows)

    def digests(self) -> np.ndarray:
        """(N, 16) uint8: equal rows mean equal images."""
        return image_digests(self.images.numpy())

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and mean square of each channel, float64 (C,), of values scaled to [0, 1]."""
        totals = torch.zeros(2, self.images.shape[1], dtype=torch.float64)
        for block in self.images.split(2048):
            values = block.to(torch.int64 if block.dtype == torch.uint8 else torch.float64)
            totals += torch.stack([values.sum((0, 2, 3)), (values * values).sum((0, 2, 3))]).double()
        top = 255.0 if self.images.dtype == torch.uint8 else 1.0
        count = max(1, self.images[:, 0].numel())
        return (totals[0] / count / top).numpy(), (totals[1] / count / top**2).numpy()


class Normalise(nn.Module):
    """Standardises each channel: uint8 becomes float in [0, 1] first, floats are only standardised.

    Args:
        mean: One value a channel, of values scaled to [0, 1].
        std: Likewise, > 0.

    Raises:
        ValueError: If the two differ in length or a ``std`` is not positive.

    Example:
        >>> normalise = Normalise([0.5], [0.25])
        >>> normalise(torch.tensor([[[[0, 255]]]], dtype=torch.uint8)).flatten().tolist()
        [-2.0, 2.0]
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if len(mean) != len(std) or not mean:
            raise ValueError(f"mean and std must have one value a channel, got {len(mean)} and {len(std)}")
        if not all(value > 0 for value in std):
            raise ValueError(f"std must be > 0, got {tuple(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> Float[Tensor, "*batch channels height width"]:
        """Images (..., C, H, W), standardised."""
        if images.ndim < 3 or images.shape[-3] != len(self.mean):
            raise ValueError(f"images must have shape (..., {len(self.mean)}, H, W), got {tuple(images.shape)}")
        return (scaled(images) - self.mean[:, None, None]) / self.std[:, None, None]


class Batches:
    """Batches of a data set, a pure function of the seed and the number of the step.

    Step s reads permutation number ``s // steps_per_pass``, drawn from ``stream(seed, name, number)``, and
    augments with ``stream(seed, "augment", name, s)``. Epoch e is the steps ``e * steps .. (e + 1) * steps -
    1``. So ``set_epoch(e)`` is all that it takes to go on where a run stopped, whatever the length of an
    epoch. A data set smaller than ``batch_size`` makes one batch a pass. Whatever is no :class:`TensorImages`
    is read by worker processes, in the same order.

    Args:
        dataset: :class:`TensorImages`, or any map-style data set of (image tensor, label).
        batch_size: Examples of the global batch, over all ranks.
        seed: Seed of order and augmentation.
        shuffle: False gives one pass in order, every epoch the same, the last batch being smaller.
        augment: Function of a batch of floats in [0, 1] and a generator.
        normalise: Applied after it.
        steps: Batches an epoch; by default one pass.
        drop_last: Leaves out the examples of a pass that fill no batch (another few in each pass).
        rank: This process, 0 .. world - 1. Each rank gets its contiguous share of the very same global batch;
            shares of a smaller last batch may differ by one example.
        world: Number of processes.
        name: Name of the random stream.
        indexed: Whether each batch ends with the indices of its examples, as (x, labels, indices): for whatever
            remembers something of each example.
        workers: Worker processes; by default none for :class:`TensorImages`, else one a core, at most 8.

    Raises:
        ValueError: If a number is out of its range, the data set is empty, or ``world`` does not divide
            ``batch_size``.

    Example:
        >>> data = TensorImages(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), torch.arange(10))
        >>> batches = Batches(data, 4)
        >>> [y.tolist() for x, y in batches]
        [[0, 6, 8, 2], [1, 9, 3, 7]]
        >>> batches.set_epoch(1)
        >>> [y.tolist() for x, y in batches]
        [[4, 5, 0, 6], [7, 2, 3, 8]]
    """

    def __init__(
        self,
        dataset: Examples,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        augment: Augment | None = None,
        normalise: Normalise | None = None,
        steps: int | None = None,
        drop_last: bool = True,
        rank: int = 0,
        world: int = 1,
        name: str = "order",
        indexed: bool = False,
        workers: int | None = None,
    ):
        self.dataset = dataset
        count = len(dataset)
        if count == 0:
            raise ValueError("dataset must hold at least 1 example, got 0")
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank must lie in 0..world - 1, got rank {rank} of world {world}")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size must be a multiple of world ({world}) and >= 1, got {batch_size}")
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be >= 1, got {steps}")
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be >= 0, got {workers}")
        self.seed, self.shuffle, self.name, self.rank, self.world = seed, shuffle, name, rank, world
        self.augment, self.normalise, self.indexed, self.epoch = augment, normalise, indexed, 0
        self.batch_size = min(batch_size, count if not shuffle else max(world, count // world * world))
        if shuffle and count < self.batch_size:
            raise ValueError(f"dataset must hold at least 1 example for each of {world} ranks, got {count}")
        whole = shuffle and drop_last
        self.steps_per_pass = count // self.batch_size if whole else math.ceil(count / self.batch_size)
        wanted = self.steps_per_pass if steps is None else steps
        self.steps = wanted if shuffle else min(wanted, self.steps_per_pass)
        if workers is None:
            workers = 0 if isinstance(dataset, TensorImages) else min(8, os.cpu_count() or 1)
        self.workers = workers
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that the next iteration reads; nothing else has to be remembered between runs.

        Raises:
            ValueError: If ``epoch`` is negative.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be >= 0, got {epoch}")
        self.epoch = epoch
        if isinstance(self.augment, Augmentation):
            self.augment.set_epoch(epoch)

    def __len__(self) -> int:
        return self.steps

    def indices(self, step: int) -> Int[Tensor, "batch"]:
        """The examples of the global batch of step ``step``, counted from the start of epoch 0."""
        number, place = divmod(step, self.steps_per_pass) if self.shuffle else (0, step % self.steps)
        if self._order[0] != number:
            count = len(self.dataset)
            order = torch.randperm(count, generator=stream(self.seed, self.name, number)) if self.shuffle else None
            self._order = (number, torch.arange(count) if order is None else order)
        return self._order[1][place * self.batch_size : (place + 1) * self.batch_size]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        first = self.epoch * self.steps
        return self._read(list(range(first, first + self.steps)))

    def _read(self, steps: list[int]) -> Iterator[tuple[Tensor, ...]]:
        if isinstance(self.dataset, TensorImages):
            for step in steps:
                chosen = self._loaded(step)
                yield self._finish(step, scaled(self.dataset.images[chosen]), self.dataset.labels[chosen])
            return
        loader = DataLoader(
            cast("Dataset[Any]", self.dataset),
            batch_sampler=[self._loaded(step).tolist() for step in steps],
            num_workers=self.workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # else each pass would draw a seed from the global generator
        )
        for step, (images, labels) in zip(steps, loader, strict=True):
            yield self._finish(step, scaled(images), labels)

    def _share(self, count: int) -> tuple[int, int]:
        return count * self.rank // self.world, count * (self.rank + 1) // self.world

    def _alone(self) -> bool:
        """Whether this rank can augment its own share without the other images of the batch."""
        return self.augment is None or isinstance(self.augment, Augmentation)

    def _loaded(self, step: int) -> Tensor:
        chosen = self.indices(step)
        return chosen[slice(*self._share(len(chosen)))] if self._alone() else chosen

    def _finish(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        chosen = self.indices(step)
        count = len(chosen)
        share = self._share(count)
        if self.augment is not None:
            generator = stream(self.seed, "augment", self.name, step)
            if isinstance(self.augment, Augmentation):
                channels, height, width = images.shape[1:]
                parameters = self.augment.draw(count, (channels, height, width), generator)
                images = self.augment.apply(images, rows(parameters, *share))
            else:
                images = self.augment(images, generator)[slice(*share)]
                labels = labels[slice(*share)]
        normalised = images if self.normalise is None else self.normalise(images)
        return (normalised, labels, chosen[slice(*share)]) if self.indexed else (normalised, labels)


def _collate(examples: list[Any]) -> tuple[Tensor, Tensor]:
    images, labels = default_collate(examples)
    if not isinstance(images, Tensor):
        raise ValueError(f"dataset must give (image tensor, label), got {type(examples[0][0]).__name__}")
    return images, torch.as_tensor(labels, dtype=torch.int64)
