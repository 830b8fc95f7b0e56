"""The supernet of a space of choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from netwright.search.spaces.operations import channels_last
from netwright.search.supernet import Choice, Gate, SoftmaxGate, Supernet
from netwright.seeding import seeded

if TYPE_CHECKING:
    from netwright.search.spaces.choices import ChoiceSpace


class ChoiceSupernet(Supernet):
    """A network with every candidate at each of its choices; see :class:`~netwright.search.spaces.choices.ChoiceSpace`.

    Args:
        space: The space.
        in_channels: Channels of the images.
        num_classes: Number of classes.
        seed: Of weights and architecture parameters.
        gate: Mixing rule of every choice, softmax if ``None``.
        options: Handed to the space's network.

    Raises:
        ValueError: If candidates of one choice give different shapes.
    """

    def __init__(
        self,
        space: ChoiceSpace,
        in_channels: int,
        num_classes: int,
        *,
        seed: int = 0,
        gate: Gate | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(space, num_classes)
        rule = gate or SoftmaxGate()

        def choose(
            key: str, candidates: Mapping[str, Callable[[], nn.Module]], *, stride: int = 1, kind: str | None = None
        ) -> nn.Module:
            made = {name: make() for name, make in candidates.items()}
            return Choice(made, key=key, gate=rule, stride=stride, kind=key if kind is None else kind)

        with seeded(seed, "init"):
            self.network = space.network(choose, in_channels, num_classes, **(options or {}))
        self.initialise_arch(seed, (in_channels, *space.shape))
        # Images come in this order; depthwise weights in another one make a step take twice as long.
        self.network.to(memory_format=torch.channels_last)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch classes"]:
        """The logits."""
        self.input_shape = tuple(x.shape[1:])
        with self.handing_down():
            return self.network(channels_last(x))
