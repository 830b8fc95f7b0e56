"""The C package against float64 torch: strict compilers, sanitizers, memory that ends where it was said to end."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import itertools
import math
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netwright import storage
from netwright.console import UserError
from netwright.deploy import export_c
from netwright.deploy.export_c import Preprocessing, export
from netwright.deploy.graph import capture
from netwright.deploy.native.program import source
from netwright.nn.mbconv import mobilenet_v2_32
from netwright.nn.resnet import resnet18_cifar
from netwright.search import spaces
from netwright.seeding import stream

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
FAST = (*STRICT, "-O3", "-ffp-contract=fast", "-fno-math-errno")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
VECTORS = {"native": ("-march=native",), "generic": (), "scalar": ("-DNW_SCALAR",)}
PICTURE = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
TOLERANCE = 1e-5

# Every array ends where it is said to end, and the arena begins as NaN. With STACK the network runs on a painted stack
# of its own, and the driver tells how much of it was used.
DRIVER = r"""
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "model.h"

#define WHOLE (1 << 19)
static void *weights, *arena;
static float *input, *output;
static int status;

static void *exact(size_t bytes) {
  void *p = 0;
  return posix_memalign(&p, MODEL_ALIGN, bytes) ? 0 : p;
}

static int transfer(const char *path, void *data, size_t bytes, int writes) {
  FILE *file = fopen(path, writes ? "wb" : "rb");
  const size_t done = !file ? 0 : writes ? fwrite(data, 1, bytes, file) : fread(data, 1, bytes, file);
  const int more = !writes && file && fgetc(file) != EOF;
  if (file) fclose(file);
  return done != bytes || more;
}

static void *run(void *runs) {
  if (runs) status = model_run(weights, arena, MODEL_ARENA_BYTES, input, output);
  return 0;
}

#ifdef STACK
static size_t used(int runs) {
  unsigned char *stack = exact(WHOLE);
  pthread_attr_t attributes;
  pthread_t thread;
  size_t free_bytes = 0;
  memset(stack, 0xa5, WHOLE);
  pthread_attr_init(&attributes);
  pthread_attr_setstack(&attributes, stack, WHOLE);
  pthread_create(&thread, &attributes, run, runs ? stack : 0);
  pthread_join(thread, 0);
  while (free_bytes < WHOLE && stack[free_bytes] == 0xa5) ++free_bytes;
  free(stack);
  return WHOLE - free_bytes;
}
#endif

