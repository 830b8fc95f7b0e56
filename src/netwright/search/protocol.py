"""What a search asks of a network.

``named_choices()``, ``arch_parameters()``, ``expected_cost(table)`` and ``derive()`` are enough for every step, every
objective and every searcher that needs no gates; the classes of :mod:`netwright.search.supernet` have more, and what
needs more says so by :func:`need` or :func:`need_gates`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn


class Searchable(Protocol):
    """A network that can be searched: any ``nn.Module`` with these four."""

    def named_choices(self) -> Iterator[tuple[str, Any]]:
        """The modules in which there is something to choose, with their names."""
        ...

    def arch_parameters(self) -> Iterable[nn.Parameter]:
        """The architecture parameters; all others are weights."""
        ...

    def expected_cost(self, table: Mapping[Any, float]) -> Tensor:
        """What the architecture costs by a table, differentiable; asked only by a penalty that has one."""
        ...

    def derive(self) -> Any:
        """The architecture that the parameters say; with a ``skip_share`` it is watched for skip connections."""
        ...


def alphas_of(network: Any) -> dict[str, nn.Parameter]:
    """The architecture parameters by name: by key where the network keeps them so, as its parameters otherwise.

    Example:
        >>> from netwright.search import spaces
        >>> list(alphas_of(spaces.get("micro-chain").supernet()))[:2]
        ['layer_0', 'layer_1']
    """
    if callable(items := getattr(getattr(network, "arch", None), "items", None)):
        return dict(items())
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {names.get(id(a), f"alpha_{number}"): a for number, a in enumerate(network.arch_parameters())}


def weights_of(network: Any) -> list[nn.Parameter]:
    """All parameters but those of the architecture."""
    if callable(own := getattr(network, "weight_parameters", None)):
        return list(own())
    alphas = {id(alpha) for alpha in network.arch_parameters()}
    return [parameter for parameter in network.parameters() if id(parameter) not in alphas]


def need(who: str, network: Any, *names: str) -> None:
    """Refuses a network that lacks something.

    Raises:
        ValueError: If it does, naming what.

    Example:
        >>> need("a penalty", nn.Identity(), "expected_cost")
        Traceback (most recent call last):
        ...
        ValueError: a penalty needs a supernet with expected_cost, which Identity has not
    """
    if missing := [name for name in names if not hasattr(network, name)]:
        raise ValueError(f"{who} needs a supernet with {', '.join(missing)}, which {type(network).__name__} has not")


def need_gates(who: str, network: Any, why: str) -> None:
    """Refuses a network whose choices have no gates.

    Args:
        who: What needs gates.
        network: The network.
        why: What for.

    Raises:
        ValueError: If it lacks ``keyed_choices`` or ``set_gate``, or a choice has no gate, as superkernels have none.
    """
    need(who, network, "keyed_choices", "set_gate")
    for key, choice in network.keyed_choices().items():
        if not hasattr(choice, "gate"):
            raise ValueError(
                f"{who} needs choices with gates, {why}, got a {type(choice).__name__} for {key!r}, which has none; "
                "space.supernet() has one for every choice"
            )
