"""Several networks that answer as one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LogitMean(nn.Module):
    """The mean of the logits of several networks, whose probabilities are their normalised geometric mean.

    Args:
        networks: At least one; each maps the same inputs to (batch, classes).

    Raises:
        ValueError: If there is none.

    Example:
        >>> pair = LogitMean([nn.Identity(), nn.Flatten()])
        >>> pair(torch.tensor([[1.0, 3.0]]))
        tensor([[1., 3.]])
    """

    def __init__(self, networks: Iterable[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)
        if not len(self.networks):
            raise ValueError("networks must hold at least 1 network, got 0")

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return torch.stack([network(x) for network in self.networks]).mean(0)
