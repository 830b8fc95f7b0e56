"""A supernet with one path: every layer is the largest block, with a superkernel that decides how much of it is used.

Stamoulis et al., "Single-Path NAS: Designing Hardware-Efficient ConvNets in less than 4 Hours", ECML-PKDD 2019,
arXiv:1904.02877.

    y_l = W_l * x,    W_l = sum_ji a_lj c_li W_l on channels j and ring i,    a, c in {0, 1} by norms and thresholds
    E[R] = const + sum_l R_l(a_l, c_l)

It is made from any chain of blocks whose layers choose among kernels and expansions
(:mod:`netwright.search.spaces.chain`), so genotypes, tables and derived networks are those of that space. The
indicators of all layers (:mod:`netwright.search.superkernel`) are computed at once, before each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.search.spaces.operations import channels_last
from netwright.search.superkernel import Decided, Scale, decide, draw_scales, runtime
from netwright.search.superkernel_block import Candidates, SuperKernelMBConv, sides
from netwright.search.supernet import Supernet, check_costs
from netwright.seeding import seeded

if TYPE_CHECKING:
    from netwright.search.genotype import Genotype
    from netwright.search.selection import Selector
    from netwright.search.spaces.choices import ChoiceSpace
    from netwright.search.supernet import Gate, OperationKey


def check_space(space: Any) -> None:
    """Refuses a space whose layers no superkernel holds.

    Raises:
        ValueError: If its network is no chain of blocks, or a layer does not choose among all pairs of some kernels and
            expansions, in the same way as the others.
    """
    if not callable(getattr(space, "network", None)):
        raise ValueError(
            f"a supernet of superkernels must have a space of blocks, such as 'micro-chain', got {space.name!r}"
        )
    layers = [sides(key, names) for key, names in space.choices().items()]
    if len({(*kernels, *(e / expansions[-1] for e in expansions)) for kernels, expansions in layers}) != 1:
        raise ValueError("all layers must choose among the same kernels and ratios")


class SuperKernelSupernet(Supernet):
    """The largest network of a chain, with thresholds that tell how much of each layer is used.

    Its weights are those of the largest network under the same seed, and K - 1 + R thresholds a layer, zero, so that
    everything is on: for kernels 3 and 5 and two expansions three. In a layer that may not be skipped the one for the
    smallest expansion has no effect.

    Args:
        space: A space whose network is a chain; its layers choose among all pairs of some kernels and expansions, and
            the identity where shapes allow.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        seed: Of the weights.
        exact_skip: Whether the branch of a layer that is skipped is multiplied by 0; the published code has its
            constant instead.
        exact_mask: Whether channels that are off are masked before the projection; the published code has their
            relu(beta) there. With the mask the gradient of the task reaches the ratios' indicators: without it, a
            kernel's factor goes under in the norm that follows.
        squared: Compare squared norms, as the paper writes and its code does not.
        scale: ``"sqrt_numel"`` divides each norm by the root of the number of weights it is taken over; not in the
            paper.
        **options: Handed to the network; those that are None are left out.

    Attributes:
        arch: The thresholds t of every layer by key: of kernels but the first, then of ratios.
        indicator_dropout: Share of the indicators that are dropped in a pass of training after :meth:`redraw`; the
            others are multiplied by 1 / (1 - indicator_dropout).

    Raises:
        ValueError: If the space is none of these.

    Example:
        >>> from netwright.search import spaces
        >>> supernet = SuperKernelSupernet(spaces.get("micro-chain"), 1, 10)
        >>> supernet.derive().operations
        ('k5_e4', 'k5_e4', 'k5_e4', 'k5_e4', 'k5_e4', 'k5_e4')
        >>> _ = supernet.arch["layer_1"].data[1].fill_(9.0)
        >>> supernet.derive().operations[:2]
        ('k5_e4', 'skip')
    """

    def __init__(
        self,
        space: ChoiceSpace,
        in_channels: int = 3,
        num_classes: int = 10,
        *,
        seed: int = 0,
        exact_skip: bool = True,
        exact_mask: bool = True,
        squared: bool = False,
        scale: Scale = "none",
        **options: Any,
    ) -> None:
        check_space(space)
        super().__init__(space, num_classes)
        self.indicator_dropout = 0.0
        self.squared, self.scale = squared, scale

        def choose(key: str, candidates: Candidates, *, stride: int = 1, kind: str | None = None) -> nn.Module:
            return SuperKernelMBConv(
                candidates, key=key, stride=stride, kind=key if kind is None else kind, exact_skip=exact_skip,
                exact_mask=exact_mask, squared=squared, scale=scale, thresholds=self.arch,
            )  # fmt: skip

        given = {name: value for name, value in options.items() if value is not None}
        with seeded(seed, "init"):
            self.network = space.network(choose, in_channels, num_classes, **given)
        # Images come in this order; weights in another one make a step take twice as long.
        self.network.to(memory_format=torch.channels_last)
        self._layers = tuple(layer for _, layer in self.named_choices())
        self._scales: Tensor | None = None

    def named_choices(self) -> Iterator[tuple[str, Any]]:
        """Every layer with a superkernel, with its module name."""
        for name, module in self.named_modules():
            if isinstance(module, SuperKernelMBConv):
                yield name, module

    def keyed_choices(self) -> dict[str, Any]:
        """The layers with superkernels by key."""
        return {layer.key: layer for layer in self._layers}

    def set_gate(self, gate: Gate, key: str | None = None) -> None:
        """Refused: superkernels have no gates.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a supernet of superkernels has no gates; use space.supernet() for one of several paths")

    def redraw(self, part: str, batch: int = 1) -> None:
        """Draws which indicators are dropped in the next passes of training; an objective calls it before each."""
        thresholds = next(iter(self.arch.values()))
        self._scales = (
            draw_scales((len(self._layers), len(thresholds)), self.indicator_dropout, thresholds)
            if self.indicator_dropout
            else None
        )

    def decide(self, *, drawn: bool = False) -> Decided:
        """The indicators of all layers, in the order of :attr:`arch`.

        Args:
            drawn: Whether they are dropped as :meth:`redraw` drew.
        """
        superkernels = [layer.superkernel for layer in self._layers]
        return decide(
            torch.stack([superkernel.cells() for superkernel in superkernels]),
            torch.stack(list(self.arch.values())),
            torch.stack([superkernel.skippable for superkernel in superkernels]),
            sizes=torch.stack([superkernel.sizes for superkernel in superkernels]) if self.scale != "none" else None,
            scales=self._scales if drawn else None,
            squared=self.squared,
        )

    def indicators(self) -> dict[str, Tensor]:
        """The indicators of every layer by key, without dropout: of kernels but the first, then of ratios."""
        return dict(zip(self.arch, self.decide().indicators.unbind(0), strict=True))

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        self.input_shape = tuple(x.shape[1:])
        decided = self.decide(drawn=self.training)
        try:
            for number, layer in enumerate(self._layers):
                layer.decided = decided.at(number)
            logits: Tensor = self.network(channels_last(x))
        finally:
            for layer in self._layers:
                layer.decided = None
        return logits

    def mixing_weights(self, *, drawn: bool = False) -> dict[str, Tensor]:
        """1 for the candidate that each layer has decided for, else 0; differentiable in weights and thresholds."""
        decided = self.decide(drawn=drawn)
        return {layer.key: layer.mixing_weights(decided.at(i)) for i, layer in enumerate(self._layers)}

    def operations(self, shape: tuple[int, int, int]) -> dict[OperationKey, tuple[nn.Module, tuple[int, int, int]]]:
        """Every distinct candidate but the identity for inputs of ``shape``: a module of its kind and its input."""
        found: dict[OperationKey, tuple[nn.Module, tuple[int, int, int]]] = {}
        places = self._shapes(shape)
        with seeded(0, "operations"):
            for name, layer in self.named_choices():
                for candidate, key in layer.keys(*places[name]).items():
                    if key not in found:
                        found[key] = layer.candidates[candidate](), places[name][0]
        return found

    def priced(self, costs: Mapping[str, Sequence[float]], *, drawn: bool | None = None) -> Float[Tensor, ""]:
        """The modelled cost of all layers, differentiable in weights and thresholds; :meth:`expected_cost` is this.

        Args:
            costs: Cost of every candidate by key; those of the largest kernel and of the largest expansion are used.
            drawn: Without effect: what is dropped in a pass is not cheaper.

        Raises:
            ValueError: If ``costs`` has not one number for every candidate of every layer, or one that is used is not
                positive.
        """
        check_costs(costs, {layer.key: layer.names for layer in self._layers})
        rows = [layer.rows(costs[layer.key]) for layer in self._layers]
        decided = self.decide()
        by_ratio, by_kernel = (decided.rings.new_tensor(side) for side in zip(*rows, strict=True))
        return runtime(by_ratio, by_kernel, decided).sum()

    def candidate_costs(
        self, table: Mapping[OperationKey, float], shape: tuple[int, int, int] | None = None
    ) -> dict[str, list[float]]:
        """The cost of every candidate by key; as :meth:`Supernet.candidate_costs`."""
        size = shape or self.input_shape
        if size is None:
            raise ValueError("shape must be given before the first forward pass, got None")
        places, costs = self._shapes(tuple(size)), {}
        for name, layer in self.named_choices():
            keys = layer.keys(*places[name])
            if missing := [key for key in keys.values() if key not in table]:
                raise KeyError(f"the table has no cost for {missing}")
            costs[layer.key] = [float(table[keys[n]]) if n in keys else 0.0 for n in layer.names]
        return costs

    def derive(self, selector: Selector | None = None) -> Genotype:
        """The genotype that ``selector`` (what the thresholds say, by default) reads off."""
        from netwright.search.selection import ThresholdSelector

        return (selector or ThresholdSelector()).select(self)

    @torch.no_grad()
    def adopt(self, genotype: Genotype) -> None:
        """Sets the thresholds so that the layers decide for an architecture: 0 for what is on, beyond its norm if off.

        Raises:
            ValueError: If the genotype is not of the supernet's space.

        Example:
            >>> from netwright.search import spaces
            >>> from netwright.seeding import stream
            >>> space = spaces.get("micro-chain")
            >>> supernet, genotype = SuperKernelSupernet(space, 1, 10), space.random(stream(0, "genotype"))
            >>> supernet.adopt(genotype)
            >>> supernet.derive() == genotype
            True
        """
        decisions = self.space.decisions(genotype)
        for layer in self._layers:
            beyond = 2 * layer.superkernel.weight.square().sum().clamp_min(1)
            self.arch[layer.key].copy_(torch.tensor([0.0 if on else 1.0 for on in layer.needs(decisions[layer.key])]))
            self.arch[layer.key].mul_(beyond)

    def _shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, int, int], int]]:
        """Input (C, H, W) and output channels of every layer for a network input of ``shape``."""
        if shape not in self._known_shapes:
            self._known_shapes[shape] = self._places(shape)
        return self._known_shapes[shape]
