"""From a module of torch to a graph: traced by ``torch.export``, then translated operator by operator."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind

from netwright import console
from netwright.console import UserError
from netwright.deploy.exporters import first_line, silence

# importing them fills the table
from netwright.deploy.graph import arithmetic, convolution, joining, movement, normalisation  # noqa: F401
from netwright.deploy.graph.axes import View
from netwright.deploy.graph.builder import Builder
from netwright.deploy.graph.functional import make_functional
from netwright.deploy.graph.ir import Graph
from netwright.deploy.graph.table import HANDLERS, MIXED, RefusedError
from netwright.nn.sparse import unparametrized


@dataclass(frozen=True)
class Unsupported:
    """An operator of the source network that has no place in a graph.

    Attributes:
        operator: torch's name.
        path: Module that calls it; empty for the network itself.
        shapes: Shapes of the tensors that it reads.
        reason: Why.
    """

    operator: str
    path: str
    shapes: tuple[tuple[int, ...], ...]
    reason: str

    def __str__(self) -> str:
        shapes = " and ".join(str(shape) for shape in self.shapes) or "nothing"
        return f"{self.operator} in {self.path or 'the network'} on {shapes} ({self.reason})"


class UnsupportedOperator(UserError):
    """A network uses operators that the runtime does not have.

    Attributes:
        nodes: All of them.

    Example:
        >>> try:
        ...     capture(nn.Sequential(nn.Softplus()), torch.zeros(2, 3))
        ... except UnsupportedOperator as error:
        ...     print(error)
        the sparse runtime lacks 1 operator: aten.softplus.default in 0 on (2, 3) (unknown)
          do compile with fallback="torch", which leaves it to PyTorch
    """

    def __init__(self, nodes: Sequence[Unsupported]):
        self.nodes = tuple(nodes)
        count = f"{len(nodes)} operator{'s' * (len(nodes) > 1)}"
        super().__init__(
            f"the sparse runtime lacks {count}: {'; '.join(map(str, nodes))}",
            cure=f'compile with fallback="torch", which leaves {"them" if len(nodes) > 1 else "it"} to PyTorch',
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.nodes,)


def plain_copy(module: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode with masks and other parametrizations baked in.

    Example:
        >>> layer = nn.utils.parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.ReLU())
        >>> float(plain_copy(layer).weight.min()) >= 0, nn.utils.parametrize.is_parametrized(layer)
        (True, True)
    """
    network = unparametrized(module).eval().cpu().float()
    # channels-last weights would change the traced graph
    return network.to(memory_format=torch.contiguous_format).requires_grad_(False)


def capture(module: nn.Module, example: Tensor | Sequence[Tensor]) -> Graph:
    """The computation of a module in evaluation mode, for inputs of the example's shapes.

    The module is not changed. Masks and parametrizations are baked in, permutations become operations on channels,
    constants are folded; :func:`netwright.deploy.graph.optimise` does the rest.

    Args:
        module: The network. Its outputs may be a tensor or tuples, lists and dicts of them, which are flattened.
        example: One float32 tensor for each input, on the processor; its batch size is that of the graph.

    Raises:
        ValueError: If an example is no float32 tensor of the processor, or has an axis of size 0.
        UnsupportedOperator: If there are operators that the graph cannot hold; it names all of them.
        UserError: If torch cannot trace the network.

    Example:
        >>> graph = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten()), torch.zeros(1, 3, 6, 5))
        >>> [node.op.name for node in graph]
        ['conv', 'activate', 'reshape']
    """
    program, translation = translate(module, example)
    if translation.unsupported:
        # what is unknown may consist of what is known, but a message should name what the user wrote
        parts = Translation.of(_run(program.run_decompositions, _decompositions()))
        if parts.unsupported:
            raise UnsupportedOperator(list(translation.unsupported.values()))
        translation = parts
    return translation.builder.graph


def translate(
    module: nn.Module, example: Tensor | Sequence[Tensor]
) -> tuple[torch.export.ExportedProgram, Translation]:
    """The module as one program of torch's operators, none of which changes its inputs, and as a graph.

    Arguments and errors are those of :func:`capture`, but operators that the graph cannot hold are only listed.
    """
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    for i, x in enumerate(inputs):
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device.type != "cpu":
            got = f"{x.dtype} on {x.device}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"example {i} must be a float32 tensor on the cpu, got {got}")
        if not x.numel() or not x.ndim:
            raise ValueError(f"example {i} must have at least 1 axis, each of size >= 1, got {tuple(x.shape)}")
    if any(part.training for part in module.modules()):
        console.warn("the network is in training mode; it is compiled as in evaluation mode")
    network = plain_copy(module)
    program = _run(torch.export.export, network, inputs)
    if make_functional(program) and not (translation := Translation.of(program)).unsupported:
        return program, translation
    # A second trace, which takes longer than the first, but also takes apart much that is unknown.
    program = _run(program.run_decompositions, {})
    return program, Translation.of(program)


def _run(make: Callable[..., torch.export.ExportedProgram], *arguments: Any) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), silence():
            return make(*arguments)
    except Exception as error:
        raise UserError(f"torch cannot trace this network: {first_line(error)}") from error


