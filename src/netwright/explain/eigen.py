"""Eigen-CAM: where the features of a layer are, by their first principal direction; no gradients and no class.

Muhammad and Yeasin, "Eigen-CAM: Class Activation Map using Principal Components", IJCNN 2020, arXiv:2008.00299. The
activations of one image, reshaped to O of shape (h w, C) with a row for every position, are projected on their first
right singular vector,

    O = Psi Sigma V^T,    L = O v_1 = sigma_1 psi_1,

and L, reshaped to h x w, is the map: its sign is fixed, what is below 0 is cut off, and it is brought to [0, 1]. Only
the first pair is needed, which the Gram matrix O O^T has for its first eigenvector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from netwright.nn.activations import last_convolution
from netwright.nn.modes import in_mode

Sign = Literal["auto", "sum", "minmax", "activation"]
Transform = Callable[[Tensor], Tensor]
# A gap of singular values below which the first direction is not unique, and below which squaring them costs digits.
DEGENERATE, CLOSE = 1e-6, 1e-4
UNDECIDED = 1e-8


class EigenMap(NamedTuple):
    """A map and what there is to know of it.

    Attributes:
        map: (batch, rows, columns), or without the batch.
        singular_values: The first two, of the component asked for and the one after it, (batch, 2).
        degenerate: Whether they are so close that the direction is not unique.
    """

    map: Tensor
    singular_values: Float[Tensor, "batch two"]
    degenerate: Bool[Tensor, " batch"]


@overload
def eigen_cam(
    activations: Tensor,
    center: bool = ...,
    component: int = ...,
    sign: Sign = ...,
    normalize: bool = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def eigen_cam(
    activations: Tensor,
    center: bool = ...,
    component: int = ...,
    sign: Sign = ...,
    normalize: bool = ...,
    *,
    return_info: Literal[True],
) -> EigenMap: ...


def eigen_cam(
    activations: Tensor,
    center: bool = False,
    component: int = 0,
    sign: Sign = "auto",
    normalize: bool = True,
    return_info: bool = False,
) -> Tensor | EigenMap:
    """The map of a layer's activations; images of a batch have nothing to do with each other.

    Args:
        activations: (C, h, w) or (batch, C, h, w), finite, with h w > 1.
        center: Whether each channel's spatial mean is taken away first, as true principal components (and most other
            implementations) have it; the paper does not.
        component: Number of the principal direction, from 0, below min(h w, C).
        sign: What decides the sign, which no decomposition does. ``"sum"`` makes the sum positive; ``"minmax"`` turns a
            map whose least value is further from 0 than its largest; of both, where that is undecided the largest
            absolute value (of equals the first) becomes positive. ``"auto"`` is the one for maps as they are, the other
            for centred ones. ``"activation"`` makes it agree with the mean over the channels, which serves better where
            the background dominates.
        normalize: Cut off at 0 and bring to [0, 1]; a constant map becomes 0. Without, L itself is returned.
        return_info: Return an :class:`EigenMap`.

    Returns:
        (h, w) or (batch, h, w), of the activations' type and on their device. Activations that are zero (centred:
        constant over the places) give zeros.

    Raises:
        ValueError: If the shape is another, there is a single place, ``sign`` is unknown, or a value is not finite.
        IndexError: If there is no such component.

    Example:
        >>> places = torch.tensor([[3.0, 0.0], [0.0, 1.0]])     # two places of two channels
        >>> eigen_cam(places.T.reshape(2, 1, 2))
        tensor([[1., 0.]])
    """
    if activations.ndim not in (3, 4):
        raise ValueError(f"activations must be (C, h, w) or (batch, C, h, w), got shape {tuple(activations.shape)}")
    if sign not in get_args(Sign):
        raise ValueError(f"sign must be one of {', '.join(get_args(Sign))}, got {sign!r}")
    batch = activations.detach() if activations.ndim == 4 else activations.detach()[None]
    channels, rows, columns = batch.shape[1:]
    if rows * columns < 2:
        raise ValueError(f"activations must have at least 2 places, got {rows} x {columns}")
    most = min(rows * columns, channels)
    if not 0 <= component < most:
        raise IndexError(f"component must lie in [0, {most}), got {component}")
    if not batch.isfinite().all():
        raise ValueError("activations must be finite, got NaN or infinity")
    precise = batch.double() if batch.dtype == torch.float64 else batch.float()
    matrix = precise.flatten(2).mT  # (batch, places, channels)
    if center:
        matrix = matrix - matrix.mean(1, keepdim=True)
    scores, values = _scores(matrix, component)
    scores = scores * _direction(scores, precise.mean(1).flatten(1), center, sign)[:, None]
    if normalize:
        scores = _unit(scores.clamp_min(0))
    found = scores.view(-1, rows, columns).to(activations.dtype)
    found = found if activations.ndim == 4 else found[0]
    if not return_info:
        return found
    first, second = values.unbind(1)
    return EigenMap(found, values, (first - second <= DEGENERATE * first) & (first > 0))


def _scores(matrix: Float[Tensor, "batch places channels"], component: int) -> tuple[Tensor, Tensor]:
    """L of each image, its sign open, and the two singular values."""
    places, channels = matrix.shape[1:]
    wide = matrix.double()
    gram = wide @ wide.mT if places <= channels else wide.mT @ wide
    squares, vectors = torch.linalg.eigh(gram)  # ascending
    at = -1 - component
    values = squares.clamp_min(0).sqrt().flip(1)
    values = functional.pad(values, (0, 1))[:, component : component + 2]
    leading = vectors[:, :, at]
    scores = values[:, :1] * leading if places <= channels else (wide @ leading[:, :, None]).squeeze(2)
    # Squaring singular values that are close costs the digits that tell them apart.
    close = (values[:, 0] - values[:, 1] < CLOSE * values[:, 0]) & (values[:, 0] > 0)
    for image in close.nonzero().flatten().tolist():
        left, exact, _ = torch.linalg.svd(wide[image], full_matrices=False)
        scores[image] = exact[component] * left[:, component]
        values[image] = functional.pad(exact, (0, 1))[component : component + 2]
    # What is left of constant activations after their mean is rounding.
    floor = torch.finfo(matrix.dtype).eps * max(places, channels) * matrix.abs().amax((1, 2))
    scores = torch.where((values[:, :1] > floor[:, None].double()), scores, 0.0)
    return scores.to(matrix.dtype), values.to(matrix.dtype)


def _direction(
    scores: Float[Tensor, "batch places"], mean: Float[Tensor, "batch places"], center: bool, sign: Sign
) -> Float[Tensor, " batch"]:
    """1 or -1 for each image."""
    absolute = scores.abs()
    largest = scores.gather(1, absolute.argmax(1, keepdim=True)).squeeze(1)
    if sign == "activation":
        against = (scores - scores.mean(1, keepdim=True)) * (mean - mean.mean(1, keepdim=True))
        decision = against.sum(1)
        undecided = decision == 0
    elif sign == "minmax" or (sign == "auto" and center):
        decision = scores.amax(1) + scores.amin(1)
        undecided = decision.abs() <= torch.finfo(scores.dtype).eps * absolute.amax(1)
    else:
        decision = scores.sum(1)
        undecided = decision.abs() < UNDECIDED * absolute.sum(1)
    # Of equal values that rounding tells apart the first one decides.
    top = absolute >= (1 - 1e-5) * absolute.amax(1, keepdim=True)
    first = scores.gather(1, top.int().argmax(1, keepdim=True)).squeeze(1)
    decided = torch.where(undecided, torch.where(first == 0, largest, first), decision)
    return torch.where(decided < 0, -1.0, 1.0).to(scores)


def _unit(scores: Float[Tensor, "batch places"]) -> Float[Tensor, "batch places"]:
    """Each row brought to [0, 1]; constant rows become 0."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    return torch.where(high > low, (scores - low) / torch.where(high > low, high - low, 1.0), 0.0)


