"""What a network asks of a runtime: weights, zeros, multiply-adds and activations, layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch import nn

from netwright.deploy.bench.subject import first
from netwright.results import Result
from netwright.seeding import stream

if TYPE_CHECKING:
    from torch import Tensor

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
        live_macs: Those of them whose channel depends on the network's input. Where zeros have cut a channel off it is
            constant, and a runtime may work it out beforehand.
        in_bytes: Activations that are read, float32.
        out_bytes: Activations that are written, float32.
    """

    name: str
    kind: Kind
    weights: int
    nonzeros: int
    macs: int
    sparse_macs: int
    live_macs: int
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
        live_macs: Those of them whose channel depends on the input.
        constant: Whether the output does not depend on the input: the zeros have cut the network apart.
        dense_bytes: All parameters as float32.
        layers: In module order.
    """

    weights: int
    sparsity: float
    pruned_weights: int
    pruned_sparsity: float
    macs: int
    sparse_macs: int
    live_macs: int
    constant: bool
    dense_bytes: int
    layers: tuple[Layer, ...]


def describe(module: nn.Module, example: np.ndarray, pruned: Iterable[str]) -> Facts:
    """Looks at a network while it runs on ``example``, (batch, ...), and on random numbers in its place.

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
    from netwright.cost import count
    from netwright.nn.sparse import layers, sparsity_report

    batch = len(example)
    cost = count(module, example.shape[1:])
    macs = {layer.name: (batch * layer.macs, batch * layer.sparse_macs) for layer in cost.per_layer}
    report = sparsity_report(module)
    passed, constant = _watch(module, example[:1])
    found = []
    for name, layer in layers(module):
        size = report[name]
        kind: Kind = "sparse" if size.kept <= DENSE_ABOVE * size.total else "dense"
        if is_depthwise(layer):
            kind = "depthwise"
        whole, kept = macs.get(name, (0, 0))
        live = round(kept * passed[name].live(layer)) if name in passed else kept
        moved = (batch * passed[name].in_bytes, batch * passed[name].out_bytes) if name in passed else (0, 0)
        found.append(Layer(name, kind, size.total, size.kept, whole, kept, live, *moved))
    chosen = [layer for layer in found if layer.name in set(pruned)]
    elsewhere = batch * cost.sparse_macs - sum(layer.sparse_macs for layer in found)
    return Facts(
        *_zeros(found),
        *_zeros(chosen),
        macs=batch * cost.macs,
        sparse_macs=batch * cost.sparse_macs,
        live_macs=elsewhere + sum(layer.live_macs for layer in found),
        constant=constant,
        dense_bytes=4 * cost.parameters,
        layers=tuple(found),
    )


class _Passed:
    """What has passed through a layer: bytes, and which channels came out different for two inputs of the network."""

    def __init__(self) -> None:
        self.in_bytes = self.out_bytes = 0
        self.seen: list[Tensor] = []
        self.varies: Tensor | None = None

    def live(self, layer: nn.Module) -> float:
        """Share of the weights that are not zero and read a channel that varies."""
        weight: Tensor = layer.weight  # type: ignore[assignment]
        kept, varies = weight != 0, self.varies
        total = int(kept.sum())
        if varies is None or not total or not isinstance(layer, (nn.Conv2d, nn.Linear)):  # other kinds count as live
            return 1.0
        groups = getattr(layer, "groups", 1)
        # (groups, 1, channels of a group, 1) beside the weights as (groups, rows, channels of a group, taps)
        read = varies.view(groups, 1, -1, 1) & kept.view(groups, len(kept) // groups, kept.shape[1], -1)
        return int(read.sum()) / total


def _watch(module: nn.Module, example: np.ndarray) -> tuple[dict[str, _Passed], bool]:
    """What passes through each layer that runs on one input, and whether the output is the same for another one."""
    import torch

    from netwright.nn.sparse import layers

    passed: dict[str, _Passed] = {}

    def hook(name: str, again: list[int]) -> Any:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0]
            mine = passed.setdefault(name, _Passed())
            if not second:
                mine.in_bytes += 4 * x.numel()
                mine.out_bytes += 4 * output.numel()
                mine.seen.append(x.clone())  # what follows may work in place
                return
            axis = 1 if x.ndim == 4 else x.ndim - 1
            differs = (x != mine.seen[again[0]]).movedim(axis, 0).flatten(1).any(1)
            mine.varies = differs if mine.varies is None else mine.varies | differs
            again[0] += 1

        return note

    hooks = [layer.register_forward_hook(hook(name, [0])) for name, layer in layers(module)]
    try:
        with torch.inference_mode():
            second = False
            one = first(module(torch.from_numpy(example)))
            second = True
            two = first(module(torch.randn(example.shape, generator=stream(0, "describe"))))
    finally:
        for handle in hooks:
            handle.remove()
    return passed, bool((one == two).all())


def is_depthwise(layer: nn.Module) -> bool:
    """Whether each output channel of a convolution reads one input channel only, and there is more than one."""
    return 1 < getattr(layer, "groups", 1) == layer.in_channels


def _zeros(layers: list[Layer]) -> tuple[int, float]:
    total = sum(layer.weights for layer in layers)
    return total, 1 - sum(layer.nonzeros for layer in layers) / total if total else 0.0
