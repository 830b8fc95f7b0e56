"""The loss of Li et al., AAAI 2018, arXiv:1710.04806: cross-entropy, reconstruction, and two ties to the data.

L = lambda_class E + lambda_ae R + lambda_1 R1 + lambda_2 R2

E  = mean over the batch of the cross-entropy
R  = mean over the batch of ||g(f(x)) - x||^2, summed over the pixels
R1 = mean over the prototypes of the squared distance to the nearest example of the batch
R2 = mean over the batch of the squared distance to the nearest prototype
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from netwright.explain.prototypes.layer import squared_distances
from netwright.explain.prototypes.model import PrototypeOutput


class PrototypeTerms(NamedTuple):
    """The loss of a batch and what it is made of; all are scalars, the terms without their lambda.

    Attributes:
        total: What is minimised.
        cross_entropy: E, in nats.
        reconstruction: R, summed over pixels; 0 without a decoder.
        r1: R1, by which every prototype lies near some example.
        r2: R2, by which every example lies near some prototype.
    """

    total: Tensor
    cross_entropy: Tensor
    reconstruction: Tensor
    r1: Tensor
    r2: Tensor


class PrototypeLoss(nn.Module):
    """Cross-entropy, reconstruction and the two interpretability terms, weighted.

    Args:
        lambda_class: Weight of the cross-entropy, >= 0. The defaults are those of the published MNIST run.
        lambda_ae: Weight of the reconstruction; give 0 where there is no decoder.
        lambda_1: Weight of R1.
        lambda_2: Weight of R2.
        bank_size: Latent vectors of earlier training batches that R1 looks at besides the batch, without gradient; for
            batches smaller than about five times the number of prototypes. 0, as in the paper, keeps none.

    Raises:
        ValueError: If a number is negative; in a call if the batch is empty, the reconstruction is missing or has
            another shape than the inputs, or a bank is kept and no prototypes are given.

    Example:
        >>> z, p = torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[0.0, 0], [6, 8], [3, 0]])
        >>> output = PrototypeOutput(torch.zeros(2, 2), squared_distances(z, p), z, None)
        >>> terms = PrototypeLoss(lambda_ae=0)(output, z, torch.tensor([0, 1]))
        >>> round(float(terms.r1), 4), round(float(terms.r2), 4)
        (11.3333, 8.0)
    """

    def __init__(
        self,
        lambda_class: float = 20.0,
        lambda_ae: float = 1.0,
        lambda_1: float = 1.0,
        lambda_2: float = 1.0,
        *,
        bank_size: int = 0,
    ):
        super().__init__()
        weights = {"lambda_class": lambda_class, "lambda_ae": lambda_ae, "lambda_1": lambda_1, "lambda_2": lambda_2}
        for name, value in {**weights, "bank_size": bank_size}.items():
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {value}")
        self.lambda_class, self.lambda_ae, self.lambda_1, self.lambda_2 = weights.values()
        self.bank_size = bank_size
        self.bank: Tensor | None = None

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        weights = (self.lambda_class, self.lambda_ae, self.lambda_1, self.lambda_2)
        return ", ".join(f"{weight:g}" for weight in weights) + f", bank_size={self.bank_size}"

    def get_extra_state(self) -> Tensor:
        """The bank, which goes into checkpoints whatever its length is by then."""
        return torch.empty(0) if self.bank is None else self.bank

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the bank of a checkpoint."""
        self.bank = state if len(state) else None

    def forward(
        self,
        output: PrototypeOutput,
        x: Float[Tensor, "batch ..."],
        labels: Int[Tensor, "batch"],
        prototypes: Float[Tensor, "prototypes dim"] | None = None,
    ) -> PrototypeTerms:
        """The loss of a batch.

        Args:
            output: What the classifier gave for ``x``.
            x: The inputs, which the reconstruction is compared with.
            labels: Class of each example.
            prototypes: The layer's, needed with a bank only.
        """
        if not len(x):
            raise ValueError("x must hold at least 1 example, got 0")
        if output.reconstruction is None:
            if self.lambda_ae:
                raise ValueError(f"lambda_ae must be 0 without a decoder, got {self.lambda_ae:g}")
            reconstruction = output.logits.new_zeros(())
        else:
            if output.reconstruction.shape != x.shape:
                raise ValueError(
                    f"reconstruction must have the input's shape {tuple(x.shape)}, "
                    f"got {tuple(output.reconstruction.shape)}"
                )
            reconstruction = (output.reconstruction - x).square().sum() / len(x)
        cross_entropy = functional.cross_entropy(output.logits, labels)
        nearest = output.distances.amin(0)
        if self.bank_size:
            nearest = self._with_bank(nearest, output.z, prototypes)
        r1, r2 = nearest.mean(), output.distances.amin(1).mean()
        total = (
            self.lambda_class * cross_entropy
            + self.lambda_ae * reconstruction
            + self.lambda_1 * r1
            + self.lambda_2 * r2
        )
        return PrototypeTerms(total, cross_entropy, reconstruction, r1, r2)

    def _with_bank(self, nearest: Tensor, z: Tensor, prototypes: Tensor | None) -> Tensor:
        """The least distance of each prototype over batch and bank; the batch then joins a training bank."""
        if prototypes is None:
            raise ValueError(f"prototypes must be given with bank_size > 0, got bank_size {self.bank_size}")
        bank = None if self.bank is None else self.bank.to(z)
        if bank is not None:
            nearest = torch.minimum(nearest, squared_distances(bank, prototypes).amin(0))
        if self.training:
            seen = z.detach() if bank is None else torch.cat([bank, z.detach()])
            self.bank = seen[-self.bank_size :].clone()
        return nearest
