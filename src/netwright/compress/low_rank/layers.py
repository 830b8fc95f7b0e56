"""Linear and convolutional layers as a product of two factors whose leading terms can be used alone.

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929.

    W = sum_{i <= r} u_i v_i^T,    x -> (x V) U^T + b,    W_0 = A S B^T starts as U = A sqrt(S), V = B sqrt(S)

The factors are stored as (r, m) and (r, n), so that the first k terms are a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class LowRankLayer(nn.Module):
    """What both layers share: factors, the rank in use, and how much each term matters.

    Attributes:
        U: (max_rank, m), the outputs' factor.
        V: (max_rank, n), the inputs' factor.
        rank: How many of the leading terms are in use; the others wait to be sliced off.
    """

    U: nn.Parameter
    V: nn.Parameter
    bias: nn.Parameter | None
    rank: int

    def _set_up(self, U: Tensor, V: Tensor, bias: Tensor | None) -> None:
        self.U, self.V = nn.Parameter(U.contiguous()), nn.Parameter(V.contiguous())
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
        self.rank, self._truncated = len(U), None

    _truncated: int | None

    @property
    def max_rank(self) -> int:
        """Terms that are stored."""
        return len(self.U)

    @property
    def used(self) -> int:
        """Terms the next forward pass uses: the rank, or fewer inside :meth:`truncate`."""
        return self.rank if self._truncated is None else min(self._truncated, self.rank)

    @property
    def break_even(self) -> int:
        """The largest rank at which two factors have fewer parameters than the dense weight."""
        m, n = self.U.shape[1], self.V.shape[1]
        return (m * n - 1) // (m + n)

    @contextmanager
    def truncate(self, k: int | None) -> Iterator[None]:
        """Uses the first ``k`` terms alone inside the block; all of them with None.

        Raises:
            ValueError: If ``k`` is outside 1..rank.
        """
        if k is not None and not 1 <= k <= self.rank:
            raise ValueError(f"k must lie in 1..{self.rank}, got {k}")
        before, self._truncated = self._truncated, k
        try:
            yield
        finally:
            self._truncated = before

    def tail_norms(self, factor: Tensor, hierarchical: bool = True) -> Float[Tensor, "rank"]:
        """Norm of each term's part of a factor, or of it and all behind it.

        A constant keeps the root's gradient finite where a norm is zero.
        """
        squares = factor[: self.rank].square().sum(1)
        if hierarchical:
            squares = squares.flip(0).cumsum(0).flip(0)
        return (squares + 1e-12).sqrt()

    @torch.no_grad()
    def importance(self, hierarchical: bool = True) -> Float[Tensor, "rank"]:
        """|U_i..| |V_i..| of each term in use: of it and all behind it, or of it alone."""
        return self.tail_norms(self.U, hierarchical) * self.tail_norms(self.V, hierarchical)

    def shrink(self, eps: float, hierarchical: bool = True) -> int:
        """Lets go of the trailing terms whose importance is below ``eps``; the new rank, which may be 0.

        Args:
            eps: >= 0.
            hierarchical: Whether a term's importance includes those behind it. Without, a term of no importance stays
                as long as one behind it has some.

        Raises:
            ValueError: If ``eps`` is negative.
        """
        if not eps >= 0:
            raise ValueError(f"eps must be >= 0, got {eps}")
        keep = (self.importance(hierarchical) >= eps).nonzero()
        self.rank = int(keep[-1]) + 1 if len(keep) else 0
        return self.rank

    def get_extra_state(self) -> Tensor:
        """The rank, so that it survives ``state_dict``; a tensor, as safetensors demands."""
        return torch.tensor([self.rank])

    def set_extra_state(self, state: Tensor) -> None:
        """Restores it."""
        self.rank = int(state[0])

    @property
    def weight(self) -> Tensor:
        """The product of what is in use, shaped like the dense layer's weight."""
        return (self.U[: self.used].T @ self.V[: self.used]).view(self._weight_shape())

    def _weight_shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and rank."""
        return f"{self.V.shape[1]}, {self.U.shape[1]}, rank={self.rank}, max_rank={self.max_rank}"


def _factors(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors (r, m) and (r, n) of a matrix (m, n), largest singular value first."""
    left, size, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = size.sqrt()
    return (left * root).T.to(weight.dtype), (root[:, None] * right).to(weight.dtype)


