"""The trainable class of state matrices around HiPPO: diagonal plus inverse of a tridiagonal, between two diagonals.

    A = -P (T^-1 + Cd) Q

P, Q and Cd are diagonal and T is tridiagonal. (I - delta A) x and (I - delta A)^-1 u cost O(N): with
E = I + delta P Cd Q,

    (I - delta A) x = x + delta P (T^-1 Q x + Cd Q x),    (I - delta A)^-1 u = Q^-1 T w,  (E Q^-1 T + delta P) w = u
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.nn.lssl.discretization import discretize_gbt
from netwright.nn.lssl.measures import Measure, quasiseparable_parameters

Method = Literal["auto", "dense", "tridiagonal"]
DENSE_UP_TO = 128  # below, one dense solve beats the loop over N


def _thomas(lower: Tensor, main: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
    """Elimination without pivoting: two passes over N, everything else at once."""
    N = rhs.shape[-1]
    factors, values = [upper[..., 0] / main[..., 0]], [rhs[..., 0] / main[..., 0]]
    for n in range(1, N):
        pivot = main[..., n] - lower[..., n] * factors[-1]
        factors.append(upper[..., n] / pivot)
        values.append((rhs[..., n] - lower[..., n] * values[-1]) / pivot)
    for n in range(N - 2, -1, -1):
        values[n] = values[n] - factors[n] * values[n + 1]
    return torch.stack(values, -1)


def _shift(x: Tensor, by: int) -> Tensor:
    """Entry n takes the place of entry n + by; zeros come in."""
    zero = torch.zeros_like(x[..., :1])
    return torch.cat([zero, x[..., :-1]], -1) if by > 0 else torch.cat([x[..., 1:], zero], -1)


class _Tridiagonal(torch.autograd.Function):
    """Its gradient is a solve with the transposed matrix, so that autograd keeps no step of the loop."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lower: Tensor, main: Tensor, upper: Tensor, rhs: Tensor) -> Tensor:
        return _thomas(lower, main, upper, rhs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:3], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        lower, main, upper, x = ctx.saved_tensors
        g = _Tridiagonal.apply(_shift(upper, 1), main, _shift(lower, -1), gradient)
        return -g * _shift(x, 1), -g * x, -g * _shift(x, -1), g


def tridiagonal_solve(T: Float[Tensor, "*batch 3 N"], rhs: Float[Tensor, "*batch N"]) -> Float[Tensor, "*batch N"]:
    """x for which T x is ``rhs``, by elimination without pivoting in O(N).

    Args:
        T: The diagonals below, on and above the main one, as in :func:`quasiseparable_parameters`.
        rhs: The right-hand side; batches broadcast.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> T = torch.tensor([[0.0, 1.0], [2.0, 2.0], [1.0, 0.0]])  # [[2, 1], [1, 2]]
        >>> [round(x, 6) for x in tridiagonal_solve(T, torch.tensor([4.0, 5.0])).tolist()]
        [1.0, 2.0]
    """
    if T.ndim < 2 or T.shape[-2] != 3 or rhs.ndim < 1 or T.shape[-1] != rhs.shape[-1]:
        raise ValueError(
            f"T and rhs must have shapes (..., 3, N) and (..., N), got {tuple(T.shape)} and {tuple(rhs.shape)}"
        )
    N = T.shape[-1]
    inside = torch.ones(3, N, dtype=T.dtype, device=T.device)
    inside[0, 0] = inside[2, -1] = 0
    shape = torch.broadcast_shapes((*T.shape[:-2], N), rhs.shape)
    lower, main, upper = (row.expand(shape) for row in (T * inside).unbind(-2))
    return _Tridiagonal.apply(lower, main, upper, rhs.expand(shape))


def tridiagonal_matrix(T: Float[Tensor, "*batch 3 N"]) -> Float[Tensor, "*batch N N"]:
    """The matrix whose three diagonals are the lines of T."""
    lower, main, upper = T[..., 0, 1:], T[..., 1, :], T[..., 2, :-1]
    return torch.diag_embed(main) + torch.diag_embed(lower, -1) + torch.diag_embed(upper, 1)


