"""Graphs whose nodes are to be classified: what one is, its splits, and graphs that are there without a network.

Row-normalised features and splits follow Yang, Cohen and Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph
Embeddings", ICML 2016, arXiv:1603.08861, and Shchur et al., "Pitfalls of Graph Neural Network Evaluation", 2018,
arXiv:1811.05868.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from netwright import storage
from netwright.data import debian
from netwright.nn.dagnn.adjacency import csr

DEBIAN_VERSION = 1  # of what `debian_graph` makes of an index: another one is another file of the cache
DEBIAN_SECTIONS = ("devel", "java", "net", "admin", "utils", "x11", "text", "science")

Masks = tuple[Bool[Tensor, " nodes"], Bool[Tensor, " nodes"], Bool[Tensor, " nodes"]]


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph with features and a class for each node; the names of its fields are those of torch_geometric's ``Data``.

    Attributes:
        x: Features (nodes, features), dense or sparse CSR.
        edge_index: Integers (2, edges), sources in the first row; each undirected edge both ways.
        y: Class of each node, from 0.
        edge_weight: Of each edge, or None.
        classes: Names of the classes.
        train_mask: Nodes whose labels are trained on, or None before there is a split.
        val_mask: Nodes whose labels choose the epoch.
        test_mask: Nodes that are asked at the end.
        source: Where it comes from, facts that evidence quotes.
    """

    x: Tensor
    edge_index: Int[Tensor, "2 edges"]
    y: Int[Tensor, " nodes"]
    edge_weight: Float[Tensor, " edges"] | None = None
    classes: tuple[str, ...] = ()
    train_mask: Bool[Tensor, " nodes"] | None = None
    val_mask: Bool[Tensor, " nodes"] | None = None
    test_mask: Bool[Tensor, " nodes"] | None = None
    source: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.y)

    @property
    def num_features(self) -> int:
        """Features of a node."""
        return self.x.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes) or int(self.y.max()) + 1

    def split(self, masks: Masks) -> Graph:
        """The same graph with these training, validation and test nodes."""
        train, held_out, test = masks
        return dataclasses.replace(self, train_mask=train, val_mask=held_out, test_mask=test)

    def to(self, device: torch.device | str) -> Graph:
        """The graph on a device; the tensors are the same ones where they are there already."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


class FullBatch:
    """The one batch of an epoch that is a whole graph, for :func:`netwright.train.fit`.

    Args:
        graph: It.
    """

    def __init__(self, graph: Any):
        self.graph = graph

    def set_epoch(self, epoch: int) -> None:
        """Nothing: all epochs are alike."""

    def __iter__(self) -> Iterator[Any]:
        yield self.graph

    def __len__(self) -> int:
        return 1


def planetoid_split(
    y: Int[Tensor, " nodes"],
    per_class: int = 20,
    n_val: int = 500,
    n_test: int = 1000,
    generator: torch.Generator | None = None,
) -> Masks:
    """Random training nodes of each class, then validation and test nodes from all others.

    Args:
        y: Class of each node, from 0; every class up to the largest must have enough nodes.
        per_class: Training nodes of each class, at least 1.
        n_val: Validation nodes, at least 1.
        n_test: Test nodes, at least 1.
        generator: Of the choice.

    Raises:
        ValueError: If a number is below 1, a class has fewer than ``per_class`` nodes, or too few nodes are left.

    Example:
        >>> masks = planetoid_split(torch.arange(4).repeat(10), per_class=2, n_val=8, n_test=20)
        >>> [int(mask.sum()) for mask in masks]
        [8, 8, 20]
    """
    order, rank = _ranked(y, generator)
    _sizes(per_class=per_class, n_val=n_val, n_test=n_test)
    _enough(y, per_class)
    train = rank < per_class
    rest = order[~train[order]]
    if len(rest) < n_val + n_test:
        raise ValueError(f"n_val + n_test must be <= {len(rest)}, the nodes that are left, got {n_val + n_test}")
    return train, _mask(rest[:n_val], len(y)), _mask(rest[n_val : n_val + n_test], len(y))


def per_class_split(
    y: Int[Tensor, " nodes"], train: int = 20, validation: int = 30, generator: torch.Generator | None = None
) -> Masks:
    """So many random training and validation nodes of each class; all others test.

    Args:
        y: Class of each node, from 0.
        train: Training nodes of each class, at least 1.
        validation: Validation nodes of each class, at least 1.
        generator: Of the choice.

    Raises:
        ValueError: If a number is below 1, a class has fewer nodes than both together, or no node is left.

    Example:
        >>> masks = per_class_split(torch.arange(4).repeat(10), 2, 3)
        >>> [int(mask.sum()) for mask in masks]
        [8, 12, 20]
    """
    _sizes(train=train, validation=validation)
    _, rank = _ranked(y, generator)
    _enough(y, train + validation)
    masks = rank < train, (rank >= train) & (rank < train + validation), rank >= train + validation
    if not bool(masks[2].any()):
        raise ValueError(f"y must have nodes left for the test, got {len(y)} nodes, all of them taken")
    return masks


def _sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def _ranked(y: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """All nodes in random order, and of each node the place among those of its class in this order."""
    if y.ndim != 1 or y.is_floating_point() or not len(y) or int(y.min()) < 0:
        raise ValueError(f"y must hold one class >= 0 for each node, got {y.dtype} of {tuple(y.shape)}")
    order = torch.randperm(len(y), generator=generator)
    by_class = order[y[order].argsort(stable=True)]
    counts = y.bincount()
    starts = counts.cumsum(0) - counts
    rank = torch.empty(len(y), dtype=torch.long)
    rank[by_class] = torch.arange(len(y)) - starts[y[by_class]]
    return order, rank


def _enough(y: Tensor, wanted: int) -> None:
    counts = y.bincount()
    if int(counts.min()) < wanted:
        short = int(counts.argmin())
        raise ValueError(
            f"y must have at least {wanted} nodes of each class, got {int(counts[short])} of class {short}"
        )


def _mask(places: Tensor, size: int) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[places] = True
    return mask


def row_normalise(x: Tensor) -> Tensor:
    """Features >= 0 divided by their sum over each row; rows of zeros stay.

    Args:
        x: Dense or sparse CSR.

    Example:
        >>> row_normalise(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [0.0000, 0.0000]])
    """
    if x.layout is torch.strided:
        total = x.sum(1, keepdim=True)
        return x / torch.where(total == 0, 1, total)
    crow, values = x.crow_indices(), x.values()
    rows = torch.repeat_interleave(torch.arange(len(x)), crow.diff())
    total = values.new_zeros(len(x)).index_add_(0, rows, values)
    return csr(crow, x.col_indices(), values / torch.where(total == 0, 1, total)[rows], (x.shape[0], x.shape[1]))


def undirected(edges: Int[np.ndarray, "2 edges"], num_nodes: int) -> Int[Tensor, "2 edges"]:
    """Each edge both ways and once, without loops, in order.

    Example:
        >>> undirected(np.array([[0, 1, 2], [1, 0, 2]]), 3).tolist()
        [[0, 1], [1, 0]]
    """
    source, target = np.concatenate([edges, edges[::-1]], 1)
    apart = source != target
    keys = np.unique(source[apart].astype(np.int64) * num_nodes + target[apart])
    return torch.from_numpy(np.stack([keys // num_nodes, keys % num_nodes]))


def largest_component(edges: Int[np.ndarray, "2 edges"], num_nodes: int) -> Bool[np.ndarray, " nodes"]:
    """Which nodes belong to the largest connected component, edges taken both ways.

    Example:
        >>> largest_component(np.array([[0, 3], [1, 1]]), 4).tolist()
        [True, True, False, True]
    """
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(edges.shape[1])  # equal edges add up, which a small integer might not survive
    _, member = connected_components(sparse.coo_array((ones, tuple(edges)), (num_nodes,) * 2), directed=False)
    return member == np.bincount(member).argmax()


def debian_graph(
    sections: Sequence[str] = DEBIAN_SECTIONS, words: int = 1200, index: debian.PackageIndex | None = None
) -> Graph:
    """Debian's packages of some sections: who depends on whom, words of the descriptions, the section as class.

    Nodes are the largest connected component among the packages of these sections, edges their dependencies taken both
    ways, features which of the most frequent words are in the short description, divided by their number; words that
    are the name of a section are left out.

    Args:
        sections: At least two, as the archive calls them. The default are eight that are no language's and no form's
            (documentation, libraries), each with more than 450 packages in the component.
        words: Features, at most.
        index: Packages; those of this machine by default.

    Raises:
        UserError: If no index is given and there is none on this machine, or what is in the cache is damaged.
        ValueError: If fewer than two sections are given, one is not in the index, or ``words`` is below 1.
    """
    _sizes(words=words)
    if len(set(sections)) < 2 or len(set(sections)) < len(sections):
        raise ValueError(f"sections must be at least 2 different ones, got {', '.join(sections)}")
    if index is not None:
        return _debian(sections, words, index)
    packages = debian.cached()
    if packages.is_file() and (file := _debian_file(packages, sections, words)).is_file():
        return _read(file, tuple(sections))
    graph = _debian(sections, words, debian.load_packages())
    parts = {"crow": graph.x.crow_indices(), "columns": graph.x.col_indices(), "values": graph.x.values()}
    tensors = {**parts, "edge_index": graph.edge_index, "y": graph.y}
    storage.write_tensors(
        _debian_file(packages, sections, words), tensors, graph.source | {"words": str(graph.x.shape[1])}
    )
    return graph


def _debian_file(packages: Path, sections: Sequence[str], words: int) -> Path:
    """Where the graph of a cached index is kept."""
    key = storage.digest(DEBIAN_VERSION, storage.file_digest(packages), list(sections), words)
    return packages.with_name(f"graph-{key[:16]}.safetensors")


def _read(file: Path, classes: tuple[str, ...]) -> Graph:
    tensors, facts = storage.read_tensors(file), storage.read_metadata(file)
    crow, columns, values, edge_index, y = (tensors[name] for name in ("crow", "columns", "values", "edge_index", "y"))
    x = csr(crow, columns, values, (len(y), int(facts.pop("words"))))
    source = {name: facts[name] for name in ("index date", "index sha256", "sections")}
    return Graph(x, edge_index, y, classes=classes, source=source)


def _debian(sections: Sequence[str], words: int, found: debian.PackageIndex) -> Graph:
    place = {name: number for number, name in enumerate(sections)}
    label = np.array([place.get(package.section, -1) for package in found.packages])
    if absent := [name for number, name in enumerate(sections) if not (label == number).any()]:
        raise ValueError(f"sections must be those of the index, got {', '.join(absent)}")
    kept = label >= 0
    edges = found.edges()
    edges, label = _renumbered(edges, kept), label[kept]
    component = largest_component(edges, len(label))
    edges, label = _renumbered(edges, component), label[component]
    chosen = np.flatnonzero(kept)[component]
    texts = [found.packages[number].description for number in chosen]
    X, vocabulary = debian.bag_of_words(texts, words + len(sections))
    columns = [number for number, word in enumerate(vocabulary) if word not in place][:words]
    X = X[:, columns]
    x = csr(torch.from_numpy(X.indptr), torch.from_numpy(X.indices), torch.from_numpy(X.data), X.shape)
    facts = {"index date": found.date, "index sha256": found.sha256, "sections": ", ".join(sections)}
    return Graph(
        row_normalise(x), undirected(edges, len(label)), torch.from_numpy(label), classes=tuple(sections), source=facts
    )


def _renumbered(edges: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Edges between nodes that are kept, by their new numbers."""
    inside = edges[:, kept[edges].all(0)]
    return (np.cumsum(kept) - 1)[inside]


def digits_graph(neighbours: int = 10) -> Graph:
    """The 1,797 digits of scikit-learn, each joined with its nearest ones in Euclidean distance, pixels in [0, 1].

    Args:
        neighbours: Of each digit; an edge of one is an edge of the other.

    Raises:
        ValueError: If ``neighbours`` is out of its range.

    Example:
        >>> graph = digits_graph()
        >>> graph.num_nodes, graph.num_features, graph.num_classes
        (1797, 64, 10)
    """
    from sklearn.datasets import load_digits
    from sklearn.neighbors import kneighbors_graph

    X, y = load_digits(return_X_y=True)
    if not 1 <= neighbours < len(X):
        raise ValueError(f"neighbours must lie in 1..{len(X) - 1}, got {neighbours}")
    near = kneighbors_graph(X, neighbours).tocoo()
    edges = undirected(np.stack([near.row, near.col]), len(X))
    x = torch.from_numpy(X / 16).float()
    return Graph(x, edges, torch.from_numpy(y).long(), classes=tuple(map(str, range(10))), source={"data": "digits"})
