"""What a short search is told, whichever method it is: the common ground of ``netwright search`` and ``design``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from netwright.checks import one_of
from netwright.search import SELECTORS
from netwright.search.objective import CostPenalty, Objective, TaskLoss
from netwright.search.pricing import FULL, Limits, WithinLimits
from netwright.search.selection import MagnitudeSelector

if TYPE_CHECKING:
    from netwright.search.selection import Selector


@dataclass(frozen=True)
class Brief:
    """A search of a few hundred steps; :meth:`netwright.search.searcher.Searcher.short` makes the searcher of it.

    Published rates (0.025, 3e-4, no momentum) are for 50 epochs a stage.

    Attributes:
        epochs: One number for each of the method's :attr:`~netwright.search.searcher.Searcher.shares`.
        density: Share of the weights that the network will keep, in (0, 1].
        limits: What the network may cost.
        chosen: How the genotype is read off; by default as the method does, within the limits.
        lr, alpha_lr: Learning rates of the weights and of the architecture parameters.
        wait: Share of the search for which the architecture waits first, in methods without a warm-up of their own.
    """

    epochs: Sequence[int]
    density: float = 1.0
    limits: Limits | None = None
    chosen: Selector | None = None
    lr: float = field(default=0.1, kw_only=True)
    alpha_lr: float = field(default=3e-3, kw_only=True)
    wait: float = field(default=0.5, kw_only=True)

    @property
    def objective(self) -> Objective | None:
        """Cross-entropy with a linear penalty of the cost; None without limits."""
        if self.limits is None:
            return None
        return TaskLoss() + CostPenalty("add_linear", self.limits, ref=FULL)

    @property
    def selector(self) -> Selector | None:
        """How the genotype is read off; None leaves it to the method."""
        if self.chosen is None and self.limits is not None:
            return WithinLimits(self.limits)
        return self.chosen


def refuse(name: str, space: Any, *, limited: bool) -> None:
    """Raises the ``ValueError`` of :func:`make_selector`, for a search with or without limits."""
    one_of("select", name, SELECTORS)
    own = "magnitude" if isinstance(space.selector(), MagnitudeSelector) else "argmax"
    if name in ("magnitude", "argmax") and name != own:
        raise ValueError(f"select {name!r} does not fit the space {space.name!r}, whose rule is {own!r}")
    if name == "perturbation" and limited:
        raise ValueError("select 'perturbation' looks at the accuracy alone and cannot keep to a limit")


def make_selector(name: str, space: Any, limits: Limits | None = None) -> Selector:
    """The selector of a name, set up for a short search.

    ``magnitude`` and ``argmax`` are the rules of cells and of chains; ``sample`` draws six architectures and keeps the
    one that is best with the weights of the supernet; ``perturbation`` removes operations and looks what is missed.
    It is not DARTS-PT: between decisions nothing is tuned, which would take longer than the search.

    Args:
        name: One of :data:`netwright.search.SELECTORS`.
        space: The space of the search.
        limits: What the network may cost.

    Raises:
        ValueError: If the name is unknown, or the selector does not fit the space or the limits.

    Example:
        >>> from netwright.search import spaces
        >>> type(make_selector("argmax", spaces.get("micro-chain"))).__name__
        'ArgmaxSelector'
        >>> make_selector("argmax", spaces.get("darts"))
        Traceback (most recent call last):
        ...
        ValueError: select 'argmax' does not fit the space 'darts', whose rule is 'magnitude'
    """
    refuse(name, space, limited=limits is not None)
    if name == "sample":
        from netwright.search.sampling import SampleSelector

        return SampleSelector(limits=limits)
    if name == "perturbation":
        from netwright.search.perturbation import PerturbationSelector

        return PerturbationSelector(tune_epochs=0)
    rule: Selector = space.selector()
    return rule if limits is None else WithinLimits(limits)


def shared_out(epochs: int, shares: Sequence[float]) -> list[int]:
    """Epochs of each stage: their shares of all, at least one each.

    Example:
        >>> shared_out(10, (0.4, 0.2, 0.4)), shared_out(1, (0.25, 0.75))
        ([4, 2, 4], [1, 1])
    """
    return [max(1, round(share * epochs)) for share in shares]
