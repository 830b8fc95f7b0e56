"""Runs C kernels of ``netwright.deploy.native`` one at a time: compiles them, lays arrays out as they want them, calls.

With ``NETWRIGHT_SANITIZE=1`` kernels are compiled with the address and undefined-behaviour sanitizers, and buffers end
exactly where kernels may read at most; the process must then run under ``LD_PRELOAD`` of :func:`sanitizer_libraries`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock

from netwright.storage import digest

LINE = 16  # floats in 64 bytes
GUARD = 64  # floats on either side of a buffer that must stay as they are
MARK = np.float32(-1.2345e30)
HEADERS = ("simd.h.in", "lanes.h.in", "activations.h.in")
SANITIZE = os.environ.get("NETWRIGHT_SANITIZE") == "1"
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-Wno-psabi")
FAST = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno")
CHECKED = ("-O0", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
_C = ctypes.CDLL(None)  # the C library, for memory that ends where it should
_C.free.argtypes = [ctypes.c_void_p]


BOUNDS = {"clamp": (-0.5, 1.25), "leaky_relu": (0.1, 0.0), "elu": (1.5, 0.0)}  # low and high in tests


def act(kind: str) -> dict[str, str]:
    """The macro of an activation."""
    low, high = BOUNDS.get(kind, (0.0, 0.0))
    return {"ACT(v)": f"nw_act_{kind}((v), {low}f, {high}f)"}


class Geo(ctypes.Structure):
    """``nw_geo``."""

    _fields_ = [(name, ctypes.c_int32) for name in ("n", "c", "h", "w", "plane")]


@dataclass(frozen=True)
class Kernel:
    """One function made of a kernel file.

    Attributes:
        file: In ``deploy/native/kernels``.
        name: ``NW_NAME``.
        macros: Others, without ``NW_``.
    """

    file: str
    name: str
    macros: Mapping[str, object] = field(default_factory=dict)

    def text(self) -> str:
        """The function, between its macros."""
        macros = {"NAME": self.name, **self.macros}
        front = "".join(f"#define NW_{key} {value}\n" for key, value in macros.items())
        back = "".join(f"#undef NW_{key.split('(')[0]}\n" for key in macros)
        return front + source(self.file) + back


def source(file: str) -> str:
    """The text of a kernel file."""
    return resources.files("netwright.deploy.native").joinpath("kernels", file).read_text()


def program(kernels: Sequence[Kernel], lanes: int) -> str:
    """One C text with all kernels, callable from outside."""
    front = f"#define NW_VL {lanes}\n" + "\n".join(source(file) for file in HEADERS)
    return "\n".join([front, "#undef NW_NOINLINE\n#define NW_NOINLINE", *(kernel.text() for kernel in kernels)])


def compiler() -> str:
    """The C compiler's path; the test is skipped if there is none."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (path := shutil.which(name)):
            return path
    pytest.skip("no C compiler: looked for $CC, cc, gcc, clang")


