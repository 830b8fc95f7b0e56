"""Coherence as a metric that takes in one batch after another (arXiv:2203.10036)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from netwright.diagnose.coherence import CoherenceResult, coherence


class RunningCoherence(Metric):
    """Coherence of all gradients seen, from their sum, the sum of their squared norms and their number.

    The three are summed over processes.

    Args:
        numbers: Length of a gradient.

    Raises:
        ValueError: If ``numbers`` is below 1; in ``update`` if a shape is another; in ``compute`` if fewer than 2
            gradients were seen, or one is not finite.

    Example:
        >>> metric = RunningCoherence(3)
        >>> metric.update(torch.eye(3))
        >>> metric.update(torch.tensor([1.0, 1.0, 1.0]), torch.ones(3))    # a sum of gradients, and their squared norms
        >>> round(float(metric.compute()["m_coherence"]), 6)    # 6 ||(2, 2, 2) / 6||^2 / 1
        2.0
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    squared: Tensor
    examples: Tensor

    def __init__(self, numbers: int):
        super().__init__()
        if numbers < 1:
            raise ValueError(f"numbers must be >= 1, got {numbers}")
        self.add_state("total", torch.zeros(numbers, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("squared", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("examples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, gradients: Tensor, squared_norms: Float[Tensor, " batch"] | None = None) -> None:
        """Takes in a batch.

        Args:
            gradients: (batch, numbers); with ``squared_norms`` their sum (numbers,).
            squared_norms: Squared norm of each gradient.
        """
        numbers = len(self.total)
        if squared_norms is None:
            if gradients.ndim != 2 or gradients.shape[1] != numbers:
                raise ValueError(f"gradients must be (batch, {numbers}), got {tuple(gradients.shape)}")
            rows = gradients.detach().double()
            gradients, squared_norms = rows.sum(0), rows.square().sum(1)
        elif gradients.shape != (numbers,) or squared_norms.ndim != 1:
            shapes = f"{tuple(gradients.shape)} and {tuple(squared_norms.shape)}"
            raise ValueError(f"gradients must be a sum ({numbers},) and squared_norms (batch,), got {shapes}")
        self.total += gradients.detach().double()
        self.squared += squared_norms.detach().double().sum()
        self.examples += len(squared_norms)

    def compute(self) -> dict[str, Tensor]:
        """``alpha``, ``m_coherence`` and ``pairwise`` of all gradients seen, as :class:`CoherenceResult` has them."""
        found = self.result()
        return {
            name: torch.tensor(getattr(found, name), dtype=torch.float64)
            for name in ("alpha", "m_coherence", "pairwise")
        }

    def result(self) -> CoherenceResult:
        """The coherence of the gradients that this process has seen."""
        m = int(self.examples)
        mean = self.total / m if m else self.total
        return coherence(float(mean.square().sum()), float(self.squared) / m if m else math.nan, m)
