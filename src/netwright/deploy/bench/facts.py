"""What a network asks of a runtime: weights, zeros, multiply-adds and activations, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from netwright.results import Result

if TYPE_CHECKING:
    from torch import nn

Kind = Literal["sparse", "dense", "depthwise"]
DENSE_ABOVE = 0.5  # share of non-zeros above which multiplying the zeros too is faster


@dataclass(frozen=True)
class Layer(Result):
    """One convolution or linear layer.

    Attributes:
        name: Path of the module.
        kind: ``"depthwise"``; else ``"dense"`` or ``"sparse"``, by its share of non-zeros.
        weights: Without biases.
        nonzeros: Those that are not zero.
        macs: Multiply-adds of one call.
        sparse_macs: Those of weights that are not zero.
        in_bytes: Activations that are read, float32.
        out_bytes: Activations that are written, float32.
    """

    name: str
    kind: Kind
    weights: int
    nonzeros: int
    macs: int
    sparse_macs: int
    in_bytes: int
    out_bytes: int


@dataclass(frozen=True)
class Facts(Result):
    """The whole network.

    Attributes:
        weights: Of all convolutions and linear layers, without biases.
        sparsity: Share of them that is zero, in [0, 1].
        pruned_weights: Those of the layers that were pruned.
        pruned_sparsity: Share of those that is zero, in [0, 1].
        macs: Multiply-adds of one call.
        sparse_macs: Those of weights that are not zero.
        dense_bytes: All parameters as float32.
        layers: In module order.
    """

    weights: int
    sparsity: float
    pruned_weights: int
    pruned_sparsity: float
    macs: int
    sparse_macs: int
    dense_bytes: int
    layers: tuple[Layer, ...]


def describe(module: nn.Module, example: np.ndarray, pruned: Iterable[str]) -> Facts:
    """Looks at a network while it runs once on ``example``, (batch, ...).

    Args:
        module: In evaluation mode, without masks.
        example: The input of one call.
        pruned: Names of the layers that were pruned.

    Raises:
        ValueError: If the network holds no convolution or linear layer, or does not take the input.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
        >>> found = describe(net, np.zeros((2, 3, 8, 8), np.float32), [])
        >>> found.macs, [layer.kind for layer in found.layers], found.layers[0].out_bytes
        (17856, ['dense', 'depthwise'], 2304)
    """
    import torch

    from netwright.cost import count
    from netwright.nn.sparse import layers, sparsity_report

    batch = len(example)
    cost = count(module, example.shape[1:])
    macs = {layer.name: (batch * layer.macs, batch * layer.sparse_macs) for layer in cost.per_layer}
    report = sparsity_report(module)
    moved: dict[str, list[int]] = {name: [0, 0] for name in report}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            moved[name][0] += 4 * sum(x.numel() for x in inputs)
            moved[name][1] += 4 * output.numel()

        return hook

    hooks = [layer.register_forward_hook(note(name)) for name, layer in layers(module)]
    try:
        with torch.inference_mode():
            module(torch.from_numpy(example))
    finally:
        for handle in hooks:
            handle.remove()
    found = []
    for name, layer in layers(module):
        size = report[name]
        kind: Kind = "sparse" if size.kept <= DENSE_ABOVE * size.total else "dense"
        if is_depthwise(layer):
            kind = "depthwise"
        found.append(Layer(name, kind, size.total, size.kept, *macs.get(name, (0, 0)), *moved[name]))
    chosen = [layer for layer in found if layer.name in set(pruned)]
    return Facts(
        *_zeros(found), *_zeros(chosen), batch * cost.macs, batch * cost.sparse_macs, 4 * cost.parameters, tuple(found)
    )


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel only, and there is more than one."""
    return 1 < getattr(layer, "groups", 1) == layer.in_channels


def _zeros(layers: list[Layer]) -> tuple[int, float]:
    total = sum(layer.weights for layer in layers)
    return total, 1 - sum(layer.nonzeros for layer in layers) / total if total else 0.0
