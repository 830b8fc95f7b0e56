"""From continuous to discrete time by the generalised bilinear transform.

A_bar = (I - alpha dt A)^-1 (I + (1 - alpha) dt A),    B_bar = (I - alpha dt A)^-1 dt B
x_k = A_bar x_{k-1} + B_bar u_k
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def discretize_gbt(
    A: Float[Tensor, "*batch N N"],
    B: Float[Tensor, "*batch N"],
    dt: Float[Tensor, "*steps"] | float,
    alpha: float = 0.5,
) -> tuple[Float[Tensor, "*steps N N"], Float[Tensor, "*steps N"]]:
    """A_bar and B_bar of the system x' = A x + B u for steps of length ``dt``.

    The state after step k has absorbed input k. Forward Euler (``alpha`` 0) is unstable where ``dt`` times an
    eigenvalue is below -2; from 1/2 on every step is stable for a stable system.

    Args:
        A: One matrix, or one a step; batches broadcast against ``dt``.
        B: Likewise.
        dt: Lengths of steps, > 0, in units of t.
        alpha: 0 is forward Euler, 1 backward Euler, 1/2 the trapezoidal rule (Tustin); in [0, 1].

    Raises:
        ValueError: If ``alpha`` is outside [0, 1], ``dt`` is a number that is not positive, or the shapes do not fit.

    Example:
        >>> A, B = torch.tensor([[-1.0]]), torch.tensor([1.0])
        >>> A_bar, B_bar = discretize_gbt(A, B, torch.tensor([0.5, 2.0]))
        >>> A_bar.flatten().tolist()
        [0.6000000238418579, 0.0]
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not isinstance(dt, Tensor) and not 0 < dt < math.inf:
        raise ValueError(f"dt must be > 0 and finite, got {dt}")
    N = A.shape[-1]
    if A.ndim < 2 or A.shape[-2] != N or B.ndim < 1 or B.shape[-1] != N:
        raise ValueError(
            f"A and B must have shapes (..., N, N) and (..., N), got {tuple(A.shape)} and {tuple(B.shape)}"
        )
    step = torch.as_tensor(dt, dtype=A.dtype, device=A.device)
    scaled, eye = step[..., None, None] * A, torch.eye(N, dtype=A.dtype, device=A.device)
    forward = eye + (1 - alpha) * scaled
    into = (step[..., None] * B).expand(*forward.shape[:-2], N)
    if alpha == 0:
        return forward, into
    # The gradient of an inverse is two products, that of a solve is another solve, which costs several of them.
    inverse = torch.linalg.inv(eye - alpha * scaled)
    return inverse @ forward, (inverse @ into[..., None])[..., 0]
