"""Companders on the layers of a network, how they are trained, and what becomes of the weights (arXiv:2306.16993)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.console import warn
from netwright.nn.shared import identity
from netwright.train.groups import separate_
from netwright.train.weight_compander.function import (
    GAIN,
    INSIDE,
    SPREAD,
    Start,
    WeightCompander,
    check_positive,
    check_settings,
)

LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def companded(model: nn.Module) -> dict[str, WeightCompander]:
    """The companders of a model, by the name of their layer."""
    return {name: found for name, layer in model.named_modules() if (found := _compander(layer)) is not None}


def _compander(layer: nn.Module) -> WeightCompander | None:
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    steps = layer.parametrizations["weight"]  # type: ignore[index]  # a ModuleDict that torch adds
    return next((step for step in steps if isinstance(step, WeightCompander)), None)


def apply_weight_compander(
    model: nn.Module,
    a: float | None = None,
    b: float | None = None,
    *,
    learnable: bool = False,
    init: Start = "latent",
    function: str = "arctan",
    layers: Sequence[type[nn.Module]] = LAYERS,
    exclude: Sequence[str] = (),
    lr_scale: float = 0.01,
) -> nn.Module:
    """Puts a compander on the weight of every linear and convolution layer, in place.

    Optimisers hold the latent weights, so make them afterwards.

    Args:
        model: Any network. Biases, normalisation and embeddings are left alone.
        a: Height for all layers; None is 1.2 b.
        b: Width for all layers; None is twice the standard deviation of each layer's weights.
        learnable: Whether each layer learns its own two.
        init: ``"latent"`` takes the present weights for v, so that the network changes; ``"match"`` for w, so that it
            computes what it did (what a trained network needs).
        function: As for :class:`WeightCompander`.
        layers: Types of layers, subclasses included.
        exclude: Names of layers to leave alone.
        lr_scale: As for :class:`WeightCompander`.

    Returns:
        The model.

    Raises:
        ValueError: If an argument is out of its range, no layer matches, two share their weight, a layer is companded
            already or its weights are all equal while ``b`` is None.
        TypeError: If a weight is complex or an integer.

    Example:
        >>> net = apply_weight_compander(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> sorted(companded(net))
        ['0', '2']
    """
    check_settings(a, b, learnable, init, function, lr_scale)
    made = companders(
        model, a, b, learnable=learnable, function=function, layers=layers, exclude=exclude, lr_scale=lr_scale
    )
    clamped = sum(_place(model.get_submodule(name), compander, init) for name, compander in made.items())
    if clamped:
        warn(f"{clamped} weights were larger than {INSIDE} of the compander's bound and were clamped to it")
    return model


def companders(
    model: nn.Module,
    a: float | None,
    b: float | None,
    *,
    learnable: bool,
    function: str,
    layers: Sequence[type[nn.Module]] = LAYERS,
    exclude: Sequence[str] = (),
    lr_scale: float,
) -> dict[str, WeightCompander]:
    """What :func:`apply_weight_compander` would place, by the name of the layer; it raises what that would."""
    unknown = set(exclude) - {name for name, _ in model.named_modules()}
    if unknown:
        raise ValueError(f"exclude must name layers of the model, got {sorted(unknown)}")
    kinds = tuple(layers)
    chosen: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and n not in exclude}
    if not chosen:
        raise ValueError(f"model must have a layer of the types {', '.join(t.__name__ for t in layers)}, got none")
    tied = len({identity(layer, "weight") for layer in chosen.values()})
    if tied < len(chosen):
        raise ValueError(f"layers must have weights of their own, got {len(chosen)} layers with {tied} weights")
    return {name: _made(name, layer, a, b, learnable, function, lr_scale) for name, layer in chosen.items()}


def _made(
    name: str, layer: nn.Module, a: float | None, b: float | None, learnable: bool, function: str, lr_scale: float
) -> WeightCompander:
    if _compander(layer) is not None:
        raise ValueError(f"layer {name!r} must not be companded twice")
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]  # a tensor in every layer that has one
    if not weight.is_floating_point():
        raise TypeError(f"weights must be real floating point, got {weight.dtype} in {name!r}")
    width = b if b is not None else SPREAD * float(weight.float().std()) if weight.numel() > 1 else 0.0
    if not 0 < width < math.inf:
        raise ValueError(f"b must be given when the weights of a layer do not vary, as those of {name!r}")
    height = a if a is not None else GAIN * width
    return WeightCompander(height, width, learnable, function, lr_scale=lr_scale).to(weight.device)


def _place(layer: nn.Module, compander: WeightCompander, init: Start) -> int:
    """Registers a compander; how many weights had to be clamped."""
    weight: Tensor = layer.weight.detach().clone()  # type: ignore[operator]
    parametrize.register_parametrization(layer, "weight", compander)
    if init == "match":
        return int((weight.abs() > INSIDE * compander.bound).sum())
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(weight)  # type: ignore[union-attr,operator]
    return 0


def remove_weight_compander(model: nn.Module) -> nn.Module:
    """Bakes every companded weight into an ordinary one, in place; the network computes what it did.

    Example:
        >>> net = remove_weight_compander(apply_weight_compander(nn.Linear(4, 2)))
        >>> sorted(net.state_dict())
        ['bias', 'weight']
    """
    for name in list(companded(model)):
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    return model


def param_groups(model: nn.Module, weight_decay: float, lr: float | None = None) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: weight decay on weights of two or more dimensions, none on all the rest.

    The rest are biases, normalisation, and the companders' alpha and beta.

    Args:
        model: Any network.
        weight_decay: Of the first group, >= 0.
        lr: Learning rate of the network, > 0: alpha and beta then have groups of their own with ``lr_scale`` times it.
            None leaves them among the rest, for :func:`scale_rates_` to take out.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> [len(group["params"]) for group in param_groups(nn.Linear(2, 2), 1e-4)]
        [1, 1]
        >>> net = apply_weight_compander(nn.Linear(2, 2), learnable=True)
        >>> [group.get("lr") for group in param_groups(net, 1e-4, lr=0.1)]
        [None, None, 0.001]
    """
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be >= 0 and finite, got {weight_decay}")
    check_positive(lr=lr)
    apart = learned(model) if lr is not None else {}
    own = {id(param) for params in apart.values() for param in params}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [([p for p in trained if p.ndim >= 2], weight_decay), ([p for p in trained if p.ndim < 2], 0.0)]
    found: list[dict[str, Any]] = [{"params": params, "weight_decay": decay} for params, decay in groups if params]
    for scale, params in apart.items():
        found.append({"params": params, "weight_decay": 0.0, "lr": scale * (lr or 0.0), "lr_scale": scale})
    return found


def learned(model: nn.Module) -> dict[float, list[nn.Parameter]]:
    """The alpha and beta that are trained, by their ``lr_scale``."""
    found: dict[float, list[nn.Parameter]] = {}
    for step in companded(model).values():
        found.setdefault(step.lr_scale, []).extend(param for param in step.parameters() if param.requires_grad)
    return {scale: params for scale, params in found.items() if params}


def scale_rates_(optimizer: torch.optim.Optimizer, model: nn.Module, schedulers: Iterable[Any] = ()) -> None:
    """Gives alpha and beta their own groups, with ``lr_scale`` times the learning rate and no weight decay, in place.

    Those that :func:`param_groups` has given one, or this function, stay as they are.

    Args:
        optimizer: Of all parameters or some.
        model: With companded layers.
        schedulers: Of the optimiser, made already.

    Example:
        >>> net = apply_weight_compander(nn.Linear(2, 1), learnable=True)
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        >>> scale_rates_(optimizer, net)
        >>> [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]
        [(2, 0.1), (2, 0.001)]
    """
    done = {id(param) for group in optimizer.param_groups if "lr_scale" in group for param in group["params"]}
    for scale, params in learned(model).items():
        left = [param for param in params if id(param) not in done]
        separate_(optimizer, left, rate=scale, schedulers=schedulers, weight_decay=0.0, lr_scale=scale)


def latents(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The latent weight of each companded layer, and the effective one."""
    for name in companded(model):
        layer = model.get_submodule(name)
        yield layer.parametrizations.weight.original, layer.weight  # type: ignore[union-attr,misc]


def add_effective_decay_(model: nn.Module, weight_decay: float, *, only: Collection[int] | None = None) -> None:
    """Adds the gradient of weight_decay / 2 * sum w^2 over the *effective* weights to the gradients, in place.

    Call it once an update, and give the optimiser no decay for the latent weights: their size says little where Psi is
    flat. Learned a and b are not decayed.

    Args:
        model: With companded layers.
        weight_decay: Strength, >= 0.
        only: ``id`` of the latent weights that are meant, those of one optimiser say; None means all.

    Example:
        >>> net = apply_weight_compander(nn.Linear(2, 1))
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> add_effective_decay_(net, 1e-2)
    """
    for latent, effective in latents(model):
        if latent.grad is not None and (only is None or id(latent) in only):
            (slope_w,) = torch.autograd.grad(effective, latent, effective.detach())
            latent.grad.add_(slope_w, alpha=weight_decay)


@torch.no_grad()
def weight_statistics(model: nn.Module) -> dict[str, dict[str, float]]:
    """How the effective weights of each linear and convolution layer are spread.

    Returns:
        For each layer ``"kurtosis"`` (excess; 0 of a Gaussian), ``"near zero"`` (share below a tenth of the standard
        deviation) and ``"largest"`` (largest size in standard deviations).

    Example:
        >>> sorted(weight_statistics(nn.Linear(8, 8))[""])
        ['kurtosis', 'largest', 'near zero']
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS):
            weight: Tensor = layer.weight.detach().double()  # type: ignore[operator]
            std = weight.std(correction=0)
            found[name] = {
                "kurtosis": float(((weight - weight.mean()) / std).pow(4).mean() - 3),
                "near zero": float((weight.abs() < 0.1 * std).double().mean()),
                "largest": float(weight.abs().max() / std),
            }
    return found
