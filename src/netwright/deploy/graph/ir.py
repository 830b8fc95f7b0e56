"""The intermediate form of a network between PyTorch and a kernel: a list of operations on arrays of known shape.

Values have rank 4, (batch, channels, height, width), or rank 2, (batch, features). Every size is known. An operation
holds its weights as float32 arrays (float64 until :func:`netwright.deploy.graph.optimise` has folded and rounded
them) and writes one value. Sizes of outputs stand in :attr:`Graph.shapes`, so that an operation only says where it
begins to read: a window reaches as far as its output needs, and what lies beyond the input is zero (minus infinity
for max pooling). Where the text says channels, a value of rank 2 has its features.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from netwright.checks import one_of

Shape = tuple[int, ...]
Pair = tuple[int, int]
Borders = tuple[int, int, int, int]
Array = np.ndarray

ACTIVATIONS = (
    "none", "relu", "clamp", "leaky_relu", "elu", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "gelu_tanh",
    "tanh",
)  # fmt: skip


@dataclass(frozen=True)
class Activation:
    """An elementwise function, by torch's name.

    Attributes:
        kind: One of ``ACTIVATIONS``.
        low: Lower bound of ``clamp``; slope below 0 of ``leaky_relu``; alpha of ``elu``.
        high: Upper bound of ``clamp``.
    """

    kind: str = "none"
    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        one_of("kind", self.kind, ACTIVATIONS)

    def __bool__(self) -> bool:
        return self.kind != "none"


IDENTITY = Activation()


@dataclass
class Op:
    """What a node does. Subclasses hold weights and settings."""

    name: ClassVar[str] = ""


@dataclass
class Conv(Op):
    """y = act(conv(x) + bias + residual); inputs x, or x and the residual of the output's shape.

    Attributes:
        weight: (out channels, in channels / groups, kernel height, kernel width).
        bias: (out channels,) or None.
        stride: Vertical, horizontal.
        padding: Zeros before row 0 (top), before column 0 (left), below, to the right; a negative number crops.
        dilation: Vertical, horizontal.
        groups: Of the channels.
        act: Applied last.
    """

    name: ClassVar[str] = "conv"
    weight: Array
    bias: Array | None = None
    stride: Pair = (1, 1)
    padding: Borders = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    act: Activation = IDENTITY

    @property
    def depthwise(self) -> bool:
        """Whether each output channel reads one input channel only, and there is more than one."""
        return self.weight.shape[1] == 1 and self.groups > 1


@dataclass
class ConvTranspose(Op):
    """y = act(transposed conv(x) + bias + residual), as :class:`torch.nn.ConvTranspose2d`.

    Attributes:
        weight: (in channels, out channels / groups, kernel height, kernel width).
        bias: (out channels,) or None.
        stride: Vertical, horizontal.
        padding: Rows and columns cut off at the top and the left; the output's shape says where it ends.
        dilation: Vertical, horizontal.
        groups: Of the channels.
        act: Applied last.
    """

    name: ClassVar[str] = "conv_transpose"
    weight: Array
    bias: Array | None = None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    act: Activation = IDENTITY


@dataclass
class Linear(Op):
    """y = act(x W^T + bias + residual) on rank 2; inputs x, or x and the residual.

    Attributes:
        weight: (out features, in features).
        bias: (out features,) or None.
        act: Applied last.
    """

    name: ClassVar[str] = "linear"
    weight: Array
    bias: Array | None = None
    act: Activation = IDENTITY


@dataclass
class Pool(Op):
    """Max or average over windows of rank 4.

    A max over windows of one pixel with padding surrounds its input with minus infinity.

    Attributes:
        kind: ``"max"`` or ``"avg"``.
        kernel: Height and width of the window.
        stride: Vertical, horizontal.
        padding: Top, left, bottom, right. A window is clipped to the padded input, as torch does in ``ceil_mode``.
        dilation: Of max pooling.
        include_pad: Whether averages divide by the clipped window with its padding, or by its real pixels.
        divisor: What averages divide by instead, or None.
    """

    name: ClassVar[str] = "pool"
    kind: Literal["max", "avg"]
    kernel: Pair
    stride: Pair
    padding: Borders = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    include_pad: bool = True
    divisor: int | None = None


@dataclass
class AdaptivePool(Op):
    """Max or average over bins: output i of n covers rows floor(i H / n) to ceil((i + 1) H / n); 1x1 is global."""

    name: ClassVar[str] = "adaptive_pool"
    kind: Literal["max", "avg"]


@dataclass
class Affine(Op):
    """y = act(scale x + shift) with one number a channel: a batch norm that no convolution could take in."""

    name: ClassVar[str] = "affine"
    scale: Array
    shift: Array
    act: Activation = IDENTITY


@dataclass
class LayerNorm(Op):
    """Normalises over the channels of each pixel (rank 4) or over the features (rank 2)."""

    name: ClassVar[str] = "layer_norm"
    weight: Array | None
    bias: Array | None
    eps: float = 1e-5


@dataclass
class GroupNorm(Op):
    """Normalises over height, width and the channels of a group, rank 4; then scales and shifts each channel."""

    name: ClassVar[str] = "group_norm"
    groups: int
    weight: Array | None
    bias: Array | None
    eps: float = 1e-5
    act: Activation = IDENTITY


@dataclass
class Activate(Op):
    """y = act(x)."""

    name: ClassVar[str] = "activate"
    act: Activation


@dataclass
class Add(Op):
    """y = act(a + b); b has a's shape, or height and width 1 (one number a channel)."""

    name: ClassVar[str] = "add"
    act: Activation = IDENTITY


