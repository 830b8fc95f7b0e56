import numpy as np
import pytest
import torch

from netwright.compress.quantize import BucketScaler, nonuniform_quantize, uniform_quantize
from netwright.compress.quantize.scaling import least_error_ends, nearest, rounded
from netwright.seeding import stream

V = torch.tensor([-1.0, -0.2, 0.1, 0.9])
LONG = torch.tensor([0.0, 1, 2, 10, 11, 12, 13, 14])


def weights(n=1000, seed=0, dtype=torch.float32):
    return torch.randn(n, generator=stream(seed, "w"), dtype=dtype)


def test_hand_cases():
    u, alpha, beta = BucketScaler().scale(V)
    assert u.flatten().tolist() == pytest.approx([0, 0.421053, 0.578947, 1], abs=1e-6)
    assert (float(alpha), float(beta)) == (pytest.approx(1.9), -1.0)
    assert uniform_quantize(V, 2).tolist() == pytest.approx([-1, -0.366667, 0.266667, 0.9], abs=1e-6)
    assert uniform_quantize(LONG, 2).tolist() == pytest.approx([0, 0, 0, 28 / 3, 28 / 3, 14, 14, 14], abs=1e-5)
    assert uniform_quantize(LONG, 2, 4).tolist() == pytest.approx([0, 0, 10 / 3, 10, 11, 12, 13, 14], abs=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("bucket", [7, 256, None])
def test_error_ends_and_idempotence(bits, bucket):
    v = weights()
    q = uniform_quantize(v, bits, bucket)
    for start in range(0, 1000, bucket or 1000):
        part, rounded = v[start : start + (bucket or 1000)], q[start : start + (bucket or 1000)]
        span = float(part.max() - part.min())
        assert float((part - rounded).abs().max()) <= span / (2 * (2**bits - 1)) + 1e-6
        assert float(rounded.min()) == float(part.min())
        assert float(rounded.max()) == pytest.approx(float(part.max()), abs=1e-6)
        assert len(rounded.unique()) <= 2**bits
    assert torch.allclose(uniform_quantize(q, bits, bucket), q, atol=1e-6)


def test_sixteen_bits_are_exact_to_a_part_of_131070():
    v = weights(256, dtype=torch.float64)
    span = float(v.max() - v.min())
    assert float((uniform_quantize(v, 16) - v).abs().max()) <= span / 131070 * (1 + 1e-12)


def test_a_constant_bucket_and_an_empty_tensor_are_unchanged():
    assert torch.equal(uniform_quantize(torch.full((5,), 0.3), 2), torch.full((5,), 0.3))
    assert uniform_quantize(torch.empty(0, 3), 2).shape == (0, 3)


def test_buckets_are_padded_with_the_last_weight():
    scaler = BucketScaler(4)
    assert scaler.buckets(torch.arange(6.0)).tolist() == [[0, 1, 2, 3], [4, 5, 5, 5]]
    assert BucketScaler(256).shape(10) == (1, 10)
    v = weights(10).view(2, 5)
    assert torch.allclose(scaler.unscale(*scaler.scale(v), v.shape), v, atol=1e-6)


def test_stochastic_rounding_is_unbiased_and_next_door():
    v = torch.tensor([0.0, 0.13, 0.5, 0.77, 1.0], dtype=torch.float64)
    draws = uniform_quantize(v.repeat(100_000, 1), 2, 5, stochastic=True, generator=stream(0, "chance"))
    error = float(draws.std(0).max()) / np.sqrt(100_000)
    assert float((draws.mean(0) - v).abs().max()) < 4 * error
    for i, value in enumerate(v.tolist()):
        neighbours = {np.floor(value * 3) / 3, np.ceil(value * 3) / 3}
        assert {round(x, 9) for x in draws[:, i].unique().tolist()} == {round(x, 9) for x in neighbours}


def test_even_points_are_uniform_quantisation():
    v = weights()
    values, chosen = nonuniform_quantize(v, torch.linspace(0, 1, 8), 64)
    assert torch.allclose(values, uniform_quantize(v, 3, 64), atol=1e-6)
    assert chosen.shape == v.shape
    assert (int(chosen.min()), int(chosen.max())) == (0, 7)


def test_the_nearest_point_is_that_of_brute_force():
    points = torch.tensor([-0.3, 0.1, 0.1, 0.4, 1.2])
    u = torch.rand(500, generator=stream(0, "u"))
    brute = (u[:, None] - points).abs()
    assert torch.equal(points[nearest(u, points)], points[brute.argmin(1)])
    assert nearest(torch.tensor([0.25]), torch.tensor([0.0, 0.5])).tolist() == [0]  # a tie goes down


def test_torch_fake_quantise_agrees_where_zero_is_a_level():
    """torch's zero point is a whole number of steps, so minima are made multiples of the step."""
    rows = torch.rand(6, 64, generator=stream(0, "rows"))
    rows = (rows - rows.min(1, keepdim=True).values) / (
        rows.max(1, keepdim=True).values - rows.min(1, keepdim=True).values
    )
    step = torch.tensor([0.1, 0.02, 1.0, 0.3, 0.5, 0.05])
    zero = torch.tensor([0, 3, 7, 1, 15, 9], dtype=torch.int32)
    v = rows * 15 * step[:, None] - (zero * step)[:, None]
    theirs = torch.fake_quantize_per_channel_affine(v, step, zero, 0, 0, 15)
    assert torch.allclose(uniform_quantize(v, 4, 64), theirs, atol=1e-5)


def error(u, low, high, bits):
    """Mean squared error of levels from low to high, by its definition."""
    levels = low + (high - low) * torch.arange(2**bits) / (2**bits - 1)
    return float((u[:, None] - levels).abs().min(1).values.square().mean())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_even_weights_have_their_ends_half_a_step_inside(bits):
    inside = 2.0 ** -(bits + 1)
    (ends,) = least_error_ends(torch.linspace(0, 1, 4001)[None], bits)
    assert ends.tolist() == pytest.approx([inside, 1 - inside], abs=0.0126)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("shape", ["normal", "exponential", "outlier"])
def test_ends_have_nearly_the_least_error_of_all_on_a_grid(bits, shape):
    v = weights(1024)
    v = {"normal": v, "exponential": -(v.abs() + 0.01).log(), "outlier": torch.cat([v[:1023], v[:1] * 0 + 9])}[shape]
    u, _, _ = BucketScaler().scale(v)
    for row, (low, high) in zip(u, least_error_ends(u, bits).tolist(), strict=True):
        grid = torch.linspace(0, 1, 41).tolist()
        least = min(error(row, a, b, bits) for a in grid for b in grid if b - a > 0.05)
        assert error(row, low, high, bits) <= 1.03 * least
        assert error(row, low, high, bits) < error(row, 0.0, 1.0, bits)


def test_weights_on_their_levels_keep_them():
    u = rounded(torch.rand(3, 64, generator=stream(0, "u")), 3) / 7
    u[:, 0], u[:, 1] = 0, 1
    assert torch.equal(least_error_ends(u, 3), torch.tensor([[0.0, 1.0]] * 3))
    assert least_error_ends(torch.zeros(2, 5), 1).tolist() == [[0, 1], [0, 1]]  # constant buckets
    assert least_error_ends(torch.zeros(0, 5), 1).shape == (0, 2)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: least_error_ends(torch.zeros(1, 2), 0), r"bits must lie in 1..16, got 0"),
        (lambda: uniform_quantize(V, 0), r"bits must lie in 1..16, got 0"),
        (lambda: uniform_quantize(V, 17), "bits"),
        (lambda: uniform_quantize(V, 2, 0), "bucket_size must be >= 1 or None, got 0"),
        (lambda: uniform_quantize(V, 2.5), "bits must be a whole number, got 2.5"),
        (lambda: uniform_quantize(V, 2, 1.5), "bucket_size must be a whole number, got 1.5"),
        (lambda: uniform_quantize(V / 0, 2), "v must be finite"),
        (lambda: uniform_quantize(V, 2, stochastic=True), "needs a generator"),
        (lambda: nonuniform_quantize(V, torch.tensor([0.5])), "points must be at least 2"),
        (lambda: nonuniform_quantize(V, torch.tensor([0.5, 0.2])), "points must be sorted"),
        (lambda: nonuniform_quantize(V, torch.tensor([0.5, float("nan")])), "points must be finite"),
    ],
)
def test_bad_input(call, told):
    with pytest.raises(ValueError, match=told):
        call()