class QuasiSeparable(nn.Module):
    """A = -P (T^-1 + Cd) Q, as parameters; the HiPPO matrices are members (:meth:`hippo`).

    Args:
        P: Diagonal (..., N); leading axes hold several matrices.
        Q: Likewise, without zeros.
        Cd: Likewise.
        T: Diagonals (..., 3, N) below, on and above the main one.
        trainable: Whether they are parameters, or buffers.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> A = QuasiSeparable.hippo("legs", 2, dtype=torch.float64)
        >>> A.dense().diagonal().tolist(), round(A.dense()[1, 0].item(), 4)
        ([-1.0, -2.0], -1.7321)
        >>> x = torch.tensor([1.0, -2.0], dtype=torch.float64)
        >>> bool(torch.allclose(A.solve(A.matvec(x, 0.1), 0.1), x))
        True
    """

    P: Tensor
    Q: Tensor
    Cd: Tensor
    T: Tensor

    def __init__(
        self,
        P: Float[Tensor, "*batch N"],
        Q: Float[Tensor, "*batch N"],
        Cd: Float[Tensor, "*batch N"],
        T: Float[Tensor, "*batch 3 N"],
        *,
        trainable: bool = True,
    ):
        super().__init__()
        shape = tuple(P.shape)
        if P.ndim < 1 or tuple(Q.shape) != shape or tuple(Cd.shape) != shape:
            told = ", ".join(str(tuple(value.shape)) for value in (P, Q, Cd))
            raise ValueError(f"P, Q and Cd must have one shape (..., N), got {told}")
        if tuple(T.shape) != (*shape[:-1], 3, shape[-1]):
            raise ValueError(f"T must have shape {(*shape[:-1], 3, shape[-1])}, got {tuple(T.shape)}")
        for name, value in {"P": P, "Q": Q, "Cd": Cd, "T": T}.items():
            own = value.detach().clone()
            if trainable:
                self.register_parameter(name, nn.Parameter(own))
            else:
                self.register_buffer(name, own)

    @classmethod
    def hippo(
        cls,
        measure: Measure,
        N: int,
        *,
        copies: int | None = None,
        noise: float = 0.0,
        trainable: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> QuasiSeparable:
        """A HiPPO matrix.

        Args:
            measure: ``"legs"``, ``"legt"`` or ``"lagt"``.
            N: Size, at least 1.
            copies: Matrices that are trained apart; None for one without a leading axis.
            noise: Standard deviation of what is added to T's main diagonal, drawn from the global generator.
            trainable: Whether the values are parameters, or buffers.
            dtype: Of the parameters.

        Raises:
            ValueError: If the measure is unknown or a number is below its bound.
        """
        if copies is not None and copies < 1:
            raise ValueError(f"copies must be >= 1, got {copies}")
        if not noise >= 0:
            raise ValueError(f"noise must be >= 0, got {noise}")
        P, Cd, T = quasiseparable_parameters(measure, N, dtype)
        if copies is not None:
            P, Cd, T = P.expand(copies, N), Cd.expand(copies, N), T.expand(copies, 3, N).clone()
        if noise:
            T[..., 1, :] += noise * torch.randn(T[..., 1, :].shape, dtype=dtype)
        return cls(P, P, Cd, T, trainable=trainable)

    def extra_repr(self) -> str:
        """Sizes, for a person."""
        return f"shape={(*self.P.shape, self.P.shape[-1])}"

    def dense(self, dtype: torch.dtype | None = None) -> Float[Tensor, "*batch N N"]:
        """The matrix itself, computed in ``dtype``; in that of the parameters by default."""
        P, Q, Cd, T = (value if dtype is None else value.to(dtype) for value in (self.P, self.Q, self.Cd, self.T))
        inverse = torch.linalg.inv(tridiagonal_matrix(T))
        return -P[..., :, None] * (inverse + torch.diag_embed(Cd)) * Q[..., None, :]

    def matvec(self, x: Float[Tensor, "*batch N"], delta: Float[Tensor, "*batch"] | float) -> Float[Tensor, "*batch N"]:
        """(I - delta A) x in O(N); batches broadcast.

        Args:
            x: Vectors in the last axis.
            delta: Steps of either sign: the forward factor I + (1 - alpha) dt A has a negative one.
        """
        step = torch.as_tensor(delta, dtype=x.dtype, device=x.device)[..., None]
        Qx = self.Q * x
        return x + step * self.P * (tridiagonal_solve(self.T, Qx) + self.Cd * Qx)

    def solve(
        self,
        u: Float[Tensor, "*batch N"],
        delta: Float[Tensor, "*batch"] | float,
        method: Method = "auto",
    ) -> Float[Tensor, "*batch N"]:
        """(I - delta A)^-1 u; batches broadcast.

        Args:
            u: Vectors in the last axis.
            delta: Steps, >= 0 where A is stable.
            method: ``"tridiagonal"`` in O(N), ``"dense"`` by a general solve, ``"auto"`` by the size.

        Raises:
            ValueError: If the method is unknown.
        """
        if method not in {"auto", "dense", "tridiagonal"}:
            raise ValueError(f"method must be 'auto', 'dense' or 'tridiagonal', got {method!r}")
        N = u.shape[-1]
        step = torch.as_tensor(delta, dtype=u.dtype, device=u.device)
        if method == "dense" or (method == "auto" and N <= DENSE_UP_TO):
            matrix = torch.eye(N, dtype=u.dtype, device=u.device) - step[..., None, None] * self.dense()
            return torch.linalg.solve(matrix, u[..., None])[..., 0]
        return _solve(self.P, self.Q, self.Cd, self.T, u, step[..., None])

    def discretize(
        self,
        B: Float[Tensor, "*features N"],
        dt: Float[Tensor, "features"],
        alpha: float = 0.5,
        method: Method = "auto",
    ) -> tuple[Float[Tensor, "features N N"], Float[Tensor, "features N"]]:
        """A_bar and B_bar of every feature, as :func:`discretize_gbt`, in the type of ``dt``.

        ``"tridiagonal"`` solves for the unit vectors, which costs O(N^2) a feature instead of O(N^3).

        Args:
            B: One for all features, or one for each.
            dt: One step a feature, > 0.
            alpha: In [0, 1]; with 0 nothing is solved.
            method: As for :meth:`solve`.

        Raises:
            ValueError: If ``alpha`` is outside [0, 1].
        """
        N = self.P.shape[-1]
        B = B.to(dt.dtype)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
        if alpha == 0 or method == "dense" or (method == "auto" and N <= DENSE_UP_TO):
            return discretize_gbt(self.dense(dt.dtype), B, dt, alpha)
        P, Q, Cd = (value.to(dt.dtype)[..., None, :] for value in (self.P, self.Q, self.Cd))
        eye = torch.eye(N, dtype=dt.dtype, device=dt.device)
        inverse = _solve(P, Q, Cd, self.T.to(dt.dtype)[..., None, :, :], eye, alpha * dt[:, None, None]).mT
        # I + (1 - alpha) dt A = I / alpha - (1 - alpha) / alpha (I - alpha dt A)
        A_bar = inverse / alpha - (1 - alpha) / alpha * eye
        return A_bar, (inverse @ (dt[:, None] * B)[..., None])[..., 0]


def _solve(P: Tensor, Q: Tensor, Cd: Tensor, T: Tensor, u: Tensor, step: Tensor) -> Tensor:
    """(I - step A)^-1 u, where ``step`` has an axis for N."""
    scale = ((1 + step * P * Cd * Q) / Q)[..., None, :]
    diagonal = step * P
    shift = torch.stack([torch.zeros_like(diagonal), diagonal, torch.zeros_like(diagonal)], -2)
    return _tridiagonal_product(T, tridiagonal_solve(scale * T + shift, u)) / Q


def _tridiagonal_product(T: Tensor, x: Tensor) -> Tensor:
    lower, main, upper = T.unbind(-2)
    return main * x + lower * _shift(x, 1) + upper * _shift(x, -1)
