"""A network as what a verifier needs: a graph of operations, cut into layers, and the network itself in float64."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.deploy.graph import Graph, Node, UnsupportedOperator, capture
from netwright.deploy.graph.ir import Activate, AdaptivePool, GroupNorm, LayerNorm, Mul, Pool, Reshape, Softmax
from netwright.deploy.graph.passes import (
    fold_affine,
    fold_affine_forward,
    fold_padding,
    fuse_activations,
    remove_no_ops,
    remove_unused,
)
from netwright.deploy.graph.reference import kernel_of
from netwright.nn.activations import logits_only
from netwright.nn.modes import in_mode

# Those that keep every channel of every layer where it is.
PASSES = (
    remove_no_ops, fold_padding, fold_affine, fold_affine_forward, fold_affine, fuse_activations, remove_no_ops,
    remove_unused,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Layer:
    """A value of the graph through which everything goes.

    Attributes:
        value: Its number in the graph.
        shape: Of one activation, without the batch.
        path: The module that computes it; empty for the input.
    """

    value: int
    shape: tuple[int, ...]
    path: str

    @property
    def size(self) -> int:
        """Numbers in one activation."""
        return int(torch.Size(self.shape).numel())


class _Single(nn.Module):
    """Takes and gives float64, computes in float32."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x.float())
        return logits.double()  # a softmax of these has a gradient where one in float32 is saturated


class Network:
    """A classifier in evaluation mode, with its layers numbered from 0, the input.

    A layer ends at the first value behind an activation or a max pooling through which everything that comes later is
    reached; the last one is the logits. A convolution, its batch norm and its activation are one layer, branches that
    join again are one with what joins them. A softmax at the end is left out: it changes no order.

    Args:
        model: Gives (batch, classes) for (batch, \\*shape), or an output that holds these as ``logits``; parameters in
            float32. It is not changed.
        shape: Of one input, without the batch.

    Attributes:
        graph: The operations, batch norms folded in float64; None where an operator is unknown, and then layers but the
            input are too.
        layers: Input first.
        refused: Why there is no graph.
        shape: Of one input.
        classes: How many logits there are.
        double: A copy of the model in float64.

    Raises:
        TypeError: If the model gives no logits.
        ValueError: If the model holds numbers that float32 does not, or does not give one row of at least 2 logits.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [layer.size for layer in Network(net, (4,)).layers]
        [4, 3, 2]
    """

    def __init__(self, model: nn.Module, shape: Sequence[int]):
        self.shape = tuple(int(n) for n in shape)
        _check_precision(model)
        model = logits_only(model, torch.zeros(1, *self.shape))
        self.double = copy.deepcopy(model).double().eval().requires_grad_(False)
        logits = self.logits(torch.zeros(1, *self.shape, dtype=torch.float64))
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise ValueError(f"model must give (batch, classes >= 2), got {tuple(logits.shape)}")
        self.classes = logits.shape[1]
        self.graph: Graph | None = None
        self.refused = ""
        try:
            with in_mode(model, training=False):
                self.graph = _prepared(capture(model, torch.zeros(1, *self.shape)))
        except UnsupportedOperator as error:
            self.refused = "; ".join(map(str, error.nodes))
        self.layers = (Layer(-1, self.shape, ""),) if self.graph is None else _layers(self.graph, self.shape)

    @functools.cached_property
    def single(self) -> nn.Module:
        """The model as it runs, in float32, from float64 to float64: an attack's gradients at a third of the cost."""
        return _Single(copy.deepcopy(self.double).float())

    def logits(self, x: Tensor) -> Float[Tensor, "batch classes"]:
        """What the network itself computes, in float64.

        Args:
            x: (batch, \\*shape).
        """
        with torch.no_grad():
            return self.double(x.double().reshape(-1, *self.shape))

    def known(self) -> Graph:
        """The graph.

        Raises:
            TypeError: If an operator is unknown; it is named.
        """
        if self.graph is None:
            raise TypeError(f"the verifier does not know {self.refused}: only the grid engine at layer 0 takes it")
        return self.graph

    def layer(self, number: int) -> Layer:
        """A layer by its number.

        Raises:
            ValueError: If there is none of that number.
        """
        if not 0 <= number < len(self.layers):
            raise ValueError(f"layer must lie in 0..{len(self.layers) - 1}, got {number}")
        return self.layers[number]

    def between(self, first: int, last: int) -> list[Node]:
        """The operations after one layer, up to and with another."""
        start, end = self.layer(first).value, self.layer(last).value
        nodes = self.known().nodes
        places = {node.output: i for i, node in enumerate(nodes)}
        return nodes[places.get(start, -1) + 1 : places.get(end, -1) + 1]

    def forward(self, x: Tensor, first: int, last: int = -1, *, dtype: torch.dtype = torch.float64) -> Tensor:
        """Activations of a layer from those of an earlier one.

        Args:
            x: (batch, numbers of the layer), in any shape.
            first: The layer that ``x`` is.
            last: The layer wanted; the logits by default.
            dtype: Of the arithmetic. Gradients flow if ``x`` asks for them.

        Returns:
            (batch, numbers of that layer).
        """
        last = last % len(self.layers)
        if self.graph is None and first == 0:
            return self.logits(x)
        graph = self.known()
        start = self.layer(first).value
        values = {start: x.to(dtype).reshape(-1, *graph.shapes[start][1:])}
        with torch.set_grad_enabled(x.requires_grad):
            for node in self.between(first, last):
                shape = (len(x), *graph.shapes[node.output][1:])
                values[node.output] = kernel_of(node.op, shape, dtype=dtype)(*(values[v] for v in node.inputs))
        return values[self.layers[last].value].flatten(1)

    def gradient(self, alpha: Float[Tensor, " numbers"], layer: int, label: int) -> Float[Tensor, " numbers"]:
        """Of the margin of a class over its strongest rival, with respect to an activation."""
        with torch.enable_grad():
            x = alpha.detach().double().reshape(1, -1).requires_grad_()
            logits = self.double(x.reshape(1, *self.shape)) if layer == 0 else self.forward(x, layer)
            rivals = logits[0].index_fill(0, torch.tensor([label]), -torch.inf)
            return torch.autograd.grad(logits[0, label] - rivals.max(), x)[0][0]

    def activation(self, x: Tensor, layer: int) -> Float[Tensor, " numbers"]:
        """Of one input, at a layer, in float64."""
        return self.forward(x.double().reshape(1, -1), 0, layer)[0]


