"""Compiles and runs C packages of ``netwright.deploy.export_c``, and networks for them."""

from __future__ import annotations

import copy
import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from netwright.nn.mbconv import mobilenet_v2_32
from netwright.nn.resnet import resnet18_cifar
from netwright.search import spaces
from netwright.seeding import stream

STRICT = ("-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic")
FAST = (*STRICT, "-O3", "-ffp-contract=fast", "-fno-math-errno")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
TOLERANCE = 1e-5
VECTORS = {"native": ("-march=native",), "generic": (), "scalar": ("-DNW_SCALAR",)}

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


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, 12, 5, 2, 2, groups=12), nn.Conv2d(12, 16, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(16 * 6 * 5, 4),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "everything": (Everything, (1, 3, 22, 19)),
    "everything, batch 3": (Everything, (3, 3, 22, 19)),
    "small": (small, (1, 3, 16, 13)),
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


def eager(module: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        return copy.deepcopy(module).double()(x.double()).numpy()


def assert_agrees(found: np.ndarray, module: nn.Module, x: Tensor) -> None:
    wanted = eager(module, x)
    assert np.isfinite(found).all()
    assert np.abs(found.reshape(wanted.shape) - wanted).max() <= TOLERANCE * np.abs(wanted).max()
