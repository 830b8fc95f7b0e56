"""A network of which only parts fit into graphs: these parts, and what PyTorch runs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from netwright.deploy.graph.ir import (
    AdaptivePool,
    Conv,
    ConvTranspose,
    Graph,
    GroupNorm,
    LayerNorm,
    Linear,
    Pool,
)
from netwright.deploy.graph.tracing import Translation, Unsupported, depends_on_input, outputs_of, translate

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]

WORK = (Conv, ConvTranspose, Linear, Pool, AdaptivePool, LayerNorm, GroupNorm)
"""A graph without any of these is not worth leaving PyTorch for."""


@dataclass(frozen=True)
class Segment:
    """A part of a network.

    Attributes:
        body: A graph, or a module of torch that takes and gives tensors.
        inputs: Names of the tensors that it reads.
        outputs: Names of the tensors that it writes.
    """

    body: Graph | fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Segments:
    """A network as graphs with PyTorch between them, each after those whose tensors it reads.

    Attributes:
        parts: The segments, in an order in which they can run.
        inputs: Names of the network's inputs.
        outputs: Names of its outputs.
        constants: Outputs that depend on no input, by name.
        unsupported: What PyTorch has to do because graphs cannot.
    """

    parts: tuple[Segment, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]
    unsupported: tuple[Unsupported, ...]

    @property
    def graphs(self) -> list[Graph]:
        """The parts that a backend compiles."""
        return [part.body for part in self.parts if isinstance(part.body, Graph)]

    def compile(self, make: Callable[[Graph], Run]) -> Run:
        """The network as a function of its inputs, with each graph made callable by a backend.

        Args:
            make: Gives a function from the inputs of a graph, under the shapes of ``Graph.views``, to its outputs.
        """
        runs = [(part, make(part.body) if isinstance(part.body, Graph) else _eager(part.body)) for part in self.parts]

        def run(inputs: Sequence[Tensor]) -> list[Tensor]:
            tensors = dict(zip(self.inputs, inputs, strict=True)) | self.constants
            for part, call in runs:
                found = call([tensors[name] for name in part.inputs])
                tensors.update(zip(part.outputs, found, strict=True))
            return [tensors[name] for name in self.outputs]

        return run


def _eager(module: fx.GraphModule) -> Run:
    def run(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with torch.no_grad():
            return module(*inputs)

    return run


def split(module: torch.nn.Module, example: Tensor | Sequence[Tensor]) -> Segments:
    """The computation of a module, cut where an operator has no place in a graph.

    Arguments and errors are those of :func:`netwright.deploy.graph.capture`, but unsupported operators are left to
    PyTorch.

    Example:
        >>> from netwright.deploy.graph import run
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Softplus(), torch.nn.Linear(8, 2)).eval()
        >>> x = torch.rand(3, 4)
        >>> found = split(net, x)
        >>> [type(part.body).__name__ for part in found.parts]
        ['Graph', 'GraphModule', 'Graph']
        >>> result = found.compile(lambda graph: lambda inputs: run(graph, inputs, dtype=torch.float32))([x])
        >>> torch.allclose(result[0], net(x))
        True
    """
    program, whole = translate(module, example)
    constants = {node: value for node, value in whole.values.items() if not depends_on_input(value)}
    cut = _Cut(program, constants, set(whole.unsupported))
    while (refused := cut.attempt()) is not None:
        cut.eager |= refused
    return cut.segments(tuple(whole.unsupported.values()))


class _Cut:
    """A program under division: ``eager`` holds the nodes that PyTorch runs."""

    def __init__(
        self, program: torch.export.ExportedProgram, constants: dict[fx.Node, Any], eager: set[fx.Node]
    ) -> None:
        self.constants, self.eager = constants, eager
        self.nodes = [n for n in program.graph.nodes if n.op == "call_function" and n not in constants]
        self.inputs = [n for n in program.graph.nodes if n.op == "placeholder" and n not in constants]
        self.outputs = outputs_of(program)
        self.parts: list[Segment] = []

    def attempt(self) -> set[fx.Node] | None:
        """Forms all segments; gives the nodes that turn out to belong to PyTorch, None when there are none."""
        self.parts = []
        refused: set[fx.Node] = set()
        for level, nodes in sorted(self._levels().items()):
            inside = set(nodes)
            read = dict.fromkeys(
                source
                for node in nodes
                for source in node.all_input_nodes
                if source not in inside and source not in self.constants
            )
            written = [n for n in nodes if n in self.outputs or any(user not in inside for user in n.users)]
            written = [n for n in written if not isinstance(n.meta["val"], (tuple, list))]
            body: Graph | fx.GraphModule
            if level % 2:
                body = self._eager_part(nodes, list(read), written)
            else:
                translation = Translation(self.constants)
                for source in read:
                    translation.take_in(source)
                for node in nodes:
                    translation.translate(node)
                for node in written:
                    translation.give_out(node)
                body = translation.builder.graph
                idle = not any(isinstance(node.op, WORK) for node in body)
                refused |= inside if idle else set(translation.unsupported)
            self.parts.append(Segment(body, tuple(n.name for n in read), tuple(n.name for n in written)))
        return (refused - self.eager) or None

    def _levels(self) -> dict[int, list[fx.Node]]:
        """Nodes by segment: even numbers are graphs, odd ones PyTorch; each only reads lower numbers and itself."""
        level = dict.fromkeys(self.inputs, 0)
        found: dict[int, list[fx.Node]] = {}
        for node in self.nodes:
            sources = [source for source in node.all_input_nodes if source in level]
            # a part of a tuple stays with what computes the tuple
            eager = node in self.eager
            if isinstance(sources[0].meta["val"], (tuple, list)):
                eager = bool(level[sources[0]] % 2)
            lowest = max(level[source] for source in sources)
            level[node] = lowest + (lowest % 2 != eager)
            found.setdefault(level[node], []).append(node)
        return found

    def _eager_part(self, nodes: list[fx.Node], read: list[fx.Node], written: list[fx.Node]) -> fx.GraphModule:
        root = torch.nn.Module()
        graph = fx.Graph()
        copies = {source: graph.placeholder(source.name) for source in read}

        def copy_of(source: fx.Node) -> Any:
            if source not in copies:
                value = self.constants[source]
                if not isinstance(value, Tensor):
                    return value
                root.register_buffer(source.name, value)
                copies[source] = graph.get_attr(source.name)
            return copies[source]

        for node in nodes:
            copies[node] = graph.node_copy(node, copy_of)
        graph.output(tuple(copies[node] for node in written))
        return fx.GraphModule(root, graph)

    def segments(self, unsupported: tuple[Unsupported, ...]) -> Segments:
        """What the last attempt found."""
        fixed = {node.name: self.constants[node] for node in self.outputs if node in self.constants}
        inputs, outputs = (tuple(n.name for n in nodes) for nodes in (self.inputs, self.outputs))
        return Segments(tuple(self.parts), inputs, outputs, fixed, unsupported)