def _decompositions() -> dict[Any, Any]:
    """torch's rules that take operators apart, without those for operators that we know."""
    return {op: rule for op, rule in torch.export.default_decompositions().items() if op not in HANDLERS}


class Foreign:
    """A value that no graph holds: integers, truth values, sizes that depend on data.

    Attributes:
        kind: What it is, for messages.
    """

    def __init__(self, kind: str):
        self.kind = kind


class Translation:
    """Operators of a traced program, written into a graph one after another.

    Attributes:
        builder: Holds the graph.
        values: What each node of the program is: a :class:`View`, a constant, a tuple of such.
        unsupported: What was refused, by node. Its outputs count as inputs of the graph, so that the rest is judged.
    """

    def __init__(self, constants: Mapping[fx.Node, Any] | None = None):
        self.builder = Builder()
        self.values: dict[fx.Node, Any] = dict(constants or {})
        self.unsupported: dict[fx.Node, Unsupported] = {}

    @classmethod
    def of(cls, program: torch.export.ExportedProgram) -> Translation:
        """A whole program."""
        translation = cls()
        arrays = {**program.state_dict, **program.constants}
        specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op == "placeholder" and specs[node.name].kind is InputKind.USER_INPUT:
                translation.take_in(node)
            elif node.op == "placeholder":
                translation.values[node] = arrays[specs[node.name].target]
            elif node.op == "call_function":
                translation.translate(node)
        for node in outputs_of(program):
            translation.give_out(node)
        return translation

    def take_in(self, node: fx.Node) -> None:
        """Makes a node's value an input of the graph."""
        self.values[node] = torch.utils._pytree.tree_map(self._from_outside, node.meta.get("val"))

    def _from_outside(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return Foreign("a number computed from the input")
        if value.dtype != torch.float32:
            return Foreign(f"a tensor of {value.dtype}")
        if not all(isinstance(n, int) and n >= 1 for n in value.shape):
            return Foreign("a tensor whose size depends on the input, or is 0")
        return self.builder.input(tuple(value.shape))

    def translate(self, node: fx.Node) -> None:
        """Writes what a node computes, or notes that it is unsupported."""
        self.builder.path = _path(node)
        try:
            with torch.no_grad():
                self.values[node] = self._call(node)
        except RefusedError as error:
            self.refuse(node, str(error))
            self.take_in(node)

    def give_out(self, node: fx.Node) -> None:
        """Makes a node's value an output of the graph."""
        value = self.values[node]
        try:
            if isinstance(value, Foreign):
                raise RefusedError(f"the output is {value.kind}")
            self.builder.output(value if isinstance(value, View) else self.builder.constant(value.float()))
        except RefusedError as error:
            self.refuse(node, str(error))

    def refuse(self, node: fx.Node, reason: str) -> None:
        """Notes that a node is unsupported."""
        read = (source.meta.get("val") for source in node.all_input_nodes)
        shapes = tuple(tuple(value.shape) for value in read if isinstance(value, Tensor))
        self.unsupported[node] = Unsupported(str(node.target), _path(node), shapes, reason)

    def _call(self, node: fx.Node) -> Any:
        args: Any = fx.map_arg(node.args, self.values.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, self.values.__getitem__)
        inputs = [self.values[source] for source in node.all_input_nodes]
        if not any(depends_on_input(value) for value in inputs) or node.target is operator.getitem:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        foreign = next((value for value in inputs if isinstance(value, Foreign)), None)
        handler = HANDLERS.get(node.target)
        if foreign is not None:
            raise RefusedError(f"it reads {foreign.kind}")
        if handler is None:
            raise RefusedError("unknown")
        if isinstance(args[0], Tensor) and node.target not in MIXED:
            raise RefusedError("its first operand is a constant")
        found = handler(self.builder, *args, **kwargs)
        for value, expected in zip(_leaves(found), _leaves(node.meta.get("val")), strict=False):
            if isinstance(value, View) and (value.shape != tuple(expected.shape) or expected.dtype != torch.float32):
                raise RefusedError(f"it gives {tuple(expected.shape)} of {expected.dtype}")
        return found


def outputs_of(program: torch.export.ExportedProgram) -> list[fx.Node]:
    """The nodes whose values the caller gets, in order; numbers and None among the outputs are left out."""
    (output,) = program.graph.find_nodes(op="output")
    specs = program.graph_signature.output_specs
    given = zip(specs, output.args[0], strict=True)
    return [node for spec, node in given if spec.kind is OutputKind.USER_OUTPUT and isinstance(node, fx.Node)]


def _leaves(value: Any) -> list[Any]:
    return torch.utils._pytree.tree_leaves(value, is_leaf=lambda part: isinstance(part, View) or part is None)


def depends_on_input(value: Any) -> bool:
    """Whether a value, or a part of a tuple, comes from an input."""
    if isinstance(value, (tuple, list)):
        return any(depends_on_input(part) for part in value)
    return isinstance(value, (View, Foreign))


def _path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""
