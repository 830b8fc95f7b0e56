"""Kernels, the convolution and states behind sequences, against steps in float64, scipy and direct sums."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.signal
import torch

from netwright.nn.lssl import causal_conv, discretize_gbt, hippo, krylov, ssm_kernel, two_sided_conv
from netwright.nn.lssl.convolution import final_state, free_response

DOUBLE = torch.float64


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def system(H: int = 3, N: int = 5):
    return discretize_gbt(*hippo("legs", N), torch.linspace(0.01, 0.3, H, dtype=DOUBLE))


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("legs", [0.24519920, 0.19458124, 0.15374143, 0.12084718]),
        ("legt", [0.24955151, 0.20445382, 0.16410662, 0.12893842]),
    ],
)
@pytest.mark.parametrize("method", ["split", "doubling", "sequential", "auto"])
def test_kernel_by_hand(measure, expected, method):
    A_bar, B_bar = discretize_gbt(*hippo(measure, 2), 0.1)
    found = ssm_kernel(A_bar, B_bar, torch.ones(1, 2, dtype=DOUBLE), 4, method)
    assert found[0].tolist() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("L", [1, 2, 3, 5, 16, 17, 100, 784])
def test_three_ways_to_the_kernel(L):
    A_bar, B_bar = system()
    C = drawn(3, 2, 5)
    found = [ssm_kernel(A_bar, B_bar, C, L, method) for method in ("sequential", "doubling", "split", "auto")]
    for other in found[1:]:
        assert other.shape == (3, 2, L)
        assert torch.allclose(other, found[0], rtol=0, atol=1e-10)
    powers = torch.stack([torch.linalg.matrix_power(A_bar, i) @ B_bar[..., None] for i in range(min(L, 20))], -1)
    assert torch.allclose(krylov(A_bar, B_bar, L)[..., :20], powers[:, :, 0], rtol=0, atol=1e-12)


def test_the_whole_kernel_sums_to_the_first_read_out():
    A_bar, B_bar = system(1, 8)
    C = drawn(1, 2, 8)
    assert torch.allclose(ssm_kernel(A_bar, B_bar, C, 5000).sum(-1), C[..., 0], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("L", "taps"), [(1, 1), (5, 5), (17, 17), (17, 4), (4, 17), (100, 100)])
def test_convolution_is_the_direct_sum(L, taps):
    u, K, back = drawn(2, L, 3), drawn(3, 2, taps, seed=1), drawn(3, 2, taps, seed=2)
    expected = torch.zeros(2, L, 3, 2, dtype=DOUBLE)
    both = torch.zeros_like(expected)
    for k in range(L):
        for i in range(taps):
            if k - i >= 0:
                expected[:, k] += u[:, k - i, :, None] * K[..., i]
            if k + i < L:
                both[:, k] += u[:, k + i, :, None] * back[..., i]
    assert torch.allclose(causal_conv(u, K), expected, rtol=0, atol=1e-12)
    assert torch.allclose(two_sided_conv(u, K, back), expected + both, rtol=0, atol=1e-12)


def test_types_of_the_convolution():
    u, K = drawn(1, 30, 2), drawn(2, 1, 30)
    exact = causal_conv(u, K)
    assert causal_conv(u.float(), K.float()).dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16):
        found = causal_conv(u.to(dtype), K.float())
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, atol=0.2)


@pytest.mark.parametrize("L", [1, 2, 3, 17, 64, 100])
def test_states_behind_and_in_front(L):
    A_bar, B_bar = system()
    C, u, state = drawn(3, 2, 5), drawn(4, L, 3, seed=1), drawn(4, 3, 5, seed=2)
    x, y = state, []
    for k in range(L):
        x = torch.einsum("hnm,bhm->bhn", A_bar, x) + B_bar * u[:, k, :, None]
        y.append(torch.einsum("hmn,bhn->bhm", C, x))
    assert torch.allclose(final_state(A_bar, B_bar, u, state), x, rtol=0, atol=1e-11)
    response = causal_conv(u, ssm_kernel(A_bar, B_bar, C, L)) + free_response(A_bar, C, state, L)
    assert torch.allclose(response, torch.stack(y, 1), rtol=0, atol=1e-11)
    alone = final_state(A_bar, B_bar, u)
    assert torch.allclose(final_state(A_bar, B_bar, u, torch.zeros_like(state)), alone, rtol=0, atol=1e-12)


def test_against_dlsim():
    """Its state lags by one: read-outs C A_bar and C B_bar + D give the output after the input has been absorbed."""
    A_bar, B_bar = system(1, 6)
    C, D, u = drawn(1, 1, 6), drawn(1, 1, seed=3), drawn(1, 300, 1, seed=1)
    ours = causal_conv(u, ssm_kernel(A_bar, B_bar, C, 300))[0, :, 0] + u[0] * D
    A, B, c = A_bar[0].numpy(), B_bar[0].numpy()[:, None], C[0].numpy()
    _, theirs, _ = scipy.signal.dlsim((A, B, c @ A, c @ B + D.numpy(), 1.0), u[0].numpy())
    assert np.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_a_kernel_of_length_16000():
    """Float32 by blocks against float64 step by step: no error grows over the powers."""
    A_bar, B_bar = discretize_gbt(*hippo("legs", 16), torch.tensor([1e-3], dtype=DOUBLE))
    C = drawn(1, 1, 16)
    exact = ssm_kernel(A_bar, B_bar, C, 16_000, "sequential")
    found = ssm_kernel(*(part.float() for part in (A_bar, B_bar, C)), 16_000)
    assert float((found - exact).abs().max()) < 1e-4 * float(exact.abs().max())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ssm_kernel(*system(), drawn(3, 2, 5), 0), "L must be >= 1, got 0"),
        (lambda: krylov(*system(), 0), "L must be >= 1, got 0"),
        (lambda: ssm_kernel(*system(), drawn(3, 2, 5), 4, "fft"), "method must be .* got 'fft'"),
        (lambda: ssm_kernel(*system(), drawn(3, 2, 4), 4), r"B_bar and C must have shapes .*\(3, 2, 4\)"),
        (lambda: causal_conv(drawn(2, 5, 3), drawn(4, 1, 5)), r"got \(2, 5, 3\) and \(4, 1, 5\)"),
        (lambda: causal_conv(drawn(2, 0, 3), drawn(3, 1, 5)), r"L and taps >= 1, got \(2, 0, 3\)"),
        (lambda: two_sided_conv(drawn(2, 5, 3), drawn(3, 1, 5), drawn(3, 2, 5)), "anticausal must have the shape of K"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_batch_in_pieces_is_convolved_as_a_whole(monkeypatch):
    u, K, back = drawn(7, 20, 3), drawn(3, 2, 20, seed=1), drawn(3, 2, 20, seed=2)

    def found() -> list[torch.Tensor]:
        inputs = [value.clone().requires_grad_() for value in (u, K, back)]
        y = two_sided_conv(*inputs)
        return [y, *torch.autograd.grad(y.square().sum(), inputs)]

    whole, calls, rfft = found(), [], torch.fft.rfft
    monkeypatch.setattr("netwright.nn.lssl.convolution.PIECE", 2 * 3 * 2 * 40)
    monkeypatch.setattr(torch.fft, "rfft", lambda x, **named: (calls.append(len(x)), rfft(x, **named))[1])
    for one, other in zip(found(), whole, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)
    assert calls == [3, 3, 2, 2, 2, 1]  # two kernels, then seven sequences by twos
