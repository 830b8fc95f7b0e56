"""Graphs as data: splits, components, Debian's packages from a made-up index, citation graphs from made-up files."""

from __future__ import annotations

import dataclasses
import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from scipy import sparse

from netwright import storage
from netwright.console import UserError
from netwright.data import debian
from netwright.data.graphs import (
    FullBatch,
    debian_graph,
    digits_graph,
    largest_component,
    per_class_split,
    planetoid_split,
    row_normalise,
    undirected,
)
from netwright.data.planetoid import load_planetoid

LABELS = torch.arange(600) % 5


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_planetoid_split_has_so_many_of_each_class_and_no_node_twice():
    train, held_out, test = planetoid_split(LABELS, 20, 150, 300, generator())
    assert LABELS[train].bincount().tolist() == [20] * 5
    assert (int(held_out.sum()), int(test.sum())) == (150, 300)
    assert int((train.int() + held_out.int() + test.int()).max()) == 1
    again, other = (
        planetoid_split(LABELS, 20, 150, 300, generator()),
        planetoid_split(LABELS, 20, 150, 300, generator(1)),
    )
    assert all(map(torch.equal, again, (train, held_out, test)))
    assert not torch.equal(other[0], train)
    assert not torch.equal(other[2], test)


def test_a_split_by_classes_leaves_all_others_to_the_test():
    labels = torch.cat([LABELS, torch.full((57,), 5)])
    masks = per_class_split(labels, 20, 30, generator())
    assert [labels[mask].bincount().tolist()[5] for mask in masks] == [20, 30, 7]
    assert torch.equal(sum(mask.int() for mask in masks), torch.ones(657, dtype=torch.int32))
    drawn = sum(per_class_split(LABELS, 20, 30, generator(seed))[0].int() for seed in range(30))
    assert int((drawn == 0).sum()) < 30  # each node is drawn with a chance of 1 in 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: planetoid_split(torch.tensor([0] * 30 + [1] * 5)),
            "at least 20 nodes of each class, got 5 of class 1",
        ),
        (lambda: planetoid_split(LABELS), "n_val \\+ n_test must be <= 500, .* got 1500"),
        (lambda: planetoid_split(LABELS, per_class=0), "per_class must be >= 1, got 0"),
        (lambda: per_class_split(LABELS, 100, 21), "at least 121 nodes"),
        (lambda: per_class_split(LABELS, 100, 20), "y must have nodes left for the test"),
        (lambda: per_class_split(LABELS.float()), "y must hold one class"),
        (lambda: digits_graph(0), r"neighbours must lie in 1\.\.1796, got 0"),
        (lambda: debian_graph(["net"], index=INDEX), "sections must be at least 2 different ones, got net"),
        (lambda: debian_graph(["net", "mail"], index=INDEX), "sections must be those of the index, got mail"),
        (lambda: debian_graph(["net", "games"], words=0, index=INDEX), "words must be >= 1, got 0"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_are_normalised_dense_and_sparse():
    x = torch.rand(6, 4) * (torch.rand(6, 4) < 0.5)
    x[2] = 0
    found = row_normalise(x)
    assert found[2].tolist() == [0, 0, 0, 0]
    torch.testing.assert_close(found.sum(1), (x.sum(1) > 0).float())
    torch.testing.assert_close(row_normalise(x.to_sparse_csr()).to_dense(), found)


def test_the_digits_are_joined_with_their_nearest_both_ways():
    graph = digits_graph(3)
    counts = Counter(graph.edge_index[0].tolist())
    assert min(counts.values()) >= 3
    pairs = set(map(tuple, graph.edge_index.T.tolist()))
    assert pairs == {(b, a) for a, b in pairs}
    assert len(pairs) == graph.edge_index.shape[1]
    gaps = torch.cdist(graph.x, graph.x).fill_diagonal_(torch.inf)
    for node in range(0, 1797, 300):
        assert (node, int(gaps[node].argmin())) in pairs


def test_a_graph_on_its_own_device_keeps_its_tensors():
    graph = digits_graph(2)
    same = graph.split(per_class_split(graph.y)).to("cpu")
    assert same.edge_index is graph.edge_index
    assert same.train_mask is not None
    assert [batch is same for batch in FullBatch(same)] == [True]


PACKAGES = [
    debian.Package("a", "net", "fast games server", ("b", "libx")),
    debian.Package("b", "games", "fast board game", ("c",)),
    debian.Package("libx", "libs", "library", ("a",)),
    debian.Package("c", "net", "server for mail", ("a", "b", "c")),
    debian.Package("d", "net", "fast mail server", ()),
    debian.Package("e", "games", "board game", ("d",)),
]
INDEX = debian.PackageIndex(tuple(PACKAGES), "2026-01-02", "ab" * 32)


def test_debians_packages_of_some_sections_are_the_nodes_of_the_largest_component():
    graph = debian_graph(["net", "games"], words=3, index=INDEX)
    # a, b and c; d-e is smaller, libx has another section
    assert graph.y.tolist() == [0, 1, 0]
    assert graph.edge_index.tolist() == [[0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1]]
    # "fast" and "server" are in two of the lines, "games" too if it were not a section
    assert graph.x.to_dense().tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]]
    assert graph.classes == ("net", "games")
    assert graph.source["index date"] == "2026-01-02"


