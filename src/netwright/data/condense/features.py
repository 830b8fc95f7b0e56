"""Features for selection: what a network sees before it classifies, and the gradient of its last layer.

Zhou et al., "Dataset Quantization", ICCV 2023, arXiv:2308.10524. With logits z = W h + b and a loss L, the gradient of
the last layer is dL/dz and dL/dz h^T: the outer product of g = dL/dz and (1, h), so g and h are kept and it is never
built:

    <g_i (1, h_i)^T, g_j (1, h_j)^T> = <g_i, g_j> (1 + <h_i, h_j>),    g = softmax(z) - onehot(y)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.activations import caught, last_linear
from netwright.nn.modes import in_mode


def penultimate_features(
    model: nn.Module, loader: Iterable[Any], layer: nn.Module | None = None
) -> Float[Tensor, "examples numbers"]:
    """What enters the classifier, for every example of a loader, in its order.

    Args:
        model: In evaluation mode meanwhile; left as it was.
        loader: Batches: inputs, or tuples that begin with them. It must not shuffle.
        layer: The classifier; the last linear layer by default.

    Returns:
        Features on the CPU, flattened.

    Raises:
        ValueError: If there is no linear layer, or the loader is empty.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> penultimate_features(net, [torch.rand(5, 1, 2, 2)]).shape
        torch.Size([5, 3])
    """
    return _passes(model, loader, layer)[0]


def last_layer_gradient_features(
    model: nn.Module, loader: Iterable[Any], *, double_softmax: bool = False
) -> tuple[Float[Tensor, "examples classes"], Float[Tensor, "examples numbers"]]:
    """The gradient of the cross-entropy with respect to the last linear layer, as the pair (g, h) it factorises into.

    Args:
        model: Gives logits; in evaluation mode meanwhile, left as it was.
        loader: Batches (inputs, labels). It must not shuffle.
        double_softmax: Take the cross-entropy of softmax(z) as if it were logits, as the authors' code does.

    Returns:
        g = dL/dz and the input h of the layer, on the CPU: ``features`` for :func:`dataset_bins`.

    Raises:
        ValueError: If there is no linear layer, or the loader is empty or has no labels.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> g, h = last_layer_gradient_features(net, [(torch.rand(5, 1, 2, 2), torch.zeros(5, dtype=torch.long))])
        >>> g.shape, h.shape
        (torch.Size([5, 2]), torch.Size([5, 3]))
    """
    h, logits, labels = _passes(model, loader, None)
    if len(labels) != len(h):
        raise ValueError(f"loader must give (inputs, labels), got {len(labels)} labels for {len(h)} inputs")
    target = functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
    probs = logits.softmax(1)
    if not double_softmax:
        return probs - target, h
    outer = probs.softmax(1) - target  # dL/dp, then through p = softmax(z): p (o - <p, o>)
    return probs * (outer - (probs * outer).sum(1, keepdim=True)), h


def _passes(model: nn.Module, loader: Iterable[Any], layer: nn.Module | None) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the layer, logits and labels of all batches."""
    layer = last_linear(model) if layer is None else layer
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    logits, labels = [], []
    with in_mode(model, training=False), torch.inference_mode(), caught(layer, inputs=True) as seen:
        for batch in loader:
            x, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
            logits.append(model(x.to(device)).cpu())
            labels += [torch.as_tensor(rest[0])] if rest else []
            seen[-1] = seen[-1].flatten(1).cpu()
    if not logits:
        raise ValueError("loader must hold at least 1 batch, got 0")
    # Cloned, since a tensor of inference mode cannot take part in a gradient later.
    found = torch.cat(seen).clone(), torch.cat(logits).clone()
    return (*found, torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64))
