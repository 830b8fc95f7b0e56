"""The steps of everything that is no convolution of planes: one vector, elementwise operations, pools, norms, moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from netwright.deploy.graph.ir import (
    IDENTITY,
    Activate,
    AdaptivePool,
    Add,
    Affine,
    Channels,
    Concat,
    Constant,
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    Mul,
    Node,
    Op,
    Pad,
    Pool,
    Reshape,
    Softmax,
)
from netwright.deploy.native.layout import Geometry, even_shares, round_up
from netwright.deploy.native.program import Place, Program, Step, bias_of, number
from netwright.deploy.native.transposed import Interleave

if TYPE_CHECKING:
    from netwright.deploy.native.emit import Layout

FEW_FLOATS = 4096  # below, a second thread costs more than it saves
RowWise = Activate | Add | Mul | Affine | Pool


def exchange(place: Place, array: str, program: Program, *, entering: bool) -> str:
    """The statement that brings the caller's array (N, C, H, W) into planes, or planes into it."""
    name = program.kernel("nchw.c.in", "enter" if entering else "leave", ENTER=int(entering))
    ends = f"{array}, {place.at}" if entering else f"{place.at}, {array}"
    return f"{{ static const nw_geo g = {_geo(place.geo)}; {name}({ends}, &g); }}"


def emit(node: Node, layout: Layout, program: Program) -> None:
    """Adds the steps of a node that is neither a convolution of planes nor a linear layer."""
    y, inputs = layout.place(node.output), [layout.place(value) for value in node.inputs]
    op = node.op
    what = op.name
    if isinstance(op, Concat):
        body, single = _concat(node, layout, y, inputs, program), True
    elif isinstance(op, (Activate, Add, Mul, Affine)):
        body, single = _elementwise(op, y, inputs, program)
    elif isinstance(op, Pool):
        body, single = _pool(op, y, inputs, program)
    elif isinstance(op, AdaptivePool):
        name = program.kernel("adaptive.c.in", "adaptive", MAX=int(op.kind == "max"))
        body, single = _by_channels(name, inputs, y, program)
    elif isinstance(op, Pad):
        name = program.kernel("pad.c.in", "pad")
        body, single = _by_channels(name, inputs, y, program, f", {op.padding[0]}, {op.padding[1]}")
    elif isinstance(op, Interleave):
        body, single = _interleave(op, y, inputs, program), True
    else:
        body, single = _whole(op, y, inputs, program), True
    program.steps.append(Step(node.path, what, body, 0, single))


def _geo(geo: Geometry, channels: int | None = None) -> str:
    return f"{{{geo.n}, {geo.c if channels is None else channels}, {geo.h}, {geo.w}, {geo.plane}}}"


def _by_channels(
    name: str, inputs: Sequence[Place], y: Place, program: Program, more: str = "", per_channel: Sequence[str] = ()
) -> tuple[list[str], bool]:
    """Calls ``name(inputs..., y, geometries..., more, per_channel...)``, threads sharing the channels."""
    places = [*inputs, y]
    channels = y.geo.c
    single = program.threads == 1 or y.geo.flat or channels * y.geo.pixels < FEW_FLOATS or channels < program.threads
    body = []
    for share, (first, last) in enumerate(even_shares(channels, 1 if single else program.threads)):
        geos = [f"static const nw_geo g{i} = {_geo(place.geo, last - first)};" for i, place in enumerate(places)]
        at = ", ".join(f"{place.at} + {first * place.geo.plane}" for place in places)
        extra = "".join(f", {array} + {first}" for array in per_channel)
        call = f"{name}({at}, {', '.join(f'&g{i}' for i in range(len(places)))}{extra}{more});"
        guard = "" if single else f"if (id == {share}) "
        body.append(f"{guard}{{ {' '.join(geos)} {call} }}")
    return body, single


def _elementwise(
    op: Activate | Add | Mul | Affine, y: Place, inputs: list[Place], program: Program
) -> tuple[list[str], bool]:
    name, arrays = _elementwise_kernel(op, y, inputs, program)
    return _by_channels(name, inputs, y, program, per_channel=arrays)


