"""Data sets that tell the index of each example, for whatever remembers something of each."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset, IterableDataset


class IndexedDataset(Dataset[tuple[Any, Any, int]]):
    """A map-style data set of (x, y), as (x, y, index); indices do not depend on order or workers.

    Args:
        dataset: Any map-style data set whose items are pairs.

    Raises:
        TypeError: For an iterable data set, which has no indices.

    Example:
        >>> IndexedDataset([("a", 0), ("b", 1)])[1]
        ('b', 1, 1)
    """

    def __init__(self, dataset: Any):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(f"dataset must be map-style, since indices must be stable, got {type(dataset).__name__}")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie in 0..{len(self) - 1}, got {index}")
        x, y = self.dataset[index]
        return x, y, index % len(self)
