"""The step of a depthwise convolution, channel by channel, alone or right behind the 1x1 convolution that feeds it.

Three kernels: a window that slides over the input itself (stride 1 or 2, the usual padding); the same over a copy with
zero borders; and a list of taps over such a copy, for any stride and dilation and for filters with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from netwright.deploy.graph.ir import Conv
from netwright.deploy.native import pack
from netwright.deploy.native.layout import HEAD, LINE, Lowering, blocks, even_shares, geometry, lower
from netwright.deploy.native.program import Place, Program, Step, bias_of, by_thread

TAPS_FROM = 1 / 3  # share of zeros from which a filter is a list of taps
WINDOWS = (3, 5, 7)


@dataclass(frozen=True)
class Expansion:
    """A 1x1 convolution whose rows a depthwise convolution takes over one by one, still in the first-level cache.

    Attributes:
        op: The 1x1 convolution.
        x: Its input.
        most: Most blocks held in registers.
    """

    op: Conv
    x: Place
    most: int


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution in its place.

    Attributes:
        op: The convolution.
        path: Its module path.
        x: Its input; with an ``expansion`` only the geometry counts.
        y: Its output.
        residual: What is added, or None.
        expansion: The convolution before, or None.
        threads: Threads that share it.
        strip: Most output rows that are computed at a time, in strips; then the places hold one image.
    """

    op: Conv
    path: str
    x: Place
    y: Place
    residual: Place | None
    expansion: Expansion | None
    threads: int = 1
    strip: int | None = None

    @property
    def kept(self) -> int:
        """Multiply-adds that are done."""
        own = int(np.count_nonzero(self.op.weight)) * self.y.geo.pixels
        before = int(np.count_nonzero(self.expansion.op.weight)) * self.x.geo.pixels if self.expansion else 0
        return own + before

    def plan(self, unit: int) -> Lowering:
        """The copy of one channel."""
        target = self.y.geo if self.strip is None else replace(self.y.geo, h=self.strip)
        return lower(self.op, self.x.geo, target, kind="phased", unit=unit)

    @property
    def taps(self) -> bool:
        """Whether the filters are lists of taps."""
        height, width = self.op.weight.shape[2:]
        square = height == width and height in WINDOWS and self.op.dilation == (1, 1)
        full = np.count_nonzero(self.op.weight) >= (1 - TAPS_FROM) * self.op.weight.size
        return not (square and full and (self.op.stride == (1, 1) or self.same))

    @property
    def same(self) -> bool:
        """Whether the window slides over the input itself."""
        side = self.op.weight.shape[2]
        x, y, stride = self.x.geo, self.y.geo, self.op.stride
        return (
            stride in ((1, 1), (2, 2))
            and self.op.padding[:2] == (side // 2, side // 2)
            and (y.h, y.w) == ((x.h - 1) // stride[0] + 1, (x.w - 1) // stride[0] + 1)
        )

    def scratch(self, unit: int) -> int:
        """Floats of scratch memory of one thread: the copy of a channel, and the channel itself behind an expansion."""
        copy = 0 if self.same and not self.taps else self.plan(unit).scratch(1)
        if not self.expansion:
            return copy
        x, reach = self.x.geo, (self.op.weight.shape[2] - 1) * self.op.dilation[0] + 1
        read = x.h if self.strip is None else min(x.h, (self.strip - 1) * self.op.stride[0] + reach)
        return copy + geometry((x.n, 1, read, x.w)).plane + LINE + 2 * HEAD


def emit(layer: Depthwise, program: Program, scratch: str) -> None:
    """Adds the step. Threads share the rows of the output, as they do the pixels of the 1x1 convolutions around it.

    Args:
        layer: What to run.
        program: Where the step goes.
        scratch: Expression of the scratch memory of thread ``id``.
    """
    y, threads = layer.y.geo, layer.threads
    by_rows = y.n * y.h >= 2 * threads
    rows = even_shares(y.n * y.h, threads) if by_rows else [(0, y.n * y.h)] * threads
    channels = [(0, layer.x.geo.c)] * threads if by_rows else even_shares(layer.x.geo.c, threads)
    body = Strip(layer, program).body(layer, rows, channels, scratch)
    program.steps.append(Step(layer.path, name(layer), body, layer.kept, threads == 1))


def name(layer: Depthwise) -> str:
    """What runs it, for profiles."""
    window = "depthwise taps" if layer.taps else "depthwise window"
    return f"sparse rows, {window}" if layer.expansion else window


class Strip:
    """A depthwise convolution that is run on some rows at a time, its tables written once.

    Args:
        layer: With places of the geometries of all those that :meth:`rows` is called with.
        program: Where the tables go.
    """

    def __init__(self, layer: Depthwise, program: Program) -> None:
        self.program, self.plan, self.copied = program, layer.plan(program.unit), layer.taps or not layer.same
        self.declarations = [f"const float *bias = {program.array(bias_of(layer.op))};"]
        if layer.expansion:
            self.declarations += _expansion_tables(layer.expansion, program)
        if self.copied:
            self.declarations.append(f"const int32_t *copies = {program.places(np.array(self.plan.copies))};")
        self.declarations += (_tap_tables if layer.taps else _window_tables)(layer, self.plan, program)

    def rows(self, layer: Depthwise, first: int, last: int, scratch: str, *, final: bool) -> list[str]:
        """The statements that compute rows ``first`` to ``last - 1``; as :meth:`.convolution.Strip.rows`."""
        return self.body(layer, [(first, last)], [(0, layer.x.geo.c)], scratch, final=final)

    def body(
        self,
        layer: Depthwise,
        rows: list[tuple[int, int]],
        channels: list[tuple[int, int]],
        scratch: str,
        *,
        final: bool = True,
    ) -> list[str]:
        """The statements of all threads, each with its rows, counted through all images, and its channels."""
        x, y, unit = layer.x.geo, layer.y.geo, self.program.unit
        multiplier = len(layer.op.weight) // x.c
        source, gone, below = f"{layer.x.at} + (ptrdiff_t)c * {x.plane}", str(layer.x.first), layer.x.below
        body, expanded = [], list[str]()
        if layer.expansion:
            at = self.plan.scratch(1) if self.copied else 0
            body.append(f"float *row = {scratch} + {at + HEAD};")
            ranges = [_pixels_read(layer, *ends) if layer.threads > 1 else (0, x.pixels) for ends in rows]
            source = "row"
            if layer.strip is not None:
                begin, end = ranges[0] = _pixels_read(layer, *rows[0])
                gone, below = str(begin // x.w), end // x.w
                source = f"row + {_misaligned(layer.expansion, begin, unit)}"
            expanded = _expanded_rows(layer, layer.expansion, ranges, self.program)
        image = f"{source} + n * {x.h * x.w}"
        per_image: list[str] = []
        if self.copied:
            plan = self.plan
            body.append(f"float *s = {scratch};")
            per_image.append(
                f"nw_lower(s, {image}, 0, 1, {below}, {x.w}, copies, {len(plan.copies)}, {plan.plane}, {plan.pitch}, "
                f"{plan.width}, last - first + {plan.rows - plan.band}, first, {1 << 30}, {plan.stride[0]}, "
                f"{plan.stride[1]}, {gone});"
            )
        call = _taps(layer, self.plan, self.program) if layer.taps else _window(layer, self, image, gone)
        spare = f"end == {y.n * y.h} ? NW_U : nw_min_int(NW_U, (end - n * {y.h} - last) * {y.w})"
        if layer.strip is not None:
            spare = "NW_U" if final else "0"
        return [
            *self.declarations,
            f"const int32_t from = {by_thread([first for first, _ in channels])};",
            f"const int32_t to = {by_thread([last for _, last in channels])};",
            f"const int32_t begin = {by_thread([first for first, _ in rows])};",
            f"const int32_t end = {by_thread([last for _, last in rows])};",
            *body,
            "for (int32_t c = from; c < to; ++c) {",
            *expanded,
            f"for (int32_t n = 0; n < {y.n}; ++n) {{",
            f"const int32_t first = nw_max_int(0, begin - n * {y.h}), last = nw_min_int({y.h}, end - n * {y.h});",
            # What lies behind a thread's last row is another's.
            f"const int32_t spare = {spare};",
            "if (first >= last) continue;",
            *per_image,
            f"for (int32_t o = c * {multiplier}; o < (c + 1) * {multiplier}; ++o) {call}",
            "}",
            "}",
        ]


def _target(layer: Depthwise) -> tuple[str, str]:
    """Expressions of output and residual for channel ``o`` of image ``n``, from row ``first`` on."""
    y, r = layer.y, layer.residual
    size = y.geo.h * y.geo.w

    def begin(place: Place) -> str:
        row = f"first - {place.first}" if place.first else "first"
        return f"{place.at} + (ptrdiff_t)o * {place.geo.plane} + n * {size} + ({row}) * {y.geo.w}"

    return begin(y), begin(r) if r else "0"


def _window_tables(layer: Depthwise, plan: Lowering, program: Program) -> list[str]:
    """Declarations of a window with all its weights."""
    body = [f"const float *weight = {program.array(layer.op.weight.astype(np.float32).ravel())};"]
    if layer.same:
        mask = np.where(_edges(layer, program.unit), np.int32(-1), np.int32(0)).view(np.float32)
        body.append(f"const float *mask = {program.array(mask.ravel())};")
    return body


def _edges(layer: Depthwise, unit: int) -> np.ndarray:
    """Whether column k of the window is inside the image: (k, first, last but one, last block, pixel of the block)."""
    side, stride, x, y = layer.op.weight.shape[2], layer.op.stride[0], layer.x.geo, layer.y.geo
    last = (y.w - 1) // unit * unit
    edges = np.array([0, last - unit, last])[:, None] + np.arange(unit)
    reach = np.stack([stride * edges + k - side // 2 for k in range(side)])
    return (reach >= 0) & (reach < x.w)


def _window(layer: Depthwise, strip: Strip, source: str, gone: str) -> str:
    """The call of a window with all its weights."""
    op, x, y, unit, program = layer.op, layer.x.geo, layer.y.geo, strip.program.unit, strip.program
    side = op.weight.shape[2]
    target, residual = _target(layer)
    weights = f"weight + (ptrdiff_t)o * {side * side}"
    shared = {"K": side, "RESIDUAL": int(layer.residual is not None), "ACT": op.act}
    if not layer.same:
        columns = 2 if y.w > unit else 1
        kernel = program.kernel("depthwise.c.in", f"depthwise_{side}", COLUMNS=columns, **shared)
        return f"{kernel}(s, {strip.plan.pitch}, {target}, last - first, {y.w}, spare, {weights}, bias[o], {residual});"
    stride = op.stride[0]
    near = int(y.w > unit and not _edges(layer, unit)[side // 2 :, 1].all())
    kernel = program.kernel("depthwise_same.c.in", f"depthwise_{side}_{stride}", S=stride, NEAR=near, **shared)
    return (
        f"{kernel}({source}, {target}, {x.h}, {x.w}, first, last, {y.w}, {gone}, spare, {weights}, bias[o], mask, "
        f"{residual});"
    )


def _tap_tables(layer: Depthwise, plan: Lowering, program: Program) -> list[str]:
    """Declarations of filters as lists of taps."""
    height, width = layer.op.weight.shape[2:]
    weight = layer.op.weight.reshape(len(layer.op.weight), -1)
    kept = weight != 0
    shifts = np.array([plan.offset(0, ky, kx, 0) for ky in range(height) for kx in range(width)], np.int32)
    return [
        f"const float *weight = {program.array(weight[kept].astype(np.float32))};",
        f"const int32_t *taps = {program.array(np.broadcast_to(shifts, weight.shape)[kept])};",
        f"const int32_t *ends = {program.array(np.append(0, np.cumsum(kept.sum(1))).astype(np.int32))};",
    ]


def _taps(layer: Depthwise, plan: Lowering, program: Program) -> str:
    """The call of filters as lists of taps."""
    kernel = program.kernel(
        "depthwise.c.in",
        "depthwise_taps",
        K=0,
        COLUMNS=1,
        RESIDUAL=int(layer.residual is not None),
        ACT=layer.op.act,
    )
    target, residual = _target(layer)
    return (
        f"{kernel}(s, {plan.pitch}, {target}, last - first, {layer.y.geo.w}, spare, weight + ends[o], taps + ends[o], "
        f"ends[o + 1] - ends[o], bias[o], {residual});"
    )


def _expansion_tables(expansion: Expansion, program: Program) -> list[str]:
    """Declarations of the rows of an expansion."""
    op, x = expansion.op, expansion.x
    found = pack.entries(op.weight, op.groups, lambda ky, kx: np.arange(x.geo.c, dtype=np.int64) * x.geo.plane)
    counts = np.bincount(found.row, minlength=found.rows)
    return [
        f"const int32_t *offsets = {program.array(found.offset.astype(np.int32))};",
        f"const float *values = {program.array(found.weight.astype(np.float32))};",
        f"const int32_t *rows = {program.array(np.append(0, np.cumsum(counts)).astype(np.int32))};",
        f"const float *shift = {program.array(bias_of(op))};",
    ]


def _misaligned(expansion: Expansion, pixel: int, unit: int) -> int:
    """Floats from a whole block of what is there of an expansion's input to one of its pixels."""
    return (pixel - expansion.x.first * expansion.x.geo.w) % unit


def _expanded_rows(
    layer: Depthwise, expansion: Expansion, ranges: list[tuple[int, int]], program: Program
) -> list[str]:
    """The statements that compute channel ``c`` of an expansion, of each thread the pixels in its range, into ``row``.

    In strips ``row`` begins with the block of the first pixel, otherwise with the first pixel of all.
    """
    op, x, unit = expansion.op, expansion.x, program.unit
    loop: list[str] = []
    for share, (first, last) in enumerate(ranges):
        at = first - _misaligned(expansion, first, unit)
        begin = 0 if layer.strip is None else at
        sizes = blocks(-(-(last - at) // unit), expansion.most)
        calls = []
        for size in sorted(set(sizes), reverse=True):
            kernel = program.kernel("row.c.in", f"row_{size}", NV=size, EACH=size, ACT=op.act)
            calls.append(
                f"{kernel}(offsets + rows[c], values + rows[c], rows[c + 1] - rows[c], "
                f"{x.at} + {at - x.first * x.geo.w}, row + {at - begin}, shift[c], {sizes.count(size)});"
            )
            at += sizes.count(size) * size * unit
        loop += calls if layer.threads == 1 else [f"if (id == {share}) {{", *calls, "}"]
    return loop


def _pixels_read(layer: Depthwise, first: int, last: int) -> tuple[int, int]:
    """The range of the input's pixels behind output rows ``first`` to ``last - 1``, counted through all images."""
    op, x, y = layer.op, layer.x.geo, layer.y.geo
    top, reach = op.padding[0], (op.weight.shape[2] - 1) * op.dilation[0]
    begin = max(0, min(x.h - 1, first % y.h * op.stride[0] - top))
    end = max(begin + 1 if first // y.h == (last - 1) // y.h else 1, (last - 1) % y.h * op.stride[0] - top + reach + 1)
    return (first // y.h * x.h + begin) * x.w, ((last - 1) // y.h * x.h + min(x.h, end)) * x.w
