"""Magnitude pruning to an exact ratio, with masks that last through training, copies and files.

LeCun et al., "Optimal Brain Damage", NeurIPS 1989, began it; Han et al., "Learning both Weights and
Connections for Efficient Neural Networks", NeurIPS 2015, arXiv:1506.02626, prune by size; Zhu & Gupta, "To
prune, or not to prune", 2017, arXiv:1710.01878, do it gradually; Han et al., "DSD: Dense-Sparse-Dense
Training", ICLR 2017, arXiv:1607.04381, release the mask again.

    keep the round((1 - s) n) largest |w|,    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_1 - t_0))^3

n counts the weights of every convolution and linear layer that is not skipped, the first and depthwise ones
too. Masks are :class:`netwright.nn.sparse.FixedMask` parametrizations: a layer's ``weight`` is the masked
one, and the parameter behind it stays the same object, so an optimiser made before pruning goes on with it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.compress.exact import Scope, check_sparsity, exact_masks
from netwright.console import table
from netwright.nn import shared
from netwright.nn.sparse import (
    FixedMask,
    LayerSparsity,
    effective_weight,
    layers,
    mask_of,
    masked_tensors,
    sparsity_report,
)
from netwright.results import Result, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from netwright.compress.hydra import HydraPruner, begin_finetune, begin_scores

__all__ = [
    "HydraPruner",
    "Sparsity",
    "begin_finetune",
    "begin_scores",
    "cubic_sparsity",
    "dense_sparse_dense",
    "hold",
    "magnitude",
    "place_masks",
    "prunable",
    "remove",
    "sparsity",
    "update",
]

_M = TypeVar("_M", bound=nn.Module)


def __getattr__(name: str) -> Any:
    if name in ("HydraPruner", "begin_finetune", "begin_scores"):
        from netwright.compress import hydra

        return getattr(hydra, name)
    raise AttributeError(f"module 'netwright.compress.prune' has no attribute {name!r}")


def prunable(module: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Convolution and linear layers by name, without those whose name fits a pattern of ``skip``.

    Of layers that share a weight there is the first, and none if one of them is skipped.

    Raises:
        ValueError: If no layer is left, or a pattern fits no layer.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Linear(2, 3))
        >>> list(prunable(net, skip=["0"]))
        ['2']
    """
    if isinstance(skip, str):
        raise ValueError(f"skip must be a sequence of patterns, got the single text {skip!r}")
    found = dict(layers(module))
    if not found:
        raise ValueError(f"module must hold a convolution or linear layer, got {type(module).__name__} without one")
    for pattern in skip:
        if not fnmatch.filter(found, pattern):
            raise ValueError(
                f"skip must name convolution or linear layers, got {pattern!r}; there are {', '.join(found)}"
            )
    skipped = [layer for n, layer in found.items() if any(fnmatch.fnmatchcase(n, p) for p in skip)]
    seen = {shared.identity(layer, "weight") for layer in skipped}
    left: dict[str, nn.Module] = {}
    for n, layer in found.items():
        if (key := shared.identity(layer, "weight")) not in seen:
            left[n] = layer
            seen.add(key)
    if not left:
        raise ValueError(f"skip must leave a layer to prune, got {list(skip)} for {', '.join(found)}")
    return left


def magnitude(
    module: _M, sparsity: float, scope: Scope = "layer", skip: Sequence[str] = (), *, keep_at_least: int = 1
) -> _M:
    """Masks the smallest weights of a network, in place, to an exact ratio.

    Args:
        module: Any network. A layer that is pruned already stays at least as sparse, as by :func:`update`.
        sparsity: Share of zeros among the weights of all layers that are not skipped, in [0, 1). Exactly
            round((1 - sparsity) n) of n weights are kept.
        scope: ``"layer"`` prunes every layer alike (its share is rounded so that the whole is exact);
            ``"global"`` keeps the largest weights wherever they are; ``"lamp"`` those that matter most to their
            own layer, see :func:`netwright.compress.exact.lamp_scores`: the safest when layers differ in scale.
        skip: Names of layers to leave alone, as ``named_modules`` gives them; ``*`` stands for anything. Whatever
            shares a weight with one of them is left alone too.
        keep_at_least: Weights that every layer keeps (all of a layer that has fewer); 0 lets layers die.

    Returns:
        ``module``.

    Raises:
        ValueError: If an argument is out of bounds, fewer than ``keep_at_least`` weights a layer would be
            left, a pattern in ``skip`` fits no layer, or a layer has learned scores.

    A weight that several layers share, an embedding and a classifier say, counts once and is masked for all of them.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 10, 3), nn.Flatten(), nn.Linear(10, 9))
        >>> net = magnitude(net, 0.9, scope="global")
        >>> sparsity(net).kept, sparsity(net).total
        (18, 180)
    """
    chosen = prunable(module, skip)
    for name, layer in chosen.items():
        if not isinstance(mask_of(layer), (FixedMask, type(None))):
            raise ValueError(
                f"module must hold no learned scores, got some in layer {name!r}: call begin_finetune first"
            )
    _set_masks(module, chosen, exact_masks(list(chosen.values()), sparsity, scope, keep_at_least, regrow=False))
    return module


