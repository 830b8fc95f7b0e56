"""The steps of a convolution: copies of its input, then a sparse or dense kernel, band by band; or some rows of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from netwright.deploy.graph.ir import Conv
from netwright.deploy.native import pack
from netwright.deploy.native.choose import Choice, sets
from netwright.deploy.native.layout import HEAD, Geometry, Kind, Lowering, blocks, cuts, even_shares, lower, round_up
from netwright.deploy.native.program import Place, Program, Step, bias_of, by_thread

DENSE_ROWS = 8
ROW_WORK = 4.0  # of a row itself, in non-zeros, where threads share rows
FINE = 4  # bands a thread from which it does not matter whether they come out even
WASTE = 1.35  # of what is shared out, the most that even shares may add


@dataclass(frozen=True)
class Convolved:
    """A convolution with everything that is decided about it.

    Attributes:
        op: The convolution.
        path: Its module path.
        x: Input.
        y: Output.
        residual: What is added, or None.
        choice: How it is run; with a ``scale`` the band of a 1x1 convolution counts too.
        threads: Threads that share it.
        scale: One number for each channel and image of the input, which it is multiplied by while it is copied; of 1x1
            convolutions that would read it as it is. None for no such numbers.
        strip: Most output rows that are computed at a time, in strips; then the places hold one image.
    """

    op: Conv
    path: str
    x: Place
    y: Place
    residual: Place | None
    choice: Choice
    threads: int = 1
    scale: Place | None = None
    strip: int | None = None

    @property
    def kept(self) -> int:
        """Multiply-adds that are done."""
        weight = self.op.weight
        return (weight.size if self.choice.dense else int(np.count_nonzero(weight))) * self.y.geo.pixels

    def plan(self, unit: int) -> Lowering:
        """Its copies, in bands that come out even among the threads where this makes few more blocks of pixels."""
        y, threads = self.y.geo, self.threads
        kind: Kind = "taps" if self.scale else self.choice.kind
        if self.strip is not None and kind != "direct":
            y = replace(y, h=self.strip)
        alone = lower(self.op, self.x.geo, y, kind=kind, unit=unit, band=self.choice.band)
        images = 1 if kind == "taps" else y.n
        uneven = images * alone.bands % threads and images * alone.bands < FINE * threads
        if kind == "direct" or not uneven:
            return alone
        rows = y.n * y.h if kind == "taps" else y.h
        more = lower(self.op, self.x.geo, y, kind=kind, unit=unit, band=-(-rows // round_up(alone.bands, threads)))
        return more if more.bands * more.vectors <= WASTE * alone.bands * alone.vectors else alone

    def sets(self, unit: int) -> int:
        """Accumulator sets: the same for all blocks, threads and strips, since they decide how sums are rounded."""
        plan = replace(self, threads=1, scale=None).plan(unit)
        return sets(max(size for _, size in cuts(plan, plan.vectors, self.choice.most)))


def scratch_floats(layer: Convolved, program: Program) -> int:
    """Scratch memory of one thread: copies, and partial sums of a block."""
    plan = layer.plan(program.unit)
    partial = 0
    if layer.choice.chunks > 1:
        # the last band may be cut into larger blocks than the others
        partial = len(layer.op.weight) * min(layer.choice.most, plan.vectors) * program.unit
    phases = 4 * _phase_plane(layer.y.geo) if _is_flat(layer, plan) and plan.stride == (2, 2) else 0
    return plan.scratch(layer.x.geo.c) + phases + partial + 16


def emit(layer: Convolved, program: Program, scratch: str) -> None:
    """Adds the steps of a convolution that is not depthwise.

    Threads share bands, or blocks of pixels, where these come out even; else each has a share of the output channels.

    Args:
        layer: What to run.
        program: Where the steps go.
        scratch: Expression of the scratch memory of thread ``id``.
    """
    plan = layer.plan(program.unit)
    fillings = list(_fillings(layer, plan))
    parts = plan.vectors if plan.kind == "direct" else len(fillings)
    idle = round_up(parts, layer.threads) > WASTE * parts
    # Where rows are this short, a band's last but one would be written over the next band's first.
    by_rows = layer.threads > 1 and (idle or (plan.per_row > 0 and 2 * layer.y.geo.w < program.unit))
    kind = _Dense if layer.choice.dense else _Sparse
    kernel = kind(layer, plan, program, layer.threads if by_rows else 1, layer.sets(program.unit))
    single = layer.threads == 1
    behind = plan.scratch(layer.x.geo.c)
    halved = _is_flat(layer, plan) and plan.stride == (2, 2)
    phases = [f"float *phases = {scratch} + {behind};"] if halved else []
    behind += 4 * _phase_plane(layer.y.geo) if halved else 0
    own = [f"float *partial = {scratch} + {behind};", "(void)partial;", *kernel.declarations]
    if plan.kind == "direct":
        body = _direct(layer, plan, program, kernel, 1 if by_rows else layer.threads)
        program.steps.append(Step(layer.path, kernel.name, [*own, *body], layer.kept, single))
    elif by_rows:
        shared = f"float *s = {scratch.replace('(ptrdiff_t)id', '(ptrdiff_t)0')};"
        for filling in fillings:
            channels = even_shares(layer.x.geo.c, layer.threads)
            copies = [
                f"if (id == {i}) {_copies(layer, plan, program, filling, *ends)}" for i, ends in enumerate(channels)
            ]
            program.steps.append(Step(layer.path, f"copies {plan.kind}", [shared, *phases, *copies]))
            body = _blocks(layer, plan, program, kernel, filling)
            share = layer.kept * filling.rows // sum(each.rows for each in fillings)
            program.steps.append(Step(layer.path, kernel.name, [shared, *own, *body], share))
    else:
        body = []
        for share, (first, last) in enumerate(even_shares(len(fillings), layer.threads)):
            lines: list[str] = []
            for filling in fillings[first:last]:
                lines.append(_copies(layer, plan, program, filling, 0, layer.x.geo.c))
                lines += _blocks(layer, plan, program, kernel, filling)
            body += lines if layer.threads == 1 else [f"if (id == {share}) {{", *lines, "}"]
        program.steps.append(
            Step(layer.path, kernel.name, [f"float *s = {scratch};", *phases, *own, *body], layer.kept, single)
        )


class Strip:
    """A convolution that is run on some rows at a time, its tables written once.

    Args:
        layer: With ``strip``, and places of the geometries of all those that :meth:`rows` is called with.
        sets: Accumulator sets of the layer as a whole.
        program: Where the tables go.
    """

    def __init__(self, layer: Convolved, sets: int, program: Program) -> None:
        self.plan, self.program = layer.plan(program.unit), program
        self.kernel: _Kernel = (_Dense if layer.choice.dense else _Sparse)(layer, self.plan, program, 1, sets)

    def rows(self, layer: Convolved, first: int, last: int, scratch: str, *, final: bool) -> list[str]:
        """The statements that compute rows ``first`` to ``last - 1``.

        Args:
            layer: With the places of this time.
            first: A row of the output.
            last: Another.
            scratch: Expression of the scratch memory.
            final: Whether nothing lies behind the last row that is not to be written later.
        """
        plan, program = self.plan, self.program
        own = [f"float *partial = {scratch} + {plan.scratch(layer.x.geo.c)};", "(void)partial;"]
        if plan.kind == "direct":
            filling = _Filling(0, first, last - first, final)
            lines = _blocks(layer, plan, program, self.kernel, filling, layer.x.row(first))
        else:
            own, lines = [f"float *s = {scratch};", *own], []
            for begin, end in even_shares(last - first, -(-(last - first) // plan.band)):
                filling = _Filling(0, first + begin, end - begin, final and first + end == last)
                lines.append(_copies(layer, plan, program, filling, 0, layer.x.geo.c))
                lines += _blocks(layer, plan, program, self.kernel, filling)
        return [*own, *self.kernel.declarations, *lines]


@dataclass(frozen=True)
class _Filling:
    """One filling of the scratch memory: output rows from ``first`` of an image; ``last`` if no pixel comes after."""

    image: int
    first: int
    rows: int
    last: bool


def _fillings(layer: Convolved, plan: Lowering) -> Iterator[_Filling]:
    y = layer.y.geo
    images, rows = (1, y.n * y.h) if plan.kind == "taps" and not layer.scale else (y.n, y.h)
    for image in range(images):
        for first in range(0, rows, plan.band):
            here = min(plan.band, rows - first)
            yield _Filling(image, first, here, image == images - 1 and first + here == rows)


def _copies(layer: Convolved, plan: Lowering, program: Program, filling: _Filling, first: int, last: int) -> str:
    """The call that copies channels ``first`` to ``last - 1`` of a band."""
    x, taps = layer.x.geo, plan.kind == "taps"
    target, source = f"s + {first * len(plan.copies) * plan.plane}", f"{layer.x.at} + {first * x.plane}"
    if layer.scale:
        at = (filling.image * x.h + filling.first - layer.x.first) * x.w
        factor = f"{layer.scale.at} + {first * layer.scale.geo.plane + filling.image}, {layer.scale.geo.plane}"
        return (
            f"nw_lower_scaled({target}, {source} + {at}, {x.plane}, {last - first}, {factor}, {plan.plane}, "
            f"{filling.rows * x.w});"
        )
    if _is_flat(layer, plan):
        return _flat(layer, plan, program, filling, target, source, last - first)
    height = filling.rows + (0 if taps else plan.rows - plan.band)
    image = "" if taps else f" + {filling.image * x.h * x.w}"
    out_h = layer.y.geo.h if taps else 1 << 30
    return (
        f"nw_lower({target}, {source}{image}, {x.plane}, {last - first}, {layer.x.below}, {x.w}, "
        f"{program.places(np.array(plan.copies))}, {len(plan.copies)}, {plan.plane}, {plan.pitch}, {plan.width}, "
        f"{height}, {filling.first}, {out_h}, {plan.stride[0]}, {plan.stride[1]}, {layer.x.first});"
    )


def _blocks(
    layer: Convolved, plan: Lowering, program: Program, kernel: _Kernel, filling: _Filling, source: str = "s"
) -> list[str]:
    """The calls of the kernel over the blocks of a band, whose operands begin at ``source``."""
    y, unit = layer.y.geo, program.unit
    start = filling.image * y.h * y.w + filling.first * y.w
    vectors = filling.rows * plan.per_row if plan.per_row else -(-filling.rows * y.w // unit)
    tail = 0
    if not filling.last:  # what lies behind belongs to another band
        tail = y.w % unit if plan.per_row else filling.rows * y.w % unit
    lines = []
    for begin, size in cuts(plan, vectors, layer.choice.most):
        part = tail if begin + size == vectors else 0
        if plan.per_row:
            rows, columns = np.divmod(np.arange(begin, begin + size), plan.per_row)
            where: np.ndarray | None = np.append(rows * y.w + columns * unit, part).astype(np.int32)
            # In scratch, blocks lie side by side only within a row of the copy.
            source_at = int(begin // plan.per_row * plan.pitch + begin % plan.per_row * unit)
            lines += kernel.call(layer, size, f"{source} + {source_at}", start, where)
        else:
            where = np.array([part], np.int32) if part else None
            lines += kernel.call(layer, size, f"{source} + {begin * unit}", start + begin * unit, where)
    return lines


def _is_flat(layer: Convolved, plan: Lowering) -> bool:
    """Whether every copy is the input, or one of its four phases, shifted by less than lies between buffers."""
    x, y, (sy, sx) = layer.x.geo, layer.y.geo, plan.stride
    fits = plan.stride in ((1, 1), (2, 2)) and (y.h, y.w) == (-(-x.h // sy), -(-x.w // sx))
    worth = sy == 1 or (len(plan.copies) > 2 and plan.bands <= 2)  # phases are made anew for every band
    reach = max((abs(dy // sy * y.w + dx // sx) for dy, dx in plan.copies), default=0)
    return plan.kind == "taps" and layer.strip is None and fits and worth and reach <= HEAD


def _phase_plane(target: Geometry) -> int:
    """Floats from one phase of an input to the next, of one thread's room for them."""
    return round_up(target.pixels + 2 * HEAD, HEAD)


