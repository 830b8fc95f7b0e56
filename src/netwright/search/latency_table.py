"""What a table of latencies says of an architecture: the operations of a network by their keys, and their sum.

LAT(g) = c + sum_{o in g} t_o
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from netwright.cost.timing import LatencyTable
from netwright.nn.modes import in_mode
from netwright.search.genotype import Chosen

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.spaces import AnySpace
    from netwright.search.supernet import OperationKey

Shape = tuple[int, int, int]
CONSTANT = "constant"


@dataclass(frozen=True, kw_only=True)
class SpaceLatencyTable(LatencyTable):
    """The latencies of every operation of a search space, with the space and the size of network they are of.

    Attributes:
        space: Name of the space.
        shape: (C, H, W) of one input.
        num_classes: Number of classes.
        options: Size of the networks, as ``space.build`` takes it; what is left out is the space's own.

    Example:
        >>> from netwright.search import spaces
        >>> from netwright.search.latency import Setup, measure
        >>> space = spaces.get("micro-chain")
        >>> table = measure(space, (1, 8, 8), 10, Setup(repeats=1))
        >>> small, large = (space.genotype(dict.fromkeys(space.choices(), name)) for name in ("k3_e2", "k5_e4"))
        >>> table.of(small) > 0, table.of(large) > 0
        (True, True)
    """

    space: str
    shape: Shape
    num_classes: int
    options: Mapping[str, Any] = field(default_factory=dict)

    def of(self, genotype: Genotype) -> float:
        """Milliseconds of an architecture of the space: the constant and the sum of its operations.

        Args:
            genotype: The architecture.

        Raises:
            ValueError: If the genotype is of another space, or the space is not known.
            KeyError: If the table misses an operation.
        """
        from netwright.search import spaces

        return predict(spaces.get(self.space), genotype, self, self.shape, **self.options)

    def to_dict(self) -> dict[str, Any]:
        """The fields, with the times as a list of key and milliseconds."""
        where = {"space": self.space, "shape": list(self.shape), "num_classes": self.num_classes}
        return {**where, "options": dict(self.options), **super().to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The table that :meth:`to_dict` gave, also after a way through JSON.

        Raises:
            ValueError: If the data are no such table, or do not say what it is of.
        """
        table = LatencyTable.from_dict(data)
        if missing := [name for name in ("space", "shape", "num_classes", "options") if name not in data]:
            raise ValueError(f"the latency table does not say its {', '.join(missing)}: an older version measured it")
        try:
            channels, height, width = (int(size) for size in data["shape"])
            about: dict[str, Any] = {"num_classes": int(data["num_classes"]), "options": dict(data["options"])}
        except (TypeError, ValueError) as error:
            raise ValueError(f"not a latency table: {error}") from error
        measured = {each.name: getattr(table, each.name) for each in dataclasses.fields(table)}
        return cls(**measured, space=str(data["space"]), shape=(channels, height, width), **about)

    def __str__(self) -> str:
        sizes = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"{self.space}, input {'x'.join(map(str, self.shape))}{sizes}; {super().__str__()}"


def operations_of(network: nn.Module, shape: Shape) -> dict[str, OperationKey | None]:
    """Key in cost tables of every chosen operation of a derived network, by module path; None where it costs nothing.

    Args:
        network: What ``space.build`` gave.
        shape: (C, H, W) of the input.

    Example:
        >>> from netwright.search import spaces
        >>> space = spaces.get("micro-chain")
        >>> genotype = space.genotype(dict.fromkeys(space.choices(), "k3_e2") | {"layer_1": "skip"})
        >>> operations_of(space.build(genotype, 1, 10), (1, 16, 16))["1"]
        ('k3_e2', 8, 12, 16, 16, 1, 'mbconv ReLU')
    """
    found: dict[str, OperationKey | None] = {}
    handles = []
    for path, module in network.named_modules():
        if isinstance(chosen := getattr(module, "chosen", None), Chosen):
            handles.append(module.register_forward_hook(_watch(found, path, chosen)))
    try:
        with in_mode(network, training=False), torch.inference_mode():
            network(torch.zeros(1, *shape))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _watch(found: dict[str, OperationKey | None], path: str, chosen: Chosen) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, c_in, height, width = inputs[0].shape
        free = isinstance(module, nn.Identity)
        found[path] = None if free else (chosen.name, c_in, output.shape[1], height, width, chosen.stride, chosen.kind)

    return hook


def predict(space: AnySpace, genotype: Genotype, table: Mapping[Any, float], shape: Shape, **options: Any) -> float:
    """Milliseconds of an architecture by a table: the constant and the sum of its operations.

    Args:
        space: The space of the genotype.
        genotype: The architecture.
        table: What :func:`~netwright.search.latency.measure` gave for the same space, shape and options.
        shape: (C, H, W) of one input.
        **options: Handed to ``space.build``.

    Raises:
        KeyError: If the table misses an operation.
    """
    network = space.build(genotype, shape[0], 2, **options)
    keys = operations_of(network, shape).values()
    return float(table[CONSTANT]) + sum(float(table[key]) for key in keys if key is not None)
