"""HiPPO matrices, their discretisation, and the quasi-separable class, against figures by hand, scipy and float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.signal
import torch

from netwright.nn.lssl import QuasiSeparable, discretize_gbt, hippo, tridiagonal_solve
from netwright.nn.lssl.quasiseparable import tridiagonal_matrix

DOUBLE = torch.float64
MEASURES = ("legs", "legt", "lagt")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def test_legs_by_hand():
    A, B = hippo("legs", 3)
    root = [math.sqrt(value) for value in (3, 5, 15)]
    assert torch.allclose(A, torch.tensor([[-1, 0, 0], [-root[0], -2, 0], [-root[1], -root[2], -3]], dtype=DOUBLE))
    assert torch.allclose(B, torch.tensor([1, root[0], root[1]], dtype=DOUBLE))
    A, _ = hippo("legt", 2, torch.float32)
    assert A.dtype == torch.float32
    assert torch.allclose(A, torch.tensor([[-1, root[0]], [-root[0], -3]]))


@pytest.mark.parametrize("N", [1, 2, 5, 16])
@pytest.mark.parametrize("measure", MEASURES)
def test_systems_are_stable_and_legs_has_whole_eigenvalues(measure, N):
    A, _ = hippo(measure, N)
    assert float(torch.linalg.eigvals(A).real.max()) < 0
    if measure == "legs":
        assert torch.equal(A.diagonal(), -torch.arange(1.0, N + 1, dtype=DOUBLE))
        assert torch.equal(A.triu(1), torch.zeros_like(A))


def test_the_state_of_legt_is_the_window_in_legendre_polynomials():
    """Where the paper's matrix comes from: the state of a slow input holds its projections on the last unit of time."""
    N, steps = 6, 4000
    A, B = hippo("legt", N)
    A_bar, B_bar = discretize_gbt(A, B, torch.tensor(1 / steps, dtype=DOUBLE))
    time = torch.arange(2 * steps, dtype=DOUBLE) / steps
    u = (2 * time).sin() + 0.5 * time
    x = torch.zeros(N, dtype=DOUBLE)
    for value in u:
        x = A_bar @ x + B_bar * value
    window, s = u[-steps:].numpy(), np.linspace(-1, 1, steps)
    legendre = [np.polynomial.Legendre.basis(n)(s) * math.sqrt(2 * n + 1) for n in range(N)]
    expected = [(window * p).mean() for p in legendre]
    # The window's frame does not move with the highest polynomial that is kept, hence the tolerance.
    assert x[:4].abs().tolist() == pytest.approx(np.abs(expected[:4]).tolist(), abs=5e-3)


BY_HAND = {
    ("legs", 0.5): ([[0.9047619, 0], [-0.14996111, 0.81818182]], [0.0952381, 0.14996111]),
    ("legt", 0.5): ([[0.89300412, 0.14255562], [-0.14255562, 0.72839506]], [0.10699588, 0.14255562]),
    ("legs", 1.0): ([[0.90909091, 0], [-0.13121597, 0.83333333]], [0.09090909, 0.13121597]),
    ("legs", 0.0): ([[0.9, 0], [-0.17320508, 0.8]], [0.1, 0.17320508]),
}


@pytest.mark.parametrize(("measure", "alpha"), BY_HAND)
def test_discretisation_by_hand(measure, alpha):
    found = discretize_gbt(*hippo(measure, 2), 0.1, alpha)
    for ours, expected in zip(found, BY_HAND[measure, alpha], strict=True):
        assert torch.allclose(ours, torch.tensor(expected, dtype=DOUBLE), rtol=0, atol=5e-9)


