"""Folders of class folders: the one reader and the one writer.

A folder holds one folder a class, or the parts ``train`` (``training``), ``val`` (``valid``, ``validation``)
and ``test`` (``testing``) with one folder a class in each. Images may lie in further folders inside a class.
Hidden files and what has no ending of an image format are passed over. Classes are sorted by name, and by
value when all are numbers.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from netwright.console import UserError, task
from netwright.data.layout import find_images, ordered
from netwright.data.parts import PARTS, Parts
from netwright.data.pictures import Header, UnreadableError, decode, read_header
from netwright.data.problems import Problem, counted, listing, refusal
from netwright.data.tensors import Images, TensorImages, image_digests, scaled
from netwright.storage import new_folder

SMALLEST_SIDE, LARGEST_SIDE = 32, 224
MEMORY_SHARE = 0.4


class FolderImages(Dataset[tuple[Tensor, int]]):
    """A data set too large for memory: each image is decoded when asked for, by the rules of ``pictures.py``.

    Args:
        files: Paths of the images.
        labels: (N,) whole numbers.
        shape: (C, H, W) of every image.
        digests: (N, 16) uint8, one digest for each decoded image.
        sums: (N, 2, C) float64: sum and sum of squares of each channel, of values in 0..255.
    """

    def __init__(
        self,
        files: Sequence[str],
        labels: Tensor,
        shape: tuple[int, int, int],
        digests: np.ndarray,
        sums: np.ndarray,
    ):
        self.files: tuple[str, ...] | None = tuple(files)
        self.rows: Tensor | None = None
        self.labels, self.shape = labels.to(torch.int64), shape
        self._digests, self._sums = digests, sums

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert self.files is not None
        try:
            pixels = decode(self.files[index], self.shape)
        except UnreadableError as error:
            raise UserError(
                f"an image cannot be read any more: {error}",
                where=self.files[index],
                cure="put it back and go on",
            ) from error
        return scaled(torch.from_numpy(np.array(pixels))), int(self.labels[index])

    def __repr__(self) -> str:
        return f"FolderImages({len(self)} x {self.shape})"

    def subset(self, indices: Sequence[int] | Tensor) -> FolderImages:
        """The examples at ``indices``, in that order."""
        assert self.files is not None
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        rows = chosen.numpy()
        files = [self.files[i] for i in chosen.tolist()]
        return FolderImages(files, self.labels[chosen], self.shape, self._digests[rows], self._sums[rows])

    def with_labels(self, labels: Tensor) -> FolderImages:
        """The same images with other labels.

        Raises:
            ValueError: If there is not one whole number >= 0 an image.
        """
        if labels.is_floating_point() or labels.shape != self.labels.shape or (len(labels) and int(labels.min()) < 0):
            raise ValueError(f"labels must be {len(self)} integers >= 0, got {labels.dtype} of {tuple(labels.shape)}")
        assert self.files is not None
        return FolderImages(self.files, labels, self.shape, self._digests, self._sums)

    def digests(self) -> np.ndarray:
        """(N, 16) uint8: equal rows mean equal images."""
        return self._digests

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and mean square of each channel, float64 (C,), of values scaled to [0, 1]."""
        totals = self._sums.sum(0) / max(1, len(self) * self.shape[1] * self.shape[2])
        return totals[0] / 255, totals[1] / 255**2