def _flat(
    layer: Convolved, plan: Lowering, program: Program, filling: _Filling, target: str, source: str, channels: int
) -> str:
    """The call that makes shifted and masked copies."""
    x, y, (sy, sx) = layer.x.geo, layer.y.geo, plan.stride
    begin = filling.first * y.w
    vectors = -(-filling.rows * y.w // program.unit)
    row, column = np.divmod(np.arange(begin, begin + vectors * program.unit) % (y.h * y.w), y.w)
    inside = []
    for dy, dx in plan.copies:
        at_row, at_column = row * sy + dy, column * sx + dx
        inside.append((at_row >= 0) & (at_row < x.h) & (at_column >= 0) & (at_column < x.w))
    mask = np.where(np.stack(inside), np.int32(-1), np.int32(0)).view(np.float32)
    shifts = np.array([begin + dy // sy * y.w + dx // sx for dy, dx in plan.copies], np.int32)
    ends = f"{len(plan.copies)}, {plan.plane}, {vectors}"
    if sy == 1:
        tables = f"{program.array(shifts)}, {program.array(mask)}"
        return f"nw_lower_flat({target}, {source}, {x.plane}, {channels}, {tables}, {ends});"
    shifts += np.array([(dy % 2 * 2 + dx % 2) * _phase_plane(y) for dy, dx in plan.copies], np.int32)
    tables = f"{program.array(shifts)}, {program.array(mask)}"
    return (
        f"nw_lower_halved({target}, {source}, {x.plane}, {channels}, {x.n}, {x.h}, {x.w}, {tables}, {ends}, "
        f"phases + {HEAD}, {_phase_plane(y)});"
    )


def _direct(layer: Convolved, plan: Lowering, program: Program, kernel: _Kernel, shares: int) -> list[str]:
    """Blocks of a 1x1 convolution, equal ones in a loop, its pixels shared out among ``shares`` threads."""
    unit, lines = program.unit, []
    for share, (first, last) in enumerate(even_shares(plan.vectors, shares)):
        here, at = [], first * unit
        for size, run in itertools.groupby(blocks(last - first, layer.choice.most)):
            step = size * unit
            end = at + step * len(list(run))
            here.append(f"for (int32_t p = {at}; p < {end}; p += {step}) {{")
            here += [*kernel.call(layer, size, f"{layer.x.at} + p", "p", None), "}"]
            at = end
        lines += here if shares == 1 else [f"if (id == {share}) {{", *here, "}"]
    return lines


def _pixel(place: Place, start: int | str) -> str:
    """Expression of a pixel of the first channel."""
    return f"{place.at} + {start}" if isinstance(start, str) else f"{place.at} + {start - place.first * place.geo.w}"


class _Kernel:
    """Calls of a kernel over one block of pixels; each of ``shares`` threads does a part of the output channels."""

    name: str
    declarations: list[str]

    def call(self, layer: Convolved, size: int, x: str, start: int | str, where: np.ndarray | None) -> list[str]:
        """The statements that run it over ``size`` blocks.

        Args:
            layer: The layer with the places of this time.
            size: How many blocks.
            x: Expression of the first operand, in scratch or the input.
            start: The pixel of the output (and the residual) where the first block goes.
            where: Places of the blocks, as the kernels take them.
        """
        raise NotImplementedError


class _Sparse(_Kernel):
    def __init__(self, layer: Convolved, plan: Lowering, program: Program, shares: int, sets: int):
        self.plan, self.program, self.sets = plan, program, sets
        op, x = layer.op, layer.x.geo

        def offset_of(ky: int, kx: int) -> np.ndarray:
            return np.array([plan.offset(c, ky, kx, x.plane) for c in range(x.c)], np.int64)

        found, chunks, unit = pack.entries(op.weight, op.groups, offset_of), layer.choice.chunks, program.unit
        self.wide = not pack.fits_16_bits(found, x.c, chunks, unit)
        counts = np.bincount(found.row, minlength=found.rows)
        bounds = itertools.pairwise(pack.equal_shares(counts, shares, ROW_WORK))
        tables = [
            program.table(pack.sparse_table(found, x.c, chunks, unit, wide=self.wide, first=a, last=b))
            for a, b in bounds
        ]
        self.name = f"sparse {plan.kind}, {layer.choice.most} blocks, {chunks} chunks"
        self.declarations = [
            f"const char *table = {by_thread(tables)};",
            f"const float *bias = {program.array(bias_of(op))};",
        ]

    def call(self, layer: Convolved, size: int, x: str, start: int | str, where: np.ndarray | None) -> list[str]:
        plan = self.plan
        place = "(k) * NW_U"
        if plan.kind == "phased" and plan.per_row <= size:
            place = f"(k) / {plan.per_row} * {plan.pitch} + (k) % {plan.per_row} * NW_U"
        name = self.program.kernel(
            "spmm.c.in",
            f"spmm_{size}",
            NV=size,
            EACH=size,
            SETS=self.sets,
            WIDE=int(self.wide),
            RESIDUAL=int(layer.residual is not None),
            ROWS=int(bool(plan.per_row)),
            X=f"({place})",
            ACT=layer.op.act,
        )
        y, r = layer.y, layer.residual
        residual = f"{_pixel(r, start)}, {r.geo.plane}" if r else "0, 0"
        places = self.program.places(where) if where is not None else "0"
        return [f"{name}(table, {x}, {_pixel(y, start)}, {y.geo.plane}, bias, {residual}, {places}, partial);"]


class _Dense(_Kernel):
    def __init__(self, layer: Convolved, plan: Lowering, program: Program, shares: int, sets: int):
        self.plan, self.program = plan, program
        op, x = layer.op, layer.x.geo
        rows, channels, height, width = op.weight.shape
        taps = [plan.offset(c, ky, kx, x.plane) for c in range(channels) for ky in range(height) for kx in range(width)]
        self.inputs, self.shares = len(taps), shares
        bounds = [DENSE_ROWS * number for _, number in even_shares(rows // DENSE_ROWS, shares)]
        weight = pack.dense_rows(op.weight.reshape(rows, -1), DENSE_ROWS)
        self.name = f"dense {plan.kind}"
        ends = [
            f"const int32_t from = {by_thread([str(bound) for bound in [0, *bounds[:-1]]])};",
            f"const int32_t to = {by_thread([str(bound) for bound in bounds])};",
        ]
        self.declarations = [
            *(ends if rows >= DENSE_ROWS else []),
            f"const int32_t *taps = {program.array(np.array(taps, np.int32))};",
            f"const float *weight = {program.array(weight)};",
            f"const float *bias = {program.array(bias_of(layer.op))};",
        ]

    def call(self, layer: Convolved, size: int, x: str, start: int | str, where: np.ndarray | None) -> list[str]:
        calls = []
        rows = len(layer.op.weight)
        y, r = layer.y, layer.residual
        places = self.program.places(where) if where is not None else "0"
        for height in sorted({DENSE_ROWS, rows % DENSE_ROWS} - {0}, reverse=True):
            whole = rows - rows % DENSE_ROWS
            if height == DENSE_ROWS and not whole:
                continue
            rest = rows if self.shares == 1 else f"(id == {self.shares - 1} ? {rows} : 0)"
            loop = "o = from; o < to" if height == DENSE_ROWS else f"o = {whole}; o < {rest}"
            name = self.program.kernel(
                "dense.c.in",
                f"dense_{height}_{size}",
                R=height,
                NV=size,
                RESIDUAL=int(r is not None),
                ROWS=int(bool(self.plan.per_row)),
                ACT=layer.op.act,
            )
            residual = f"{_pixel(r, start)} + (ptrdiff_t)o * {r.geo.plane}, {r.geo.plane}" if r else "0, 0"
            calls.append(
                f"for (int32_t {loop}; o += {height}) {name}({x}, taps, {self.inputs}, "
                f"weight + (ptrdiff_t)o * {self.inputs}, {_pixel(y, start)} + (ptrdiff_t)o * {y.geo.plane}, "
                f"{y.geo.plane}, bias + o, {residual}, {places});"
            )
        return calls
