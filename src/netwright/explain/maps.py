"""What all maps of a network's layers share: which layers, how maps become pictures, how several become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.explain.layers import Transform, chosen, last_places, name_of, places_of


def unit(scores: Float[Tensor, "batch places"]) -> Float[Tensor, "batch places"]:
    """Each row brought to [0, 1]; constant rows become 0.

    Example:
        >>> unit(torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]]))
        tensor([[0.0000, 1.0000, 0.5000],
                [0.0000, 0.0000, 0.0000]])
    """
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return torch.where(high > low, (scores - low) / torch.where(high > low, high - low, 1.0), 0.0)


class LayerMaps:
    """Maps of layers of a network; :class:`EigenCAM` and :class:`GradCAM` say how one is made.

    Args:
        model: Any network.
        target_layers: Layers, or their names in ``named_modules``; several maps are averaged and brought to [0, 1]
            again. With None the one of :func:`last_places`, found in the first call.
        reshape_transform: Turns a layer's output into (batch, C, h, w). Without, channels last and tokens are
            understood by their proportions: see :func:`with_places`.
        upsample: Bring maps to the size of the input, bilinearly; without, all layers must have maps of one size.

    Attributes:
        layers: The layers, once they are known.
        output: What the network answered in the last call.

    Raises:
        ValueError: If no layer is given.
        TypeError: If there is no layer of a name.
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module | str] | nn.Module | str | None = None,
        reshape_transform: Transform | None = None,
        upsample: bool = True,
    ):
        self.model, self.reshape_transform, self.upsample = model, reshape_transform, upsample
        self.layers = chosen(model, target_layers)
        self.output: Any = None

    @property
    def layer_names(self) -> list[str]:
        """Names of the layers, once they are known."""
        return [name_of(self.model, layer) for layer in self.layers or ()]

    def _known(self, x: Tensor) -> list[nn.Module]:
        """The layers, which the first call finds when none were named."""
        if self.layers is None:
            self.layers = [last_places(self.model, x[:1])[0]]
        return self.layers

    def _places(self, layer: nn.Module, output: Any, x: Tensor) -> Tensor:
        return places_of(layer, output, (x.shape[-2], x.shape[-1]), self.reshape_transform)

    def _joined(self, cams: list[Tensor], x: Tensor) -> Tensor:
        """One map of each image from those of all layers."""
        if self.upsample:
            size = x.shape[-2:]
            cams = [
                functional.interpolate(cam[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0].to(cam)
                for cam in cams
            ]
        if len(cams) == 1:
            return cams[0]
        if len({cam.shape for cam in cams}) > 1:
            shapes = ", ".join(f"{cam.shape[1]} x {cam.shape[2]}" for cam in cams)
            raise ValueError(f"target_layers must have maps of one size without upsample, got {shapes}")
        mean = torch.stack(cams).mean(0)
        return unit(mean.flatten(1)).view_as(mean)
