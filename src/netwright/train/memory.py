"""What a network predicted for each training example, kept by the example's index.

Methods that teach a network by its own past predictions share this: PS-KD keeps the last prediction
(:mod:`netwright.train.self_distillation`), early-learning regularisation a running average of all
(:mod:`netwright.train.early_learning`). Rows are found by the index in the data set, so that shuffling, augmentation
and workers do not disturb them; they are buffers, so that checkpoints hold them; and :func:`gather_rows` makes every
process write the rows of all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from netwright.checks import whole

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class PredictionMemory(nn.Module):
    """One row of probabilities an example, and whether it was ever written.

    Args:
        num_examples: Rows; indices are 0..num_examples - 1.
        num_classes: At least 2.
        dtype: Of the rows; float16 halves them, at an error below 5e-4.
        index_name: What messages call the indices.
        topk: Keep only this many largest probabilities of each row, and spread the rest evenly over the others; None
            keeps all. For many classes: a row then takes ``topk * (2 + itemsize)`` bytes.

    Attributes:
        predictions: The rows, (examples, classes or ``topk``); zeros where nothing was written.
        seen: Which rows were written, (examples,).

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> memory = PredictionMemory(3, 2)
        >>> memory.average(torch.tensor([2]), torch.tensor([[0.4, 0.6]]), beta=0.5)
        tensor([[0.2000, 0.3000]])
        >>> memory.recall(torch.tensor([2, 0]))[1]
        tensor([ True, False])
    """

    predictions: Tensor
    seen: Tensor

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        dtype: torch.dtype = torch.float32,
        *,
        index_name: str = "ids",
        topk: int | None = None,
    ):
        super().__init__()
        whole("num_examples", num_examples, ">= 1")
        whole("num_classes", num_classes, ">= 2")
        if topk is not None and not 1 <= topk < num_classes < 2**15:
            raise ValueError(f"topk must lie in 1..num_classes - 1 (of at most 32767), got {topk} of {num_classes}")
        self.index_name = index_name
        self.num_examples, self.num_classes, self.topk = num_examples, num_classes, topk
        width = num_classes if topk is None else topk
        self.register_buffer("predictions", torch.zeros(num_examples, width, dtype=dtype))
        self.register_buffer("seen", torch.zeros(num_examples, dtype=torch.bool))
        if topk is not None:
            self.register_buffer("classes", torch.zeros(num_examples, width, dtype=torch.int16))

    def _ids(self, ids: Tensor) -> Tensor:
        if ids.ndim != 1 or ids.is_floating_point():
            raise ValueError(
                f"{self.index_name} must be whole numbers of shape (batch,), got {ids.dtype} of {tuple(ids.shape)}"
            )
        ids = ids.to(self.seen.device)
        # On a processor the kernel that reads or writes the rows finds what is out of range, at no cost.
        if ids.device.type != "cpu":
            self._check_range(ids)
        return ids

    def _check_range(self, ids: Tensor) -> None:
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < self.num_examples):
            bounds = f"0..{self.num_examples - 1}, got {int(ids.min())}..{int(ids.max())}"
            raise ValueError(f"{self.index_name} must lie in {bounds}")

    def _distinct(self, ids: Tensor) -> list[int]:
        """The indices as numbers, none of them twice: for a batch quicker than three kernels and a sort."""
        numbers: list[int] = ids.tolist()
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{self.index_name} must be different within a batch, got one twice")
        return numbers

    def _fitting(self, ids: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that may be written if the indices are within their range."""
        if probs.ndim != 2 or probs.shape != (len(ids), self.num_classes):
            raise ValueError(f"probs must have shape ({len(ids)}, {self.num_classes}), got {tuple(probs.shape)}")
        ids = self._ids(ids)
        self._distinct(ids)
        return ids, probs.to(self.predictions.device)

    def _rows(self, ids: Tensor) -> Tensor:
        """A copy of the remembered rows, in single precision at least."""
        try:
            rows = self.predictions.index_select(0, ids)
        except (IndexError, RuntimeError):
            self._check_range(ids)
            raise
        if rows.dtype not in (torch.float32, torch.float64):
            rows = rows.float()
        if self.topk is None:
            return rows
        rest = (1 - rows.sum(1, keepdim=True)).clamp_min(0) / (self.num_classes - self.topk)
        chosen = self.get_buffer("classes").index_select(0, ids).long()
        return rest.expand(-1, self.num_classes).scatter(1, chosen, rows)

    def recall(self, ids: Int[Tensor, "batch"]) -> tuple[Float[Tensor, "batch classes"], Bool[Tensor, "batch"]]:
        """The rows of these examples, in float32 at least, and for which of them anything was written."""
        ids = self._ids(ids)
        return self._rows(ids), self.seen.index_select(0, ids)

    @torch.no_grad()
    def remember(self, ids: Int[Tensor, "batch"], probs: Float[Tensor, "batch classes"]) -> None:
        """Writes rows of probabilities.

        Raises:
            ValueError: If an index is out of range or comes twice, or the rows have other columns than classes: nothing
                is written then.
        """
        ids, probs = self._fitting(ids, probs)
        self._check_range(ids)
        self._write(ids, probs)

    def _write(self, ids: Tensor, probs: Tensor) -> None:
        if self.topk is not None:
            probs, chosen = probs.topk(self.topk)
            self.get_buffer("classes").index_copy_(0, ids, chosen.to(torch.int16))
        self.predictions.index_copy_(0, ids, probs.to(self.predictions.dtype))
        self.seen.index_fill_(0, ids, True)

    @torch.no_grad()
    def average(
        self, ids: Int[Tensor, "batch"], probs: Float[Tensor, "batch classes"], beta: float
    ) -> Float[Tensor, "batch classes"]:
        """Moves the rows towards ``probs``: t <- beta t + (1 - beta) p, from t = 0.

        Args:
            ids: Indices of the examples.
            probs: Rows of probabilities.
            beta: Share of the old row that is kept, in [0, 1).

        Returns:
            The new rows, in float32 at least.

        Raises:
            ValueError: As for :meth:`remember`, and for a memory of the largest probabilities only, which cannot be
                averaged exactly.
        """
        if self.topk is not None:
            raise ValueError(f"a memory with topk={self.topk} cannot be averaged, since a row is not kept whole")
        ids, probs = self._fitting(ids, probs)
        rows = self._rows(ids)  # finds what is out of range before anything is written
        rows.lerp_(probs.to(rows.dtype), 1 - beta)
        self._write(ids, rows)
        return rows