def compile_text(text: str, flags: Sequence[str]) -> Path:
    """Compiles C text into a shared object, which the workers of pytest-xdist share.

    Raises:
        AssertionError: With what the compiler said, if it refuses.
    """
    command = [compiler(), *flags, "-shared", "-fPIC"]
    stat = os.stat(command[0])
    folder = Path(os.environ["NETWRIGHT_TEST_CACHE"], "kernels")
    folder.mkdir(exist_ok=True)
    made = folder / f"{digest(text, command, stat.st_mtime_ns, stat.st_size)}.so"
    with FileLock(f"{made}.lock"):
        if not made.exists():
            path, new = made.with_suffix(".c"), made.with_suffix(".new")
            path.write_text(text)
            done = subprocess.run(
                [*command, "-o", str(new), str(path), "-lm"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-4000:]
            new.rename(made)
    return made


def load(kernels: Sequence[Kernel], lanes: int) -> ctypes.CDLL:
    """The kernels as functions without a result."""
    library = ctypes.CDLL(str(compile_text(program(kernels, lanes), STRICT + (CHECKED if SANITIZE else FAST))))
    for kernel in kernels:
        getattr(library, kernel.name).restype = None
    return library


def vector_lengths() -> list[int]:
    """Scalars, AVX2's or NEON's vectors, and those of AVX-512 where the processor has them."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        return [1, 4]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return [1, 8, 16] if "avx512f" in flags else [1, 8]


def sanitizer_libraries() -> str:
    """What ``LD_PRELOAD`` must name; the test is skipped if the compiler has none."""
    found = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    if not all(Path(path).is_absolute() and Path(path).exists() for path in found):
        pytest.skip("the compiler comes without sanitizer libraries")
    return " ".join(found)


class Buffer:
    """Floats at a multiple of 64 bytes, guarded on both sides by marks, or under sanitizers by the allocator.

    Args:
        floats: How many.
        head: How many before them kernels may read.
    """

    def __init__(self, floats: int, head: int = 0) -> None:
        front, back = (head, 0) if SANITIZE else (GUARD, GUARD)
        place, size = ctypes.c_void_p(), front + floats + back
        assert _C.posix_memalign(ctypes.byref(place), ctypes.c_size_t(64), ctypes.c_size_t(4 * size)) == 0
        self._place = place
        self._whole = np.ctypeslib.as_array(ctypes.cast(place, ctypes.POINTER(ctypes.c_float)), (size,))
        self._whole[:] = MARK
        self.floats = self._whole[front : front + floats]

    def check(self) -> None:
        """Fails if a float outside was written."""
        if not SANITIZE:
            assert (self._whole[:GUARD] == MARK).all(), "written before the buffer"
            assert (self._whole[-GUARD:] == MARK).all(), "written behind the buffer"

    @property
    def pointer(self) -> ctypes.c_void_p:
        """Of the first float."""
        return ctypes.c_void_p(self.floats.ctypes.data)

    def __del__(self) -> None:
        _C.free(self._place)


class Flat(Buffer):
    """An array that has no room behind it."""

    def __init__(self, values: np.ndarray) -> None:
        super().__init__(values.size)
        self.shape = values.shape
        self.floats[:] = values.ravel()

    def read(self) -> np.ndarray:
        """What it holds now."""
        self.check()
        return self.floats.reshape(self.shape).copy()


class Planes(Buffer):
    """A value (N, C, H, W) or (N, F) as kernels see it; what is no pixel is NaN.

    Args:
        values: The value, or its shape for one that is yet to be written (NaN everywhere).
        more: Cache lines between planes beyond those needed.
    """

    def __init__(self, values: np.ndarray | Sequence[int], more: int = 0) -> None:
        shape = values.shape if isinstance(values, np.ndarray) else tuple(values)
        self.shape = tuple(shape)
        n, c, h, w = shape if len(shape) == 4 else (*shape, 1, 1)
        pixels = n * h * w
        plane = 1 if pixels == 1 else LINE * (-(-(pixels + LINE - 1) // LINE) + more)
        super().__init__(-(-c // LINE) * LINE if plane == 1 else c * plane, head=LINE)
        self.geo = Geo(n, c, h, w, plane)
        self.floats[:] = np.nan
        if isinstance(values, np.ndarray):
            self._pixels()[:] = values.reshape(n, c, h * w).transpose(1, 0, 2).reshape(c, pixels)

    def _pixels(self) -> np.ndarray:
        pixels = self.geo.n * self.geo.h * self.geo.w
        return self.floats[: self.geo.c * self.geo.plane].reshape(self.geo.c, self.geo.plane)[:, :pixels]

    @property
    def layout(self) -> ctypes._Pointer[Geo]:
        """The address of its geometry."""
        return ctypes.pointer(self.geo)

    def read(self) -> np.ndarray:
        """The value in torch's order."""
        self.check()
        values = self._pixels().reshape(self.geo.c, self.geo.n, self.geo.h * self.geo.w)
        return values.transpose(1, 0, 2).reshape(self.shape).copy()


def call(function: ctypes._CFuncPtr, *arguments: Buffer | int | float | np.ndarray | None) -> None:
    """Calls ``kernel(pointers of values, their geometries, the rest)``.

    Buffers stand for a pointer; the geometries of all :class:`Planes` follow the last of them, in the same order. Other
    arguments are int32, float, an array of int32, or None for a null pointer.
    """
    last = max(place for place, argument in enumerate(arguments) if isinstance(argument, Buffer))
    given: list[object] = []
    for place, argument in enumerate(arguments):
        if isinstance(argument, Buffer):
            given.append(argument.pointer)
        elif isinstance(argument, np.ndarray):
            given.append(ctypes.c_void_p(argument.ctypes.data))
        elif argument is None:
            given.append(ctypes.c_void_p())
        else:
            given.append(ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int32(argument))
        if place == last:
            given += [each.layout for each in arguments if isinstance(each, Planes)]
    function(*given)


_LIBRARIES: dict[str, ctypes.CDLL] = {}


def runner(kernels: Sequence[Kernel], lanes: int) -> Callable[..., None]:
    """``run(name, *arguments)``: :func:`call` by name; compiled once a process."""
    text = program(kernels, lanes)
    if text not in _LIBRARIES:
        _LIBRARIES[text] = load(kernels, lanes)
    library = _LIBRARIES[text]
    return lambda name, *arguments: call(getattr(library, name), *arguments)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def double(x: np.ndarray) -> torch.Tensor:
    """For an oracle."""
    return torch.from_numpy(x).double()


def close(got: np.ndarray, wanted: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Fails unless equal to a relative or absolute tolerance."""
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted.numpy(), rtol=tolerance, atol=tolerance)


def same_bits(got: np.ndarray, wanted: np.ndarray) -> None:
    """Fails unless equal with the signs of zeros, and NaN where NaN is."""
    assert got.shape == wanted.shape
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    there = ~np.isnan(got)
    assert np.array_equal(got[there].view(np.int32), wanted[there].view(np.int32))
