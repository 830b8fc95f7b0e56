"""Curvature of a loss: products with its Hessian, and the largest eigenvalues of what only such products show.

Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994, doi:10.1162/neco.1994.6.1.147, and
Lanczos, "An iteration method for the solution of the eigenvalue problem", 1950, doi:10.6028/jres.045.026:

    H v = grad (v . grad L),    A V_m = V_m T_m + beta_m v_{m+1} e_m^T

with orthonormal V_m and tridiagonal T_m, whose largest eigenvalues theta approach those of A from below; with s the
eigenvector of T_m, the residual of theta is beta_m |s_m|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from netwright.seeding import stream


def hessian_vector_product(loss: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """H v for the Hessian of a scalar in some parameters; zero for those on which its gradient does not depend.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_vector_product((x**3).sum(), [x], [torch.tensor([1.0, 1.0])])
        [tensor([ 6., 12.])]
    """
    kept = list(parameters)
    first = torch.autograd.grad(loss, kept, create_graph=True, allow_unused=True)
    slopes = [(g * v).sum() for g, v in zip(first, vector, strict=True) if g is not None and g.requires_grad]
    if not slopes:
        return [torch.zeros_like(p) for p in kept]
    products = torch.autograd.grad(torch.stack(slopes).sum(), kept, allow_unused=True)
    return [torch.zeros_like(p) if h is None else h for h, p in zip(products, kept, strict=True)]


def largest_eigenvalues(
    product: Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]],
    size: int,
    k: int = 1,
    *,
    max_steps: int = 30,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> Float[Tensor, " k"]:
    """The algebraically largest eigenvalues of a symmetric matrix, largest first, by Lanczos's iteration.

    Every new direction is made orthogonal to all before it, twice. Values, in float64, are exact after ``size`` steps.

    Args:
        product: v -> A v, float64 vectors.
        size: Rows of A.
        k: How many eigenvalues, from 1 to ``size``.
        max_steps: Most products, at least ``k``.
        tolerance: Residual over the largest absolute eigenvalue seen, below which a value counts as found; its error
            is about the square of the residual over the gap to the next.
        seed: Of the first direction.

    Raises:
        ValueError: If a number is out of its range.
        FloatingPointError: If a product is not finite.

    Example:
        >>> diagonal = torch.arange(1.0, 6.0, dtype=torch.float64)
        >>> largest_eigenvalues(lambda v: diagonal * v, 5, k=2).round(decimals=4)
        tensor([5., 4.], dtype=torch.float64)
    """
    if not 1 <= k <= size:
        raise ValueError(f"k must lie in [1, {size}], got {k}")
    if max_steps < k:
        raise ValueError(f"max_steps must be >= {k}, got {max_steps}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    draws = stream(seed, "lanczos")
    basis = torch.zeros(0, size, dtype=torch.float64)
    direction = torch.randn(size, dtype=torch.float64, generator=draws)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    values = torch.zeros(0, dtype=torch.float64)
    while len(diagonal) < min(size, max_steps):
        basis = torch.cat([basis, (direction / direction.norm()).unsqueeze(0)])
        image = product(basis[-1])
        if not image.isfinite().all():
            raise FloatingPointError(f"product {len(diagonal) + 1} must be finite, got {image.norm().item()}")
        diagonal.append(float(basis[-1] @ image))
        direction = _orthogonal(image, basis)
        beta = float(direction.norm())
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for place, value in enumerate(off_diagonal):
            tridiagonal[place, place + 1] = tridiagonal[place + 1, place] = value
        found, vectors = torch.linalg.eigh(tridiagonal)
        values, last = found.flip(0)[:k], vectors[-1].flip(0)[:k].abs()
        scale = float(found.abs().max())
        exhausted = beta <= 1e-12 * max(scale, 1e-300)
        if len(values) == k and bool((beta * last <= tolerance * scale).all()) and (k == 1 or not exhausted):
            break
        if exhausted:
            # What the first direction reaches is known; an eigenvalue that occurs twice is found from another one.
            beta, direction = 0.0, _orthogonal(torch.randn(size, dtype=torch.float64, generator=draws), basis)
        off_diagonal.append(beta)
    return values


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
