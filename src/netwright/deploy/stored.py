"""A graph in the form in which it is kept: its weights without their zeros, in float32 or as multiples of a scale.

A sparse array is the weights that are kept and the gaps between them: the number of zeros before each, in torch's
order. A gap takes one or two bytes; the largest number of that width says "so many zeros, and no weight yet".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from netwright.console import UserError
from netwright.deploy.graph.ir import Array, Conv, ConvTranspose, Graph, Linear, Op
from netwright.deploy.graph.validation import check

MOST_WEIGHTS = 2**30  # numbers in all arrays together, zeros filled in
MOST_VALUES = 2**31  # numbers in all values together
GAPS = (np.uint8, np.uint16)
WEIGHED = (Conv, ConvTranspose, Linear)
ENCODINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "dense": {"all": ("float32",)},
    "index": {"all": ("int64",)},
    "sparse": {"kept": ("float32",), "gaps": ("uint8", "uint16")},
    "dense int8": {"all": ("int8",), "scale": ("float32",)},
    "sparse int8": {"kept": ("int8",), "gaps": ("uint8", "uint16"), "scale": ("float32",)},
}
"""Of each form of an array, the tensors that it consists of and what they may hold."""


class ArtifactError(UserError):
    """Files that are not, or no longer, a saved network."""


@dataclass(frozen=True)
class Stored:
    """A graph in the form in which it is saved.

    Attributes:
        structure: The graph without its arrays, able to become JSON.
        arrays: Of each array, by the name that the structure uses, its ``shape`` and its ``encoding``.
        tensors: What they are made of, by ``"array.part"``.
    """

    structure: dict[str, Any]
    arrays: dict[str, dict[str, Any]]
    tensors: dict[str, Array]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def pack(graph: Graph, *, quantize: Literal["int8"] | None = None) -> Stored:
    """A graph as it is saved; every array in the smallest of its possible forms.

    Args:
        graph: An optimised graph. Weights are kept in float32.
        quantize: ``"int8"`` gives each output channel of a convolution or linear layer a scale, its largest weight over
            127, and keeps weights as multiples of it. Those below half a scale become zeros, and are dropped.

    Raises:
        ValueError: If ``quantize`` is something else, or weights to be quantised are not finite.

    Example:
        >>> from netwright.deploy.graph.ir import Node
        >>> graph = Graph({0: (1, 600), 1: (1, 1)}, [Node(Linear(np.eye(1, 600, 300)), [0], 1)], [0], [1])
        >>> {name: tensor.tolist() for name, tensor in pack(graph).tensors.items()}
        {'0.weight.kept': [1.0], '0.weight.gaps': [255, 45]}
    """
    if quantize not in {None, "int8"}:
        raise ValueError(f"quantize must be None or 'int8', got {quantize!r}")
    structure, found = graph.to_plain()
    for entry in structure["nodes"]:
        entry["path"] = re.sub(r"[^\w.+\- ]", "_", entry["path"], flags=re.ASCII)
    weighed = {f"{number}.weight": node.op for number, node in enumerate(graph) if isinstance(node.op, WEIGHED)}
    arrays: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Array] = {}
    for name, array in found.items():
        if quantize and name in weighed:
            encoding, parts = _rounded(array, weighed[name], name)
        else:
            encoding, parts = _exact(array)
        arrays[name] = {"shape": list(array.shape), "encoding": encoding}
        tensors |= {f"{name}.{part}": np.ascontiguousarray(tensor) for part, tensor in parts.items()}
    return Stored(structure, arrays, tensors)


def _exact(array: Array) -> tuple[str, dict[str, Array]]:
    if array.dtype.kind != "f":
        return "index", {"all": array}
    array = array.astype(np.float32)
    kept, gaps = array[array != 0], gaps_of(array.ravel())
    sparse = gaps.nbytes + kept.nbytes < array.nbytes
    return ("sparse", {"kept": kept, "gaps": gaps}) if sparse else ("dense", {"all": array})


def _rounded(weight: Array, op: Op, name: str) -> tuple[str, dict[str, Array]]:
    if not np.isfinite(weight).all():
        raise ValueError(f"weights must be finite to be quantised, got others in {name}")
    rows = _rows(weight, op)
    scale = (np.abs(rows).max(axis=1).astype(np.float64) / 127).astype(np.float32)
    # a scale too small for float32 keeps nothing
    spread = _spread(scale, weight, op)
    ratio = np.divide(weight, spread, out=np.zeros(weight.shape), where=spread > 0)
    integers = np.rint(ratio).clip(-127, 127).astype(np.int8)
    kept, gaps = integers[integers != 0], gaps_of(integers.ravel())
    if gaps.nbytes + kept.nbytes < integers.nbytes:
        return "sparse int8", {"kept": kept, "gaps": gaps, "scale": scale}
    return "dense int8", {"all": integers, "scale": scale}


def _rows(weight: Array, op: Op) -> Array:
    """The weights as a matrix with a row for each output channel."""
    if not isinstance(op, ConvTranspose):
        return weight.reshape(len(weight), -1)
    grouped = weight.reshape(op.groups, -1, weight.shape[1], math.prod(weight.shape[2:]))
    return grouped.swapaxes(1, 2).reshape(op.groups * weight.shape[1], -1)


def _spread(scale: Array, weight: Array, op: Op) -> Array:
    """The scale of each weight, able to be multiplied with them."""
    if not isinstance(op, ConvTranspose):
        return scale.reshape(-1, *[1] * (weight.ndim - 1))
    return np.repeat(scale.reshape(op.groups, -1), len(weight) // op.groups, axis=0)[:, :, None, None]


def gaps_of(flat: Array) -> Array:
    """Zeros before each kept weight of a flat array, in the width that takes fewer bytes.

    Example:
        >>> gaps_of(np.array([0.0, 2.0, 3.0, 0.0])).tolist()
        [1, 0]
    """
    gaps = np.diff(np.flatnonzero(flat), prepend=-1) - 1
    return min((_escaped(gaps, kind) for kind in GAPS), key=lambda found: found.nbytes)


def _escaped(gaps: Array, kind: type[np.unsignedinteger]) -> Array:
    most = int(np.iinfo(kind).max)
    more, rest = np.divmod(gaps, most)
    ends = np.cumsum(more + 1) - 1
    found = np.full(int(ends[-1]) + 1 if len(ends) else 0, most, kind)
    found[ends] = rest
    return found


def unpack(stored: Stored) -> Graph:
    """The graph, checked.

    Raises:
        ArtifactError: If it is not sound, or its arrays do not fit.
    """
    try:
        _check_tensors(stored)
        weights = sum(math.prod(entry["shape"]) for entry in stored.arrays.values())
        _require(weights <= MOST_WEIGHTS, f"arrays must hold at most {MOST_WEIGHTS} numbers, got {weights}")
        # sizes first, on arrays that take no memory
        hollow = {name: _hollow(entry) for name, entry in stored.arrays.items()}
        outline = Graph.from_plain(stored.structure, hollow)
        values = sum(math.prod(shape) for shape in outline.shapes.values())
        _require(values <= MOST_VALUES, f"values must hold at most {MOST_VALUES} numbers, got {values}")
        check(outline)
        ops = {f"{number}.weight": node.op for number, node in enumerate(outline)}
        arrays = {name: _decoded(name, stored, ops.get(name)) for name in stored.arrays}
        graph = Graph.from_plain(stored.structure, arrays)
        check(graph)
    except ArtifactError:
        raise
    except (ValueError, TypeError, LookupError, OverflowError) as error:
        raise ArtifactError(f"not a sound network: {error}") from error
    return graph


def _require(condition: bool, fault: str) -> None:
    if not condition:
        raise ArtifactError(f"not a sound network: {fault}")


def _check_tensors(stored: Stored) -> None:
    """Every array is one of a node's own, and consists of the right tensors."""
    named = {
        f"{number}.{field}": value["array"]
        for number, entry in enumerate(stored.structure["nodes"])
        for field, value in entry.items()
        if isinstance(value, dict)
    }
    _require(all(key == name for key, name in named.items()), "arrays must be called by their node and field")
    _require(set(named) == set(stored.arrays), "nodes must use all arrays, and no others")
    wanted = {
        f"{name}.{part}": kinds
        for name, entry in stored.arrays.items()
        for part, kinds in ENCODINGS[entry["encoding"]].items()
    }
    _require(set(wanted) == set(stored.tensors), "the tensors must be those of the arrays")
    for name, kinds in wanted.items():
        tensor = stored.tensors[name]
        _require(tensor.dtype.name in kinds, f"{name} must hold {' or '.join(kinds)}, got {tensor.dtype}")
        flat = tensor.ndim == 1 or name.endswith(".all")
        _require(flat, f"{name} must have 1 axis, got {tensor.ndim}")


