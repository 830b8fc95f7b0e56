"""Tensors that several layers share: who uses them, parametrizing them everywhere, and baking that in again.

Press and Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017, arXiv:1608.05859, share the weight
of the embedding with that of the classifier. What changes a weight must change it for all of its users, or they come
apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Identity = tuple[int, ...]
Owner = tuple[nn.Module, str]


def steps_of(layer: nn.Module, name: str) -> parametrize.ParametrizationList:
    """The parametrizations of a tensor."""
    return cast(nn.ModuleDict, layer.parametrizations)[name]  # type: ignore[return-value]


def originals(layer: nn.Module, name: str) -> list[Tensor]:
    """The tensors behind a parametrized one; of any other, itself."""
    if not parametrize.is_parametrized(layer, name):
        return [getattr(layer, name)]
    steps = steps_of(layer, name)
    if steps.is_tensor:
        return [steps.original]
    return [getattr(steps, f"original{i}") for i in range(steps.ntensors)]


def identity(layer: nn.Module, name: str) -> Identity:
    """Equal for tensors that are the same: the same parameter, through the same parametrizations.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> b.weight = a.weight
        >>> identity(a, "weight") == identity(b, "weight"), identity(a, "bias") == identity(b, "bias")
        (True, False)
    """
    steps = list(steps_of(layer, name)) if parametrize.is_parametrized(layer, name) else []
    return *map(id, originals(layer, name)), *map(id, steps)


def parts_of(module: nn.Module) -> list[nn.Module]:
    """All modules but those that only compute somebody's parameter."""
    lists = [m.parametrizations for m in module.modules() if parametrize.is_parametrized(m)]
    inner = {id(part) for each in lists for part in cast(nn.Module, each).modules()}
    return [part for part in module.modules() if id(part) not in inner]


def parametrized(module: nn.Module) -> Iterator[Owner]:
    """Every layer that has a parametrized tensor, with its name.

    Example:
        >>> layer = parametrize.register_parametrization(nn.Linear(2, 2), "bias", nn.ReLU())
        >>> [name for _, name in parametrized(nn.Sequential(layer, nn.Linear(2, 2)))]
        ['bias']
    """
    for part in parts_of(module):
        if parametrize.is_parametrized(part):
            yield from ((part, name) for name in cast(nn.ModuleDict, part.parametrizations))


def owners(module: nn.Module) -> dict[Identity, list[Owner]]:
    """The layers that use each parameter, with the name that it has there, in the order of modules.

    Example:
        >>> embedding, classifier = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        >>> classifier.weight = embedding.weight
        >>> [len(users) for users in owners(nn.Sequential(embedding, classifier)).values()]
        [2]
    """
    found: dict[Identity, list[Owner]] = {}
    for part in parts_of(module):
        names = [name for name, _ in part.named_parameters(recurse=False)]
        if parametrize.is_parametrized(part):
            names += list(cast(nn.ModuleDict, part.parametrizations))
        for name in names:
            found.setdefault(identity(part, name), []).append((part, name))
    return found


def register(module: nn.Module, chosen: Iterable[tuple[nn.Module, str, nn.Module]]) -> None:
    """Puts a parametrization on every user of a tensor, the same one.

    Args:
        module: Where users are looked for.
        chosen: A layer of it, the name of its tensor, and the parametrization.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net[1].weight = net[0].weight
        >>> register(net, [(net[0], "weight", nn.ReLU())])
        >>> float(net[1].weight.min()) >= 0
        True
    """
    users = owners(module)
    for layer, name, step in chosen:
        for part, own in users[identity(layer, name)]:
            parametrize.register_parametrization(part, own, step)


def bake(layer: nn.Module, name: str = "weight") -> None:
    """Puts the effective weight (or another tensor) of a parametrized layer in the place of its parametrizations.

    Of a tensor that several layers share, :func:`bake_together` bakes all.

    Example:
        >>> layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.ReLU())
        >>> bake(layer)
        >>> list(layer.state_dict()), float(layer.weight.min()) >= 0
        (['weight', 'bias'], True)
    """
    parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    # torch puts the weight back behind the bias, one that is None too; optimisers, files and exports go by the order
    for other, parameter in list(layer._parameters.items()) if name.endswith("weight") else ():
        if other != name:
            delattr(layer, other)
            layer.register_parameter(other, parameter)


def bake_together(chosen: Iterable[Owner]) -> None:
    """Bakes several tensors; what was the same tensor before is the same parameter afterwards.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> net[1].weight = net[0].weight
        >>> register(net, [(net[0], "weight", nn.Tanh())])
        >>> expected = net[0].weight.detach().clone()
        >>> bake_together(parametrized(net))
        >>> net[0].weight is net[1].weight, torch.equal(net[0].weight, expected)
        (True, True)
    """
    pairs = list(chosen)
    with torch.no_grad():  # before anything is baked, since that writes into what others still compute from
        values = [getattr(layer, name).clone() for layer, name in pairs]
    keys = [identity(layer, name) for layer, name in pairs]
    made: dict[Identity, Tensor] = {}
    for key, value, (layer, name) in zip(keys, values, pairs, strict=True):
        bake(layer, name)
        own = getattr(layer, name)
        if key not in made:
            taken = any(own is other for other in made.values())
            made[key] = nn.Parameter(value.clone(), own.requires_grad) if taken else own
        setattr(layer, name, made[key])
        with torch.no_grad():
            made[key].copy_(value)
    for key, value in zip(keys, values, strict=True):
        with torch.no_grad():
            made[key].copy_(value)
