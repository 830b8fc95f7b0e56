"""Grad-CAM and Grad-CAM++: where the features speak for a class, by gradients of its score. The baseline of Eigen-CAM.

Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017,
arXiv:1610.02391; Chattopadhay et al., "Grad-CAM++", WACV 2018, arXiv:1710.11063. The channels A^k of a layer are summed
with weights from the gradient of a class score y,

    map = relu(sum_k w_k A^k),    w_k = mean_ij dy / dA_ij^k

in Grad-CAM; the weights of Grad-CAM++ stand in :mod:`netwright.nn.activations`, where both are computed.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from netwright.explain.layers import Transform
from netwright.explain.maps import LayerMaps, unit
from netwright.nn.activations import CamMethod, class_maps


class GradCAM(LayerMaps):
    """Maps of a network's layers for a class, from one forward and one backward pass of a batch.

    Layers are found, read and joined as :class:`EigenCAM` does it, so that the two can be compared. No gradient of a
    parameter is left behind.

    Args:
        model: Gives logits (batch, classes).
        target_layers: As for :class:`EigenCAM`.
        reshape_transform: Likewise.
        method: ``"gradcam"`` or ``"gradcam++"``.
        upsample: Likewise.

    Raises:
        ValueError: If no layer is given; in a call if ``method`` is unknown, a layer did not run, has no places or no
            part in the score, the network gives no logits, images are whole numbers, or a map is not finite.
        TypeError: If there is no layer of a name.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 5))
        >>> GradCAM(net, ["1"])(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module | str] | nn.Module | str | None = None,
        reshape_transform: Transform | None = None,
        method: CamMethod = "gradcam",
        upsample: bool = True,
    ):
        super().__init__(model, target_layers, reshape_transform, upsample)
        self.method = method

    def __call__(
        self, x: Float[Tensor, "batch channels height width"], target: Int[Tensor, " batch"] | int | None = None
    ) -> Float[Tensor, "batch height width"]:
        """The maps for the class of each image (the predicted one by default), in [0, 1]."""
        found, self.output = class_maps(
            self.model,
            x,
            target,
            layers=self._known(x),
            method=self.method,
            transform=lambda layer, output: self._places(layer, output, x),
        )
        if not all(cam.isfinite().all() for cam in found):
            raise ValueError("activations and their gradients must be finite, got NaN or infinity")
        return self._joined([unit(cam.flatten(1)).view_as(cam) for cam in found], x)
