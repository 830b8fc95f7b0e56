"""A network as one C file and one block of tables; collects kernels, tables and steps while the network is walked.

The C text depends on shapes and on the choice of kernels alone; weights and patterns lie in the tables, so two networks
of one architecture share a compiled object.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources

import numpy as np

from netwright.deploy.graph.ir import Activation, Conv, Linear
from netwright.deploy.native.layout import Geometry, round_up
from netwright.deploy.native.pack import ALIGN

MAGIC_BYTES = 16


def source(name: str) -> str:
    """The text of a file of ``kernels/``."""
    return resources.files("netwright.deploy.native").joinpath("kernels", name).read_text()


def activation(act: Activation) -> str:
    """The macro body of an activation.

    Example:
        >>> activation(Activation("clamp", 0.0, 6.0))
        'nw_act_clamp((v), 0.0f, 6.0f)'
    """
    return "(v)" if not act else f"nw_act_{act.kind}((v), {number(act.low)}, {number(act.high)})"


def number(value: float) -> str:
    """A float as a C constant that is exactly itself."""
    if value in (float("inf"), float("-inf")):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = repr(float(np.float32(value)))
    return f"{text}f" if any(mark in text for mark in ".e") else f"{text}.0f"


@dataclass(frozen=True)
class Place:
    """Where a value is, or those rows of an image of it that there are.

    Attributes:
        at: C expression of its first float.
        geo: How its floats lie; its height counts all rows, whether they are there or not.
        first: The row that lies first.
        end: The row behind the last; None if all are there, and all images.
    """

    at: str
    geo: Geometry
    first: int = 0
    end: int | None = None

    @property
    def below(self) -> int:
        """The row behind the last one that is there."""
        return self.geo.h if self.end is None else self.end

    def row(self, row: int) -> str:
        """C expression of the first float of a row of the first image.

        Example:
            >>> Place("(m + 64)", Geometry(1, 8, 56, 10, 160), first=20, end=30).row(24)
            '(m + 64) + 40'
        """
        return f"{self.at} + {(row - self.first) * self.geo.w}"

    def image(self, number: int) -> Place:
        """One image of a value that is whole."""
        return Place(f"{self.at} + {number * self.geo.h * self.geo.w}", replace(self.geo, n=1))


def bias_of(op: Conv | Linear) -> np.ndarray:
    """One number a row, zeros where the network has none."""
    return np.zeros(len(op.weight), np.float32) if op.bias is None else op.bias.astype(np.float32)


def by_thread(values: Sequence[object]) -> str:
    """The C expression that is ``values[id]``.

    Example:
        >>> by_thread([0, 7]), by_thread([3, 3])
        ('id == 0 ? 0 : 7', '3')
    """
    *others, last = values
    if all(value == last for value in others):
        return str(last)
    return "".join(f"id == {number} ? {value} : " for number, value in enumerate(others)) + str(last)


@dataclass
class Step:
    """One entry of the schedule.

    Attributes:
        path: Module path in the source network.
        what: The kernel, for profiles.
        body: Statements; ``t`` are the tables, ``m`` the arena, ``id`` the thread.
        kept: Multiply-adds that are done.
        single: Whether only thread 0 has work.
    """

    path: str
    what: str
    body: list[str]
    kept: int = 0
    single: bool = False


@dataclass
class Program:
    """What has been collected.

    Attributes:
        unit: Floats in a block, :data:`NW_U`.
        lanes: Floats in a vector of the compiler.
        threads: Threads that run every step.
        headers: Files of ``kernels/`` that stand before all kernels.
    """

    unit: int
    lanes: int
    threads: int
    headers: tuple[str, ...] = ("simd.h.in", "lanes.h.in", "activations.h.in", "table.h.in", "lower.c.in")
    steps: list[Step] = field(default_factory=list)
    _kernels: dict[str, str] = field(default_factory=dict)
    _tables: list[bytes] = field(default_factory=list)
    _shapes: dict[bytes, str] = field(default_factory=dict)

    def kernel(self, file: str, base: str, **macros: object) -> str:
        """The name of the function that a kernel file gives under these macros; written out once.

        ``EACH=n`` writes ``NW_EACH(F)`` as F(0) ... F(n-1) and ``NW_LAST`` as n-1.
        """
        told = "\n".join(f"{key}={value}" for key, value in sorted(macros.items()))
        name = f"nw_{base}_{hashlib.sha256(f'{file}{told}'.encode()).hexdigest()[:8]}"
        if name not in self._kernels:
            defines = {"NAME": name}
            for key, value in macros.items():
                if key == "EACH":
                    count = int(str(value))
                    defines |= {"EACH(F)": " ".join(f"F({i})" for i in range(count)), "LAST": str(count - 1)}
                elif isinstance(value, Activation):
                    defines[f"{key}(v)"] = activation(value)
                elif key == "X":
                    defines["X(k)"] = str(value)
                else:
                    defines[key] = str(value)
            front = "\n".join(f"#define NW_{key} {value}" for key, value in defines.items())
            back = "\n".join(f"#undef NW_{re.split('[(]', key)[0]}" for key in defines)
            self._kernels[name] = f"{front}\n{source(file)}{back}\n"
        return name

    def table(self, data: bytes | np.ndarray) -> str:
        """Keeps data; the C expression of its address (``const char *``)."""
        raw = data if isinstance(data, bytes) else np.ascontiguousarray(data).tobytes()
        self._tables.append(raw)
        return f"NW_T({len(self._tables) - 1})"

    def array(self, data: np.ndarray) -> str:
        """Keeps an array; the C expression of a pointer to its first element."""
        kinds = {"float32": "float", "int32": "int32_t", "uint16": "uint16_t"}
        return f"((const {kinds[data.dtype.name]} *)(const void *){self.table(data)})"

    def places(self, numbers: Sequence[int] | np.ndarray) -> str:
        """Keeps int32 numbers that depend on shapes alone, once for all who ask; C expression as of :meth:`array`."""
        data = np.asarray(numbers, np.int32).ravel()
        if (key := data.tobytes()) not in self._shapes:
            self._shapes[key] = self.array(data)
        return self._shapes[key]

    def tables(self) -> bytes:
        """All tables behind a directory of int64 byte offsets, each at a multiple of 64 bytes."""
        at = round_up(8 * len(self._tables), ALIGN)
        places, body = [], bytearray()
        for raw in self._tables:
            places.append(at + len(body))
            body += raw + bytes(round_up(len(raw), ALIGN) - len(raw))
        front = np.array(places, np.int64).tobytes()
        # the kernels read four offsets at a time
        return front + bytes(at - len(front)) + bytes(body) + bytes(ALIGN)

    def text(self, inputs: Iterable[str], outputs: Iterable[str]) -> str:
        """The C file, without the thread pool.

        Args:
            inputs: Statements that bring the caller's arrays ``in[i]`` into the arena ``m``.
            outputs: Statements that bring results from the arena to ``out[i]``.
        """
        parts = [
            f"#ifndef NW_VL\n#define NW_VL {self.lanes}\n#endif\n#define NW_U {self.unit}",
            *(source(name) for name in self.headers),
            "#define NW_T(i) (t + ((const int64_t *)(const void *)t)[i])",
            *self._kernels.values(),
        ]
        for place, step in enumerate(self.steps):
            body = "\n".join(f"  {line}" for line in step.body)
            guard = "  if (id) return;\n" if step.single and self.threads > 1 else ""
            parts.append(
                f"/* {step.path or 'network'}: {step.what} */\n"
                f"static void nw_step_{place}(const char *t, float *m, int id) {{\n"
                f"{guard}  (void)t, (void)m, (void)id;\n{body}\n}}"
            )
        table = ", ".join(f"nw_step_{place}" for place in range(len(self.steps)))
        parts.append(
            f"#define NW_STEPS {len(self.steps)}\n#define NW_THREADS {self.threads}\n"
            "typedef void nw_step(const char *t, float *m, int id);\n"
            f"static nw_step *const nw_steps[NW_STEPS + 1] = {{{table}{', ' if table else ''}0}};"
        )
        if self.threads > 1:
            apart = [
                not (step.single and later.single) for step, later in zip(self.steps, self.steps[1:], strict=False)
            ]
            told = ", ".join(str(int(each)) for each in [*apart, True])
            parts.append(f"/* whether a barrier stands behind a step */\nstatic const char nw_apart[] = {{{told}}};")
        for name, lines, argument in (
            ("nw_enter", inputs, "const float *const *in"),
            ("nw_leave", outputs, "float *const *out"),
        ):
            body = "\n".join(f"  {line}" for line in lines)
            parts.append(f"static void {name}(const char *t, float *m, {argument}) {{\n  (void)t, (void)m;\n{body}\n}}")
        return "\n\n".join(parts) + "\n"
