"""A network's layers as two factors each, and back: decomposed, finalised, rebuilt from its ranks.

Horvath, Laskaridis, Rajput and Wang, "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition", ICML 2024,
arXiv:2308.14929. Of attention the maps of queries, keys, values and outputs are decomposed each by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from netwright.compress.low_rank.attention import SplitAttention, splittable
from netwright.compress.low_rank.layers import LowRankConv2d, LowRankLayer, LowRankLinear
from netwright.console import warn
from netwright.data.problems import listing
from netwright.nn import shared
from netwright.nn.sparse import clone, unparametrized


def low_rank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """The decomposed layers by name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> list(low_rank_layers(decompose(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))))
        ['0']
    """
    found = {name: part for name, part in model.named_modules() if isinstance(part, LowRankLayer)}
    if not found:
        raise ValueError(f"model must hold low-rank layers, got {type(model).__name__} without one: decompose it first")
    return found


def decompose(
    model: nn.Module,
    *,
    ignore_first: int = 0,
    ignore_last: bool = False,
    layers: Sequence[type[nn.Module]] = (nn.Linear, nn.Conv2d),
) -> nn.Module:
    """A copy of a network whose linear and convolutional layers are two factors each; it computes the same function.

    Convolutions with groups stay as they are, with a warning, as do layers that share their weight with another, and
    subclasses, which may do more than their name says (of TrAct's layers, take it away first: ``remove_tract``).
    ``torch.nn.MultiheadAttention`` becomes :class:`~netwright.compress.low_rank.attention.SplitAttention`, whose four
    maps are decomposed each by itself.

    Args:
        model: The network, trained or not; it is not changed. Masks and other parametrizations are baked in.
        ignore_first: How many layers at the beginning to leave alone.
        ignore_last: Whether to leave the last one alone.
        layers: Kinds of layers to decompose: ``nn.Linear``, ``nn.Conv2d`` or both.

    Raises:
        ValueError: If no layer is left to decompose, ``ignore_first`` is negative, or ``layers`` holds another kind.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> low, x = decompose(net, ignore_last=True), torch.rand(3, 8)
        >>> type(low[0]).__name__, type(low[2]).__name__, torch.allclose(low(x), net(x), atol=1e-5)
        ('LowRankLinear', 'Linear', True)
    """
    if ignore_first < 0:
        raise ValueError(f"ignore_first must be >= 0, got {ignore_first}")
    kinds = tuple(layers)
    if unknown := [kind for kind in kinds if kind not in (nn.Linear, nn.Conv2d)]:
        raise ValueError(f"layers must be some of Linear and Conv2d, got {', '.join(k.__name__ for k in unknown)}")
    model = unparametrized(model)
    if nn.Linear in kinds:
        model = split_attention(model)
    found = [(name, part) for name, part in model.named_modules() if type(part) in kinds]
    chosen = found[ignore_first : len(found) - int(ignore_last)]
    left = _left_alone(model, chosen, kinds)
    for why, names in left.items():
        if names:
            warn(f"{why} are not decomposed: {listing(names)}")
    new: dict[int, nn.Module] = {}
    for name, part in chosen:
        if not any(name in names for names in left.values()):
            new[id(part)] = LowRankConv2d(part) if isinstance(part, nn.Conv2d) else LowRankLinear.from_dense(part)
    if not new:
        raise ValueError(f"model must hold a layer to decompose, got {type(model).__name__} without one left")
    return _replaced(model, new)


def _left_alone(
    model: nn.Module, chosen: Sequence[tuple[str, nn.Module]], kinds: tuple[type[nn.Module], ...]
) -> dict[str, list[str]]:
    """What :func:`decompose` does not take, and why."""
    several = [users for users in shared.owners(model).values() if len(users) > 1]
    tied = {id(part) for users in several for part, name in users if name == "weight"}
    return {
        "convolutions with groups": [n for n, part in chosen if isinstance(part, nn.Conv2d) and part.groups != 1],
        "layers that share their weight": [n for n, part in chosen if id(part) in tied],
        "subclasses of layers": [
            f"{n} ({type(part).__name__})"
            for n, part in model.named_modules()
            if isinstance(part, kinds) and type(part) not in kinds
        ],
    }


def split_attention(model: nn.Module) -> nn.Module:
    """A copy in which every ``torch.nn.MultiheadAttention`` has four linear layers; it computes the same function.

    One that adds keys and values of its own stays as it is.

    Example:
        >>> net = split_attention(nn.TransformerEncoderLayer(8, 2, 16))
        >>> type(net.self_attn).__name__, net.self_attn.k_proj.out_features
        ('SplitAttention', 8)
    """
    model = clone(model)
    found = [part for part in model.modules() if isinstance(part, nn.MultiheadAttention) and splittable(part)]
    return _replaced(model, {id(part): SplitAttention(part) for part in found})


def finalize(model: nn.Module) -> nn.Module:
    """A plain copy: two layers where factors have fewer parameters than the product, one dense layer elsewhere.

    Terms that are not in use are sliced off. A layer of rank 0 keeps its kind, and gives its bias.

    Raises:
        ValueError: If there is no low-rank layer.

    Example:
        >>> low = decompose(nn.Sequential(nn.Linear(256, 120)))
        >>> low[0].rank = 81
        >>> [tuple(p.shape) for p in finalize(low).parameters()]
        [(81, 256), (120, 81), (120,)]
    """
    model = clone(model)
    new: dict[int, nn.Module] = {}
    for layer in low_rank_layers(model).values():
        if layer.rank == 0:
            layer.U, layer.V = nn.Parameter(layer.U.detach()[:0]), nn.Parameter(layer.V.detach()[:0])
        else:
            form: Any = layer
            new[id(layer)] = form.factors() if layer.rank <= layer.break_even else form.to_dense()
    return _replaced(model, new)


def factored_ranks(model: nn.Module) -> dict[str, int]:
    """Of each layer that :func:`finalize` makes two, or leaves without any term, the rank: all that :func:`with_ranks`
    needs.

    Raises:
        ValueError: If there is no low-rank layer.
    """
    layers = low_rank_layers(model).items()
    return {name: layer.rank for name, layer in layers if layer.rank <= layer.break_even}


def with_ranks(model: nn.Module, ranks: Mapping[str, int]) -> nn.Module:
    """A copy of a plain network in the form that :func:`finalize` gave another, its factors still to be filled in.

    Args:
        model: The network before it was decomposed.
        ranks: From :func:`factored_ranks`.

    Raises:
        ValueError: If a name is none of a linear or convolutional layer.

    Example:
        >>> net = with_ranks(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), {"0": 2})
        >>> [tuple(p.shape) for p in net.parameters()]
        [(2, 8), (6, 2), (6,)]
    """
    model = split_attention(unparametrized(model))
    new: dict[int, nn.Module] = {}
    for name, rank in ranks.items():
        layer = dict(model.named_modules()).get(name)
        if type(layer) not in (nn.Linear, nn.Conv2d):
            raise ValueError(f"ranks must name linear or convolutional layers, got {name!r}")
        weight: Tensor = layer.weight  # type: ignore[union-attr]
        empty = weight.new_zeros(rank, len(weight)), weight.new_zeros(rank, weight[0].numel())
        low: LowRankConv2d | LowRankLinear
        if isinstance(layer, nn.Conv2d):
            low = LowRankConv2d(layer, empty)
        else:
            assert isinstance(layer, nn.Linear)
            low = LowRankLinear.from_dense(layer, empty)
        new[id(layer)] = low.factors() if rank else low
    return _replaced(model, new)


def _replaced(model: nn.Module, new: dict[int, nn.Module]) -> nn.Module:
    """Puts new modules in the place of others, wherever these are used."""
    for path, part in list(model.named_modules(remove_duplicate=False)):
        if path and id(part) in new:
            model.set_submodule(path, new[id(part)])
    return new.get(id(model), model)
