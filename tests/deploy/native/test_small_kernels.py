"""Small kernels of the sparse runtime against float64 torch, for scalars and for vectors of every length."""

import ctypes
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import kernels
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernels import Flat, Kernel, Planes, act, close, double, draw, same_bits

SIZES = [(1, 1), (1, 7), (4, 4), (7, 7), (5, 3), (8, 17), (14, 14), (16, 33), (33, 20)]
SHAPES = [(n, c, *size) for (n, c), size in zip(itertools.cycle([(1, 3), (3, 2), (2, 5)]), SIZES, strict=False)]
SHAPES += [(1, 37, 1, 1), (3, 18, 1, 1), (1, 45), (1, 16), (3, 20), (19, 3)]  # flat values, and rank 2
IMAGES = [shape for shape in SHAPES if len(shape) == 4]

POOLS = {  # kernel, stride, padding (top, left, bottom, right), dilation
    "2x2s2": ((2, 2), (2, 2), (0, 0, 0, 0), (1, 1)),
    "3x3s2p1": ((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "3x3s1p1": ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "3x2s1x2": ((3, 2), (1, 2), (1, 0, 1, 0), (1, 1)),
    "5x4s3x3": ((5, 4), (3, 3), (2, 2, 2, 2), (1, 1)),
    "9x12s1": ((9, 12), (1, 1), (4, 6, 4, 6), (1, 1)),
    "2x3d": ((2, 3), (2, 2), (1, 1, 1, 1), (3, 2)),
    "2x3ds1": ((2, 3), (1, 1), (0, 1, 0, 1), (2, 3)),
}


def pool_macros(name: str, **more: int) -> dict[str, int]:
    kernel, stride, _, dilation = POOLS[name]
    names = ("KH", "KW", "SY", "SX", "DY", "DX")
    return {**dict(zip(names, (*kernel, *stride, *dilation), strict=True)), **more}


ALL = [
    Kernel("elementwise.c.in", "silu", act("silu")),
    Kernel("elementwise.c.in", "add_relu", {"ADD": 1, **act("relu")}),
    Kernel("elementwise.c.in", "mul_none", {"MUL": 1, "ACT(v)": "(v)"}),
    Kernel("channelwise.c.in", "affine_clamp", {"AFFINE": 1, **act("clamp")}),
    Kernel("channelwise.c.in", "gate", {"MUL": 1, "ACT(v)": "(v)"}),
    Kernel("channelwise.c.in", "shift_relu", {"ADD": 1, **act("relu")}),
    *(Kernel("pool.c.in", f"max_{name}", pool_macros(name, MAX=1)) for name in POOLS),
    *(Kernel("pool.c.in", f"avg_{name}", pool_macros(name, MAX=0, INCLUDE_PAD=0)) for name in POOLS if "d" not in name),
    *(Kernel("pool.c.in", f"pad_{name}", pool_macros(name, MAX=0, INCLUDE_PAD=1)) for name in POOLS if "d" not in name),
    Kernel("adaptive.c.in", "adaptive_max", {"MAX": 1}),
    Kernel("adaptive.c.in", "adaptive_avg", {"MAX": 0}),
    Kernel("layer_norm.c.in", "layer_norm", {"ACT(v)": "(v)"}),
    Kernel("group_norm.c.in", "group_norm", act("relu")),
    Kernel("softmax.c.in", "softmax", {"LOG": 0}),
    Kernel("softmax.c.in", "log_softmax", {"LOG": 1}),
    Kernel("nchw.c.in", "enter", {"ENTER": 1}),
    Kernel("nchw.c.in", "leave", {"ENTER": 0}),
    Kernel("copy.c.in", "copy", {"GATHER": 0}),
    Kernel("copy.c.in", "gather", {"GATHER": 1}),
    Kernel("pad.c.in", "pad"),
    Kernel("reshape.c.in", "reshape"),
]


@pytest.fixture(params=kernels.vector_lengths(), ids=lambda lanes: f"lanes{lanes}")
def run(request):
    return kernels.runner(ALL, request.param)


@pytest.mark.parametrize("shape", SHAPES)
def test_elementwise(run, shape):
    a, b = draw(*shape), draw(*shape, seed=1)
    target = Planes(shape, more=1)
    run("add_relu", Planes(a), Planes(b, more=2), target)
    same_bits(target.read(), F.relu(torch.from_numpy(a) + torch.from_numpy(b)).numpy())
    place = Planes(a)
    run("mul_none", place, Planes(b), place)
    same_bits(place.read(), a * b)
    place = Planes(a)
    run("silu", place, place)
    close(place.read(), F.silu(double(a)))


@pytest.mark.parametrize("shape", SHAPES)
def test_one_number_a_channel(run, shape):
    x, gate = draw(*shape), draw(*shape[:2], 1, 1, seed=1)
    gate_like = gate if len(shape) == 4 else gate[:, :, 0, 0]
    scale, shift = draw(shape[1], seed=2), draw(shape[1], seed=3)
    wide = (1, -1, *(1,) * (len(shape) - 2))
    for target in (None, Planes(shape, more=2)):
        source = Planes(x)
        run("affine_clamp", source, target or source, scale, shift)
        wanted = (double(x) * double(scale.reshape(wide)) + double(shift.reshape(wide))).clamp(-0.5, 1.25)
        close((target or source).read(), wanted)
        source = Planes(x)
        run("gate", source, Planes(gate), target or source)
        same_bits((target or source).read(), x * gate_like)
        source = Planes(x)
        run("shift_relu", source, Planes(gate), target or source)
        same_bits((target or source).read(), np.maximum(x + gate_like, 0))


def pooled_shape(size, kernel, stride, padding, dilation, ceil):
    found = []
    for axis in (0, 1):
        room = size[axis] + padding[axis] + padding[axis + 2] - dilation[axis] * (kernel[axis] - 1) - 1
        count = (-(-room // stride[axis]) if ceil else room // stride[axis]) + 1
        if ceil and (count - 1) * stride[axis] >= size[axis] + padding[axis]:
            count -= 1  # torch: the last window starts inside the image or its left padding
        found.append(count)
    return found


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize(
    "shape", [shape for shape in IMAGES if shape[2:] != (1, 1)] + [(1, 19, 1, 1), (2, 3, 2, 2), (1, 2, 11, 70)]
)
def test_pools(run, shape, name, ceil):
    kernel, stride, padding, dilation = POOLS[name]
    size = pooled_shape(shape[2:], kernel, stride, padding, dilation, ceil)
    if min(size) < 1:
        return  # the window does not fit
    x = draw(*shape)
    torch_padding = padding[:2]
    target = Planes((*shape[:2], *size))
    run(f"max_{name}", Planes(x), target, 0, target.geo.h, 0, 16, padding[0], padding[1])
    same_bits(target.read(), F.max_pool2d(torch.from_numpy(x), kernel, stride, torch_padding, dilation, ceil).numpy())
    if dilation != (1, 1):
        return
    for kind, divisor in itertools.product(("avg", "pad"), (0, 5)):
        target = Planes((*shape[:2], *size), more=1)
        run(f"{kind}_{name}", Planes(x), target, 0, target.geo.h, 0, 16, *padding, divisor)
        wanted = F.avg_pool2d(double(x), kernel, stride, torch_padding, ceil, kind == "pad", divisor or None)
        close(target.read(), wanted)


def test_max_pooling_lets_nan_win_and_pads_with_minus_infinity(run):
    x = -np.abs(draw(1, 2, 9, 40)) - 1
    x[0, 0, 4, 17], x[0, 1, 0, 0], x[0, 1, 3, 20], x[0, 1, 8, 39] = np.nan, -np.inf, np.inf, np.nan
    x[0, 0, 0, :4] = [0.0, -0.0, -0.0, 0.0]
    for name in ("2x2s2", "3x3s2p1", "3x3s1p1"):
        kernel, stride, padding, dilation = POOLS[name]
        wanted = F.max_pool2d(torch.from_numpy(x), kernel, stride, padding[:2], dilation)
        target = Planes(tuple(wanted.shape))
        run(f"max_{name}", Planes(x), target, 0, target.geo.h, 0, 16, padding[0], padding[1])
        same_bits(target.read(), wanted.numpy())


@pytest.mark.parametrize("shape", IMAGES)
def test_adaptive_pools(run, shape):
    x = draw(*shape)
    for size in [(1, 1), (2, 3), (5, 4), (1, 2), shape[2:]]:
        if size != (1, 1) and math.prod(shape[2:]) == 1:
            continue
        for kind, wanted in (
            ("max", F.adaptive_max_pool2d(double(x), size)),
            ("avg", F.adaptive_avg_pool2d(double(x), size)),
        ):
            target = Planes((*shape[:2], *size))
            run(f"adaptive_{kind}", Planes(x), target)
            close(target.read(), wanted)
    x[0, 0, -1, -1] = np.nan
    target = Planes((*shape[:2], 1, 1))
    run("adaptive_max", Planes(x), target)
    same_bits(target.read(), F.adaptive_max_pool2d(torch.from_numpy(x), 1).numpy())


@pytest.mark.parametrize("shape", SHAPES)
def test_norms(run, shape):
    x, weight, bias = draw(*shape) + 3, draw(shape[1], seed=1), draw(shape[1], seed=2)
    moved = double(x).movedim(1, -1)
    for w, b in ((weight, bias), (None, None)):
        wanted = F.layer_norm(
            moved, moved.shape[-1:], None if w is None else double(w), None if b is None else double(b), 1e-5
        )
        source = Planes(x)
        for target in (Planes(shape, more=1), source):
            run("layer_norm", source, target, w, b, 1e-5)
            close(target.read(), wanted.movedim(-1, 1), 1e-5)
    for groups in {1, shape[1], 2 if shape[1] % 2 == 0 else 1}:
        # torch refuses a group of one number
        if math.prod(shape[2:]) * shape[1] == groups or len(shape) == 2:
            continue
        wanted = F.relu(F.group_norm(double(x), groups, double(weight), double(bias), 1e-5))
        source = Planes(x)
        for target in (Planes(shape, more=1), source):
            run("group_norm", source, target, groups, weight, bias, 1e-5)
            close(target.read(), wanted, 1e-5)


def test_norms_of_a_large_mean_do_not_cancel(run):
    x = draw(1, 8, 24, 24) + 1000
    wanted = F.group_norm(double(x), 2, eps=1e-5)
    target = Planes(x.shape)
    run("group_norm", Planes(x), target, 2, None, None, 1e-5)
    close(target.read(), wanted.relu(), 2e-6)
    for value in (x, x[:, :, 0, 0]):
        target = Planes(value.shape)
        run("layer_norm", Planes(value), target, None, None, 1e-5)
        moved = double(np.ascontiguousarray(value)).movedim(1, -1)
        close(target.read(), F.layer_norm(moved, moved.shape[-1:]).movedim(-1, 1), 2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(run, shape):
    x = 5 * draw(*shape)
    for name, reference in (("softmax", F.softmax), ("log_softmax", F.log_softmax)):
        source = Planes(x)
        for target in (Planes(shape, more=1), source):
            run(name, source, target)
            close(target.read(), reference(double(x), 1))


def test_softmax_of_infinities(run):
    for x in (
        np.array([[1, np.inf, 2]]),
        np.array([[-np.inf, 0, 1]]),
        np.array([[np.nan, 0, 1]]),
        np.full((1, 3), -np.inf),
    ):
        for shape in ((1, 3), (1, 3, 1, 2)):
            value = np.repeat(x, math.prod(shape) // 3, 1).reshape(shape).astype(np.float32)
            for name, reference in (("softmax", F.softmax), ("log_softmax", F.log_softmax)):
                target = Planes(shape)
                run(name, Planes(value), target)
                np.testing.assert_allclose(target.read(), reference(double(value), 1).numpy(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_callers_arrays_enter_and_leave(run, shape):
    x = draw(*shape)
    planes, back = Planes(shape, more=1), Flat(np.zeros_like(x))
    run("enter", Flat(x), planes)
    same_bits(planes.read(), x)
    run("leave", planes, back)
    same_bits(back.read(), x)


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_are_copied_and_picked(run, shape):
    x = draw(*shape)
    index = np.random.default_rng(1).integers(0, shape[1], 2 * shape[1] + 1).astype(np.int32)
    target = Planes((shape[0], len(index), *shape[2:]))
    run("gather", Planes(x), target, index)
    same_bits(target.read(), x[:, index])
    # a concatenation: each part begins some planes into the whole
    parts = [draw(shape[0], c, *shape[2:], seed=c) for c in (2, 1, shape[1])]
    target, at = Planes((shape[0], 3 + shape[1], *shape[2:]), more=1), 0
    for part in parts:
        piece = Planes(part)
        window = ctypes.c_void_p(target.pointer.value + 4 * at * target.geo.plane)
        run("copy", piece, _At(target, window))
        at += part.shape[1]
    same_bits(target.read(), np.concatenate(parts, 1))


class _At(Planes):
    """Another value from one of its planes on."""

    def __init__(self, whole, pointer):
        self.geo, self._pointer, self._owner = whole.geo, pointer, whole

    pointer = property(lambda self: self._pointer)

    def __del__(self):
        pass


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("padding", [(1, 2, 0, 3), (0, 0, 1, 0), (-1, 0, 0, -2), (2, -1, -3, 4), (-2, -2, 5, 5)])
def test_pad_and_crop(run, shape, padding):
    top, left, bottom, right = padding
    size = (shape[2] + top + bottom, shape[3] + left + right)
    if min(size) < 1:
        return  # nothing is left
    x = draw(*shape)
    target = Planes((*shape[:2], *size))
    run("pad", Planes(x), target, top, left)
    # torch refuses to crop more than there is, even where padding follows
    wanted = np.pad(x, ((0, 0), (0, 0), (9, 9), (9, 9)))
    same_bits(target.read(), wanted[:, :, 9 - top : 9 - top + size[0], 9 - left : 9 - left + size[1]])


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((1, 6, 7, 5), (1, 210)),
        ((3, 6, 7, 5), (3, 210)),
        ((1, 210), (1, 6, 7, 5)),
        ((3, 210), (3, 6, 7, 5)),
        ((2, 6, 4, 5), (2, 4, 3, 10)),
        ((1, 6, 4, 5), (1, 15, 2, 4)),
        ((2, 3, 1, 1), (2, 3)),
        ((1, 40, 1, 1), (1, 40)),
        ((1, 12, 1, 1), (1, 3, 2, 2)),
        ((3, 12, 1, 1), (3, 1, 4, 3)),
    ],
)
def test_reshape(run, source, target):
    x = draw(*source)
    value = Planes(target, more=1)
    run("reshape", Planes(x), value)
    same_bits(value.read(), x.reshape(target))


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
def test_every_kernel_is_strict_c99_for_every_vector_length(lanes):
    kernels.compile_text(kernels.program(ALL, lanes), (*kernels.STRICT, "-O1"))


@pytest.mark.slow
@pytest.mark.skipif(kernels.SANITIZE, reason="this is the sanitized run")
def test_sanitizers_are_silent():
    environment = {
        **os.environ,
        "NETWRIGHT_SANITIZE": "1",
        "LD_PRELOAD": kernels.sanitizer_libraries(),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    files = [__file__, str(Path(__file__).with_name("test_activations.py"))]
    # scalars, whose every operation is checked, and the longest vectors, which reach furthest
    chosen = " and not ".join(["not million", "strict", *(f"lanes{lanes}" for lanes in kernels.vector_lengths()[1:-1])])
    command = [sys.executable, "-m", "pytest", "-qxs", "-p", "no:cacheprovider", "-k", chosen, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
