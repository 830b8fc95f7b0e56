"""A chain from end to end: each step applied, kept where it is wanted, and measured."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor, nn

from netwright.compress import low_rank
from netwright.compress.chain.kept import chain_key, finish, kept
from netwright.compress.chain.measured import ROUNDS, Compression, measure
from netwright.compress.chain.steps import Distill, LowRank, Prune, Quantize, Step, Training
from netwright.compress.quantize import baked, pack, unpack
from netwright.compress.quantize.storage import packed_metadata
from netwright.console import UserError
from netwright.nn.sparse import clone


def compress(
    model: nn.Module,
    steps: Sequence[Step],
    *,
    example: Tensor | Sequence[Tensor],
    training: Training | None = None,
    test: Iterable[tuple[Tensor, ...]] | None = None,
    rounds: int = ROUNDS,
    runtime: bool = True,
    progress: Callable[[str], object] | None = None,
    folder: str | Path | None = None,
) -> tuple[nn.Module, Compression]:
    """Compresses any network by a chain of methods and measures it after each.

    Args:
        model: The network; it is not changed. Masks and other parametrizations are baked in.
        steps: At most one of each place, in this order: a student (:class:`Distill`), two factors (:class:`LowRank`,
            :class:`Maestro`), zeros (:class:`Prune`), few bits (:class:`Quantize`, :class:`LearnLevels`,
            :class:`Alternate`).
        example: A batch of inputs, of the network's own kind (standardised, where it wants that) and of any type; one
            tensor for each input of a network that takes several.
        training: Data to train on, and how; none by default.
        test: Batches (x, labels) to measure the accuracy on; read once for each network.
        rounds: Timed calls of each network.
        runtime: Whether networks are also built for the sparse runtime and timed there.
        progress: Called with the name of each step as it begins, or is read back.
        folder: Where each step is kept when it is finished. With the files of an earlier call there, of the same
            network, steps and data, the chain goes on after the last of them, and ends with the same bits as one that
            was never stopped.

    Returns:
        The network, in evaluation mode, ordinary in every way (one that is quantised carries its quantisers:
        :func:`~netwright.compress.quantize.baked` and every export take them away), and the report.

    Raises:
        ValueError: If there is no step, the order is another, or an argument of a step is out of its range.
        UserError: If a file in ``folder`` is damaged, or was left by another chain.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> small, report = compress(net, [LowRank(0.5), Prune(0.5), Quantize(4)], example=torch.rand(1, 1, 8, 8))
        >>> [s.step for s in report.steps], report.ratio > 5
        (['as given', 'low-rank', 'prune', 'quantize'], True)
    """
    places = [step.place for step in steps]
    if not steps or any(b <= a for a, b in itertools.pairwise(places)):
        order = ", ".join(kind.name for kind in (Distill, LowRank, Prune, Quantize))
        got = ", ".join(step.name for step in steps) or "none"
        raise ValueError(f"steps must be some of {order}, in this order, got {got}")
    how = training or Training()
    teacher = baked(model).eval()
    network: nn.Module = clone(teacher)
    ranks: dict[str, int] = {}
    found = [("as given", network)]
    key = chain_key(teacher, how)
    for number, step in enumerate(steps, 1):
        path = None if folder is None else Path(folder) / f"{number}-{step.name}.safetensors"
        key = chain_key(key, step)
        made = kept(path, key, step, network)
        if made is None:
            if progress is not None:
                progress(step.name)
            made = finish(path, key, step, network, step.apply(clone(network), teacher, how))
        elif progress is not None:
            progress(f"{step.name}, kept from before")
        network, ranks = made.network.eval(), ranks | made.ranks
        found.append((step.name, network))
    return network, Compression(tuple(measure(found, example, test, rounds, runtime)), ranks)


def packed(network: nn.Module, report: Compression) -> bytes:
    """A compressed network as bytes, with what :func:`unpacked` needs to know of its form.

    Args:
        network: From :func:`compress`.
        report: Likewise.
    """
    return pack(network, {"ranks": json.dumps(report.ranks)})


def unpacked(blob: bytes, model: nn.Module) -> nn.Module:
    """The plain network that was packed, bit for bit.

    Args:
        blob: From :func:`packed`.
        model: The network before it was compressed, or another of its architecture; after ``distill`` the student. It
            is not changed.

    Raises:
        UserError: If the bytes are damaged, or do not fit the network.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> x = torch.rand(2, 1, 8, 8)
        >>> small, report = compress(net, [LowRank(0.5), Quantize(4)], example=x)
        >>> again = unpacked(packed(small, report), net)
        >>> torch.allclose(again(x), small(x), atol=1e-5)
        True
    """
    try:
        ranks = json.loads(packed_metadata(blob).get("ranks", "{}"))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"damaged packed weights: {error}", cure="pack it again") from error
    try:
        form = low_rank.with_ranks(model, ranks) if ranks else model
    except ValueError as error:
        raise UserError(f"the weights do not fit the network: {error}") from error
    return unpack(blob, form).eval()
