"""The step of a depthwise convolution, channel by channel, alone or right behind the 1x1 convolution that feeds it.

Three kernels: a window that slides over the input itself (stride 1 or 2, the usual padding); the same over a copy with
zero borders; and a list of taps over such a copy, for any stride and dilation and for filters with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from netwright.deploy.graph.ir import Conv
from netwright.deploy.native import pack
from netwright.deploy.native.layout import HEAD, Lowering, blocks, even_shares, geometry, lower
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
    """

    op: Conv
    path: str
    x: Place
    y: Place
    residual: Place | None
    expansion: Expansion | None
    threads: int = 1

    @property
    def kept(self) -> int:
        """Multiply-adds that are done."""
        own = int(np.count_nonzero(self.op.weight)) * self.y.geo.pixels
        before = int(np.count_nonzero(self.expansion.op.weight)) * self.x.geo.pixels if self.expansion else 0
        return own + before

    def plan(self, unit: int) -> Lowering:
        """The copy of one channel."""
        return lower(self.op, self.x.geo, self.y.geo, kind="phased", unit=unit)

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
        row = geometry((self.x.geo.n, 1, self.x.geo.h, self.x.geo.w)).plane + 2 * HEAD if self.expansion else 0
        return copy + row


def emit(layer: Depthwise, program: Program, scratch: str) -> None:
    """Adds the step. Threads share the rows of the output, as they do the pixels of the 1x1 convolutions around it.

    Args:
        layer: What to run.
        program: Where the step goes.
        scratch: Expression of the scratch memory of thread ``id``.
    """
    op, x, y = layer.op, layer.x.geo, layer.y.geo
    multiplier = len(op.weight) // x.c
    by_rows = y.n * y.h >= 2 * layer.threads
    rows = even_shares(y.n * y.h, layer.threads) if by_rows else [(0, y.n * y.h)] * layer.threads
    channels = [(0, x.c)] * layer.threads if by_rows else even_shares(x.c, layer.threads)
    body = [
        f"const float *bias = {program.array(bias_of(op))};",
        f"const int32_t from = {by_thread([first for first, _ in channels])};",
        f"const int32_t to = {by_thread([last for _, last in channels])};",
        f"const int32_t begin = {by_thread([first for first, _ in rows])};",
        f"const int32_t end = {by_thread([last for _, last in rows])};",
    ]
    source = f"{layer.x.at} + (ptrdiff_t)c * {x.plane}"
    per_channel: list[str] = []
    per_image: list[str] = []
    copied = layer.taps or not layer.same
    if layer.expansion:
        at = layer.plan(program.unit).scratch(1) if copied else 0
        body.append(f"float *row = {scratch} + {at + HEAD};")
        declared, per_channel = _expansion(layer, layer.expansion, rows, program)
        body += declared
        source = "row"
    if copied:
        plan = layer.plan(program.unit)
        body.append(f"float *s = {scratch};")
        body.append(f"const int32_t *copies = {program.array(np.array(plan.copies, np.int32).ravel())};")
        per_image.append(
            f"nw_lower(s, {source} + n * {x.h * x.w}, 0, 1, {x.h}, {x.w}, copies, {len(plan.copies)}, {plan.plane}, "
            f"{plan.pitch}, {plan.width}, last - first + {plan.rows - plan.band}, first, {1 << 30}, {plan.stride[0]}, "
            f"{plan.stride[1]});"
        )
    declared, kernel = (_taps if layer.taps else _window)(layer, program, f"{source} + n * {x.h * x.w}")
    body += [
        *declared,
        "for (int32_t c = from; c < to; ++c) {",
        *per_channel,
        f"for (int32_t n = 0; n < {y.n}; ++n) {{",
        f"const int32_t first = nw_max_int(0, begin - n * {y.h}), last = nw_min_int({y.h}, end - n * {y.h});",
        # What lies behind a thread's last row is another's.
        f"const int32_t spare = end == {y.n * y.h} ? NW_U : nw_min_int(NW_U, (end - n * {y.h} - last) * {y.w});",
        "if (first >= last) continue;",
        *per_image,
        f"for (int32_t o = c * {multiplier}; o < (c + 1) * {multiplier}; ++o) {kernel}",
        "}",
        "}",
    ]
    what = "depthwise taps" if layer.taps else "depthwise window"
    if layer.expansion:
        what = f"sparse rows, {what}"
    program.steps.append(Step(layer.path, what, body, layer.kept, layer.threads == 1))


def _target(layer: Depthwise) -> tuple[str, str]:
    """Expressions of output and residual for channel ``o`` of image ``n``, from their first rows on."""
    y, r = layer.y, layer.residual
    size = y.geo.h * y.geo.w
    residual = f"{r.at} + (ptrdiff_t)o * {r.geo.plane} + n * {size}" if r else "0"
    return f"{y.at} + (ptrdiff_t)o * {y.geo.plane} + n * {size}", residual


