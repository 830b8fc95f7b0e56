"""From a module of torch to a graph: traced by ``torch.export``, then translated operator by operator."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.nn.utils import parametrize

from netwright import console
from netwright.console import UserError

# importing them fills the table
from netwright.deploy.graph import arithmetic, convolution, joining, movement, normalisation  # noqa: F401
from netwright.deploy.graph.axes import View
from netwright.deploy.graph.builder import Builder
from netwright.deploy.graph.ir import Graph
from netwright.deploy.graph.table import HANDLERS, RefusedError
from netwright.nn.sparse import to_dense


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
        >>> layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", nn.ReLU())
        >>> float(plain_copy(layer).weight.min()) >= 0, parametrize.is_parametrized(layer)
        (True, True)
    """
    network = to_dense(module).eval().cpu().float()
    for part in network.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
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
    program = trace(module, example)
    translation = Translation(program)
    if translation.unsupported:
        # what is unknown may consist of what is known, but a message should name what the user wrote
        parts = Translation(_run(program.run_decompositions, _decompositions()))
        if parts.unsupported:
            raise UnsupportedOperator(list(translation.unsupported.values()))
        translation = parts
    return translation.builder.graph


def trace(module: nn.Module, example: Tensor | Sequence[Tensor]) -> torch.export.ExportedProgram:
    """The module as one graph of torch's operators, none of which changes its inputs; see :func:`capture`."""
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
    return _run(lambda: torch.export.export(network, inputs).run_decompositions({}))


def _run(make: Callable[..., torch.export.ExportedProgram], *arguments: Any) -> torch.export.ExportedProgram:
    try:
        with torch.no_grad(), _silence():
            return make(*arguments)
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"torch cannot trace this network: {line}") from error


def _decompositions() -> dict[Any, Any]:
    """torch's rules that take operators apart, without those for operators that we know."""
    return {op: rule for op, rule in torch.export.default_decompositions().items() if op not in HANDLERS}


@contextmanager
def _silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        # torch prints whole graphs when it fails, on either stream
        chatter = io.StringIO()
        with warnings.catch_warnings(), redirect_stdout(chatter), redirect_stderr(chatter):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class Translation:
    """A traced program, written into a graph.

    Attributes:
        builder: Holds the graph.
        unsupported: What was refused, by node. Its outputs count as inputs of the graph, so that the rest is judged.
    """

    def __init__(self, program: torch.export.ExportedProgram):
        self.builder = Builder()
        self.unsupported: dict[fx.Node, Unsupported] = {}
        self._values: dict[fx.Node, Any] = {}
        self._program = program
        self._constants = {**program.state_dict, **program.constants}
        with torch.no_grad():
            for node in program.graph.nodes:
                self._translate(node)

    def _translate(self, node: fx.Node) -> None:
        self.builder.path = _path(node)
        if node.op == "placeholder":
            self._values[node] = self._placeholder(node)
        elif node.op == "call_function":
            try:
                self._values[node] = self._call(node)
            except RefusedError as error:
                self._refuse(node, str(error))
        elif node.op == "output":
            self._outputs(node)

    def _placeholder(self, node: fx.Node) -> Any:
        spec = next(s for s in self._program.graph_signature.input_specs if s.arg.name == node.name)
        if spec.kind is InputKind.USER_INPUT:
            return self.builder.input(tuple(node.meta["val"].shape))
        assert spec.target is not None
        return self._constants[spec.target]

    def _call(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self._values.__getitem__)
        kwargs = fx.map_arg(node.kwargs, self._values.__getitem__)
        inputs = [self._values[source] for source in node.all_input_nodes]
        handler = HANDLERS.get(node.target)
        if not any(_depends(value) for value in inputs) or not isinstance(node.target, torch._ops.OpOverload):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if handler is None:
            raise RefusedError("unknown")
        return handler(self.builder, *args, **kwargs)

    def _refuse(self, node: fx.Node, reason: str) -> None:
        shapes = tuple(
            tuple(source.meta["val"].shape) for source in node.all_input_nodes if isinstance(source.meta["val"], Tensor)
        )
        self.unsupported[node] = Unsupported(str(node.target), self.builder.path, shapes, reason)
        self._values[node] = torch.utils._pytree.tree_map_only(
            Tensor, lambda value: self.builder.input(tuple(value.shape)), node.meta["val"]
        )

    def _outputs(self, node: fx.Node) -> None:
        specs = self._program.graph_signature.output_specs
        for spec, source in zip(specs, node.args[0], strict=True):  # type: ignore[arg-type]
            if spec.kind is not OutputKind.USER_OUTPUT or not isinstance(source, fx.Node):
                continue
            value = self._values[source]
            view = value if isinstance(value, View) else self.builder.constant(value)
            try:
                self.builder.output(view)
            except RefusedError as error:
                self.unsupported[node] = Unsupported("output", "", (view.shape,), str(error))


def _depends(value: Any) -> bool:
    """Whether a value, or a part of a tuple, comes from an input."""
    if isinstance(value, (tuple, list)):
        return any(_depends(part) for part in value)
    return isinstance(value, View)


def _path(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""
