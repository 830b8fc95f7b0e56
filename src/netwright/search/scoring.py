"""How good variants of a supernet are that differ in the mixing weights of a few choices, all measured together.

What DARTS-PT asks of a supernet: Wang et al., "Rethinking Architecture Selection in Differentiable NAS", ICLR 2021,
arXiv:2108.04392. Without operation o an edge gives

    sum_{i != o} m_i o_i(x)  =  y - m_o o(x),

so where x is the same for all variants every operation runs once. What does not depend on a changed choice runs once
too: a supernet that can compute variants together (:class:`Branching`) knows what that is, of any other the choices
that come before the first changed one do not run again. Behind it each variant has activations of its own, and its
batch norms, which are in training mode, see them alone: stacked along the batch the variants would be normalised
together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from netwright.nn.batchnorm import frozen_statistics
from netwright.nn.modes import in_mode
from netwright.search.pairs import to_device
from netwright.search.spaces.operations import Zero
from netwright.search.supernet import Choice, Gate
from netwright.seeding import derive, seeded

if TYPE_CHECKING:
    from netwright.search.supernet import Supernet

Rows = Mapping[str, Float[Tensor, "variants candidates"]]
Scores = tuple[Float[Tensor, " variants"], Float[Tensor, " variants"]]


@runtime_checkable
class Branching(Protocol):
    """A supernet that computes several variants of itself together."""

    def variants(self, x: Tensor, weights: Rows, seed: int) -> list[Tensor]:
        """The logits of each variant; see :meth:`netwright.search.spaces.cells.CellSupernet.variants`."""
        ...


class GivenGate(Gate):
    """Mixing weights that are given; what has no weight does not run.

    Example:
        >>> GivenGate(torch.tensor([0.5, 0.0])).weights(torch.zeros(2), training=True)
        tensor([0.5000, 0.0000])
    """

    def __init__(self, given: Float[Tensor, " candidates"]) -> None:
        self.given = given
        self.mask = tuple((given != 0).tolist())

    def weights(self, alpha: Tensor, training: bool, drawn: Tensor | None = None) -> Tensor:
        """Those that are given."""
        return self.given


def removals(candidates: int, gone: Sequence[int], *, intact: bool = False) -> Float[Tensor, "variants candidates"]:
    """Factors of one choice without each of some candidates; with ``intact`` a row with all of them comes first.

    Example:
        >>> removals(3, [0, 2])
        tensor([[0., 1., 1.],
                [1., 1., 0.]])
    """
    rows = 1 - torch.eye(candidates)[list(gone)]
    return torch.cat([torch.ones(1, candidates), rows]) if intact else rows


def without(sizes: Mapping[str, int], *, intact: bool = False) -> dict[str, Tensor]:
    """Factors of several choices without each of them; with ``intact`` a row with all of them comes first.

    Args:
        sizes: Number of candidates by key.
        intact: Whether the supernet with all of them is one of the variants.

    Example:
        >>> without({"a": 2, "b": 1})["a"]
        tensor([[0., 0.],
                [1., 1.]])
    """
    found = {}
    for place, (key, size) in enumerate(sizes.items()):
        found[key] = torch.ones(len(sizes) + intact, size)
        found[key][place + intact] = 0.0
    return found


def measure(
    supernet: Supernet,
    val: Iterable[Any] | None,
    factors: Rows,
    *,
    max_batches: int | None = None,
    renormalise: bool = False,
) -> Scores:
    """Accuracy (a share) and loss (nats) of the supernet with the mixing weights of some keys scaled in several ways.

    All variants see the same batches, in training mode: batch norms use the batch and change nothing. A gate that draws
    mixes by what it expects. Random operations draw from the same state of the generators in every variant. Variants
    that are the same network, as the whole one and that without ``none``, are measured once.

    Args:
        supernet: The supernet; weights, alphas, buffers and gates are the same afterwards.
        val: Batches ``(inputs, labels)``.
        factors: What the mixing weights of a key are multiplied by, a row for each variant; without keys there is one
            variant, the supernet itself.
        max_batches: Batches to use; all by default.
        renormalise: Whether scaled weights are divided by their sum.

    Raises:
        ValueError: If ``val`` is missing.
        RuntimeError: If there is no batch.
        FloatingPointError: If a loss is not finite.
    """
    if val is None:
        raise ValueError("val must be batches (inputs, labels), got None")
    device = next(supernet.parameters()).device
    seen = 0
    with _prepared(supernet) as mixing:
        rows, places = _variants(mixing, factors, renormalise)
        number = int(places.max()) + 1
        right, loss = [0] * number, [0.0] * number
        for place, batch in enumerate(itertools.islice(val, max_batches)):
            x, labels = to_device(batch, device)[:2]
            for variant, logits in enumerate(_logits(supernet, x, rows, place)):
                right[variant] += int((logits.argmax(-1) == labels).sum())
                loss[variant] += float(functional.cross_entropy(logits, labels, reduction="sum"))
            seen += len(labels)
    if not seen:
        raise RuntimeError("val must hold at least 1 batch, got 0")
    found = torch.tensor([right, loss], dtype=torch.float64)[:, places.cpu()] / seen
    if not found[1].isfinite().all():
        raise FloatingPointError(f"the loss must be finite, got {found[1].tolist()}")
    return found[0], found[1]


@contextmanager
def _prepared(supernet: Supernet) -> Iterator[dict[Choice, Tensor]]:
    """The supernet in the state in which it is measured, every choice with the weights that its gate expects."""
    before = {choice: choice.gate for _, choice in supernet.named_choices()}
    try:
        with in_mode(supernet, training=True), frozen_statistics(supernet), torch.no_grad():
            mixing = {choice: gate.expectation(supernet.arch[choice.key]) for choice, gate in before.items()}
            for choice, weights in mixing.items():
                choice.gate = GivenGate(weights)
            yield mixing
    finally:
        for choice, gate in before.items():
            choice.gate = gate


def _variants(mixing: Mapping[Choice, Tensor], factors: Rows, renormalise: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Mixing weights by key of variants that differ, and which of these each row of ``factors`` is."""
    rows: dict[str, Tensor] = {}
    for choice, weights in mixing.items():
        if choice.key not in factors or choice.key in rows:
            continue
        scaled = weights * factors[choice.key].to(weights)
        if renormalise:
            scaled = scaled / scaled.sum(-1, keepdim=True).clamp_min(torch.finfo(scaled.dtype).tiny)
        zero = [isinstance(operation, Zero) for operation in choice.candidates.values()]
        rows[choice.key] = scaled.masked_fill(torch.tensor(zero, device=scaled.device), 0.0)
    if not rows:
        return {}, torch.zeros(1, dtype=torch.long)
    distinct, places = torch.cat(list(rows.values()), 1).unique(dim=0, return_inverse=True)
    parts = distinct.split([each.shape[1] for each in rows.values()], 1)
    return dict(zip(rows, parts, strict=True)), places


