"""HiPPO matrices: state-space systems whose state is the past of their input as coefficients of orthogonal polynomials.

Gu, Dao, Ermon, Rudra and Ré, "HiPPO: Recurrent Memory with Optimal Polynomial Projections", NeurIPS 2020,
arXiv:2008.07669. All systems are x' = A x + B u, with the eigenvalues of A in the left half plane.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from netwright.checks import one_of, whole

Measure = Literal["legs", "legt", "lagt"]


def check_measure(measure: str, N: int) -> None:
    """Refuses what is no measure, and a state without numbers.

    Raises:
        ValueError: If the measure is unknown or ``N`` is below 1.
    """
    one_of("measure", measure, get_args(Measure))
    whole("N", N, ">= 1")


def hippo(
    measure: Measure, N: int, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "N N"], Float[Tensor, "N"]]:
    """A and B of the system x' = A x + B u that remembers its input by a measure.

    Args:
        measure: ``"legs"`` remembers the whole past, scaled to what has gone by; ``"legt"`` the last unit of time;
            ``"lagt"`` the past with weights that fade exponentially. For a window of another length, scale the step.
        N: Size of the state, at least 1.
        dtype: Of both; they are computed in float64.

    Raises:
        ValueError: If the measure is unknown or ``N`` is below 1.

    Example:
        >>> A, B = hippo("lagt", 2)
        >>> A.tolist(), B.tolist()
        ([[-0.5, 0.0], [-1.0, -0.5]], [1.0, 1.0])
    """
    check_measure(measure, N)
    n = torch.arange(N, dtype=torch.float64)
    row, column = n[:, None], n[None, :]
    below = (row > column).double()
    if measure == "lagt":
        return (0 - below - torch.eye(N, dtype=torch.float64) / 2).to(dtype), torch.ones(N, dtype=dtype)
    root = (2 * n + 1).sqrt()
    outer = root[:, None] * root[None, :]
    if measure == "legs":
        return (0 - outer * below - torch.diag(n + 1)).to(dtype), root.to(dtype)
    sign = torch.where(column <= row, 1.0, (-1.0) ** (column - row))
    return (-outer * sign).to(dtype), root.to(dtype)


def quasiseparable_parameters(
    measure: Measure, N: int, dtype: torch.dtype = torch.float64
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "3 N"]]:
    """P (which is Q, and B), Cd and T for which -P (T^-1 + Cd) Q is the matrix of :func:`hippo`.

    Args:
        measure: As for :func:`hippo`.
        N: Likewise.
        dtype: Of all.

    Returns:
        P and Cd (N,), and the diagonals of T: row n holds T[n, n-1], T[n, n] and T[n, n+1] in its three lines. The
        first of the first and the last of the last are outside the matrix, and 0.

    Raises:
        ValueError: If the measure is unknown or ``N`` is below 1.

    Example:
        >>> P, Cd, T = quasiseparable_parameters("lagt", 2)
        >>> T.tolist()
        [[0.0, -1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    check_measure(measure, N)
    n = torch.arange(N, dtype=torch.float64)
    T = torch.zeros(3, N, dtype=torch.float64)
    if measure == "legt":
        P, Cd = (2 * n + 1).sqrt(), torch.zeros_like(n)
        T[0, 1:], T[2, :-1] = -0.5, 0.5
        T[1, 0] += 0.5
        T[1, -1] += 0.5
    else:
        P = torch.ones_like(n) if measure == "lagt" else (2 * n + 1).sqrt()
        Cd = torch.full_like(n, -0.5) if measure == "lagt" else -n / (2 * n + 1)
        T[0, 1:], T[1] = -1.0, 1.0
    return P.to(dtype), Cd.to(dtype), T.to(dtype)