def _elementwise_kernel(
    op: Activate | Add | Mul | Affine, y: Place, inputs: list[Place], program: Program
) -> tuple[str, list[str]]:
    """The kernel, and arrays with a number for each channel."""
    kind = {"ADD": int(isinstance(op, Add)), "MUL": int(isinstance(op, Mul))}
    if isinstance(op, Affine):
        name = program.kernel("channelwise.c.in", "affine", AFFINE=1, ACT=op.act, **kind)
        return name, [program.array(part.astype(np.float32)) for part in (op.scale, op.shift)]
    if len(inputs) == 2 and (inputs[1].geo.h, inputs[1].geo.w) != (y.geo.h, y.geo.w):
        return program.kernel("channelwise.c.in", f"{op.name}_channels", AFFINE=0, ACT=op.act, **kind), []
    return program.kernel("elementwise.c.in", op.name, ACT=op.act, **kind), []


def _pool(op: Pool, y: Place, inputs: list[Place], program: Program) -> tuple[list[str], bool]:
    x = inputs[0].geo
    if op.kernel == (x.h, x.w) and (y.geo.h, y.geo.w) == (1, 1) and not any(op.padding) and op.divisor is None:
        name = program.kernel("adaptive.c.in", "adaptive", MAX=int(op.kind == "max"))
        return _by_channels(name, inputs, y, program)
    name, more = _pool_kernel(op, program)
    return _by_channels(name, inputs, y, program, f", 0, {y.geo.h}, 0, NW_VL{more}")


def _pool_kernel(op: Pool, program: Program) -> tuple[str, str]:
    """The kernel, and its last arguments."""
    (kh, kw), (sy, sx), (dy, dx) = op.kernel, op.stride, op.dilation
    top, left, bottom, right = op.padding
    window = {"KH": kh, "KW": kw, "SY": sy, "SX": sx, "DY": dy, "DX": dx}
    name = program.kernel("pool.c.in", "pool", MAX=int(op.kind == "max"), INCLUDE_PAD=int(op.include_pad), **window)
    return name, f", {top}, {left}" + ("" if op.kind == "max" else f", {bottom}, {right}, {op.divisor or 0}")


class Strip:
    """A pool or an elementwise operation that is run on some rows of an image at a time, its tables written once.

    Args:
        op: The operation.
        inputs: Places of the geometries of all those that :meth:`rows` is called with.
        y: Likewise.
        program: Where the tables go.
    """

    def __init__(self, op: RowWise, inputs: list[Place], y: Place, program: Program) -> None:
        self.op = op
        if isinstance(op, Pool):
            self.name, self.more = _pool_kernel(op, program)
        else:
            self.name, arrays = _elementwise_kernel(op, y, inputs, program)
            self.more = "".join(f", {array}" for array in arrays)

    def rows(self, inputs: list[Place], y: Place, first: int, last: int, *, final: bool) -> list[str]:
        """The statements that compute rows ``first`` to ``last - 1``; as :meth:`.convolution.Strip.rows`."""
        places, more = [*inputs, y], self.more
        if isinstance(self.op, Pool):
            begins, heights = [inputs[0].at, y.row(first)], [place.geo.h for place in places]
            more = f", {first}, {last}, {inputs[0].first}, {'NW_VL' if final else 0}{more}"
        else:
            whole = [(place.geo.h, place.geo.w) == (y.geo.h, y.geo.w) for place in places]
            begins = [place.row(first) if rows else place.at for place, rows in zip(places, whole, strict=True)]
            heights = [last - first if rows else 1 for rows in whole]
        geos = [replace(place.geo, h=height) for place, height in zip(places, heights, strict=True)]
        lines = [f"static const nw_geo g{i} = {_geo(geo)};" for i, geo in enumerate(geos)]
        return [*lines, f"{self.name}({', '.join(begins)}, {', '.join(f'&g{i}' for i in range(len(geos)))}{more});"]


def _concat(node: Node, layout: Layout, y: Place, inputs: list[Place], program: Program) -> list[str]:
    """Copies what was not written into its place already."""
    body, channel = [], 0
    for value, place in zip(node.inputs, inputs, strict=True):
        target = f"{y.at} + {channel * y.geo.plane}"
        if not layout.lies_in(value, node.output, channel):
            name = program.kernel("copy.c.in", "copy", GATHER=0)
            body.append(
                f"{{ static const nw_geo gx = {_geo(place.geo)}, gy = {_geo(y.geo, place.geo.c)}; "
                f"{name}({place.at}, {target}, &gx, &gy); }}"
            )
        channel += place.geo.c
    return body


