"""A state matrix without structure."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from netwright.nn.lssl.discretization import discretize_gbt


class DenseMatrix(nn.Module):
    """A state matrix without structure.

    Args:
        A: The matrix (N, N), or (features, N, N).
        trainable: Whether it is a parameter, or a buffer.
    """

    A: Tensor

    def __init__(self, A: Float[Tensor, "*features N N"], *, trainable: bool = True):
        super().__init__()
        own = A.detach().clone()
        if trainable:
            self.A = nn.Parameter(own)
        else:
            self.register_buffer("A", own)

    def discretize(
        self, B: Float[Tensor, "*features N"], dt: Float[Tensor, "features"], alpha: float = 0.5
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`QuasiSeparable.discretize`."""
        return discretize_gbt(self.A.to(dt.dtype), B.to(dt.dtype), dt, alpha)