def last_conv(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """The last 2d convolution in the order in which they run, or without an example in the order of definition.

    Args:
        model: A network.
        example: A batch of inputs to run it on.

    Raises:
        ValueError: If there is none.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten())
        >>> last_conv(net, torch.zeros(1, 1, 8, 8)) is net[2]
        True
    """
    if example is None:
        return last_convolution(model)
    ran: list[nn.Module] = []
    with ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, nn.Conv2d):
                handle = part.register_forward_hook(lambda module, given, output: ran.append(module))
                stack.callback(handle.remove)
        stack.enter_context(in_mode(model, training=False))
        with torch.inference_mode():
            model(example)
    return ran[-1] if ran else last_convolution(model)


class EigenCAM:
    """Maps of a network's layers, from one forward pass of a batch.

    The tensor that is looked at is what the next layer sees: where a ReLU that works in place follows the layer, that
    is its result. The network runs in evaluation mode without gradients and is left as it was; hooks are there during a
    pass only.

    Args:
        model: Any network.
        target_layers: Layers, or their names in ``named_modules``; several maps are averaged and brought to [0, 1]
            again. With None the last convolution that ran.
        reshape_transform: Turns a layer's output into (batch, C, h, w): for tokens (batch, T, C) it drops the class
            token and restores the grid, as :func:`grid_of_tokens` does.
        center: As for :func:`eigen_cam`.
        upsample: Bring maps to the size of the input, bilinearly; without, all layers must have maps of one size.

    Raises:
        ValueError: If no layer is given, and in a call if a layer did not run or its output has no places.
        TypeError: If there is no layer of a name.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 5))
        >>> EigenCAM(net, ["1"])(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        target_layers: Sequence[nn.Module | str] | None = None,
        reshape_transform: Transform | None = None,
        center: bool = False,
        upsample: bool = True,
    ):
        if target_layers is not None and not len(target_layers):
            raise ValueError("target_layers must be at least 1, got 0")
        known = dict(model.named_modules())
        self.model, self.reshape_transform, self.center, self.upsample = model, reshape_transform, center, upsample
        for layer in target_layers or ():
            if isinstance(layer, str) and layer not in known:
                raise TypeError(f"target_layers must name parts of the model, got {layer!r}")
        self.layers = (
            None if target_layers is None else [known[la] if isinstance(la, str) else la for la in target_layers]
        )
        self._handles: list[Any] = []

    def __call__(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch height width"]:
        """The maps, in [0, 1]."""
        layers = [last_conv(self.model, x[:1])] if self.layers is None else self.layers
        seen: dict[int, Tensor] = {}
        try:
            for layer in layers:
                self._handles.append(layer.register_forward_hook(lambda m, given, out: seen.__setitem__(id(m), out)))
            with in_mode(self.model, training=False), torch.inference_mode():
                self.model(x)
        finally:
            self.close()
        maps = []
        for layer in layers:
            if id(layer) not in seen:
                raise ValueError(f"target_layers must run, got {type(layer).__name__}, which was never called")
            features: Any = seen[id(layer)]
            features = features if self.reshape_transform is None else self.reshape_transform(features)
            if not isinstance(features, Tensor) or features.ndim != 4:
                shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
                raise ValueError(f"a layer must give (batch, C, h, w), got {shape}: give a reshape_transform")
            cam = eigen_cam(features, self.center)[:, None]
            if self.upsample:
                cam = functional.interpolate(cam.float(), x.shape[-2:], mode="bilinear", align_corners=False).to(cam)
            maps.append(cam[:, 0])
        if len(maps) == 1:
            return maps[0]
        mean = torch.stack(maps).mean(0)
        return _unit(mean.flatten(1)).view_as(mean)

    def __enter__(self) -> EigenCAM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Takes away hooks that a failed pass may have left."""
        while self._handles:
            self._handles.pop().remove()


def grid_of_tokens(tokens: Float[Tensor, "batch count channels"]) -> Float[Tensor, "batch channels rows columns"]:
    """Tokens of a square picture as a grid; tokens before those of the picture (class, registers) are dropped.

    Raises:
        ValueError: If there are fewer than 4 tokens or the output is not (batch, tokens, channels).

    Example:
        >>> grid_of_tokens(torch.zeros(2, 197, 768)).shape
        torch.Size([2, 768, 14, 14])
    """
    if tokens.ndim != 3 or tokens.shape[1] < 4:
        raise ValueError(f"tokens must be (batch, tokens >= 4, channels), got shape {tuple(tokens.shape)}")
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, -side * side :].mT.unflatten(2, (side, side))
