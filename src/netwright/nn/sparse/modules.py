"""Masks over a whole network: make it sparse, steer what is trained, report, and bake the masks in."""

from __future__ import annotations

import copy
import fnmatch
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.nn.modes import in_mode
from netwright.nn.shared import bake_together, parametrized, steps_of
from netwright.nn.sparse.layers import SparseConv2d, SparseLinear, What, set_trainable
from netwright.nn.sparse.masks import FixedMask, Rounding, Scored, TopKMask, check_density
from netwright.results import Result

LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV2D = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
_M = TypeVar("_M", bound=nn.Module)


def layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of every convolution and linear layer, masked or not, each once.

    Example:
        >>> [name for name, _ in layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), SparseLinear(3, 1)))]
        ['0', '2']
    """
    for name, layer in module.named_modules():
        if isinstance(layer, LAYERS):
            yield name, layer


def mask_of(layer: nn.Module) -> SparseConv2d | SparseLinear | TopKMask | FixedMask | None:
    """What masks the layer's weight: a sparse layer is its own mask, a parametrized one has it among its
    parametrizations (the last, if there are several), any other has none.
    """
    if isinstance(layer, (SparseConv2d, SparseLinear)):
        return layer
    if parametrize.is_parametrized(layer, "weight"):
        for step in reversed(steps_of(layer, "weight")):
            if isinstance(step, (TopKMask, FixedMask)):
                return step
    return None


def effective_weight(layer: nn.Module) -> Tensor:
    """The weight the layer computes with: masked where there is a mask."""
    if isinstance(layer, (SparseConv2d, SparseLinear)):
        return layer.apply_mask(layer.weight)
    return layer.weight  # type: ignore[return-value]


def _require_layers(module: nn.Module) -> list[tuple[str, nn.Module]]:
    found = list(layers(module))
    if not found:
        raise ValueError(f"module must hold a convolution or linear layer, got {type(module).__name__} without one")
    return found


def _scored(module: nn.Module) -> list[tuple[str, nn.Module, Scored]]:
    pairs = ((name, layer, mask_of(layer)) for name, layer in _require_layers(module))
    found: list[tuple[str, nn.Module, Scored]] = [p for p in pairs if isinstance(p[2], Scored)]  # type: ignore[misc]
    if not found:
        raise ValueError(f"module must hold a layer with scores, got a {type(module).__name__}: sparsify it first")
    return found


def clone(module: _M) -> _M:
    """A deep copy whose parametrizations can be added to and removed without harm to the original.

    torch keeps the property of a parametrized tensor in a class made for that module, and a deep copy shares the
    class: ``remove_parametrizations`` on the copy breaks the original.

    Example:
        >>> net = parametrize.register_parametrization(nn.Linear(2, 2), "weight", TopKMask(0.5))
        >>> _ = parametrize.remove_parametrizations(clone(net), "weight")
        >>> int((net.weight != 0).sum())
        2
    """
    module = copy.deepcopy(module)
    for part in module.modules():
        if parametrize.is_parametrized(part):
            kind = type(part)
            part.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
    return module


def _replace(module: nn.Module, change: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Puts ``change(name, layer)`` in the place of every layer, wherever it is used, in a copy."""
    module = clone(module)
    new = {id(layer): change(name, layer) for name, layer in list(layers(module))}
    for path, layer in list(module.named_modules(remove_duplicate=False)):
        if path and id(layer) in new and new[id(layer)] is not layer:
            module.set_submodule(path, new[id(layer)])
    return new.get(id(module), module)


def _adopt(new: nn.Module, old: nn.Module) -> nn.Module:
    """Gives a new layer the old one's parameters (the same objects, so that ties last), hooks and mode."""
    new.weight, new.bias = old.weight, old.bias
    for name, value in old.__dict__.items():
        if "hooks" in name:
            new.__dict__[name] = value
    return new.train(old.training)


