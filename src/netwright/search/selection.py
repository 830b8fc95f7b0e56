"""Selectors: from a trained supernet to a genotype.

The derivation rule of Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", 2019, arXiv:1806.09055: the
strength of edge (j, i) is the largest mixing weight on it apart from that of ``none``,

    s_(j,i) = max_{o != none} m_o^(j,i),

each node keeps the two strongest edges, and each kept edge its strongest operation apart from ``none``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from netwright.search.protocol import need

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.supernet import Supernet


class Selector(Protocol):
    """Reads a genotype off a supernet; ``train`` and ``validation`` are batches for those that measure or tune."""

    def select(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Genotype:
        """The genotype."""
        ...


Weights = Mapping[str, tuple[tuple[str, ...], Tensor]]


class Rule(Selector, Protocol):
    """A selector that needs the mixing weights alone; the one that a space names is of this kind."""

    def read(self, space: Any, weights: Weights) -> Genotype:
        """The genotype of a space that names and mixing weights of the candidates, by key, say."""
        ...


def mixing(supernet: Supernet) -> dict[str, tuple[tuple[str, ...], Tensor]]:
    """Names of the candidates and finite mixing weights, by key.

    Raises:
        FloatingPointError: If an alpha or a weight is not finite.
    """
    need("a selection by mixing weights", supernet, "keyed_choices", "mixing_weights")
    supernet.arch_parameters()
    found = {}
    choices = supernet.keyed_choices()
    with torch.no_grad():
        for key, weights in supernet.mixing_weights().items():
            if not (supernet.arch[key].isfinite().all() and weights.isfinite().all()):
                raise FloatingPointError(f"alpha of {key!r} must be finite, got {supernet.arch[key].tolist()}")
            found[key] = choices[key].names, weights.cpu()
    return found


class MagnitudeSelector:
    """The DARTS rule for cell spaces: two strongest edges a node, from different predecessors; ties: lowest index.

    ``none`` takes part in the softmax and is left out afterwards.

    Raises:
        ValueError: If the space is not one of cells.
        FloatingPointError: If an alpha is not finite.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = spaces.get("micro-darts-2-shared").supernet(1, 10)
        >>> for alpha in supernet.arch.values():
        ...     _ = alpha.data.copy_(torch.tensor([9.0, 0.0, 0.0, 1.0, 0.0]))
        >>> MagnitudeSelector().select(supernet).normal.ops     # all edges equal: predecessors 0 and 1
        (('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1))
    """

    def select(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Genotype:
        """The genotype; the data and the seed are not needed."""
        weights = mixing(supernet)
        return self.read(supernet.space, weights)

    def read(self, space: Any, weights: Weights) -> Genotype:
        """The genotype that mixing weights say."""
        if not hasattr(space, "incoming"):
            raise ValueError(
                f"MagnitudeSelector must have a space of cells, whose nodes drop edges; {space.name!r} keeps every "
                "choice: use ArgmaxSelector"
            )
        decisions: dict[str, str] = {}
        for keys in space.incoming().values():
            best = {}
            for predecessor, key in enumerate(keys):
                names, m = weights[key]
                allowed = [(-float(m[i]), i) for i, name in enumerate(names) if name != "none"]
                strength, index = min(allowed)
                best[strength, predecessor] = key, names[index]
            decisions.update(best[edge] for edge in sorted(best)[:2])
        return space.genotype(decisions)


class ArgmaxSelector:
    """The candidate of largest mixing weight on every choice, for spaces that keep all choices (chains).

    The supernet's ``space.genotype`` receives the operation by key. Ties: lowest index.

    Raises:
        ValueError: If the space is one of cells.
        FloatingPointError: If an alpha is not finite.
    """

    def select(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Genotype:
        """The genotype; the data and the seed are not needed."""
        weights = mixing(supernet)
        return self.read(supernet.space, weights)

    def read(self, space: Any, weights: Weights) -> Genotype:
        """The genotype that mixing weights say."""
        if hasattr(space, "incoming"):
            raise ValueError(
                f"ArgmaxSelector must have a space that keeps every choice; nodes of {space.name!r} drop "
                "edges: use MagnitudeSelector"
            )
        genotype: Genotype = space.genotype({k: n[int((m == m.max()).nonzero()[0])] for k, (n, m) in weights.items()})
        return genotype


class ThresholdSelector:
    """What the thresholds of superkernels say: for every layer the block that is left of it.

    After Stamoulis et al., "Single-Path NAS", 2019, arXiv:1904.02877: a part of a kernel stays where its norm is at
    least its threshold. (The published decoder ties the expansion to the kernel; this one does not.)

    Raises:
        ValueError: If the supernet has no superkernels.
        FloatingPointError: If a threshold or a weight is not finite.

    Example:
        >>> from netwright.search import spaces
        >>> from netwright.search.superkernel_supernet import SuperKernelSupernet
        >>> ThresholdSelector().select(SuperKernelSupernet(spaces.get("micro-chain"), 1, 10)).operations[0]
        'k5_e4'
    """

    def select(
        self,
        supernet: Supernet,
        train: Iterable[Any] | None = None,
        validation: Iterable[Any] | None = None,
        *,
        seed: int = 0,
    ) -> Genotype:
        """The genotype; the data and the seed are not needed."""
        need("ThresholdSelector", supernet, "keyed_choices")
        layers: dict[str, Any] = dict(supernet.keyed_choices())
        if not all(hasattr(layer, "superkernel") for layer in layers.values()):
            raise ValueError("ThresholdSelector must have a supernet of superkernels: use ArgmaxSelector")
        genotype: Genotype = supernet.space.genotype({key: layer.decision() for key, layer in layers.items()})
        return genotype