def _hollow(entry: dict[str, Any]) -> Array:
    number = np.int64(0) if entry["encoding"] == "index" else np.float32(0)
    return np.broadcast_to(number, tuple(entry["shape"]))


def _decoded(name: str, stored: Stored, op: Op | None) -> Array:
    shape, encoding = tuple(stored.arrays[name]["shape"]), stored.arrays[name]["encoding"]
    part = {part: stored.tensors[f"{name}.{part}"] for part in ENCODINGS[encoding]}
    if "gaps" in part:
        flat = filled(name, part["kept"], part["gaps"], math.prod(shape))
    else:
        # a copy: what lies in a file may be aligned in any way
        flat = part["all"].copy()
        _require(flat.size == math.prod(shape), f"{name} must hold {math.prod(shape)} numbers, got {flat.size}")
    array = flat.reshape(shape)
    if "scale" not in part:
        return array
    if not isinstance(op, WEIGHED):
        raise ArtifactError(f"not a sound network: {name} must be a weight to have a scale")
    rows, scale = len(_rows(array, op)), part["scale"]
    _require(scale.shape == (rows,), f"{name} must have {rows} scales, got {scale.shape}")
    return array.astype(np.float32) * _spread(scale, array, op)


def filled(name: str, kept: Array, gaps: Array, size: int) -> Array:
    """The flat array of ``size`` numbers that kept weights and the gaps of :func:`gaps_of` stand for.

    Raises:
        ArtifactError: If they do not fit together, naming ``name``.

    Example:
        >>> filled("weight", np.array([2.0, 3.0]), np.array([1, 0], np.uint8), 4).tolist()
        [0.0, 2.0, 3.0, 0.0]
    """
    ends = gaps != np.iinfo(gaps.dtype).max
    places = np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(np.count_nonzero(ends))
    _require(kept.shape == places.shape, f"{name} must have {len(places)} weights, got {kept.shape}")
    _require(not len(places) or int(places[-1]) < size, f"{name} must hold {size} numbers, got one behind")
    flat = np.zeros(size, kept.dtype)
    flat[places] = kept
    return flat