def _same_layer(kind: type[nn.Module], layer: nn.Module, **more: Any) -> nn.Module:
    weight: Tensor = layer.weight  # type: ignore[assignment]
    shape: dict[str, Any] = {"bias": layer.bias is not None, "device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Conv2d):
        shape |= {name: getattr(layer, name) for name in _CONV2D}
    else:
        shape |= {"in_features": layer.in_features, "out_features": layer.out_features}
    return kind(**shape, **more)


def _weights(layer: nn.Module) -> list[nn.Parameter]:
    """The parameters behind the layer's weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return [layer.weight]  # type: ignore[list-item]
    return [p for name, p in steps_of(layer, "weight").named_parameters() if name.startswith("original")]


def _unmasked(layer: nn.Module) -> Tensor:
    """The weight as the layer's mask receives it."""
    value, *more = _weights(layer)
    if parametrize.is_parametrized(layer, "weight"):
        mask = mask_of(layer)
        for step in steps_of(layer, "weight"):
            if step is mask:
                break
            value, more = step(value, *more), []
    return value


def sparsify(
    module: nn.Module, density: float, *, skip: Sequence[str] = (), rounding: Rounding = "netwright"
) -> nn.Module:
    """A copy of a network whose convolution and linear layers keep only the weights with the largest scores.

    :class:`torch.nn.Conv2d` and :class:`torch.nn.Linear` become :class:`SparseConv2d` and
    :class:`SparseLinear`; any other kind of convolution, a subclass, or a layer that is parametrized already
    gets a :class:`TopKMask`. Scores start Kaiming-normal and frozen; weights are copied.

    Args:
        module: The network; it is not changed.
        density: Share of the weights of each layer that is kept, in (0, 1].
        skip: Names of layers to leave alone, as ``named_modules`` gives them; ``*`` stands for anything.
        rounding: ``"netwright"`` or ``"official"``.

    Raises:
        ValueError: If ``density`` is outside (0, 1], there is no such layer, or a name in ``skip`` fits none.

    Example:
        >>> net = sparsify(nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8, 2)), 0.25, skip=["2"])
        >>> type(net[0]).__name__, type(net[2]).__name__, sparsity_report(net)["0"].kept
        ('SparseConv2d', 'Linear', 18)
    """
    check_density(density)
    names = [name for name, _ in _require_layers(module)]
    for pattern in skip:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"skip must name convolution or linear layers, got {pattern!r}; there are {', '.join(names)}"
            )

    def change(name: str, layer: nn.Module) -> nn.Module:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in skip):
            return layer
        mask = mask_of(layer)
        if isinstance(mask, Scored):
            mask.set_density(density)
        elif type(layer) is nn.Conv2d:
            return _adopt(_same_layer(SparseConv2d, layer, density=density, rounding=rounding), layer)
        elif type(layer) is nn.Linear:
            return _adopt(_same_layer(SparseLinear, layer, density=density, rounding=rounding), layer)
        else:
            parametrize.register_parametrization(layer, "weight", TopKMask(density, rounding=rounding))
        return layer

    return _replace(module, change)


def set_density(module: nn.Module, density: float) -> None:
    """Sets the share of weights kept in every layer that has scores.

    Raises:
        ValueError: If ``density`` is outside (0, 1], or no layer has scores.

    Example:
        >>> net = sparsify(nn.Linear(10, 10), 1.0)
        >>> set_density(net, 0.05)
        >>> int(net.mask().sum())
        5
    """
    check_density(density)
    for _, _, mask in _scored(module):
        mask.set_density(density)


def train_mode(module: nn.Module, what: What) -> None:
    """Chooses what is trained in every layer that has scores: ``"weights"`` (with biases), ``"scores"``,
    ``"both"``.

    Everything else (batch norm, layers without scores) is left as it is.

    Raises:
        ValueError: If ``what`` is none of the three, or no layer has scores.

    Example:
        >>> net = sparsify(nn.Linear(4, 2), 0.5)
        >>> train_mode(net, "scores")
        >>> [name for name, p in net.named_parameters() if p.requires_grad]
        ['scores']
    """
    for _, layer, mask in _scored(module):
        set_trainable(what, mask.scores, *_weights(layer), layer.bias)  # type: ignore[arg-type]


def init_scores(
    module: nn.Module, method: Literal["kaiming", "scaled"], *, generator: torch.Generator | None = None
) -> None:
    """Fills the scores of every layer that has them.

    Args:
        module: The network.
        method: ``"kaiming"`` draws N(0, 2 / fan_in); ``"scaled"`` takes sqrt(6 / fan_in) W / max|W|, whose
            mask is that of magnitude pruning.
        generator: Where ``"kaiming"`` draws from; the global generator when none is given.

    Raises:
        ValueError: If ``method`` is unknown, no layer has scores, or a weight is all zero (``"scaled"``).

    Example:
        >>> net = sparsify(nn.Linear(6, 2), 0.5)
        >>> init_scores(net, "scaled")
        >>> float(net.scores.abs().max())
        1.0
    """
    for name, layer, mask in _scored(module):
        try:
            mask.init_scores(_unmasked(layer), method, generator)
        except ValueError as error:
            raise ValueError(f"layer {name or type(module).__name__!r}: {error}") from error


