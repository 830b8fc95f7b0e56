"""Spaces made of choices: any network, written once, with the places where something may be chosen.

A network is a function that builds a module and asks ``choose`` wherever there is a choice::

    def network(choose, in_channels, num_classes):
        return nn.Sequential(
            choose("first", {"3x3": lambda: conv(in_channels, 16, 3), "5x5": lambda: conv(in_channels, 16, 5)}),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))

For the supernet ``choose`` gives a mixed operation of all candidates, for a genotype the one it names, so that supernet
and derived network come from the same lines. The chains of ProxylessNAS, FBNet and Single-Path NAS
(:mod:`netwright.search.spaces.chain`) are written so, and a user's own network can be.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from netwright.console import nearest
from netwright.search.genotype import ChoiceGenotype, Chosen, Genotype

if TYPE_CHECKING:
    import torch
    from torch import nn

    from netwright.search.selection import Rule
    from netwright.search.supernet import Gate, Supernet


class Choose(Protocol):
    """What a network asks for the module at a place where there is a choice."""

    def __call__(
        self,
        key: str,
        candidates: Mapping[str, Callable[[], nn.Module]],
        *,
        stride: int = 1,
        kind: str | None = None,
    ) -> nn.Module:
        """The module.

        Args:
            key: Name of the choice; places with one key have the same candidates and choose alike.
            candidates: What makes each candidate, by name; all map equal inputs to equal shapes.
            stride: Stride of every candidate.
            kind: Candidates of one kind, name and shape cost the same, wherever they stand; the key by default.
        """
        ...


@dataclass(frozen=True)
class ChoiceSpace:
    """A space of choices.

    Attributes:
        name: Its name, which genotypes carry.
        network: ``network(choose, in_channels, num_classes, **options)`` builds the module.
        shape: Height and width of an input that every candidate can take, for the check of shapes.
        version: Raised when the network changes so that old genotypes would build another one.

    Raises:
        ValueError: If the name is no string or empty; from :meth:`choices` on, if the network asks for no choice, for
            one without candidates, or twice for one key with different candidates.

    Example:
        >>> from torch import nn
        >>> def network(choose, in_channels, num_classes):
        ...     sizes = {f"{k}x{k}": lambda k=k: nn.Conv2d(in_channels, 8, k, padding=k // 2) for k in (1, 3)}
        ...     return nn.Sequential(choose("first", sizes), nn.Flatten(), nn.LazyLinear(num_classes))
        >>> space = ChoiceSpace("one-choice", network, shape=(8, 8))
        >>> space.choices(), space.size
        ({'first': ('1x1', '3x3')}, 2)
        >>> space.genotype({"first": "3x3"}).decisions
        (('first', '3x3'),)
    """

    name: str
    network: Callable[..., nn.Module]
    shape: tuple[int, int] = (32, 32)
    version: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name must be a string that is not empty, got {self.name!r}")
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"shape must be (height, width), each >= 1, got {self.shape}")

    def choices(self) -> dict[str, tuple[str, ...]]:
        """Names of the candidates by key, in the order in which the network asks."""
        return dict(_choices(self))

    @property
    def size(self) -> int:
        """Number of genotypes."""
        return math.prod(len(names) for names in self.choices().values())

    def validate(self, genotype: Genotype) -> None:
        """Refuses a genotype that is not of this space.

        Raises:
            ValueError: If the space's name or version, a key or a candidate does not fit, or a choice is missing.
        """
        if (genotype.space, genotype.version) != (self.name, self.version):
            raise ValueError(
                f"the genotype must be of space {self.name!r} version {self.version}, got {genotype.space!r} version "
                f"{genotype.version}"
            )
        if not isinstance(genotype, ChoiceGenotype):
            raise ValueError(f"a genotype of space {self.name!r} must have decisions, got a {type(genotype).__name__}")
        known, given = self.choices(), dict(genotype.decisions)
        if missing := [key for key in known if key not in given]:
            raise ValueError(f"decisions must hold every choice of space {self.name!r}, missing {', '.join(missing)}")
        for key, name in given.items():
            if key not in known:
                raise ValueError(f"decisions must name choices of space {self.name!r}, got {key!r}")
            if name not in known[key]:
                raise ValueError(
                    f"choice {key!r} must be one of {', '.join(known[key])}, got {name!r}; {nearest(name, known[key])}"
                )

    def genotype(self, decisions: Mapping[str, str]) -> ChoiceGenotype:
        """The genotype with a candidate for every key.

        Raises:
            ValueError: If a key or a candidate is unknown, or a choice is missing.
        """
        known = self.choices()
        ordered = [(key, decisions[key]) for key in known if key in decisions]
        ordered += [(key, name) for key, name in decisions.items() if key not in known]
        genotype = ChoiceGenotype(tuple(ordered), space=self.name, version=self.version)
        self.validate(genotype)
        return genotype

    def decisions(self, genotype: Genotype) -> dict[str, str]:
        """The candidate of every key.

        Raises:
            ValueError: If the genotype is not of this space.
        """
        self.validate(genotype)
        assert isinstance(genotype, ChoiceGenotype)
        return dict(genotype.decisions)

    def random(self, generator: torch.Generator) -> ChoiceGenotype:
        """A genotype drawn uniformly."""
        import torch

        drawn = {}
        for key, names in self.choices().items():
            drawn[key] = names[int(torch.randint(len(names), (), generator=generator))]
        return self.genotype(drawn)

    def selector(self) -> Rule:
        """The rule that derives a genotype when no other is given: the largest weight of every choice."""
        from netwright.search.selection import ArgmaxSelector

        return ArgmaxSelector()

    def supernet(
        self, in_channels: int = 3, num_classes: int = 10, *, seed: int = 0, gate: Gate | None = None, **options: Any
    ) -> Supernet:
        """The supernet: the network with every candidate, weights and alphas drawn from streams of ``seed``.

        Args:
            in_channels: Channels of the images.
            num_classes: Number of classes.
            seed: Of weights and architecture parameters.
            gate: Mixing rule of every choice, softmax if ``None``.
            **options: Handed to the network; those that are None are left out.

        Raises:
            ValueError: If candidates of one choice give different shapes.
        """
        from netwright.search.spaces.choice_supernet import ChoiceSupernet

        return ChoiceSupernet(self, in_channels, num_classes, seed=seed, gate=gate, options=_given(options))

    def build(
        self,
        genotype: Genotype,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> nn.Module:
        """The network of a genotype, made from the genotype alone.

        Args:
            genotype: An architecture of this space.
            in_channels: Channels of the images.
            num_classes: Number of classes.
            seed: Of the initial weights; ``None`` draws from torch's global generator.
            **options: Handed to the network; those that are None are left out.

        Raises:
            ValueError: If the genotype is not of this space.
        """
        from contextlib import nullcontext

        from netwright.seeding import seeded

        chosen = self.decisions(genotype)

        def choose(
            key: str, candidates: Mapping[str, Callable[[], nn.Module]], *, stride: int = 1, kind: str | None = None
        ) -> nn.Module:
            made: Any = candidates[chosen[key]]()
            made.chosen = Chosen(chosen[key], stride, key if kind is None else kind)
            return made

        with nullcontext() if seed is None else seeded(seed, "init"):
            return self.network(choose, in_channels, num_classes, **_given(options))


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


@functools.lru_cache(maxsize=64)
def _choices(space: ChoiceSpace) -> Mapping[str, tuple[str, ...]]:
    """Runs the network once, on no memory, and listens."""
    import torch

    found: dict[str, tuple[str, ...]] = {}

    def choose(key: str, candidates: Mapping[str, Callable[[], nn.Module]], **_: Any) -> nn.Module:
        names = tuple(candidates)
        if not key or "." in key:
            raise ValueError(f"key must be a non-empty string without a dot, got {key!r}")
        if not names:
            raise ValueError(f"choice {key!r} must have at least 1 candidate, got 0")
        if found.setdefault(key, names) != names:
            raise ValueError(f"choices of key {key!r} must have the same candidates, got {names} and {found[key]}")
        return candidates[names[0]]()

    with torch.device("meta"):
        space.network(choose, 3, 2)
    if not found:
        raise ValueError(f"the network of space {space.name!r} must ask for at least 1 choice, got none")
    return found
