"""Strengths of operations and edges against masked features, gates set by hand, and spaces without cells."""

import pytest
import torch
from tests.support.supernets import Columns, OneEdge, batches

from netwright.nn.batchnorm import frozen_statistics
from netwright.search import spaces
from netwright.search.scoring import measure
from netwright.search.strengths import discretisation_accuracy, edge_strengths, op_strengths, supernet_accuracy
from netwright.search.superkernel_supernet import SuperKernelSupernet
from netwright.search.supernet import FixedGate

MICRO = spaces.get("micro-darts-2")
CHAIN = spaces.get("micro-chain")


def accuracy(supernet, val):
    """In training mode, with nothing shared."""
    supernet.train()
    with torch.no_grad(), frozen_statistics(supernet):
        right = sum((supernet(x).argmax(1) == labels).sum().item() for x, labels in val)
    return right / sum(len(labels) for _, labels in val)


def test_strengths_are_those_of_hand_masked_features():
    source = torch.Generator().manual_seed(1)
    head = torch.randn(4, 6, generator=source)
    parts = {"a": [1.0, 1, 0, 0, 0, 0], "b": [0.0, 0, 1, 1, 0, 0], "c": [0.0, 0, 0, 0, 1, 1]}
    supernet = OneEdge({name: Columns(kept) for name, kept in parts.items()}, head)
    weights = torch.tensor([0.2, 0.3, 0.5])
    supernet.arch["edge"].data.copy_(weights.log())
    x, labels = torch.randn(64, 6, 1, 1, generator=source), torch.randint(4, (64,), generator=source)

    def masked(kept):
        columns = sum(w * torch.tensor(parts[name]) for w, name in zip(weights, parts, strict=True) if name in kept)
        return ((x.flatten(1) * columns) @ head.T).argmax(1).eq(labels).double().mean()

    wanted = [masked("abc") - masked(set("abc") - {gone}) for gone in "abc"]
    assert op_strengths(supernet, [(x, labels)], "edge").tolist() == [value.item() for value in wanted]


def test_strengths_of_edges_and_accuracies_of_decisions_are_those_of_gates_set_by_hand():
    supernet, val = MICRO.supernet(1, 3, channels=4, seed=2), batches()
    full = accuracy(supernet, val)
    assert supernet_accuracy(supernet, val) == full
    for node in (0, 1):
        strengths = edge_strengths(supernet, val, node, "normal")
        assert strengths.shape == (node + 2,)
        for predecessor in range(node + 2):
            key = spaces.edge_key("normal", predecessor, node + 2)
            choice = supernet.keyed_choices()[key]
            inner = choice.gate
            supernet.set_gate(FixedGate(None, len(choice)), key)
            assert strengths[predecessor].item() == pytest.approx(full - accuracy(supernet, val), abs=1e-12)
            supernet.set_gate(FixedGate(2, len(choice)), key)
            fixed = accuracy(supernet, val)
            supernet.set_gate(inner, key)
            found = discretisation_accuracy(supernet, val, (predecessor, node + 2), choice.names[2], cell="normal")
            assert found == fixed


def test_strengths_of_a_chain_go_by_key():
    supernet, val = CHAIN.supernet(1, 3, seed=1), batches(1)
    key = "layer_1" if "layer_1" in supernet.arch else list(supernet.arch)[1]
    full = accuracy(supernet, val)
    strengths = op_strengths(supernet, val, key)
    choice = supernet.keyed_choices()[key]
    assert strengths.shape == (len(choice),)
    without, _ = measure(supernet, val, {key: 1 - torch.eye(len(choice))})
    assert strengths.tolist() == pytest.approx([full - value.item() for value in without], abs=1e-12)


def test_bad_input():
    supernet, val = MICRO.supernet(1, 3, channels=2), batches()
    for edge in ("normal_9_9", (9, 9)):
        with pytest.raises(ValueError, match=r"edge must be one of .* got 'normal_9_9'"):
            op_strengths(supernet, val, edge)
    with pytest.raises(ValueError, match="cell must be one of normal, reduce, got 'other'"):
        op_strengths(supernet, val, (0, 2), "other")
    with pytest.raises(ValueError, match="op must be one of"):
        discretisation_accuracy(supernet, val, (0, 2), "skip")
    for node in (-2, -1, 2):
        with pytest.raises(ValueError, match=rf"node must lie in \[0, 2\), got {node}"):
            edge_strengths(supernet, val, node)
    supernet.set_gate(FixedGate(1, 5), "normal_0_2")
    with pytest.raises(ValueError, match="edge must be open, got 'normal_0_2'"):
        op_strengths(supernet, val, (0, 2), "normal")


def test_spaces_without_cells_have_no_edges():
    chain, val = CHAIN.supernet(1, 3), batches()
    with pytest.raises(ValueError, match=r"supernet must be of a space of cells.*'micro-chain'; name a key: "):
        op_strengths(chain, val, (0, 2))
    with pytest.raises(ValueError, match="supernet must be of a space of cells"):
        edge_strengths(chain, val, 0)
    with pytest.raises(ValueError, match="supernet must have choices among candidates, got "):
        op_strengths(SuperKernelSupernet(CHAIN, 1, 3), val, "layer_0")
