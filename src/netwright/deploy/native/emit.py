"""From a graph to a program: where every value lies, which kernel runs every operation, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from netwright.deploy.graph.ir import Concat, Conv, Graph, Linear, Node
from netwright.deploy.native import convolution, depthwise, small
from netwright.deploy.native.choose import Choice, choose, cost, largest, shared
from netwright.deploy.native.convolution import Convolved
from netwright.deploy.native.depthwise import Depthwise, Expansion
from netwright.deploy.native.layout import Geometry, geometry, is_direct
from netwright.deploy.native.machine import Machine
from netwright.deploy.native.memory import Life, plan
from netwright.deploy.native.program import Place, Program
from netwright.deploy.native.transposed import without_transposed

# What lies between an expansion and its depthwise convolution is worth keeping from memory if it fills a good part of
# the second-level cache.
FUSE_SHARE = 4
FUSE_BELOW = 40  # non-zeros a row of an expansion up to which its rows are computed one by one
DEPTHWISE_RATE = 12.0  # multiply-adds a cycle
Chooser = Callable[[Conv, Geometry, Geometry, Machine], Choice]


@dataclass
class Compiled:
    """A network ready for a compiler.

    Attributes:
        text: The C file.
        tables: What it reads.
        arena_floats: Floats of memory that it works in.
        inputs: Shapes of its inputs.
        outputs: Shapes of its outputs.
        steps: (module path, kernel, multiply-adds) of every step.
    """

    text: str
    tables: bytes
    arena_floats: int
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    steps: list[tuple[str, str, int]]


@dataclass
class Layout:
    """Where values lie: those joined by a concatenation share one buffer.

    Attributes:
        graph: The network.
        machine: The processor.
        root: Of each value, the value in whose buffer it lies, and its first channel there.
    """

    graph: Graph
    root: dict[int, tuple[int, int]] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)

    def place(self, value: int) -> Place:
        """The place of a value, once offsets are known."""
        geo = geometry(self.graph.shapes[value])
        root, channel = self.root[value]
        return Place(f"(m + {self.offsets[f'v{root}'] + channel * geo.plane})", geo)

    def lies_in(self, value: int, joined: int, channel: int) -> bool:
        """Whether a value was written straight into channel ``channel`` of a concatenation's output."""
        base, before = self.root[joined]
        return self.root[value] == (base, before + channel)


def compile_graph(graph: Graph, machine: Machine, threads: int = 1, chooser: Chooser = choose) -> Compiled:
    """Chooses kernels, plans memory and writes the C text of an optimised graph.

    Args:
        graph: As :func:`netwright.deploy.graph.optimise` returns it.
        machine: The processor it is for.
        threads: Threads that will run it.
        chooser: Decides how a convolution is run.

    Raises:
        ValueError: If activations exceed 2 GiB.
    """
    graph = without_transposed(graph)
    fused = _expansions(graph, machine)
    program = Program(machine.unit, min(machine.unit, 16), threads)
    layout = Layout(graph, _joined(graph))
    scratch: dict[int, int] = {}
    choices: dict[int, Choice] = {}
    order = [node for node in graph.nodes if node.output not in fused.values()]
    expansions = {output: graph.producers()[source] for output, source in fused.items()}
    for place, node in enumerate(order):
        scratch[place] = _scratch(node, graph, machine, program, chooser, choices, expansions)
    lives = _lives(graph, layout, order, expansions)
    for place, floats in scratch.items():
        if floats:
            lives[f"s{place}"] = Life(floats * threads, place, place)
    layout.offsets, arena = plan(lives)
    for place, node in enumerate(order):
        work = f"m + {layout.offsets[f's{place}']} + (ptrdiff_t)id * {scratch[place]}" if scratch[place] else "m"
        _emit(node, layout, program, machine, work, choices, expansions)
    enter = [small.exchange(layout.place(v), f"in[{i}]", program, entering=True) for i, v in enumerate(graph.inputs)]
    leave = [small.exchange(layout.place(v), f"out[{i}]", program, entering=False) for i, v in enumerate(graph.outputs)]
    return Compiled(
        program.text(enter, leave),
        program.tables(),
        arena,
        [graph.shapes[v] for v in graph.inputs],
        [graph.shapes[v] for v in graph.outputs],
        [(step.path, step.what, step.kept) for step in program.steps],
    )


def layers(graph: Graph) -> list[tuple[Conv, Geometry, Geometry]]:
    """The convolutions of a graph whose kernel is chosen, with the geometries of input and output."""
    graph = without_transposed(graph)
    found = []
    for node in graph.nodes:
        if _kind(node, graph) in ("convolution", "matrix"):
            draft = _convolved(node, graph, None, Choice(False, "taps", 1, 1, None))
            found.append((draft.op, draft.x.geo, draft.y.geo))
    return found


def _joined(graph: Graph) -> dict[int, tuple[int, int]]:
    """Values that are written straight into the buffer of the concatenation that reads them."""
    root = {value: (value, 0) for value in graph.shapes}
    producers = graph.producers()
    for node in reversed(graph.nodes):
        if not isinstance(node.op, Concat) or geometry(graph.shapes[node.output]).flat:
            continue
        channel = 0
        for value in node.inputs:
            taken = root[value] != (value, 0) or value in graph.inputs or node.inputs.count(value) > 1
            if not taken and value in producers:
                base, before = root[node.output]
                root[value] = (base, before + channel)
            channel += graph.shapes[value][1]
    # An entry may point to a value that was itself joined later in the walk; it never is, since outputs come first.
    return root


def _expansions(graph: Graph, machine: Machine) -> dict[int, int]:
    """Depthwise convolutions that take over the rows of the 1x1 before them: output value -> value in between."""
    producers, consumers, found = graph.producers(), graph.consumers(), {}
    for node in graph.nodes:
        source = node.inputs[0] if node.inputs else -1
        before = producers.get(source)
        if not (isinstance(node.op, Conv) and node.op.depthwise and before and isinstance(before.op, Conv)):
            continue
        if len(consumers[source]) > 1 or source in graph.outputs or len(before.inputs) > 1:
            continue
        x, y = geometry(graph.shapes[before.inputs[0]]), geometry(graph.shapes[source])
        sparse = np.count_nonzero(before.op.weight) < FUSE_BELOW * len(before.op.weight)
        large = y.size * 4 > machine.l2_bytes / FUSE_SHARE
        if sparse and large and not y.flat and is_direct(before.op, x, y) and not before.op.depthwise:
            found[node.output] = source
    return found


def _kind(node: Node, graph: Graph) -> str:
    op = node.op
    if isinstance(op, Linear):
        return "vector" if graph.shapes[node.output][0] == 1 else "matrix"
    if not isinstance(op, Conv):
        return "small"
    if geometry(graph.shapes[node.output]).flat:
        return "vector"
    return "depthwise" if op.depthwise and op.groups == graph.shapes[node.inputs[0]][1] else "convolution"


def _place(value: int, graph: Graph, layout: Layout | None) -> Place:
    """Where a value is, or its geometry alone while offsets are not known."""
    return layout.place(value) if layout else Place("m", geometry(graph.shapes[value]))


def _residual(node: Node, graph: Graph, layout: Layout | None) -> Place | None:
    return _place(node.inputs[1], graph, layout) if len(node.inputs) > 1 else None


def _convolved(node: Node, graph: Graph, layout: Layout | None, choice: Choice) -> Convolved:
    op = node.op
    if isinstance(op, Linear):
        op = Conv(op.weight[:, :, None, None], op.bias, act=op.act)
    assert isinstance(op, Conv)
    x, y = _place(node.inputs[0], graph, layout), _place(node.output, graph, layout)
    return Convolved(op, node.path, x, y, _residual(node, graph, layout), choice)


def _depthwise(
    node: Node, graph: Graph, layout: Layout | None, machine: Machine, expansions: dict[int, Node]
) -> Depthwise:
    assert isinstance(node.op, Conv)
    y, residual = _place(node.output, graph, layout), _residual(node, graph, layout)
    before = expansions.get(node.output)
    if before is None:
        return Depthwise(node.op, node.path, _place(node.inputs[0], graph, layout), y, residual, None)
    assert isinstance(before.op, Conv)
    x = Place("0", geometry(graph.shapes[node.inputs[0]]))
    expansion = Expansion(before.op, _place(before.inputs[0], graph, layout), largest(machine))
    return Depthwise(node.op, f"{before.path} + {node.path}", x, y, residual, expansion)


def _shared_convolution(layer: Convolved, program: Program, machine: Machine) -> Convolved:
    """The layer with the threads that are worth it."""
    x, y = layer.x.geo, layer.y.geo
    cycles, copied = cost(layer.op, x, y, machine, layer.choice), layer.choice.kind != "direct"
    worth = program.threads > 1 and shared(cycles, layer.kept, x, y, copied=copied)
    return replace(layer, threads=program.threads if worth else 1)


def _shared_depthwise(layer: Depthwise, program: Program) -> Depthwise:
    """The layer with the threads that are worth it."""
    source = layer.expansion.x.geo if layer.expansion else layer.x.geo
    worth = program.threads > 1 and shared(layer.kept / DEPTHWISE_RATE, layer.kept, source, layer.y.geo, copied=False)
    return replace(layer, threads=program.threads if worth else 1)


def _scratch(
    node: Node,
    graph: Graph,
    machine: Machine,
    program: Program,
    chooser: Chooser,
    choices: dict[int, Choice],
    expansions: dict[int, Node],
) -> int:
    """Floats of scratch memory that a thread needs for a node; decides how convolutions are run."""
    kind = _kind(node, graph)
    if kind in ("convolution", "matrix"):
        draft = _convolved(node, graph, None, Choice(False, "taps", 1, 1, None))
        choices[node.output] = chooser(draft.op, draft.x.geo, draft.y.geo, machine)
        layer = _convolved(node, graph, None, choices[node.output])
        return convolution.scratch_floats(_shared_convolution(layer, program, machine), program)
    if kind == "depthwise":
        return _depthwise(node, graph, None, machine, expansions).scratch(program.unit)
    return 0


def _emit(
    node: Node,
    layout: Layout,
    program: Program,
    machine: Machine,
    work: str,
    choices: dict[int, Choice],
    expansions: dict[int, Node],
) -> None:
    kind = _kind(node, layout.graph)
    if kind in ("convolution", "matrix"):
        layer = _convolved(node, layout.graph, layout, choices[node.output])
        convolution.emit(_shared_convolution(layer, program, machine), program, work)
    elif kind == "depthwise":
        channelwise = _depthwise(node, layout.graph, layout, machine, expansions)
        depthwise.emit(_shared_depthwise(channelwise, program), program, work)
    elif kind == "vector":
        small.vector(node, layout, program)
    else:
        small.emit(node, layout, program)


def _lives(graph: Graph, layout: Layout, order: list[Node], expansions: dict[int, Node]) -> dict[str, Life]:
    """When each buffer is written first and read last; inputs are written before, outputs read after all steps."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}

    def touch(value: int, step: int) -> None:
        root = layout.root[value][0]
        first[root] = min(first.get(root, step), step)
        last[root] = max(last.get(root, step), step)

    for value in graph.inputs:
        touch(value, -1)
    for step, node in enumerate(order):
        before = expansions.get(node.output)
        reads = before.inputs + node.inputs[1:] if before is not None else node.inputs
        for value in [*reads, node.output]:
            touch(value, step)
    for value in graph.outputs:
        touch(value, len(order))
    return {f"v{root}": Life(geometry(graph.shapes[root]).size, first[root], last[root]) for root in first}
