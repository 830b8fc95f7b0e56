"""The C package against float64 torch: strict compilers, sanitizers, memory that ends where it was said to end."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import math
import platform
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from c_package import (
    DRIVER,
    FAST,
    NETWORKS,
    SANITIZE,
    STRICT,
    VECTORS,
    Library,
    aligned,
    assert_agrees,
    build,
    call,
    case,
    compilers,
    eager,
    pointer,
)
from strips_everywhere import force
from torch import Tensor, nn

from netwright import storage
from netwright.console import UserError
from netwright.deploy import compile, export_c
from netwright.deploy.export_c import Preprocessing, export
from netwright.deploy.graph import capture
from netwright.deploy.native.machine import Machine
from netwright.deploy.native.program import source

PICTURE = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))

# functions of other libraries are found before the network runs: finding them takes 3 KB of stack
STACK = ("-DSTACK", "-Wl,-z,now")
each_compiler = pytest.mark.parametrize("compiler", ["gcc", "clang"])


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
@pytest.mark.parametrize("vectors", ["native", "generic", pytest.param("scalar", marks=pytest.mark.slow)])
def test_compiles_without_a_warning(packages, tmp_path, compiler: str, vectors: str) -> None:
    """At the usual level; the test of the stack below compiles every kernel at others, as strictly."""
    folder = packages("everything, batch 3")
    for file in ("model", "main"):
        flags = (*STRICT, "-O2", *VECTORS[vectors], "-c", f"-I{folder}")
        build(compiler, tmp_path / f"{file}.o", [folder / f"{file}.c"], flags)


@each_compiler
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_agrees_with_torch_and_keeps_to_its_memory(packages, driver, tmp_path, compiler: str, name: str) -> None:
    folder, (module, x) = packages(name), case(name)
    flags = (*STRICT, "-O0", "-march=native", *SANITIZE, f"-I{folder}")
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


def test_more_than_single_precision_between_operations(packages, driver, tmp_path) -> None:
    """As on 32-bit x86 without SSE."""
    if platform.machine() not in {"x86_64", "AMD64"}:
        pytest.skip("no x87")
    folder, (module, x) = packages("small"), case("small")
    flags = (*STRICT, "-O1", "-mfpmath=387", f"-I{folder}")
    drive(build("gcc", tmp_path / "driver", [folder / "model.c", driver], flags), folder, module, x, tmp_path)


@pytest.mark.parametrize("unit", [4, 16])
def test_kernels_for_other_vectors_run_everywhere(driver, tmp_path, unit: int) -> None:
    module, x = case("small")
    folder = tmp_path / "c"
    export(module, folder, example_input=x, machine=Machine(unit))
    for vectors in VECTORS.values():
        flags = (*STRICT, "-O1", *vectors, f"-I{folder}")
        program = build(compilers()[0], tmp_path / "driver", [folder / "model.c", driver], flags)
        drive(program, folder, module, x, tmp_path)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.slow
def test_random_networks_keep_to_their_memory(driver, tmp_path, seed: int) -> None:
    module, x = networks.random_network(seed)
    folder = tmp_path / "c"
    export(module, folder, example_input=x)
    compiler = compilers()[seed % len(compilers())]
    vectors = list(VECTORS.values())[seed % 2]
    flags = (*STRICT, "-O0", *vectors, *SANITIZE, f"-I{folder}")
    drive(build(compiler, tmp_path / "driver", [folder / "model.c", driver], flags), folder, module, x, tmp_path)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))])
def test_strips_keep_to_their_memory(driver, tmp_path, monkeypatch, seed: int) -> None:
    force(monkeypatch, 1 + seed % 4)
    module, x = networks.random_rows(seed)
    folder = tmp_path / "c"
    export(module, folder, example_input=x, machine=Machine((8, 16, 4)[seed % 3], l2_bytes=(1 << 20, 4096)[seed % 2]))
    assert "in strips of" in (folder / "model.c").read_text()
    compiler = compilers()[seed % len(compilers())]
    vectors = list(VECTORS.values())[seed % 2]
    flags = (*STRICT, "-O0", *vectors, *SANITIZE, f"-I{folder}")
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
        flags = (*STRICT, level, *vectors, *STACK, f"-I{folder}")
        program = build(compiler, tmp_path / "driver", [folder / "model.c", driver], flags)
        used, told = map(int, drive(program, folder, module, x, tmp_path).split())
        assert 0 < used <= told < 40_000


@pytest.mark.slow
@each_compiler
def test_the_stack_of_every_kernel_is_as_the_header_says(packages, driver, tmp_path, compiler: str) -> None:
    folder, (module, x) = packages("everything"), case("everything")
    for level, vectors in itertools.product(("-O1", "-O3"), VECTORS.values()):
        flags = (*STRICT, level, *vectors, *STACK, f"-I{folder}")
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


def test_weights_are_accepted_only_as_they_were_written(packages, tmp_path) -> None:
    folder = packages("small")
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
    folder = packages("small")
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
    folder, (module, x) = packages("small"), case("small")
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


def test_a_compiled_network_is_exported_like_its_module(tmp_path) -> None:
    x = torch.zeros(1, 3, 8, 6)
    plain = export(classifier(), tmp_path / "plain", example_input=x)
    compiled = export(compile(classifier(), x, backend="torch"), tmp_path / "compiled")
    assert [file.read_bytes() for file in plain] == [file.read_bytes() for file in compiled]


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