@pytest.mark.parametrize("alpha", [0, 0.25, 0.5, 0.8, 1])
@pytest.mark.parametrize("measure", MEASURES)
def test_discretisation_is_that_of_scipy(measure, alpha):
    A, B = hippo(measure, 7)
    dt = torch.tensor([0.01, 0.2], dtype=DOUBLE)
    A_bar, B_bar = discretize_gbt(A, B, dt, alpha)
    for i, step in enumerate(dt.tolist()):
        system = (A.numpy(), B.numpy()[:, None], np.zeros((1, 7)), np.zeros((1, 1)))
        expected = scipy.signal.cont2discrete(system, step, "gbt", alpha)
        assert np.allclose(A_bar[i], expected[0], rtol=0, atol=1e-12)
        assert np.allclose(B_bar[i], expected[1][:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("N", [4, 16, 64])
@pytest.mark.parametrize("measure", ["legs", "legt"])
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_a_constant_input_is_remembered_as_itself(measure, N, alpha):
    """The bilinear transform keeps the gain at frequency zero: (I - A_bar)^-1 B_bar = -A^-1 B = e_0."""
    for dt in (1e-3, 0.1, 2.0):
        A_bar, B_bar = discretize_gbt(*hippo(measure, N), dt, alpha)
        gain = torch.linalg.solve(torch.eye(N, dtype=DOUBLE) - A_bar, B_bar)
        assert torch.allclose(gain, torch.eye(N, dtype=DOUBLE)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("N", [4, 16, 64])
def test_spectral_radius_of_legs(N):
    A_bar, _ = discretize_gbt(*hippo("legs", N), 0.05)
    # Lower triangular: the diagonal is the spectrum, which a general solver would lose to rounding.
    assert float(A_bar.triu(1).abs().max()) < 1e-14
    assert float(A_bar.diagonal().abs().max()) == pytest.approx(0.951219512, abs=1e-9)
    assert A_bar.diagonal().tolist() == pytest.approx([(1 - 0.025 * n) / (1 + 0.025 * n) for n in range(1, N + 1)])


def test_gated_recurrence_is_a_special_case():
    """N = 1, A = -1, B = 1, backward Euler, step exp(z): x_k = (1 - sigmoid(z)) x_{k-1} + sigmoid(z) u_k."""
    z = torch.tensor([-2.0, 0.0, 1.5], dtype=DOUBLE)
    one = torch.ones(1, dtype=DOUBLE)
    A_bar, B_bar = discretize_gbt(-one[:, None], one, z.exp(), 1.0)
    assert torch.allclose(A_bar.flatten(), 1 - z.sigmoid(), rtol=0, atol=1e-15)
    assert torch.allclose(B_bar.flatten(), z.sigmoid(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("alpha", "order"), [(0.5, 2), (1.0, 1)])
def test_order_of_the_discretisation(alpha, order):
    """Against the solution in continuous time for a constant input, x(1) = A^-1 (e^A - I) B."""
    A, B = hippo("legs", 4)
    exact = scipy.linalg.solve(A.numpy(), (scipy.linalg.expm(A.numpy()) - np.eye(4)) @ B.numpy())
    errors = []
    for steps in (100, 200):
        A_bar, B_bar = (part.numpy() for part in discretize_gbt(A, B, 1 / steps, alpha))
        x = np.zeros(4)
        for _ in range(steps):
            x = A_bar @ x + B_bar
        errors.append(np.abs(x - exact).max())
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("N", [1, 2, 3, 20, 64])
@pytest.mark.parametrize("measure", MEASURES)
def test_hippo_is_quasiseparable(measure, N):
    A, B = hippo(measure, N)
    ours = QuasiSeparable.hippo(measure, N, dtype=DOUBLE)
    assert torch.allclose(ours.dense(), A, atol=1e-12 * N, rtol=1e-12)
    assert torch.equal(ours.P, B)


def perturbed(N: int, copies: int | None = None, seed: int = 0) -> QuasiSeparable:
    """Somewhere near LegS, with every parameter its own."""
    A = QuasiSeparable.hippo("legs", N, copies=copies, dtype=DOUBLE)
    for i, parameter in enumerate(A.parameters()):
        parameter.data += 0.05 * drawn(*parameter.shape, seed=seed + i)
    return A


@pytest.mark.parametrize("copies", [None, 3])
def test_products_and_solves_are_those_of_the_dense_matrix(copies):
    A, x, dt = perturbed(9, copies), drawn(3, 9, seed=7), torch.tensor([0.3, 0.01, 1.0], dtype=DOUBLE)
    matrix = torch.eye(9, dtype=DOUBLE) - dt[:, None, None] * A.dense()
    assert torch.allclose(A.matvec(x, dt), (matrix @ x[..., None])[..., 0], rtol=0, atol=1e-12)
    for method in ("dense", "tridiagonal", "auto"):
        exact = torch.linalg.solve(matrix, x[..., None])[..., 0]
        assert torch.allclose(A.solve(x, dt, method), exact, rtol=0, atol=1e-10)
        assert torch.allclose(A.solve(A.matvec(x, dt), dt, method), x, rtol=0, atol=1e-10)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        B = A.P * 0.7
        both = [A.discretize(B, dt, alpha, method) for method in ("dense", "tridiagonal")]
        for one, other, expected in zip(*both, discretize_gbt(A.dense(), B, dt, alpha), strict=True):
            assert torch.allclose(one, expected, rtol=0, atol=1e-10)
            assert torch.allclose(other, expected, rtol=0, atol=1e-10)


def test_large_matrices_take_the_fast_way():
    A = QuasiSeparable.hippo("legs", 200, dtype=DOUBLE)
    dt = torch.tensor([0.01], dtype=DOUBLE)
    expected = discretize_gbt(*hippo("legs", 200), dt)
    for ours, exact in zip(A.discretize(A.P, dt), expected, strict=True):
        assert torch.allclose(ours, exact, atol=1e-9)


def test_tridiagonal_solve_and_its_gradients():
    T, rhs = drawn(2, 3, 6), drawn(4, 2, 6, seed=1)
    T[:, 1] += 4
    x = tridiagonal_solve(T, rhs)
    assert torch.allclose((tridiagonal_matrix(T) @ x[..., None])[..., 0], rhs, atol=1e-12)
    T.requires_grad_()
    rhs.requires_grad_()
    assert torch.autograd.gradcheck(tridiagonal_solve, (T, rhs))
    assert torch.autograd.gradgradcheck(tridiagonal_solve, (T, rhs))
    both = torch.func.vmap(lambda t, r: tridiagonal_solve(t, r))(T, rhs[0])
    assert torch.allclose(both, x[0].detach())


def test_gradients_of_all_parameters():
    A = perturbed(4)
    x, dt = drawn(2, 4, seed=9).requires_grad_(), torch.tensor([0.2, 0.05], dtype=DOUBLE, requires_grad=True)
    names = [name for name, _ in A.named_parameters()]
    assert names == ["P", "Q", "Cd", "T"]

    def call(what):
        def run(x, dt, *values):
            return torch.func.functional_call(
                Wrapped(), {f"A.{n}": v for n, v in zip(names, values, strict=True)}, (x, dt)
            )

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.A = A

            def forward(self, x, dt):
                if what == "discretize":
                    return torch.cat([part.flatten() for part in self.A.discretize(x, dt, 0.5, "tridiagonal")])
                return self.A.matvec(x, dt) if what == "matvec" else self.A.solve(x, dt, what)

        return run

    for what in ("matvec", "dense", "tridiagonal", "discretize"):
        assert torch.autograd.gradcheck(call(what), (x, dt, *A.parameters())), what


def test_noise_moves_the_main_diagonal_alone():
    torch.manual_seed(0)
    noisy, plain = (QuasiSeparable.hippo("legt", 8, noise=noise) for noise in (0.01, 0.0))
    gap = (noisy.T - plain.T).detach().abs()
    assert float(gap[[0, 2]].max()) == 0
    assert 0 < float(gap[1].max()) < 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: hippo("fourier", 2), "measure must be one of legs, legt, lagt, got 'fourier'"),
        (lambda: hippo("legs", 0), "N must be >= 1, got 0"),
        (lambda: discretize_gbt(*hippo("legs", 2), 0.0), "dt must be > 0 and finite, got 0.0"),
        (lambda: discretize_gbt(*hippo("legs", 2), 0.1, 1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: discretize_gbt(torch.zeros(2, 3), torch.zeros(3), 0.1), r"A and B must have shapes .*\(2, 3\)"),
        (lambda: tridiagonal_solve(torch.zeros(2, 4), torch.zeros(4)), r"T and rhs must have shapes .*\(2, 4\)"),
        (lambda: QuasiSeparable.hippo("legs", 3, copies=0), "copies must be >= 1, got 0"),
        (lambda: QuasiSeparable.hippo("legs", 3, noise=-1), "noise must be >= 0, got -1"),
        (lambda: QuasiSeparable(*[torch.ones(3)] * 3, torch.ones(3)), r"T must have shape \(3, 3\), got \(3,\)"),
        (lambda: QuasiSeparable(torch.ones(3), *[torch.ones(2)] * 2, torch.ones(3, 3)), r"P, Q and Cd must have one"),
        (lambda: QuasiSeparable.hippo("legs", 3).solve(torch.ones(3), 0.1, "lu"), "method must be .* got 'lu'"),
        (lambda: QuasiSeparable.hippo("legs", 3).discretize(torch.ones(3), torch.ones(1), -0.1), "got -0.1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
