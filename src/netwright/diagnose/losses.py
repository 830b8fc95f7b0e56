"""What a loss must be wherever single examples are told apart: one number an example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

LossFunction = Callable[[Any, Any], Tensor]


def example_losses(loss_fn: LossFunction, output: Any, targets: Any) -> Float[Tensor, " batch"]:
    """The loss of each example of a batch; further axes are summed.

    Raises:
        ValueError: If the loss does not give one number an example.

    Example:
        >>> import torch
        >>> example_losses(torch.nn.MSELoss(reduction="none"), torch.ones(2, 3), torch.zeros(2, 3))
        tensor([3., 3.])
    """
    losses = loss_fn(output, targets)
    if not losses.ndim or len(losses) != len(targets):
        shape = tuple(losses.shape)
        raise ValueError(
            f"loss_fn must give one loss for each of {len(targets)} examples, as with reduction='none', "
            f"got shape {shape}"
        )
    return losses.flatten(1).sum(1) if losses.ndim > 1 else losses
