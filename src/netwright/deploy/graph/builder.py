"""Writes operations of a graph for tensors that are views, and stores a view as the order of its numbers demands."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from netwright.deploy.graph import axes as layout
from netwright.deploy.graph.axes import BATCH, CHANNEL, COLUMN, REPEATED, ROW, Atom, View
from netwright.deploy.graph.ir import (
    Add,
    Affine,
    Array,
    Channels,
    Constant,
    ConvTranspose,
    Graph,
    Mul,
    Node,
    Op,
    Reshape,
    Shape,
)
from netwright.deploy.graph.table import RefusedError

SPATIAL = (ROW, COLUMN)


class Builder:
    """A graph under construction.

    Attributes:
        graph: What was written so far.
        path: Module path that new nodes bear.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.path = ""

    def shape(self, value: int) -> Shape:
        """Of a stored value."""
        return self.graph.shapes[value]

    def emit(self, op: Op, inputs: Sequence[int], shape: Sequence[int]) -> int:
        """Appends an operation and gives the value that it writes."""
        value = self.graph.new_value(tuple(shape))
        self.graph.nodes.append(Node(op, list(inputs), value, self.path))
        return value

    def input(self, shape: Sequence[int]) -> View:
        """A tensor that comes from outside; of another rank than 2 and 4 it is stored as one of these."""
        value = self.graph.new_value(stored_shape(shape))
        self.graph.inputs.append(value)
        return self._known_as(value, tuple(shape))

    def output(self, view: View) -> None:
        """Gives a tensor back to the caller."""
        value = self.stored(view, self.shape_for(view, view.shape))
        ends = (*self.graph.inputs, *self.graph.outputs)
        if value in ends and self.graph.views.get(value, self.shape(value)) != view.shape:
            value = self.emit(Reshape(), [value], self.shape(value))
        self._known_as(value, view.shape)
        self.graph.outputs.append(value)

    def _known_as(self, value: int, shape: Shape) -> View:
        if shape != self.shape(value):
            self.graph.views[value] = shape
        view = View.of(value, self.shape(value)).reshape(shape)
        assert view is not None  # stored_shape only joins axes or inserts one of size 1
        return view

    def map(self, op: Op, view: View) -> View:
        """An operation that acts on every number alike."""
        return View(self.emit(op, [view.value], self.shape(view.value)), view.axes)

    # -- storing ------------------------------------------------------------------------------------------------------

    def stored(self, view: View, shape: Sequence[int]) -> int:
        """The value of this shape, rank 2 or 4, whose memory is in the order of the tensor.

        Raises:
            RefusedError: If the batch is not the first axis.
        """
        shape = tuple(shape)
        view = self.solid(view)
        if not layout.in_order(view.atoms):
            view = self._channels_in_order(view)
        if not layout.in_order(view.atoms):
            view = self._gathered(view)
        if self.shape(view.value) == shape:
            return view.value
        if self.shape(view.value)[0] != shape[0]:
            raise RefusedError(f"the batch of {self.shape(view.value)[0]} becomes an axis of {shape[0]}")
        return self.emit(Reshape(), [view.value], shape)

    def shape_for(self, view: View, shape: Sequence[int]) -> Shape:
        """Rank 2 or 4 in which the numbers of a tensor can be stored as a tensor of this shape."""
        single = self.shape(view.value)[0] == 1 and tuple(shape[:1]) != (1,)
        return stored_shape((1, *shape) if single else shape)

    def plain(self, view: View, shape: Sequence[int] | None = None) -> View:
        """The tensor with a stored value in its own order, under another shape if one is given."""
        shape = view.shape if shape is None else shape
        value = self.stored(view, self.shape_for(view, shape))
        found = View.of(value, self.shape(value)).reshape(shape)
        assert found is not None
        return found

    def maps(self, view: View) -> int:
        """The value of a tensor (batch, channels, height, width)."""
        if len(view.axes) != 4:
            raise RefusedError(f"rank {len(view.axes)} where rank 4 is expected")
        return self.stored(view, view.shape)

    def _channels_in_order(self, view: View) -> View:
        """Reorders the stored channels as the tensor meets them."""
        atoms = view.on(CHANNEL)
        index = layout.positions(atoms)
        if np.array_equal(index, np.arange(len(index))):
            return view
        value = self.select_channels(view.value, index)
        return View(value, restride(view.axes, CHANNEL))

    def select_channels(self, value: int, index: Array) -> int:
        """Output channel i is channel ``index[i]`` of the value."""
        shape = self.shape(value)
        if np.array_equal(index, np.arange(shape[1])):
            return value
        return self.emit(Channels(np.asarray(index, np.int64)), [value], (shape[0], len(index), *shape[2:]))

    def _gathered(self, view: View) -> View:
        """Any order within a sample: flat, then one index for each number."""
        size = self.shape(view.value)
        atoms = view.atoms
        leading = [atom for atom in atoms if atom.axis == BATCH]
        if atoms[: len(leading)] != leading or not layout.in_order(leading):
            raise RefusedError("the batch does not stay the first axis")
        inner = (0, *(math.prod(size[axis + 1 :]) for axis in range(1, len(size))))
        flat = [Atom(CHANNEL, atom.size, atom.stride * inner[atom.axis]) for atom in atoms[len(leading) :]]
        value = self.emit(Reshape(), [view.value], (size[0], math.prod(size[1:]))) if len(size) == 4 else view.value
        value = self.select_channels(value, layout.positions(flat))
        found = View.of(value, self.shape(value)).reshape(view.shape)
        assert found is not None
        return found

    def solid(self, view: View) -> View:
        """The tensor with every repetition written out."""
        while any(atom.axis == REPEATED for atom in view.atoms):
            view = self._write_out(view)
        return view

    def _write_out(self, view: View) -> View:
        """Writes the first repetition out: of pixels by a transposed convolution, of anything else as channels."""
        flat = [(i, j, atom) for i, axis in enumerate(view.axes) for j, atom in enumerate(axis)]
        place = next(k for k, (_, _, atom) in enumerate(flat) if atom.axis == REPEATED)
        count = flat[place][2].size
        before = flat[place - 1][2] if place else None
        after = flat[place + 1][2].axis if place + 1 < len(flat) else None
        size = self.shape(view.value)
        axis = CHANNEL
        if len(size) == 4:
            if before is not None and before.axis in SPATIAL and before.stride == 1:
                axis = before.axis
            elif before is not None and before.axis == CHANNEL and size[ROW] == 1:
                axis = ROW if size[COLUMN] == 1 or after == COLUMN else CHANNEL
        if axis == CHANNEL:
            value = self.select_channels(view.value, np.tile(np.arange(size[1]), count))
            new = Atom(CHANNEL, count, size[1])
        else:
            value = self.enlarge(view.value, count if axis == ROW else 1, count if axis == COLUMN else 1)
            new = Atom(axis, count)
        grown = [
            [Atom(a.axis, a.size, a.stride * count) if a.axis == axis != CHANNEL else a for a in part]
            for part in view.axes
        ]
        i, j, _ = flat[place]
        grown[i][j] = new
        return View(value, tuple(layout.merge(part) for part in grown))

    def enlarge(self, value: int, rows: int, columns: int) -> int:
        """Repeats each pixel ``rows`` times downwards and ``columns`` times to the right."""
        n, c, h, w = self.shape(value)
        op = ConvTranspose(np.ones((c, 1, rows, columns), np.float32), stride=(rows, columns), groups=c)
        return self.emit(op, [value], (n, c, h * rows, w * columns))

    def on_channels(self, view: View, chosen: Sequence[int]) -> View:
        """The tensor stored so that its channels are the chosen axes, all of them and nothing else, in some order."""
        view = self.solid(view)
        atoms = [atom for i in chosen for atom in view.axes[i]]
        alone = all(atom.axis == CHANNEL for atom in atoms) and len(atoms) == len(view.on(CHANNEL))
        return view if alone else self.restored(view, channels=chosen)

    def restored(self, view: View, *, channels: Sequence[int] = (), rows: Sequence[int] = ()) -> View:
        """The tensor stored with the atoms of these axes as channels or rows; the others become what is left.

        Raises:
            RefusedError: If the batch is among these axes, or is not the first axis.
        """
        if any(atom.axis == BATCH for i in (*channels, *rows) for atom in view.axes[i]):
            raise RefusedError("it works along the batch")
        flat = [(i, atom) for i, axis in enumerate(view.axes) for atom in axis]
        kinds = [
            BATCH if atom.axis == BATCH else CHANNEL if i in channels else ROW if i in rows else -1 for i, atom in flat
        ]
        left = ROW if channels else CHANNEL
        kinds = [left if kind == -1 else kind for kind in kinds]
        order = sorted(range(len(flat)), key=lambda k: kinds[k])
        size = [math.prod(flat[k][1].size for k in order if kinds[k] == kind) for kind in (BATCH, CHANNEL, ROW)]
        # without pixels left, rank 2 spares the reshapes around linear layers
        shape = size[:2] if size[2] == 1 and channels else [*size, 1]
        value = self.stored(View(view.value, tuple((flat[k][1],) for k in order)), shape)
        strides = {}
        run = dict.fromkeys((BATCH, CHANNEL, ROW), 1)
        for k in reversed(order):
            strides[k] = run[kinds[k]]
            run[kinds[k]] *= flat[k][1].size
        parts: list[list[Atom]] = [[] for _ in view.axes]
        for k, (i, atom) in enumerate(flat):
            parts[i].append(Atom(kinds[k], atom.size, strides[k]))
        return View(value, tuple(layout.merge(part) for part in parts))

    # -- constants ----------------------------------------------------------------------------------------------------

    def per_channel(self, view: View, constant: Tensor) -> Array | None:
        """The constant, broadcast to the tensor, as one number for each stored channel; None where it is not that."""
        constant = constant.expand(view.shape) if constant.ndim <= len(view.axes) else constant
        if constant.shape != view.shape:
            return None
        channels = self.shape(view.value)[1]
        values = constant.detach().double().numpy()
        kept = []
        for i, axis in enumerate(view.axes):
            if axis and all(atom.axis == CHANNEL for atom in axis):
                kept.append(i)
            elif axis and values.strides[i] != 0:
                return None
        values = values[tuple(slice(None) if i in kept else 0 for i in range(len(view.axes)))]
        index = layout.positions([atom for i in kept for atom in view.axes[i]])
        if len(index) != channels:
            return None if any(values.strides) else np.full(channels, values.flat[0])
        result = np.empty(channels)
        result[index] = values.ravel()
        return result

    def scale_shift(self, view: View, scale: Tensor | float, shift: Tensor | float) -> View:
        """scale * tensor + shift, where both are constants that broadcast to it."""
        for kind, constant, neutral in ((Mul, scale, 1.0), (Add, shift, 0.0)):
            tensor = torch.as_tensor(constant, dtype=torch.float64)
            shape = torch.broadcast_shapes(tensor.shape, view.shape)
            view = view if tuple(shape) == view.shape else self.solid(view.expand(shape))
            if bool((tensor == neutral).all()):
                continue
            numbers = self.per_channel(view, tensor)
            if numbers is None:
                view = self.solid(view)
                numbers = self.per_channel(view, tensor)
            if numbers is None:
                other = self.emit(Constant(self._like(view, tensor)), [], self.shape(view.value))
                view = View(self.emit(kind(), [view.value, other], self.shape(view.value)), view.axes)
            else:
                one = np.full_like(numbers, 1.0 - neutral)
                view = self.map(Affine(numbers, one) if kind is Mul else Affine(one, numbers), view)
        return view

    def _like(self, view: View, constant: Tensor) -> Array:
        """The constant in the order in which the tensor is stored."""
        atoms = view.atoms
        order = sorted(range(len(atoms)), key=lambda k: (atoms[k].axis, -atoms[k].stride))
        values = constant.expand(view.shape).reshape([atom.size for atom in atoms]).permute(order)
        return values.reshape(self.shape(view.value)).detach().numpy().copy()

    # -- two tensors --------------------------------------------------------------------------------------------------

    def constant(self, tensor: Tensor) -> View:
        """A constant as a value of its own."""
        value = tensor.detach().reshape(stored_shape(tensor.shape)).numpy()
        view = View.of(self.emit(Constant(value), [], value.shape), value.shape).reshape(tensor.shape)
        assert view is not None
        return view

    def combine(self, op: Op, a: View, b: View) -> View:
        """An operation, whose operands may change places, on two tensors that broadcast against each other."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = a.expand(shape), b.expand(shape)
        repeats = any(atom.axis == REPEATED for atom in a.atoms)
        if repeats or (layout.in_order(b.atoms) and not layout.in_order(a.atoms)):
            a, b = b, a
        a = self.solid(a)
        pairs = [layout.common(x, y) for x, y in zip(a.axes, b.axes, strict=True)]
        if any(pair is None for pair in pairs):
            a, b = self.plain(a), self.plain(b)
            pairs = [layout.common(x, y) for x, y in zip(a.axes, b.axes, strict=True)]
        flat = sorted((pair for axis in pairs for pair in axis or ()), key=lambda pair: (pair[0].axis, -pair[0].stride))
        other = self._in_the_order_of(a.value, b, flat)
        return View(self.emit(op, [a.value, other], self.shape(a.value)), a.axes)

    def _in_the_order_of(self, main: int, b: View, pairs: list[tuple[Atom, Atom]]) -> int:
        """The value of ``b`` laid out as ``main``, or with height and width 1 where it repeats there."""
        shape = self.shape(main)
        gate = len(shape) == 4 and all(y.axis == REPEATED for x, y in pairs if x.axis in SPATIAL)
        if gate:
            kept = [y for x, y in pairs if x.axis not in SPATIAL]
            return self.stored(View(b.value, tuple((atom,) for atom in kept)), (*shape[:2], 1, 1))
        return self.stored(View(b.value, tuple((y,) for _, y in pairs)), shape)


def stored_shape(shape: Sequence[int]) -> Shape:
    """Rank 2 or 4 for a tensor of any rank: (N, C, L) has one row, more than 4 axes share the channels."""
    if len(shape) == 2 or len(shape) == 4:
        return tuple(shape)
    if len(shape) == 3:
        return (shape[0], shape[1], 1, shape[2])
    if len(shape) < 2:
        return (*shape, 1, 1)[:2]
    return (shape[0], math.prod(shape[1:-2]), *shape[-2:])


def restride(axes: Sequence[layout.Axis], kind: int) -> tuple[layout.Axis, ...]:
    """The axes after the atoms of one stored axis were put in the order in which they are met."""
    run = 1
    found: list[layout.Axis] = []
    for axis in reversed(axes):
        part: list[Atom] = []
        for atom in reversed(axis):
            if atom.axis == kind:
                part.append(Atom(kind, atom.size, run))
                run *= atom.size
            else:
                part.append(atom)
        found.append(layout.merge(reversed(part)))
    return tuple(reversed(found))