def update(
    module: _M,
    sparsity: float,
    scope: Scope = "layer",
    skip: Sequence[str] = (),
    *,
    keep_at_least: int = 1,
    regrow: bool = False,
) -> _M:
    """Prunes the masked layers of a network again, in place, to another exact ratio.

    Args:
        module: The network.
        sparsity: As for :func:`magnitude`.
        scope: As for :func:`magnitude`.
        skip: As for :func:`magnitude`; layers without a mask are left alone in any case, and not counted.
        keep_at_least: As for :func:`magnitude`.
        regrow: Let a masked weight return, with the value it had, when it is now among the largest; otherwise
            what is zero stays zero.

    Raises:
        ValueError: If no layer is masked, an argument is out of bounds, or the network is sparser already and
            may not regrow.

    Example:
        >>> net = magnitude(nn.Linear(10, 10), 0.5)
        >>> sparsity(update(net, 0.8)).kept
        20
    """
    chosen = {name: layer for name, layer in prunable(module, skip).items() if isinstance(mask_of(layer), FixedMask)}
    if not chosen:
        raise ValueError(f"module must be pruned already, got {type(module).__name__} without a mask")
    _set_masks(module, chosen, exact_masks(list(chosen.values()), sparsity, scope, keep_at_least, regrow=regrow))
    return module


def place_masks(module: _M, skip: Sequence[str] = ()) -> _M:
    """Places masks that keep everything, in place, on layers that have none.

    Its ``state_dict`` then has the entries of a pruned network's, which can be loaded into it.

    Raises:
        ValueError: If there is no layer to mask, or a pattern in ``skip`` fits no layer.

    Example:
        >>> pruned = magnitude(nn.Linear(10, 10), 0.8)
        >>> net = place_masks(nn.Linear(10, 10))
        >>> _ = net.load_state_dict(pruned.state_dict())
        >>> sparsity(net).kept
        20
    """
    chosen = {name: layer for name, layer in prunable(module, skip).items() if mask_of(layer) is None}
    _set_masks(module, chosen, [torch.ones_like(layer.weight) for layer in chosen.values()])  # type: ignore[arg-type]
    return module


def hold(module: _M, skip: Sequence[str] = ()) -> _M:
    """Masks the weights that are zero now, in place, so that training cannot fill them.

    For a network whose zeros were baked in, as by :func:`remove` or read from a file.

    Raises:
        ValueError: If there is no layer to mask, or a pattern in ``skip`` fits no layer.

    Example:
        >>> net = remove(magnitude(nn.Linear(10, 10), 0.8))
        >>> float(hold(net).parametrizations.weight[0].keep.sum())
        20.0
    """
    chosen = {name: layer for name, layer in prunable(module, skip).items() if mask_of(layer) is None}
    with torch.no_grad():
        _set_masks(module, chosen, [effective_weight(layer) != 0 for layer in chosen.values()])
    return module


def remove(module: _M) -> _M:
    """Bakes every mask into its weight and takes it away, in place: plain layers with zeros are left.

    Other parametrizations of a masked weight are baked in too.

    Raises:
        ValueError: If no layer is masked, or a mask is part of its layer (``SparseConv2d``,
            ``SparseLinear``).

    Example:
        >>> net = remove(magnitude(nn.Sequential(nn.Linear(10, 10)), 0.8))
        >>> type(net[0]) is nn.Linear, int((net[0].weight != 0).sum())
        (True, 20)
    """
    masked = {name: layer for name, layer in layers(module) if mask_of(layer) is not None}
    if not masked:
        raise ValueError(f"module must hold a mask to remove, got {type(module).__name__} without one")
    for name, layer in masked.items():
        if not parametrize.is_parametrized(layer, "weight"):
            kind = type(layer).__name__
            raise ValueError(
                f"module must hold its masks as parametrizations, got {kind} {name!r}: use nn.sparse.to_dense"
            )
    shared.bake_together(masked_tensors(module))
    return module


