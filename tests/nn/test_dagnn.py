"""DAGNN's networks against closed forms, dense float64 algebra and torch_geometric's layers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from netwright.cost import saved_bytes
from netwright.nn.dagnn import APPNP, DAGNN, GCN, SGC, AdaptiveHopGate, NodeMLP, label_propagation, smoothness
from netwright.nn.dagnn.networks import DropoutLinear

PAIR = torch.tensor([[0, 1], [1, 0]])
PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])


def random_graph(nodes, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(nodes, (2, edges), generator=generator)
    return torch.cat([places, places.flip(0)], 1)


def dense_adjacency(edge_index, nodes, weight=None):
    a = torch.zeros(nodes, nodes, dtype=torch.float64)
    weight = torch.ones(edge_index.shape[1]) if weight is None else weight
    for (source, target), w in zip(edge_index.T.tolist(), weight.tolist(), strict=True):
        a[target, source] += w
    looped = a + torch.diag((a.diagonal() == 0).double())
    root = looped.sum(1).rsqrt()
    return root[:, None] * looped * root


def fixed_logits(network, s, bias=0.0):
    """The network with an identity for its perceptron and a gate that is known."""
    network.mlp = nn.Identity()
    with torch.no_grad():
        network.gate.projection.weight.copy_(torch.tensor([s]))
        network.gate.projection.bias.fill_(bias)
    return network.eval()


def test_two_connected_nodes_by_hand():
    network = fixed_logits(DAGNN(2, 2, K=2), [1.0, -1.0])
    out, gates = network(torch.eye(2), PAIR, return_gates=True)
    torch.testing.assert_close(gates, torch.tensor([[0.7310586, 0.5, 0.5], [0.2689414, 0.5, 0.5]]))
    torch.testing.assert_close(out, torch.tensor([[1.2310586, 0.5], [0.5, 0.7689414]]))


def test_a_graph_without_edges_and_a_network_without_hops():
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    s = [0.3, -1.0, 2.0]
    score = torch.sigmoid(z @ torch.tensor(s) + 0.7)[:, None]
    none = torch.empty(2, 0, dtype=torch.long)
    torch.testing.assert_close(fixed_logits(DAGNN(3, 3, K=4), s, 0.7)(z, none), 5 * score * z)
    torch.testing.assert_close(fixed_logits(DAGNN(3, 3, K=0), s, 0.7)(z, random_graph(5, 9)), score * z)


def test_an_open_gate_adds_all_hops():
    z = torch.randn(6, 2, generator=torch.Generator().manual_seed(2))
    edges = random_graph(6, 8)
    a = dense_adjacency(edges, 6)
    wanted = sum(torch.linalg.matrix_power(a, hop) @ z.double() for hop in range(8))
    found = fixed_logits(DAGNN(2, 2, K=7), [0.0, 0.0], 50.0)(z, edges)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_network_is_the_equations_of_the_paper():
    edges, weight = random_graph(9, 14), torch.rand(14, generator=torch.Generator().manual_seed(3)).repeat(2)
    x = torch.randn(9, 5, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(5)
    network = DAGNN(5, 3, hidden=7, K=6).eval()
    first, second = network.mlp.layers
    z = ((x @ first.weight.T + first.bias).relu() @ second.weight.T + second.bias).double()
    a = dense_adjacency(edges, 9, weight)
    hops = torch.stack([torch.linalg.matrix_power(a, hop) @ z for hop in range(7)], 1)
    line = network.gate.projection
    gates = torch.sigmoid(hops @ line.weight[0].double() + line.bias.double())
    found, scores = network(x, edges, weight, return_gates=True)
    torch.testing.assert_close(scores.double(), gates, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), (gates[..., None] * hops).sum(1), rtol=1e-5, atol=1e-5)
    # The gate as a module of its own does the same with hops that are given.
    torch.testing.assert_close(network.gate(hops.float())[0], found)
    assert sum(p.numel() for p in network.gate.parameters()) == 4
    assert sum(p.numel() for p in DAGNN(5, 3, gate_bias=False).gate.parameters()) == 3


def test_nodes_may_be_numbered_in_any_way_and_components_do_not_meet():
    torch.manual_seed(0)
    network = DAGNN(4, 3, K=5).eval()
    x, edges, order = torch.randn(10, 4), random_graph(10, 15), torch.randperm(10)
    place = torch.empty(10, dtype=torch.long)
    place[order] = torch.arange(10)
    torch.testing.assert_close(network(x[order], place[edges]), network(x, edges)[order])
    both = torch.cat([edges, edges + 10], 1)
    changed = torch.cat([x, 100 * torch.randn(10, 4)])
    torch.testing.assert_close(network(changed, both)[:10], network(x, edges))


def test_gradients_of_the_whole_network():
    torch.manual_seed(0)
    network = DAGNN(3, 2, hidden=4, K=3, dropout=0.0).double()
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    edges = random_graph(6, 8)
    assert torch.autograd.gradcheck(lambda x, *_: network(x, edges, return_gates=True), (x, *network.parameters()))


@pytest.mark.parametrize("make", [DAGNN, GCN, SGC, APPNP], ids=lambda make: make.__name__)
def test_one_node_one_class_and_a_gradient_for_every_parameter(make):
    network = make(2, 1, dropout=0.0)
    out = network(torch.rand(1, 2), torch.empty(2, 0, dtype=torch.long))
    assert out.shape == (1, 1)
    out.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize("make", [DAGNN, GCN, SGC, APPNP, NodeMLP], ids=lambda make: make.__name__)
def test_sparse_features_are_as_good_as_dense_ones(make):
    torch.manual_seed(0)
    network = make(20, 3, dropout=0.0)
    x, edges = torch.rand(8, 20) * (torch.rand(8, 20) < 0.2), random_graph(8, 12)
    grads = []
    for given in (x, x.to_sparse_csr()):
        network.zero_grad()
        found = network(given, edges)
        (found.square().sum() + found.sum()).backward()
        grads.append([found.detach(), *(p.grad.clone() for p in network.parameters())])
    torch.testing.assert_close(*grads)


def test_dropout_of_sparse_features_drops_and_rescales_what_is_there():
    layer = DropoutLinear(400, 400, dropout=0.75, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(400))
    x = torch.diag(torch.arange(1.0, 401.0)).to_sparse_csr()
    torch.manual_seed(0)
    kept = layer(x).diagonal() / torch.arange(1, 401)
    assert set(kept.tolist()) == {0.0, 4.0}
    assert 60 <= int((kept > 0).sum()) <= 140  # 100 expected, five standard deviations
    assert torch.equal(layer.eval()(x).diagonal(), torch.arange(1.0, 401.0))


def test_only_the_hops_are_stored():
    network = DAGNN(4, 5, hidden=4, K=30, dropout=0.0)
    x, edges = torch.rand(200, 4), random_graph(200, 300)
    network(x, edges)
    kept = saved_bytes(lambda: network(x, edges))
    hops, gates = 31 * 200 * 5 * 4, 31 * 200 * 4
    assert hops + gates <= kept <= hops + gates + 200 * 4 * (4 + 4 + 4 + 1)
    with torch.no_grad():
        assert saved_bytes(lambda: network(x, edges)) == 0


def test_the_network_notices_another_graph():
    torch.manual_seed(0)
    network = fixed_logits(DAGNN(3, 3, K=3), [1.0, 2.0, 3.0])
    x, edges = torch.rand(3, 3), PATH.clone()
    before = network(x, edges)
    edges[:, 2:] = 0  # 1-2 is replaced by a loop
    after = network(x, edges)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, copy.deepcopy(network)(x, edges))
    torch.testing.assert_close(before, pickle.loads(pickle.dumps(network))(x, PATH))


def test_half_precision_is_propagated_in_single():
    network = DAGNN(3, 2, K=3)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(torch.rand(3, 3), PATH)
    assert out.dtype is torch.float32
    out.sum().backward()


def test_baselines_are_their_equations():
    torch.manual_seed(0)
    x, edges = torch.randn(7, 4), random_graph(7, 10)
    a = dense_adjacency(edges, 7).float()
    sgc = SGC(4, 3, K=3).eval()
    torch.testing.assert_close(sgc(x, edges), torch.linalg.matrix_power(a, 3) @ x @ sgc.linear.weight.T + sgc.bias)
    gcn = GCN(4, 3, hidden=5, num_layers=3).eval()
    for bias in gcn.biases:
        nn.init.normal_(bias)
    h = x
    for place, (layer, bias) in enumerate(zip(gcn.layers, gcn.biases, strict=True)):
        h = a @ h @ layer.weight.T + bias
        h = h if place == 2 else h.relu()
    torch.testing.assert_close(gcn(x, edges), h)
    appnp = APPNP(4, 3, K=4, alpha=0.3).eval()
    z = h = appnp.mlp(x)
    for _ in range(4):
        h = 0.7 * a @ h + 0.3 * z
    torch.testing.assert_close(appnp(x, edges), h)


def test_label_propagation_uses_known_labels_alone():
    edges = random_graph(8, 6, seed=3)
    y, known = torch.arange(8) % 3, torch.arange(8) < 4
    found = label_propagation(edges, y, known, 3, K=5, alpha=0.2)
    a = dense_adjacency(edges, 8).float()
    start = torch.eye(3)[y] * known[:, None]
    h = start
    for _ in range(5):
        h = 0.8 * a @ h + 0.2 * start
    torch.testing.assert_close(found, h)
    assert torch.equal(found, label_propagation(edges, torch.where(known, y, 7), known, 3, K=5, alpha=0.2))


def test_the_layers_of_torch_geometric_give_the_same():
    geometric = pytest.importorskip("torch_geometric.nn")
    torch.manual_seed(0)
    n = 40
    edges, x = random_graph(n, 90), torch.randn(n, 6)
    edges = edges[:, edges[0] != edges[1]]  # of several loops of a node theirs keeps one
    weight = torch.rand(edges.shape[1] // 2).repeat(2)
    peer = geometric.SGConv(6, 6, K=7, bias=False)
    with torch.no_grad():
        peer.lin.weight.copy_(torch.eye(6))
    network = SGC(6, 6, K=7)
    with torch.no_grad():
        network.linear.weight.copy_(torch.eye(6))
    torch.testing.assert_close(network(x, edges, weight), peer(x, edges, weight), rtol=1e-5, atol=1e-5)
    for alpha in (0.0, 0.1):
        ours = APPNP(6, 4, K=10, alpha=alpha).eval()
        wanted = geometric.APPNP(10, alpha)(ours.mlp(x), edges, weight)
        torch.testing.assert_close(ours(x, edges, weight), wanted, rtol=1e-5, atol=1e-5)
    layer = geometric.GCNConv(6, 4)
    gcn = GCN(6, 4, num_layers=1).eval()
    with torch.no_grad():
        layer.lin.weight.copy_(gcn.layers[0].weight)
    torch.testing.assert_close(gcn(x, edges, weight), layer(x, edges, weight), rtol=1e-5, atol=1e-5)
    # In a container of theirs, and with a graph of theirs.
    from torch_geometric.data import Data

    ours = DAGNN(6, 4).eval()
    data = Data(x=x, edge_index=edges)
    chain = geometric.Sequential("x, edge_index", [(ours, "x, edge_index -> x"), nn.Softmax(1)])
    torch.testing.assert_close(chain(data.x, data.edge_index), ours(x, edges).softmax(1))


def test_smoothness_by_hand():
    assert float(smoothness(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))) == pytest.approx(math.sqrt(0.5))
    assert float(smoothness(torch.tensor([[1.0, 1.0], [3.0, 3.0], [0.1, 0.1]]))) == 0.0
    assert float(smoothness(torch.tensor([[1.0, 2.0], [-2.0, -4.0]]))) == pytest.approx(1.0)
    assert float(smoothness(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))) == pytest.approx(0.5)


def test_smoothness_is_the_mean_over_pairs_whatever_the_lengths():
    x = torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    units = x / x.norm(dim=1, keepdim=True)
    pairs = [(units[i] - units[j]).norm() / 2 for i in range(30) for j in range(30) if i != j]
    exact = smoothness(x)
    torch.testing.assert_close(exact, torch.stack(pairs).mean())
    scale = torch.logspace(-160, 160, 30, dtype=torch.float64)[:, None]  # squares of these under- and overflow
    torch.testing.assert_close(smoothness(scale * x), exact)
    drawn = smoothness(x, 400, torch.Generator().manual_seed(1))
    assert drawn != exact
    assert abs(float(drawn - exact)) < 5 * float(torch.stack(pairs).std()) / 20
    assert smoothness(x, 435) == exact  # there are no more pairs


def test_smoothness_of_many_nodes_comes_in_blocks(monkeypatch):
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = smoothness(x)
    monkeypatch.setattr("netwright.nn.dagnn.smoothing._BLOCK", 120)
    torch.testing.assert_close(smoothness(x), whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DAGNN(3, 2, K=-1), "K must be >= 0, got -1"),
        (lambda: DAGNN(3, 2, dropout=1.0), r"dropout must lie in \[0, 1\), got 1.0"),
        (lambda: DAGNN(3, 2, dropout=float("nan")), "dropout must lie"),
        (lambda: DAGNN(0, 2), "in_dim must be >= 1, got 0"),
        (lambda: DAGNN(3, 0), "num_classes must be >= 1, got 0"),
        (lambda: DAGNN(3, 2, hidden=0), "hidden must be >= 1"),
        (lambda: DAGNN(3, 2, num_mlp_layers=0), "num_mlp_layers must be >= 1"),
        (lambda: APPNP(3, 2, alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: GCN(3, 2, num_layers=0), "num_layers must be >= 1"),
        (lambda: SGC(3, 2, K=-1), "K must be >= 0"),
        (lambda: AdaptiveHopGate(2)(torch.rand(4, 3)), r"h must have shape \(nodes, hops, 2\)"),
        (lambda: DAGNN(3, 2)(torch.rand(4, 5), PAIR), r"x must have shape \(nodes, 3\)"),
        (lambda: DAGNN(3, 2)(torch.rand(2, 3), PATH), r"edge_index must lie in 0\.\.1, got 0\.\.2"),
        (lambda: DAGNN(3, 2)(torch.rand(4, 3).to_sparse_coo(), PAIR), "x must be dense or sparse CSR"),
        (lambda: DAGNN(3, 2)(torch.ones(4, 3, dtype=torch.int64), PAIR), "x must hold floating-point numbers"),
        (lambda: DAGNN(3, 2)(torch.full((4, 3), math.nan), PAIR), "x must be finite, got NaN or infinity"),
        (lambda: DAGNN(3, 2)(torch.full((4, 3), math.inf).to_sparse_csr(), PAIR), "x must be finite"),
        (lambda: DAGNN(3, 2, K=2.5), "K must be a whole number >= 0, got 2.5"),
        (lambda: smoothness(torch.rand(1, 3)), "at least 2 nodes"),
        (lambda: smoothness(torch.full((2, 2), math.nan)), "x must be finite"),
        (lambda: smoothness(torch.rand(3, 3), 0), "max_pairs must be >= 1, got 0"),
        (lambda: label_propagation(PAIR, torch.tensor([0, 5]), torch.tensor([True, True]), 2), r"y must lie in 0\.\.1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