int main(int argc, char **argv) {
  float *again;
  if (argc < 4) return 1;
  weights = exact(MODEL_WEIGHTS_BYTES), arena = exact(MODEL_ARENA_BYTES);
  input = malloc(MODEL_INPUT_FLOATS * sizeof(float));
  output = malloc(MODEL_OUTPUT_FLOATS * sizeof(float)), again = malloc(MODEL_OUTPUT_FLOATS * sizeof(float));
  if (transfer(argv[1], weights, MODEL_WEIGHTS_BYTES, 0)) return 2;
  if (transfer(argv[2], input, MODEL_INPUT_FLOATS * sizeof(float), 0)) return 3;
  if (model_check(weights, MODEL_WEIGHTS_BYTES)) return 4;
#ifdef STACK
  {
    const size_t without = used(0), with = used(1);
    printf("%d %d\n", (int)(with - without), MODEL_STACK_BYTES);
  }
#endif
  memset(arena, 0xff, MODEL_ARENA_BYTES);
  run(weights);
  if (status) return 5;
  memcpy(again, output, MODEL_OUTPUT_FLOATS * sizeof(float));
  memset(output, 0, MODEL_OUTPUT_FLOATS * sizeof(float));
  run(weights); /* now in an arena that holds the last run's values */
  if (status || memcmp(again, output, MODEL_OUTPUT_FLOATS * sizeof(float))) return 6;
  if (transfer(argv[3], output, MODEL_OUTPUT_FLOATS * sizeof(float), 1)) return 7;
  free(weights), free(arena), free(input), free(output), free(again);
  return 0;
}
"""


def compilers() -> list[str]:
    return [name for name in ("gcc", "clang") if shutil.which(name)] or ["cc"]


each_compiler = pytest.mark.parametrize("compiler", ["gcc", "clang"])


def build(compiler: str, target: Path, sources: Sequence[Path | str], flags: Sequence[str]) -> Path:
    """Compiles; the test is skipped without this compiler, and fails with what it said."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}")
    libraries = [] if "-c" in flags else ["-lm", "-pthread"]
    command = [compiler, *flags, "-o", str(target), *map(str, sources), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode + len(done.stderr), f"{' '.join(command)}\n{done.stderr[-3000:]}"
    return target


def call(*words: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False, cwd=folder)


class Everything(nn.Module):
    """Every operation of a graph, and shapes at which every kernel is chosen."""

    def __init__(self) -> None:
        super().__init__()
        conv, norm = nn.Conv2d, nn.BatchNorm2d
        call = networks.Call
        self.stem = nn.Sequential(conv(3, 16, 3, padding=1), norm(16), nn.ReLU6())
        self.blocks = nn.Sequential(
            nn.Sequential(
                conv(16, 96, 1), nn.ReLU(), conv(96, 96, 5, 2, 2, groups=96), nn.Hardswish(), conv(96, 12, 1)
            ),
            networks.Residual(conv(12, 12, 3, padding=2, dilation=2, groups=12), nn.LeakyReLU(), False),
            networks.Gate(12, 5, nn.Sigmoid(), False),
            nn.Sequential(conv(12, 24, 3, padding=0, groups=12), nn.SiLU(), conv(24, 16, (3, 2), (2, 1), 1, groups=2)),
            networks.Residual(nn.Sequential(conv(16, 16, 3, padding=1), norm(16)), nn.ReLU(), True),
            nn.ConvTranspose2d(16, 12, 3, 2, 1, 1),
            nn.MaxPool2d(3, 2, 1, ceil_mode=True),
            nn.BatchNorm2d(12),
            nn.AvgPool2d((2, 3), 1, 1, ceil_mode=True, count_include_pad=False),
            nn.Sequential(nn.GroupNorm(3, 12), nn.ELU()),
            networks.ChannelsLast(12),
            networks.Branches([conv(12, 6, 1), nn.Sequential(conv(12, 6, 3, padding=1), nn.Tanh())], True),
            nn.ChannelShuffle(4),
            call(lambda x: nn.functional.pad(x, (1, 0, 2, 1))),
            call(lambda x: x * x.sigmoid() + x.mean((2, 3), keepdim=True)),
            networks.Residual(nn.Softmax(dim=1), nn.GELU(), False),
            call(lambda x: x.repeat(1, 2, 1, 1).flip(1)),
        )
        self.head = nn.Sequential(
            nn.AdaptiveAvgPool2d((2, 3)), nn.Flatten(), nn.Linear(288, 20), nn.LayerNorm(20), nn.Hardsigmoid()
        )
        self.last = nn.Linear(20, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.head(self.blocks(self.stem(x))))


def designed() -> nn.Module:
    return spaces.get("micro-darts").random(stream(3, "random")).build(1, 10, channels=8)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "everything": (Everything, (1, 3, 22, 19)),
    "everything, batch 3": (Everything, (3, 3, 22, 19)),
    "designed": (designed, (1, 1, 28, 28)),
    "resnet18_cifar": (resnet18_cifar, (1, 3, 9, 8)),
    "mobilenet_v2_32": (mobilenet_v2_32, (1, 3, 32, 32)),
}