def test_the_graph_of_this_machine_is_kept_until_the_index_changes(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "cache_home", lambda: tmp_path)

    def ready(packages):
        packages = tuple(packages)
        digest = storage.digest([dataclasses.asdict(package) for package in packages])
        index = debian.PackageIndex(packages, "2026-01-02", digest)
        storage.write_json(debian.cached(), dataclasses.asdict(index))
        return index

    def same(graph, other):
        assert torch.equal(graph.x.to_dense(), other.x.to_dense())
        assert graph.x.crow_indices().dtype == other.x.crow_indices().dtype
        assert torch.equal(graph.edge_index, other.edge_index)
        assert torch.equal(graph.y, other.y)
        assert (graph.classes, graph.source) == (other.classes, other.source)

    made = debian_graph(["net", "games"], words=3, index=ready(PACKAGES))
    same(debian_graph(["net", "games"], words=3), made)
    with monkeypatch.context() as patch:
        patch.setattr(debian, "load_packages", lambda: pytest.fail("read again"))
        same(debian_graph(["net", "games"], words=3), made)
    assert debian_graph(["games", "net"], words=3).y.tolist() == [1, 0, 1]
    assert debian_graph(["net", "games"], words=1).num_features == 1
    changed = ready([*PACKAGES, debian.Package("f", "games", "fast game", ("a",))])
    same(debian_graph(["net", "games"], words=3), debian_graph(["net", "games"], words=3, index=changed))
    for file in tmp_path.glob("debian/graph-*"):
        file.write_bytes(b"damaged")
    with pytest.raises(UserError, match="graph-"):
        debian_graph(["net", "games"], words=3)


def test_components_and_edges():
    edges = np.array([[0, 2, 2, 4], [2, 5, 5, 4]])
    assert largest_component(edges, 6).tolist() == [True, False, True, False, False, True]
    assert undirected(edges, 6).tolist() == [[0, 2, 2, 5], [2, 0, 5, 2]]


# Nodes 0..503 in allx, tests 504, 506 and 507 in another order; 505 is left out.
TESTS = [507, 504, 506]


def write_planetoid(folder, name="made", protocol=2, **change):
    random = np.random.default_rng(0)
    allx = sparse.csr_matrix(random.integers(0, 2, (504, 6)).astype(np.float32))
    tx = sparse.csr_matrix(np.array([[7, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0], [6, 0, 0, 0, 0, 1]], np.float32))
    ally, ty = np.eye(3, dtype=np.int32)[random.integers(0, 3, 504)], np.eye(3, dtype=np.int32)[[2, 0, 1]]
    graph = defaultdict(list, {0: [1, 507, 0, 1], 507: [0], 504: [506]})
    parts = {"x": allx[:4], "y": ally[:4], "allx": allx, "ally": ally, "tx": tx, "ty": ty, "graph": graph} | change
    for part, value in parts.items():
        data = value if isinstance(value, bytes) else pickle.dumps(value, protocol=protocol)
        (folder / f"ind.{name}.{part}").write_bytes(data.replace(b"scipy.sparse._csr", b"scipy.sparse.csr"))
    (folder / f"ind.{name}.test.index").write_text("".join(f"{node}\n" for node in change.get("tests", TESTS)))
    return allx, ally


@pytest.mark.parametrize("protocol", [0, 2])
def test_citation_graphs_are_put_together_from_their_files(tmp_path, protocol):
    allx, ally = write_planetoid(tmp_path, protocol=protocol)
    graph = load_planetoid(tmp_path, "made")
    x = graph.x.to_dense()
    torch.testing.assert_close(x[:504], row_normalise(torch.from_numpy(allx.toarray())))
    assert x[504:].tolist() == [
        [1, 0, 0, 0, 0, 0],
        [0] * 6,
        pytest.approx([6 / 7, 0, 0, 0, 0, 1 / 7]),
        [1, 0, 0, 0, 0, 0],
    ]
    assert torch.equal(graph.y[:504], torch.from_numpy(ally.argmax(1)))
    assert graph.y[504:].tolist() == [0, 0, 1, 2]
    assert graph.edge_index.tolist() == [[0, 0, 1, 504, 506, 507], [1, 507, 0, 506, 504, 0]]
    assert graph.train_mask.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert graph.val_mask.nonzero().flatten().tolist() == list(range(4, 504))
    assert graph.test_mask.nonzero().flatten().tolist() == [504, 506, 507]


class Evil:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"graph": Evil()}, "print does not belong here"),
        ({"tx": b"\x80\x02"}, "damaged data file"),
        ({"tx": np.zeros((3, 6))}, "features must be a sparse matrix, got a ndarray"),
        ({"tests": [507, 504]}, "parts must fit"),
        ({"tests": [507, 504, 504]}, "different ones"),
        ({"tests": [507, 504, 3]}, "different ones"),
        ({"tests": ["x"]}, "damaged data file"),
        ({"graph": {0: [900]}}, r"neighbours must lie in 0\.\.507"),
        ({"graph": [1]}, "no citation graph"),
    ],
)
def test_damaged_citation_files(tmp_path, capsys, change, message):
    write_planetoid(tmp_path, **change)
    with pytest.raises(UserError, match=message):
        load_planetoid(tmp_path, "made")
    assert capsys.readouterr().out == ""


def test_a_matrix_with_indices_out_of_range_is_refused(tmp_path):
    bad = sparse.csr_matrix(np.eye(3, 6, dtype=np.float32))
    bad.indices[0] = 99
    write_planetoid(tmp_path, tx=bad)
    with pytest.raises(UserError, match="no citation graph"):
        load_planetoid(tmp_path, "made")


def test_a_missing_citation_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_planetoid(tmp_path, "cora")
