"""What is left of a network when neurons are taken away in some order.

Doshi, Das, He and Gromov, "To grok or not to grok: Disentangling generalization and memorization on corrupted
algorithmic datasets", ICLR 2024, arXiv:2310.13061: without those of lowest inverse participation ratio a network has
forgotten the labels it memorised and still generalises.

With hidden activations H (examples, N) that do not depend on one another's neurons, the outputs without the first c
neurons are a partial sum, so that one forward pass gives the accuracies of every c:

    f_c = sum over k >= c of H[:, k] W[:, k]
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from netwright.diagnose.grokking.arithmetic import ModularArithmetic
from netwright.diagnose.grokking.network import QuadraticMLP, linear_pair, norms_between
from netwright.diagnose.grokking.periodicity import neuron_ipr
from netwright.diagnose.grokking.phases import accuracies
from netwright.nn.activations import caught
from netwright.nn.modes import in_mode

Order = Literal["low", "high", "random"]
# Examples at once, so that their outputs stay in the processor's cache while neurons are added.
CHUNK = 512


def prune_neurons(model: nn.Module, idx: Sequence[int] | Int[Tensor, "..."] | Bool[Tensor, " neurons"]) -> nn.Module:
    """A copy of a network without some of its hidden neurons: their weights are zero, and scale and shift of the norm.

    The copy has the shapes of the original. Under batch norm (in evaluation) it gives what a network without these
    neurons does; layer norm still counts them, with activation 0.

    Args:
        model: A network with two linear layers.
        idx: Numbers of the neurons, or a mask of all of them.

    Raises:
        ValueError: If a number is outside 0 .. N - 1, a mask has another length, or there are no two layers.
        TypeError: If ``idx`` is neither whole numbers nor a mask.

    Example:
        >>> from netwright.diagnose.grokking import QuadraticMLP
        >>> net = prune_neurons(QuadraticMLP(7, width=4), [0, 2])
        >>> (net.W == 0).all(0), bool((net.U[2] == 0).all())
        (tensor([ True, False,  True, False]), True)
    """
    pruned = copy.deepcopy(model)
    first, second = linear_pair(pruned)
    width = first.out_features
    chosen = torch.as_tensor(idx)
    if chosen.dtype == torch.bool:
        if chosen.shape != (width,):
            raise ValueError(f"idx must be a mask of {width} neurons, got shape {tuple(chosen.shape)}")
        chosen = chosen.nonzero()
    if chosen.is_floating_point() and chosen.numel():
        raise TypeError(f"idx must be whole numbers or a mask, got {chosen.dtype}")
    chosen = chosen.flatten().long()
    if len(chosen) and not 0 <= int(chosen.min()) <= int(chosen.max()) < width:
        raise ValueError(f"idx must lie in 0..{width - 1}, got {int(chosen.min())}..{int(chosen.max())}")
    rows = [part for norm in norms_between(pruned) for part in (norm.weight, norm.bias)]
    with torch.no_grad():
        for rowwise in (first.weight, first.bias, *rows):
            if rowwise is not None:
                rowwise[chosen] = 0
        second.weight[:, chosen] = 0
    return pruned


def pruning_curve(
    model: nn.Module,
    data: ModularArithmetic,
    order: Order | Int[Tensor, " neurons"] = "low",
    counts: Sequence[int] | Int[Tensor, " counts"] | None = None,
    *,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Accuracies after each number of pruned neurons, without retraining.

    Args:
        model: A network with two linear layers between which neurons do not mix, but for the norm's statistics (layer
            norm takes a forward pass for each count); in evaluation mode meanwhile.
        data: The pairs, for all accuracies with ``split="all"``; ``encoding="one-hot"`` unless the network takes
            numbers.
        order: ``"low"`` or ``"high"`` prunes from the lowest or the highest IPR on; ``"random"``; or the neurons in the
            order in which they go.
        counts: How many are pruned, each in 0 .. N; steps of 5 % by default.
        generator: Source of the random order; torch's global one when None.

    Returns:
        ``count`` (int64) and what :func:`accuracies` gives, each with one value a count.

    Raises:
        ValueError: If ``order`` is unknown or no permutation, or a count is outside 0 .. N.

    Example:
        >>> from netwright.diagnose.grokking import QuadraticMLP
        >>> net = QuadraticMLP.analytic(11, 400, torch.Generator().manual_seed(0))
        >>> curve = pruning_curve(net, ModularArithmetic(p=11, split="all"), counts=[0, 40, 400])
        >>> [round(share, 2) for share in curve["train"].tolist()]
        [1.0, 1.0, 0.1]
    """
    width = linear_pair(model)[0].out_features
    if counts is None:
        counts = torch.linspace(0, width, 21).round().long().unique()
    wanted = torch.as_tensor(counts).long().flatten()
    if not len(wanted) or not 0 <= int(wanted.min()) <= int(wanted.max()) <= width:
        raise ValueError(f"counts must lie in 0..{width}, got {wanted.tolist()[:10]}")
    going = _ordered(model, data, order, width, generator)
    with in_mode(model, training=False), torch.inference_mode():
        if any(isinstance(norm, nn.LayerNorm) for norm in norms_between(model)):
            predicted = torch.stack([_predicted(prune_neurons(model, going[:count]), data) for count in wanted])
        else:
            predicted = _partial_sums(model, data, going, wanted)
    return {"count": wanted} | accuracies(predicted, data)


