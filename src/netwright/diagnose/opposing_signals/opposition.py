"""Gradients of groups: whether two groups pull the weights to opposite sides, and who in a group belongs together.

Rosenfeld and Risteski, "Outliers with Opposing Signals Have an Outsized Effect on Neural Network Optimization", ICLR
2024, arXiv:2311.04163:

    cos(g_A, g_B),    (g_A . v) (g_B . v),    g = mean gradient of a group, v = the sharpest direction
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.checks import one_of
from netwright.diagnose.gradients import ExampleGradients
from netwright.diagnose.losses import LossFunction, example_losses
from netwright.diagnose.opposing_signals.edge import trained_parameters
from netwright.nn.activations import caught, last_linear
from netwright.nn.modes import in_mode

By = Literal["features", "gradients"]


def mean_gradient(model: nn.Module, loss_fn: LossFunction, x: Tensor, y: Tensor) -> Float[Tensor, " numbers"]:
    """The gradient of the mean loss of some examples, of all trained parameters in a row, in evaluation mode.

    Nothing is written to ``.grad``.

    Raises:
        ValueError: If there is no example, or the loss does not give one number an example.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> mean_gradient(net, lambda output, _: output[:, 0], torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2))
        tensor([2., 3.])
    """
    if not len(x):
        raise ValueError("a group must hold at least 1 example, got 0")
    params = list(trained_parameters(model).values())
    x, y = x.to(params[0].device), y.to(params[0].device)
    with in_mode(model, training=False), torch.enable_grad():
        loss = example_losses(loss_fn, model(x), y).mean()
        found = torch.autograd.grad(loss, params, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, params, strict=True)]
    return torch.cat([part.reshape(-1) for part in parts])


def gradient_opposition(
    model: nn.Module,
    loss_fn: LossFunction,
    batch_a: tuple[Tensor, Tensor],
    batch_b: tuple[Tensor, Tensor],
    direction: Float[Tensor, " numbers"] | None = None,
) -> float:
    """Whether two groups of examples pull the weights to opposite sides: below 0 if they do.

    Args:
        model: Maps a batch of inputs to outputs; in evaluation mode meanwhile, left as it was.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        batch_a: Inputs and targets of one group.
        batch_b: Of the other.
        direction: Of all trained parameters, such as :func:`sharpness` gives; its length does not matter.

    Returns:
        Cosine of the mean gradients, NaN where one is zero; with a direction v of length 1 the product
        (g_A . v)(g_B . v).

    Raises:
        ValueError: If a group is empty, or the direction has another length or is zero.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> loss = lambda output, target: target * output[:, 0]      # the gradient is target * input
        >>> a = torch.tensor([[1.0, 1.0]]), torch.tensor([1.0])
        >>> b = torch.tensor([[1.0, 2.0]]), torch.tensor([-1.0])
        >>> round(gradient_opposition(net, loss, a, b), 4)
        -0.9487
        >>> gradient_opposition(net, loss, a, b, direction=torch.tensor([2.0, 0.0]))
        -1.0
    """
    first, second = (mean_gradient(model, loss_fn, *batch) for batch in (batch_a, batch_b))
    if direction is None:
        below = float(first.norm() * second.norm())
        return float(first @ second) / below if below else math.nan
    length = float(direction.norm())
    if direction.shape != first.shape or not 0 < length < math.inf:
        raise ValueError(f"direction must be {len(first)} finite numbers, not all 0, got {tuple(direction.shape)}")
    unit = direction.to(first) / length
    return float(first @ unit) * float(second @ unit)


def clusters(
    model: nn.Module,
    loss_fn: LossFunction,
    x: Tensor,
    y: Tensor,
    *,
    by: By = "features",
    threshold: float = 0.5,
) -> Int[Tensor, " examples"]:
    """Which examples of a group belong together, so that what they share can be seen: average linkage of cosines.

    Args:
        model: In evaluation mode meanwhile, left as it was.
        loss_fn: Maps (outputs, targets) of a batch to one loss an example.
        x: Inputs.
        y: Targets.
        by: ``"features"``: what the last linear layer reads; ``"gradients"``: the gradient of each example's loss,
            which takes examples times parameters of memory.
        threshold: Clusters are joined while the mean cosine between their members is at least this, in (0, 1).

    Returns:
        Number of each example's cluster, the largest cluster first.

    Raises:
        ValueError: If ``by`` is unknown, ``threshold`` out of its range, or there is no example.

    Example:
        >>> x = torch.tensor([[1.0, 0.1], [0.1, 1.0], [1.0, 0.2]])
        >>> clusters(nn.Linear(2, 2), nn.CrossEntropyLoss(reduction="none"), x, torch.zeros(3).long())
        tensor([0, 1, 0])
    """
    one_of("by", by, get_args(By))
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
    if not len(x):
        raise ValueError("a group must hold at least 1 example, got 0")
    if by == "gradients":
        vectors = ExampleGradients(model, loss_fn, bn="eval").rows(x, y).matrix
    else:
        with in_mode(model, training=False), torch.no_grad(), caught(last_linear(model), inputs=True) as seen:
            model(x.to(next(model.parameters()).device))
        vectors = seen[-1].flatten(1)
    return agglomerate(vectors, threshold)


def agglomerate(vectors: Float[Tensor, "examples numbers"], threshold: float) -> Int[Tensor, " examples"]:
    """Clusters of rows by the average linkage of their cosines; a row of zeros stands alone.

    Example:
        >>> agglomerate(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.0, 0.0]]), 0.5)
        tensor([1, 0, 0, 2])
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    if len(vectors) == 1:
        return torch.zeros(1, dtype=torch.int64)
    rows = vectors.double().cpu()
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    distances = (1 - units @ units.T).clamp(0, 2)
    distances.fill_diagonal_(0)
    distances = (distances + distances.T) / 2
    tree = linkage(squareform(distances.numpy(), checks=False), "average")
    found = torch.from_numpy(fcluster(tree, 1 - threshold, "distance")).long() - 1
    sizes = found.bincount()
    first = torch.tensor([int((found == cluster).nonzero()[0]) for cluster in range(len(sizes))])
    order = sorted(range(len(sizes)), key=lambda cluster: (-int(sizes[cluster]), int(first[cluster])))
    rank = torch.empty(len(sizes), dtype=torch.int64)
    rank[torch.tensor(order)] = torch.arange(len(sizes))
    return rank[found]
