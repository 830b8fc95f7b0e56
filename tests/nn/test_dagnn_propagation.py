"""Normalised adjacency and propagation against dense algebra, networkx, torch_geometric and the limits of powers."""

from __future__ import annotations

import math

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netwright.nn.dagnn import AdjacencyCache, diffuse, gated_propagation, gcn_norm, limit_operator, propagate

PAIR = torch.tensor([[0, 1], [1, 0]])
PATH = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])


def graph(nodes, edges, seed=0, directed=False):
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(nodes, (2, edges), generator=generator)
    weight = torch.rand(edges, dtype=torch.float64, generator=generator)
    return (places, weight) if directed else (torch.cat([places, places.flip(0)], 1), weight.repeat(2))


def connected(nodes, seed=0):
    ring = torch.stack([torch.arange(nodes), torch.arange(1, nodes + 1) % nodes])
    extra, _ = graph(nodes, nodes, seed)
    return torch.cat([ring, ring.flip(0), extra], 1)


def test_small_graphs_by_hand():
    assert gcn_norm(PAIR, 2).to_dense().tolist() == [[0.5, 0.5], [0.5, 0.5]]
    path = gcn_norm(PATH, 3, dtype=torch.float64).to_dense()
    assert path[0].tolist() == pytest.approx([0.5, 1 / math.sqrt(6), 0.0])
    assert float(path[1, 1]) == pytest.approx(1 / 3)
    psi = torch.tensor([2.0, 3.0, 2.0], dtype=torch.float64).sqrt()
    torch.testing.assert_close(path @ psi, psi)
    complete = torch.combinations(torch.arange(6)).T
    full = gcn_norm(torch.cat([complete, complete.flip(0)], 1), 6)
    torch.testing.assert_close(full.to_dense(), torch.full((6, 6), 1 / 6))
    hops = propagate(full, torch.randn(6, 2), 4)
    torch.testing.assert_close(hops[:, 2:], hops[:, 1:2].expand(-1, 3, -1))
    assert gcn_norm(torch.empty(2, 0, dtype=torch.long), 3).to_dense().equal(torch.eye(3))


def test_a_loop_that_is_there_keeps_its_weight_and_repeated_edges_add_up():
    edges = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 0, 1, 0]])
    found = gcn_norm(edges, 2, torch.tensor([1.0, 1.0, 5.0, 2.0, 2.0])).to_dense()
    degrees = torch.tensor([5.0 + 3.0, 1.0 + 3.0])
    wanted = torch.tensor([[5.0, 3.0], [3.0, 1.0]]) / (degrees[:, None] * degrees).sqrt()
    torch.testing.assert_close(found, wanted)


def test_a_node_without_edges_and_loops_has_a_row_of_zeros():
    for mode in ("sym", "row"):
        found = gcn_norm(PAIR, 3, add_self_loops=False, mode=mode).to_dense()
        assert found.isfinite().all()
        assert found.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 10**6))
def test_rows_sum_to_one_and_both_modes_are_similar(nodes, edges, seed):
    edge_index, weight = graph(nodes, edges, seed)
    rows = gcn_norm(edge_index, nodes, weight, mode="row").to_dense()
    torch.testing.assert_close(rows.sum(1), torch.ones(nodes, dtype=torch.float64))
    symmetric = gcn_norm(edge_index, nodes, weight).to_dense()
    torch.testing.assert_close(symmetric, symmetric.T)
    torch.testing.assert_close((rows * rows.T).sqrt(), symmetric)
    assert float(torch.linalg.eigvalsh(symmetric).abs().max()) <= 1 + 1e-12


def test_networkx_has_the_same_laplacian():
    edges, _ = graph(15, 25)
    other = networkx.Graph()
    other.add_nodes_from(range(15))
    other.add_edges_from(edges.T.tolist())
    other.add_edges_from((node, node) for node in range(15))
    wanted = torch.eye(15, dtype=torch.float64) - torch.from_numpy(
        networkx.normalized_laplacian_matrix(other).toarray()
    )
    simple = torch.tensor([(a, b) for a, b in other.edges if a != b]).T
    found = gcn_norm(torch.cat([simple, simple.flip(0)], 1), 15, dtype=torch.float64).to_dense()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("directed", [False, True])
