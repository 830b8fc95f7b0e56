"""Modular arithmetic with some training labels replaced, the data on which networks are seen to grok.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061.

All p^2 pairs (m, n) have the label (m + n) mod p, or m n mod p. They are shuffled once; the first floor(alpha p^2) are
for training, and of those the first floor(xi n_train) get another label. Test labels are always right.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from netwright.checks import one_of
from netwright.seeding import stream

Op = Literal["add", "mul"]
Corrupt = Literal["derangement", "uniform"]
Split = Literal["train", "test", "all"]
Encoding = Literal["index", "one-hot"]


def is_prime(p: int) -> bool:
    """Whether a whole number is prime.

    Example:
        >>> [n for n in range(20) if is_prime(n)]
        [2, 3, 5, 7, 11, 13, 17, 19]
    """
    return p > 1 and all(p % d for d in range(2, math.isqrt(p) + 1))


def primitive_root(p: int) -> int:
    """The smallest number whose powers are all of 1 .. p - 1.

    Args:
        p: An odd prime.

    Raises:
        ValueError: If it is none.

    Example:
        >>> primitive_root(7), primitive_root(97)
        (3, 5)
    """
    if p < 3 or not is_prime(p):
        raise ValueError(f"p must be a prime >= 3, got {p}")
    factors = [q for q in range(2, p) if (p - 1) % q == 0 and is_prime(q)]
    return next(g for g in range(2, p) if all(pow(g, (p - 1) // q, p) != 1 for q in factors))


def power_order(p: int) -> Int[Tensor, " powers"]:
    """The powers g^0, g^1, .. g^(p-2) of the smallest primitive root, mod p: 1 .. p - 1 by their discrete logarithm.

    Raises:
        ValueError: If ``p`` is no prime >= 3.

    Example:
        >>> power_order(7)
        tensor([1, 3, 2, 6, 4, 5])
    """
    root = primitive_root(p)
    return torch.tensor([pow(root, k, p) for k in range(p - 1)])


def one_hot_pairs(pairs: Int[Tensor, "examples two"], p: int) -> Float[Tensor, "examples inputs"]:
    """Each pair as onehot(m) beside onehot(n), float32 of 2 p columns.

    Raises:
        ValueError: If the shape is another.
        RuntimeError: If a number is outside 0 .. p - 1.

    Example:
        >>> one_hot_pairs(torch.tensor([[0, 2]]), 3)
        tensor([[1., 0., 0., 0., 0., 1.]])
    """
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must have shape (examples, 2), got {tuple(pairs.shape)}")
    return torch.nn.functional.one_hot(pairs, p).flatten(1).float()


class ModularArithmetic(Dataset[tuple[Tensor, int]]):
    """Pairs of numbers and their sum or product, some of the training labels replaced.

    Splits of one seed fit together: the shuffle and the replaced labels depend on nothing else.

    Args:
        p: The modulus, >= 3; a prime for products.
        op: ``"add"`` or ``"mul"``.
        train_frac: Share alpha of the pairs that is for training, in (0, 1).
        corruption: Share xi of the training pairs that get another label, in [0, 1).
        seed: Of the shuffle and the other labels.
        corrupt: ``"derangement"`` draws one of the p - 1 wrong labels; ``"uniform"`` any of the p, as the authors' code
            does, so that about 1 / p of those marked as corrupted keep the right one.
        split: ``"train"``, ``"test"``, or ``"all"``: training pairs, then test pairs.
        encoding: What :attr:`inputs` are: pairs of numbers (``"index"``) or :func:`one_hot_pairs`.

    Attributes:
        pairs: (examples, 2) int64.
        inputs: The pairs as ``encoding`` says.
        targets: (examples,) int64, with the replaced labels.
        clean_targets: (examples,) int64, the right labels.
        is_corrupted: (examples,) bool, whether a label was drawn anew.
        is_train: (examples,) bool.

    Raises:
        ValueError: If an argument is out of its range, a split would be empty, or ``p`` is composite with ``"mul"``.

    Example:
        >>> data = ModularArithmetic(p=7, train_frac=0.5, corruption=0.25)
        >>> len(data), int(data.is_corrupted.sum()), int((data.targets != data.clean_targets).sum())
        (24, 6, 6)
    """

    def __init__(
        self,
        p: int = 97,
        op: Op = "add",
        train_frac: float = 0.5,
        corruption: float = 0.0,
        seed: int = 0,
        corrupt: Corrupt = "derangement",
        split: Split = "train",
        encoding: Encoding = "index",
    ):
        if p < 3:
            raise ValueError(f"p must be >= 3, got {p}")
        for name, value, among in (("op", op, Op), ("corrupt", corrupt, Corrupt), ("split", split, Split)):
            one_of(name, value, get_args(among))
        one_of("encoding", encoding, get_args(Encoding))
        if op == "mul" and not is_prime(p):
            raise ValueError(f"p must be a prime for products, got {p}")
        if not 0 < train_frac < 1:
            raise ValueError(f"train_frac must lie in (0, 1), got {train_frac}")
        if not 0 <= corruption < 1:
            raise ValueError(f"corruption must lie in [0, 1), got {corruption}")
        train = _floor(train_frac * p * p)
        if not 0 < train < p * p:
            raise ValueError(f"train_frac must leave at least 1 pair on each side, got {train} of {p * p} for training")
        order = torch.randperm(p * p, generator=stream(seed, "pairs"))
        pairs = torch.stack([order // p, order % p], 1)
        right = (pairs.sum(1) if op == "add" else pairs.prod(1)) % p
        corrupted = _floor(corruption * train)
        labels = stream(seed, "labels")
        drawn = right.clone()
        if corrupt == "derangement":
            drawn[:corrupted] = (right[:corrupted] + torch.randint(1, p, (corrupted,), generator=labels)) % p
        else:
            drawn[:corrupted] = torch.randint(p, (corrupted,), generator=labels)
        rows = {"train": slice(0, train), "test": slice(train, None), "all": slice(None)}[split]
        self.p, self.op, self.split, self.encoding = p, op, split, encoding
        place = torch.arange(p * p)[rows]
        self.is_train, self.is_corrupted = place < train, place < corrupted
        self.pairs, self.targets, self.clean_targets = pairs[rows], drawn[rows], right[rows]
        self.inputs = self.pairs if encoding == "index" else one_hot_pairs(self.pairs, p)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.targets[index])

    def __repr__(self) -> str:
        marked = int(self.is_corrupted.sum())
        return f"ModularArithmetic(p={self.p}, {self.op}, {self.split}: {len(self)} pairs, {marked} corrupted)"


def _floor(value: float) -> int:
    """The whole part of a product of shares, which rounding must not take below a whole number."""
    return math.floor(value + 1e-9)


class PairBatches:
    """Batches of the data as they lie in memory; their order depends on the seed and the epoch alone.

    Args:
        data: The pairs.
        batch_size: Examples a batch; None makes a single batch of all of them, in order. A shuffled epoch leaves out
            what fills no batch.
        seed: Of the order.

    Raises:
        ValueError: If ``batch_size`` is outside 1 .. number of examples.

    Example:
        >>> batches = PairBatches(ModularArithmetic(p=7), batch_size=8)
        >>> [len(y) for x, y in batches]
        [8, 8, 8]
    """

    def __init__(self, data: ModularArithmetic, batch_size: int | None = None, seed: int = 0):
        if batch_size is not None and not 1 <= batch_size <= len(data):
            raise ValueError(f"batch_size must lie in 1..{len(data)}, got {batch_size}")
        self.dataset, self.batch_size, self.seed, self.epoch = data, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose batches come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return 1 if self.batch_size is None else len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = self.dataset.inputs, self.dataset.targets
        if self.batch_size is None:
            yield inputs, targets
            return
        order = torch.randperm(len(targets), generator=stream(self.seed, "order", self.epoch))
        for chosen in order.split(self.batch_size)[: len(self)]:
            yield inputs[chosen], targets[chosen]