def _interleave(op: Interleave, y: Place, inputs: list[Place], program: Program) -> list[str]:
    name = program.kernel("interleave.c.in", "interleave")
    body = [f"static const nw_geo gy = {_geo(y.geo)};"]
    for (py, px), place in zip(op.phases, inputs, strict=True):
        body.append(
            f"{{ static const nw_geo gx = {_geo(place.geo)}; "
            f"{name}({place.at}, {y.at}, &gx, &gy, {py}, {px}, {op.stride[0]}, {op.stride[1]}); }}"
        )
    return body


def _whole(op: Op, y: Place, inputs: list[Place], program: Program) -> list[str]:
    """Operations that one thread does at a time."""
    if isinstance(op, Constant):
        value = np.zeros(y.geo.size, np.float32)
        flat = np.asarray(op.value, np.float32).reshape(y.geo.n, y.geo.c, -1).swapaxes(0, 1).reshape(y.geo.c, -1)
        for c, plane in enumerate(flat):
            value[c * y.geo.plane : c * y.geo.plane + y.geo.pixels] = plane
        return [f"memcpy({y.at}, {program.array(value)}, {value.nbytes});"]
    more = ""
    if isinstance(op, Softmax):
        name = program.kernel("softmax.c.in", "softmax", LOG=int(op.log))
    elif isinstance(op, Reshape):
        name = program.kernel("reshape.c.in", "reshape")
    elif isinstance(op, Channels):
        name = program.kernel("copy.c.in", "gather", GATHER=1)
        more = f", {program.array(op.index.astype(np.int32))}"
    elif isinstance(op, LayerNorm):
        name = program.kernel("layer_norm.c.in", "layer_norm", ACT=IDENTITY)
        more = f"{_optional(op.weight, program)}{_optional(op.bias, program)}, {number(op.eps)}"
    elif isinstance(op, GroupNorm):
        name = program.kernel("group_norm.c.in", "group_norm", ACT=op.act)
        more = f", {op.groups}{_optional(op.weight, program)}{_optional(op.bias, program)}, {number(op.eps)}"
    else:
        raise ValueError(f"no kernel runs {op.name!r}")
    (x,) = inputs
    geos = f"static const nw_geo gx = {_geo(x.geo)}, gy = {_geo(y.geo)};"
    return [geos, f"{name}({x.at}, {y.at}, &gx, &gy{more});"]


def _optional(array: np.ndarray | None, program: Program) -> str:
    return ", 0" if array is None else f", {program.array(array.astype(np.float32))}"


def vector(node: Node, layout: Layout, program: Program) -> None:
    """A linear layer, or a convolution with one output pixel, on one input: columns point into the input's planes."""
    op = node.op
    assert isinstance(op, (Linear, Conv))
    x, y = layout.place(node.inputs[0]), layout.place(node.output)
    weight = op.weight if isinstance(op, Conv) else op.weight[:, :, None, None]
    rows, per_group, height, width = weight.shape
    ky, kx = np.mgrid[:height, :width]
    top, left = (op.padding[0], op.padding[1]) if isinstance(op, Conv) else (0, 0)
    dy, dx = op.dilation if isinstance(op, Conv) else (1, 1)
    row, column = ky * dy - top, kx * dx - left
    inside = (row >= 0) & (row < x.geo.h) & (column >= 0) & (column < x.geo.w)
    groups = op.groups if isinstance(op, Conv) else 1
    kept = (weight != 0) & inside
    out, inner, i, j = np.nonzero(kept)
    channel = inner + out // (rows // groups) * per_group
    places = channel * x.geo.plane + row[i, j] * x.geo.w + column[i, j]
    ends = np.cumsum(np.bincount(out, minlength=rows)).astype(np.int32)
    residual = layout.place(node.inputs[1]).at if len(node.inputs) > 1 else "0"
    name = program.kernel("linear.c.in", "linear", RESIDUAL=int(residual != "0"), ACT=op.act)
    call = (
        f"{name}({program.array(ends)}, {program.array(places.astype(np.int32))}, "
        f"{program.array(weight[kept].astype(np.float32))}, {x.at}, {y.at}, {program.array(bias_of(op))}, {residual}, "
    )
    single = program.threads == 1 or int(kept.sum()) < FEW_FLOATS
    if single:
        body = [f"{call}0, {rows});"]
    else:
        shares = program.threads
        bounds = [min(rows, round_up(round(rows * share / shares), program.unit)) for share in range(shares + 1)]
        body = [
            f"static const int32_t shares[] = {{{', '.join(map(str, bounds))}}};",
            f"{call}shares[id], shares[id + 1]);",
        ]
    program.steps.append(Step(node.path, "sparse rows of a vector", body, int(kept.sum()), single))