def test_torch_geometric_has_the_same_matrix(directed):
    conv = pytest.importorskip("torch_geometric.nn.conv.gcn_conv")
    edges, weight = graph(20, 50, directed=directed)
    edges, weight = torch.cat([edges[:, edges[0] != edges[1]], torch.tensor([[3], [3]])], 1), weight
    weight = torch.cat([weight[: edges.shape[1] - 1], weight.new_tensor([2.5])])
    for given_weight in (None, weight):
        index, values = conv.gcn_norm(edges, given_weight, 20, dtype=torch.float64)
        wanted = torch.zeros(20, 20, dtype=torch.float64).index_put_((index[1], index[0]), values, accumulate=True)
        found = gcn_norm(edges, 20, given_weight, dtype=torch.float64).to_dense()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_messages_go_from_sources_to_targets():
    found = propagate(gcn_norm(torch.tensor([[0], [1]]), 2, mode="row"), torch.tensor([[1.0], [0.0]]), 1)
    assert found[:, 1].flatten().tolist() == [1.0, 0.5]
    sparse = torch.sparse_coo_tensor(torch.tensor([[1], [0]]), torch.tensor([1.0]), (2, 2), check_invariants=False)
    assert torch.equal(gcn_norm(sparse, 2, mode="row").to_dense(), torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


@pytest.mark.parametrize("directed", [False, True])
def test_propagation_is_the_power_of_the_matrix(directed):
    edges, weight = graph(17, 40, directed=directed)
    adj = gcn_norm(edges, 17, weight)
    z = torch.randn(17, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([torch.linalg.matrix_power(adj.to_dense(), hop) @ z for hop in range(9)], 1)
    hops = propagate(adj, z, 8)
    torch.testing.assert_close(hops, wanted)
    torch.testing.assert_close(diffuse(adj, z, 8), wanted[:, 8])
    weight, bias = torch.randn(3, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    scores = torch.sigmoid(wanted @ weight + bias)
    out, found = gated_propagation(adj, z, weight, bias, 8)
    torch.testing.assert_close(found, scores)
    torch.testing.assert_close(out, (scores[..., None] * wanted).sum(1))


@pytest.mark.parametrize("directed", [False, True])
def test_gradients(directed):
    edges, weight = graph(7, 15, directed=directed)
    adj = gcn_norm(edges, 7, weight)
    torch.manual_seed(0)
    z, s, bias = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 2), (2,), (1,)))
    assert torch.autograd.gradcheck(lambda z: propagate(adj, z, 4), (z,))
    assert torch.autograd.gradcheck(lambda z: diffuse(adj, z, 4, 0.3), (z,))
    assert torch.autograd.gradcheck(lambda z: diffuse(adj, z, 4), (z,))
    assert torch.autograd.gradcheck(lambda z, s, b: gated_propagation(adj, z, s, b, 4), (z, s, bias))
    assert torch.autograd.gradcheck(lambda z, s: gated_propagation(adj, z, s, None, 0), (z, s))


@pytest.mark.parametrize("mode", ["sym", "row"])
def test_powers_tend_to_the_limit_as_the_second_eigenvalue_says(mode):
    edges = connected(30)
    adj = gcn_norm(edges, 30, mode=mode, dtype=torch.float64)
    limit = limit_operator(adj, mode)
    degree = torch.ones(30, dtype=torch.float64).index_add(0, edges[1], torch.ones(edges.shape[1]).double())
    missing = torch.bincount(edges[0][edges[0] == edges[1]], minlength=30) > 0
    degree -= missing.double()  # no loop was added where there is one
    root = degree.sqrt()
    closed = torch.outer(root, root) / degree.sum() if mode == "sym" else (degree / degree.sum()).expand(30, -1)
    torch.testing.assert_close(limit, closed)
    symmetric = gcn_norm(edges, 30, dtype=torch.float64).to_dense()
    second = float(torch.linalg.eigvalsh(symmetric).abs().sort().values[-2])
    dense = adj.to_dense()
    for k in (10, 40):
        gap = torch.linalg.matrix_power(symmetric, k) - torch.outer(root, root) / degree.sum()
        assert float(torch.linalg.matrix_norm(gap, 2)) == pytest.approx(second**k, rel=1e-6)
    assert second**400 < 1e-5
    assert float((torch.linalg.matrix_power(dense, 400) - limit).abs().max()) < 1e-5


def test_each_component_has_its_own_limit():
    edges = torch.cat([PATH, PAIR + 3], 1)
    found = limit_operator(gcn_norm(edges, 6, mode="row", dtype=torch.float64), "row")
    wanted = torch.zeros(6, 6, dtype=torch.float64)
    wanted[:3, :3] = torch.tensor([2.0, 3.0, 2.0]) / 7
    wanted[3:5, 3:5], wanted[5, 5] = 0.5, 1.0
    torch.testing.assert_close(found, wanted)
    bare = limit_operator(gcn_norm(torch.cat([PATH, torch.tensor([[0, 2], [2, 0]])], 1), 4, add_self_loops=False))
    assert float(bare[3].abs().max()) == 0.0  # the powers of a row of zeros
    torch.testing.assert_close(bare[:3, :3], torch.full((3, 3), 1 / 3))


