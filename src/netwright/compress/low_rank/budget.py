"""Cutting a decomposed network down to a number of parameters or multiply-adds, without training.

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929. Terms of all layers are ordered by importance |U_i..| |V_i..|, and the least important go first:
always the last one of its layer. With plain singular values as importance this is the usual truncation of a trained
network.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from netwright.compress.low_rank.decomposing import decompose, finalize, low_rank_layers
from netwright.compress.low_rank.layers import LowRankLayer
from netwright.cost import count
from netwright.nn.activations import caught
from netwright.nn.modes import in_mode
from netwright.nn.sparse import clone
from netwright.results import Result


@dataclass(frozen=True)
class LowRankCost(Result):
    """What a decomposed network costs once it is finalised.

    Attributes:
        params: Parameters.
        macs: Multiply-adds for one input; None when no example was given.
    """

    params: int
    macs: int | None


def low_rank_cost(model: nn.Module, example: Tensor | None = None) -> LowRankCost:
    """Parameters and multiply-adds that :func:`finalize` leaves.

    Args:
        model: A network with low-rank layers.
        example: A batch, for the multiply-adds of one of its inputs.

    Raises:
        ValueError: If there is no low-rank layer.

    Example:
        >>> low_rank_cost(decompose(nn.Linear(100, 50)), torch.zeros(1, 100))
        LowRankCost(params=5050, macs=5000)
    """
    layers = low_rank_layers(model)
    params = _fixed_params(model) + sum(_price(layer, layer.rank) for layer in layers.values())
    if example is None:
        return LowRankCost(params, None)
    places = _places(model, example)
    macs = _fixed_macs(model, example, places)
    macs += sum(places[name] * _price(layer, layer.rank) for name, layer in layers.items())
    return LowRankCost(params, macs)


def _sides(layer: LowRankLayer) -> tuple[int, int]:
    return layer.U.shape[1], layer.V.shape[1]


def _price(layer: LowRankLayer, rank: int) -> int:
    """Weights of a layer at a rank: those of its factors, or of the product where that is cheaper."""
    m, n = _sides(layer)
    return min(rank * (m + n), m * n)


def _fixed_params(model: nn.Module) -> int:
    factors = {id(factor) for layer in low_rank_layers(model).values() for factor in (layer.U, layer.V)}
    return sum(p.numel() for p in model.parameters() if id(p) not in factors)


def _places(model: nn.Module, example: Tensor) -> dict[str, int]:
    """Of each layer, how often its weight is used for one input."""
    found = {}
    with in_mode(model, training=False), torch.no_grad():
        for name, layer in low_rank_layers(model).items():
            with caught(layer) as seen:
                model(example)
            found[name] = sum(output.numel() for output in seen) // (len(example) * layer.U.shape[1])
    return found


def _fixed_macs(model: nn.Module, example: Tensor, places: dict[str, int]) -> int:
    layers = low_rank_layers(model)
    total = count(model, tuple(example.shape[1:])).macs
    return total - sum(places[name] * layer.used * sum(_sides(layer)) for name, layer in layers.items())


def prune_to_budget(
    model: nn.Module,
    *,
    params: int | None = None,
    macs: int | None = None,
    example: Tensor | None = None,
    hierarchical: bool = True,
    per_parameter: bool = False,
    keep_at_least: int = 1,
) -> nn.Module:
    """A copy of a decomposed network whose least important terms are let go, until it fits.

    Recalibrate its batch norms afterwards, see :func:`recalibrate_batchnorm`.

    Args:
        model: A network with low-rank layers; it is not changed.
        params: Most parameters it may have once it is finalised.
        macs: Most multiply-adds for one input; needs ``example``. One of the two must be given.
        example: A batch of inputs.
        hierarchical: Whether a term's importance includes those behind it, as in the paper; layers of few terms then
            lose most of them. Without, terms of all layers are compared one by one, as singular values are.
        per_parameter: Order terms by importance over the m + n numbers of a term, not by importance alone.
        keep_at_least: Terms every layer keeps (all that it has, if fewer); a layer without any passes nothing on.

    Raises:
        ValueError: If not exactly one budget is given, or it cannot be met.
        RuntimeError: If there is no low-rank layer.

    Example:
        >>> low = decompose(nn.Sequential(nn.Linear(64, 64, bias=False)))
        >>> prune_to_budget(low, params=1000)[0].rank
        7
    """
    if not any(isinstance(part, LowRankLayer) for part in model.modules()):
        raise RuntimeError(f"prune_to_budget needs low-rank layers, got {type(model).__name__} without one")
    if (params is None) == (macs is None):
        raise ValueError(f"exactly one of params and macs must be given, got {params} and {macs}")
    if macs is not None and example is None:
        raise ValueError("macs needs an example, got None")
    model = clone(model)
    layers = low_rank_layers(model)
    if macs is None:
        unit, spent = dict.fromkeys(layers, 1), _fixed_params(model)
    else:
        assert example is not None
        unit = _places(model, example)
        spent = _fixed_macs(model, example, unit)
    budget = params if macs is None else macs
    assert budget is not None
    least = spent + sum(unit[n] * _price(layer, min(keep_at_least, layer.rank)) for n, layer in layers.items())
    if budget < least:
        raise ValueError(f"{'params' if macs is None else 'macs'} must be >= {least}, got {budget}")
    importance = {}
    for name, layer in layers.items():
        size = layer.importance(hierarchical) / (sum(_sides(layer)) if per_parameter else 1)
        # A term cannot go before those behind it, so it matters as much as any of them.
        importance[name] = size.flip(0).cummax(0).values.flip(0).tolist() if len(size) else []
    _cut(layers, importance, budget - spent, unit, keep_at_least)
    return model


def _cut(
    layers: dict[str, LowRankLayer],
    importance: dict[str, list[float]],
    budget: int,
    unit: dict[str, int],
    keep_at_least: int,
) -> None:
    """Lowers ranks until the layers cost no more than ``budget``; importance never rises along a layer."""
    spent = sum(unit[name] * _price(layer, layer.rank) for name, layer in layers.items())
    terms = [(s, -i, name) for name, sizes in importance.items() for i, s in enumerate(sizes) if i >= keep_at_least]
    for _, _, name in sorted(terms):  # of equals, the last of a layer goes first
        if spent <= budget:
            return
        layer = layers[name]
        spent -= unit[name] * (_price(layer, layer.rank) - _price(layer, layer.rank - 1))
        layer.rank -= 1


def svd_truncate(model: nn.Module, params: int, *, ignore_first: int = 0, ignore_last: bool = False) -> nn.Module:
    """A trained network cut down by its singular values, the smallest of all layers first; what Maestro is compared
    with.

    Args:
        model: The network; it is not changed.
        params: Most parameters of the result.
        ignore_first: As for :func:`decompose`.
        ignore_last: Likewise.

    Returns:
        A plain network, as of :func:`finalize`.

    Raises:
        ValueError: If the budget cannot be met.

    Example:
        >>> net = svd_truncate(nn.Sequential(nn.Linear(64, 64)), 1000)
        >>> sum(p.numel() for p in net.parameters())
        960
    """
    return finalize(singular_cut(decompose(model, ignore_first=ignore_first, ignore_last=ignore_last), params))


def singular_cut(low: nn.Module, params: int) -> nn.Module:
    """Lowers the ranks of a network that was just decomposed, in place, by its singular values.

    Raises:
        ValueError: If the budget cannot be met, or there is no low-rank layer.
    """
    layers = low_rank_layers(low)
    fixed = _fixed_params(low)
    least = fixed + sum(_price(layer, 1) for layer in layers.values())
    if params < least:
        raise ValueError(f"params must be >= {least}, got {params}")
    # A balanced factor's row has the root of its singular value for a norm.
    importance = {name: layer.importance(hierarchical=False).tolist() for name, layer in layers.items()}
    _cut(layers, importance, params - fixed, dict.fromkeys(layers, 1), 1)
    return low
