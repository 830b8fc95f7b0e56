"""What a layer knows of the gradients of single examples, from its inputs and the gradients of its outputs.

The weight's gradient of an example is D A^T, for A (inputs, places) what the weight multiplies and D (outputs, places)
the gradients of what comes out. Its squared norm needs no such product where there are few places:

    ||D A^T||^2 = sum over pairs of places of (A^T A) o (D^T D),    for one place = ||a||^2 ||d||^2

(Goodfellow, "Efficient Per-Example Gradient Computations", 2015, arXiv:1510.01799; Rochette et al., 2019,
arXiv:1912.06015, for convolutions; Li et al., ICLR 2022, arXiv:2110.05679, for sequences.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.patches import CHUNK, Patches

# An input and the gradient of the output, of one call of a layer; both begin with the batch.
Call = tuple[Tensor, Tensor]

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


def has_rule(layer: nn.Module) -> bool:
    """Whether the layer's own parameters are covered: those of its very class, since a subclass may do anything.

    Example:
        >>> has_rule(nn.Conv2d(1, 2, 3)), has_rule(nn.LSTM(2, 2))
        (True, False)
    """
    return type(layer) in {*MATRICES, *NORMS}


def squared_norms(layer: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    """||g_i||^2 of each of the layer's own parameters, (batch,) each.

    Args:
        layer: One that :func:`has_rule`.
        calls: All of its calls in a forward pass.

    Example:
        >>> x, delta = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> squared_norms(nn.Linear(2, 1), [(x, delta)])
        {'weight': tensor([45.]), 'bias': tensor([9.])}
    """
    wanted = _trained(layer)
    if type(layer) in MATRICES and len(calls) == 1 and "weight" in wanted:
        ((x, delta),) = calls
        found = {"weight": torch.cat([_squared(*pair) for pair in _pairs(layer, x, delta)])}
        if "bias" in wanted:
            found["bias"] = _places_summed(layer, delta).square().sum(1)
        return found
    return {name: grad.flatten(1).square().sum(1) for name, grad in gradients(layer, calls).items()}


def gradients(layer: nn.Module, calls: Sequence[Call]) -> dict[str, Tensor]:
    """The gradient of each of the layer's own parameters, (batch, *parameter's shape) each.

    Args:
        layer: One that :func:`has_rule`.
        calls: All of its calls in a forward pass.

    Example:
        >>> x, delta = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]])
        >>> gradients(nn.Linear(2, 1), [(x, delta)])["weight"]
        tensor([[[3., 6.]]])
    """
    wanted, found = _trained(layer), dict[str, Tensor]()
    for x, delta in calls:
        each = _matrix(layer, x, delta) if type(layer) in MATRICES else _affine(layer, x, delta)
        for name in wanted:
            found[name] = found[name] + each[name] if name in found else each[name]
    return found


def _trained(layer: nn.Module) -> list[str]:
    return [name for name, param in layer.named_parameters(recurse=False) if param.requires_grad]


def _pairs(layer: nn.Module, x: Tensor, delta: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A (batch, groups, inputs, places) and D (batch, groups, outputs, places), in pieces of consecutive examples."""
    if isinstance(layer, nn.Linear):
        rows, deltas = (value.reshape(len(value), -1, value.shape[-1]).mT[:, None] for value in (x, delta))
        places = rows.shape[3]
        each = rows.shape[2] * deltas.shape[2] if _direct(rows, deltas) else places * (places + rows.shape[2])
        yield from zip(*(value.split(max(1, CHUNK // max(1, each))) for value in (rows, deltas)), strict=True)
        return
    patches = Patches.of_layer(layer)
    places = math.prod(delta.shape[2:])
    deltas = delta.reshape(len(delta), patches.groups, -1, places)
    start = 0
    for piece in patches.of(x):
        rows = piece.view(patches.groups, piece.shape[1], -1, places).permute(2, 0, 1, 3)
        yield rows, deltas[start : start + len(rows)]
        start += len(rows)


def _direct(rows: Tensor, deltas: Tensor) -> bool:
    """Whether D A^T costs less than the two matrices of all pairs of places."""
    inputs, outputs, places = rows.shape[2], deltas.shape[2], rows.shape[3]
    return places * (inputs + outputs) >= inputs * outputs


def _squared(rows: Tensor, deltas: Tensor) -> Tensor:
    if rows.shape[3] == 1:
        return (rows.square().sum((2, 3)) * deltas.square().sum((2, 3))).sum(1)
    if _direct(rows, deltas):
        return (deltas @ rows.mT).square().sum((1, 2, 3))
    # A norm is not negative, but the sum of its terms may be by a rounding.
    return ((rows.mT @ rows) * (deltas.mT @ deltas)).sum((1, 2, 3)).clamp_min(0)


def _places_summed(layer: nn.Module, delta: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return delta.reshape(len(delta), -1, delta.shape[-1]).sum(1)
    return delta.flatten(2).sum(2)


def _matrix(layer: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    weight = torch.cat([deltas @ rows.mT for rows, deltas in _pairs(layer, x, delta)])
    shape: Tensor = layer.weight  # type: ignore[assignment]  # of a layer of MATRICES
    return {"weight": weight.reshape(-1, *shape.shape), "bias": _places_summed(layer, delta)}


def _affine(layer: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """y = w o x_hat + b: the gradients are sums of delta o x_hat and of delta over what shares a number."""
    if isinstance(layer, nn.LayerNorm):
        unit, shape = functional.layer_norm(x, layer.normalized_shape, eps=layer.eps), layer.normalized_shape

        def summed(value: Tensor) -> Tensor:
            return value.reshape(len(value), -1, *shape).sum(1)

    else:
        if isinstance(layer, nn.GroupNorm):
            unit = functional.group_norm(x, layer.num_groups, eps=layer.eps)
        else:
            assert isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
            unit = functional.batch_norm(x, layer.running_mean, layer.running_var, eps=layer.eps)

        def summed(value: Tensor) -> Tensor:
            return value.reshape(*value.shape[:2], -1).sum(2)

    return {"weight": summed(delta * unit), "bias": summed(delta)}