@cache
def case(name: str) -> tuple[nn.Module, Tensor]:
    """A network with 90 % zeros but in depthwise filters, and batch norms that have seen something; and an input."""
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    module = make()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)
            elif isinstance(part, (nn.Conv2d, nn.Linear)) and part.weight.shape[1] > 1:
                part.weight *= (torch.rand_like(part.weight) < 0.1) * 3
    return module.eval(), torch.randn(shape)


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The exported folder of a network by name, written once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            target = tmp_path_factory.mktemp("package") / "c"
            module, x = case(name)
            export(module, target, example_input=x)
            made[name] = target
        return made[name]

    return folder


def eager(module: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(module).double()(x.double()).numpy()


def assert_agrees(found: np.ndarray, module: nn.Module, x: Tensor) -> None:
    wanted = eager(module, x)
    assert np.isfinite(found).all()
    assert np.abs(found.reshape(wanted.shape) - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def drive(program: Path, folder: Path, module: nn.Module, x: Tensor, tmp_path: Path) -> str:
    """Runs a driver, and compares what it writes with torch."""
    x.numpy().tofile(tmp_path / "x.raw")
    done = call(program, folder / "model.weights", tmp_path / "x.raw", tmp_path / "y.raw")
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-3000:]}"
    assert_agrees(np.fromfile(tmp_path / "y.raw", np.float32), module, x)
    return done.stdout


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    path = tmp_path / "driver.c"
    path.write_text(DRIVER)
    return path


def test_the_networks_use_every_kernel(packages) -> None:
    texts = [(packages(name) / "model.c").read_text() for name in ("everything", "everything, batch 3")]
    files = {path.name for path in Path(export_c.__file__).parent.glob("native/kernels/*.c.in")}
    # the thread pool, and a measurement of the processor
    for file in files - {"run.c.in", "peaks.c.in"}:
        assert any(source(file) in text for text in texts), file


@each_compiler
@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("level", ["-O2", "-O3"])
def test_compiles_without_a_warning(packages, tmp_path, compiler: str, vectors: str, level: str) -> None:
    folder = packages("everything, batch 3")
    for file in ("model", "main"):
        flags = (*STRICT, level, *VECTORS[vectors], "-c", f"-I{folder}")
        build(compiler, tmp_path / f"{file}.o", [folder / f"{file}.c"], flags)


@each_compiler
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_agrees_with_torch_and_keeps_to_its_memory(packages, driver, tmp_path, compiler: str, name: str) -> None:
    folder, (module, x) = packages(name), case(name)
    flags = (*STRICT, "-O1", "-march=native", *SANITIZE, f"-I{folder}")
    program = build(compiler, tmp_path / "driver", [folder / "model.c", driver], flags)
    drive(program, folder, module, x, tmp_path)


@each_compiler
@pytest.mark.slow
def test_scalars_agree_with_torch_and_keep_to_their_memory(packages, driver, tmp_path, compiler: str) -> None:
    folder, (module, x) = packages("everything"), case("everything")
    # without optimisation: it takes gcc minutes to optimise checked scalars
    flags = (*STRICT, "-O0", "-DNW_SCALAR", *SANITIZE, f"-I{folder}")
    program = build(compiler, tmp_path / "driver", [folder / "model.c", driver], flags)
    drive(program, folder, module, x, tmp_path)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.slow
def test_random_networks_keep_to_their_memory(driver, tmp_path, seed: int) -> None:
    module, x = networks.random_network(seed)
    folder = tmp_path / "c"
    export(module, folder, example_input=x)
    compiler = compilers()[seed % len(compilers())]
    vectors = list(VECTORS.values())[seed % 2]
    flags = (*STRICT, "-O1", *vectors, *SANITIZE, f"-I{folder}")
    drive(build(compiler, tmp_path / "driver", [folder / "model.c", driver], flags), folder, module, x, tmp_path)