def cubic_sparsity(step: int, begin: int, end: int, initial: float = 0.0, final: float = 0.9) -> float:
    """Sparsity at a step of gradual pruning: ``initial`` until ``begin``, ``final`` from ``end`` on.

    Raises:
        ValueError: If a sparsity is outside [0, 1), ``final`` is below ``initial``, or ``end`` is not above
            ``begin``.

    Example:
        >>> [round(cubic_sparsity(t, 0, 4, 0.0, 0.8), 4) for t in range(6)]
        [0.0, 0.4625, 0.7, 0.7875, 0.8, 0.8]
    """
    initial, final = check_sparsity(initial, "initial"), check_sparsity(final, "final")
    if final < initial:
        raise ValueError(f"final must be >= initial = {initial}, got {final}")
    if not 0 <= begin < end:
        raise ValueError(f"begin must be >= 0 and below end = {end}, got {begin}")
    if step <= begin or step >= end:  # not left to the formula: both ends are exact
        return initial if step <= begin else final
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


def dense_sparse_dense(
    module: _M,
    sparsity: float,
    train: Callable[[_M, Literal["sparse", "dense"]], Any],
    *,
    scope: Scope = "layer",
    skip: Sequence[str] = (),
) -> _M:
    """Fine-tunes a network dense-sparse-dense: train it pruned, then with its zeros free to grow again.

    Args:
        module: A trained network; changed in place, plain at the end.
        sparsity: Share of zeros in the sparse stage, in [0, 1); the paper uses 0.25 to 0.5.
        train: Trains its first argument; the second names the stage. The paper lowers the learning rate
            tenfold in ``"dense"``.
        scope: As for :func:`magnitude`.
        skip: As for :func:`magnitude`.

    Raises:
        ValueError: As :func:`magnitude`.

    Example:
        >>> dense_sparse_dense(nn.Linear(4, 2), 0.5, lambda net, stage: print(stage, sparsity(net).kept))
        sparse 4
        dense 4
        Linear(in_features=4, out_features=2, bias=True)
    """
    train(magnitude(module, sparsity, scope, skip), "sparse")
    train(remove(module), "dense")
    return module


@dataclass(frozen=True)
class Sparsity(Result):
    """How sparse a network is.

    Attributes:
        sparsity: Share of zeros among all weights of convolution and linear layers, in [0, 1].
        kept: Weights that are not zero; those that layers share count for each of them.
        total: All weights.
        layers: The same for each layer, by name.
    """

    sparsity: float
    kept: int
    total: int
    layers: dict[str, LayerSparsity]

    def __str__(self) -> str:
        rows = [[n or "(itself)", r.kept, r.total, f"{r.sparsity:.4f}", r.dead_filters] for n, r in self.layers.items()]
        dead = sum(r.dead_filters for r in self.layers.values())
        rows.append(["all", self.kept, self.total, f"{self.sparsity:.4f}", dead])
        return table(rows, ["layer", "kept", "of", "sparsity", "dead filters"])

    def plot(self, ax: Axes | None = None) -> Axes:
        """Share of weights kept in each layer, on a logarithmic scale."""
        ax = new_axes(ax)
        kept = [layer.kept / layer.total for layer in self.layers.values()]
        ax.bar([name or "(itself)" for name in self.layers], kept)
        if any(kept):
            ax.set_yscale("log")
        ax.set_ylabel("share of weights kept")
        ax.tick_params(axis="x", rotation=90)
        return ax


def sparsity(module: nn.Module) -> Sparsity:
    """Counts zeros, skipped layers included.

    Raises:
        ValueError: If there is no convolution or linear layer.

    Example:
        >>> sparsity(magnitude(nn.Linear(10, 10), 0.95)).sparsity
        0.95
    """
    report = sparsity_report(module)
    kept, total = sum(layer.kept for layer in report.values()), sum(layer.total for layer in report.values())
    return Sparsity((total - kept) / total, kept, total, report)


def _set_masks(module: nn.Module, chosen: dict[str, nn.Module], masks: Iterable[Tensor]) -> None:
    new = []
    for layer, mask in zip(chosen.values(), masks, strict=True):
        present = mask_of(layer)
        if isinstance(present, FixedMask):
            present.set_mask(mask)
        else:
            new.append((layer, "weight", FixedMask(mask)))
    shared.register(module, new)
