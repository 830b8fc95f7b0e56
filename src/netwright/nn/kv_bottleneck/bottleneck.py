"""The layer: embeddings fetch values by their nearest keys, and only what was fetched is trained.

Träuble et al., "Discrete Key-Value Bottleneck", ICML 2023, arXiv:2207.11240. With heads z_c = W_c z of the embedding z
of a frozen encoder, and C codebooks of K pairs (key k, value v),

    j_c = argmin_j |z_c - k_cj|^2,    y = 1/C sum_c v_{c, j_c}

Keys are fitted to unlabelled inputs by moving averages and then frozen. For fixed keys y = V^T phi(z) / C with a vector
phi of C ones among C K places: the model is linear in its values, so the loss is convex in them, it is constant in each
cell of the keys, and inputs that share no cell do not interfere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional

from netwright.checks import number, one_of, whole
from netwright.nn.kv_bottleneck.keys import KeyInit, first_keys, totals, wide
from netwright.nn.kv_bottleneck.lookup import nearest_keys, prepared

Projection = Literal["random", "split", "none"]
ValueInit = Literal["zeros", "normal"]

EMPTY, FITTING, FROZEN = 0, 1, 2  # stages of the keys
KEY_DIM = 8  # of random projections
DEAD_SHARE = 0.1  # of the mean count


class KeyValueBottleneck(nn.Module):
    """Discrete keys in front of trained values; the keys never get a gradient and change in :meth:`update_keys` alone.

    Train the values by SGD without momentum and without weight decay: momentum and Adam move values that were fetched
    earlier, weight decay moves all of them, and so new data undo old. Each value sees a share 1 / ``num_codebooks`` of
    the gradient, so a useful learning rate is near ``num_codebooks / 4``.

    Args:
        in_dim: Length m of an embedding, >= 1.
        num_pairs: Keys and values of a codebook, K >= 1.
        num_codebooks: C >= 1.
        key_dim: Length of a key, >= 1. By default 8 for random projections; the others leave no choice: m / C and m.
        value_dim: Length of a value, >= 1: the number of classes, where there is no decoder.
        projection: ``"random"`` sees the embedding through one fixed matrix a codebook, drawn with standard deviation
            sqrt(2 / (m + key_dim)); ``"split"`` cuts it into C equal parts; ``"none"`` shows all of it to each.
        pool: ``"mean"`` averages the values over the codebooks; None keeps them apart. Positions are always averaged.
        decay: Of the moving averages of the keys, in [0, 1).
        dead_threshold: Keys whose moving count is below it move to a random head and have it for their count; 0 moves
            none. By default a tenth of the mean count; near the mean, 0.8 times heads a batch / K say, rare clusters
            are never left in peace.
        value_init: ``"zeros"``, which predicts all classes alike, or ``"normal"``, of standard deviation 1.
        sparse: Whether the gradient of the values is sparse, for ``torch.optim.SGD`` and ``SparseAdam``.
        key_init: Where :meth:`init_keys` puts keys: ``"sample"`` on random heads of the batch, ``"kmeans"`` in the
            middle of clusters of it, ``"normal"`` at random, with its mean and deviation in each direction.
        epsilon: Added to the counts before the division, >= 0.
        generator: Of projections and values; the global one by default.

    Attributes:
        values: Parameter (C * K, value_dim): value j of codebook c is row c * K + j.
        keys: Buffer (C, K, key_dim).
        key_counts: Buffer (C, K), the moving average N of heads a key.
        key_sums: Buffer (C, K, key_dim), of their sum.
        projections: Buffer (C, key_dim, m), None unless they are random.

    Raises:
        ValueError: If an argument is out of its range, or ``projection="split"`` cannot cut the embedding evenly.

    Example:
        >>> layer = KeyValueBottleneck(64, num_pairs=16, num_codebooks=4, value_dim=10)
        >>> layer.init_keys(torch.randn(100, 64))
        >>> layer.freeze_keys()
        >>> layer(torch.randn(5, 64)).shape, layer(torch.randn(5, 49, 64)).shape
        (torch.Size([5, 10]), torch.Size([5, 10]))
    """

    keys: Tensor
    key_counts: Tensor
    key_sums: Tensor
    key_stage: Tensor
    projections: Tensor | None

    def __init__(
        self,
        in_dim: int,
        num_pairs: int = 4096,
        num_codebooks: int = 256,
        key_dim: int | None = None,
        value_dim: int = 10,
        projection: Projection = "random",
        pool: Literal["mean"] | None = "mean",
        decay: float = 0.95,
        dead_threshold: float | None = None,
        value_init: ValueInit = "zeros",
        sparse: bool = False,
        generator: Generator | None = None,
        *,
        key_init: KeyInit = "sample",
        epsilon: float = 1e-5,
    ):
        super().__init__()
        counts = {"in_dim": in_dim, "num_pairs": num_pairs, "num_codebooks": num_codebooks, "value_dim": value_dim}
        for name, value in counts.items():
            whole(name, value, ">= 1")
        named = {
            "projection": (projection, Projection),
            "value_init": (value_init, ValueInit),
            "key_init": (key_init, KeyInit),
        }
        for name, (word, words) in named.items():
            one_of(name, word, get_args(words))
        if pool not in {"mean", None}:
            raise ValueError(f"pool must be 'mean' or None, got {pool!r}")
        number("decay", decay, "[0, 1)")
        number("dead_threshold", dead_threshold or 0.0, ">= 0")
        number("epsilon", epsilon, ">= 0")
        self.in_dim, self.num_pairs, self.num_codebooks, self.value_dim = in_dim, num_pairs, num_codebooks, value_dim
        self.projection, self.pool, self.decay, self.dead_threshold = projection, pool, decay, dead_threshold
        self.sparse, self.key_init, self.epsilon = sparse, key_init, epsilon
        self.key_dim = self._key_dim(key_dim)
        shape = (num_codebooks, num_pairs, self.key_dim)
        drawn = torch.empty(num_codebooks, self.key_dim, in_dim) if projection == "random" else None
        if drawn is not None:
            drawn.normal_(0, math.sqrt(2 / (in_dim + self.key_dim)), generator=generator)
        values = torch.zeros(num_codebooks * num_pairs, value_dim)
        self.values = nn.Parameter(values.normal_(generator=generator) if value_init == "normal" else values)
        self.register_buffer("projections", drawn)
        self.register_buffer("keys", torch.zeros(shape))
        self.register_buffer("key_counts", torch.zeros(shape[:2]))
        self.register_buffer("key_sums", torch.zeros(shape))
        self.register_buffer("key_stage", torch.tensor(EMPTY, dtype=torch.uint8))
        self._stage = EMPTY  # the buffer as a number, which needs no device to be read
        self._prepared: tuple[Tensor, Tensor, Tensor] | None = None  # of frozen keys, for the lookup

    def _key_dim(self, given: int | None) -> int:
        if given is not None:
            whole("key_dim", given, ">= 1")
        if self.projection == "random":
            return KEY_DIM if given is None else given
        if self.projection == "split" and self.in_dim % self.num_codebooks:
            raise ValueError(
                f"in_dim must be a multiple of num_codebooks ({self.num_codebooks}) to be split, got {self.in_dim}"
            )
        only = self.in_dim // self.num_codebooks if self.projection == "split" else self.in_dim
        if given not in {None, only}:
            raise ValueError(f"key_dim must be {only} with projection={self.projection!r}, got {given}")
        return only

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        stage = ("no keys yet", "keys not frozen", "keys frozen")[self._stage]
        sizes = f"{self.in_dim}, num_pairs={self.num_pairs}, num_codebooks={self.num_codebooks}"
        return f"{sizes}, key_dim={self.key_dim}, value_dim={self.value_dim}, {stage}"

    @property
    def keys_initialised(self) -> bool:
        """Whether the keys have been given places."""
        return self._stage != EMPTY

    @property
    def keys_frozen(self) -> bool:
        """Whether the keys are fixed for good."""
        return self._stage == FROZEN

    @property
    def code_dtype(self) -> torch.dtype:
        """The smallest type of integers that holds a code, for codes that are kept."""
        return torch.int16 if self.num_pairs <= 2**15 else torch.int32

    def _enter(self, stage: int) -> None:
        self._stage = stage
        self.key_stage.fill_(stage)
        self._prepare()

    def _prepare(self) -> None:
        """Keeps what a lookup needs of frozen keys; before they are exported, as an export cannot compute all of it."""
        ready = self._stage == FROZEN and not self.keys.is_meta
        self._prepared = prepared(self.keys) if ready else None

    def _apply(self, fn: Any, recurse: bool = True) -> KeyValueBottleneck:
        super()._apply(fn, recurse)
        self._prepare()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(state_dict, *arguments, **named)
        self._stage = int(self.key_stage)
        self._prepare()

    def heads(self, z: Float[Tensor, "batch *positions in_dim"]) -> Float[Tensor, "codebooks heads key_dim"]:
        """What each codebook sees of the embeddings; positions of one example follow one another.

        Raises:
            ValueError: If the shape is wrong or a number is not finite.
        """
        if z.ndim not in {2, 3} or z.shape[-1] != self.in_dim:
            raise ValueError(f"z must have shape (batch, [positions,] {self.in_dim}), got {tuple(z.shape)}")
        if not torch.compiler.is_compiling() and not torch.isfinite(z).all():
            raise ValueError(f"z must be finite, got {int((~torch.isfinite(z)).sum())} numbers that are not")
        flat = z.detach().to(self.keys.dtype).flatten(0, -2)
        if self.projection == "none":
            return flat.expand(self.num_codebooks, -1, -1)
        if self.projections is not None:
            with torch.autocast(z.device.type, enabled=False):
                flat = flat @ self.projections.flatten(0, 1).T
        return flat.unflatten(1, (self.num_codebooks, self.key_dim)).transpose(0, 1)

    def _ready(self) -> None:
        if self._stage == EMPTY:
            raise RuntimeError("the keys have no places yet: call init_keys or fit_keys before")

    def _changeable(self) -> None:
        if self._stage == FROZEN:
            raise RuntimeError("the keys are frozen: they cannot be changed any more")

    def _nearest(self, heads: Tensor) -> Int[Tensor, "codebooks heads"]:
        return nearest_keys(heads, prepared(self.keys) if self._prepared is None else self._prepared)

    @torch.no_grad()
    def encode(self, z: Float[Tensor, "batch *positions in_dim"]) -> Int[Tensor, "batch *positions codebooks"]:
        """The number of the nearest key in each codebook; of equally near ones the smallest. Always in full precision.

        Raises:
            RuntimeError: If the keys have no places yet.
            ValueError: As for :meth:`heads`.
        """
        self._ready()
        return self._nearest(self.heads(z)).T.unflatten(0, z.shape[:-1])

    def fetch(self, codes: Int[Tensor, "batch *positions codebooks"]) -> Float[Tensor, "batch *codebooks value_dim"]:
        """The values of codes from :meth:`encode`, kept in any type of integers: training needs nothing else.

        Raises:
            TypeError: If they are no integers.
            ValueError: If the shape is wrong, or a code on a CPU is none of 0..K-1.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype is torch.bool:
            raise TypeError(f"codes must hold integers, got {codes.dtype}")
        if codes.ndim not in {2, 3} or codes.shape[-1] != self.num_codebooks:
            raise ValueError(
                f"codes must have shape (batch, [positions,] {self.num_codebooks}), got {tuple(codes.shape)}"
            )
        # An accelerator would have to be waited for.
        if codes.device.type == "cpu" and codes.numel() and not torch.compiler.is_compiling():
            least, most = (int(end) for end in codes.long().aminmax())
            if not 0 <= least <= most < self.num_pairs:
                raise ValueError(f"codes must lie in 0..{self.num_pairs - 1}, got {least}..{most}")
        dtype = torch.int32 if len(self.values) < 2**31 else torch.int64
        start = torch.arange(0, len(self.values), self.num_pairs, device=codes.device, dtype=dtype)
        rows = codes.to(dtype) + start
        if self.pool is not None:
            return functional.embedding_bag(rows.flatten(1), self.values, mode="mean", sparse=self.sparse)
        rows = rows[:, None] if rows.ndim == 2 else rows
        bags = rows.transpose(1, 2).flatten(0, 1)
        fetched = functional.embedding_bag(bags, self.values, mode="mean", sparse=self.sparse)
        return fetched.unflatten(0, (len(codes), self.num_codebooks))

    def forward(
        self, z: Float[Tensor, "batch *positions in_dim"], return_indices: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Values by the nearest keys.

        Args:
            z: Embeddings (batch, m) or (batch, positions, m). No gradient goes back to them.
            return_indices: Whether to return the codes as well.

        Returns:
            (batch, value_dim), or (batch, C, value_dim) with ``pool=None``.

        Raises:
            RuntimeError: If the keys have no places yet.
            ValueError: If the shape is wrong or a number is not finite.
        """
        codes = self.encode(z)
        fetched = self.fetch(codes)
        return (fetched, codes) if return_indices else fetched

    @torch.no_grad()
    def set_keys(self, keys: Float[Tensor, "codebooks pairs key_dim"]) -> None:
        """Puts the keys where they are told, each with a count of 1.

        Raises:
            RuntimeError: If the keys are frozen.
            ValueError: If the shape is wrong or a number is not finite.
        """
        self._changeable()
        if keys.shape != self.keys.shape or not torch.isfinite(keys).all():
            raise ValueError(f"keys must be finite and of shape {tuple(self.keys.shape)}, got {tuple(keys.shape)}")
        self.keys.copy_(keys)
        self.key_sums.copy_(keys)
        self.key_counts.fill_(1)
        self._enter(FITTING)

    @torch.no_grad()
    def init_keys(self, batch: Float[Tensor, "batch *positions in_dim"], generator: Generator | None = None) -> None:
        """Puts the keys where ``key_init`` says, seen from unlabelled embeddings; best many more than keys.

        Args:
            batch: Embeddings.
            generator: Of the choice, on the CPU; the global one by default.

        Raises:
            RuntimeError: If the keys are frozen.
            ValueError: As for :meth:`heads`, or if the batch is empty.
        """
        self._changeable()
        heads = self.heads(batch)
        if heads.shape[1] == 0:
            raise ValueError("batch must hold at least 1 embedding, got 0")
        self.set_keys(first_keys(heads, self.num_pairs, self.key_init, generator))

    @torch.no_grad()
    def update_keys(
        self, z: Float[Tensor, "batch *positions in_dim"], generator: Generator | None = None
    ) -> Float[Tensor, ""]:
        """One step of the moving averages, in any mode of the module; values and projections are left as they are.

        Args:
            z: Unlabelled embeddings.
            generator: Of the heads to which dead keys move, on the CPU; the global one by default.

        Returns:
            The mean squared distance of a head to its nearest key, before the step.

        Raises:
            RuntimeError: If the keys are frozen or have no places yet.
            ValueError: As for :meth:`heads`.
        """
        self._changeable()
        self._ready()
        heads = self.heads(z)
        codes = self._nearest(heads)
        distance = (heads - self.keys.gather(1, wide(codes, self.key_dim))).square().sum(2).mean()
        counts, sums = totals(heads, codes, self.num_pairs)
        self.key_counts.lerp_(counts, 1 - self.decay)
        self.key_sums.lerp_(sums, 1 - self.decay)
        total = self.key_counts.sum(1, keepdim=True)
        smoothed = (self.key_counts + self.epsilon) / (total + self.num_pairs * self.epsilon) * total
        moved = self.key_sums / smoothed[..., None]
        self.keys.copy_(torch.where(self.key_counts[..., None] > 0, moved, self.keys))
        self._revive(heads, total / self.num_pairs, generator)
        return distance

    def _revive(self, heads: Tensor, mean_count: Tensor, generator: Generator | None) -> None:
        given = self.dead_threshold
        threshold = DEAD_SHARE * mean_count if given is None else torch.full_like(mean_count, given)
        dead = self.key_counts < threshold
        if heads.shape[1] == 0 or not dead.any():
            return
        chosen = torch.randint(heads.shape[1], self.key_counts.shape, generator=generator).to(heads.device)
        candidates = heads.gather(1, wide(chosen, self.key_dim))
        counts = torch.where(dead, threshold, self.key_counts)
        self.key_counts.copy_(counts)
        self.keys.copy_(torch.where(dead[..., None], candidates, self.keys))
        self.key_sums.copy_(torch.where(dead[..., None], candidates * counts[..., None], self.key_sums))

    def freeze_keys(self) -> None:
        """Fixes the keys for good, also in a state dict; :meth:`train` and :meth:`eval` have no say in it.

        Raises:
            RuntimeError: If the keys have no places yet.
        """
        self._ready()
        self._enter(FROZEN)

    @torch.no_grad()
    def usage(self, codes: Int[Tensor, "batch *positions codebooks"] | None = None) -> Float[Tensor, "codebooks pairs"]:
        """Which share of heads each key has, in each codebook: by the moving counts, or among given codes.

        Raises:
            RuntimeError: If the keys have no places yet.
        """
        self._ready()
        counts = self.key_counts
        if codes is not None:
            flat = codes.long().flatten(0, -2).T.to(counts.device)
            counts = torch.zeros_like(counts).scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
        return counts / counts.sum(1, keepdim=True)

    def perplexity(self, codes: Int[Tensor, "batch *positions codebooks"] | None = None) -> Float[Tensor, "codebooks"]:
        """exp of the entropy of :meth:`usage` in each codebook: as many keys, equally used; K at the most.

        Raises:
            RuntimeError: If the keys have no places yet.
        """
        return torch.special.entr(self.usage(codes)).sum(1).exp()