def floating(dtype: torch.dtype | str) -> torch.dtype:
    """A real floating-point type, by itself or by its name.

    Raises:
        ValueError: If it is none.

    Example:
        >>> floating("float16")
        torch.float16
    """
    known = {str(kind).removeprefix("torch."): kind for kind in _FLOATING}
    found = known.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found is None or found not in _FLOATING:
        raise ValueError(f"dtype must be one of {', '.join(known)}, got {dtype!r}")
    return found


def one_hot(labels: Tensor, num_classes: int) -> Float[Tensor, "batch classes"]:
    """Classes (batch,) as rows of probabilities; rows of probabilities stay as they are.

    Raises:
        ValueError: If a label is outside 0..num_classes - 1, or the rows have another width.

    Example:
        >>> one_hot(torch.tensor([1]), 3)
        tensor([[0., 1., 0.]])
    """
    if labels.is_floating_point():
        if labels.ndim != 2 or labels.shape[1] != num_classes:
            raise ValueError(f"labels must be rows of {num_classes} probabilities, got {tuple(labels.shape)}")
        return labels.detach()
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (batch,), got {tuple(labels.shape)}")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        raise ValueError(f"labels must lie in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    rows = torch.zeros(len(labels), num_classes, device=labels.device)
    return rows.scatter_(1, labels[:, None].long(), 1.0)


def gather_rows(ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of all processes by index, the same on each and each index once; those given in a single process.

    Ranks may have different numbers of rows. An index that a sampler has handed to two of them keeps its first row.

    Raises:
        ValueError: On every rank, if an index comes twice in the batch of one.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ids, rows
    world = torch.distributed.get_world_size()
    count = torch.tensor([len(ids)], device=rows.device)
    counts = [torch.zeros_like(count) for _ in range(world)]
    torch.distributed.all_gather(counts, count)
    most = int(max(counts))
    padded = [torch.cat([value, value.new_zeros(most - len(value), *value.shape[1:])]) for value in (ids, rows)]
    found = []
    for value in padded:
        pieces = [torch.empty_like(value) for _ in range(world)]
        torch.distributed.all_gather(pieces, value.contiguous())
        found.append(torch.cat([piece[: int(n)] for piece, n in zip(pieces, counts, strict=True)]))
    if any(len(own.unique()) < len(own) for own in found[0].split([int(n) for n in counts])):
        raise ValueError("ids must be different within a batch, got one twice")
    order = torch.argsort(found[0], stable=True)
    new = torch.ones(len(order), dtype=torch.bool, device=order.device)
    new[1:] = found[0][order][1:] != found[0][order][:-1]
    return found[0][order][new], found[1][order][new]
