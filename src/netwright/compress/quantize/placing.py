"""Quantisers in a network: where they are, which tensors get one, rounding without training, and taking them away.

Polino, Pascanu and Alistarh, "Model compression via distillation and quantization", ICLR 2018, arXiv:1802.05668.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from netwright.checks import one_of
from netwright.compress.quantize.quantizers import Gradient, Quantizer, UniformQuantizer
from netwright.compress.quantize.scaling import check_finite
from netwright.nn import shared
from netwright.nn.sparse import LAYERS, mask_of, unparametrized

WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
Which = Literal["weights", "all"]
Ranges = Literal["minmax", "mse"]
_M = TypeVar("_M", bound=nn.Module)


def quantizers(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, Quantizer]]:
    """Name of each quantised tensor, as in the plain network's ``state_dict``, its layer, its own name, and its
    quantiser.

    Example:
        >>> [name for name, *_ in quantizers(post_training_quantize(nn.Sequential(nn.Linear(2, 2)), 4))]
        ['0.weight']
    """
    for path, part in module.named_modules():
        if not parametrize.is_parametrized(part):
            continue
        for name, steps in cast(nn.ModuleDict, part.parametrizations).items():
            found = [step for step in cast(nn.ModuleList, steps) if isinstance(step, Quantizer)]
            if found:
                yield f"{path}.{name}" if path else name, part, name, found[-1]


def received(layer: nn.Module, name: str, quantizer: Quantizer) -> Tensor | None:
    """The tensor as its quantiser gets it, after all steps before it; None if the layer changes what it gives."""
    if mask_of(layer) is layer or shared.steps_of(layer, name)[-1] is not quantizer:
        return None
    value, *more = shared.originals(layer, name)
    with torch.no_grad():
        for step in list(shared.steps_of(layer, name))[:-1]:
            value, more = step(value, *more), []
    return value.detach()


def targets(
    module: nn.Module, which: Which = "weights", first_last: bool = True
) -> list[tuple[nn.Module, str, Tensor]]:
    """The parameters that are to be quantised: layer, name, and the tensor as the layer uses it.

    A tensor that several layers share is there once, with the first of them.

    Args:
        module: Any network; of a masked layer the masked tensor is meant.
        which: ``"weights"``, those of convolutions and linear layers and of attention's projections; ``"all"``, every
            parameter.
        first_last: Whether the first and the last convolution or linear layer are among them, and what shares their
            tensors.

    Raises:
        ValueError: If ``which`` is unknown, or nothing is left.
    """
    one_of("quantize", which, get_args(Which))
    parts = shared.parts_of(module)
    weighed = [part for part in parts if isinstance(part, LAYERS)]
    left_out = [] if first_last else [*weighed[:1], *weighed[-1:]]
    seen = {shared.identity(part, name) for part in left_out for name, _ in _own_tensors(part)}
    found: list[tuple[nn.Module, str, Tensor]] = []
    for part in parts:
        if which == "weights" and not isinstance(part, (*LAYERS, nn.MultiheadAttention)):
            continue
        for name, parameter in _own_tensors(part):
            key = shared.identity(part, name)
            if (which == "all" or name in WEIGHTS) and parameter.numel() and key not in seen:
                found.append((part, name, parameter))
                seen.add(key)
    if not found:
        raise ValueError(f"module must hold weights to quantise, got {type(module).__name__} without any left")
    return found


def _own_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from part.named_parameters(recurse=False)
    if parametrize.is_parametrized(part):
        for name in cast(nn.ModuleDict, part.parametrizations):
            yield name, getattr(part, name)


def kept_weights(weight: Tensor) -> Tensor | None:
    """Where a pruned tensor is not zero; None for one that holds no zero, or nothing else."""
    kept = weight.detach() != 0
    return kept if bool(kept.any()) and not bool(kept.all()) else None


def quantize_with(
    module: _M,
    make: Callable[[Tensor, Tensor | None, int], Quantizer],
    which: Which = "weights",
    first_last: bool = True,
) -> tuple[_M, list[Quantizer]]:
    """A plain copy of a network whose tensors go through the quantisers that ``make(parameter, kept, number)``
    gives.

    What was parametrized is baked in. Layers that share a tensor share its quantiser.

    Raises:
        ValueError: If the network is quantised already, or a tensor is not finite.
    """
    if any(True for _ in quantizers(module)):
        raise ValueError(f"module must not be quantised already, got {type(module).__name__} with quantisers")
    plain = unparametrized(module)
    made: list[tuple[nn.Module, str, Quantizer]] = []
    for number, (part, name, parameter) in enumerate(targets(plain, which, first_last)):
        check_finite(parameter, name)
        made.append((part, name, make(parameter, kept_weights(parameter), number)))
    shared.register(plain, made)
    return plain, [quantizer for *_, quantizer in made]


def post_training_quantize(
    model: _M,
    bits: int,
    bucket_size: int | None = 256,
    *,
    quantize: Which = "weights",
    quantize_first_last: bool = True,
    grad: Gradient = "ste",
    ranges: Ranges = "minmax",
) -> _M:
    """A copy of a network that computes with weights rounded to 2^bits levels; nothing is trained.

    The weights behind the rounding are still there, so the copy can be trained on with any loop; :func:`baked` and
    every export put the rounded ones in their place, :func:`pack` stores them in as many bits.

    Args:
        model: The network; it is not changed. Masks and other parametrizations are baked in; zeros stay.
        bits: 1..16.
        bucket_size: Weights that share a scale; None for one scale a tensor.
        quantize: ``"weights"`` of convolutions and linear layers, or ``"all"`` parameters.
        quantize_first_last: Whether the first and the last of these layers take part.
        grad: As for :class:`UniformQuantizer`, for those who train on.
        ranges: ``"minmax"``, the paper's, begins and ends the levels of a bucket at its least and largest weight;
            ``"mse"`` where the mean squared error is least, which is better at 2 bits if nothing is trained on, and
            worse at 1.

    Raises:
        ValueError: If an argument is out of its range, or a weight is not finite.

    Example:
        >>> net = post_training_quantize(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)), 2)
        >>> len(net[2].weight.unique()) <= 4
        True
    """
    one_of("ranges", ranges, get_args(Ranges))

    def make(parameter: Tensor, kept: Tensor | None, number: int) -> Quantizer:
        quantizer = UniformQuantizer(bits, bucket_size, grad=grad, kept=kept)
        if ranges == "mse":
            quantizer.fit_ends_(parameter)
        return quantizer

    return quantize_with(model, make, quantize, quantize_first_last)[0]


def baked(model: _M) -> _M:
    """A plain copy with the rounded weights in place, and masks and all other parametrizations baked in.

    Example:
        >>> net = baked(post_training_quantize(nn.Linear(64, 8), 2))
        >>> list(net.state_dict()), len(net.weight.unique()) <= 4 * 2
        (['weight', 'bias'], True)
    """
    return unparametrized(model)