def network_of(model: nn.Module | Network, shape: Sequence[int]) -> Network:
    """The model as a :class:`Network`; one that is there already is taken as it is."""
    return model if isinstance(model, Network) else Network(model, shape)


def _check_precision(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"model must hold finite numbers, got others in {name}")
            if not torch.equal(tensor.double(), tensor.float().double()):
                raise ValueError(f"model must hold float32 numbers, got {tensor.dtype} in {name}: call model.float()")


def _prepared(graph: Graph) -> Graph:
    for rewrite in PASSES:
        rewrite(graph)
    producers = graph.producers()
    output = graph.outputs[0]
    while output in producers and isinstance(producers[output].op, Softmax):
        output = producers[output].inputs[0]
    graph.outputs = [output]
    remove_unused(graph)
    return graph


def _layers(graph: Graph, shape: tuple[int, ...]) -> tuple[Layer, ...]:
    (source,), (output,) = graph.inputs, graph.outputs
    last_use = {value: i for i, node in enumerate(graph.nodes) for value in node.inputs}
    found = [Layer(source, shape, "")]
    live = {source}
    bent = False
    for i, node in enumerate(graph.nodes):
        live.add(node.output)
        live = {value for value in live if last_use.get(value, -1) > i or value == output}
        if bends(node):
            bent = True
        if live == {node.output} and (node.output == output or bent):
            if node.output != output and _only_reshaped(graph, node.output, output):
                continue
            found.append(Layer(node.output, graph.shapes[node.output][1:], node.path))
            bent = False
    return tuple(found)


def bends(node: Node) -> bool:
    """Whether an operation is no affine map."""
    op = node.op
    if isinstance(op, (Pool, AdaptivePool)):
        return op.kind == "max"
    return bool(getattr(op, "act", None)) or isinstance(op, (Activate, GroupNorm, LayerNorm, Mul, Softmax))


def _only_reshaped(graph: Graph, value: int, output: int) -> bool:
    """Whether what comes after a value only gives the logits another shape."""
    readers = graph.consumers()[value]
    return len(readers) == 1 and isinstance(readers[0].op, Reshape) and readers[0].output == output