@each_compiler
@pytest.mark.parametrize("level", ["-O1", "-O3", "-Os"])
def test_the_stack_is_as_large_as_the_header_says(driver, tmp_path, compiler: str, level: str) -> None:
    pool = nn.AvgPool2d(40, 1, 20, count_include_pad=False)
    module, x = (
        nn.Sequential(nn.Conv2d(1, 8, 7, padding=3), nn.ReLU(), pool, nn.GELU()).eval(),
        torch.randn(1, 1, 60, 50),
    )
    folder = tmp_path / "c"
    export(module, folder, example_input=x)
    for vectors in VECTORS.values():
        flags = (*STRICT, level, *vectors, "-DSTACK", f"-I{folder}")
        program = build(compiler, tmp_path / "driver", [folder / "model.c", driver], flags)
        used, told = map(int, drive(program, folder, module, x, tmp_path).split())
        assert 0 < used <= told < 40_000


@pytest.mark.slow
@each_compiler
def test_the_stack_of_every_kernel_is_as_the_header_says(packages, driver, tmp_path, compiler: str) -> None:
    folder, (module, x) = packages("everything"), case("everything")
    for level, vectors in itertools.product(("-O1", "-O3"), VECTORS.values()):
        flags = (*STRICT, level, *vectors, "-DSTACK", f"-I{folder}")
        program = build(compiler, tmp_path / "driver", [folder / "model.c", driver], flags)
        used, told = map(int, drive(program, folder, module, x, tmp_path).split())
        assert 0 < used <= told


@each_compiler
def test_the_object_has_no_state_and_needs_libm_alone(packages, tmp_path, compiler: str) -> None:
    if not shutil.which("nm"):
        pytest.skip("no nm")
    folder = packages("everything")
    flags = (*FAST, "-fno-pie", "-c", f"-I{folder}")
    made = build(compiler, tmp_path / "model.o", [folder / "model.c"], flags)
    symbols = [line.split()[-2:] for line in call("nm", made).stdout.splitlines()]
    assert not [name for kind, name in symbols if kind in "bBdDC"]
    functions = {"check", "class", "message", "prepare", "run"}
    assert {name for kind, name in symbols if kind in "TR"} == {f"model_{each}" for each in functions}
    assert {name for kind, name in symbols if kind == "U"} <= {
        "memcpy",
        "memset",
        "memcmp",
        "memmove",
        "sqrtf",
        "sqrt",
        "logf",
    }


class Library:
    """model.c as a shared object."""

    def __init__(self, folder: Path, target: Path, name: str = "model") -> None:
        flags = (*FAST, "-march=native", "-shared", "-fPIC")
        self.functions = ctypes.CDLL(str(build(compilers()[0], target, [folder / f"{name}.c"], flags)))
        self.run, self.check = self.functions[f"{name}_run"], self.functions[f"{name}_check"]
        header = (folder / f"{name}.h").read_text()
        self.numbers = {key: int(n) for key, n in re.findall(rf"#define {name.upper()}_(\w+) (\d+)", header)}
        listed = re.search(r"enum \{(.*?)\};", header, re.DOTALL)
        assert listed
        self.status = re.findall(r"[A-Z0-9]+_([A-Z_]+)(?= =|,| )", re.sub(r"/\*.*?\*/", "", listed[1]))

    def told(self, status: int) -> str:
        return self.status[status]


def aligned(data: bytes | int, shift: int = 0) -> np.ndarray:
    """Bytes that begin ``shift`` behind a multiple of 64."""
    content = np.frombuffer(bytes(data), np.uint8)
    whole = np.zeros(len(content) + 128, np.uint8)
    start = -whole.ctypes.data % 64 + shift
    whole[start : start + len(content)] = content
    return whole[start : start + len(content)]


def pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def test_weights_are_accepted_only_as_they_were_written(packages, tmp_path) -> None:
    folder = packages("everything")
    library = Library(folder, tmp_path / "model.so")
    content = (folder / "model.weights").read_bytes()
    assert hashlib.sha256(content[64:]).digest() == content[32:64]
    assert library.numbers["WEIGHTS_BYTES"] == len(content)

    def check(data: bytes, size: int | None = None, shift: int = 0) -> str:
        array = aligned(data, shift)
        return library.told(library.check(pointer(array), ctypes.c_size_t(len(data) if size is None else size)))

    def changed(at: int, to: bytes) -> bytes:
        return content[:at] + to + content[at + len(to) :]

    assert check(content) == "OK"
    assert check(content + b"more") == "OK"
    assert library.told(library.check(None, ctypes.c_size_t(0))) == "NULL"
    assert check(content, shift=4) == "MISALIGNED"
    assert check(content, 63) == check(content, len(content) - 1) == "TOO_SHORT"
    assert check(changed(0, b"N W")) == "NO_WEIGHTS"
    assert check(changed(8, content[8:12][::-1])) == "BYTE_ORDER"
    assert check(changed(12, b"\x02")) == "VERSION"
    assert check(changed(16, bytes(8))) == check(changed(40, b"digest")) == "OTHER_NETWORK"
    other = bytes(64) + bytes(len(content) - 64)
    assert check(content[:32] + hashlib.sha256(other[64:]).digest() + other[64:]) == "OTHER_NETWORK"
    rng = np.random.default_rng(0)
    for at in rng.integers(64, len(content), 50):
        assert check(changed(int(at), bytes([content[at] ^ 1 << int(rng.integers(8))]))) == "DAMAGED"
    # what SHA-256 makes of every rest of a block
    for size in range(100, 230):
        assert check(content[:size] + bytes(len(content) - size)) == "DAMAGED"


def test_a_run_refuses_memory_that_does_not_do(packages, tmp_path) -> None:
    folder = packages("everything")
    library = Library(folder, tmp_path / "model.so")
    weights, size = aligned((folder / "model.weights").read_bytes()), library.numbers["ARENA_BYTES"]
    arena, apart = aligned(bytes(size)), aligned(bytes(size), 4)
    x, y = (aligned(bytes(4 * library.numbers[f"{each}_FLOATS"])) for each in ("INPUT", "OUTPUT"))

    def run(w, a, floats, *arrays) -> str:
        return library.told(library.run(pointer(w), pointer(a), ctypes.c_size_t(floats), *map(pointer, arrays)))

    assert run(weights, arena, size, x, y) == "OK"
    for missing in itertools.permutations([None, *([0] * 3)]):
        given = [each if hole is not None else None for each, hole in zip((weights, arena, x, y), missing, strict=True)]
        assert run(*given[:2], size, *given[2:]) == "NULL"
    assert run(weights, apart, size, x, y) == run(aligned(bytes(size), 32), arena, size, x, y) == "MISALIGNED"
    assert run(weights, arena, size - 1, x, y) == "TOO_SHORT"
    assert run(arena, arena, size, x, y) == "NO_WEIGHTS"
    weights[40] ^= 1
    assert run(weights, arena, size, x, y) == "OTHER_NETWORK"
    library.functions.model_message.restype = ctypes.c_char_p
    messages = [library.functions.model_message(i) for i in range(-1, 10)]
    assert messages[0] == messages[-1] == b"unknown status"
    assert len(set(messages)) == len(messages) - 1


def test_threads_share_weights_and_have_arenas_of_their_own(packages, tmp_path) -> None:
    folder, (module, x) = packages("designed"), case("designed")
    library = Library(folder, tmp_path / "model.so")
    weights, size = aligned((folder / "model.weights").read_bytes()), library.numbers["ARENA_BYTES"]
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, *x.shape, generator=generator)
    results = np.zeros((4, library.numbers["OUTPUT_FLOATS"]), np.float32)
    states: list[int] = []

    def work(i: int) -> None:
        arena, image = aligned(bytes(size)), inputs[i].numpy()
        for _ in range(30):
            states.append(
                library.run(
                    pointer(weights), pointer(arena), ctypes.c_size_t(size), pointer(image), pointer(results[i])
                )
            )

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == [0] * 120
    for result, image in zip(results, inputs, strict=True):
        assert_agrees(result, module, image)


CLASSES = ('a "cat"', "what??=", "żółw\\n")


