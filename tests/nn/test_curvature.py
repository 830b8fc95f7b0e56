"""Hessian products against dense Hessians, Lanczos against a full eigendecomposition."""

import pytest
import torch
from torch import nn

from netwright.nn.curvature import hessian_vector_product, largest_eigenvalues


def symmetric(size, seed=0):
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (a + a.T) / 2


def test_products_equal_those_of_the_dense_hessian():
    torch.manual_seed(0)
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    unused = torch.ones(2, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    vector = [torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64), torch.ones(2)]

    def loss(w, b):
        return nn.functional.linear(x, w, b).tanh().logsumexp(1).sum()

    dense = torch.autograd.functional.hessian(loss, (w, b))
    found = hessian_vector_product(loss(w, b), [w, b, unused], vector)
    for row, product in zip(dense, found, strict=False):
        wanted = sum(torch.tensordot(block, v, dims=v.ndim) for block, v in zip(row, vector, strict=False))
        torch.testing.assert_close(product, wanted)
    assert found[2].tolist() == [0.0, 0.0]
    assert hessian_vector_product(w.sum(), [w], [vector[0]])[0].abs().max() == 0.0  # a linear function has none


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("shift", [0.0, -50.0])
def test_the_largest_eigenvalues_are_those_of_the_full_decomposition(k, shift):
    matrix = symmetric(40) + shift * torch.eye(40, dtype=torch.float64)  # with the shift all of them are negative
    products = []

    def product(v):
        products.append(v)
        return matrix @ v

    found = largest_eigenvalues(product, 40, k, max_steps=40, tolerance=1e-4)
    wanted = torch.linalg.eigvalsh(matrix).flip(0)[:k]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert len(products) < 40


def test_as_many_steps_as_rows_are_exact_and_fewer_never_exceed_the_truth():
    matrix = symmetric(8, seed=1)
    wanted = torch.linalg.eigvalsh(matrix).flip(0)
    torch.testing.assert_close(largest_eigenvalues(lambda v: matrix @ v, 8, 8, tolerance=1e-15), wanted)
    found = [float(largest_eigenvalues(lambda v: matrix @ v, 8, 1, max_steps=n, tolerance=1e-15)) for n in range(1, 9)]
    assert found == sorted(found)
    assert found[0] < found[-1] <= float(wanted[0]) + 1e-12


def test_repeated_eigenvalues_are_all_found():
    diagonal = torch.tensor([3.0, 3.0, 1.0, 1.0], dtype=torch.float64)
    assert largest_eigenvalues(lambda v: diagonal * v, 4, 3).tolist() == pytest.approx([3.0, 3.0, 1.0])
    assert largest_eigenvalues(lambda v: 0 * v, 4, 2).tolist() == [0.0, 0.0]
    assert largest_eigenvalues(lambda v: 2 * v, 4).tolist() == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, r"k must lie in \[1, 3\], got 0"),
        ({"k": 4}, "k must lie"),
        ({"k": 2, "max_steps": 1}, "max_steps must be >= 2, got 1"),
        ({"tolerance": 0.0}, "tolerance must be > 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        largest_eigenvalues(lambda v: v, 3, **options)


def test_products_must_be_finite():
    with pytest.raises(FloatingPointError, match="product 1 must be finite"):
        largest_eigenvalues(lambda v: v / 0, 3)
