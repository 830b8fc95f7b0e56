"""The prototype layer of Li et al., AAAI 2018, arXiv:1710.04806: squared distances to learned points."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter


def squared_distances(
    z: Float[Tensor, "batch dim"], points: Float[Tensor, "points dim"]
) -> Float[Tensor, "batch points"]:
    """Squared Euclidean distances between the rows of two matrices, >= 0, by one product of matrices.

    Both sides are first moved by the mean of ``points``, which changes no distance and keeps the expanded square
    ||z||^2 + ||p||^2 - 2 z.p from losing its digits far from the origin. The gradient is finite everywhere, and 0 where
    two points meet. Half precision, of autocast too, is computed in single: the expanded square would lose its digits.

    Args:
        z: One row an example.
        points: One row a point, at least one.

    Raises:
        ValueError: If the two are no matrices of equally long rows.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 0], [3, 4]]), torch.tensor([[0.0, 0], [6, 8], [3, 0]])).round()
        tensor([[  0., 100.,   9.],
                [ 25.,  25.,  16.]])
    """
    if z.ndim != 2 or points.ndim != 2 or z.shape[1] != points.shape[1]:
        raise ValueError(
            f"z and points must be matrices with rows of one length, got {tuple(z.shape)} and {tuple(points.shape)}"
        )
    given = torch.promote_types(z.dtype, points.dtype)
    wide = torch.promote_types(given, torch.float32)
    z, points = z.to(wide), points.to(wide)
    centre = points.detach().mean(0)
    z, points = z - centre, points - centre
    squares = z.square().sum(1, keepdim=True) + points.square().sum(1)
    with torch.autocast(z.device.type, enabled=False):
        return torch.addmm(squares, z, points.T, alpha=-2).relu().to(given)


class PrototypeLayer(nn.Module):
    """Squared distances to learned prototypes, which start uniform on [0, 1).

    Args:
        n_prototypes: How many, >= 1.
        dim: Length of a latent vector, >= 1.

    Raises:
        ValueError: If a number is below 1, and in a call if the latent vectors have another length.

    Example:
        >>> PrototypeLayer(15, 40)(torch.rand(8, 40)).shape
        torch.Size([8, 15])
    """

    prototypes: nn.Parameter

    def __init__(self, n_prototypes: int, dim: int):
        super().__init__()
        for name, value in (("n_prototypes", n_prototypes), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.n_prototypes = n_prototypes
        self.prototypes = nn.Parameter(torch.rand(n_prototypes, dim))

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.n_prototypes}, {self.prototypes.shape[1]}"

    def forward(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch prototypes"]:
        """Squared distances."""
        if z.ndim != 2 or z.shape[1] != self.prototypes.shape[1]:
            raise ValueError(f"z must have shape (batch, {self.prototypes.shape[1]}), got {tuple(z.shape)}")
        return squared_distances(z, self.prototypes)


class LazyPrototypeLayer(LazyModuleMixin, PrototypeLayer):
    """A :class:`PrototypeLayer` that learns the length of a latent vector from its first batch, or from weights.

    Args:
        n_prototypes: How many, >= 1.

    Raises:
        ValueError: If ``n_prototypes`` is below 1.

    Example:
        >>> layer = LazyPrototypeLayer(15)
        >>> _ = layer(torch.rand(8, 40))
        >>> layer
        PrototypeLayer(15, 40)
    """

    cls_to_become = PrototypeLayer

    def __init__(self, n_prototypes: int):
        super().__init__(n_prototypes, 1)
        self.prototypes = UninitializedParameter()  # type: ignore[assignment]

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.n_prototypes}"

    def initialize_parameters(self, z: Tensor) -> None:
        """Draws the prototypes for vectors as long as those of ``z``."""
        if isinstance(self.prototypes, UninitializedParameter):
            with torch.no_grad():
                lent = torch.is_autocast_enabled(z.device.type)  # half precision for this call alone
                dtype = torch.get_default_dtype() if lent else z.dtype
                self.prototypes.materialize((self.n_prototypes, z.shape[1]), device=z.device, dtype=dtype)
                self.prototypes.uniform_()