def read_folder(
    folder: str | os.PathLike[str],
    *,
    size: tuple[int, int] | None = None,
    skip_broken: bool = False,
    memory_limit: int | None = None,
) -> Parts:
    """Reads a folder of class folders.

    Every image is resized to one size: ``size``, else that of the training images if they all share one of at
    most 224 pixels a side, else their median height and width, each rounded to a multiple of 4 and kept
    within 32..224. Images are grey when all of the folder's are, else RGB.

    Args:
        folder: The folder.
        size: (height, width) wanted.
        skip_broken: Passes over files that cannot be read, instead of a fault that ``load`` refuses.
        memory_limit: Bytes above which images stay on disk; by default 40 % of the memory that is available.

    Raises:
        UserError: If the folder holds no images in class folders.
    """
    root = Path(folder)
    found = find_images(root)
    broken: dict[str, str] = {}
    headers: dict[str, Header] = {}
    for _, path in (entry for entries in found.files.values() for entry in entries):
        try:
            headers[path] = read_header(path)
        except UnreadableError as error:
            broken[path] = str(error)
    usable = {part: [e for e in entries if e[1] in headers] for part, entries in found.files.items()}
    if not usable["train"]:
        raise UserError(_broken_message(root, broken), where=root / found.places["train"], cure="check the files")
    training = [headers[path] for _, path in usable["train"]]
    height, width = size or target_size([(h.height, h.width) for h in training])
    shape = (1 if all(h.grey for h in headers.values()) else 3, height, width)
    bytes_needed = len(headers) * shape[0] * height * width
    in_memory = bytes_needed <= (memory_limit if memory_limit is not None else int(MEMORY_SHARE * available_memory()))
    images: dict[str, Images] = {}
    classes: dict[str, int] = {}
    known = 0
    with task("reading images", total=len(headers)) as bar:
        for part in (p for p in PARTS if p in usable):
            decoded = _decode_all(usable[part], shape, in_memory, bar.advance)
            broken |= decoded.broken
            if not decoded.entries and part != "train":
                continue
            for label in ordered({label for label, _ in decoded.entries}):
                classes.setdefault(label, len(classes))
            labels = torch.tensor([classes[label] for label, _ in decoded.entries], dtype=torch.int64)
            images[part] = decoded.dataset(labels, shape)
            known = len(classes) if part == "train" else known
    if known == 0:
        raise UserError(_broken_message(root, broken), where=root / found.places["train"], cure="check the files")
    problems = found.problems
    if broken:
        message = _broken_message(root, broken)
        problems.append(
            Problem("broken", f"{message}; left out", str(root), False)
            if skip_broken
            else refusal("broken", message, root, "delete or replace them, or add --skip-broken")
        )
    sizes = Counter((h.height, h.width) for path, h in headers.items() if path not in broken)
    if len(sizes) > 1:
        low, high = (f"{f(h for h, _ in sizes)} x {f(w for _, w in sizes)}" for f in (min, max))
        message = f"images have {len(sizes)} sizes, {low} to {high} (height x width); all become {height} x {width}"
        problems.append(Problem("sizes", message, str(root), False))
    return Parts(
        root.resolve().name,
        str(root),
        images,
        tuple(classes),
        known,
        found.places,
        problems,
        sizes,
        folder=root,
    )


def _broken_message(root: Path, broken: dict[str, str]) -> str:
    names = [f"{Path(path).relative_to(root)} ({reason})" for path, reason in sorted(broken.items())]
    return f"{counted(len(names), 'file')} cannot be read: {listing(names)}"


def target_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one size of a folder's images, (height, width), as :func:`read_folder` says.

    Example:
        >>> target_size([(28, 20)] * 3), target_size([(100, 61), (90, 80), (120, 70)])
        ((28, 20), (100, 72))
        >>> target_size([(900, 8), (900, 9)])
        (224, 32)
    """
    if len(set(sizes)) == 1 and max(sizes[0]) <= LARGEST_SIDE:
        return sizes[0]
    middle = np.median(np.array(sizes), axis=0)
    height, width = (int(np.clip(4 * np.floor(side / 4 + 0.5), SMALLEST_SIDE, LARGEST_SIDE)) for side in middle)
    return height, width


def available_memory() -> int:
    """Bytes of memory that may be taken now: what the system has available, within a container's limit."""
    page = os.sysconf("SC_PAGE_SIZE")
    room = page * os.sysconf("SC_PHYS_PAGES")
    try:
        meminfo = Path("/proc/meminfo").read_text()
        room = int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo)[1]) * 1024  # type: ignore[index]
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        room = min(room, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError, TypeError):  # not Linux, or no limit: "max" is no number
        pass
    return max(0, room)


@dataclass
class _Decoded:
    entries: list[tuple[str, str]]
    broken: dict[str, str]
    pixels: np.ndarray | None
    digests: np.ndarray
    sums: np.ndarray

    def dataset(self, labels: Tensor, shape: tuple[int, int, int]) -> Images:
        files = [path for _, path in self.entries]
        if self.pixels is None:
            return FolderImages(files, labels, shape, self.digests, self.sums)
        return TensorImages(torch.from_numpy(self.pixels), labels, files=files)


