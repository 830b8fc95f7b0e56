"""Which copies of its input serve a 3x3 convolution best: the sparse kernel on each, by density and size of map."""

from __future__ import annotations

import numpy as np

from netwright.console import table
from netwright.cost.timing import cpu_name
from netwright.deploy.graph.ir import Conv, Graph, Node
from netwright.deploy.native.choose import Choice, candidates, cost
from netwright.deploy.native.layout import geometry
from netwright.deploy.native.machine import this_machine
from netwright.deploy.native.runtime import Network

LAYERS = {"64 at 56x56": (64, 56), "128 at 28x28": (128, 28), "256 at 14x14": (256, 14), "512 at 7x7": (512, 7)}
DENSITIES = (0.1, 0.05, 0.01)
KINDS = ("taps", "shifted", "phased")


def microseconds(op: Conv, shape: tuple[int, int, int, int], choice: Choice) -> float:
    graph = Graph()
    x, y = graph.new_value(shape), graph.new_value(shape)
    graph.nodes, graph.inputs, graph.outputs = [Node(op, [x], y, "layer")], [x], [y]
    network = Network(graph, chooser=lambda *_: choice)
    image, found = np.random.default_rng(0).standard_normal(shape, np.float32), np.empty(shape, np.float32)
    network([image.ctypes.data], [found.ctypes.data])
    return 1e6 * float(network.time_steps(30).sum())


def main() -> None:
    machine, rows = this_machine(), []
    for name, (channels, side) in LAYERS.items():
        shape, geo = (1, channels, side, side), geometry((1, channels, side, side))
        for density in DENSITIES:
            rng = np.random.default_rng(0)
            weight = rng.standard_normal((channels, channels, 3, 3)).astype(np.float32)
            op = Conv(weight * (rng.random(weight.shape) < density), padding=(1,) * 4)
            found = list(candidates(op, geo, geo, machine, dense=False))
            times = {}
            for kind in KINDS:
                best = sorted((c for c in found if c.kind == kind), key=lambda c: cost(op, geo, geo, machine, c))[:3]
                times[kind] = min(microseconds(op, shape, choice) for choice in best)
            fastest = min(times.values())
            rows.append([name, f"{density:.0%}", *(f"{times[k] / fastest:.2f}" for k in KINDS)])
    print(f"{cpu_name()}, one thread: time over that of the best copies")
    print(table(rows, ["channels", "density", *KINDS]))


if __name__ == "__main__":
    main()
