"""Batches for a search: each training batch comes with a fresh validation batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from netwright.search.searcher import Searcher


class Pairs:
    """Pairs of a training batch and a fresh validation batch: as many as there are training batches.

    The validation batches start again from a new order when there are fewer of them. Each epoch is set on loaders that
    have ``set_epoch``. The validation batch is ``None`` in a stage that has no use for it.

    A step whose ``phased`` is true gets all training batches first and then every validation batch once, each with
    ``None`` for the other; the length is then that of an epoch with both phases.

    Raises:
        ValueError: If a loader is missing, empty or of unknown length.
    """

    def __init__(self, train: Any, val: Any, searcher: Searcher):
        self.train, self.val, self.searcher = train, val, searcher
        wanted = {"train": train}
        alternating = any(stage.alpha_step for stage in searcher.stages)
        self.phased = alternating and getattr(searcher.method, "phased", False)
        if alternating:
            wanted["val"] = val
        for name, loader in wanted.items():
            try:
                length = 0 if loader is None else len(loader)
            except TypeError as error:
                raise ValueError(f"{name} must have a length, got {type(loader).__name__}") from error
            if length < 1:
                raise ValueError(f"{name} must hold at least 1 batch, got {length}")

    def __len__(self) -> int:
        return len(self.train) + (len(self.val) if self.phased else 0)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        # The epoch is read when the first pair is asked for: Lightning makes the iterator before it knows.
        epoch = self.searcher.epoch
        _set_epoch(self.train, epoch)
        if self.phased or not self.searcher.stage.alpha_step:
            for train_batch in self.train:
                yield train_batch, None
            if self.searcher.stage.alpha_step:
                _set_epoch(self.val, epoch)
                for val_batch in self.val:
                    yield None, val_batch
            return
        yield from zip(self.train, self._validation(epoch), strict=False)

    def _validation(self, epoch: int) -> Iterator[Any]:
        passes = math.ceil(len(self.train) / len(self.val))
        for number in range(passes):
            _set_epoch(self.val, epoch * passes + number)
            yield from self.val


def _set_epoch(loader: Any, epoch: int) -> None:
    for owner in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if callable(set_epoch := getattr(owner, "set_epoch", None)):
            set_epoch(epoch)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor on a device; tuples and lists keep their kind."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    return type(batch)(to_device(part, device) for part in batch) if type(batch) in (tuple, list) else batch