def test_the_cache_is_made_anew_when_the_graph_changes():
    cache = AdjacencyCache()
    edges, weight = graph(6, 9)
    first = cache(edges, 6, weight)[0]
    assert cache(edges, 6, weight)[0] is first
    weight[0] = 5.0
    second = cache(edges, 6, weight)[0]
    assert second is not first
    assert torch.equal(second.to_dense(), gcn_norm(edges, 6, weight, dtype=torch.float32).to_dense())
    edges[0, 0] = (edges[0, 0] + 1) % 6
    assert cache(edges, 6, weight)[0] is not second
    third = cache(edges.clone(), 6, weight)[0]
    assert cache(edges, 6, None)[0] is not third
    assert cache(edges, 7, None)[0].shape == (7, 7)
    assert cache(edges, 7, None, torch.float64)[0].dtype is torch.float64
    with torch.inference_mode():
        unseen = edges.clone()  # changes of which torch does not count
        before = cache(unseen, 6)[0].to_dense()
        unseen[0, 0] = (unseen[0, 0] + 1) % 6
        assert not torch.equal(cache(unseen, 6)[0].to_dense(), before)


def test_a_directed_graph_is_transposed_for_the_way_back():
    edges, weight = graph(8, 12, directed=True)
    adj, transposed = AdjacencyCache()(edges, 8, weight, torch.float64)
    assert transposed is not adj
    assert torch.equal(transposed.to_dense(), adj.to_dense().T)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gcn_norm(torch.tensor([[0], [3]]), 3), r"edge_index must lie in 0\.\.2, got 0\.\.3"),
        (lambda: gcn_norm(torch.tensor([[-1], [0]]), 3), r"edge_index must lie in 0\.\.2, got -1\.\.0"),
        (lambda: gcn_norm(PAIR.T.repeat(2, 1), 2), r"edge_index must have shape \(2, edges\), got \(4, 2\)"),
        (lambda: gcn_norm(PAIR.float(), 2), "edge_index must hold integers, got torch.float32"),
        (lambda: gcn_norm(PAIR, 0), "num_nodes must be >= 1, got 0"),
        (lambda: gcn_norm(PAIR, 2, torch.ones(3)), r"edge_weight must have shape \(2,\), got \(3,\)"),
        (lambda: gcn_norm(PAIR, 2, torch.tensor([1.0, -2.0])), "edge_weight must be finite and >= 0, got -2.0"),
        (lambda: gcn_norm(PAIR, 2, torch.tensor([1.0, math.inf])), "edge_weight must be finite and >= 0, got inf"),
        (lambda: gcn_norm(PAIR, 2, torch.tensor([1.0, math.nan])), "edge_weight must be finite and >= 0, got nan"),
        (lambda: gcn_norm(PAIR, 2, torch.ones(2, requires_grad=True)), "must not require a gradient"),
        (lambda: gcn_norm(PAIR, 2, mode="left"), "mode must be 'sym' or 'row', got 'left'"),
        (lambda: gcn_norm(torch.eye(2).to_sparse(), 3), r"a sparse edge_index must have shape \(3, 3\)"),
        (lambda: gcn_norm(torch.eye(2).to_sparse(), 2, torch.ones(2)), "edge_weight must be None"),
        (lambda: propagate(gcn_norm(PAIR, 2), torch.eye(2), -1), "K must be >= 0, got -1"),
        (lambda: propagate(gcn_norm(PAIR, 2), torch.eye(3), 1), "adj must be square with a row for each of z"),
        (lambda: propagate(gcn_norm(PAIR, 2), torch.eye(2).double(), 1), "adj must be of the type of z"),
        (lambda: propagate(torch.eye(2), torch.eye(2), 1), "adj must be sparse CSR"),
        (lambda: diffuse(gcn_norm(PAIR, 2), torch.eye(2), 1, 1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: gated_propagation(gcn_norm(PAIR, 2), torch.eye(2), torch.ones(3), None, 1), r"weight must have shape"),
        (lambda: limit_operator(gcn_norm(PAIR, 2, add_self_loops=False)), "add loops"),
        (lambda: limit_operator(gcn_norm(torch.tensor([[0, 1, 2], [1, 2, 0]]), 3, mode="row"), "row"), "undirected"),
        (lambda: limit_operator(gcn_norm(PATH, 3), "row"), "undirected"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
