"""The steps of a convolution: copies of its input, then a sparse, dense or depthwise kernel, band by band."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from netwright.deploy.graph.ir import Conv
from netwright.deploy.native import pack
from netwright.deploy.native.choose import Choice, sets
from netwright.deploy.native.layout import HEAD, Geometry, Lowering, blocks, cuts, lower
from netwright.deploy.native.program import Place, Program, Step, bias_of

DENSE_ROWS = 8


@dataclass(frozen=True)
class Convolved:
    """A convolution with everything that is decided about it.

    Attributes:
        op: The convolution.
        path: Its module path.
        x: Input.
        y: Output.
        residual: What is added, or None.
        choice: How it is run.
    """

    op: Conv
    path: str
    x: Place
    y: Place
    residual: Place | None
    choice: Choice

    def plan(self, unit: int) -> Lowering:
        """Its copies."""
        return lower(self.op, self.x.geo, self.y.geo, kind=self.choice.kind, unit=unit, band=self.choice.band)


def scratch_floats(layer: Convolved, program: Program) -> int:
    """Scratch memory of one thread: copies, and partial sums of a block."""
    plan = layer.plan(program.unit)
    partial = 0
    if layer.choice.chunks > 1:
        # the last band may be cut into larger blocks than the others
        partial = len(layer.op.weight) * min(layer.choice.most, plan.vectors) * program.unit
    return plan.scratch(layer.x.geo.c) + partial + 16


def emit(layer: Convolved, program: Program, scratch: str) -> None:
    """Adds the steps of a convolution that is not depthwise.

    Args:
        layer: What to run.
        program: Where the steps go.
        scratch: Expression of the scratch memory of thread ``id``.
    """
    plan = layer.plan(program.unit)
    kernel = _Dense(layer, plan, program) if layer.choice.dense else _Sparse(layer, plan, program)
    body = [f"float *s = {scratch};", f"float *partial = s + {plan.scratch(layer.x.geo.c)};", "(void)s, (void)partial;"]
    body += kernel.declarations
    fillings = list(_fillings(plan, layer.y.geo))
    shares = _shares(len(fillings), program.threads)
    if plan.kind == "direct":
        body += _direct(layer, plan, program, kernel)
    elif plan.copies:
        body.append(f"const int32_t *copies = {program.array(np.array(plan.copies, np.int32).ravel())};")
        for share, (first, last) in enumerate(shares):
            lines = []
            for filling in fillings[first:last]:
                lines += ["{", *_filled(layer, plan, program, kernel, filling), "}"]
            body += lines if program.threads == 1 else [f"if (id == {share}) {{", *lines, "}"]
    kept = int(np.count_nonzero(layer.op.weight)) if not layer.choice.dense else layer.op.weight.size
    program.steps.append(Step(layer.path, kernel.name, body, kept * layer.y.geo.pixels))


@dataclass(frozen=True)
class _Filling:
    """One filling of the scratch memory: output rows from ``first`` of an image; ``last`` if no pixel comes after."""

    image: int
    first: int
    rows: int
    last: bool


def _fillings(plan: Lowering, target: Geometry) -> Iterator[_Filling]:
    images, rows = (1, target.n * target.h) if plan.kind == "taps" else (target.n, target.h)
    for image in range(images):
        for first in range(0, rows, plan.band):
            here = min(plan.band, rows - first)
            yield _Filling(image, first, here, image == images - 1 and first + here == rows)


def _shares(number: int, shares: int) -> list[tuple[int, int]]:
    bounds = [round(number * share / shares) for share in range(shares + 1)]
    return list(itertools.pairwise(bounds))


def _filled(layer: Convolved, plan: Lowering, program: Program, kernel: _Kernel, filling: _Filling) -> list[str]:
    """Copies for one band and the kernel over its blocks."""
    x, y = layer.x.geo, layer.y.geo
    (sy, sx), taps = plan.stride, plan.kind == "taps"
    height = filling.rows + (0 if taps else plan.rows - plan.band)
    source = f"{layer.x.at} + {filling.image * x.h * x.w}" if not taps else layer.x.at
    out_h = y.h if taps else 1 << 30
    lines = (
        [_flat(layer, plan, program)]
        if _is_flat(layer, plan)
        else [
            f"nw_lower(s, {source}, {x.plane}, {x.c}, {x.h}, {x.w}, copies, {len(plan.copies)}, {plan.plane}, "
            f"{plan.pitch}, {plan.width}, {height}, {filling.first}, {out_h}, {sy}, {sx});"
        ]
    )
    start = (filling.image * y.h * y.w if not taps else 0) + filling.first * y.w
    unit = program.unit
    vectors = filling.rows * plan.per_row if plan.per_row else -(-filling.rows * y.w // unit)
    tail = 0
    if not filling.last:  # what lies behind belongs to another band
        tail = y.w % unit if plan.per_row else filling.rows * y.w % unit
    for begin, size in cuts(plan, vectors, layer.choice.most):
        part = tail if begin + size == vectors else 0
        if plan.per_row:
            rows, columns = np.divmod(np.arange(begin, begin + size), plan.per_row)
            where: np.ndarray | None = np.append(rows * y.w + columns * unit, part).astype(np.int32)
            # In scratch, blocks lie side by side only within a row of the copy.
            source_at = int(begin // plan.per_row * plan.pitch + begin % plan.per_row * unit)
            lines.append(kernel.call(size, f"s + {source_at}", start, where))
        else:
            where = np.array([part], np.int32) if part else None
            lines.append(kernel.call(size, f"s + {begin * unit}", start + begin * unit, where))
    return lines


def _is_flat(layer: Convolved, plan: Lowering) -> bool:
    """Whether every copy is the whole input, shifted by no more floats than lie between buffers."""
    x, y = layer.x.geo, layer.y.geo
    same = plan.kind == "taps" and plan.stride == (1, 1) and (x.h, x.w) == (y.h, y.w) and plan.bands == 1
    return same and max(abs(row * x.w + column) for row, column in plan.copies) <= HEAD


def _flat(layer: Convolved, plan: Lowering, program: Program) -> str:
    """The call that makes shifted and masked copies."""
    x, unit = layer.x.geo, program.unit
    row, column = np.divmod(np.arange(plan.vectors * unit) % (x.h * x.w), x.w)
    inside = [(row + dy >= 0) & (row + dy < x.h) & (column + dx >= 0) & (column + dx < x.w) for dy, dx in plan.copies]
    mask = np.where(np.stack(inside), np.int32(-1), np.int32(0)).view(np.float32)
    shifts = np.array([dy * x.w + dx for dy, dx in plan.copies], np.int32)
    return (
        f"nw_lower_flat(s, {layer.x.at}, {x.plane}, {x.c}, {program.array(shifts)}, {program.array(mask)}, "
        f"{len(plan.copies)}, {plan.plane}, {plan.vectors});"
    )


def _direct(layer: Convolved, plan: Lowering, program: Program, kernel: _Kernel) -> list[str]:
    """Blocks of a 1x1 convolution, equal ones in a loop; threads share the blocks."""
    unit, lines = program.unit, []
    sizes = blocks(plan.vectors, layer.choice.most)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    for share, (first, last) in enumerate(_shares(len(sizes), program.threads)):
        here = []
        at = first
        while at < last:
            run = at
            while run < last and sizes[run] == sizes[at]:
                run += 1
            begin, step = int(starts[at]) * unit, sizes[at] * unit
            here.append(f"for (int32_t p = {begin}; p < {int(starts[run]) * unit}; p += {step}) {{")
            here += [kernel.call(sizes[at], f"{layer.x.at} + p", "p", None), "}"]
            at = run
        lines += here if program.threads == 1 else [f"if (id == {share}) {{", *here, "}"]
    return lines


class _Kernel:
    """Makes calls of a kernel over one block of pixels."""

    name: str
    declarations: list[str]

    def call(self, size: int, x: str, start: int | str, where: np.ndarray | None) -> str:
        """The call over ``size`` blocks that begin at ``x`` in scratch or input and at ``start`` in the output."""
        raise NotImplementedError


class _Sparse(_Kernel):
    def __init__(self, layer: Convolved, plan: Lowering, program: Program):
        self.layer, self.plan, self.program = layer, plan, program
        op, planes = layer.op, layer.x.geo.plane
        channels = np.arange(layer.x.geo.c)

        def offset_of(ky: int, kx: int) -> np.ndarray:
            return np.array([plan.offset(int(c), ky, kx, planes) for c in channels], np.int64)

        found = pack.entries(op.weight, op.groups, offset_of)
        chunks = layer.choice.chunks
        self.wide = not pack.fits_16_bits(found, layer.x.geo.c, chunks, program.unit)
        table = pack.sparse_table(found, layer.x.geo.c, chunks, program.unit, wide=self.wide)
        self.name = f"sparse {plan.kind}, {layer.choice.most} blocks, {chunks} chunks"
        self.declarations = [
            f"const char *table = {program.table(table)};",
            f"const float *bias = {program.array(bias_of(layer.op))};",
        ]

    def call(self, size: int, x: str, start: int | str, where: np.ndarray | None) -> str:
        layer, plan = self.layer, self.plan
        place = "(k) * NW_U"
        if plan.kind == "phased" and plan.per_row <= size:
            place = f"(k) / {plan.per_row} * {plan.pitch} + (k) % {plan.per_row} * NW_U"
        name = self.program.kernel(
            "spmm.c.in",
            f"spmm_{size}",
            NV=size,
            EACH=size,
            SETS=sets(size),
            WIDE=int(self.wide),
            RESIDUAL=int(layer.residual is not None),
            ROWS=int(bool(plan.per_row)),
            X=f"({place})",
            ACT=layer.op.act,
        )
        y, r = layer.y, layer.residual
        residual = f"{r.at} + {start}, {r.geo.plane}" if r else "0, 0"
        places = self.program.array(where) if where is not None else "0"
        return f"{name}(table, {x}, {y.at} + {start}, {y.geo.plane}, bias, {residual}, {places}, partial);"


class _Dense(_Kernel):
    def __init__(self, layer: Convolved, plan: Lowering, program: Program):
        self.layer, self.plan, self.program = layer, plan, program
        op, x = layer.op, layer.x.geo
        rows, channels, height, width = op.weight.shape
        taps = [plan.offset(c, ky, kx, x.plane) for c in range(channels) for ky in range(height) for kx in range(width)]
        self.inputs = len(taps)
        weight = pack.dense_rows(op.weight.reshape(rows, -1), DENSE_ROWS)
        self.name = f"dense {plan.kind}"
        self.declarations = [
            f"const int32_t *taps = {program.array(np.array(taps, np.int32))};",
            f"const float *weight = {program.array(weight)};",
            f"const float *bias = {program.array(bias_of(layer.op))};",
        ]

    def call(self, size: int, x: str, start: int | str, where: np.ndarray | None) -> str:
        layer, calls = self.layer, []
        rows = len(layer.op.weight)
        y, r = layer.y, layer.residual
        places = self.program.array(where) if where is not None else "0"
        for height in sorted({DENSE_ROWS, rows % DENSE_ROWS} - {0}, reverse=True):
            first, last = (0, rows - rows % DENSE_ROWS) if height == DENSE_ROWS else (rows - height, rows)
            if first == last:
                continue
            name = self.program.kernel(
                "dense.c.in",
                f"dense_{height}_{size}",
                R=height,
                NV=size,
                RESIDUAL=int(r is not None),
                ROWS=int(bool(self.plan.per_row)),
                ACT=layer.op.act,
            )
            residual = f"{r.at} + {start} + (ptrdiff_t)o * {r.geo.plane}, {r.geo.plane}" if r else "0, 0"
            calls.append(
                f"for (int32_t o = {first}; o < {last}; o += {height}) {name}({x}, taps, {self.inputs}, "
                f"weight + (ptrdiff_t)o * {self.inputs}, {y.at} + {start} + (ptrdiff_t)o * {y.geo.plane}, "
                f"{y.geo.plane}, bias + o, {residual}, {places});"
            )
        return " ".join(calls)
