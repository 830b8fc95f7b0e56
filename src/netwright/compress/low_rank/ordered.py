"""Ordered dropout of ranks, the penalty that empties trailing terms, and letting go of them.

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929.

    R = sum_l sum_{i <= r_l} |U_l[:, i:]|_F + |V_l[:, i:]|_F,    keep term i while |U_l[:, i:]|_F |V_l[:, i:]|_F >= eps
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.compress.low_rank.decomposing import low_rank_layers
from netwright.nn.batchnorm import recalibrate
from netwright.seeding import stream

Mode = Literal["per_layer", "across_layers", "fixed"]
FIXED_SHARE = 0.25
_M = TypeVar("_M", bound=nn.Module)


@contextmanager
def truncated(model: nn.Module, ranks: Mapping[str, int | None]) -> Iterator[None]:
    """Some layers use fewer of their terms inside the block.

    Args:
        model: A network with low-rank layers.
        ranks: Name of a layer to the number of its leading terms; None for all.

    Raises:
        ValueError: If a name is none of a low-rank layer, or a number is outside 1..rank.
    """
    layers = low_rank_layers(model)
    if unknown := sorted(set(ranks) - set(layers)):
        raise ValueError(f"ranks must name low-rank layers, got {unknown[0]!r}; there are {', '.join(layers)}")
    with ExitStack() as stack:
        for name, k in ranks.items():
            stack.enter_context(layers[name].truncate(k))
        yield


def ordered_rank_sampler(model: nn.Module, mode: Mode = "per_layer", seed: int = 0) -> Iterator[dict[str, int]]:
    """Which layers to truncate to which rank, step after step, for ever.

    Args:
        model: A network with low-rank layers; when their ranks shrink, the sampler follows at once.
        mode: ``"per_layer"``: all pairs of a layer and a rank of it, shuffled, each once, then shuffled anew; one
            layer is truncated at a time. ``"across_layers"``: every layer to a rank of its own, uniform. ``"fixed"``:
            every layer to a quarter of its terms.
        seed: Of the order.

    Raises:
        ValueError: If ``mode`` is unknown or there is no low-rank layer.

    Example:
        >>> from netwright.compress.low_rank import decompose
        >>> sampler = ordered_rank_sampler(decompose(nn.Linear(2, 3)))
        >>> sorted(next(sampler)[""] for _ in range(2))
        [1, 2]
    """
    one_of("mode", mode, get_args(Mode))
    low_rank_layers(model)
    return _draws(model, mode, seed)


def _draws(model: nn.Module, mode: Mode, seed: int) -> Iterator[dict[str, int]]:
    layers = low_rank_layers(model)
    for cycle in itertools.count():
        generator = stream(seed, "ranks", cycle)
        ranks = {name: layer.rank for name, layer in layers.items()}
        if mode == "fixed":
            yield {name: math.ceil(FIXED_SHARE * rank) for name, rank in ranks.items() if rank}
        elif mode == "across_layers":
            yield {n: 1 + int(torch.randint(rank, (), generator=generator)) for n, rank in ranks.items() if rank}
        else:
            pairs = [(name, k) for name, rank in ranks.items() for k in range(1, rank + 1)]
            if not pairs:
                yield {}
            for i in torch.randperm(len(pairs), generator=generator).tolist():
                if any(layers[name].rank != rank for name, rank in ranks.items()):
                    break
                yield dict([pairs[i]])


def hierarchical_group_lasso(model: nn.Module, hierarchical: bool = True) -> Float[Tensor, ""]:
    """The sum over terms in use of the norms of their factors; a term behind others is part of their norms too.

    Args:
        model: A network with low-rank layers.
        hierarchical: False for norms of single terms.

    Raises:
        ValueError: If there is no low-rank layer.

    Example:
        >>> from netwright.compress.low_rank import LowRankLinear
        >>> layer = LowRankLinear(2, 2)
        >>> layer.U.data.zero_(), layer.V.data.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))[:0]
        (tensor([[0., 0.],
                [0., 0.]]), tensor([], size=(0, 2)))
        >>> round(hierarchical_group_lasso(layer).item(), 4)
        6.099
    """
    norms = [
        layer.tail_norms(factor, hierarchical).sum()
        for layer in low_rank_layers(model).values()
        for factor in (layer.U, layer.V)
    ]
    return torch.stack(norms).sum()


def progressive_shrink(model: nn.Module, eps: float = 1e-5, hierarchical: bool = True) -> dict[str, int]:
    """Lets go of the trailing terms of every layer whose importance is below ``eps``.

    They are only left out: parameters stay the same objects, so an optimiser goes on. :func:`finalize` slices.

    Args:
        model: A network with low-rank layers.
        eps: >= 0.
        hierarchical: Whether a term's importance includes those behind it.

    Returns:
        The ranks.

    Raises:
        ValueError: If ``eps`` is negative or there is no low-rank layer.

    Example:
        >>> from netwright.compress.low_rank import decompose
        >>> progressive_shrink(decompose(nn.Sequential(nn.Linear(4, 3))), eps=float("inf"))
        {'0': 0}
    """
    return {name: layer.shrink(eps, hierarchical) for name, layer in low_rank_layers(model).items()}


def recalibrate_batchnorm(model: _M, loader: Iterable[Any], batches: int | None = None) -> _M:
    """Measures batch-norm statistics anew with the whole current model, since truncated passes spoil them.

    Args:
        model: Changed in place.
        loader: Inputs, or tuples that begin with them.
        batches: How many to use; all by default.

    Raises:
        ValueError: As :func:`netwright.nn.batchnorm.recalibrate`.
    """
    return recalibrate(model, itertools.islice(loader, batches))