def _ordered(
    model: nn.Module, data: ModularArithmetic, order: str | Tensor, width: int, generator: torch.Generator | None
) -> Tensor:
    if isinstance(order, Tensor):
        if order.shape != (width,) or not torch.equal(order.sort().values.cpu(), torch.arange(width)):
            raise ValueError(f"order must be a permutation of 0..{width - 1}, got shape {tuple(order.shape)}")
        return order
    if order not in get_args(Order):
        raise ValueError(f"order must be a tensor or one of {', '.join(map(repr, get_args(Order)))}, got {order!r}")
    if order == "random":
        return torch.randperm(width, generator=generator)
    return neuron_ipr(model, op=data.op).argsort(descending=order == "high", stable=True)


def _device(model: nn.Module) -> torch.device:
    return linear_pair(model)[0].weight.device


def _predicted(model: nn.Module, data: ModularArithmetic) -> Tensor:
    """Classes of all examples; the model is in evaluation mode."""
    device = _device(model)
    return torch.cat([model(part.to(device)).argmax(1).cpu() for part in data.inputs.split(8 * CHUNK)])


def _partial_sums(model: nn.Module, data: ModularArithmetic, order: Tensor, counts: Tensor) -> Tensor:
    """Classes of all examples for each count: neurons come back from the last pruned to the first."""
    second, device = linear_pair(model)[1], _device(model)
    order = order.to(device)
    weight = second.weight.T[order]
    places = counts.argsort(descending=True).tolist()
    ends = counts.tolist()
    predicted = torch.empty(len(ends), len(data), dtype=torch.int64)
    for start in range(0, len(data), CHUNK):
        hidden = _hidden(model, second, data.inputs[start : start + CHUNK].to(device)).index_select(1, order)
        outputs = hidden.new_zeros(len(hidden), second.out_features)
        if second.bias is not None:
            outputs += second.bias
        kept = len(order)
        for place in places:
            if ends[place] < kept:
                outputs.addmm_(hidden[:, ends[place] : kept], weight[ends[place] : kept])
                kept = ends[place]
            # Of equal outputs the first, as argmax has it, and faster.
            predicted[place, start : start + CHUNK] = outputs.max(1).indices
    return predicted


def _hidden(model: nn.Module, second: nn.Linear, inputs: Tensor) -> Tensor:
    """What the second layer sees."""
    if isinstance(model, QuadraticMLP):
        return model.hidden(inputs)
    with caught(second, inputs=True) as seen:
        model(inputs)
    return seen[-1]
