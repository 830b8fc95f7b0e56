"""Propagation over a graph beside torch_geometric, training epochs of DAGNN, and sparse features beside dense ones.

    python benchmarks/dagnn.py [NAME ...] [--rounds 20] [--quick]

propagation: ten hops of personalised PageRank, ten columns, beside torch_geometric's ``APPNP`` with its normalisation
cached, forward and with gradient, on a random graph of 100,000 undirected edges and, where there is one, on the graph
of Debian's packages. epoch: forward, backward and a step of DAGNN (K = 10, ten classes) beside the same network whose
hops are a loop of torch_geometric's messages, each on autograd's tape (aim: 2 times as fast). features: a layer of 64
units on features of which 2 % or fewer are not zero, forward and backward, beside the dense layer (aim: 3 times).
million: a graph of a million edges, normalisation, ten hops and their gradient, with the bytes kept. Results are
compared to 1e-5 first; times are medians of alternating rounds with two threads, where there are two processors, with
the quartiles of the ratio within a round. The figures of all go to benchmarks/results/; --quick takes small sizes and
writes nothing. Exit 1 if an aim is missed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from netwright.cost import Comparison, compare_times, saved_bytes
from netwright.data import debian
from netwright.data.graphs import debian_graph
from netwright.nn.dagnn import DAGNN, AdjacencyCache, diffuse, gated_propagation
from netwright.nn.dagnn.networks import DropoutLinear
from netwright.seeding import seeded, stream
from support.record import Figure, over
from support.whole import recorded

INSTALLED = importlib.util.find_spec("torch_geometric") is not None
THREADS = min(2, os.cpu_count() or 1)
CLASSES, HOPS = 10, 10
Calls = dict[str, Callable[[], Any]]


def random_graph(nodes: int, edges: int) -> Tensor:
    """Undirected edges both ways; some nodes have many, as real graphs have them."""
    generator = stream(0, "graph")
    ends = (nodes * torch.rand(2, edges, generator=generator) ** 2).long()
    ends = ends[:, ends[0] != ends[1]]
    return torch.cat([ends, ends.flip(0)], 1).unique(dim=1)


def graphs(quick: bool) -> dict[str, tuple[Tensor, int]]:
    nodes, edges = (500, 2000) if quick else (20_000, 100_000)
    found = {f"random, {edges:,} edges": (random_graph(nodes, edges), nodes)}
    if not quick and debian.absent() is None:
        graph = debian_graph()
        found[f"Debian, {graph.edge_index.shape[1] // 2:,} edges"] = (graph.edge_index, graph.num_nodes)
    return found


def timed(calls: Calls, rounds: int) -> Comparison:
    found = compare_times(calls, rounds=rounds, threads=THREADS)
    print(found)
    return found


def absent(what: str, least: float | None = None) -> list[Figure]:
    """The figure that cannot be had without the peer."""
    return [Figure(what, None, least=least, note="torch_geometric is not installed: pip install torch_geometric")]


def propagation(rounds: int, quick: bool) -> list[Figure]:
    if not INSTALLED:
        return absent("ten hops by torch_geometric, over ours")
    from torch_geometric.nn import APPNP as Peer

    figures = []
    for name, (edge_index, nodes) in graphs(quick).items():
        z = torch.randn(nodes, CLASSES, generator=stream(0, "logits"))
        trained = z.clone().requires_grad_()
        peer, cache = Peer(HOPS, 0.1, cached=True), AdjacencyCache()

        def ours(z: Tensor, edge_index: Tensor = edge_index, cache: AdjacencyCache = cache) -> Tensor:
            adj, transposed = cache(edge_index, len(z))
            return diffuse(adj, z, HOPS, 0.1, transposed=transposed)

        def theirs(z: Tensor, edge_index: Tensor = edge_index, peer: Any = peer) -> Tensor:
            return peer(z, edge_index)

        def forward(by: Callable[[Tensor], Tensor], z: Tensor = z) -> None:
            with torch.no_grad():
                by(z)

        def both(by: Callable[[Tensor], Tensor], z: Tensor = trained) -> Tensor:
            (found,) = torch.autograd.grad(by(z).square().sum(), z)
            return found

        torch.testing.assert_close(ours(z), theirs(z), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both(ours), both(theirs), rtol=1e-5, atol=1e-5)
        ways = {"ours": ours, "torch_geometric APPNP": theirs}
        for what, call in (("forward", forward), ("with gradient", both)):
            calls = {way: lambda by=by, call=call: call(by) for way, by in ways.items()}
            found = timed(calls, rounds)["torch_geometric APPNP"]
            figures.append(over(found, f"{name}: ten hops by torch_geometric, {what}, over ours"))
    return figures


def epoch(rounds: int, quick: bool) -> list[Figure]:
    if not INSTALLED:
        return absent("a step with hops by messages, over ours", 2)
    from torch_geometric.nn import MessagePassing
    from torch_geometric.nn.conv.gcn_conv import gcn_norm

    class Hop(MessagePassing):
        def forward(self, x: Tensor, edge_index: Tensor, norm: Tensor) -> Tensor:
            return self.propagate(edge_index, x=x, norm=norm)

        def message(self, x_j: Tensor, norm: Tensor) -> Tensor:
            return norm[:, None] * x_j

    class Messages(nn.Module):
        """The network of DAGNN with hops by messages, normalised once."""

        def __init__(self, network: DAGNN, edge_index: Tensor, nodes: int):
            super().__init__()
            self.mlp, self.gate, self.hop = network.mlp, network.gate, Hop()
            self.graph = gcn_norm(edge_index, None, nodes)

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            hops = [self.mlp(x)]
            for _ in range(HOPS):
                hops.append(self.hop(hops[-1], *self.graph))
            return self.gate(torch.stack(hops, 1))[0]

    figures = []
    for name, (edge_index, nodes) in graphs(quick).items():
        x, y = torch.randn(nodes, 64, generator=stream(0, "x")), torch.arange(nodes) % CLASSES

        def step(
            network: nn.Module, optimizer: Any, x: Tensor = x, y: Tensor = y, edge_index: Tensor = edge_index
        ) -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(x, edge_index)[:200], y[:200]).backward()
            optimizer.step()

        with seeded(0, "init"):
            network = DAGNN(64, CLASSES, K=HOPS, dropout=0.0)
        messages = Messages(network, edge_index, nodes)
        torch.testing.assert_close(network(x, edge_index), messages(x, edge_index), rtol=1e-5, atol=1e-5)
        calls = {}
        for way, net in (("ours", network), ("messages", messages)):
            optimizer = torch.optim.Adam(net.parameters(), lr=1e-4)
            calls[way] = lambda net=net, optimizer=optimizer: step(net, optimizer)
        kept = [saved_bytes(partial(net, x, edge_index)) for net in (network, messages)]
        note = f"kept for the backward pass {kept[0] / 1e6:.1f} MB by ours, {kept[1] / 1e6:.1f} MB by messages"
        found = timed(calls, rounds)["messages"]
        figures.append(over(found, f"{name}: a step with hops by messages, over ours", least=2, note=note))
    return figures


def features(rounds: int, quick: bool) -> list[Figure]:
    nodes, wide = (300, 200) if quick else (10_000, 1200)
    figures = []
    for density in (0.005, 0.02):
        x = torch.rand(nodes, wide, generator=stream(0, "x"))
        x *= torch.rand(nodes, wide, generator=stream(0, "kept")) < density
        sparse = x.to_sparse_csr()
        with seeded(0, "init"):
            layer = DropoutLinear(wide, 64)

        def both(x: Tensor, layer: nn.Module = layer) -> Tensor:
            layer.zero_grad()
            found = layer(x)
            found.sum().backward()
            return found

        torch.testing.assert_close(both(sparse), both(x), rtol=1e-5, atol=1e-5)
        calls = {way: lambda given=given, both=both: both(given) for way, given in (("sparse", sparse), ("dense", x))}
        what = f"a layer on {nodes} x {wide} features, {100 * density:g} % not zero: dense, over sparse"
        figures.append(over(timed(calls, rounds)["dense"], what, least=3))
    return figures


def million(rounds: int, quick: bool) -> list[Figure]:
    nodes, edges = (1000, 5000) if quick else (100_000, 500_000)
    edge_index = random_graph(nodes, edges)
    z = torch.randn(nodes, CLASSES, requires_grad=True)
    weight, bias = torch.randn(CLASSES, requires_grad=True), torch.zeros(1, requires_grad=True)
    cache = AdjacencyCache()

    def once() -> Tensor:
        adj, transposed = cache(edge_index, nodes)
        return gated_propagation(adj, z, weight, bias, HOPS, transposed=transposed)[0]

    where = f"{nodes:,} nodes, {edge_index.shape[1]:,} edges"
    calls = {
        "hops and gradient": lambda: once().sum().backward(),
        "normalisation": lambda: AdjacencyCache()(edge_index, nodes),
    }
    return [
        *(Figure(f"{where}: milliseconds of {each.name}", each.median_ms) for each in timed(calls, rounds).timings),
        Figure(f"{where}: MB kept for the backward pass", saved_bytes(once) / 1e6),
    ]


if __name__ == "__main__":
    subjects = {"propagation": propagation, "epoch": epoch, "features": features, "million": million}
    sys.exit(recorded("dagnn", __doc__ or "", subjects, rounds=20, threads=THREADS))