def to_dense(module: nn.Module) -> nn.Module:
    """A plain copy with every mask baked into its weight: no scores, no parametrization, zeros exactly zero.

    Other parametrizations of a masked weight are baked in too; layers without a mask are only copied. Layers that share
    a weight go on sharing it.

    Example:
        >>> net = nn.Sequential(SparseLinear(4, 2, density=0.25))
        >>> x = torch.rand(3, 4)
        >>> type(to_dense(net)[0]) is nn.Linear, torch.equal(to_dense(net)(x), net(x))
        (True, True)
    """

    def change(name: str, layer: nn.Module) -> nn.Module:
        mask = mask_of(layer)
        if isinstance(mask, (SparseConv2d, SparseLinear)):
            with torch.no_grad():
                weight = mask.apply_mask(mask.weight).clone()
            new = _adopt(_same_layer(nn.Conv2d if isinstance(mask, nn.Conv2d) else nn.Linear, layer), layer)
            new.weight = nn.Parameter(weight, requires_grad=mask.weight.requires_grad)
            return new
        return layer

    dense = _replace(module, change)
    bake_together(masked_tensors(dense))
    return dense


def masked_tensors(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The layers, of any kind, that have a mask among the parametrizations of a tensor, with its name."""
    found = list(parametrized(module))
    return [o for o in found if any(isinstance(step, (TopKMask, FixedMask)) for step in steps_of(*o))]


def unparametrized(module: _M) -> _M:
    """A plain copy with every mask and every other parametrization baked in.

    Example:
        >>> layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.Tanh())
        >>> list(unparametrized(layer).state_dict())
        ['weight', 'bias']
    """
    plain = cast(_M, to_dense(module))
    with in_mode(plain, training=False):  # in training some draw at random
        bake_together(reversed(list(parametrized(plain))))  # reversed, so that parameters get their order back
    return plain


@dataclass(frozen=True)
class LayerSparsity(Result):
    """What is left of one layer.

    Attributes:
        kept: Weights that are not zero.
        total: All weights (biases apart).
        dead_filters: Output channels whose weights are all zero.
        filters: Output channels.
    """

    kept: int
    total: int
    dead_filters: int
    filters: int

    @property
    def sparsity(self) -> float:
        """Share of the weights that are zero, in [0, 1]."""
        return 1 - self.kept / self.total


def sparsity_report(module: nn.Module) -> dict[str, LayerSparsity]:
    """What is left of each convolution and linear layer, by name, in module order.

    Raises:
        ValueError: If there is no such layer.

    Example:
        >>> sparsity_report(nn.Sequential(SparseLinear(10, 2, density=0.1)))["0"].kept
        2
    """
    report = {}
    for name, layer in _require_layers(module):
        with torch.no_grad():
            alive = effective_weight(layer) != 0
        if isinstance(layer, _TRANSPOSED):
            groups = alive.unflatten(0, (layer.groups, -1))
            filters = groups.transpose(1, 2).flatten(0, 1).flatten(1).any(1)
        else:
            filters = alive.flatten(1).any(1)
        report[name] = LayerSparsity(int(alive.sum()), alive.numel(), int((~filters).sum()), len(filters))
    return report


def sparsity(module: nn.Module) -> float:
    """Share of zeros, in [0, 1], among all weights of convolution and linear layers, stem and depthwise too.

    Raises:
        ValueError: If there is no such layer.

    Example:
        >>> sparsity(nn.Sequential(SparseLinear(10, 2, density=0.1), SparseLinear(10, 2, density=0.5)))
        0.7
    """
    report = sparsity_report(module).values()
    return 1 - sum(layer.kept for layer in report) / sum(layer.total for layer in report)


def export_csr(module: nn.Module) -> dict[str, Tensor]:
    """The effective weights of linear layers and ungrouped 1x1 convolutions as ``torch.sparse_csr`` matrices.

    Each has shape (outputs, inputs); a 1x1 convolution is the matrix times its input flattened to (inputs,
    pixels).

    Raises:
        ValueError: If there is no convolution or linear layer at all.

    Example:
        >>> export_csr(nn.Sequential(SparseConv2d(8, 4, 1, density=0.25)))["0"].values().numel()
        8
    """
    matrices = {}
    for name, layer in _require_layers(module):
        pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
        if pointwise or isinstance(layer, nn.Linear):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
                matrices[name] = effective_weight(layer).detach().flatten(1).to_sparse_csr()
    return matrices