def _window(layer: Depthwise, program: Program, source: str) -> tuple[list[str], str]:
    """Declarations and call of a window with all its weights."""
    op, x, y, unit = layer.op, layer.x.geo, layer.y.geo, program.unit
    side = op.weight.shape[2]
    target, residual = _target(layer)
    body = [f"const float *weight = {program.array(op.weight.astype(np.float32).ravel())};"]
    weights = f"weight + (ptrdiff_t)o * {side * side}"
    shared = {"K": side, "RESIDUAL": int(layer.residual is not None), "ACT": op.act}
    if not layer.same:
        columns = 2 if y.w > unit else 1
        name = program.kernel("depthwise.c.in", f"depthwise_{side}", COLUMNS=columns, **shared)
        pitch = layer.plan(unit).pitch
        target, residual = _from_first(layer, target, residual)
        return body, f"{name}(s, {pitch}, {target}, last - first, {y.w}, spare, {weights}, bias[o], {residual});"
    stride = op.stride[0]
    last = (y.w - 1) // unit * unit
    edges = np.array([0, last - unit, last])[:, None] + np.arange(unit)
    reach = np.stack([stride * edges + k - side // 2 for k in range(side)])
    inside = (reach >= 0) & (reach < x.w)
    mask = np.where(inside, np.int32(-1), np.int32(0)).view(np.float32)
    near = int(last > 0 and not inside[side // 2 :, 1].all())
    body.append(f"const float *mask = {program.array(mask.ravel())};")
    name = program.kernel("depthwise_same.c.in", f"depthwise_{side}_{stride}", S=stride, NEAR=near, **shared)
    return body, (
        f"{name}({source}, {target}, {x.h}, {x.w}, first, last, {y.w}, spare, {weights}, bias[o], mask, {residual});"
    )


def _from_first(layer: Depthwise, target: str, residual: str) -> tuple[str, str]:
    """The same expressions from row ``first`` on."""
    ahead = f" + first * {layer.y.geo.w}"
    return target + ahead, residual + ahead if layer.residual else residual


def _taps(layer: Depthwise, program: Program, source: str) -> tuple[list[str], str]:
    """Declarations and call of filters as lists of taps."""
    op, y = layer.op, layer.y.geo
    plan = layer.plan(program.unit)
    height, width = op.weight.shape[2:]
    weight = op.weight.reshape(len(op.weight), -1)
    kept = weight != 0
    shifts = np.array([plan.offset(0, ky, kx, 0) for ky in range(height) for kx in range(width)], np.int32)
    name = program.kernel(
        "depthwise.c.in", "depthwise_taps", K=0, COLUMNS=1, RESIDUAL=int(layer.residual is not None), ACT=op.act
    )
    body = [
        f"const float *weight = {program.array(weight[kept].astype(np.float32))};",
        f"const int32_t *taps = {program.array(np.broadcast_to(shifts, weight.shape)[kept])};",
        f"const int32_t *ends = {program.array(np.append(0, np.cumsum(kept.sum(1))).astype(np.int32))};",
    ]
    target, residual = _from_first(layer, *_target(layer))
    return body, (
        f"{name}(s, {plan.pitch}, {target}, last - first, {y.w}, spare, weight + ends[o], taps + ends[o], "
        f"ends[o + 1] - ends[o], bias[o], {residual});"
    )


def _expansion(
    layer: Depthwise, expansion: Expansion, rows: list[tuple[int, int]], program: Program
) -> tuple[list[str], list[str]]:
    """Declarations, and the statements that compute what a thread reads of channel ``c`` of the expansion."""
    op, x, unit = expansion.op, expansion.x, program.unit
    found = pack.entries(op.weight, op.groups, lambda ky, kx: np.arange(x.geo.c, dtype=np.int64) * x.geo.plane)
    counts = np.bincount(found.row, minlength=found.rows)
    body = [
        f"const int32_t *offsets = {program.array(found.offset.astype(np.int32))};",
        f"const float *values = {program.array(found.weight.astype(np.float32))};",
        f"const int32_t *rows = {program.array(np.append(0, np.cumsum(counts)).astype(np.int32))};",
        f"const float *shift = {program.array(bias_of(op))};",
    ]
    loop: list[str] = []
    for share, ends in enumerate(rows):
        first, last = _pixels_read(layer, *ends) if layer.threads > 1 else (0, layer.x.geo.pixels)
        at = first // unit * unit
        sizes = blocks(-(-(last - at) // unit), expansion.most)
        calls = []
        for size in sorted(set(sizes), reverse=True):
            name = program.kernel("row.c.in", f"row_{size}", NV=size, EACH=size, ACT=op.act)
            calls.append(
                f"{name}(offsets + rows[c], values + rows[c], rows[c + 1] - rows[c], {x.at} + {at}, row + {at}, "
                f"shift[c], {sizes.count(size)});"
            )
            at += sizes.count(size) * size * unit
        loop += calls if layer.threads == 1 else [f"if (id == {share}) {{", *calls, "}"]
    return body, loop


def _pixels_read(layer: Depthwise, first: int, last: int) -> tuple[int, int]:
    """The range of the input's pixels behind output rows ``first`` to ``last - 1``, counted through all images."""
    op, x, y = layer.op, layer.x.geo, layer.y.geo
    top, reach = op.padding[0], (op.weight.shape[2] - 1) * op.dilation[0]
    begin = max(0, min(x.h - 1, first % y.h * op.stride[0] - top))
    end = max(begin + 1 if first // y.h == (last - 1) // y.h else 1, (last - 1) % y.h * op.stride[0] - top + reach + 1)
    return (first // y.h * x.h + begin) * x.w, ((last - 1) // y.h * x.h + min(x.h, end)) * x.w
