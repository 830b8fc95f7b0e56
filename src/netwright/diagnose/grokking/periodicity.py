"""How periodic each neuron is: the inverse participation ratio (IPR) of its weights' Fourier spectrum.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061:

    IPR_r(v) = sum_q (P_q / sum P)^r,   P_q = |rfft(v)_q|^2,   q = 0 .. (p - 1) / 2

1 for a single wave, 2 / (p + 1) for an even spectrum. Half of the spectrum is used, since the other half is its mirror;
the whole would give a wave 1/2. For even p there is one bin more, that of the Nyquist frequency. A neuron has the mean
over its rows of U and V and its column of W.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.diagnose.grokking.arithmetic import Op, is_prime, power_order
from netwright.diagnose.grokking.network import linear_pair, norms_between
from netwright.metrics import pearson

# The longest vectors that are transformed by a product with waves.
SHORT = 256
Pair = Sequence[nn.Linear | Tensor]


def inverse_participation_ratio(v: Float[Tensor, "..."], r: int = 2, dim: int = -1) -> Float[Tensor, "..."]:
    """How much of a vector's power is in few frequencies; its length, shift and sign do not matter.

    Args:
        v: Real and finite, at least 3 long in ``dim``.
        r: Exponent, >= 2.
        dim: The dimension that is transformed.

    Returns:
        In (0, 1], without ``dim``; 0 for a vector of zeros. At least float32.

    Raises:
        ValueError: If ``r`` is below 2, ``v`` is shorter than 3 in ``dim``, or a value is not finite.
        TypeError: If ``v`` is complex.

    Example:
        >>> waves = torch.cos(2 * torch.pi / 11 * torch.tensor([[3.0], [5.0]]) * torch.arange(11))
        >>> inverse_participation_ratio(waves), inverse_participation_ratio(waves.sum(0))
        (tensor([1., 1.]), tensor(0.5000))
    """
    if not r >= 2:
        raise ValueError(f"r must be >= 2, got {r}")
    if v.is_complex():
        raise TypeError(f"v must be real, got {v.dtype}")
    if v.ndim < 1 or v.shape[dim] < 3:
        raise ValueError(f"v must be at least 3 long in dim {dim}, got shape {tuple(v.shape)}")
    values = (v if v.dtype == torch.float64 else v.float()).movedim(dim, -1)
    size = values.detach().abs().amax(-1, keepdim=True)
    if not size.isfinite().all():
        raise ValueError("v must be finite, got NaN or infinity")
    # Weights that decayed for long have squares too small for float32.
    power = _power(values / torch.where(size > 0, size, 1.0))
    total = power.sum(-1, keepdim=True)
    return (power / torch.where(total > 0, total, 1.0)).pow(r).sum(-1)


def _power(v: Float[Tensor, "*batch p"]) -> Float[Tensor, "*batch half"]:
    """The squares of the spectrum's first half; short vectors by a product, which is faster than their FFT."""
    p = v.shape[-1]
    if p > SHORT:
        return torch.view_as_real(torch.fft.rfft(v)).square().sum(-1)
    waves = _waves(p).to(v)
    return (v @ waves).square().unflatten(-1, (2, p // 2 + 1)).sum(-2)


@functools.lru_cache(maxsize=16)
def _waves(p: int) -> Float[Tensor, "p waves"]:
    """Cosines, then sines, of the frequencies 0 .. p // 2, float64."""
    angles = 2 * math.pi / p * (torch.arange(p)[:, None] * torch.arange(p // 2 + 1) % p).double()
    return torch.cat([angles.cos(), angles.sin()], 1)


def random_ipr(p: int) -> float:
    """About what random weights have on average, with r = 2: that of n = (p + 1) / 2 powers drawn alike, 2 / (n + 1).

    Example:
        >>> random_ipr(97)
        0.04
    """
    return 4 / (p + 3)


def neuron_ipr(
    model_or_weights: nn.Module | Pair, r: int = 2, *, op: Op = "add", blocks: int = 2
) -> Float[Tensor, " neurons"]:
    """The IPR of each hidden neuron: the mean over the blocks of its input weights and its output weights.

    Args:
        model_or_weights: A network with two linear layers, such as :class:`QuadraticMLP`, or the pair of them or of
            their weights: (N, inputs) and (outputs, N).
        r: Exponent, >= 2.
        op: With ``"mul"`` weights are put in the order of discrete logarithms (without that of 0), in which products
            are periodic.
        blocks: Equal parts of the input, one a number: 2 for pairs.

    Returns:
        (N,), in [0, 1]: near 1 for a neuron that generalises, near :func:`random_ipr` for one that memorises.

    Raises:
        ValueError: If there are no two layers, their widths do not fit, the input does not fall into ``blocks`` parts,
            a part is shorter than 3, a weight is not finite, ``r`` is below 2, or ``op="mul"`` and parts and output are
            not of one prime length.

    Example:
        >>> from netwright.diagnose.grokking import QuadraticMLP
        >>> bool((neuron_ipr(QuadraticMLP.analytic(23, 60)) > 0.999).all())
        True
    """
    first, second = _weights(model_or_weights)
    one_of("op", op, get_args(Op))
    if blocks < 1 or first.shape[1] % blocks:
        raise ValueError(f"blocks must divide the {first.shape[1]} inputs, got {blocks}")
    inputs, outputs = first.unflatten(1, (blocks, -1)), second.T
    if op == "mul":
        p = inputs.shape[2]
        if p != outputs.shape[1] or p < 3 or not is_prime(p):
            raise ValueError(f"products need blocks and outputs of one prime length, got {p} and {outputs.shape[1]}")
        order = power_order(p).to(first.device)
        inputs, outputs = inputs[:, :, order], outputs[:, order]
    found = inverse_participation_ratio(inputs, r).sum(1) + inverse_participation_ratio(outputs, r)
    return found / (blocks + 1)


def _weights(given: nn.Module | Pair) -> tuple[Tensor, Tensor]:
    pair: Pair = linear_pair(given) if isinstance(given, nn.Module) else given
    if len(pair) != 2:
        raise ValueError(f"weights must be those of 2 layers, got {len(pair)}")
    found = [part.weight if isinstance(part, nn.Linear) else part for part in pair]
    first, second = (weight.detach() for weight in found)
    if first.ndim != 2 or second.ndim != 2 or first.shape[0] != second.shape[1]:
        raise ValueError(
            f"weights must be (N, inputs) and (outputs, N), got {tuple(first.shape)} and {tuple(second.shape)}"
        )
    return first, second


def scale_correlation(model: nn.Module, *, op: Op = "add", blocks: int = 2) -> float:
    """Spearman's correlation of the hidden norm's scale gamma with the IPR of each neuron.

    Batch norm that enlarges the periodic neurons and shrinks the memorising ones has a positive one.

    Args:
        model: A network with two linear layers and a norm between them that has a scale.
        op: As for :func:`neuron_ipr`.
        blocks: As for :func:`neuron_ipr`.

    Returns:
        In [-1, 1]; NaN where gamma or the IPR is the same for all neurons.

    Raises:
        ValueError: If there is no such norm, or as for :func:`neuron_ipr`.

    Example:
        >>> from netwright.diagnose.grokking import QuadraticMLP
        >>> net = QuadraticMLP(11, 20, norm="bn")
        >>> with torch.no_grad():
        ...     _ = net.norm.weight.copy_(neuron_ipr(net))
        >>> round(scale_correlation(net), 6)
        1.0
    """
    from scipy.stats import rankdata

    scales = [norm.weight for norm in norms_between(model) if norm.weight is not None]
    if not scales:
        raise ValueError(f"model must have a norm with a scale between its layers, got {type(model).__name__} without")
    ipr = neuron_ipr(model, op=op, blocks=blocks)
    sides = [torch.from_numpy(rankdata(side.cpu().numpy())) for side in (scales[0].detach(), ipr)]
    if any(bool((side == side[0]).all()) for side in sides):
        return float("nan")
    return pearson(*sides)