def classifier(*last: nn.Module) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 6 * 4, 3), *last).eval()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("last", [None, nn.Softmax(1), nn.LogSoftmax(1)])
def test_the_program_tells_the_classes_of_a_picture(tmp_path, batch: int, last: nn.Module | None) -> None:
    if not shutil.which("make"):
        pytest.skip("no make")
    folder = tmp_path / "c"
    module = classifier(*([last] if last else []))
    export(module, folder, example_input=torch.zeros(batch, 3, 8, 6), classes=CLASSES, preprocessing=PICTURE)
    made = call("make", "CFLAGS=-O1 -Werror", f"CC={compilers()[0]}", folder=folder)
    assert made.returncode == 0, made.stderr
    images = np.random.default_rng(0).integers(0, 256, (batch, 8, 6, 3), dtype=np.uint8)
    images.tofile(folder / "image.raw")
    done = call("./classify", "model.weights", "image.raw", "2", folder=folder)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("image ")]
    assert re.fullmatch(r"\d+\.\d{3} ms", lines.pop())
    x = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    mean, std = (torch.tensor(part).double()[:, None, None] for part in (PICTURE.mean, PICTURE.std))
    scores = torch.from_numpy(eager(classifier(), (x - mean) / std))
    for i, wanted in enumerate(scores.softmax(1)):
        found = [line.split("  ", 1) for line in lines[3 * i : 3 * i + 3]]
        assert [name for _, name in found] == [CLASSES[int(c)] for c in wanted.argsort(descending=True)]
        assert [float(p) for p, _ in found] == pytest.approx(sorted(wanted.tolist(), reverse=True), abs=2e-6)


def test_the_program_refuses_other_files(tmp_path) -> None:
    folder = tmp_path / "c"
    export(classifier(), folder, example_input=torch.zeros(1, 3, 8, 6), preprocessing=PICTURE)
    program = build(compilers()[0], folder / "classify", [folder / "main.c", folder / "model.c"], STRICT)
    weights = (folder / "model.weights").read_bytes()
    for name, content in (
        ("right", bytes(144)),
        ("short", bytes(143)),
        ("long", bytes(145)),
        ("changed", weights[:-1] + b"x"),
        ("cut", weights[:-1]),
    ):
        (folder / name).write_bytes(content)
    assert call(program, "model.weights", "right", folder=folder).returncode == 0
    for words, told in (
        (("model.weights", "short"), "short: must have 144 bytes, has fewer"),
        (("model.weights", "long"), "long: must have 144 bytes, has more"),
        (("model.weights", "none"), "none: cannot be opened"),
        (("changed", "right"), "changed: the weights are not as they were written"),
        (("cut", "right"), f"cut: must have {len(weights)} bytes, has fewer"),
        (("model.weights",), "usage: classify WEIGHTS IMAGE [REPEATS]"),
        (("model.weights", "right", "0"), "usage: classify WEIGHTS IMAGE [REPEATS]"),
    ):
        done = call(program, *words, folder=folder)
        assert (done.returncode, done.stdout, done.stderr.strip()) == (1, "", told)


