"""What operations and edges of a supernet are worth: the accuracy that is lost when one is taken away.

Wang et al., "Rethinking Architecture Selection in Differentiable NAS", ICLR 2021, arXiv:2108.04392.

    strength of operation o on edge e:   ACC(supernet) - ACC(supernet without o on e)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from netwright.checks import one_of
from netwright.console import nearest
from netwright.search.scoring import measure, removals, without
from netwright.search.spaces import edge_key
from netwright.search.supernet import Choice, FixedGate

if TYPE_CHECKING:
    from netwright.search.supernet import Supernet

Edge = str | tuple[int, int]


def choices_of(supernet: Supernet) -> dict[str, Choice]:
    """The choices of a supernet by key, each among candidates that can be taken away."""
    choices = supernet.keyed_choices()
    if not choices or not all(isinstance(choice, Choice) for choice in choices.values()):
        kinds = sorted({type(choice).__name__ for choice in choices.values()})
        raise ValueError(f"supernet must have choices among candidates, got {', '.join(kinds) or 'none'}")
    return choices


def _cell(supernet: Supernet, cell: str | None) -> str:
    """The cell type of that name, the space's first by default."""
    known = getattr(supernet.space, "cell_types", None)
    if known is None:
        name = getattr(supernet.space, "name", type(supernet.space).__name__)
        raise ValueError(
            f"supernet must be of a space of cells, whose edges are (predecessor, state), got one of {name!r}; name a "
            f"key: {', '.join(supernet.keyed_choices())}"
        )
    if cell is not None:
        one_of("cell", cell, known)
    return cell or str(known[0])


def _open_choice(supernet: Supernet, edge: Edge, cell: str | None) -> tuple[str, Choice]:
    """Key and choice of an edge, given by its key or as (predecessor, state) of a cell."""
    choices = choices_of(supernet)
    key = edge if isinstance(edge, str) else edge_key(_cell(supernet, cell), *edge)
    if key not in choices:
        raise ValueError(f"edge must be one of {', '.join(choices)}, got {key!r}; {nearest(key, tuple(choices))}")
    if isinstance(choices[key].gate, FixedGate):
        raise ValueError(f"edge must be open, got {key!r}, which is fixed already")
    return key, choices[key]


def incoming(supernet: Supernet) -> Mapping[tuple[str, int], tuple[str, ...]]:
    """Keys of the edges into every node by cell type and node; none where the space has no cells."""
    space: Any = supernet.space
    return space.incoming() if hasattr(space, "incoming") else {}


def op_strengths(
    supernet: Supernet,
    val: Iterable[Any],
    edge: Edge,
    cell: str | None = None,
    *,
    max_val_batches: int | None = None,
    renormalise: bool = False,
) -> Float[Tensor, " candidates"]:
    """How much accuracy is lost without each candidate of an edge: acc_full - acc_without, in [-1, 1].

    Weights, alphas and buffers stay as they are.

    Args:
        supernet: A trained supernet.
        val: Batches ``(inputs, labels)``; all candidates are measured on the same ones.
        edge: A key of ``supernet.arch``, or (predecessor, state) of a cell.
        cell: The cell type of a pair; the space's first by default.
        max_val_batches: Batches to use; all by default.
        renormalise: Whether the other weights then sum to one again; the paper leaves them as they are.

    Raises:
        ValueError: If the edge is unknown or fixed already, or a pair in a space that has no cells.
        RuntimeError: If there is no batch.

    Example:
        >>> import torch
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 3, channels=2)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> op_strengths(supernet, [batch], (0, 2))[0].item()     # nothing is lost without `none`
        0.0
    """
    key, choice = _open_choice(supernet, edge, cell)
    factors = removals(len(choice), range(len(choice)), intact=True)
    accuracy, _ = measure(supernet, val, {key: factors}, max_batches=max_val_batches, renormalise=renormalise)
    return accuracy[0] - accuracy[1:]


def edge_strengths(
    supernet: Supernet,
    val: Iterable[Any],
    node: int,
    cell: str | None = None,
    *,
    max_val_batches: int | None = None,
) -> Float[Tensor, " edges"]:
    """How much accuracy is lost without each edge into a node, by predecessor: acc_full - acc_without.

    Args:
        supernet: A trained supernet of a cell space.
        val: Batches ``(inputs, labels)``.
        node: Number of the intermediate node, from 0.
        cell: The cell type; the space's first by default.
        max_val_batches: Batches to use; all by default.

    Raises:
        ValueError: If the space has no cells, or there is no such node or cell.
        RuntimeError: If there is no batch.

    Example:
        >>> import torch
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts").supernet(1, 3, channels=2)
        >>> batch = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
        >>> edge_strengths(supernet, [batch], node=2, cell="reduce").shape
        torch.Size([4])
    """
    choices = choices_of(supernet)
    chosen = _cell(supernet, cell)
    nodes = {number: keys for (own, number), keys in incoming(supernet).items() if own == chosen}
    if node not in nodes:
        raise ValueError(f"node must lie in [0, {len(nodes)}), got {node}")
    sizes = {key: len(choices[key]) for key in nodes[node]}
    accuracy, _ = measure(supernet, val, without(sizes, intact=True), max_batches=max_val_batches)
    return accuracy[0] - accuracy[1:]


def discretisation_accuracy(
    supernet: Supernet,
    val: Iterable[Any],
    edge: Edge,
    op: str,
    *,
    cell: str | None = None,
    max_val_batches: int | None = None,
) -> float:
    """Accuracy right after an edge is fixed to one operation, without tuning: what the paper holds alphas against.

    Raises:
        ValueError: If the edge is unknown or fixed already, or ``op`` is none of its candidates.
        RuntimeError: If there is no batch.
    """
    key, choice = _open_choice(supernet, edge, cell)
    if op not in choice.names:
        raise ValueError(f"op must be one of {', '.join(choice.names)}, got {op!r}; {nearest(op, choice.names)}")
    before = {each: each.gate for _, each in supernet.named_choices() if each.key == key}
    try:
        supernet.set_gate(FixedGate(choice.names.index(op), len(choice)), key)
        return supernet_accuracy(supernet, val, max_val_batches=max_val_batches)
    finally:
        for each, gate in before.items():
            each.gate = gate


def supernet_accuracy(supernet: Supernet, val: Iterable[Any], *, max_val_batches: int | None = None) -> float:
    """Accuracy of a supernet as it is, measured as removals are: in training mode, and nothing is changed.

    Raises:
        ValueError: If ``val`` is missing.
        RuntimeError: If there is no batch.
    """
    accuracy, _ = measure(supernet, val, {}, max_batches=max_val_batches)
    return accuracy.item()
