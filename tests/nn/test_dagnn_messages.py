"""DAGNN of messages: the same function as the quick one, edges that have gradients, torch_geometric's explainer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from netwright.nn.dagnn import DAGNN, gcn_norm

pytest.importorskip("torch_geometric")

from torch_geometric.explain import Explainer, GNNExplainer
from torch_geometric.nn import MessagePassing

from netwright.nn.dagnn.message_passing import MessagePassingDAGNN, hop_messages


@pytest.fixture
def graph():
    """Two triangles that an edge joins, both ways, and a node by itself."""
    one_way = torch.tensor([[0, 1, 2, 3, 4, 5, 2], [1, 2, 0, 4, 5, 3, 3]])
    edges = torch.cat([one_way, one_way.flip(0)], 1)
    torch.manual_seed(0)
    return torch.randn(7, 4), edges


@pytest.fixture
def networks():
    torch.manual_seed(1)
    quick, messages = DAGNN(4, 3, hidden=8, K=6).eval(), MessagePassingDAGNN(4, 3, hidden=8, K=6).eval()
    messages.load_state_dict(quick.state_dict())
    return quick, messages


def test_hops_are_powers_of_the_adjacency(graph):
    x, edges = graph
    dense = gcn_norm(edges, 7).to_dense()
    hops = hop_messages(5)(x, edges)
    for k in range(6):
        torch.testing.assert_close(hops[:, k], torch.linalg.matrix_power(dense, k) @ x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loops", [False, True])
def test_both_ways_give_the_same(graph, networks, loops):
    (x, edges), (quick, messages) = graph, networks
    if loops:
        edges = torch.cat([edges, torch.tensor([[1, 4], [1, 4]])], 1)
    weight = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(2)) + 0.1
    expected, gates = quick(x, edges, weight, return_gates=True)
    found, found_gates = messages(x, edges, weight.clone().requires_grad_(), return_gates=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_gates, gates, rtol=1e-5, atol=1e-6)
    assert torch.equal(messages(x, edges, weight), expected)  # the quick way


def test_gradients_of_edges_are_finite_differences(graph, networks):
    (x, edges), (_, messages) = graph, networks
    messages, x = messages.double(), x.double()
    weight = torch.rand(edges.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    assert torch.autograd.gradcheck(lambda w: messages(x, edges, w), weight.requires_grad_())


def test_an_explainer_masks_edges(graph, networks):
    """That it finds a gradient on each edge is the point; which edges count depends on random weights."""
    (x, edges), (_, messages) = graph, networks
    assert any(isinstance(part, MessagePassing) for part in messages.modules())
    explainer = Explainer(
        messages, GNNExplainer(epochs=60), explanation_type="model", edge_mask_type="object",
        model_config={"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"},
    )  # fmt: skip
    torch.manual_seed(0)
    mask = explainer(x, edges, index=0).edge_mask
    assert mask.shape == (edges.shape[1],)
    assert bool(mask.isfinite().all())
    assert float(mask.std()) > 0
    assert not messages.hops.explain  # left as it was
    messages(x, edges)


def test_sparse_graphs_have_no_edges_to_mask(graph, networks):
    (x, edges), (_, messages) = graph, networks
    sparse = torch.sparse_coo_tensor(edges.flip(0), torch.ones(edges.shape[1]), (7, 7)).to_sparse_csr()
    messages(x, sparse)
    messages.hops.explain = True
    with pytest.raises(ValueError, match="must be \\(2, edges\\)"):
        messages(x, sparse)


def test_several_loops_of_a_node_are_refused_where_only_one_would_count(graph, networks):
    (x, edges), (quick, messages) = graph, networks
    edges = torch.cat([edges, torch.tensor([[4, 4], [4, 4]])], 1)
    weight = torch.ones(edges.shape[1])
    assert torch.equal(messages(x, edges, weight), quick(x, edges, weight))
    with pytest.raises(ValueError, match="loop once where edges have masks or gradients, got node 4 twice"):
        messages(x, edges, weight.requires_grad_())


def test_copies(graph, networks):
    (x, edges), (quick, messages) = graph, networks
    assert set(messages.state_dict()) == set(quick.state_dict())
    for again in (copy.deepcopy(messages), pickle.loads(pickle.dumps(messages))):
        assert torch.equal(again(x, edges), quick(x, edges))
        assert again.hops.K == 6