@dataclass
class Mul(Op):
    """y = act(a b); b has a's shape, or height and width 1 (the gate of squeeze-and-excitation)."""

    name: ClassVar[str] = "mul"
    act: Activation = IDENTITY


@dataclass
class Concat(Op):
    """Joins any number of inputs along the channels."""

    name: ClassVar[str] = "concat"


@dataclass
class Channels(Op):
    """Output channel i is input channel ``index[i]``: shuffles, slices, splits, repetitions.

    On rank 2 it reorders features: a reshape to rank 2, this and a reshape are any permutation within a sample.

    Attributes:
        index: (out channels,) int64.
    """

    name: ClassVar[str] = "channels"
    index: Array


@dataclass
class Pad(Op):
    """Adds zeros (top, left, bottom, right); a negative number crops."""

    name: ClassVar[str] = "pad"
    padding: Borders


@dataclass
class Reshape(Op):
    """The same numbers in torch's order under another shape; the batch stays the first axis."""

    name: ClassVar[str] = "reshape"


@dataclass
class Softmax(Op):
    """Softmax over the channels, or its logarithm."""

    name: ClassVar[str] = "softmax"
    log: bool = False


@dataclass
class Constant(Op):
    """A value that depends on no input."""

    name: ClassVar[str] = "constant"
    value: Array


OPS: dict[str, type[Op]] = {
    kind.name: kind
    for kind in (
        Conv, ConvTranspose, Linear, Pool, AdaptivePool, Affine, LayerNorm, GroupNorm, Activate, Add, Mul, Concat,
        Channels, Pad, Reshape, Softmax, Constant,
    )
}  # fmt: skip


@dataclass
class Node:
    """One operation in its place.

    Attributes:
        op: What it does.
        inputs: Values that it reads.
        output: The value that it writes.
        path: Module path in the source network, for messages and profiles.
    """

    op: Op
    inputs: list[int]
    output: int
    path: str = ""


@dataclass
class Graph:
    """A network: nodes in an order in which they can run.

    Attributes:
        shapes: Shape of every value.
        nodes: Operations, each after those whose values it reads.
        inputs: Values that the caller gives.
        outputs: Values that the caller gets.
        views: Shape under which the caller knows an input or an output, where it is not the value's own: the same
            numbers in the same order.
    """

    shapes: dict[int, Shape] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    views: dict[int, Shape] = field(default_factory=dict)

    def new_value(self, shape: Shape) -> int:
        """A value that nothing writes yet."""
        value = max(self.shapes, default=-1) + 1
        self.shapes[value] = tuple(int(n) for n in shape)
        return value

    def producers(self) -> dict[int, Node]:
        """The node that writes each value."""
        return {node.output: node for node in self.nodes}

    def consumers(self) -> dict[int, list[Node]]:
        """The nodes that read each value, once for each place where they do; outputs of the graph are not counted."""
        found: dict[int, list[Node]] = {value: [] for value in self.shapes}
        for node in self.nodes:
            for value in node.inputs:
                found[value].append(node)
        return found

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def to_plain(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """JSON-able structure, and the arrays by ``"node number.field"``."""
        arrays: dict[str, Array] = {}
        nodes = []
        for number, node in enumerate(self.nodes):
            settings: dict[str, Any] = {}
            for part in dataclasses.fields(node.op):
                value = getattr(node.op, part.name)
                if isinstance(value, np.ndarray):
                    key = f"{number}.{part.name}"
                    arrays[key], value = value, {"array": key}
                elif isinstance(value, Activation):
                    bounds = [bound if math.isfinite(bound) else None for bound in (value.low, value.high)]
                    value = [value.kind, *bounds]
                settings[part.name] = value
            nodes.append(
                {"op": node.op.name, "inputs": node.inputs, "output": node.output, "path": node.path, **settings}
            )
        shapes, views = (
            {str(value): list(shape) for value, shape in table.items()} for table in (self.shapes, self.views)
        )
        content = {"shapes": shapes, "nodes": nodes, "inputs": self.inputs, "outputs": self.outputs, "views": views}
        return content, arrays

    @classmethod
    def from_plain(cls, content: Mapping[str, Any], arrays: Mapping[str, Array]) -> Graph:
        """The graph that :meth:`to_plain` took apart.

        Raises:
            ValueError: If an entry is missing or of the wrong kind; :func:`netwright.deploy.graph.check` then tells
                whether the shapes fit together.
        """
        try:
            shapes, views = (
                {int(value): tuple(int(n) for n in shape) for value, shape in content[name].items()}
                for name in ("shapes", "views")
            )
            nodes = [_node(entry, arrays) for entry in content["nodes"]]
            return cls(shapes, nodes, [int(v) for v in content["inputs"]], [int(v) for v in content["outputs"]], views)
        except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"not a graph: {error!r}") from error


def _node(entry: Mapping[str, Any], arrays: Mapping[str, Array]) -> Node:
    kind = OPS[entry["op"]]
    hints = typing.get_type_hints(kind)
    settings: dict[str, Any] = {}
    for part in dataclasses.fields(kind):
        value = entry[part.name]
        if isinstance(value, dict):
            value = arrays[value["array"]]
        elif hints[part.name] is Activation:
            low, high = (
                default if bound is None else float(bound)
                for bound, default in zip(value[1:3], (-math.inf, math.inf), strict=True)
            )
            value = Activation(value[0], low, high)
        elif isinstance(value, list):
            value = tuple(int(n) for n in value)
        settings[part.name] = value
    return Node(kind(**settings), [int(v) for v in entry["inputs"]], int(entry["output"]), str(entry["path"]))
