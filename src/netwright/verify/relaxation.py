"""Bounds by lines above and below every bend, put in from the output back to the box: no form is ever written down.

Where an activation z of open sign meets a ReLU, relu(z) lies between two lines in z; a bound on any combination of
activations then follows by going back through the network, each operation by its transpose (Zhang et al., "Efficient
Neural Network Robustness Certification with General Activation Functions", NeurIPS 2018, arXiv:1811.00866). The ranges
of z from which the lines come are found in the same way, layer by layer, for the activations whose sign is open.

The bounds hold for the network's own arithmetic in float32, in whatever order it adds up: a step y = W x + b of n
products is off by at most r = (n + 4) u (|W| |x| + |b|), and a row a that is taken back through it loses |a| r. So does
what the bounds themselves, in float64, lose to rounding.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor

from netwright.deploy.graph.ir import (
    Activate,
    Activation,
    AdaptivePool,
    GroupNorm,
    LayerNorm,
    Mul,
    Node,
    Op,
    Pool,
    Softmax,
)
from netwright.deploy.graph.reference import kernel_of
from netwright.verify.basis import WIDEN
from netwright.verify.bounds import checked_box
from netwright.verify.deadline import check_deadline
from netwright.verify.forms import Form, bare, magnitude, pieces, selected, transform
from netwright.verify.network import Network

NOT_AFFINE = (GroupNorm, LayerNorm, Mul, Softmax)
ALL = 2**31
CHUNK = 2**24  # numbers in the rows of one value that are taken back together: 128 MB

Key = tuple[int, int]
"""A value of the graph, and which stage of it: 1 behind the operation, 0 before its activation."""


@dataclasses.dataclass
class Lines:
    """below[0] z + below[1] <= y <= above[0] z + above[1], elementwise; ``source`` None where the slopes are 0.

    ``slack`` is what the factor 1 of a number loses to rounding.
    """

    output: Key
    source: Key | None
    below: tuple[Tensor, Tensor]
    above: tuple[Tensor, Tensor]
    slack: Tensor


@dataclasses.dataclass
class Map:
    """An affine operation; ``slack`` as for :class:`Lines`.

    ``offset`` is what it gives for ``zeros`` as inputs, with the graph that leads back to them.
    """

    output: Key
    sources: list[Key]
    zeros: list[Tensor]
    offset: Tensor
    slack: Tensor

    @classmethod
    def of(
        cls, output: Key, sources: list[Key], inputs: list[Form], function: Callable[..., Tensor], slack: Tensor
    ) -> Self:
        """From the operation as a function of its inputs."""
        with torch.enable_grad():
            zeros = [torch.zeros_like(form.low).requires_grad_() for form in inputs]
            return cls(output, sources, zeros, function(*zeros), slack)

    def transposed(self, row: Tensor) -> list[Tensor]:
        """Rows over the inputs from rows over the output."""
        if not self.zeros:
            return []
        found = torch.autograd.grad(self.offset, self.zeros, row[:, None], retain_graph=True, is_grads_batched=True)
        return [part[:, 0].contiguous() for part in found]


class Relaxation:
    """What lines above and below say of a network over a box.

    Args:
        network: Any operation with a known range; those that are neither affine nor a bend count by their range.
        lower: Least value of each number of layer ``first``.
        upper: Largest.
        first: Layer of the box.
        most: Activations of a layer whose range is found by going back to the box, of those whose sign is open and the
            lines leave the largest triangles; the others' by intervals. With 0 all of it takes about as long as two
            forward passes.
        deadline: Of ``time.monotonic()``.
        tick: Called after every operation.

    Attributes:
        ranges: Of each value that was met.
        open: Activations whose sign the box leaves open.
        dims: Which numbers of the box vary.

    Raises:
        ValueError: If the bounds do not fit the layer.
        TypeError: If an operation has no known range; it is named.
        TimeoutError: If the time is over.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(1, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net.bias.data.copy_(torch.tensor([0.0, 1.0]))
        >>> found = Relaxation(Network(net, (1,)), torch.tensor([0.7]), torch.tensor([1.0]))
        >>> found.margins(0)[0].round(decimals=4).tolist()  # x - (1 - x) at x = 0.7
        [0.4]
    """

    def __init__(
        self,
        network: Network,
        lower: Tensor,
        upper: Tensor,
        *,
        first: int = 0,
        most: int = ALL,
        deadline: float = math.inf,
        tick: Callable[[], None] = lambda: None,
    ):
        graph = network.known()
        start = network.layer(first)
        low, high = checked_box(lower, upper, start.size)
        shape = graph.shapes[start.value]
        self.dims = (low < high).nonzero().flatten()
        self.deadline, self.most, self.open = deadline, most, 0
        self._start: Key = (start.value, 1)
        self.ranges: dict[Key, Form] = {
            self._start: Form(low.reshape(shape), high.reshape(shape), torch.zeros(shape).double())
        }
        self._steps: list[Lines | Map] = []
        with torch.no_grad():
            for node in network.between(first, len(network.layers) - 1):
                check_deadline(self.deadline)
                self._enter(node, graph.shapes[node.output])
                tick()
        self._logits: Key = (network.layers[-1].value, 1)

    def margins(self, label: int) -> tuple[Float[Tensor, " rivals"], Int[Tensor, " rivals"]]:
        """Of the logit of a class over every other one's: the least that is certain, and the rival classes.

        A class cannot win where the margin over it is above 0.
        """
        out = self.ranges[self._logits]
        low, high = out.low.flatten(), out.high.flatten()
        rivals = torch.tensor([j for j in range(low.numel()) if j != label])
        rows = torch.zeros(len(rivals), low.numel(), dtype=torch.float64)
        rows[:, label] = 1
        rows[torch.arange(len(rivals)), rivals] = -1
        with torch.no_grad():
            back = self._least(rows.reshape(-1, *out.low.shape[1:]), self._logits)
        return torch.maximum(low[label] - high[rivals], back), rivals

    def _enter(self, node: Node, shape: tuple[int, ...]) -> None:
        """One more operation: its range, and how a row is taken back through it."""
        op, act = bare(node.op)
        before, output = (node.output, 0), (node.output, 1)
        sources: list[Key] = [(value, 1) for value in node.inputs]
        inputs = [self.ranges[key] for key in sources]
        if isinstance(node.op, Activate):
            before, z = sources[0], inputs[0]
        else:
            z, error = _rounded(transform(op, node, shape, inputs, None))
            self._record(op, shape, sources, inputs, z, error, before if act else output)
            self.ranges[before if act else output] = z
        if not act:
            return
        knees = [knee for _, knee in (pieces(act) or (0, 0, ()))[2]]
        if self.most and knees:
            z = self.ranges[before] = self._narrowed(z, knees, before)
        self.open += int(_open(z, knees).sum())
        y, error = _rounded(transform(Activate(act), node, shape, [z], None))
        self.ranges[output] = y
        self._steps.append(_lines(act, z, y, error, before, output))

    def _record(
        self,
        op: Op,
        shape: tuple[int, ...],
        sources: list[Key],
        inputs: list[Form],
        found: Form,
        error: Tensor,
        output: Key,
    ) -> None:
        maximum = isinstance(op, (Pool, AdaptivePool)) and op.kind == "max"
        chosen = selected(op, shape, inputs[0]) if maximum else None  # type: ignore[arg-type]
        zero = torch.zeros_like(found.low)
        if chosen is not None:
            places, certain = chosen
            middle = (output[0], -1)

            def pick(x: Tensor) -> Tensor:
                return x.flatten(1)[:, places].reshape(shape)

            self._steps.append(Map.of(middle, sources, inputs, pick, zero))
            above = certain.double(), torch.where(certain, zero, found.high)
            self._steps.append(Lines(output, middle, (zero + 1, zero), above, 2 * WIDEN * found.largest))
        elif maximum or isinstance(op, NOT_AFFINE):
            self._steps.append(Lines(output, None, (zero, found.low), (zero, found.high), WIDEN * found.largest))
        else:
            kernel = kernel_of(op, shape, dtype=torch.float64)
            slack = error + WIDEN * magnitude(op, shape, inputs)
            self._steps.append(Map.of(output, sources, inputs, kernel, slack))

    def _narrowed(self, z: Form, knees: list[float], key: Key) -> Form:
        """The same with a narrower range wherever the side of a knee is open."""
        low, high = z.low.flatten().clone(), z.high.flatten().clone()
        places = _open(z, knees).flatten().nonzero().flatten()
        if not len(places):
            return z
        if len(places) > self.most:
            places = places[torch.minimum(-low[places], high[places]).topk(self.most).indices]
        most = max(form.low.numel() for form in self.ranges.values())
        for chunk in places.split(max(1, CHUNK // (2 * most))):
            rows = torch.zeros(2 * len(chunk), len(low), dtype=torch.float64)
            rows[torch.arange(len(chunk)), chunk] = 1
            rows[torch.arange(len(chunk)) + len(chunk), chunk] = -1
            below, above = self._least(rows.reshape(-1, *z.low.shape[1:]), key).chunk(2)
            low[chunk], high[chunk] = torch.maximum(low[chunk], below), torch.minimum(high[chunk], -above)
        return Form(low.view_as(z.low), high.view_as(z.high), z.error)

    def _least(self, rows: Tensor, key: Key) -> Tensor:
        """Least value over the box of each row's combination of the numbers of a value.

        Args:
            rows: (rows, \\*shape without the batch).
            key: The value.
        """
        pending: dict[Key, Tensor] = {key: rows}
        least = torch.zeros(len(rows), dtype=torch.float64)
        for step in reversed(self._steps):
            row = pending.pop(step.output, None)
            if row is None:
                continue
            check_deadline(self.deadline)
            least -= row.abs().flatten(1) @ step.slack.flatten()
            if isinstance(step, Lines):
                up, down = row.clamp(min=0), row.clamp(max=0)
                least += up.flatten(1) @ step.below[1].flatten() + down.flatten(1) @ step.above[1].flatten()
                # Without a source the slopes are 0 and all is in the constants.
                sources = [] if step.source is None else [step.source]
                parts = [up.mul_(step.below[0][0]).add_(down.mul_(step.above[0][0]))][: len(sources)]
            else:
                least += row.flatten(1) @ step.offset.detach().flatten()
                parts, sources = step.transposed(row), step.sources
            for source, part in zip(sources, parts, strict=True):
                pending[source] = pending[source] + part if source in pending else part
        row = pending.pop(self._start, None)
        if row is None:
            return least
        box = self.ranges[self._start]
        flat = row.flatten(1)
        least += flat.clamp(min=0) @ box.low.flatten() + flat.clamp(max=0) @ box.high.flatten()
        return least - WIDEN * (flat.abs() @ box.largest.flatten())


def _rounded(form: Form) -> tuple[Form, Tensor]:
    """Ranges of what the network's own arithmetic gives, and by how much it may be off in this operation."""
    return Form(form.low - form.error, form.high + form.error, torch.zeros_like(form.error)), form.error


def _open(z: Form, knees: list[float]) -> Tensor:
    found = torch.zeros_like(z.low, dtype=torch.bool)
    for knee in knees:
        found |= (z.low < knee) & (z.high > knee)
    return found


def _lines(act: Activation, z: Form, y: Form, error: Tensor, source: Key, output: Key) -> Lines:
    """The lines of an activation over a range; ``error`` is what its own arithmetic may be off by."""
    broken = pieces(act)
    zero = torch.zeros_like(z.low)
    if broken is None:
        return Lines(output, None, (zero, y.low), (zero, y.high), WIDEN * y.largest)
    slope, shift, terms = broken
    below = above = (zero + slope, zero + shift)
    for weight, knee in terms:
        low, high = z.low - knee, z.high - knee
        on, open_ = low >= 0, (low < 0) & (high > 0)
        steep = torch.where(open_, high / (high - low), on.double())
        over = steep, torch.where(open_, -steep * z.low, -knee * on)
        # Of all lines below, the one that leaves the smaller triangle.
        flat = (on | open_ & (high > -low)).double()
        under = flat, -knee * flat
        if weight < 0:
            over, under = under, over
        below = below[0] + weight * under[0], below[1] + weight * under[1]
        above = above[0] + weight * over[0], above[1] + weight * over[1]
    size = sum(line[0].abs() * z.largest + line[1].abs() for line in (below, above)) + z.largest
    return Lines(output, source, below, above, error + WIDEN * size)
