"""Activations of the sparse runtime against float64, for scalars and for vectors of every length."""

import ctypes
import math

import kernels
import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F
from kernels import Kernel, Planes, act, double, same_bits

from netwright.deploy.graph.ir import ACTIVATIONS

EXACT = {"none", "relu", "clamp", "leaky_relu"}
ALL = [Kernel("elementwise.c.in", f"act_{kind}", act(kind)) for kind in ACTIVATIONS]

REFERENCE = {
    "none": lambda x: x,
    "relu": F.relu,
    "clamp": lambda x: x.clamp(-0.5, 1.25),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": lambda x: F.elu(x, 1.5),
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "tanh": torch.tanh,
}


@pytest.fixture(params=kernels.vector_lengths(), ids=lambda lanes: f"lanes{lanes}")
def run(request):
    return kernels.runner(ALL, request.param)


SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 1e-30, -1e-30, 1e30, -1e30, 3, -3, 6, -6, 1e-42], np.float32
)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_agree_with_float64_over_a_million_points(run, kind):
    x = np.concatenate([np.linspace(-20, 20, 700_001), np.linspace(-100, 100, 200_001), np.geomspace(1e-37, 1, 50_000)])
    x = np.concatenate([x, -x[-50_000:]]).astype(np.float32).reshape(1, 1, 1, -1)
    source, target = Planes(x), Planes(x.shape)
    run(f"act_{kind}", source, target)
    got, wanted = target.read().astype(np.float64), REFERENCE[kind](double(x)).numpy()
    wide = x.astype(np.float64)
    if kind == "gelu":  # torch's 1 + erf and 1 + tanh cancel on the left, in float64 too
        wanted = wide * scipy.special.ndtr(wide)
    if kind == "gelu_tanh":
        wanted = wide * scipy.special.expit(math.sqrt(8 / math.pi) * (wide + 0.044715 * wide**3))
    if kind in EXACT:
        same_bits(target.read(), REFERENCE[kind](torch.from_numpy(x)).numpy())
        return
    normal = np.abs(wanted) > 1e-36  # below, float32 loses digits
    error = np.abs(got - wanted)
    assert (error[~normal] <= 1e-36).all()
    # e^(-2 z) multiplies the rounding of z, which for large |z| is all that the tanh form of GELU can be accurate to
    limit = {"gelu": 8e-7, "gelu_tanh": 8e-7 + 3e-7 * np.abs(x[normal]) ** 3}.get(kind, 4e-7)
    assert (error[normal] <= limit * np.abs(wanted[normal])).all(), (error[normal] / np.abs(wanted[normal])).max()


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_keep_nan_infinities_and_the_sign_of_zero(run, kind):
    x = SPECIAL.reshape(1, -1)
    target = Planes(x.shape)
    run(f"act_{kind}", Planes(x), target)
    got, wanted = target.read(), REFERENCE[kind](double(x)).float().numpy()
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    assert np.array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(wanted[~np.isnan(got)]))


HELPERS = """
void exps(const float *x, float *y, int count) {
  for (int i = 0; i < count; i += NW_VL) nw_store(y + i, nw_exp(nw_load(x + i)));
}
void normals(const float *x, float *y, int count) {
  for (int i = 0; i < count; i += NW_VL) nw_store(y + i, nw_normal(nw_load(x + i)));
}
"""


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lanes", kernels.vector_lengths())
def test_the_exponential_and_the_normal_distribution_have_small_relative_error(lanes, fused):
    text = kernels.program([], lanes) + HELPERS
    flags = (*kernels.STRICT, *kernels.FAST, *(() if fused else ("-ffp-contract=off",)))
    library = ctypes.CDLL(str(kernels.compile_text(text, flags)))

    def apply(name, x):
        x, y = np.ascontiguousarray(x, np.float32), np.empty(len(x), np.float32)
        getattr(library, name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(y.ctypes.data), ctypes.c_int(len(x)))
        return y

    x = np.linspace(-87, 88, 1_000_000).astype(np.float32)
    wanted = np.exp(x.astype(np.float64))
    assert (np.abs(apply("exps", x) - wanted) <= 2e-7 * wanted).all()
    edge = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 89, -104, -1e38, 1e38, 88.72283, -103, -95, 1e-8, -1e-8, 1, -1], np.float32
    )
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(
            apply("exps", edge), np.exp(edge.astype(np.float64)).astype(np.float32), rtol=2e-7, atol=3e-45
        )
    x = np.linspace(-12.5, 12.5, 1_000_000).astype(np.float32)
    wanted = scipy.special.ndtr(x.astype(np.float64))
    assert (np.abs(apply("normals", x) - wanted) <= 6e-7 * wanted).all()
    assert (np.abs(apply("normals", x) - wanted) <= 1.5e-7).all()


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_activations_are_strict_c99_for_every_vector_length(lanes):
    kernels.compile_text(kernels.program(ALL, lanes), (*kernels.STRICT, "-O1"))