@pytest.mark.parametrize("preprocessing", [None, Preprocessing((1.0, 0.0, 2.0), (1.0, 2.0, 0.5), None)])
def test_data_that_are_no_picture_are_floats(tmp_path, preprocessing: Preprocessing | None) -> None:
    module, x = classifier(), torch.randn(1, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "c"
    export(module, folder, example_input=x, classes=["0", "1", "2"], preprocessing=preprocessing)
    program = build(compilers()[0], folder / "classify", [folder / "main.c", folder / "model.c"], STRICT)
    x.numpy().tofile(folder / "x.raw")
    done = call(program, folder / "model.weights", folder / "x.raw")
    if preprocessing:
        mean, std = (torch.tensor(part)[:, None, None] for part in (preprocessing.mean, preprocessing.std))
        x = (x - mean) / std
    wanted = torch.from_numpy(eager(module, x)).softmax(1)[0]
    found = {int(name): float(p) for p, name in (line.split() for line in done.stdout.splitlines())}
    assert [found[c] for c in range(3)] == pytest.approx(wanted.tolist(), abs=2e-6)


class TwoAndTwo(nn.Module):
    """Two inputs, two outputs, one of them no row of scores."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.conv(x)
        return z * y[:, :, None, None], y.softmax(1)


def test_any_network_runs_on_files_of_floats(tmp_path) -> None:
    torch.manual_seed(0)
    module, inputs = TwoAndTwo().eval(), (torch.randn(2, 2, 9, 7), torch.randn(2, 4))
    folder = tmp_path / "c"
    export(capture(module, inputs), folder, name="pair_2")
    flags = (*STRICT, *SANITIZE)
    program = build(compilers()[0], folder / "apply", [folder / "main.c", folder / "pair_2.c"], flags)
    for i, x in enumerate(inputs):
        x.numpy().tofile(folder / f"in{i}")
    words = ["pair_2.weights", "in0", "in1", "out0", "out1"]
    assert "usage: apply WEIGHTS INPUT0 INPUT1 OUTPUT0 OUTPUT1" in call(program, *words[:-1], folder=folder).stderr
    done = call(program, *words, folder=folder)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = module.double()(*(x.double() for x in inputs))
    for i, y in enumerate(wanted):
        found = np.fromfile(folder / f"out{i}", np.float32).reshape(y.shape)
        np.testing.assert_allclose(found, y.numpy(), rtol=1e-5, atol=1e-6)


def test_two_networks_stand_in_one_program_also_of_cpp(tmp_path) -> None:
    for name in ("first", "second"):
        export(classifier(), tmp_path / name, example_input=torch.zeros(1, 3, 8, 6), name=name)
    user = """
    #include "first.h"
    #ifndef NW_ARENA_BYTES
    #error "the short names are missing"
    #endif
    typedef char as_long[NW_ARENA_BYTES == FIRST_ARENA_BYTES && NW_STACK_BYTES == FIRST_STACK_BYTES ? 1 : -1];
    #include "second.h"
    #if defined(NW_ARENA_BYTES) || defined(NW_STACK_BYTES)
    #error "the short names are ambiguous"
    #endif
    int main(void) { return first_check(0, 0) == FIRST_NULL && second_check(0, 0) == SECOND_NULL ? 0 : 1; }
    """
    include = [f"-I{tmp_path / name}" for name in ("first", "second")]
    objects = [
        build(compilers()[0], tmp_path / f"{name}.o", [tmp_path / name / f"{name}.c"], (*STRICT, *include, "-c"))
        for name in ("first", "second")
    ]
    for compiler, ending, standard in ((compilers()[0], "c", "-std=c99"), ("g++", "cpp", "-std=c++11")):
        if not shutil.which(compiler):
            continue
        (tmp_path / f"user.{ending}").write_text(user)
        flags = (standard, "-Wall", "-Wextra", "-Werror", "-pedantic", *include)
        assert call(build(compiler, tmp_path / "user", [tmp_path / f"user.{ending}", *objects], flags)).returncode == 0


@pytest.mark.slow
def test_cmake_builds_the_program_and_a_library(tmp_path) -> None:
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    folder = tmp_path / "c"
    export(classifier(), folder, example_input=torch.zeros(1, 3, 8, 6))
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.15)\nproject(user C)\nadd_subdirectory(c)\n"
        "add_executable(user user.c)\ntarget_link_libraries(user PRIVATE model)\n"
    )
    (tmp_path / "user.c").write_text('#include "model.h"\nint main(void) { return model_check(0, 0) != MODEL_NULL; }\n')
    for source_folder, program in ((folder, "classify"), (tmp_path, "user")):
        made = tmp_path / f"build-{program}"
        for words in (("-S", source_folder, "-B", made), ("--build", made)):
            done = call("cmake", *words)
            assert done.returncode == 0, done.stderr
        assert (made / program).is_file()
    assert call(tmp_path / "build-user" / "user").returncode == 0


def test_fast_math_is_refused(packages) -> None:
    done = call(compilers()[0], "-ffast-math", "-fsyntax-only", packages("designed") / "model.c")
    assert done.returncode != 0
    assert "-ffast-math makes wrong results" in done.stderr


def test_nothing_is_overwritten_and_nothing_is_left_half_done(tmp_path, monkeypatch) -> None:
    x = torch.zeros(1, 3, 8, 6)
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    for target in (folder, folder / "mine"):
        with pytest.raises(UserError, match="there is something already"):
            export(classifier(), target, example_input=x)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert [path.name for path in folder.iterdir()] == ["mine"]
    (folder / "mine").unlink()  # an empty folder may become the package

    write, written = storage.write_bytes, []

    def full(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise UserError("the disk is full")
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(UserError, match="the disk is full"):
        export(classifier(), folder, example_input=x)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert not list(folder.iterdir())
    monkeypatch.undo()
    files = export(classifier(), folder, example_input=x)
    assert sorted(files) == sorted(folder.iterdir())
    again = export(classifier(), tmp_path / "d" / "e", example_input=x)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


def test_names_of_modules_stay_within_comments(tmp_path) -> None:
    graph = capture(nn.Conv2d(1, 2, 3).eval(), torch.zeros(1, 1, 5, 5))
    graph.nodes[0].path = '*/\n#error "escaped"\n/* ??/'
    export(graph, tmp_path / "c")
    build(compilers()[0], tmp_path / "model.o", [tmp_path / "c" / "model.c"], (*STRICT, "-c"))


@pytest.mark.parametrize(
    ("told", "options"),
    [
        ("name must be a C name", {"name": "2d"}),
        ("name must be a C name", {"name": "main"}),
        ("name must be a C name", {"name": "nw_run"}),
        ("classes must name every score of the network: 3, got 2", {"classes": ["a", "b"]}),
        ("a name in classes must have at most 1000 bytes", {"classes": ["a", "b", "c" * 1001]}),
        ("mean must hold one number for each of 3 channels, got 1", {"preprocessing": Preprocessing((0.5,), (0.5,))}),
    ],
)
def test_arguments_are_checked(tmp_path, told: str, options: dict) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        export(classifier(), tmp_path / "c", example_input=torch.zeros(1, 3, 8, 6), **options)
    assert not list(tmp_path.iterdir())


def test_arguments_that_contradict_the_network(tmp_path) -> None:
    graph = capture(classifier(), torch.zeros(1, 3, 8, 6))
    maps = capture(nn.Conv2d(3, 2, 3).eval(), torch.zeros(1, 3, 8, 6))
    rows = capture(nn.Linear(6, 2).eval(), torch.zeros(1, 6))
    for network, told, options in (
        (classifier(), "example_input must be given", {}),
        (graph, "example_input must be None", {"example_input": torch.zeros(1, 3, 8, 6)}),
        (maps, "classes must be None", {"classes": ["a", "b"]}),
        (maps, "preprocessing must be None", {"preprocessing": PICTURE}),
        (rows, "preprocessing must be None", {"preprocessing": PICTURE}),
    ):
        with pytest.raises(ValueError, match=told):
            export(network, tmp_path / "c", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("told", "mean", "std", "scale"),
    [
        ("std must hold one number a channel", (0.0, 0.0), (1.0,), 255.0),
        ("must be finite", (math.nan,), (1.0,), 255.0),
        ("std must be > 0, got 0.0", (0.0,), (0.0,), 255.0),
        ("scale must be > 0 or None, got -1", (0.0,), (1.0,), -1.0),
    ],
)
def test_preprocessing_is_checked(told: str, mean: tuple, std: tuple, scale: float) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Preprocessing(mean, std, scale)
