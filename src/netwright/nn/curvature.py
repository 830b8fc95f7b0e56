"""Curvature of a loss: products with its Hessian, and the largest eigenvalues of what only such products show.

Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 1994, doi:10.1162/neco.1994.6.1.147, and
Lanczos, "An iteration method for the solution of the eigenvalue problem", 1950, doi:10.6028/jres.045.026:

    H v = grad (v . grad L),    A V_m = V_m T_m + beta_m v_{m+1} e_m^T

with orthonormal V_m and tridiagonal T_m, whose largest eigenvalues theta approach those of A from below; with s the
eigenvector of T_m, the residual of theta is beta_m |s_m|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from netwright.seeding import stream


def hessian_products(loss: Tensor, parameters: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """v -> H v for the Hessian of a scalar in some parameters; zero for those on which its gradient does not depend.

    The gradient is made once and its graph kept, so that further products cost one backward pass through it.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> product = hessian_products((x**3).sum(), [x])
        >>> product([torch.tensor([1.0, 1.0])]), product([torch.tensor([0.0, 1.0])])
        ([tensor([ 6., 12.])], [tensor([ 0., 12.])])
    """
    kept = list(parameters)
    first = torch.autograd.grad(loss, kept, create_graph=True, allow_unused=True)
    known = [place for place, slope in enumerate(first) if slope is not None and slope.requires_grad]

    def product(vector: Sequence[Tensor]) -> list[Tensor]:
        if not known:
            return [torch.zeros_like(p) for p in kept]
        slopes, along = [first[place] for place in known], [vector[place] for place in known]
        products = torch.autograd.grad(slopes, kept, along, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h for h, p in zip(products, kept, strict=True)]

    return product


def hessian_vector_product(loss: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]) -> list[Tensor]:
    """H v for the Hessian of a scalar in some parameters; zero for those on which its gradient does not depend.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian_vector_product((x**3).sum(), [x], [torch.tensor([1.0, 1.0])])
        [tensor([ 6., 12.])]
    """
    return hessian_products(loss, parameters)(vector)


class Eigenpairs(NamedTuple):
    """Some of the eigenvalues of a symmetric matrix, with their eigenvectors.

    Attributes:
        values: Largest first.
        vectors: A row of length 1 for each.
        residuals: ||A v - value v|| of each.
        products: How many products with A were made.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k size"]
    residuals: Float[Tensor, " k"]
    products: int


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
    return largest_eigenpairs(product, size, k, max_steps=max_steps, tolerance=tolerance, seed=seed).values


def largest_eigenpairs(
    product: Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]],
    size: int,
    k: int = 1,
    *,
    max_steps: int = 30,
    tolerance: float = 1e-3,
    start: Float[Tensor, " size"] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Eigenpairs:
    """:func:`largest_eigenvalues` with the eigenvectors, begun where one knows better than a random direction.

    Args:
        product: v -> A v, vectors of ``dtype``.
        size: As for :func:`largest_eigenvalues`.
        k: Likewise.
        max_steps: Likewise.
        tolerance: Likewise.
        start: The first direction, such as an eigenvector of a matrix that differs a little.
        seed: Of the first direction where none is given.
        dtype: Of the directions, of which there are up to ``max_steps``; their small matrix is float64 anyway.

    Raises:
        ValueError: If a number is out of its range, or ``start`` has another size, is zero or not finite.
        FloatingPointError: If a product is not finite.

    Example:
        >>> diagonal = torch.arange(1.0, 6.0, dtype=torch.float64)
        >>> found = largest_eigenpairs(lambda v: diagonal * v, 5, start=torch.ones(5))
        >>> round(float(found.values), 4), found.vectors[0].abs().argmax(), found.products
        (5.0, tensor(4), 5)
    """
    if not 1 <= k <= size:
        raise ValueError(f"k must lie in [1, {size}], got {k}")
    if max_steps < k:
        raise ValueError(f"max_steps must be >= {k}, got {max_steps}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be > 0, got {tolerance}")
    draws = stream(seed, "lanczos")

    def drawn() -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=draws).to(dtype)

    direction = drawn() if start is None else start.detach().to(dtype)
    if direction.shape != (size,) or not 0 < float(direction.norm()) < float("inf"):
        raise ValueError(f"start must be {size} finite numbers, not all 0, got shape {tuple(direction.shape)}")
    steps = min(size, max_steps)
    basis = direction.new_empty(steps, size)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while len(diagonal) < steps:
        count = len(diagonal) + 1
        basis[count - 1] = direction / direction.norm()
        image = product(basis[count - 1])
        if not image.isfinite().all():
            raise FloatingPointError(f"product {count} must be finite, got {image.norm().item()}")
        diagonal.append(float(basis[count - 1] @ image))
        direction = _orthogonal(image, basis[:count])
        beta = float(direction.norm())
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for place, value in enumerate(off_diagonal):
            tridiagonal[place, place + 1] = tridiagonal[place + 1, place] = value
        found, vectors = torch.linalg.eigh(tridiagonal)
        values, residuals = found.flip(0)[:k], beta * vectors[-1].flip(0)[:k].abs()
        scale = float(found.abs().max())
        exhausted = beta <= 1e-12 * max(scale, 1e-300)
        if len(values) == k and bool((residuals <= tolerance * scale).all()) and (k == 1 or not exhausted):
            break
        if exhausted:
            # What the first direction reaches is known; an eigenvalue that occurs twice is found from another one.
            beta, direction = 0.0, _orthogonal(drawn().to(basis), basis[:count])
        off_diagonal.append(beta)
    rows = vectors.flip(1)[:, :k].T.to(basis) @ basis[:count]
    return Eigenpairs(values, rows, residuals, count)


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector
