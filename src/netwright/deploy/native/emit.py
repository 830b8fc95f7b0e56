"""From a graph to a program: where every value lies, which kernel runs every operation, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

from netwright.deploy.graph.ir import Concat, Conv, Graph, Linear, Node
from netwright.deploy.native import convolution, depthwise, fuse, small
from netwright.deploy.native.chains import Chains
from netwright.deploy.native.choose import DEPTHWISE_RATE, Choice, band_of, choose, cost, largest, shared
from netwright.deploy.native.convolution import Convolved
from netwright.deploy.native.depthwise import Depthwise, Expansion
from netwright.deploy.native.layout import Geometry, geometry, round_up
from netwright.deploy.native.machine import Machine
from netwright.deploy.native.memory import Life, plan
from netwright.deploy.native.program import Place, Program, Step
from netwright.deploy.native.strips import Part, Strips
from netwright.deploy.native.transposed import without_transposed

Chooser = Callable[[Conv, Geometry, Geometry, Machine], Choice]
PlaceOf = Callable[[int], Place]
AnyLayer = TypeVar("AnyLayer", Convolved, Depthwise)


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
        root: Of each value, the value in whose buffer it lies, and its first channel there.
        offsets: Of each buffer, where it begins in the arena.
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


def compile_graph(
    graph: Graph, machine: Machine, threads: int = 1, chooser: Chooser = choose, *, strips: bool = True
) -> Compiled:
    """Chooses kernels, plans memory and writes the C text of an optimised graph.

    Args:
        graph: As :func:`netwright.deploy.graph.optimise` returns it.
        machine: The processor it is for.
        threads: Threads that will run it.
        chooser: Decides how a convolution is run.
        strips: Whether layers run in strips where the cost model says that it pays.

    Raises:
        ValueError: If activations exceed 2 GiB.
    """
    graph = without_transposed(graph)
    program = Program(machine.unit, min(machine.unit, 16), threads)
    emitter = _Emitter(graph, machine, program, fuse.steps(graph, machine), chooser)
    layout = Layout(graph, _joined(graph))
    runs = emitter.runs(layout) if strips else [[node] for node in emitter.steps.order]
    scratch = [emitter.scratch(run) for run in runs]
    lives = _lives(graph, layout, emitter, runs)
    for place, floats in enumerate(scratch):
        if floats:
            lives[f"s{place}"] = Life(floats * threads, place, place)
    layout.offsets, arena = plan(lives)
    for place, run in enumerate(runs):
        work = f"m + {layout.offsets[f's{place}']} + (ptrdiff_t)id * {scratch[place]}" if scratch[place] else "m"
        emitter.emit(run, layout, work)
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
        if fuse.kind(node, graph) in ("convolution", "matrix"):
            x, y = geometry(graph.shapes[node.inputs[0]]), geometry(graph.shapes[node.output])
            found.append((_as_convolution(node), x, y))
    return found


def _as_convolution(node: Node) -> Conv:
    op = node.op
    if isinstance(op, Linear):
        return Conv(op.weight[:, :, None, None], op.bias, act=op.act)
    assert isinstance(op, Conv)
    return op


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


class _Emitter:
    """Everything that is decided about the steps of a graph, and their C.

    Args:
        graph: The network.
        machine: The processor.
        program: Where steps go.
        steps: The graph's.
        chooser: Decides how a convolution is run.
    """

    def __init__(self, graph: Graph, machine: Machine, program: Program, steps: fuse.Steps, chooser: Chooser) -> None:
        self.graph, self.machine, self.program, self.steps = graph, machine, program, steps
        self.choices: dict[int, Choice] = {}
        self.cut: dict[int, Strips] = {}
        for node in steps.order:
            if self.kind(node) in ("convolution", "matrix"):
                op, x, y = _as_convolution(node), *self.ends(node)
                choice = chooser(op, x, y, machine)
                if node.output in steps.gates:
                    choice = replace(choice, band=band_of(op, x, y, machine, "taps"))
                self.choices[node.output] = choice

    def kind(self, node: Node) -> fuse.Kind:
        return fuse.kind(node, self.graph)

    def ends(self, node: Node) -> tuple[Geometry, Geometry]:
        """Geometries of a node's first input and its output."""
        return self.geometry(node.inputs[0]), self.geometry(node.output)

    def geometry(self, value: int) -> Geometry:
        return geometry(self.graph.shapes[value])

    def nowhere(self, value: int) -> Place:
        """The geometry of a value whose place is not known yet."""
        return Place("m", self.geometry(value))

    def convolved(self, node: Node, place: PlaceOf) -> Convolved:
        """A convolution, with the threads that are worth it."""
        op, choice, gate = _as_convolution(node), self.choices[node.output], self.steps.gates.get(node.output)
        x, residual = place(gate.inputs[0] if gate else node.inputs[0]), _residual(node, place)
        scale = place(gate.inputs[1]) if gate else None
        layer = Convolved(op, _path(node, gate), x, place(node.output), residual, choice, scale=scale)
        cycles = cost(op, x.geo, layer.y.geo, self.machine, choice)
        copied = choice.kind != "direct" or gate is not None
        threads = self.program.threads
        worth = threads > 1 and shared(cycles, layer.kept, x.geo, layer.y.geo, copied=copied)
        return replace(layer, threads=threads if worth else 1)

    def depthwise(self, node: Node, place: PlaceOf) -> Depthwise:
        """A depthwise convolution, with the threads that are worth it."""
        assert isinstance(node.op, Conv)
        y, residual, before = place(node.output), _residual(node, place), self.steps.expansions.get(node.output)
        expansion = None
        if before is None:
            x = place(node.inputs[0])
        else:
            assert isinstance(before.op, Conv)
            expansion = Expansion(before.op, place(before.inputs[0]), largest(self.machine))
            x = Place("0", replace(self.geometry(node.inputs[0]), n=expansion.x.geo.n))
        layer = Depthwise(node.op, _path(node, before), x, y, residual, expansion)
        source, threads = expansion.x.geo if expansion else x.geo, self.program.threads
        worth = threads > 1 and shared(layer.kept / DEPTHWISE_RATE, layer.kept, source, y.geo, copied=False)
        return replace(layer, threads=threads if worth else 1)

    def runs(self, layout: Layout) -> list[list[Node]]:
        """The steps, those that run in strips together."""
        whole = {value for value, root in layout.root.items() if root != (value, 0)}
        whole |= {node.output for node in self.graph.nodes if isinstance(node.op, Concat)}
        found = []
        chains = Chains(self.graph, self.steps, self.machine, self.program.threads, self.choices, whole)
        for run, strips in chains.find():
            if strips is not None:
                self.cut[run[-1].output] = strips
            found.append(run)
        return found

    def scratch(self, run: list[Node]) -> int:
        """Floats of scratch memory that a thread needs."""
        strips = self.cut.get(run[-1].output)
        if strips is None:
            return self._scratch(run[0], None)
        work = (self._scratch(node, rows) for node, rows in zip(run, strips.most(), strict=True))
        return max(work) + sum(round_up(floats, 16) for floats in strips.floats().values())

    def _scratch(self, node: Node, strip: int | None) -> int:
        kind = self.kind(node)
        if kind in ("convolution", "matrix"):
            return convolution.scratch_floats(_in_strips(self.convolved(node, self.nowhere), strip), self.program)
        if kind == "depthwise":
            layer = self.depthwise(node, self.nowhere)
            return _in_strips(layer, strip).scratch(self.program.unit)
        return 0

    def emit(self, run: list[Node], layout: Layout, work: str) -> None:
        """Adds the steps of some nodes, which have ``work`` as scratch memory."""
        strips, node = self.cut.get(run[-1].output), run[-1]
        if strips is not None:
            _Chain(self, run, strips, layout, work).emit()
            return
        kind = self.kind(node)
        if kind in ("convolution", "matrix"):
            convolution.emit(self.convolved(node, layout.place), self.program, work)
        elif kind == "depthwise":
            depthwise.emit(self.depthwise(node, layout.place), self.program, work)
        elif kind == "vector":
            small.vector(node, layout, self.program)
        else:
            small.emit(node, layout, self.program)


class _Chain:
    """Layers that run in strips: one step, in which each thread computes its rows of the last layer band by band."""

    def __init__(self, emitter: _Emitter, run: list[Node], strips: Strips, layout: Layout, work: str) -> None:
        self.emitter, self.run, self.strips, self.layout = emitter, run, strips, layout
        self.rooms = {value: strips.room(value, rows) for value, rows in strips.rooms().items()}
        self.declarations, at = list[str](), 0
        for value, floats in strips.floats().items():
            self.declarations.append(f"float *const v{value} = {work} + {at};")
            at += round_up(floats, 16)
        self.work = f"{work} + {at}"
        self.most = strips.most()
        self.strip_of = [self._strip(node, rows) for node, rows in zip(run, self.most, strict=True)]

    def emit(self) -> None:
        """Adds the step."""
        strips, body = self.strips, list(self.declarations)
        for share, pieces in enumerate(strips.shares()):
            lines = [
                line
                for image, first, last in pieces
                for part in strips.parts(first, last)
                for line in self._part(part, image)
            ]
            body += lines if strips.threads == 1 else [f"if (id == {share}) {{", *lines, "}"]
        kept = sum(self._kept(node) for node in self.run)
        what = f"{len(self.run)} layers in strips of {strips.rows} rows"
        path = f"{self.run[0].path} to {self.run[-1].path}"
        self.emitter.program.steps.append(Step(path, what, body, kept, strips.threads == 1))

    def _strip(self, node: Node, rows: int) -> convolution.Strip | depthwise.Strip | small.Strip:
        """What computes some rows of a node."""
        emitter, place = self.emitter, self._places({}, 0)
        kind = emitter.kind(node)
        if kind == "convolution":
            sets = emitter.convolved(node, emitter.nowhere).sets(emitter.program.unit)
            return convolution.Strip(_in_strips(emitter.convolved(node, place), rows), sets, emitter.program)
        if kind == "depthwise":
            return depthwise.Strip(_in_strips(emitter.depthwise(node, place), rows), emitter.program)
        inputs = [place(value) for value in node.inputs]
        assert isinstance(node.op, small.RowWise)
        return small.Strip(node.op, inputs, place(node.output), emitter.program)

    def _places(self, held: dict[int, tuple[int, int]], image: int) -> PlaceOf:
        """Where values are at a time, of one image."""

        def place(value: int) -> Place:
            if value in self.rooms:
                geo = self.rooms[value]
                return Place(f"v{value}", geo, *held.get(value, (0, geo.h)))
            return self.layout.place(value).image(image)

        return place

    def _part(self, part: Part, image: int) -> list[str]:
        """The statements that compute rows of a layer."""
        node, strip, rows = self.run[part.layer], self.strip_of[part.layer], self.most[part.layer]
        place, ends = self._places(part.held, image), (part.first, part.last)
        geo = self.emitter.geometry(node.output)
        final = node.output in self.rooms or (image == geo.n - 1 and part.last == geo.h)
        lines = []
        for slide in part.slides:
            moved = self.rooms[slide.value]
            lines.append(
                f"nw_slide(v{slide.value}, {moved.plane}, {moved.c}, {slide.skip * moved.w}, {slide.rows * moved.w});"
            )
        if isinstance(strip, small.Strip):
            body = strip.rows([place(value) for value in node.inputs], place(node.output), *ends, final=final)
        elif isinstance(strip, convolution.Strip):
            layer = _in_strips(self.emitter.convolved(node, place), rows)
            body = strip.rows(layer, *ends, self.work, final=final)
        else:
            channelwise = _in_strips(self.emitter.depthwise(node, place), rows)
            body = strip.rows(channelwise, *ends, self.work, final=final)
        return [*lines, "{", *body, "}"]

    def _kept(self, node: Node) -> int:
        """Multiply-adds of a node."""
        emitter, kind = self.emitter, self.emitter.kind(node)
        if kind == "convolution":
            return emitter.convolved(node, emitter.nowhere).kept
        return emitter.depthwise(node, emitter.nowhere).kept if kind == "depthwise" else 0


def _in_strips(layer: AnyLayer, strip: int | None) -> AnyLayer:
    """The layer as it is run by one thread, at most ``strip`` rows at a time; itself if that is None."""
    return layer if strip is None else replace(layer, strip=strip, threads=1)


def _residual(node: Node, place: PlaceOf) -> Place | None:
    return place(node.inputs[1]) if len(node.inputs) > 1 else None


def _path(node: Node, before: Node | None) -> str:
    return node.path if before is None else f"{before.path} + {node.path}"


def _lives(graph: Graph, layout: Layout, emitter: _Emitter, runs: list[list[Node]]) -> dict[str, Life]:
    """When each buffer is written first and read last; inputs are written before, outputs read after all steps.

    What lies between layers that run in strips is part of their scratch memory.
    """
    first: dict[int, int] = {}
    last: dict[int, int] = {}

    def touch(value: int, step: int) -> None:
        root = layout.root[value][0]
        first[root] = min(first.get(root, step), step)
        last[root] = max(last.get(root, step), step)

    for value in graph.inputs:
        touch(value, -1)
    for step, run in enumerate(runs):
        between = {node.output for node in run[:-1]}
        for node in run:
            for value in [*emitter.steps.reads(node), node.output]:
                if value not in between:
                    touch(value, step)
    for value in graph.outputs:
        touch(value, len(runs))
    return {f"v{root}": Life(geometry(graph.shapes[root]).size, first[root], last[root]) for root in first}