class LowRankLinear(LowRankLayer):
    """A linear layer as two factors.

    Args:
        in_features: n.
        out_features: m.
        bias: Whether there is one.
        rank: Terms, 1..min(m, n); all of them by default.

    Raises:
        ValueError: If ``rank`` is out of its range.

    Example:
        >>> layer = LowRankLinear.from_dense(nn.Linear(6, 4))
        >>> with layer.truncate(2):
        ...     rank = torch.linalg.matrix_rank(layer.weight)
        >>> layer.rank, int(rank)
        (4, 2)
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, rank: int | None = None):
        super().__init__()
        dense = nn.Linear(in_features, out_features, bias)
        if rank is not None and not 1 <= rank <= min(in_features, out_features):
            raise ValueError(f"rank must lie in 1..{min(in_features, out_features)}, got {rank}")
        U, V = _factors(dense.weight)
        self._set_up(U[:rank], V[:rank], dense.bias)

    @property
    def in_features(self) -> int:
        """n."""
        return self.V.shape[1]

    @property
    def out_features(self) -> int:
        """m."""
        return self.U.shape[1]

    @classmethod
    def from_dense(cls, layer: nn.Linear, factors: tuple[Tensor, Tensor] | None = None) -> Self:
        """The same function, with all terms of the weight's singular value decomposition, or with given factors."""
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        found._set_up(*(_factors(layer.weight) if factors is None else factors), layer.bias)
        return found.train(layer.training)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        """(x V) U^T + b, of the terms in use; the bias alone when there is none."""
        k = self.used
        return functional.linear(functional.linear(x, self.V[:k]), self.U[:k].T, self.bias)

    def _weight_shape(self) -> tuple[int, ...]:
        return self.U.shape[1], self.V.shape[1]

    def to_dense(self) -> nn.Linear:
        """A plain layer of the terms in use."""
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        return _with(dense, self.weight, self.bias).train(self.training)  # type: ignore[return-value]

    def factors(self) -> nn.Sequential:
        """Two plain layers of the terms in use."""
        k, bias = self.rank, self.bias is not None
        with torch.device("meta"):
            first, second = nn.Linear(self.in_features, k, False), nn.Linear(k, self.out_features, bias)
        return _pair(_with(first, self.V[:k], None), _with(second, self.U[:k].T, self.bias), self.training)


class LowRankConv2d(LowRankLayer):
    """A convolution as one of ``rank`` filters and a 1x1 convolution.

    Args:
        dense: The convolution it starts as, with ``groups`` = 1.
        factors: Other factors than those of the kernel's singular value decomposition.

    Raises:
        ValueError: If the convolution has groups.

    Example:
        >>> layer = LowRankConv2d.from_dense(nn.Conv2d(3, 8, 3, stride=2))
        >>> layer.rank, layer(torch.rand(1, 3, 9, 9)).shape
        (8, torch.Size([1, 8, 4, 4]))
    """

    def __init__(self, dense: nn.Conv2d, factors: tuple[Tensor, Tensor] | None = None):
        super().__init__()
        if dense.groups != 1:
            raise ValueError(f"groups must be 1, got {dense.groups}")
        self._set_up(*(_factors(dense.weight.flatten(1)) if factors is None else factors), dense.bias)
        self.in_channels, self.out_channels, self.kernel_size = dense.in_channels, dense.out_channels, dense.kernel_size
        self.stride, self.padding, self.dilation = dense.stride, dense.padding, dense.dilation
        self.padding_mode, self._pads = dense.padding_mode, dense._reversed_padding_repeated_twice
        self.train(dense.training)

    @classmethod
    def from_dense(cls, layer: nn.Conv2d) -> Self:
        """The same function, with all terms of the decomposition of the kernel as a matrix."""
        return cls(layer)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch filters rows columns"]:
        """The terms in use; the bias alone when there is none."""
        k, padding = self.used, self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._pads, mode=self.padding_mode), (0, 0)
        # Without any term one filter of zeros still says how large the output is.
        first = self.V[:k] if k else self.V.new_zeros(1, self.V.shape[1])
        first = first.view(-1, self.in_channels, *self.kernel_size)
        hidden = functional.conv2d(x, first, None, self.stride, padding, self.dilation)
        second = self.U[:k] if k else self.U.new_zeros(1, self.out_channels)
        return functional.conv2d(hidden, second.T[:, :, None, None], self.bias)

    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels, *self.kernel_size

    def _plain(self, filters: int, bias: bool) -> nn.Conv2d:
        with torch.device("meta"):
            return nn.Conv2d(
                self.in_channels,
                filters,
                self.kernel_size,  # type: ignore[arg-type]
                self.stride,  # type: ignore[arg-type]
                self.padding,  # type: ignore[arg-type]
                self.dilation,  # type: ignore[arg-type]
                bias=bias,
                padding_mode=self.padding_mode,
            )

    def to_dense(self) -> nn.Conv2d:
        """A plain layer of the terms in use."""
        dense = self._plain(self.out_channels, self.bias is not None)
        return _with(dense, self.weight, self.bias).train(self.training)  # type: ignore[return-value]

    def factors(self) -> nn.Sequential:
        """Two plain layers of the terms in use."""
        k = self.rank
        with torch.device("meta"):
            second = nn.Conv2d(k, self.out_channels, 1, bias=self.bias is not None)
        first = _with(self._plain(k, False), self.V[:k].view(k, self.in_channels, *self.kernel_size), None)
        return _pair(first, _with(second, self.U[:k].T[:, :, None, None], self.bias), self.training)


def _with(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return layer


def _pair(first: nn.Module, second: nn.Module, training: bool) -> nn.Sequential:
    return nn.Sequential(first, second).train(training)
