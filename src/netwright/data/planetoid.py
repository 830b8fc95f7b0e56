"""Cora, CiteSeer and PubMed from their published files, without trusting them.

Yang, Cohen and Salakhutdinov, "Revisiting Semi-Supervised Learning with Graph Embeddings", ICML 2016, arXiv:1603.08861.
The files ``ind.NAME.{x,tx,allx,y,ty,ally,graph,test.index}`` are pickles of Python 2. They are read by an unpickler
that knows arrays, sparse matrices and dictionaries, and refuses everything else.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import sparse

from netwright.console import UserError
from netwright.data.graphs import Graph, row_normalise, undirected
from netwright.nn.dagnn.adjacency import csr

PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph")
N_VAL = 500


def _rebuild(cls: type, base: type, state: Any) -> Any:
    """What Python 2 calls to make an object of a class without arguments."""
    if (cls, base, state) != (sparse.csr_matrix, object, None):
        raise pickle.UnpicklingError(f"no {cls.__name__} belongs here")
    return object.__new__(cls)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes in an old protocol."""
    return text.encode(encoding)


_ALLOWED = {
    **{(name, "csr_matrix"): sparse.csr_matrix for name in ("scipy.sparse.csr", "scipy.sparse._csr")},
    **{("numpy", name): getattr(np, name) for name in ("ndarray", "dtype")},
    ("collections", "defaultdict"): defaultdict,
    **{(name, "list"): list for name in ("__builtin__", "builtins")},
    **{(name, "object"): object for name in ("__builtin__", "builtins")},
    **{(name, "_reconstructor"): _rebuild for name in ("copy_reg", "copyreg")},
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        if module in {"numpy.core.multiarray", "numpy._core.multiarray"} and name in {"_reconstruct", "scalar"}:
            return getattr(importlib.import_module("numpy._core.multiarray"), name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong here")


def load_planetoid(root: str | os.PathLike[str], name: str) -> Graph:
    """A citation graph with its fixed split, row-normalised features and undirected edges without loops.

    Test nodes that the files leave out (CiteSeer has 15) have no features, no edges and class 0, and are in no part.

    Args:
        root: Folder of the files.
        name: ``"cora"``, ``"citeseer"``, ``"pubmed"``, or whatever stands in the names of the files.

    Raises:
        UserError: If a file is missing, damaged, or holds other things than these data sets do.
    """
    folder = Path(root)
    found = {part: _read(folder / f"ind.{name}.{part}") for part in PARTS}
    order = _indices(folder / f"ind.{name}.test.index")
    try:
        return _assembled(found, order, name)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"no citation graph: {error}", where=folder, cure="fetch the files again") from error


def _read(path: Path) -> Any:
    try:
        return _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    except OSError as error:
        raise UserError(f"cannot read: {error.strerror}", where=path) from error
    except Exception as error:  # an unpickler of damaged bytes raises anything
        raise UserError(f"damaged data file: {error}", where=path, cure="fetch it again") from error


def _indices(path: Path) -> np.ndarray:
    try:
        return np.array(path.read_text(encoding="utf-8").split(), dtype=np.int64)
    except FileNotFoundError as error:
        raise UserError("no such file", where=path) from error
    except (OSError, ValueError) as error:
        raise UserError(f"damaged data file: {error}", where=path, cure="fetch it again") from error


def _matrix(value: Any) -> sparse.csr_array:
    """A matrix whose indices are known to be in range."""
    if not isinstance(value, sparse.csr_matrix):
        raise TypeError(f"features must be a sparse matrix, got a {type(value).__name__}")
    whole = sparse.csr_array((value.data, value.indices, value.indptr), shape=value.shape, dtype=np.float32)
    whole.check_format(full_check=True)
    return whole


def _assembled(found: dict[str, Any], order: np.ndarray, name: str) -> Graph:
    given, unseen = _matrix(found["allx"]), _matrix(found["tx"])
    labels, unseen_labels = (np.asarray(found[part]) for part in ("ally", "ty"))
    trained, wide = len(np.asarray(found["y"])), labels.shape[1]
    first, n = len(labels), max(len(labels), int(order.max()) + 1)
    if given.shape[0] != first or unseen.shape[0] != len(order) or unseen_labels.shape != (len(order), wide):
        raise ValueError(f"parts must fit, got {given.shape[0]}, {first}, {unseen.shape[0]} and {len(order)} rows")
    if int(order.min()) < first or len(np.unique(order)) < len(order) or trained + N_VAL > first:
        raise ValueError(f"test nodes must be different ones behind the {first} others")
    # Rows go where their nodes are; those of nodes that are left out stay empty.
    here = sparse.csr_array(
        (np.ones(len(order), np.float32), (order - first, np.arange(len(order)))), (n - first, len(order))
    )
    X = sparse.vstack([given, here @ unseen], format="csr")
    X.sum_duplicates()
    y = np.zeros((n, wide), labels.dtype)
    y[:first], y[order] = labels, unseen_labels
    pairs = [(int(node), int(other)) for node, others in found["graph"].items() for other in others]
    edges = np.array(pairs, np.int64).reshape(-1, 2).T
    if edges.size and not 0 <= edges.min() <= edges.max() < n:
        raise ValueError(f"neighbours must lie in 0..{n - 1}, got {edges.min()}..{edges.max()}")
    masks = [torch.zeros(n, dtype=torch.bool) for _ in range(3)]
    masks[0][:trained] = True
    masks[1][trained : trained + N_VAL] = True
    masks[2][torch.from_numpy(order)] = True
    x = csr(torch.from_numpy(X.indptr), torch.from_numpy(X.indices), torch.from_numpy(X.data), X.shape)
    graph = Graph(
        row_normalise(x),
        undirected(edges, n),
        torch.from_numpy(y.argmax(1)),
        classes=tuple(map(str, range(wide))),
        source={"data": name},
    )
    return graph.split((masks[0], masks[1], masks[2]))