def _decode_all(
    entries: list[tuple[str, str]], shape: tuple[int, int, int], keep: bool, advance: Callable[[], object]
) -> _Decoded:
    """Decodes every image once: into memory, or only for its digest and sums."""
    pixels = np.empty((len(entries), *shape), np.uint8) if keep else None
    digests = np.zeros((len(entries), 16), np.uint8)
    sums = np.zeros((len(entries), 2, shape[0]))
    broken: dict[str, str] = {}

    def one(i: int) -> None:
        try:
            image = decode(entries[i][1], shape)
        except UnreadableError as error:
            broken[entries[i][1]] = str(error)
            return
        if pixels is not None:
            pixels[i] = image
            return
        digests[i] = image_digests(image[None])[0]
        wide = image.astype(np.int64)
        sums[i] = wide.sum((1, 2)), (wide * wide).sum((1, 2))

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(one, range(len(entries))):
            advance()
    good = [i for i, (_, path) in enumerate(entries) if path not in broken]
    if pixels is not None and broken:
        pixels = pixels[good]
    return _Decoded([entries[i] for i in good], broken, pixels, digests[good], sums[good])


def write_folder(
    folder: str | os.PathLike[str], parts: TensorImages | dict[str, TensorImages], classes: Sequence[str]
) -> None:
    """Writes images as PNG files, one folder a class; :func:`read_folder` reads the very same pixels.

    The folder appears whole or not at all. Characters that a file name cannot hold become ``_``; the classes
    are read back in the order of their names.

    Args:
        folder: A folder that does not exist yet, or is empty.
        parts: One data set, or one for each part by name (``train``, ``validation``, ``test``).
        classes: Name of each label.

    Raises:
        ValueError: If images are no uint8 of 1 or 3 channels, a part's name is unknown, a label has no name,
            or two classes would share a folder.
        UserError: If the folder holds something already.

    Example:
        >>> images = TensorImages(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]))
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "data"
        >>> write_folder(target, images, ["cat", "dog"])
        >>> sorted(str(p.relative_to(target)) for p in target.rglob("*.png"))
        ['cat/0.png', 'cat/1.png', 'dog/2.png', 'dog/3.png']
    """
    names = _folder_names(classes)
    datasets = parts if isinstance(parts, dict) else {"": parts}
    _check_parts(datasets, names)
    for images in datasets.values():
        if images.images.dtype != torch.uint8 or images.shape[0] not in {1, 3}:
            raise ValueError(f"images must be uint8 with 1 or 3 channels, got {images}")
    with new_folder(folder) as temporary:
        for part, images in datasets.items():
            digits = len(str(max(0, len(images) - 1)))
            for label in images.labels.unique().tolist():
                (temporary / part / names[label]).mkdir(parents=True, exist_ok=True)
            pixels = images.images.permute(0, 2, 3, 1).numpy()
            for i, label in enumerate(images.labels.tolist()):
                picture = pixels[i, :, :, 0] if images.shape[0] == 1 else pixels[i]
                Image.fromarray(picture).save(temporary / part / names[label] / f"{i:0{digits}d}.png")


def copy_files(folder: str | os.PathLike[str], parts: Mapping[str, Images], classes: Sequence[str]) -> None:
    """Copies the image files that parts came from, as they are, one folder a class in each part.

    The folder appears whole or not at all. A file keeps its name behind its number, since two may have the same.

    Args:
        folder: A folder that does not exist yet, or is empty.
        parts: By name (``train``, ``validation``, ``test``); each with ``files``.
        classes: Name of each label.

    Raises:
        ValueError: If a part has no files or an unknown name, a label has no name, or two classes would share a folder.
        UserError: If the folder holds something already.
    """
    names = _folder_names(classes)
    _check_parts(parts, names)
    with new_folder(folder) as temporary:
        for part, images in parts.items():
            if images.files is None:
                raise ValueError(f"parts must come from files, got {part!r} without")
            digits = len(str(max(0, len(images) - 1)))
            for label in images.labels.unique().tolist():
                (temporary / part / names[label]).mkdir(parents=True, exist_ok=True)
            for i, (file, label) in enumerate(zip(images.files, images.labels.tolist(), strict=True)):
                shutil.copyfile(file, temporary / part / names[label] / f"{i:0{digits}d}-{Path(file).name}")


def _folder_names(classes: Sequence[str]) -> list[str]:
    names = [re.sub(r'[\x00-\x1f/\\:*?"<>|]', "_", name).strip(" .") or "_" for name in classes]
    if len({name.lower() for name in names}) < len(names):
        raise ValueError(f"classes must have different folder names, got {listing(names)}")
    return names


def _check_parts(parts: Mapping[str, Images], names: list[str]) -> None:
    for part, images in parts.items():
        if part and part not in PARTS:
            raise ValueError(f"parts must be named {', '.join(PARTS)}, got {part!r}")
        if len(images) and int(images.labels.max()) >= len(names):
            raise ValueError(f"classes must name label {int(images.labels.max())}, got {len(names)} names")