def _logits(supernet: Supernet, x: Tensor, rows: Rows, place: int) -> Iterator[Tensor]:
    """The logits of every variant for batch number ``place``."""
    shared: Any = supernet if isinstance(supernet, Branching) else None
    if shared is not None:
        with seeded(0, "perturbation", place):
            yield from shared.variants(x, rows, derive(0, "perturbation", place))
        return
    start = _Start()
    fixed = {choice: choice.gate for _, choice in supernet.named_choices()}
    for variant in range(len(next(iter(rows.values()))) if rows else 1):
        start.again()
        for choice, gate in fixed.items():
            changed = choice.key in rows
            given = rows[choice.key][variant] if changed else gate.expectation(supernet.arch[choice.key])
            choice.gate = _Followed(given, start, changed)
        with seeded(0, "perturbation", place):  # the same draws for all
            yield supernet(x)
    for choice, gate in fixed.items():
        choice.gate = gate


class _Start:
    """What the choices before the first that differs gave in the first pass, and where the generators were then."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self.passes = self.place = 0
        self.common = True

    def again(self) -> None:
        """Another pass begins."""
        self.passes, self.place, self.common = self.passes + 1, 0, True

    def serve(self, compute: Callable[[], Tensor]) -> Tensor:
        """The output of the next choice; a copy, since a network may write into it."""
        if not self.common:
            return compute()
        if self.passes == 1:
            y = compute()
            self.kept.append(
                (y.clone(), torch.get_rng_state(), torch.cuda.get_rng_state(y.device) if y.is_cuda else None)
            )
            return y
        y, state, accelerator = self.kept[self.place]
        self.place += 1
        torch.set_rng_state(state)
        if accelerator is not None:
            torch.cuda.set_rng_state(accelerator, y.device)
        return y.clone()


class _Followed(GivenGate):
    """Given weights; before the first choice that differs nothing runs twice."""

    def __init__(self, given: Tensor, start: _Start, changed: bool) -> None:
        super().__init__(given)
        self.start, self.changed = start, changed

    def forward(self, choice: Choice, x: Tensor, alpha: Tensor) -> Tensor:
        self.start.common = self.start.common and not self.changed
        return self.start.serve(functools.partial(super().forward, choice, x, alpha))
